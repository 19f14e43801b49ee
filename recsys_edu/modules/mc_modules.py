"""Managed collision: a small table for an endless stream of ids, each important id with a row of its own.

    raw ids    9001 17 9001 555555 ...            any 64-bit number: no vocabulary, no hash collisions
    profile    count who comes how often, how recently
    evict      every few batches: the best `zch_size - 1` ids get (or keep) a row; a new owner's row is reported
    remap      9001 -> 0, 17 -> 1, an id without a row -> the last row, which all of those share

Who is best is an eviction policy: most recently seen (LRU), most often seen (LFU), or often and recently (DistanceLFU).

Suffixes: N ids, Z rows (`zch_size`), U distinct ids.

TorchRec's MCH module is followed in names, buffers and meaning; which id is evicted is decided here by the policy's
formula alone. Counterpart: torchrec.modules.mc_modules.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig
from recsys_edu.modules.zero_collision_hash import murmur_hash3
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

NO_ID = torch.iinfo(torch.int64).max  # marks a free place; sorts behind every id
MOST_SEGMENTS = 1025
_OWNERS = ("_mch_sorted_raw_ids", "_mch_remapped_ids_mapping", "_mch_counts", "_mch_last_access_iter")
ThresholdFilter = Callable[[Tensor], tuple[Tensor, float | Tensor]]


def average_threshold_filter(id_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ids seen more often than the average one.

    >>> average_threshold_filter(torch.tensor([1, 2, 30, 4]))
    (tensor([False, False,  True, False]), tensor(9.2500))
    """
    threshold = id_counts.float().mean()
    return id_counts > threshold, threshold


def dynamic_threshold_filter(id_counts: Tensor, threshold_skew_multiplier: float = 10.0) -> tuple[Tensor, Tensor]:
    """Ids seen more often than `threshold_skew_multiplier` times the average one."""
    threshold = id_counts.float().mean() * threshold_skew_multiplier
    return id_counts > threshold, threshold


def probabilistic_threshold_filter(id_counts: Tensor, per_id_probability: float = 0.01) -> tuple[Tensor, Tensor]:
    """Each sighting lets an id in with `per_id_probability`: an id seen n times with 1 - (1 - p)^n."""
    probability = 1 - (1 - per_id_probability) ** id_counts.float()
    drawn = torch.rand(id_counts.shape, device=id_counts.device)
    return drawn < probability, drawn


class MCHEvictionPolicyMetadataInfo(NamedTuple):
    """One number that a policy remembers about every id: its name, and where it is kept."""

    metadata_name: str
    is_mch_metadata: bool
    is_history_metadata: bool


class MCHEvictionPolicy(abc.ABC):
    """Decides who keeps a row: the ids with the highest `scores`. `threshold_filtering_func` keeps rare new ids out."""

    def __init__(
        self,
        metadata_info: list[MCHEvictionPolicyMetadataInfo],
        threshold_filtering_func: ThresholdFilter | None = None,
    ) -> None:
        self._metadata_info = metadata_info
        self._threshold_filtering_func = threshold_filtering_func

    @property
    def metadata_info(self) -> list[MCHEvictionPolicyMetadataInfo]:
        return self._metadata_info

    @abc.abstractmethod
    def scores(self, current_iter: int, counts_U: Tensor, last_access_iter_U: Tensor) -> Tensor:
        """How much each id deserves a row; float64."""

    def admitted(self, counts_U: Tensor) -> Tensor:
        """Which new ids may compete, by how often they were seen since the last eviction."""
        if self._threshold_filtering_func is None or not len(counts_U):
            return torch.ones_like(counts_U, dtype=torch.bool)
        return self._threshold_filtering_func(counts_U)[0]


_COUNTS = MCHEvictionPolicyMetadataInfo("counts", is_mch_metadata=True, is_history_metadata=False)
_LAST_ACCESS = MCHEvictionPolicyMetadataInfo("last_access_iter", is_mch_metadata=True, is_history_metadata=True)


