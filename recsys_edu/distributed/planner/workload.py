"""What there is to place: the tables of a model as arrays, with what the batch asks of them and what the user allows.

    model + sharders + constraints  ->  Workload: one row per table

Everything a user may get wrong is checked here, before any planning, and every error names the table.

Suffix: T, tables, in the order of the model's modules and their configs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.cost import Array, Lookups
from recsys_edu.distributed.planner.topology import DEVICES, Topology
from recsys_edu.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from recsys_edu.distributed.types import ModuleSharder, ShardingType
from recsys_edu.kernels.quantized_rows import RowFormat, row_alignment
from recsys_edu.types import DataType

TYPES = tuple(t.value for t in ShardingType)
KERNELS = tuple(k.value for k in EmbeddingComputeKernel)
NO_CONSTRAINTS = ParameterConstraints()
_LISTS = ("sharding_types", "compute_kernels", "pooling_factors", "num_poolings", "batch_sizes", "feature_names")
_LISTS += ("ranks", "forbidden_ranks", "hosts", "forbidden_hosts")

# Bytes that an optimizer keeps per weight and per row of a table; see the classes in recsys_edu.optim.
_STATE = {
    "SGD": (0, 0),
    "RowWiseAdagrad": (0, 4),
    "Adagrad": (4, 0),
    "LarsSGD": (4, 0),
    "Adam": (8, 0),
    "AdamW": (8, 0),
    "LAMB": (8, 0),
    "PartialRowWiseAdam": (4, 4),
    "PartialRowWiseLAMB": (4, 4),
}
_FUSED_STATE = {
    "SGD": "SGD",
    "EXACT_SGD": "SGD",
    "LARS_SGD": "LarsSGD",
    "ADAGRAD": "Adagrad",
    "EXACT_ADAGRAD": "Adagrad",
    "ROWWISE_ADAGRAD": "RowWiseAdagrad",
    "EXACT_ROWWISE_ADAGRAD": "RowWiseAdagrad",
    "PARTIAL_ROWWISE_ADAM": "PartialRowWiseAdam",
    "PARTIAL_ROWWISE_LAMB": "PartialRowWiseLAMB",
}
OUTPUT_BYTES = {DataType.FP32: 4, DataType.FP16: 2, DataType.BF16: 2, DataType.INT8: 1, DataType.UINT8: 1}


@dataclass(frozen=True)
class Table:
    """One table: where it is, what it is made of, what may be done with it.

    `kernels` maps each allowed sharding type to the allowed kernels. `ranks` is None where any rank will do.
    """

    name: str
    path: str
    module: nn.Module
    parameter: Tensor
    features: tuple[str, ...]
    kernels: Mapping[str, tuple[str, ...]]
    constraint: ParameterConstraints
    sharder: ModuleSharder[Any]
    ranks: tuple[int, ...] | None

    @property
    def pooling_factors(self) -> list[float]:
        return _per_feature(self, "pooling_factors", self.constraint.pooling_factors, c.POOLING_FACTOR)

    @property
    def num_poolings(self) -> list[float]:
        return _per_feature(self, "num_poolings", self.constraint.num_poolings, c.NUM_POOLINGS)

    @property
    def fqn(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class Workload:
    """All tables, and as arrays over them (T) what the cost function reads."""

    tables: tuple[Table, ...]
    rows_T: Array
    columns_T: Array
    block_width_T: Array
    prefetch_T: Array
    lookups: Lookups

    def __len__(self) -> int:
        return len(self.tables)


def read_workload(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[Any]],
    topology: Topology,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None,
) -> Workload:
    """The tables of `module` that a sharder knows.

    Raises:
        PlannerError: nothing to shard; a constraint for an unknown table, with values out of range, of another length
            than the table has features, or that allow nothing.
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        message = f"batch_size {batch_size!r}: expected a whole number, at least 1"
        raise PlannerError(message, PlannerErrorType.INPUT_VALIDATION)
    constraints = {} if constraints is None else constraints
    if not isinstance(constraints, Mapping):
        message = f"constraints: expected a dict from table names to ParameterConstraints, got {constraints!r}"
        raise PlannerError(message, PlannerErrorType.INPUT_VALIDATION)
    found = list(_find(module, sharders))
    if not found:
        known = sorted(s.module_type.__name__ for s in sharders)
        raise PlannerError(
            f"{type(module).__name__} holds no module that a sharder knows; the sharders know {known}",
            PlannerErrorType.INPUT_VALIDATION,
        )
    names = {name for *_, parameters in found for name in parameters}
    unknown = sorted(set(constraints) - names)
    if unknown:
        raise PlannerError(
            f"constraints for unknown tables {unknown}; the model's tables are {sorted(names)[:20]}",
            PlannerErrorType.INPUT_VALIDATION,
        )
    tables: list[Table] = []
    for path, child, sharder, parameters in found:
        features = _features(child)
        allowed = _sharder_allows(sharder, topology.compute_device)
        for name, parameter in parameters.items():
            constraint = constraints.get(name, NO_CONSTRAINTS)
            _check_form(name, constraint)
            if constraint.device_group not in (None, topology.compute_device):
                continue
            kernels = _allowed(name, constraint, allowed, topology.compute_device)
            ranks = _allowed_ranks(name, constraint, topology)
            own = tuple(features.get(name, ("feature",)))
            tables.append(Table(name, path, child, parameter, own, kernels, constraint, sharder, ranks))
    _check_together(tables)
    return _arrays(tables, batch_size, topology.compute_device)


