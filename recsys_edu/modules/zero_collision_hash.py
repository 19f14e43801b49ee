"""A hash table of ids in one tensor, probed by all ids of a batch at once.

    identities   [ -1 | 9001 | -1 | 17 | 555 | -1 ]      one id per slot, -1 for none
    id 17        home = hash(17) mod slots = 2:  look at 2, 3, 4, ...  found at 3

Every id is looked for along its own path: `max_probe` slots from its home on, around the end of its bucket. An id that
is not there takes the first free slot of its path. Where several ids of a batch want one slot, the one that comes first
in the batch gets it, and the others go on along their paths.

The hash is MurmurHash3 (x64, 128 bits, of the two words id and 0, its halves xor-ed), as in FBGEMM's
`zero_collision_hash`, so a table that was filled there is read here.

Suffixes: N ids, U distinct ids in order of first appearance, A those of them that still look, P probes, Z slots.

Counterpart: fbgemm::zero_collision_hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1
_LOW_63 = torch.iinfo(torch.int64).max


def murmur_hash3(ids_N: Tensor) -> Tensor:
    """64 well-mixed bits per id, as int64: the upper half of the unsigned numbers shows as negative ones."""
    h1_N = _rotated(ids_N.long() * _signed(0x87C37B91114253D5), 31) * _signed(0x4CF5AD432745937F)
    h1_N = _rotated(h1_N, 27) * 5 + 0x52DCE729
    h2_N = h1_N * 5 + 0x38495AB5  # the second word is 0
    h1_N, h2_N = h1_N ^ 16, h2_N ^ 16  # the length of the two words, in bytes
    h1_N = h1_N + h2_N
    h2_N = h2_N + h1_N
    h1_N, h2_N = _mixed(h1_N), _mixed(h2_N)
    h1_N = h1_N + h2_N
    return h1_N ^ (h1_N + h2_N)


def unsigned_remainder(bits_N: Tensor, divisor_N: Tensor) -> Tensor:
    """The remainder of numbers that are meant unsigned: the upper 63 bits and the last one by themselves.

    >>> unsigned_remainder(torch.tensor([-1]), torch.tensor([10])).item(), (2**64 - 1) % 10
    (5, 5)
    """
    return (_shifted(bits_N, 1) % divisor_N * 2 + (bits_N & 1)) % divisor_N


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (_LOW_63 >> (bits - 1))  # torch's shift copies the sign


def _rotated(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shifted(x, 64 - bits)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 33)) * _signed(0xFF51AFD7ED558CCD)
    x = (x ^ _shifted(x, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return x ^ _shifted(x, 33)


@dataclass(frozen=True)
class Paths:
    """Where each of U ids looks: `max_probe` slots from `home_U` on, around the `size_U` slots from `first_U` on."""

    ids_U: Tensor
    first_U: Tensor
    home_U: Tensor
    size_U: Tensor
    max_probe: int

    @staticmethod
    def of(ids_U: Tensor, first_U: Tensor, size_U: Tensor, max_probe: int) -> Paths:
        return Paths(ids_U, first_U, unsigned_remainder(murmur_hash3(ids_U), size_U), size_U, max_probe)

    @property
    def num_probes(self) -> int:
        return min(self.max_probe, int(self.size_U.max())) if len(self.ids_U) else 0

    def slots(self, looking_A: Tensor, probe: int) -> Tensor:
        """The slot that each of these ids tries in this round."""
        return self.first_U[looking_A] + (self.home_U[looking_A] + probe) % self.size_U[looking_A]


def find(paths: Paths, identities_Z: Tensor) -> Tensor:
    """The slot of each id, -1 for one that is not on its path."""
    slot_U = torch.full_like(paths.ids_U, -1)
    looking_A = torch.arange(len(slot_U), device=slot_U.device)
    for probe in range(paths.num_probes):
        slot_A = paths.slots(looking_A, probe)
        found_A = identities_Z[slot_A] == paths.ids_U[looking_A]
        slot_U[looking_A[found_A]] = slot_A[found_A]
        looking_A = looking_A[~found_A]
        if not len(looking_A):
            break
    return slot_U


def insert(paths: Paths, slot_U: Tensor, identities_Z: Tensor) -> None:
    """Give every id whose slot is -1 the first free slot of its path; fills in `slot_U` and `identities_Z`."""
    looking_A = (slot_U < 0).nonzero().flatten()
    for probe in range(paths.num_probes):
        if not len(looking_A):
            return
        slot_A = paths.slots(looking_A, probe)
        wins_A = (identities_Z[slot_A] == EMPTY) & _is_first(slot_A)  # ids that want a taken slot all fail alike
        _take(looking_A[wins_A], slot_A[wins_A], paths.ids_U, slot_U, identities_Z)
        looking_A = looking_A[~wins_A]


def replace(paths: Paths, slot_U: Tensor, identities_Z: Tensor, until_Z: Tensor, until_U: Tensor, now: int) -> Tensor:
    """Give ids without a slot that of the owner on their path whose hour is the earliest, where that is before `now`.

    Args:
        until_Z, until_U: the hour of each slot, and the one that each id brings; `until_Z` is brought up to date.

    Returns:
        The slots that changed their owner.
    """
    looking_A, changed = (slot_U < 0).nonzero().flatten(), [slot_U[:0]]
    while len(looking_A):
        slots_PA = torch.stack([paths.slots(looking_A, probe) for probe in range(paths.num_probes)])
        probe_P1 = torch.arange(paths.num_probes, device=slot_U.device)[:, None]
        key_A = (until_Z[slots_PA].long() * paths.num_probes + probe_P1).amin(0)  # of equal hours the nearest to home
        earliest_A, probe_A = key_A.div(paths.num_probes, rounding_mode="floor"), key_A % paths.num_probes
        looking_A, slots_PA, probe_A = (part[..., earliest_A < now] for part in (looking_A, slots_PA, probe_A))
        slot_A = slots_PA.gather(0, probe_A[None]).flatten() if len(looking_A) else looking_A
        wins_A = _is_first(slot_A)
        _take(looking_A[wins_A], slot_A[wins_A], paths.ids_U, slot_U, identities_Z)
        until_Z[slot_A[wins_A]] = until_U[looking_A[wins_A]]
        changed.append(slot_A[wins_A])
        looking_A = looking_A[~wins_A]
    return torch.cat(changed)


def _is_first(slot_A: Tensor) -> Tensor:
    """Whether no earlier id of the batch wants the same slot."""
    _, inverse_A, first = first_places(slot_A)
    return first[inverse_A] == torch.arange(len(slot_A), device=slot_A.device)


def first_places(values_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct values, for every position which of them it has, for each of them its first position)."""
    distinct_U, inverse_N = values_N.unique(return_inverse=True)
    places_N = torch.arange(len(values_N), device=values_N.device)
    first_U = torch.full((len(distinct_U),), len(values_N), device=values_N.device)
    return distinct_U, inverse_N, first_U.scatter_reduce_(0, inverse_N, places_N, "amin")


def _take(winner_A: Tensor, slot_A: Tensor, ids_U: Tensor, slot_U: Tensor, identities_Z: Tensor) -> None:
    slot_U[winner_A] = slot_A
    identities_Z[slot_A] = ids_U[winner_A]