class LFU_EvictionPolicy(MCHEvictionPolicy):
    """Least frequently used goes first: score = times seen."""

    def __init__(self, threshold_filtering_func: ThresholdFilter | None = None) -> None:
        super().__init__([_COUNTS], threshold_filtering_func)

    def scores(self, current_iter: int, counts_U: Tensor, last_access_iter_U: Tensor) -> Tensor:
        return counts_U.double()


class LRU_EvictionPolicy(MCHEvictionPolicy):
    """Least recently used goes first: score = the last batch that had the id. `decay_exponent` keeps that order."""

    def __init__(self, decay_exponent: float = 1.0, threshold_filtering_func: ThresholdFilter | None = None) -> None:
        super().__init__([_LAST_ACCESS], threshold_filtering_func)
        self._decay_exponent = decay_exponent

    def scores(self, current_iter: int, counts_U: Tensor, last_access_iter_U: Tensor) -> Tensor:
        return -((current_iter - last_access_iter_U + 1).double() ** self._decay_exponent)


class DistanceLFU_EvictionPolicy(MCHEvictionPolicy):
    """Often and recently: score = times seen / (batches since last seen + 1) ^ decay_exponent."""

    def __init__(self, decay_exponent: float = 1.0, threshold_filtering_func: ThresholdFilter | None = None) -> None:
        super().__init__([_COUNTS, _LAST_ACCESS], threshold_filtering_func)
        self._decay_exponent = decay_exponent

    def scores(self, current_iter: int, counts_U: Tensor, last_access_iter_U: Tensor) -> Tensor:
        return counts_U.double() / (current_iter - last_access_iter_U + 1).double() ** self._decay_exponent


class ManagedCollisionModule(nn.Module, abc.ABC):
    """Base: raw ids of one table's features in, row numbers out.

    `mutate_miss_lengths` tells a module that drops ids without a row to shorten their bags; otherwise they are -1.
    `write_weights` and the last three arguments are accepted for TorchRec's callers.
    """

    def __init__(
        self,
        device: torch.device,
        output_segments: list[int],
        skip_state_validation: bool = False,
        read_only_suffix: str = "_readonly",
        enable_per_feature_lookups: bool = False,
    ) -> None:
        super().__init__()
        self._device = device
        self._output_segments = output_segments

    @property
    def device(self) -> torch.device:
        return self._device

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """What raw ids go through before anything else; here nothing."""
        return features

    @abc.abstractmethod
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Take note of the ids; may give rows to new owners."""

    @abc.abstractmethod
    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        """Raw ids to rows."""

    @abc.abstractmethod
    def evict(self) -> Tensor | None:
        """Rows that have a new owner since the last call, or None."""

    @abc.abstractmethod
    def output_size(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def input_size(self) -> int:
        """Raw ids are below this."""

    @abc.abstractmethod
    def open_slots(self) -> Tensor:
        """Number of rows that no id owns, `[1]`."""

    def check_ids(self, ids_N: Tensor) -> None:
        """ValueError for (preprocessed) ids that this module cannot take; nothing has been changed."""

    @abc.abstractmethod
    def home_rows(self, ids_N: Tensor) -> Tensor:
        """For every (preprocessed) id a row of the whole table; who holds that row manages the id."""

    @abc.abstractmethod
    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int],
        device: torch.device | None = None,
    ) -> ManagedCollisionModule:
        """A module like this one for the rows from `output_id_range[0]` to before `output_id_range[1]` only.

        Raises:
            ValueError: ids that this one manages already cannot be divided that way.
        """

    def buckets(self) -> int:
        """How many parts the rows may be cut into without moving any id to another row."""
        return 1

    def check_cuts(self) -> None:
        """ValueError where the buffers are those of a module that was cut otherwise. A comparison of a few numbers."""

    def validate_state(self) -> None:
        """ValueError where the buffers contradict each other, as after loading another module's. Reads all of them."""

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        return self.remap(self.profile(self.preprocess(features)), mutate_miss_lengths)


