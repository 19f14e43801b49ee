"""Collections of embedding tables: a KeyedJaggedTensor of ids goes in, vectors come out.

    features   film: [[7, 2], [3]]    user: [[5], [5]]            ids, feature by feature
    tables     film 1682 x 16         user 943 x 16
    pooled     KeyedTensor [2, 32]    one block of 16 columns per feature, rows of a bag summed
    sequence   {"film": 3 x 16, "user": 2 x 16}                   one row per id

`forward` looks all tables up in one kernel call. Under torch.fx, torch.export and torch.compile, for
tables of mixed types and for batches of mixed sizes, the same result is computed table by table with
ordinary PyTorch operations.

Shapes: B batch, L lanes ((feature, table) pairs), N values, R rows of a table, D columns.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from recsys_edu.kernels.checks import check_ids
from recsys_edu.kernels.jagged_ops import complete_cumsum
from recsys_edu.kernels.lookup import flatten_tables, pooled_lookup, sequence_lookup
from recsys_edu.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
    data_type_to_dtype,
    init_table,
    pooling_type_to_str,
)
from recsys_edu.sparse.checks import JaggedInputError, lengths_fit
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


class EmbeddingBagCollectionInterface(abc.ABC, nn.Module):
    """What every pooled collection offers, whether plain, fused or sharded.

    Counterpart: torchrec.modules.embedding_modules.EmbeddingBagCollectionInterface.
    """

    @abc.abstractmethod
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor: ...

    @abc.abstractmethod
    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]: ...

    @abc.abstractmethod
    def is_weighted(self) -> bool: ...


class EmbeddingCollectionInterface(abc.ABC, nn.Module):
    """What every sequence collection offers.

    Counterpart: torchrec.modules.embedding_modules.EmbeddingCollectionInterface.
    """

    @abc.abstractmethod
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]: ...

    @abc.abstractmethod
    def embedding_configs(self) -> list[EmbeddingConfig]: ...

    @abc.abstractmethod
    def need_indices(self) -> bool: ...

    @abc.abstractmethod
    def embedding_dim(self) -> int: ...

    @abc.abstractmethod
    def embedding_names_by_table(self) -> list[list[str]]: ...


@dataclass(frozen=True)
class Lanes:
    """The (feature, table) pairs of a collection in config order; entry l of each tuple is lane l's.

    Everything is known from the configs alone, so it is worked out once, at construction.
    """

    features: tuple[str, ...]
    tables: tuple[int, ...]
    table_names: tuple[str, ...]
    num_rows: tuple[int, ...]
    dims: tuple[int, ...]
    names: tuple[str, ...]
    poolings: tuple[PoolingType, ...]


def lanes_of(tables: Sequence[BaseEmbeddingConfig]) -> Lanes:
    """The lanes of a list of tables: table by table, each with its features in order."""
    pairs = [(index, feature) for index, table in enumerate(tables) for feature in table.feature_names]
    return Lanes(
        features=tuple(feature for _, feature in pairs),
        tables=tuple(index for index, _ in pairs),
        table_names=tuple(tables[index].name for index, _ in pairs),
        num_rows=tuple(tables[index].num_embeddings for index, _ in pairs),
        dims=tuple(tables[index].embedding_dim for index, _ in pairs),
        names=tuple(name for names in get_embedding_names_by_table(tables) for name in names),
        poolings=tuple(getattr(tables[index], "pooling", PoolingType.NONE) for index, _ in pairs),
    )


def get_embedding_names_by_table(
    tables: Sequence[EmbeddingBagConfig] | Sequence[EmbeddingConfig],
) -> list[list[str]]:
    """For each table the names of its outputs: the feature, and `@table` where several tables read it.

    >>> film, taste = (EmbeddingBagConfig(9, 4, name, feature_names=["film"]) for name in ("film", "taste"))
    >>> get_embedding_names_by_table([film, taste])
    [['film@film'], ['film@taste']]

    Counterpart: torchrec.modules.embedding_modules.get_embedding_names_by_table.
    """
    readers = Counter(feature for table in tables for feature in table.feature_names)
    return [
        [feature if readers[feature] == 1 else f"{feature}@{table.name}" for feature in table.feature_names]
        for table in tables
    ]


def reorder_inverse_indices(
    inverse_indices: tuple[list[str], torch.Tensor] | None, feature_names: list[str]
) -> torch.Tensor:
    """The rows of a variable-batch KJT's inverse indices, one per name of `feature_names`; empty for None.

    >>> reorder_inverse_indices((["a", "b"], torch.tensor([[0, 0], [1, 0]])), ["b", "a"])
    tensor([[1, 0],
            [0, 0]])

    Raises:
        KeyError: a feature has no inverse indices.

    Counterpart: torchrec.modules.embedding_modules.reorder_inverse_indices.
    """
    if inverse_indices is None:
        return torch.empty(0)
    keys, indices_FB = inverse_indices
    position = {key: index for index, key in enumerate(keys)}
    missing = [name for name in feature_names if name not in position]
    if missing:
        raise KeyError(f"no inverse indices for {', '.join(missing)}; there are some for {', '.join(keys)}")
    return indices_FB[[position[name] for name in feature_names]]


def process_pooled_embeddings(pooled_embeddings: list[torch.Tensor], inverse_indices: torch.Tensor) -> torch.Tensor:
    """Expand each feature's distinct rows to the full batch and put the features side by side.

    >>> pooled = [torch.tensor([[1.0], [2.0]]), torch.tensor([[9.0]])]
    >>> process_pooled_embeddings(pooled, torch.tensor([[0, 1, 1], [0, 0, 0]]))
    tensor([[1., 9.],
            [2., 9.],
            [2., 9.]])

    Counterpart: torchrec.modules.embedding_modules.process_pooled_embeddings.
    """
    expanded = [
        pooled_bD.index_select(0, indices_B.to(pooled_bD.device))
        for pooled_bD, indices_B in zip(pooled_embeddings, inverse_indices)
    ]
    return torch.cat(expanded, dim=1)


class EmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """Pooled lookups in many tables: every bag of ids becomes one vector.

    >>> ebc = EmbeddingBagCollection(tables=[
    ...     EmbeddingBagConfig(name="film", num_embeddings=1682, embedding_dim=16, feature_names=["film"]),
    ...     EmbeddingBagConfig(name="user", num_embeddings=943, embedding_dim=8, feature_names=["user"]),
    ... ])
    >>> features = KeyedJaggedTensor.from_lengths_sync(
    ...     keys=["user", "film"], values=torch.tensor([5, 5, 7, 2, 3]), lengths=torch.tensor([1, 1, 2, 1]))
    >>> ebc(features).keys(), ebc(features).values().shape
    (['film', 'user'], torch.Size([2, 24]))

    The output has one `[B, embedding_dim]` float32 block per feature, in the order of the configs whatever
    the order of the input's keys; further input keys are ignored. A feature that several tables read
    appears as `<feature>@<table>`. `is_weighted` multiplies each looked-up row by its KJT weight. A KJT
    with variable batch and inverse indices comes back expanded to the full batch. Parameters are
    `embedding_bags.<table>.weight`; with `device="meta"` they have no data yet.

    Raises:
        ValueError: two tables of one name, or a pooling that is neither SUM nor MEAN.
        KeyError: (forward) a feature that the input does not have.
        IndexError: (forward) an id outside its table.

    Counterpart: torchrec.modules.embedding_modules.EmbeddingBagCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._embedding_bag_configs = tables
        self._device = torch.device("cpu" if device is None else device)
        prepare_configs(tables)
        self.embedding_bags = nn.ModuleDict()
        for table, weight_RD in zip(tables, _allocate(tables, self._device)):
            self.embedding_bags[table.name] = nn.EmbeddingBag(
                table.num_embeddings,
                table.embedding_dim,
                mode=pooling_type_to_str(table.pooling),
                include_last_offset=True,
                _weight=weight_RD,
            )
        self._lanes = lanes_of(tables)
        self._names, self._dims = list(self._lanes.names), list(self._lanes.dims)
        self.register_load_state_dict_post_hook(_flatten_after_load)
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        weights = [self.embedding_bags[table.name].weight for table in self._embedding_bag_configs]
        if _is_traced(features):
            return self._forward_by_table(features, weights)
        lanes = self._lanes
        features = in_lane_order(features, lanes.features)
        if not lanes.features or features.values().is_meta:
            return self._forward_by_table(features, weights)
        refuse_meta(weights, lanes)
        check_lane_ids(features, lanes)
        if not _one_kernel_reads(weights):
            return self._forward_by_table(features, weights)
        offsets, lengths = uniform_batches(features)
        sample_weights_N = sample_weights(features) if self._is_weighted else None
        pooled_BD = pooled_lookup(weights, lanes.tables, features.values(), offsets, sample_weights_N)
        pooled_BD = expand_batches(divide_means(pooled_BD, lengths, lanes), features, lanes)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=pooled_BD)

    def _forward_by_table(self, features: KeyedJaggedTensor, weights: list[torch.Tensor]) -> KeyedTensor:
        """The same lookup in PyTorch operations that torch.fx, torch.export and torch.compile can follow."""
        lanes = self._lanes
        jagged = features.to_dict()
        narrow = _narrow_tables(self.embedding_bags)
        pooled = []
        for feature, table, pooling in zip(lanes.features, lanes.tables, lanes.poolings):
            lane = jagged[feature]
            sample_weights = lane.weights() if self._is_weighted else None
            pool = _pool_narrow if narrow[table] else _pool
            pooled.append(pool(weights[table], lane.values(), lane.offsets(), sample_weights, pooling))
        values_BD = _side_by_side(pooled, features, list(lanes.features))
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values_BD)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # .to(), .half(), .to_empty(): each table may have moved by itself
        flatten_tables(list(self.parameters()))
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # copy.deepcopy and unpickling give every table its own memory
        flatten_tables(list(self.parameters()))

    def is_weighted(self) -> bool:
        """Whether looked-up rows are multiplied by the KJT's weights."""
        return self._is_weighted

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs as given."""
        return self._embedding_bag_configs

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next((weight.device for weight in self.parameters()), self._device)

    def reset_parameters(self) -> None:
        """Draw every table's starting values anew; tables without data (meta) stay so."""
        for table in self._embedding_bag_configs:
            init_table(table, self.embedding_bags[table.name].weight)


