"""What both quantised collections are made of: one kernel that holds all rows, and a module per table that names them.

    configs + quantised rows  ->  QuantizedKernel (one uint8 buffer)  <-  QuantizedTable "film", QuantizedTable "user"

The state dict is TorchRec's: `<table>.weight`, uint8 rows with scale and bias in front, padded to `row_alignment`; or,
split, `weight` (codes), `weight_qscale` and `weight_qbias` (float16). In memory rows lie without padding where the
kernel allows it, on the CPU, so that int8 really is a quarter.

Shapes: R rows, D columns, P bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recsys_edu.kernels.quantized import QuantizedKernel, QuantizedSpec
from recsys_edu.kernels.quantized_remap import PRUNED, ArrayRemap, remapping_from_array
from recsys_edu.kernels.quantized_rows import RowFormat, quantize_rows, split_scale_bias
from recsys_edu.kernels.spec import TableSpec
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, dtype_to_data_type
from recsys_edu.modules.embedding_modules import Lanes, lanes_of
from recsys_edu.types import DataType

PRUNING_ATTRIBUTE = "rows_post_pruning"
REMAPPING_ATTRIBUTE = "index_remappings"
"""What `set_pruning_data` and `set_index_remappings` leave on a float collection, for `from_float` to read."""

QuantizedWeights = Mapping[str, tuple[Tensor, Tensor | None]]
"""Table to codes [R, bytes] and scale and bias [R, 4], both uint8; None in place of the latter for FP16, NFP8, FP32."""


def kernel_tables(tables: Sequence[BaseEmbeddingConfig], remapped: Sequence[str] = ()) -> tuple[TableSpec, ...]:
    """Rows and columns that are really stored: fewer after pruning, and a row of zeros behind a remapped table."""
    return tuple(
        TableSpec(table.name, stored_rows(table) + (table.name in remapped), table.embedding_dim) for table in tables
    )


def stored_rows(table: BaseEmbeddingConfig) -> int:
    """Rows of a table that are left after pruning."""
    left = table.num_embeddings_post_pruning
    return table.num_embeddings if left is None else left


def served_lanes(tables: Sequence[BaseEmbeddingConfig], remapped: Sequence[str]) -> Lanes:
    """The lanes, with the number of ids that each table accepts: all original ones only where they are remapped."""
    lanes = lanes_of(tables)
    accepted = [table.num_embeddings if table.name in remapped else stored_rows(table) for table in tables]
    return replace(lanes, num_rows=tuple(accepted[table] for table in lanes.tables))


def make_tables(
    tables: Sequence[BaseEmbeddingConfig],
    pooled: bool,
    device: torch.device,
    output_dtype: torch.dtype,
    weights: QuantizedWeights | None,
    index_remappings: Mapping[str, Tensor] | None,
    split: bool,
    row_alignment: int,
) -> tuple[QuantizedKernel, nn.ModuleDict]:
    """The kernel of a collection, filled where weights are given, and the modules that name its tables."""
    remappings = dict(index_remappings or {})
    unknown = sorted(set(remappings) - {table.name for table in tables})
    if unknown:
        raise ValueError(f"index remappings for {unknown}, which are no tables; there are {[t.name for t in tables]}")
    lanes = lanes_of(tables)
    spec = QuantizedSpec(
        tables=kernel_tables(tables, list(remappings)),
        data_types=tuple(table.data_type for table in tables),
        lane_tables=lanes.tables,
        pooled=pooled,
        output_dtype=output_dtype,
        validate_ids=False,  # the collection checks them against the original rows, before they are remapped
        lane_features=lanes.features,
    )
    kernel = QuantizedKernel(spec, device)
    modules = nn.ModuleDict()
    for index, table in enumerate(tables):
        remapping = remappings.get(table.name)
        modules[table.name] = QuantizedTable(table, kernel, index, remapping, device, split, row_alignment)
        if weights is not None and table.name in weights and device.type != "meta":
            modules[table.name].fill(_joined(*weights[table.name]).to(device))
    return kernel, modules


def _joined(codes: Tensor, scale_bias: Tensor | None) -> Tensor:
    codes = codes.view(torch.uint8)
    return codes if scale_bias is None else torch.cat([scale_bias.view(torch.uint8), codes], dim=1)


class RowStore(Protocol):
    """What holds the rows of tables: a kernel, or the shards of several devices."""

    def rows_of(self, table: int) -> Tensor: ...

    def assign(self, table: int, rows_RP: Tensor) -> None: ...


class QuantizedTable(nn.Module):
    """One table of a store under its name: rows for state dicts, and the renumbering of its ids if it was pruned."""

    def __init__(
        self,
        config: BaseEmbeddingConfig,
        store: RowStore,
        index: int,
        remapping: Tensor | None,
        device: torch.device,
        split: bool = False,
        row_alignment: int = 1,
    ) -> None:
        super().__init__()
        self._store = (store,)  # in a tuple: the collection owns it, and modules have one parent
        self._index, self._split = index, split
        self._saved_form = RowFormat(config.data_type, config.embedding_dim, row_alignment)
        if remapping is None:
            self.register_buffer("index_remapping", None)
            return
        if remapping.numel() != config.num_embeddings:
            raise ValueError(
                f"table {config.name!r}: its index remapping has {remapping.numel()} numbers for "
                f"{config.num_embeddings} rows"
            )
        kept = remapping_from_array(remapping, config.name).kept_K.numel()
        if kept != stored_rows(config):
            raise ValueError(f"table {config.name!r} keeps {stored_rows(config)} rows, its index remapping {kept}")
        self.register_buffer("index_remapping", remapping.to(device=device, dtype=torch.int32))

    @property
    def weight(self) -> Tensor:
        """The rows, [R, P] uint8: live in a kernel, put together from shards."""
        return self._store[0].rows_of(self._index)

    @property
    def data_type(self) -> DataType:
        return self._saved_form.data_type

    @property
    def dim(self) -> int:
        return self._saved_form.dim

    def fill(self, rows_RP: Tensor) -> None:
        """Take over rows of any padding; a remapped table puts zeros behind them.

        Raises:
            ValueError: other sizes than the table's.
        """
        if self.index_remapping is not None and rows_RP.shape[0] == self.weight.shape[0] - 1:
            form = replace(self._saved_form, alignment=1)
            zeros = quantize_rows(torch.zeros(1, form.dim, device=rows_RP.device), form.data_type)
            rows_RP = torch.cat([rows_RP[:, : form.packed_bytes], zeros])
        self._store[0].assign(self._index, rows_RP)

    def lookup_array(self) -> Tensor | None:
        """Where every original id is looked up: a dropped one in the row of zeros."""
        if self.index_remapping is None:
            return None
        return torch.where(self.index_remapping == PRUNED, self.weight.shape[0] - 1, self.index_remapping)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        form, rows_RP = self._saved_form, self.weight
        if self._split and form.has_codes:
            codes, scale, bias = split_scale_bias(rows_RP, form)
            destination |= {f"{prefix}weight": codes, f"{prefix}weight_qscale": scale, f"{prefix}weight_qbias": bias}
            return
        missing = form.num_bytes - rows_RP.shape[1]
        destination[f"{prefix}weight"] = nn.functional.pad(rows_RP, (0, missing)) if missing > 0 else rows_RP

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        parts = {name: state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_qscale", "weight_qbias")}
        if self.index_remapping is not None and f"{prefix}index_remapping" in state_dict:
            self.index_remapping.copy_(state_dict[f"{prefix}index_remapping"])
        if parts["weight"] is None:
            missing_keys.append(key)
            return
        rows = parts["weight"]
        rows = getattr(rows, "elem", rows)  # TorchRec wraps int4 and int2 rows
        if parts["weight_qscale"] is not None:
            header = [parts[name].view(torch.uint8) for name in ("weight_qscale", "weight_qbias")]
            rows = torch.cat([*header, rows], dim=1)
        try:
            self.fill(rows.to(self.weight.device))
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")

    def extra_repr(self) -> str:
        rows, row_bytes = self.weight.shape
        return f"{rows} rows x {self._saved_form.dim} as {self.data_type}, {row_bytes} bytes each"


def array_remap(modules: nn.ModuleDict, lanes: Lanes, device: torch.device) -> ArrayRemap | None:
    """The remapping of all lanes, or None where no table was pruned with one."""
    arrays = [modules[name].lookup_array() for name in lanes.table_names]
    return ArrayRemap(arrays, device) if any(array is not None for array in arrays) else None


def remappings_of(tables: nn.ModuleDict) -> dict[str, Tensor]:
    """Table to its remapping, for the tables that have one."""
    return {name: table.index_remapping for name, table in tables.items() if table.index_remapping is not None}


@dataclass(frozen=True)
class FloatTables:
    """What `from_float` found out about a float collection: configs as they will be served, rows, remappings."""

    configs: list[Any]
    weights: dict[str, tuple[Tensor, Tensor | None]]
    index_remappings: dict[str, Tensor]
    output_dtype: torch.dtype
    device: torch.device


def read_float_module(module: nn.Module, configs: Sequence[BaseEmbeddingConfig], tables: nn.ModuleDict) -> FloatTables:
    """Quantise a float collection's tables as its `qconfig` says.

    Raises:
        ValueError: no qconfig, a dtype that tables are not served in, rows that have no code.
    """
    qconfig = getattr(module, "qconfig", None)
    if qconfig is None:
        raise ValueError(
            f"{type(module).__name__} has no qconfig, a QuantConfig that says what to quantise to: set one, or call "
            "recsys_edu.inference.modules.quantize_embeddings, which does"
        )
    per_table = getattr(qconfig, "per_table_weight_dtype", None) or {}
    default = qconfig.weight().dtype
    pruned = getattr(module, PRUNING_ATTRIBUTE, {})
    remappings = {name: array for name, array in getattr(module, REMAPPING_ATTRIBUTE, {}).items() if name in tables}
    served, weights = [], {}
    for config in configs:
        rows_left = pruned.get(config.name, config.num_embeddings_post_pruning)
        remapping = remappings.get(config.name)
        if remapping is not None:
            rows_left = int((remapping != PRUNED).sum())
        data_type = dtype_to_data_type(per_table.get(config.name, default))
        served.append(replace(config, data_type=data_type, num_embeddings_post_pruning=rows_left))
        weight = tables[config.name].weight
        if weight.is_meta:
            continue
        if remapping is not None:
            weight = weight[remapping_from_array(remapping, config.name).kept_K.to(weight.device)]
        weights[config.name] = quantized_weights(weight[:rows_left], data_type, config.name)
    return FloatTables(served, weights, remappings, qconfig.activation().dtype, module.device)


def quantized_weights(weight_RD: Tensor, data_type: DataType, table: str) -> tuple[Tensor, Tensor | None]:
    """A table's codes and its scales and biases, as `QuantizedWeights` has them."""
    try:
        header = RowFormat(data_type, weight_RD.shape[1]).header_bytes
    except ValueError as error:
        raise ValueError(f"table {table!r}: {error}") from error
    rows_RP = quantize_rows(weight_RD, data_type, table)
    return rows_RP[:, header:], (rows_RP[:, :header] if header else None)