def ids_per_batch(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[Any]],
    topology: Topology,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None,
) -> float:
    """How many ids one rank's batch has, over all features that the planner places.

    Raises:
        PlannerError: a constraint with values out of range, or of another length than its table has features.
    """
    total = 0.0
    for path, child, sharder, parameters in _find(module, sharders):
        features = _features(child)
        for name, parameter in parameters.items():
            constraint = constraints.get(name, NO_CONSTRAINTS) if isinstance(constraints, Mapping) else NO_CONSTRAINTS
            _check_form(name, constraint)
            if constraint.device_group in (None, topology.compute_device):
                own = tuple(features.get(name, ("feature",)))
                table = Table(name, path, child, parameter, own, {}, constraint, sharder, None)
                batches = _per_feature(table, "batch_sizes", constraint.batch_sizes, batch_size)
                total += sum(b * length for b, length in zip(batches, table.pooling_factors))
    return total


def _find(
    module: nn.Module, sharders: Sequence[ModuleSharder[Any]], path: str = ""
) -> Iterator[tuple[str, nn.Module, ModuleSharder[Any], Mapping[str, Tensor]]]:
    """Every module with a sharder, outermost first, not looking inside of one."""
    known = {sharder.module_type: sharder for sharder in sharders}
    pending = [(path, module)]
    while pending:
        here, child = pending.pop()
        sharder = known.get(type(child))
        if sharder is not None:
            yield here, child, sharder, sharder.shardable_parameters(child)
            continue
        below = [(f"{here}.{name}" if here else name, grandchild) for name, grandchild in child.named_children()]
        pending += reversed(below)


def shardable_modules(module: nn.Module, sharders: Sequence[ModuleSharder[Any]]) -> list[str]:
    """Paths of the modules that a sharder knows, with tables or without."""
    return [path for path, *_ in _find(module, sharders)]


def _features(module: nn.Module) -> dict[str, list[str]]:
    for getter in ("embedding_bag_configs", "embedding_configs"):
        if hasattr(module, getter):
            return {config.name: config.feature_names for config in getattr(module, getter)()}
    return {}


def _sharder_allows(sharder: ModuleSharder[Any], device: str) -> dict[str, tuple[str, ...]]:
    return {t: tuple(sharder.compute_kernels(t, device)) for t in sharder.sharding_types(device)}