class EmbeddingCollection(EmbeddingCollectionInterface):
    """Unpooled lookups in many tables: every id becomes its own vector.

    >>> ec = EmbeddingCollection(tables=[
    ...     EmbeddingConfig(name="film", num_embeddings=1682, embedding_dim=16, feature_names=["seen"])])
    >>> features = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([7, 2, 3]), torch.tensor([2, 1]))
    >>> ec(features)["seen"].values().shape
    torch.Size([3, 16])

    The result maps each embedding name to a JaggedTensor with `[N, D]` float32 values and the feature's
    lengths; with `need_indices` its weights are the ids. Parameters are `embeddings.<table>.weight`.
    `use_gather_select` is accepted for TorchRec's callers and only reported back.

    Raises:
        ValueError: two tables of one name, or tables of different embedding_dim.
        KeyError: (forward) a feature that the input does not have.
        IndexError: (forward) an id outside its table.

    Counterpart: torchrec.modules.embedding_modules.EmbeddingCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        use_gather_select: bool = False,
        use_gather_select_per_sharding: dict[str, bool] | None = None,
    ) -> None:
        super().__init__()
        self._embedding_configs = tables
        self._need_indices = need_indices
        self._device = torch.device("cpu" if device is None else device)
        self._use_gather_select = use_gather_select
        self._use_gather_select_per_sharding = use_gather_select_per_sharding
        prepare_configs(tables)
        self._embedding_dim = common_embedding_dim(tables)
        self.embeddings = nn.ModuleDict()
        for table, weight_RD in zip(tables, _allocate(tables, self._device)):
            self.embeddings[table.name] = nn.Embedding(table.num_embeddings, table.embedding_dim, _weight=weight_RD)
        self._lanes = lanes_of(tables)
        self.register_load_state_dict_post_hook(_flatten_after_load)
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        weights = [self.embeddings[table.name].weight for table in self._embedding_configs]
        if _is_traced(features):
            return self._forward_by_table(features, weights)
        lanes = self._lanes
        features = in_lane_order(features, lanes.features)
        if not lanes.features or features.values().is_meta:
            return self._forward_by_table(features, weights)
        refuse_meta(weights, lanes)
        check_lane_ids(features, lanes)
        if not _one_kernel_reads(weights):
            return self._forward_by_table(features, weights)
        rows_ND = sequence_lookup(weights, lanes.tables, features.values(), lane_offsets(features))
        return split_sequences(rows_ND, features, lanes.names, self._need_indices)

    def _forward_by_table(self, features: KeyedJaggedTensor, weights: list[torch.Tensor]) -> dict[str, JaggedTensor]:
        lanes = self._lanes
        jagged = features.to_dict()
        result = {}
        for feature, table, name in zip(lanes.features, lanes.tables, lanes.names):
            lane = jagged[feature]
            result[name] = JaggedTensor(
                values=F.embedding(lane.values(), weights[table]).float(),
                lengths=lane.lengths(),
                offsets=lane.offsets(),
                weights=lane.values() if self._need_indices else None,
            )
        return result

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # .to(), .half(), .to_empty(): each table may have moved by itself
        flatten_tables(list(self.parameters()))
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # copy.deepcopy and unpickling give every table its own memory
        flatten_tables(list(self.parameters()))

    def need_indices(self) -> bool:
        """Whether the ids come back as the outputs' weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """The width that all tables share; -1 without tables."""
        return self._embedding_dim

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs as given."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """For each table the names of its outputs."""
        return get_embedding_names_by_table(self._embedding_configs)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next((weight.device for weight in self.parameters()), self._device)

    def reset_parameters(self) -> None:
        """Draw every table's starting values anew; tables without data (meta) stay so."""
        for table in self._embedding_configs:
            init_table(table, self.embeddings[table.name].weight)

    def use_gather_select(self) -> bool:
        return self._use_gather_select

    def use_gather_select_per_sharding(self) -> dict[str, bool] | None:
        return self._use_gather_select_per_sharding