class MCHManagedCollisionModule(ManagedCollisionModule):
    """Rows for the best ids by an eviction policy; a sorted list of owners is searched for every id.

    >>> module = MCHManagedCollisionModule(3, torch.device("cpu"), LFU_EvictionPolicy(), eviction_interval=1)
    >>> ids = JaggedTensor(torch.tensor([9001, 17, 9001, 555555]), lengths=torch.tensor([4]))
    >>> module({"f": ids})["f"].values().tolist()       # two ids get a row, the rest share row 2
    [0, 1, 0, 2]

    Ids are counted in training mode only. Rows change owners after every `eviction_interval` batches; `evict` then
    tells which. On a tie the present owner stays, then the smaller id wins.

    Args:
        zch_size: rows, one of them shared by all ids without one.
        input_hash_size, input_hash_func: raw ids are first mapped by `input_hash_func(ids, input_hash_size)`, if given.
        output_global_offset: added to every row number.

    Raises:
        ValueError: `zch_size` below 2, `eviction_interval` below 1; `mch_size`, which TorchRec has deprecated.

    Counterpart: torchrec.modules.mc_modules.MCHManagedCollisionModule.
    """

    def __init__(
        self,
        zch_size: int,
        device: torch.device,
        eviction_policy: MCHEvictionPolicy,
        eviction_interval: int,
        input_hash_size: int = NO_ID,
        input_hash_func: Callable[[Tensor, int], Tensor] | None = None,
        mch_size: int | None = None,
        mch_hash_func: Callable[[Tensor, int], Tensor] | None = None,
        name: str | None = None,
        output_global_offset: int = 0,
        output_segments: list[int] | None = None,
        buckets: int = 1,
    ) -> None:
        if zch_size < 2 or eviction_interval < 1:
            raise ValueError(
                f"zch_size has to be at least 2 and eviction_interval at least 1, got {zch_size}, {eviction_interval}"
            )
        if mch_size is not None or mch_hash_func is not None:
            raise ValueError("mch_size and mch_hash_func are not supported: make zch_size larger instead")
        super().__init__(device, output_segments or [output_global_offset, output_global_offset + zch_size])
        self._zch_size, self._policy, self._eviction_interval = zch_size, eviction_policy, eviction_interval
        self._input_hash_size, self._input_hash_func = input_hash_size, input_hash_func
        self._name, self._output_global_offset, self._buckets = name, output_global_offset, buckets
        if len(self._output_segments) > MOST_SEGMENTS:
            raise ValueError(
                f"output_segments: {len(self._output_segments)} cuts, at most {MOST_SEGMENTS} can be saved"
            )
        segments = torch.full((MOST_SEGMENTS,), -1, device=device)
        segments[: len(self._output_segments)] = torch.tensor(self._output_segments)
        self.register_buffer("_output_segments_tensor", segments)
        rows_Z = torch.arange(zch_size, device=device)
        self.register_buffer("_mch_sorted_raw_ids", torch.full_like(rows_Z, NO_ID))
        self.register_buffer("_mch_remapped_ids_mapping", rows_Z + output_global_offset)
        remembered = {info.metadata_name for info in eviction_policy.metadata_info}  # the rest need not be saved
        for name in ("counts", "last_access_iter"):
            self.register_buffer(f"_mch_{name}", torch.zeros_like(rows_Z), persistent=name in remembered)
        self.register_buffer("_current_iter_tensor", torch.zeros(1, dtype=torch.int64, device=device))
        self._history: list[tuple[Tensor, int]] = []  # (ids, batch number) since the last eviction
        self._given_away: list[Tensor] = []

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """The raw ids through `input_hash_func`."""
        if self._input_hash_func is None:
            return features
        return {
            name: _with_values(jt, self._input_hash_func(jt.values(), self._input_hash_size))
            for name, jt in features.items()
        }

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        if self.training:
            self._current_iter_tensor += 1
            current = int(self._current_iter_tensor)  # host sync: one per batch, decides whether rows change owners
            self._history += [(jt.values().long(), current) for jt in features.values()]
            if current % self._eviction_interval == 0:
                self._change_owners(current)
        return features

    def _change_owners(self, current: int) -> None:
        old_O, old_rows_O, counts_O, last_O = self._owners()
        empty = old_O.new_empty(0)
        ids_N = torch.cat([ids for ids, _ in self._history] or [empty])
        iters_N = torch.cat([torch.full_like(ids, batch) for ids, batch in self._history] or [empty])
        self._history = []
        seen_U, inverse_N, seen_counts_U = ids_N.unique(return_inverse=True, return_counts=True)
        seen_last_U = torch.zeros_like(seen_U).scatter_reduce_(0, inverse_N, iters_N, "amax")
        is_new_U = ~torch.isin(seen_U, old_O)
        admitted_U = ~is_new_U
        admitted_U[is_new_U] = self._policy.admitted(seen_counts_U[is_new_U])
        seen_U, seen_counts_U, seen_last_U = (part[admitted_U] for part in (seen_U, seen_counts_U, seen_last_U))
        # Old and seen ids together: counts add, the later batch counts, a row is known for old ones only.
        all_U, inverse = torch.cat([old_O, seen_U]).unique(return_inverse=True)
        counts_U = torch.zeros_like(all_U).index_add_(0, inverse, torch.cat([counts_O, seen_counts_U]))
        last_U = torch.zeros_like(all_U).scatter_reduce_(0, inverse, torch.cat([last_O, seen_last_U]), "amax")
        row_U = torch.full_like(all_U, -1).index_copy_(0, inverse[: len(old_O)], old_rows_O)
        best = self._ranked(self._policy.scores(current, counts_U, last_U), row_U)[: self._zch_size - 1]
        all_U, counts_U, last_U, row_U = (part[best] for part in (all_U, counts_U, last_U, row_U))
        is_free_Z = torch.ones(self._zch_size - 1, dtype=torch.bool, device=row_U.device)
        is_free_Z[row_U[row_U >= 0]] = False
        newcomers = (row_U < 0).nonzero().flatten()
        given = is_free_Z.nonzero().flatten()[: len(newcomers)]
        row_U[newcomers] = given
        if len(given):
            self._given_away.append(given + self._output_global_offset)
        self._store(all_U, row_U, counts_U, last_U)

    @staticmethod
    def _ranked(scores_U: Tensor, row_U: Tensor) -> Tensor:
        """Best first; present owners before newcomers of equal score, then smaller ids."""
        by_presence = (row_U < 0).int().argsort(stable=True)
        return by_presence[scores_U[by_presence].argsort(descending=True, stable=True)]

    def _owners(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        owned = self._mch_sorted_raw_ids != NO_ID
        ids_O, rows_O, counts_O, last_O = (getattr(self, name)[owned] for name in _OWNERS)
        return ids_O, rows_O - self._output_global_offset, counts_O, last_O

    def _store(self, ids_O: Tensor, rows_O: Tensor, counts_O: Tensor, last_O: Tensor) -> None:
        order, count = ids_O.argsort(), len(ids_O)
        is_free_Z = torch.ones(self._zch_size, dtype=torch.bool, device=ids_O.device)
        is_free_Z[rows_O] = False
        self._mch_sorted_raw_ids.fill_(NO_ID)[:count] = ids_O[order]
        self._mch_remapped_ids_mapping[:count] = rows_O[order] + self._output_global_offset
        self._mch_remapped_ids_mapping[count:] = is_free_Z.nonzero().flatten() + self._output_global_offset
        self._mch_counts.zero_()[:count] = counts_O[order]
        self._mch_last_access_iter.zero_()[:count] = last_O[order]

    @torch.no_grad()
    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        remapped = {}
        for name, jt in features.items():
            ids_N = jt.values().long()
            place_N = torch.searchsorted(self._mch_sorted_raw_ids, ids_N).clamp_(max=self._zch_size - 1)
            found_N = (self._mch_sorted_raw_ids[place_N] == ids_N) & (ids_N != NO_ID)
            shared = self._output_global_offset + self._zch_size - 1
            rows_N = torch.where(found_N, self._mch_remapped_ids_mapping[place_N], shared)
            remapped[name] = _with_values(jt, rows_N)
        return remapped

    def evict(self) -> Tensor | None:
        given, self._given_away = self._given_away, []
        return torch.cat(given).unique() if given else None

    def output_size(self) -> int:
        return self._zch_size

    def input_size(self) -> int:
        return self._input_hash_size

    def open_slots(self) -> Tensor:
        free = (self._mch_sorted_raw_ids == NO_ID).sum() - 1  # the shared row is nobody's, and not open
        return free.reshape(1)

    def buckets(self) -> int:
        return self._buckets

    def home_rows(self, ids_N: Tensor) -> Tensor:
        """Equal stretches of the ids below `input_hash_size`; where any 64-bit number may come, of their hashes."""
        last_row = self._output_segments[-1] - 1
        if self._input_hash_size == NO_ID:
            ids_N = murmur_hash3(ids_N) & NO_ID
        return ids_N.div(-(-self._input_hash_size // (last_row + 1)), rounding_mode="floor").clamp(0, last_row)

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int],
        device: torch.device | None = None,
    ) -> MCHManagedCollisionModule:
        first, stop = output_id_range
        is_whole = (first, stop - first) == (self._output_global_offset, self._zch_size)
        if not is_whole and bool((self._mch_sorted_raw_ids != NO_ID).any()):
            raise ValueError(
                f"this module manages ids already, and rows {first} to {stop - 1} are not all of its rows: an id may "
                "have its row anywhere. Divide it before it has seen ids, or take HashZchManagedCollisionModule"
            )
        part = MCHManagedCollisionModule(
            zch_size=stop - first,
            device=device or self._device,
            eviction_policy=self._policy,
            eviction_interval=self._eviction_interval,
            input_hash_size=self._input_hash_size,
            input_hash_func=self._input_hash_func,
            name=self._name,
            output_global_offset=first,
            output_segments=output_segments,
            buckets=self._buckets,
        ).train(self.training)
        if is_whole:
            for name in _OWNERS:
                getattr(part, name).copy_(getattr(self, name))
        part._current_iter_tensor.copy_(self._current_iter_tensor)
        return part

    def check_cuts(self) -> None:
        cuts = [cut for cut in self._output_segments_tensor.tolist() if cut >= 0]
        if cuts != self._output_segments:
            raise ValueError(
                f"{self._name or 'managed collision'}: the state is of a module cut at rows {cuts}, this one is cut at "
                f"{self._output_segments}, and an id may have its row anywhere: load it under the same cuts"
            )

    def validate_state(self) -> None:
        self.check_cuts()
        ids_Z, rows_Z = self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping - self._output_global_offset
        if bool((ids_Z.diff() < 0).any()) or not torch.equal(
            rows_Z.sort().values, torch.arange(len(rows_Z)).to(rows_Z)
        ):
            raise ValueError(f"{self._name or 'managed collision'}: ids are not sorted or two of them share a row")


def apply_mc_method_to_jt_dict(
    mc_module: nn.Module, method: str, features_dict: dict[str, JaggedTensor]
) -> dict[str, JaggedTensor]:
    """`mc_module.<method>(features_dict)`: one of `preprocess`, `profile`, `remap`."""
    return getattr(mc_module, method)(features_dict)


def with_rows(features: Mapping[str, JaggedTensor], rows_N: Tensor, drop: bool) -> dict[str, JaggedTensor]:
    """Row numbers in place of ids, feature after feature; with `drop` those that are -1 leave their bags."""
    drop = drop and bool((rows_N < 0).any())  # host sync: bags get shorter
    remapped = {}
    for (name, jt), rows in zip(features.items(), rows_N.split([len(jt.values()) for jt in features.values()])):
        weights, lengths = jt.weights_or_none(), jt.lengths()
        if drop:
            stays = rows >= 0
            bags = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)[stays]
            lengths = torch.zeros_like(lengths).index_add_(0, bags, torch.ones_like(bags, dtype=lengths.dtype))
            rows, weights = rows[stays], None if weights is None else weights[stays]
        remapped[name] = JaggedTensor(rows, weights=weights, lengths=lengths)
    return remapped


