"""Managed collision by hashing: an id's row is found by probing a table of owners, without sorting and without counts.

    bucket 0: rows 0 to 9          bucket 1: rows 10 to 19        ...        each a hash table of its own
    id 41  -> bucket 41 % 2 = 1 -> home row 13 taken -> 14 free: its row from now on

Compared with MCHManagedCollisionModule an id gets its row at once and not after some batches, rows can be divided
between ranks bucket by bucket without moving any id, and who leaves is decided by time, not by counts.

Suffixes: N ids, U distinct ids, Z rows.

Counterpart: torchrec.modules.hash_mc_modules.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from recsys_edu.modules.hash_mc_evictions import (
    HashZchEvictionConfig,
    HashZchEvictionModule,
    HashZchEvictionPolicyName,
)
from recsys_edu.modules.mc_modules import ManagedCollisionModule, with_rows
from recsys_edu.modules.zero_collision_hash import (
    EMPTY,
    Paths,
    find,
    first_places,
    insert,
    murmur_hash3,
    replace,
    unsigned_remainder,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor

logger = logging.getLogger(__name__)


class HashZchManagedCollisionModule(ManagedCollisionModule):
    """A row for every id as long as there is room on its path of `max_probe` rows.

    >>> module = HashZchManagedCollisionModule(8, torch.device("cpu"), total_num_buckets=2)
    >>> ids = JaggedTensor(torch.tensor([10**15, 17, 10**15, 4]), lengths=torch.tensor([4]))
    >>> rows = module({"f": ids})["f"].values().tolist()
    >>> rows[0] == rows[2], len(set(rows))
    (True, 3)

    In training mode a new id takes the first free row of its path; where none is free, the eviction policy may take one
    from its owner (`evict` tells which rows changed hands). An id without a row shares its home row with that one's
    owner, or the reserved rows of its bucket with all others, or is dropped. Eval mode and `is_inference` change
    nothing.

    Args:
        zch_size: rows of this module, all of its buckets together.
        total_num_buckets: hash tables in the whole table; an id is in bucket `id % total_num_buckets`, or, where
            `input_hash_size` is given, in that of its stretch of the ids below it.
        max_probe: rows that are looked at for one id.
        output_segments: first row of each bucket and the end; default: buckets of equal size.
        tb_logging_frequency: every so many batches the share of rows that have an owner is logged; 0: never.
        eviction_policy_name, eviction_config: default: an owner stays for ever.
        start_bucket, end_bucket: the buckets of this module, of all; default: all.
        opt_in_prob: percent of sightings of a new id that let it in; -1: all.
        percent_reserved_slots: of each bucket, kept at its end for ids without a row to share.
        disable_fallback: ids without a row are dropped from their bags (`mutate_miss_lengths`) or become -1.

    Raises:
        ValueError: buckets of unequal size without `output_segments`, or sizes that do not fit each other; (forward)
            the id -1, which marks a free row, or an id of another module's buckets.
        NotImplementedError: `track_id_freq` and `write_runtime_meta_dim`.

    Counterpart: torchrec.modules.hash_mc_modules.HashZchManagedCollisionModule.
    """

    def __init__(
        self,
        zch_size: int,
        device: torch.device,
        total_num_buckets: int,
        max_probe: int = 128,
        input_hash_size: int = 0,
        output_segments: list[int] | None = None,
        is_inference: bool = False,
        name: str | None = None,
        tb_logging_frequency: int = 0,
        eviction_policy_name: HashZchEvictionPolicyName | None = None,
        eviction_config: HashZchEvictionConfig | None = None,
        inference_dispatch_div_train_world_size: bool = False,
        start_bucket: int = 0,
        end_bucket: int | None = None,
        opt_in_prob: int = -1,
        percent_reserved_slots: float = 0,
        disable_fallback: bool = False,
        track_id_freq: bool = False,
        read_only_suffix: str = "_readonly",
        enable_per_feature_lookups: bool = False,
        no_bag: bool = False,
        write_runtime_meta_dim: int = 0,
        persist_hash_zch_bucket: bool = True,
    ) -> None:
        if track_id_freq or write_runtime_meta_dim:
            raise NotImplementedError("track_id_freq and write_runtime_meta_dim: rows carry no further data here")
        end_bucket = total_num_buckets if end_bucket is None else end_bucket
        segments = output_segments or _equal_segments(zch_size, total_num_buckets, start_bucket, end_bucket)
        if (
            max_probe < 1
            or len(segments) != total_num_buckets + 1
            or segments[end_bucket] - segments[start_bucket] != zch_size
        ):
            raise ValueError(
                f"output_segments have to name {total_num_buckets} buckets, those from {start_bucket} to before "
                f"{end_bucket} with zch_size={zch_size} rows, and max_probe has to be positive; got {segments}, "
                f"{max_probe}"
            )
        super().__init__(device, segments, False, read_only_suffix, enable_per_feature_lookups)
        self._zch_size, self._buckets, self._max_probe = zch_size, total_num_buckets, max_probe
        self._start_bucket, self._end_bucket = start_bucket, end_bucket
        self._input_hash_size, self._is_inference, self._name = input_hash_size, is_inference, name
        self._logging_frequency, self._num_batches = tb_logging_frequency, 0
        self._policy, self._config = eviction_policy_name, eviction_config
        self._evictions = HashZchEvictionModule(eviction_policy_name, device, eviction_config) if self._policy else None
        self._opt_in_prob, self._percent_reserved = opt_in_prob, percent_reserved_slots
        self._disable_fallback = disable_fallback
        self.register_buffer("_hash_zch_identities", torch.full((zch_size, 1), EMPTY, device=device))
        metadata = torch.full((zch_size, 1), -1, dtype=torch.int32, device=device) if self._policy else None
        self.register_buffer("_hash_zch_metadata", metadata)
        buckets = torch.tensor([[total_num_buckets]], device=device)
        self.register_buffer("_hash_zch_bucket", buckets, persistent=persist_hash_zch_bucket)
        self._segments = torch.tensor(segments, device=device)
        self._evicted: list[Tensor] = []

    @property
    def max_probe(self) -> int:
        return self._max_probe

    @property
    def disable_fallback(self) -> bool:
        return self._disable_fallback

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Nothing: ids get their rows in `remap`."""
        return features

    @torch.no_grad()
    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        ids_N = torch.cat([jt.values().long() for jt in features.values()])
        ids_U, inverse_N = _distinct(ids_N)
        bucket_U = self._bucket(ids_U)
        self.check_ids(ids_U)
        first_U = self._segments[bucket_U] - self._segments[self._start_bucket]
        reserved_U = self._reserved(bucket_U)
        size_U = self._segments[bucket_U + 1] - self._segments[bucket_U] - reserved_U
        paths = Paths.of(ids_U, first_U, size_U, self._max_probe)
        slot_U = find(paths, self._identities_Z)
        if self.training and not self._is_inference:
            self._let_in(paths, slot_U, self._hours(features, inverse_N, len(ids_U)))
        missing_U = slot_U < 0
        if not self._disable_fallback:
            shared_U = first_U + paths.home_U
            if self._percent_reserved:
                shared_U = first_U + size_U + unsigned_remainder(murmur_hash3(ids_U), reserved_U)
            slot_U, missing_U = torch.where(missing_U, shared_U, slot_U), torch.zeros_like(missing_U)
        rows_N = torch.where(missing_U, -1, slot_U + self._segments[self._start_bucket])[inverse_N]
        return with_rows(features, rows_N, drop=self._disable_fallback and mutate_miss_lengths)

    def _let_in(self, paths: Paths, slot_U: Tensor, hours: tuple[Tensor, int] | None) -> None:
        """Rows for new ids, as far as there are any; fills in `slot_U`."""
        kept_out_U = torch.zeros_like(slot_U, dtype=torch.bool)
        if self._opt_in_prob >= 0:
            kept_out_U = (slot_U < 0) & (torch.rand(len(slot_U), device=slot_U.device) * 100 >= self._opt_in_prob)
        slot_U[kept_out_U] = 0  # any slot: as if it had one, for now
        insert(paths, slot_U, self._identities_Z)
        if hours is not None:
            until_U, threshold = hours
            until_Z = self._hash_zch_metadata[:, 0]
            mine_U = (slot_U >= 0) & ~kept_out_U
            until_Z.scatter_reduce_(0, slot_U[mine_U], until_U[mine_U], "amax")
            changed = replace(paths, slot_U, self._identities_Z, until_Z, until_U, threshold)
            if len(changed):
                self._evicted.append(changed + self._segments[self._start_bucket])
        slot_U[kept_out_U] = -1
        self._num_batches += 1
        if self._logging_frequency and self._num_batches % self._logging_frequency == 0:
            owned = 1 - self.open_slots().item() / self._zch_size
            logger.info("%s: batch %d, %.1f %% of rows owned", self._name, self._num_batches, 100 * owned)

    def _hours(self, features: dict[str, JaggedTensor], inverse_N: Tensor, num_ids: int) -> tuple[Tensor, int] | None:
        """Until when each id may stay, and the hour before which an owner has to give way; None without a policy."""
        if self._evictions is None:
            return None
        counts_F = torch.tensor([len(jt.values()) for jt in features.values()], device=inverse_N.device)
        by_feature = self._policy is HashZchEvictionPolicyName.PER_FEATURE_TTL_EVICTION
        if by_feature and list(features) != list(self._config.features):
            raise ValueError(f"eviction_config is for {self._config.features}, the features are {list(features)}")
        until_N, now = self._evictions(JaggedTensor(inverse_N, lengths=counts_F))
        until_U = torch.full((num_ids,), -1, dtype=torch.int32, device=inverse_N.device)
        until_U.scatter_reduce_(0, inverse_N, until_N, "amax")
        is_lru = self._policy is HashZchEvictionPolicyName.LRU_EVICTION
        return until_U, int(until_N.max()) if is_lru and len(until_N) else now

    @property
    def _identities_Z(self) -> Tensor:
        return self._hash_zch_identities[:, 0]

    def _bucket(self, ids_N: Tensor) -> Tensor:
        if not self._input_hash_size:
            return ids_N % self._buckets
        return ids_N.div(-(-self._input_hash_size // self._buckets), rounding_mode="floor")

    def _reserved(self, bucket_U: Tensor) -> Tensor:
        sizes_U = self._segments[bucket_U + 1] - self._segments[bucket_U]
        return (sizes_U * (self._percent_reserved / 100)).long()

    def check_ids(self, ids_N: Tensor) -> None:
        bucket_N = self._bucket(ids_N)
        wrong_N = (ids_N == EMPTY) | (bucket_N < self._start_bucket) | (bucket_N >= self._end_bucket)
        if bool(wrong_N.any()):  # host sync: a wrong id would read or take the row of another one
            where = f"buckets {self._start_bucket} to {self._end_bucket - 1}"
            limit = f"; ids have to be below input_hash_size={self._input_hash_size}" if self._input_hash_size else ""
            raise ValueError(
                f"{self._name or 'managed collision'}: id {int(ids_N[wrong_N][0])} has no place in {where} (-1 marks a "
                f"free row){limit}"
            )

    def evict(self) -> Tensor | None:
        evicted, self._evicted = self._evicted, []
        return torch.cat(evicted).unique() if evicted else None

    def output_size(self) -> int:
        return self._zch_size

    def input_size(self) -> int:
        return self._input_hash_size

    def buckets(self) -> int:
        return self._buckets

    def open_slots(self) -> Tensor:
        mine = torch.arange(self._start_bucket, self._end_bucket, device=self._segments.device)
        return ((self._identities_Z == EMPTY).sum() - self._reserved(mine).sum()).reshape(1)

    def get_reserved_slots_per_bucket(self) -> int:
        """Rows at the end of each bucket that no id owns; -1 where none are reserved (buckets of equal size)."""
        return int(self._reserved(torch.tensor(self._start_bucket))) if self._percent_reserved else -1

    def home_rows(self, ids_N: Tensor) -> Tensor:
        """The first row of the id's bucket."""
        return self._segments[self._bucket(ids_N).clamp(0, self._buckets - 1)]

    def reset_inference_mode(self) -> None:
        """From now on no id gets a row, whatever mode the module is in."""
        self._is_inference = True

    def reset_training_mode(self) -> None:
        """From now on new ids get rows in training mode."""
        self._is_inference = False

    def check_cuts(self) -> None:
        if int(self._hash_zch_bucket) != self._buckets:  # host sync: a few bytes that say whether all others fit
            raise ValueError(f"filled with {int(self._hash_zch_bucket)} buckets, this module has {self._buckets}")

    def validate_state(self) -> None:
        self.check_cuts()
        taken = (self._identities_Z != EMPTY).nonzero().flatten()
        bucket = torch.searchsorted(self._segments, taken + self._segments[self._start_bucket], right=True) - 1
        wrong = self._bucket(self._identities_Z[taken]) != bucket
        if bool(wrong.any()):
            row = int(taken[wrong][0])
            raise ValueError(f"row {row} belongs to id {int(self._identities_Z[row])}, whose bucket is another")

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int] | None = None,
        device: torch.device | None = None,
    ) -> HashZchManagedCollisionModule:
        first, stop = output_id_range
        segments = self._segments.tolist()
        if first not in segments or stop not in segments:
            raise ValueError(
                f"rows {first} to {stop - 1} cut a bucket: cuts have to be among the borders {segments[:9]} ... Take a"
                " multiple of the number of ranks for total_num_buckets"
            )
        part = HashZchManagedCollisionModule(
            zch_size=stop - first,
            device=device or self._device,
            total_num_buckets=self._buckets,
            max_probe=self._max_probe,
            input_hash_size=self._input_hash_size,
            output_segments=segments,
            is_inference=self._is_inference,
            name=self._name,
            tb_logging_frequency=self._logging_frequency,
            eviction_policy_name=self._policy,
            eviction_config=self._config,
            start_bucket=segments.index(first),
            end_bucket=segments.index(stop),
            opt_in_prob=self._opt_in_prob,
            percent_reserved_slots=self._percent_reserved,
            disable_fallback=self._disable_fallback,
        ).train(self.training)
        offset = segments[self._start_bucket]
        for name in ("_hash_zch_identities", "_hash_zch_metadata"):
            if getattr(self, name) is not None:
                getattr(part, name).copy_(getattr(self, name)[first - offset : stop - offset])
        return part


def _equal_segments(zch_size: int, num_buckets: int, start: int, end: int) -> list[int]:
    mine = end - start
    if mine < 1 or zch_size % mine:
        raise ValueError(
            f"{zch_size} rows do not divide into {mine} equal buckets: change zch_size or total_num_buckets, or give "
            "output_segments"
        )
    return [bucket * (zch_size // mine) for bucket in range(num_buckets + 1)]


def _distinct(ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """The ids in order of first appearance, and for every position which of them it has."""
    sorted_U, inverse_N, first_U = first_places(ids_N)
    order_U = first_U.argsort()
    rank_U = torch.empty_like(order_U)
    rank_U[order_U] = torch.arange(len(order_U), device=ids_N.device)
    return sorted_U[order_U], rank_U[inverse_N]
