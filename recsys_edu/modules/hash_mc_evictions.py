"""Who has to leave a hashed table of ids: every slot carries the hour until which it belongs to its owner.

    policy                       an id that is seen at hour h keeps its slot ...
    SINGLE_TTL_EVICTION          until hour h + single_ttl; only an expired owner can be replaced
    PER_FEATURE_TTL_EVICTION     the same, with a time to live for each feature
    LRU_EVICTION                 until a newcomer finds all its slots taken: then the longest unseen owner goes

Hours are counted since 1970. Counterpart: torchrec.modules.hash_mc_evictions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum, unique

import torch
from torch import Tensor, nn

from recsys_edu.sparse.jagged_tensor import JaggedTensor


@unique
class HashZchEvictionPolicyName(Enum):
    """The eviction policies of HashZchManagedCollisionModule."""

    SINGLE_TTL_EVICTION = "SINGLE_TTL_EVICTION"
    PER_FEATURE_TTL_EVICTION = "PER_FEATURE_TTL_EVICTION"
    LRU_EVICTION = "LRU_EVICTION"


@dataclass(frozen=True)
class HashZchEvictionConfig:
    """Times to live in hours: `single_ttl` for all ids, or `per_feature_ttl` in the order of `features`."""

    features: list[str]
    single_ttl: int | None = None
    per_feature_ttl: list[int] | None = None


def hours_now() -> int:
    """Full hours since 1970."""
    return int(time.time() // 3600)


def get_kernel_from_policy(policy_name: HashZchEvictionPolicyName | None) -> int:
    """0 where only expired owners leave, 1 for LRU (the number that FBGEMM's kernel takes)."""
    return int(policy_name is HashZchEvictionPolicyName.LRU_EVICTION)


class HashZchEvictionScorer:
    """Gives every id the hour until which it keeps its slot, and says which hour is now."""

    def __init__(self, config: HashZchEvictionConfig) -> None:
        self._config = config

    def gen_score(self, feature: JaggedTensor, device: torch.device) -> Tensor:
        """One hour per id, int32."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores: take HashZchSingleTtlScorer or derive one")

    def gen_threshold(self) -> int:
        """The present hour: slots that are kept until an earlier one are free to take."""
        return hours_now()


class HashZchSingleTtlScorer(HashZchEvictionScorer):
    """Every id stays `config.single_ttl` hours after it was last seen."""

    def gen_score(self, feature: JaggedTensor, device: torch.device) -> Tensor:
        if self._config.single_ttl is None or self._config.single_ttl < 0:
            raise ValueError(f"single_ttl has to be given, in hours, and not negative; got {self._config.single_ttl}")
        ids_N = feature.values()
        return torch.full_like(ids_N, hours_now() + self._config.single_ttl, dtype=torch.int32, device=device)


class HashZchPerFeatureTtlScorer(HashZchEvictionScorer):
    """Ids of feature f stay `config.per_feature_ttl[f]` hours.

    The JaggedTensor's lengths say how many of its values belong to each feature, in the config's order (TorchRec takes
    them from its weights).
    """

    def gen_score(self, feature: JaggedTensor, device: torch.device) -> Tensor:
        hours = self._config.per_feature_ttl
        if hours is None or len(hours) != len(self._config.features):
            raise ValueError(f"per_feature_ttl has to have a number for each of {self._config.features}, got {hours}")
        counts_F, ids_N = feature.lengths().long(), feature.values()
        if len(counts_F) != len(hours) or int(counts_F.sum()) != len(ids_N):
            raise ValueError(
                f"lengths {counts_F.tolist()} have to say how many of the {len(ids_N)} values belong to each feature "
                f"of {self._config.features}"
            )
        until_F = torch.tensor(hours, dtype=torch.int32, device=device) + hours_now()
        return torch.repeat_interleave(until_F, counts_F.to(device), output_size=len(ids_N))


def get_eviction_scorer(policy_name: HashZchEvictionPolicyName, config: HashZchEvictionConfig) -> HashZchEvictionScorer:
    """The scorer of a policy. LRU counts hours as a single time to live does; without one, of 0 hours."""
    if policy_name is HashZchEvictionPolicyName.PER_FEATURE_TTL_EVICTION:
        return HashZchPerFeatureTtlScorer(config)
    if policy_name is HashZchEvictionPolicyName.LRU_EVICTION and config.single_ttl is None:
        config = HashZchEvictionConfig(config.features, single_ttl=0)
    return HashZchSingleTtlScorer(config)


class HashZchEvictionModule(nn.Module):
    """(hour until which each id keeps its slot, the present hour).

    >>> config = HashZchEvictionConfig(features=["f"], single_ttl=24)
    >>> module = HashZchEvictionModule(HashZchEvictionPolicyName.SINGLE_TTL_EVICTION, torch.device("cpu"), config)
    >>> until, now = module(JaggedTensor(torch.tensor([7, 8]), lengths=torch.tensor([2])))
    >>> (until - now).tolist()
    [24, 24]

    Raises:
        ValueError: a time-to-live policy without a config, or without its hours.
    """

    def __init__(
        self,
        policy_name: HashZchEvictionPolicyName,
        device: torch.device,
        config: HashZchEvictionConfig | None,
    ) -> None:
        super().__init__()
        if config is None and policy_name is not HashZchEvictionPolicyName.LRU_EVICTION:
            raise ValueError(f"{policy_name.value} needs an eviction_config with its hours to live")
        self._policy_name, self._device = policy_name, device
        self._scorer = get_eviction_scorer(policy_name, config or HashZchEvictionConfig(features=[]))

    def forward(self, feature: JaggedTensor) -> tuple[Tensor, int]:
        return self._scorer.gen_score(feature, self._device), self._scorer.gen_threshold()
