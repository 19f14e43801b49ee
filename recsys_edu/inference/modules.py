"""From a trained model to one that serves: quantise its tables, spread them over devices, wrap it for requests.

    model = quantize_inference_model(model)                       # tables in int8
    model, plan = shard_quant_model(model, world_size=2, compute_device="cpu")
    quantize_dense(model, torch.bfloat16)                         # the rest, with torch's own means
    scores = MyPredictModule(model)({"dense": ..., "ids": ...})   # a dict of tensors in, scores out

Counterpart: torchrec.inference.modules.
"""

from __future__ import annotations

import abc
import copy
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.quant_embedding import QuantEmbeddingCollectionSharder, ShardedQuantEmbeddingCollection
from recsys_edu.distributed.quant_embeddingbag import (
    QuantEmbeddingBagCollectionSharder,
    ShardedQuantEmbeddingBagCollection,
)
from recsys_edu.distributed.shard import shard_modules
from recsys_edu.distributed.types import ModuleSharder, ShardedModule, ShardingEnv, ShardingPlan
from recsys_edu.kernels.quantized_rows import RowFormat
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, QuantConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from recsys_edu.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from recsys_edu.quant.embedding_modules import Precision
from recsys_edu.quant.tables import PRUNING_ATTRIBUTE, REMAPPING_ATTRIBUTE, QuantizedTable

ModuleMapping = dict[type[nn.Module], type[nn.Module]]

SERVED_COLLECTIONS = (
    QuantEmbeddingBagCollection,
    QuantEmbeddingCollection,
    ShardedQuantEmbeddingBagCollection,
    ShardedQuantEmbeddingCollection,
)


def default_mapping() -> ModuleMapping:
    """Float collections and what they become."""
    return {EmbeddingBagCollection: QuantEmbeddingBagCollection, EmbeddingCollection: QuantEmbeddingCollection}


@dataclass(frozen=True)
class BatchingMetadata:
    """How a server joins one input of several requests: `type` is "dense" or "sparse", `pinned` lists host inputs.

    Counterpart: torchrec.inference.modules.BatchingMetadata.
    """

    type: str
    device: str
    pinned: list[str]


@dataclass(frozen=True)
class QualNameMetadata:
    """What a server has to know about one submodule, by its name in the model.

    Counterpart: torchrec.inference.modules.QualNameMetadata.
    """

    need_preproc: bool


class PredictModule(nn.Module):
    """A model as a server sees it: a dict of tensors in, an answer out, no gradients.

    Give `predict_forward`. `device` is where it runs, "cpu" or "cuda:0"; the current CUDA device is set to it.

    Counterpart: torchrec.inference.modules.PredictModule.
    """

    def __init__(self, module: nn.Module, device: str | None = None) -> None:
        super().__init__()
        self._module = module
        self._device = torch.device("cpu" if device is None else device)
        self._module.eval()

    @property
    def predict_module(self) -> nn.Module:
        return self._module

    @property
    def device(self) -> torch.device:
        return self._device

    def predict_forward(self, batch: dict[str, Tensor]) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say how to predict: define predict_forward(batch)")

    def forward(self, batch: dict[str, Tensor]) -> Any:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            return self.predict_forward(batch)

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The wrapped module's state dict, under its own names."""
        return self._module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


class PredictFactory(abc.ABC):
    """A recipe for a module that a server can load: how to make it, and how to batch requests for it.

    Counterpart: torchrec.inference.modules.PredictFactory.
    """

    @abc.abstractmethod
    def create_predict_module(self) -> nn.Module:
        """The module, in memory, ready to answer."""

    @abc.abstractmethod
    def batching_metadata(self) -> dict[str, BatchingMetadata]:
        """By name of an input, how requests are joined."""

    def batching_metadata_json(self) -> str:
        return json.dumps({name: asdict(metadata) for name, metadata in self.batching_metadata().items()})

    @abc.abstractmethod
    def result_metadata(self) -> str:
        """The kind of answer, so that a server can split it: "dict_of_tensor"."""

    @abc.abstractmethod
    def run_weights_independent_tranformations(self, predict_module: nn.Module) -> nn.Module:
        """Changes that need no weights: quantise, shard. (The spelling is TorchRec's.)"""

    @abc.abstractmethod
    def run_weights_dependent_transformations(self, predict_module: nn.Module) -> nn.Module:
        """Changes that need the weights: lowering, packing."""

    def qualname_metadata(self) -> dict[str, QualNameMetadata]:
        return {}

    def qualname_metadata_json(self) -> str:
        return json.dumps({name: asdict(metadata) for name, metadata in self.qualname_metadata().items()})

    def model_inputs_data(self) -> dict[str, Any]:
        """Facts for a benchmark of the model."""
        return {}