def in_lane_order(features: KeyedJaggedTensor, lane_features: Sequence[str]) -> KeyedJaggedTensor:
    """The batch re-expressed lane by lane; the batch itself, uncopied, where its keys already are the lanes.

    Raises:
        TypeError: anything but a KeyedJaggedTensor.
        KeyError: features that the input does not have.
    """
    if not isinstance(features, KeyedJaggedTensor):
        raise TypeError(
            f"an embedding collection takes a KeyedJaggedTensor, which names each feature's ids; got a "
            f"{type(features).__name__}. Make one: KeyedJaggedTensor(keys=[...], values=..., lengths=...)"
        )
    keys = features.keys()
    if tuple(keys) == lane_features:
        return features
    position = {key: index for index, key in enumerate(keys)}
    missing = [feature for feature in dict.fromkeys(lane_features) if feature not in position]
    if missing:
        raise KeyError(f"the input has no feature {', '.join(map(repr, missing))}; its keys are {list(keys)}")
    return features.permute([position[feature] for feature in lane_features])


def sample_weights(features: KeyedJaggedTensor) -> torch.Tensor:
    """The weight of every id, for a collection that is_weighted.

    Raises:
        ValueError, also an AssertionError: the batch carries none.
    """
    weights_N = features.weights_or_none()
    if weights_N is None:
        raise JaggedInputError(
            "this collection is_weighted, but the batch's KeyedJaggedTensor has no weights; give one float per id: "
            "KeyedJaggedTensor(..., weights=...)"
        )
    return weights_N


