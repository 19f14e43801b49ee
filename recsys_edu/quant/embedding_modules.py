"""Quantised collections: the same KeyedJaggedTensor in, the same vectors out, from tables of a quarter of the bytes.

>>> from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, QuantConfig
>>> ebc = FloatEmbeddingBagCollection(tables=[EmbeddingBagConfig(1682, 64, "film", feature_names=["film"])])
>>> ebc.qconfig = QuantConfig(activation=Precision.of(torch.float32), weight=Precision.of(torch.int8))
>>> quantised = EmbeddingBagCollection.from_float(ebc)
>>> quantised.embedding_bags["film"]
QuantizedTable(1682 rows x 64 as INT8, 68 bytes each)

They serve and do not train: no parameters, no gradients. `quantize_embeddings` (recsys_edu.inference.modules) swaps
every collection of a model for its quantised form.

Shapes: B batch, N values, D columns.
Counterpart: torchrec.quant.embedding_modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys_edu.kernels.quantized import found_rows, sum_bags
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection as FloatEmbeddingBagCollection
from recsys_edu.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    check_lane_ids,
    common_embedding_dim,
    divide_means,
    expand_batches,
    get_embedding_names_by_table,
    in_lane_order,
    lane_offsets,
    prepare_configs,
    sample_weights,
    split_sequences,
    uniform_batches,
)
from recsys_edu.modules.embedding_modules import EmbeddingCollection as FloatEmbeddingCollection
from recsys_edu.quant.tables import (
    QuantizedWeights,
    array_remap,
    make_tables,
    quantized_weights,
    read_float_module,
    remappings_of,
    served_lanes,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from recsys_edu.types import DataType, ModuleNoCopyMixin

SPLIT_ATTRIBUTE = "quant_state_dict_split_scale_bias"
REGISTER_ATTRIBUTE = "register_tbes"
ALIGNMENT_ATTRIBUTE = "row_alignment"
DEFAULT_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Precision:
    """A dtype where a QuantConfig expects an observer: table quantisation observes nothing but the table itself."""

    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype) -> Callable[[], Precision]:
        """What `QuantConfig.activation` and `.weight` hold: something that makes an observer when called."""
        return functools.partial(cls, dtype)


class EmbeddingBagCollection(EmbeddingBagCollectionInterface, ModuleNoCopyMixin):
    """Pooled lookups in quantised tables.

    Sums are made in float32 and rounded to `output_dtype` once. Configs carry each table's type (`data_type`) and, for
    pruned tables, the rows that are left (`num_embeddings_post_pruning`).

    Args:
        tables: configs; INT8, INT4, INT2, FP16, NFP8 or FP32 each.
        is_weighted: rows are multiplied by the KJT's weights.
        device: meta makes tables without data.
        output_dtype: float32, float16 or bfloat16.
        table_name_to_quantized_weights: codes and scale_bias per table; None leaves zeros.
        register_tbes: also show the kernel as the submodule `tbes`.
        quant_state_dict_split_scale_bias: the state dict has scales and biases apart from codes.
        row_alignment: rows of the state dict are padded to a multiple of it.
        cache_features_order: accepted for TorchRec's callers; there is nothing to cache.
        index_remappings: for pruned tables the new row of every original id, -1 for dropped ones, whose answer is
            zeros. Without it ids from `num_embeddings_post_pruning` on are refused.

    Raises:
        ValueError: two tables of one name; sizes or types that do not fit.
        KeyError, IndexError: (forward) a missing feature, an id outside its table.

    Counterpart: torchrec.quant.embedding_modules.EmbeddingBagCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool,
        device: torch.device,
        output_dtype: torch.dtype = torch.float32,
        table_name_to_quantized_weights: QuantizedWeights | None = None,
        register_tbes: bool = False,
        quant_state_dict_split_scale_bias: bool = False,
        row_alignment: int = DEFAULT_ROW_ALIGNMENT,
        cache_features_order: bool = False,
        index_remappings: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        prepare_configs(tables)
        self._is_weighted, self._embedding_bag_configs, self._output_dtype = is_weighted, tables, output_dtype
        self._has_means = any(table.pooling is PoolingType.MEAN for table in tables)
        kernel, self.embedding_bags = make_tables(
            tables,
            True,
            torch.device(device),
            torch.float32 if self._has_means else output_dtype,  # a mean is rounded after it was divided
            table_name_to_quantized_weights,
            index_remappings,
            quant_state_dict_split_scale_bias,
            row_alignment,
        )
        self._kernel = kernel
        if register_tbes:
            self.tbes = nn.ModuleList([kernel])
        self._lanes = served_lanes(tables, list(index_remappings or {}))
        self._names, self._dims = list(self._lanes.names), list(self._lanes.dims)
        self._remap = array_remap(self.embedding_bags, self._lanes, self.device)
        self.register_load_state_dict_post_hook(_renew_remap)

    @classmethod
    def from_float(
        cls, module: FloatEmbeddingBagCollection, use_precomputed_fake_quant: bool = False
    ) -> EmbeddingBagCollection:
        """The quantised form of a float collection, as its `qconfig` says; the float one stays as it is."""
        del use_precomputed_fake_quant
        found = read_float_module(module, module.embedding_bag_configs(), module.embedding_bags)
        return cls(
            found.configs,
            module.is_weighted(),
            found.device,
            found.output_dtype,
            found.weights,
            getattr(module, REGISTER_ATTRIBUTE, False),
            getattr(module, SPLIT_ATTRIBUTE, False),
            getattr(module, ALIGNMENT_ATTRIBUTE, DEFAULT_ROW_ALIGNMENT),
            index_remappings=found.index_remappings,
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        if torch.compiler.is_compiling():
            return self._forward_by_table(features)
        lanes = self._lanes
        features = in_lane_order(features, lanes.features)
        _refuse_meta(self.device)
        check_lane_ids(features, lanes)
        offsets, lengths = uniform_batches(features)
        values_N = features.values() if self._remap is None else self._remap(features.values(), offsets)
        sample_weights_N = sample_weights(features) if self._is_weighted else None
        pooled_BD = divide_means(self._kernel(values_N, offsets, sample_weights_N), lengths, lanes)
        pooled_BD = expand_batches(pooled_BD, features, lanes).to(self._output_dtype)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=pooled_BD)

    def _forward_by_table(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The same lookup in PyTorch operations that torch.export and torch.compile can follow; ids are not checked."""
        jagged, kernel, lanes, pooled = features.to_dict(), self._kernel, self._lanes, []
        rows_of_table = kernel.table_rows()
        for lane, (feature, table) in enumerate(zip(lanes.features, lanes.tables)):
            bags, spec = jagged[feature], kernel.spec
            ids = bags.values() if self._remap is None else self._remap.remap_lane(lane, bags.values())
            rows_ND = found_rows(rows_of_table[table], spec.data_types[table], lanes.dims[lane], ids)
            sums_BD = sum_bags(rows_ND, bags.offsets(), bags.weights() if self._is_weighted else None)
            if lanes.poolings[lane] is PoolingType.MEAN:
                sums_BD = sums_BD / bags.lengths().clamp(min=1).unsqueeze(1)
            pooled.append(sums_BD)
        values_BD = torch.cat(pooled, dim=1).to(self._output_dtype)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values_BD)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        _renew_remap(self)
        return self

    def is_weighted(self) -> bool:
        return self._is_weighted

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs, `data_type` being what the tables are stored as."""
        return self._embedding_bag_configs

    def output_dtype(self) -> torch.dtype:
        return self._output_dtype

    def memory_bytes(self) -> int:
        """Bytes of all tables."""
        return self._kernel.memory_bytes()["weights"]

    @property
    def kernel(self):
        """The one kernel that holds all tables."""
        return self._kernel

    @property
    def index_remappings(self) -> dict[str, Tensor]:
        """The remapping of each table that has one."""
        return remappings_of(self.embedding_bags)

    @property
    def device(self) -> torch.device:
        return self._kernel.rows.device


class EmbeddingCollection(EmbeddingCollectionInterface, ModuleNoCopyMixin):
    """Sequence lookups in quantised tables; arguments as in EmbeddingBagCollection.

    Raises:
        ValueError: two tables of one name, or tables of different embedding_dim.
        KeyError, IndexError: (forward) a missing feature, an id outside its table.

    Counterpart: torchrec.quant.embedding_modules.EmbeddingCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device,
        need_indices: bool = False,
        output_dtype: torch.dtype = torch.float32,
        table_name_to_quantized_weights: QuantizedWeights | None = None,
        register_tbes: bool = False,
        quant_state_dict_split_scale_bias: bool = False,
        row_alignment: int = DEFAULT_ROW_ALIGNMENT,
        cache_features_order: bool = False,
        index_remappings: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        prepare_configs(tables)
        self._embedding_dim = common_embedding_dim(tables)
        self._embedding_configs, self._need_indices, self._output_dtype = tables, need_indices, output_dtype
        kernel, self.embeddings = make_tables(
            tables,
            False,
            torch.device(device),
            output_dtype,
            table_name_to_quantized_weights,
            index_remappings,
            quant_state_dict_split_scale_bias,
            row_alignment,
        )
        self._kernel = kernel
        if register_tbes:
            self.tbes = nn.ModuleList([kernel])
        self._lanes = served_lanes(tables, list(index_remappings or {}))
        self._remap = array_remap(self.embeddings, self._lanes, self.device)
        self.register_load_state_dict_post_hook(_renew_remap)

    @classmethod
    def from_float(
        cls, module: FloatEmbeddingCollection, use_precomputed_fake_quant: bool = False
    ) -> EmbeddingCollection:
        """The quantised form of a float collection, as its `qconfig` says; the float one stays as it is."""
        del use_precomputed_fake_quant
        found = read_float_module(module, module.embedding_configs(), module.embeddings)
        return cls(
            found.configs,
            found.device,
            module.need_indices(),
            found.output_dtype,
            found.weights,
            getattr(module, REGISTER_ATTRIBUTE, False),
            getattr(module, SPLIT_ATTRIBUTE, False),
            getattr(module, ALIGNMENT_ATTRIBUTE, DEFAULT_ROW_ALIGNMENT),
            index_remappings=found.index_remappings,
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        if torch.compiler.is_compiling():
            return self._forward_by_table(features)
        lanes = self._lanes
        features = in_lane_order(features, lanes.features)
        _refuse_meta(self.device)
        check_lane_ids(features, lanes)
        # A sequence lookup asks only where each lane begins, so one bag per lane will do.
        starts = torch.tensor(features.offset_per_key(), device=features.device())
        values_N = features.values() if self._remap is None else self._remap(features.values(), starts)
        rows_ND = self._kernel(values_N, lane_offsets(features))
        return split_sequences(rows_ND, features, lanes.names, self._need_indices)

    def _forward_by_table(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The same lookup in PyTorch operations that torch.export and torch.compile can follow; ids are not checked."""
        jagged, kernel, lanes, answers = features.to_dict(), self._kernel, self._lanes, {}
        rows_of_table = kernel.table_rows()
        for lane, (feature, table, name) in enumerate(zip(lanes.features, lanes.tables, lanes.names)):
            given = jagged[feature]
            ids = given.values() if self._remap is None else self._remap.remap_lane(lane, given.values())
            rows_ND = found_rows(rows_of_table[table], kernel.spec.data_types[table], self._embedding_dim, ids)
            answers[name] = JaggedTensor(
                values=rows_ND.to(self._output_dtype),
                lengths=given.lengths(),
                offsets=given.offsets(),
                weights=given.values() if self._need_indices else None,
            )
        return answers

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        _renew_remap(self)
        return self

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_dim(self) -> int:
        return self._embedding_dim

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs, `data_type` being what the tables are stored as."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        return get_embedding_names_by_table(self._embedding_configs)

    def output_dtype(self) -> torch.dtype:
        return self._output_dtype

    def memory_bytes(self) -> int:
        """Bytes of all tables."""
        return self._kernel.memory_bytes()["weights"]

    @property
    def kernel(self):
        """The one kernel that holds all tables."""
        return self._kernel

    @property
    def index_remappings(self) -> dict[str, Tensor]:
        """The remapping of each table that has one."""
        return remappings_of(self.embeddings)

    @property
    def device(self) -> torch.device:
        return self._kernel.rows.device


def _tables_of(collection: nn.Module) -> nn.ModuleDict:
    return collection.embedding_bags if hasattr(collection, "embedding_bags") else collection.embeddings


def _renew_remap(collection: nn.Module, incompatible_keys: object = None) -> None:
    """Remappings were loaded or moved: read them again."""
    del incompatible_keys
    collection._remap = array_remap(_tables_of(collection), collection._lanes, collection.device)


def _refuse_meta(device: torch.device) -> None:
    if device.type == "meta":
        raise RuntimeError("the quantised tables are on the meta device: no rows to look up; load them first")


def for_each_module_of_type_do(
    module: nn.Module, module_types: list[type[nn.Module]], op: Callable[[nn.Module], None]
) -> None:
    """Call `op` on every submodule (the module itself included) whose type is one of `module_types`."""
    for submodule in module.modules():
        if type(submodule) in module_types:
            op(submodule)


def quant_prep_enable_quant_state_dict_split_scale_bias(module: nn.Module) -> None:
    """Let `from_float` of this collection make a state dict with scales and biases apart."""
    setattr(module, SPLIT_ATTRIBUTE, True)


def quant_prep_enable_quant_state_dict_split_scale_bias_for_types(
    module: nn.Module, module_types: list[type[nn.Module]]
) -> None:
    """The same for every submodule of the types."""
    for_each_module_of_type_do(module, module_types, quant_prep_enable_quant_state_dict_split_scale_bias)


def quant_prep_enable_register_tbes(module: nn.Module, module_types: list[type[nn.Module]]) -> None:
    """Let `from_float` of these collections show their kernel as the submodule `tbes`."""
    for_each_module_of_type_do(module, module_types, lambda found: setattr(found, REGISTER_ATTRIBUTE, True))


def quant_prep_customize_row_alignment(
    module: nn.Module, module_types: list[type[nn.Module]], row_alignment: int
) -> None:
    """Let `from_float` of these collections pad the rows of their state dict to a multiple of `row_alignment`."""
    for_each_module_of_type_do(module, module_types, lambda found: setattr(found, ALIGNMENT_ATTRIBUTE, row_alignment))


def quantize_state_dict(
    module: nn.Module,
    table_name_to_quantized_weights: dict[str, tuple[Tensor, Tensor | None]],
    table_name_to_data_type: dict[str, DataType],
    table_name_to_num_embeddings_post_pruning: dict[str, int] | None = None,
) -> torch.device:
    """Quantise every `<table>.weight` of a float module's state dict into the given dict; returns their device.

    Counterpart: torchrec.quant.embedding_modules.quantize_state_dict.
    """
    device, rows_left = torch.device("cpu"), table_name_to_num_embeddings_post_pruning or {}
    for key, weight in module.state_dict().items():
        path = key.split(".")
        if path[-1] != "weight" or len(path) < 2:
            continue
        table, device = path[-2], weight.device
        weight = weight[: rows_left.get(table, weight.shape[0])]
        if weight.is_meta:
            continue
        table_name_to_quantized_weights[table] = quantized_weights(weight, table_name_to_data_type[table], table)
    return device