def _with_values(jt: JaggedTensor, values: Tensor) -> JaggedTensor:
    return JaggedTensor(values, weights=jt.weights_or_none(), lengths=jt.lengths(), offsets=jt.offsets_or_none())


class ManagedCollisionCollection(nn.Module):
    """One managed-collision module per table; a KeyedJaggedTensor of raw ids in, one of row numbers out.

    The answer has the tables' features, in table order. Child: `_managed_collision_modules`, by table name.

    Raises:
        ValueError: a table without a module or a module without a table, another number of rows than the table has,
            or a feature of two tables, whose ids would need two row numbers.
        KeyError: (forward) a feature that the input does not have.

    Counterpart: torchrec.modules.mc_modules.ManagedCollisionCollection.
    """

    def __init__(
        self,
        managed_collision_modules: Mapping[str, ManagedCollisionModule],
        embedding_configs: Sequence[BaseEmbeddingConfig],
        need_preprocess: bool = True,
    ) -> None:
        super().__init__()
        tables = {config.name for config in embedding_configs}
        if tables != set(managed_collision_modules):
            raise ValueError(f"modules for {sorted(managed_collision_modules)}, tables {sorted(tables)}: must be equal")
        table_of: dict[str, str] = {}
        for config in embedding_configs:
            size = managed_collision_modules[config.name].output_size()
            if size != config.num_embeddings:
                raise ValueError(f"table {config.name!r} has {config.num_embeddings} rows, its module gives {size}")
            for feature in config.feature_names:
                if feature in table_of:
                    raise ValueError(f"feature {feature!r} is in {table_of[feature]!r} and in {config.name!r}")
                table_of[feature] = config.name
        self._managed_collision_modules = nn.ModuleDict(managed_collision_modules)
        self._embedding_configs = embedding_configs

    def embedding_configs(self) -> Sequence[BaseEmbeddingConfig]:
        """The configs as given."""
        return self._embedding_configs

    def forward(self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True) -> KeyedJaggedTensor:
        known = features.keys()
        remapped: dict[str, JaggedTensor] = {}
        for config in self._embedding_configs:
            missing = [name for name in config.feature_names if name not in known]
            if missing:
                raise KeyError(f"the input has no features {missing}; it has {known}")
            module = self._managed_collision_modules[config.name]
            remapped.update(module({name: features[name] for name in config.feature_names}, mutate_miss_lengths))
        return KeyedJaggedTensor.from_jt_dict(remapped)

    def table_to_number_buckets(self) -> dict[str, int]:
        """By table: how many parts its rows may be cut into without moving any id to another row."""
        return {name: module.buckets() for name, module in self._managed_collision_modules.items()}

    def evict(self) -> dict[str, Tensor | None]:
        """By table: rows with a new owner since the last call."""
        return {name: module.evict() for name, module in self._managed_collision_modules.items()}

    def open_slots(self) -> dict[str, Tensor]:
        """By table: rows that no id owns."""
        return {name: module.open_slots() for name, module in self._managed_collision_modules.items()}
