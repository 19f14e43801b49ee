"""Shared by all tests: real ranks, started once when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recsys_edu.distributed.testing import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(body, world_size, *args, hosts=1, timeout=60)`; body(rank, world_size, group, *args) is top-level."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_on_ranks(ranks: RankPool):
    """The same as `ranks.run`."""
    return ranks.run