def quantize_feature(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook that hands float32 inputs on as float16, for a dense part in half precision."""
    del module
    return tuple(
        item.half() if isinstance(item, Tensor) and item.dtype in (torch.float32, torch.float64) else item
        for item in inputs
    )


def quantize_embeddings(
    module: nn.Module,
    dtype: torch.dtype,
    inplace: bool,
    additional_qconfig_spec_keys: list[type[nn.Module]] | None = None,
    additional_mapping: ModuleMapping | None = None,
    output_dtype: torch.dtype = torch.float32,
    per_table_weight_dtype: dict[str, torch.dtype] | None = None,
) -> nn.Module:
    """The model with every embedding collection quantised.

    >>> model = nn.Sequential(EmbeddingBagCollection([EmbeddingBagConfig(9, 8, "t", feature_names=["f"])]))
    >>> quantize_embeddings(model, torch.int8, inplace=False)[0].embedding_bags["t"]
    QuantizedTable(9 rows x 8 as INT8, 12 bytes each)

    Args:
        dtype: int8 (or qint8), quint4x2, quint2x4, float16, float8_e4m3fn, float32.
        inplace: replace the collections of `module` itself; a collection that is itself the model is returned anew.
        additional_qconfig_spec_keys: accepted for TorchRec's callers; the mapping alone decides.
        additional_mapping: further module types and what they become, by their `from_float`.
        output_dtype: of the embeddings.
        per_table_weight_dtype: exceptions, by table.

    Raises:
        ValueError: nothing to quantise, a sharded collection, an unknown table name, rows that have no code.

    Counterpart: torchrec.inference.modules.quantize_embeddings.
    """
    del additional_qconfig_spec_keys
    mapping = default_mapping() | (additional_mapping or {})
    _check_quantizable(module, mapping, per_table_weight_dtype or {})
    qconfig = QuantConfig(Precision.of(output_dtype), Precision.of(dtype), per_table_weight_dtype)
    if not inplace:
        module = _copy_but_tables(module, mapping)
    return _replaced(module, mapping, qconfig)


def _copy_but_tables(module: nn.Module, mapping: ModuleMapping) -> nn.Module:
    """A deep copy that shares the float collections: they are replaced, and may be too large to have twice."""
    shared = {id(child): copy.copy(child) for child in module.modules() if type(child) in mapping}
    return copy.deepcopy(module, memo=dict(shared))


def _replaced(module: nn.Module, mapping: ModuleMapping, qconfig: QuantConfig) -> nn.Module:
    if type(module) in mapping:
        had = module.__dict__.get("qconfig")
        module.qconfig = qconfig
        try:
            return mapping[type(module)].from_float(module)
        finally:
            module.qconfig = had
            if had is None:
                del module.qconfig
    for name, child in list(module.named_children()):
        replacement = _replaced(child, mapping, qconfig)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _check_quantizable(module: nn.Module, mapping: ModuleMapping, per_table: dict[str, torch.dtype]) -> None:
    found = [child for child in module.modules() if type(child) in mapping]
    sharded = [path for path, child in module.named_modules() if isinstance(child, ShardedModule)]
    if sharded:
        raise ValueError(
            f"{sharded[0]!r} is sharded: quantise the unsharded model (load the gathered state dict into it), then "
            "shard_quant_model"
        )
    if not found:
        raise ValueError(
            f"nothing to quantise: {type(module).__name__} has none of {[kind.__name__ for kind in mapping]}"
        )
    tables = {name for child in found for name in getattr(child, "embedding_bags", None) or child.embeddings}
    unknown = sorted(set(per_table) - tables)
    if unknown:
        raise ValueError(f"per_table_weight_dtype names {unknown}; the model's tables are {sorted(tables)}")


def quantize_inference_model(
    model: nn.Module,
    quantization_mapping: dict[str, type[nn.Module]] | None = None,
    per_table_weight_dtype: dict[str, torch.dtype] | None = None,
    fp_weight_dtype: torch.dtype = torch.int8,
    quantization_dtype: torch.dtype = torch.int8,
    output_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model, in place, with every embedding collection quantised.

    Args:
        quantization_mapping: by the full name of a module type (`package.module.Class`), what it becomes.
        fp_weight_dtype: of feature-processed collections; accepted for TorchRec's callers.

    Raises:
        ValueError: as quantize_embeddings.

    Counterpart: torchrec.inference.modules.quantize_inference_model.
    """
    del fp_weight_dtype
    named = quantization_mapping or {}
    additional = {type(child): named[_full_name(child)] for child in model.modules() if _full_name(child) in named}
    return quantize_embeddings(
        model,
        quantization_dtype,
        inplace=True,
        additional_mapping=additional,
        output_dtype=output_dtype,
        per_table_weight_dtype=per_table_weight_dtype,
    )


def _full_name(module: nn.Module) -> str:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return trim_torch_package_prefix_from_typename(name)


def trim_torch_package_prefix_from_typename(typename: str) -> str:
    """`<torch_package_0>.models.DLRM` is `models.DLRM`."""
    return re.sub(r"^<torch_package_\d+>\.", "", typename)


def default_quant_sharders() -> list[ModuleSharder[Any]]:
    """Sharders of quantised collections."""
    return [QuantEmbeddingBagCollectionSharder(), QuantEmbeddingCollectionSharder()]


def shard_quant_model(
    model: nn.Module,
    world_size: int = 1,
    compute_device: str = "cuda",
    sharding_device: str = "meta",
    sharders: list[ModuleSharder[Any]] | None = None,
    device_memory_size: int | None = None,
    constraints: dict[str, ParameterConstraints] | None = None,
    ddr_cap: int | None = None,
    sharding_plan: ShardingPlan | None = None,
) -> tuple[nn.Module, ShardingPlan]:
    """The quantised model with its tables spread over `world_size` devices of this process, and the plan.

    Collections on meta become shards of zeros, to be filled by `load_state_dict`; those with rows keep them.

    Args:
        compute_device: "cuda" (rank r on cuda:r) or "cpu" (so many stand-ins).
        sharding_device: accepted for TorchRec's callers: shards are made where they stay.
        device_memory_size, ddr_cap: bytes per device and per host process, for the planner.
        constraints: by table, for the planner.
        sharding_plan: default: the planner's.

    Raises:
        ValueError: no quantised collection in the model; a plan that does not fit it.
        PlannerError: it does not fit the devices.

    Counterpart: torchrec.inference.modules.shard_quant_model.
    """
    del sharding_device
    sharders = sharders or default_quant_sharders()
    known = {sharder.module_type for sharder in sharders}
    if not any(type(child) in known for child in model.modules()):
        raise ValueError("the model has no quantised embedding collection: call quantize_inference_model first")
    if sharding_plan is None:
        topology = Topology(
            world_size, compute_device, hbm_cap=device_memory_size, ddr_cap=ddr_cap, local_world_size=world_size
        )
        sharding_plan = EmbeddingShardingPlanner(topology, constraints=constraints).plan(model, sharders)
    env = ShardingEnv.from_local(world_size, 0)
    sharded = shard_modules(model, env, torch.device(compute_device), ShardingPlan(sharding_plan.plan), sharders)
    return sharded, sharding_plan


def unshard_quant_model(model: nn.Module) -> nn.Module:
    """The inverse of `shard_quant_model`: each sharded collection put together on the device of batches and answers.

    The model given stays as it is; everything but the tables is shared with the one that is returned.
    """
    if isinstance(model, (ShardedQuantEmbeddingBagCollection, ShardedQuantEmbeddingCollection)):
        return model.unsharded()
    return with_replaced(model, unshard_quant_model)


def with_replaced(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a module whose children are what `replace` makes of them; it shares every tensor with the original."""
    clone = copy.copy(module)
    clone._modules = {name: None if child is None else replace(child) for name, child in module._modules.items()}
    clone._parameters = dict(module._parameters)  # so that one may be exchanged in the copy alone
    return clone


def quantize_dense(
    predict_module: nn.Module,
    dtype: torch.dtype,
    additional_embedding_module_type: list[type[nn.Module]] = [],  # noqa: B006  (TorchRec's default; only read)
) -> nn.Module:
    """The dense part of a model in fewer bits, in place, by torch's own means; quantised tables keep their codes.

    Give the tables the same `output_dtype`, and `quantize_feature` as a forward pre-hook where inputs are float32.

    Args:
        dtype: bfloat16 or float16: every parameter and buffer outside of the tables. int8: weights of nn.Linear in
            int8 with a scale per output channel, inputs and sums in float32 (torchao's weight-only quantisation). It
            saves bytes and, on a CPU, no time; bfloat16 does both on processors that compute in it. torch's older
            `quantize_dynamic` is faster there, but torch.export cannot write it down.
        additional_embedding_module_type: further modules to leave as they are.

    Raises:
        ValueError: another dtype.
        ImportError: int8 without torchao.

    Counterpart: torchrec.inference.modules.quantize_dense.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(f"the dense part is served in bfloat16, float16 or int8, got {dtype}")
    kept = (*SERVED_COLLECTIONS, *additional_embedding_module_type)
    for child in predict_module.children():
        if not isinstance(child, kept):
            quantize_dense(child, dtype, additional_embedding_module_type)
    if dtype == torch.int8:
        return _int8_linear(predict_module) if isinstance(predict_module, nn.Linear) else predict_module
    for own in (*predict_module.parameters(recurse=False), *predict_module.buffers(recurse=False)):
        if own.is_floating_point():
            own.data = own.data.to(dtype)
    return predict_module


def _int8_linear(linear: nn.Linear) -> nn.Module:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 for the dense part is torchao's: pip install 'recsys_edu[quant]'") from error
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def set_pruning_data(
    model: nn.Module, tables_to_rows_post_pruning: dict[str, int], module_types: list[type[nn.Module]] | None = None
) -> nn.Module:
    """Say how many rows of each table quantisation keeps: the first ones. Ids beyond them are then refused.

    For rows chosen otherwise see `set_index_remappings`.

    Raises:
        ValueError: a table that no collection has, or more rows than it has.

    Counterpart: torchrec.inference.modules.set_pruning_data.
    """
    found, rows = _collections_of(model, module_types or list(default_mapping()), tables_to_rows_post_pruning)
    for table, left in tables_to_rows_post_pruning.items():
        if not 0 <= left <= rows[table]:
            raise ValueError(f"table {table!r} has {rows[table]} rows and cannot keep {left}")
    for child in found:
        setattr(child, PRUNING_ATTRIBUTE, dict(tables_to_rows_post_pruning))
    return model


def set_index_remappings(model: nn.Module, index_remappings: dict[str, Tensor]) -> nn.Module:
    """Say which rows quantisation keeps: by table the new number of every row, -1 for those that go.

    >>> keep = keep_largest_rows(model.ebc.embedding_bags["film"].weight, 1000)       # doctest: +SKIP
    >>> set_index_remappings(model, {"film": keep.array()})                           # doctest: +SKIP

    An id whose row went finds zeros.

    Raises:
        ValueError: a table that no collection has, or another count of numbers than its rows.
    """
    found, rows = _collections_of(model, list(default_mapping()), index_remappings)
    for table, array in index_remappings.items():
        if array.shape != (rows[table],):
            raise ValueError(f"table {table!r} has {rows[table]} rows, its index remapping {list(array.shape)} numbers")
    for child in found:
        setattr(child, REMAPPING_ATTRIBUTE, dict(index_remappings))
    return model


def _collections_of(
    model: nn.Module, kinds: list[type[nn.Module]], named: Collection[str]
) -> tuple[list[nn.Module], dict[str, int]]:
    """The collections of these types and the rows of each of their tables; all `named` have to be among them."""
    found = [child for child in model.modules() if type(child) in kinds]
    configs = [config for child in found for config in _configs_of(child)]
    rows = {config.name: config.num_embeddings for config in configs}
    unknown = sorted(set(named) - set(rows))
    if unknown:
        raise ValueError(f"no collection has tables {unknown}; the model's tables are {sorted(rows)}")
    return found, rows


def _configs_of(collection: nn.Module) -> Sequence[BaseEmbeddingConfig]:
    pooled = hasattr(collection, "embedding_bag_configs")
    return collection.embedding_bag_configs() if pooled else collection.embedding_configs()


def get_table_to_weights_from_tbe(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """Table to its codes and its scales and biases (None for float tables), of a quantised or sharded model.

    Counterpart: torchrec.inference.modules.get_table_to_weights_from_tbe.
    """
    found: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for name, table in _quantized_tables(model):
        rows, header = table.weight, RowFormat(table.data_type, table.dim).header_bytes
        packed = RowFormat(table.data_type, table.dim).packed_bytes
        found.setdefault(name, []).append((rows[:, header:packed], rows[:, :header] if header else None))
    return found


def assign_weights_to_tbe(model: nn.Module, table_to_weight: dict[str, list[tuple[Tensor, Tensor | None]]]) -> None:
    """The inverse of `get_table_to_weights_from_tbe`, also from one plan to another.

    Raises:
        ValueError: a table without weights, or weights of another size.

    Counterpart: torchrec.inference.modules.assign_weights_to_tbe.
    """
    remaining = {name: list(weights) for name, weights in table_to_weight.items()}
    for name, table in _quantized_tables(model):
        if not remaining.get(name):
            raise ValueError(f"no weights for table {name!r}; there are some for {sorted(table_to_weight)}")
        codes, scale_bias = remaining[name].pop(0)
        table.fill(codes if scale_bias is None else torch.cat([scale_bias, codes], dim=1))


def _quantized_tables(model: nn.Module) -> list[tuple[str, QuantizedTable]]:
    return [
        (path.rpartition(".")[2], table) for path, table in model.named_modules() if isinstance(table, QuantizedTable)
    ]