def refuse_meta(weights: list[torch.Tensor], lanes: Lanes) -> None:
    """Real ids need real tables; a batch on the meta device is only asked for shapes."""
    for table, name in zip(lanes.tables, lanes.table_names):
        if weights[table].is_meta:
            raise RuntimeError(
                f"table {name!r} is on the meta device: no rows to look up; give it memory: .to_empty(device=...)"
            )


def check_lane_ids(features: KeyedJaggedTensor, lanes: Lanes) -> None:
    """Refuse a batch, already in lane order, whose lengths miss its values or that holds an id outside its table."""
    if not lengths_fit(features):
        counted, negative = features.length_per_key(), int((features.lengths() < 0).sum())
        raise ValueError(
            f"the lengths add up to {sum(counted)} ids, but there are {features.values().numel()} values; per feature: "
            f"{dict(zip(lanes.features, counted))}{f'; {negative} lengths are negative' if negative else ''}"
        )
    check_ids(features.values(), features.offset_per_key(), lanes.features, lanes.table_names, lanes.num_rows)


def lane_offsets(features: KeyedJaggedTensor) -> torch.Tensor:
    """Where each bag begins; for a variable batch only where each lane does, all that a sequence lookup needs."""
    if features.variable_stride_per_key():
        return torch.tensor(features.offset_per_key(), device=features.device(), dtype=features.offsets().dtype)
    return features.offsets()