def _check_form(name: str, constraint: object) -> None:
    """A constraint is a ParameterConstraints, and its lists are lists."""
    if not isinstance(constraint, ParameterConstraints):
        raise PlannerError(
            f"table {name!r}: expected a ParameterConstraints, got {constraint!r}", PlannerErrorType.INPUT_VALIDATION
        )
    for field in _LISTS:
        value = getattr(constraint, field)
        if isinstance(value, (str, int, float)):
            raise PlannerError(
                f"table {name!r}: constraint {field}={value!r}: expected a list, such as [{value!r}]",
                PlannerErrorType.INPUT_VALIDATION,
            )
    if constraint.device_group not in (None, *DEVICES):
        raise PlannerError(
            f"table {name!r}: constraint device_group={constraint.device_group!r}: expected one of {list(DEVICES)}",
            PlannerErrorType.INPUT_VALIDATION,
        )


def _check_together(tables: Sequence[Table]) -> None:
    """Tables that have to stay together need a rank that all of them may have."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        if table.constraint.together is not None:
            groups.setdefault(table.constraint.together, []).append(table)
    for group, members in groups.items():
        cut = [table for table in members if ShardingType.TABLE_WISE.value not in table.kernels]
        if cut:
            raise PlannerError(
                f"table {cut[0].name!r}: constraint together={group!r} keeps it whole, table_wise on one rank, but its "
                f"constraint sharding_types={cut[0].constraint.sharding_types} with compute_kernels="
                f"{cut[0].constraint.compute_kernels} leaves only {', '.join(cut[0].kernels)}",
                PlannerErrorType.STRICT_CONSTRAINTS,
            )
        bound = [table for table in members if table.ranks is not None]
        if bound and not set.intersection(*(set(table.ranks or ()) for table in bound)):
            may = ", ".join(f"{table.name!r} only ranks {list(table.ranks or ())}" for table in bound)
            raise PlannerError(
                f"tables together as {group!r} have no rank in common: their constraints leave {may}",
                PlannerErrorType.STRICT_CONSTRAINTS,
            )


def _allowed(
    name: str, constraint: ParameterConstraints, sharder_allows: Mapping[str, tuple[str, ...]], device: str
) -> dict[str, tuple[str, ...]]:
    """Sharding type to kernels: what the sharder offers, narrowed by the user."""
    wanted_types, wanted_kernels = constraint.sharding_types, constraint.compute_kernels
    for kind, wanted, known in (("sharding type", wanted_types, TYPES), ("compute kernel", wanted_kernels, KERNELS)):
        wrong = sorted(set(wanted or ()) - set(known))
        if wrong:
            raise PlannerError(
                f"table {name!r}: {kind} {wrong[0]!r}: expected one of {list(known)}",
                PlannerErrorType.INPUT_VALIDATION,
            )
    dense, fused = EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value
    allowed = {}
    for sharding_type, offered in sharder_allows.items():
        if wanted_types is not None and sharding_type not in wanted_types:
            continue
        kernels = offered
        if wanted_kernels is not None:
            kernels = tuple(k for k in wanted_kernels if k in offered)
        if fused in kernels:
            kernels = tuple(k for k in kernels if k != dense)  # the same table, with its gradient kept besides
        if kernels:
            allowed[sharding_type] = kernels
    if not allowed:
        offers: dict[tuple[str, ...], list[str]] = {}
        for sharding_type, offered in sharder_allows.items():
            offers.setdefault(tuple(offered), []).append(sharding_type)
        offer = "; ".join(f"{', '.join(types)} with {' or '.join(kernels)}" for kernels, types in offers.items())
        said = [
            f"{field}={wanted}"
            for field, wanted in (("sharding_types", wanted_types), ("compute_kernels", wanted_kernels))
            if wanted is not None
        ]
        raise PlannerError(
            f"table {name!r}: nothing is left to choose from. Its constraint says {' and '.join(said)}; its sharder "
            f"offers, for {device}: {offer}",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )
    return allowed


def without_constraints(workload: Workload, device: str) -> tuple[Workload, list[Table]]:
    """The workload without what constraints say of sharding types and kernels, and the tables that had such ones."""
    bound = [
        table
        for table in workload.tables
        if table.constraint.sharding_types is not None or table.constraint.compute_kernels is not None
    ]
    tables = tuple(
        replace(table, kernels=_allowed(table.name, NO_CONSTRAINTS, _sharder_allows(table.sharder, device), device))
        for table in workload.tables
    )
    return replace(workload, tables=tables), bound


def _allowed_ranks(name: str, constraint: ParameterConstraints, topology: Topology) -> tuple[int, ...] | None:
    """The ranks that may hold a part of the table; None where all may."""
    world, local = topology.world_size, topology.local_world_size
    fields = {
        "ranks": world,
        "forbidden_ranks": world,
        "hosts": world // local,
        "forbidden_hosts": world // local,
    }
    given = {field: getattr(constraint, field) for field in fields if getattr(constraint, field) is not None}
    if not given:
        return None
    for field, size in fields.items():
        for number in given.get(field, ()):
            if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= number < size:
                raise PlannerError(
                    f"table {name!r}: constraint {field}={given[field]}, but there are 0 to {size - 1}",
                    PlannerErrorType.INPUT_VALIDATION,
                )
    ranks = set(given.get("ranks", range(world)))
    if "hosts" in given:
        ranks &= {rank for rank in range(world) if rank // local in given["hosts"]}
    ranks -= set(given.get("forbidden_ranks", ()))
    ranks -= {rank for rank in range(world) if rank // local in given.get("forbidden_hosts", ())}
    if not ranks:
        raise PlannerError(
            f"table {name!r}: its constraints leave no rank: "
            + ", ".join(f"{field}={value}" for field, value in given.items())
            + f" (ranks 0 to {world - 1}, {local} per host)",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )
    return None if len(ranks) == world else tuple(sorted(ranks))


def _arrays(tables: Sequence[Table], batch_size: int, device: str) -> Workload:
    columns: dict[str, list[float]] = {}
    if not tables:
        none = np.empty(0)
        empty = dict.fromkeys(Lookups.__dataclass_fields__, none) | dict.fromkeys(("pooled", "weighted"), none > 0)
        return Workload((), none, none, none, none, Lookups(**empty))
    for table in tables:
        for key, value in _numbers(table, batch_size, device).items():
            columns.setdefault(key, []).append(value)
    arrays = {key: np.array(values, dtype=np.float64) for key, values in columns.items()}
    flags = {key: arrays.pop(key).astype(bool) for key in ("pooled", "weighted")}
    own = {f"{key}_T": arrays.pop(key) for key in ("rows", "columns", "block_width", "prefetch")}
    return Workload(tuple(tables), lookups=Lookups(**arrays, **flags), **own)


def _numbers(table: Table, batch_size: int, device: str) -> dict[str, float]:
    constraint, lengths, poolings = table.constraint, table.pooling_factors, table.num_poolings
    batches = _per_feature(table, "batch_sizes", constraint.batch_sizes, batch_size)
    num_rows, num_columns = table.parameter.shape
    if min(num_rows, num_columns) < 1:
        raise PlannerError(
            f"table {table.name!r} has {num_rows} rows and {num_columns} columns: both must be at least 1",
            PlannerErrorType.INPUT_VALIDATION,
        )
    element_bytes, row_bytes = weight_bytes(table.parameter, device)
    answer, output = answer_bytes(table.module, table.parameter), constraint.output_dtype
    state = optimizer_state_bytes(table.parameter, getattr(table.sharder, "fused_params", None))
    cache = constraint.cache_params
    ratio = c.UVM_CACHING_RATIO if cache is None or cache.load_factor is None else cache.load_factor
    if not 0 <= ratio <= 1:
        raise PlannerError(
            f"table {table.name!r}: cache_params.load_factor {ratio}: expected 0 to 1",
            PlannerErrorType.INPUT_VALIDATION,
        )
    stats = None if cache is None else cache.stats
    width = constraint.min_partition
    if width is not None and width < 1:
        raise PlannerError(
            f"table {table.name!r}: min_partition {width}: expected at least 1 column",
            PlannerErrorType.INPUT_VALIDATION,
        )
    return {
        "rows": num_rows,
        "columns": num_columns,
        "block_width": width or c.MIN_CW_DIM,
        "prefetch": bool(cache is not None and cache.prefetch_pipeline),
        "ids": sum(b * length * p for b, length, p in zip(batches, lengths, poolings)),
        "bags": sum(b * min(length, 1) * p for b, length, p in zip(batches, lengths, poolings)),  # empty ones are free
        "pooled": not hasattr(table.module, "embedding_configs"),
        "weighted": bool(getattr(table.module, "is_weighted", lambda: False)()),
        "element_bytes": element_bytes,
        "answer_bytes": answer,
        "output_bytes": answer if output is None else OUTPUT_BYTES.get(output, 4),
        "state_per_cell": state[0],
        "state_per_row": state[1] + row_bytes,
        "cache_ratio": ratio,
        "misses": 0.0 if stats is None else stats.expected_miss_rate(ratio) * stats.expected_lookups,
    }


def _per_feature(table: Table, field: str, given: Sequence[float] | None, default: float) -> list[float]:
    """One number per feature; a single one stands for all."""
    values = list(given) if given else [default]
    if len(values) == 1:
        values = values * len(table.features)
    if len(values) != len(table.features):
        raise PlannerError(
            f"table {table.name!r}: constraint {field}={values} has {len(values)} numbers; the table has "
            f"{len(table.features)} feature{'s' * (len(table.features) != 1)} {list(table.features)}",
            PlannerErrorType.INPUT_VALIDATION,
        )
    for feature, value in zip(table.features, values):
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise PlannerError(
                f"table {table.name!r}, feature {feature!r}: constraint {field} is {value!r}: expected a number >= 0",
                PlannerErrorType.INPUT_VALIDATION,
            )
    return values


def weight_bytes(parameter: Tensor, device: str) -> tuple[float, float]:
    """(per weight, per row) bytes of a table's numbers; rows of codes have a scale, a bias and perhaps padding besides.

    Sharders of quantised tables leave the type on the tensors that they give, as `_data_type`.
    """
    data_type = getattr(parameter, "_data_type", None)
    if data_type is None:
        return parameter.element_size(), 0
    form = RowFormat(data_type, parameter.shape[1], row_alignment(device))
    return form.bits / 8, form.num_bytes - form.dim * form.bits / 8


def answer_bytes(module: nn.Module, parameter: Tensor) -> int:
    """Bytes of each number that a lookup gives: a weight's; of quantised weights, the module's `output_dtype()`'s."""
    if getattr(parameter, "_data_type", None) is None:
        return parameter.element_size()
    output_dtype = getattr(module, "output_dtype", None)
    return (torch.float32 if output_dtype is None else output_dtype()).itemsize


def optimizer_state_bytes(parameter: Tensor, fused_params: Mapping[str, Any] | None) -> tuple[float, float]:
    """(per weight, per row) bytes that the optimizer of a table keeps: the one attached to it, else the sharder's.

    State is float32, whatever the weights are; an optimizer that is not known here counts as one number per weight.
    """
    classes = getattr(parameter, "_optimizer_classes", ())
    if classes:
        return _STATE.get(classes[0].__name__, (4, 0))
    optimizer = (fused_params or {}).get("optimizer")
    if optimizer is None:
        return 0, 0
    name = getattr(optimizer, "name", str(optimizer))
    return _STATE.get(_FUSED_STATE.get(name, name), _STATE.get(name.title(), (4, 0)))