def uniform_batches(features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and lengths with one batch size: a variable batch's shorter lanes get empty bags at their end."""
    if not features.variable_stride_per_key():
        return features.offsets(), features.lengths()
    strides = features.stride_per_key()
    largest = max(strides, default=0)
    padded = [F.pad(lane, (0, largest - lane.numel())) for lane in features.lengths().split(strides)]
    lengths = torch.cat(padded)
    return complete_cumsum(lengths), lengths


def expand_batches(pooled_BD: torch.Tensor, features: KeyedJaggedTensor, lanes: Lanes) -> torch.Tensor:
    """Undo `uniform_batches`: bring a variable batch to its full size through the inverse indices."""
    if not features.variable_stride_per_key():
        return pooled_BD
    blocks = pooled_BD.split(list(lanes.dims), dim=1)
    pooled = [block[:stride] for block, stride in zip(blocks, features.stride_per_key())]
    return _side_by_side(pooled, features, list(lanes.features))


def divide_means(pooled_BD: torch.Tensor, lengths: torch.Tensor, lanes: Lanes) -> torch.Tensor:
    """Turn the sums of MEAN lanes into means, in the requesting process, which still has the lengths.

    The divisor is the number of ids, at least 1, so an empty bag stays zero.
    """
    if PoolingType.MEAN not in lanes.poolings:
        return pooled_BD
    scale_LB = lengths.view(len(lanes.features), -1).clamp(min=1).to(pooled_BD.dtype).reciprocal()
    for lane, pooling in enumerate(lanes.poolings):
        if pooling is not PoolingType.MEAN:
            scale_LB[lane] = 1
    if len(set(lanes.dims)) == 1:  # a view per lane: no [B, D] tensor of scales
        pooled_BLD = pooled_BD.view(pooled_BD.shape[0], len(lanes.dims), lanes.dims[0])
        return (pooled_BLD * scale_LB.t().unsqueeze(2)).flatten(1)
    blocks = pooled_BD.split(list(lanes.dims), dim=1)
    return torch.cat([block_BD * scale_B.unsqueeze(1) for block_BD, scale_B in zip(blocks, scale_LB)], dim=1)


def split_sequences(
    rows_ND: torch.Tensor, features: KeyedJaggedTensor, names: Sequence[str], need_indices: bool
) -> dict[str, JaggedTensor]:
    """Cut the looked-up rows, which are in the order of the values, into one JaggedTensor per lane."""
    length_per_lane = features.length_per_key()
    lane_rows = rows_ND.split(length_per_lane)
    lane_lengths = features.lengths().split(features.stride_per_key())
    lane_ids = features.values().split(length_per_lane) if need_indices else [None] * len(names)
    return {
        name: JaggedTensor(values=rows, lengths=lengths, weights=ids)
        for name, rows, lengths, ids in zip(names, lane_rows, lane_lengths, lane_ids)
    }


def common_embedding_dim(tables: Sequence[EmbeddingConfig]) -> int:
    """The width that all tables share, -1 without tables.

    Raises:
        ValueError: naming the first table that differs.
    """
    for table in tables:
        if table.embedding_dim != tables[0].embedding_dim:
            raise ValueError(
                "All tables in a EmbeddingCollection are required to have same embedding dimension: table "
                f"{table.name!r} has {table.embedding_dim}, table {tables[0].name!r} has {tables[0].embedding_dim}"
            )
    return tables[0].embedding_dim if tables else -1


def prepare_configs(tables: Sequence[BaseEmbeddingConfig]) -> None:
    """Refuse duplicate names and a string for a list; a table without feature names serves that of its own name."""
    seen: set[str] = set()
    for table in tables:
        if isinstance(table.feature_names, str):  # would be taken letter by letter
            raise TypeError(
                f"table {table.name!r}: feature_names must be a list, got the string {table.feature_names!r}"
            )
        if table.name in seen:
            raise ValueError(f"Duplicate table name {table.name}")
        seen.add(table.name)
        if not table.feature_names:
            table.feature_names = [table.name]


def _allocate(tables: Sequence[BaseEmbeddingConfig], device: torch.device) -> list[torch.Tensor]:
    """Uninitialised weights; tables of one type lie end to end in one buffer, as the kernels like them."""
    dtypes = [data_type_to_dtype(table.data_type) for table in tables]
    sizes = [table.num_embeddings * table.embedding_dim for table in tables]
    if len(set(dtypes)) == 1:
        blocks = torch.empty(sum(sizes), dtype=dtypes[0], device=device).split(sizes)
    else:
        blocks = [torch.empty(size, dtype=dtype, device=device) for size, dtype in zip(sizes, dtypes)]
    return [block.view(table.num_embeddings, table.embedding_dim) for block, table in zip(blocks, tables)]


def _flatten_after_load(collection: nn.Module, incompatible_keys: object) -> None:
    """load_state_dict(assign=True) gives every table its own memory; the kernels like one buffer."""
    del incompatible_keys
    flatten_tables(list(collection.parameters()))


def _one_kernel_reads(weights: Sequence[torch.Tensor]) -> bool:
    """Whether a table-batched kernel can take all tables at once: one dtype."""
    dtype = weights[0].dtype
    return all(weight.dtype == dtype for weight in weights)


def _is_traced(features: KeyedJaggedTensor) -> bool:
    return isinstance(features, torch.fx.Proxy) or torch.compiler.is_compiling()


def _pool(
    weight_RD: torch.Tensor,
    ids_N: torch.Tensor,
    offsets: torch.Tensor,
    sample_weights_N: torch.Tensor | None,
    pooling: PoolingType,
) -> torch.Tensor:
    """One lane's bags, summed or averaged in float32: [B, D]."""
    pooled_BD = F.embedding_bag(
        ids_N, weight_RD, offsets, mode="sum", per_sample_weights=sample_weights_N, include_last_offset=True
    )
    if pooling is PoolingType.MEAN:
        pooled_BD = pooled_BD / offsets.diff().clamp(min=1).unsqueeze(1)
    return pooled_BD


def _pool_narrow(
    weight_RD: torch.Tensor,
    ids_N: torch.Tensor,
    offsets: torch.Tensor,
    sample_weights_N: torch.Tensor | None,
    pooling: PoolingType,
) -> torch.Tensor:
    """`_pool` for 16-bit tables: widen the looked-up rows first, so that sums are made in float32."""
    rows_ND = F.embedding(ids_N, weight_RD).float()
    every_row = torch.arange(ids_N.size(0), device=ids_N.device)
    return _pool(rows_ND, every_row, offsets.long(), sample_weights_N, pooling)


def _narrow_tables(children: nn.ModuleDict) -> list[bool]:
    """Which tables are stored in fewer than 32 bits; read past torch.fx, whose proxies know no dtype."""
    return [child._parameters["weight"].dtype != torch.float32 for child in children.values()]


def _side_by_side(pooled: list[torch.Tensor], features: KeyedJaggedTensor, lane_features: list[str]) -> torch.Tensor:
    """Lanes next to each other, expanded to the full batch where the input has inverse indices.

    Raises:
        ValueError: features of different batch sizes and no inverse indices to bring them together.
    """
    if not pooled:
        return torch.empty(features.stride(), 0, device=features.device())
    inverse_indices = features.inverse_indices_or_none()
    if inverse_indices is not None:
        return process_pooled_embeddings(pooled, reorder_inverse_indices(inverse_indices, lane_features))
    if not torch.compiler.is_compiling():
        batch_sizes = {feature: pooled_BD.shape[0] for feature, pooled_BD in zip(lane_features, pooled)}
        if len(set(batch_sizes.values())) > 1:
            raise ValueError(f"features have different batch sizes, {batch_sizes}, and the KJT no inverse_indices")
    return torch.cat(pooled, dim=1)


torch.fx.wrap("_side_by_side")  # a trace keeps it as one call: whether there are inverse indices is known when it runs
