"""What a plan asks of every rank in one training step: bytes on the links, milliseconds of lookups.

plan -> for each rank: ids that leave and arrive, embeddings that leave and arrive, lookup and its backward

Suffixes: W ranks, T tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.cost import PHASES, Array, Machine, Pattern, Rectangles, traffic_of
from recsys_edu.distributed.planner.options import KINDS
from recsys_edu.distributed.planner.report import PlannedSharding


@dataclass(frozen=True)
class RankLoads:
    """Per rank and step. A rank's share for itself is counted as sent, as in the planner's cost function.

    Args:
        ids_out_W, ids_in_W: bytes of ids and lengths.
        flat_out_W, flat_in_W: bytes of embeddings that go straight to the rank that asked.
        host_W: bytes of partial sums that a rank gives to be added inside its host.
        between_out_W, between_in_W: bytes of those sums on their way to other hosts.
        replica_bytes: of tables with a copy on every rank, whose gradients are all-reduced.
        lookup_ms_W, backward_ms_W, fetch_ms_W: of the lookup, of its backward with the update, of filling caches.
    """

    ids_out_W: Array
    ids_in_W: Array
    flat_out_W: Array
    flat_in_W: Array
    host_W: Array
    between_out_W: Array
    between_in_W: Array
    replica_bytes: float
    lookup_ms_W: Array
    backward_ms_W: Array
    fetch_ms_W: Array


def rank_loads(plan: PlannedSharding) -> RankLoads:
    """The loads of a plan, from the same rectangles and the same traffic as its cost."""
    placement, machine = plan.found.placement, Machine.of(plan.topology)
    problem, world = placement.problem, plan.topology.world_size
    grid = problem.grid
    unit_T, column_T = np.zeros(len(grid.workload), np.int64), np.zeros(len(grid.workload), np.int64)
    for unit, tables in enumerate(problem.units):
        unit_T[list(tables)], column_T[list(tables)] = unit, placement.choice_U[unit]
    tables_T = np.arange(len(column_T))
    pattern_T = np.array([KINDS[grid.pairs[j][0]].pattern for j in column_T])
    blocks_T = grid.row_blocks_TJ[tables_T, column_T]
    use = grid.workload.lookups
    rect = Rectangles(
        rows=grid.rows_TJ[tables_T, column_T],
        columns=grid.width_TJ[tables_T, column_T],
        pattern=pattern_T,
        parts=np.where(pattern_T >= Pattern.ROWS_EVERYWHERE, blocks_T, 1),
        kernel_bw=np.ones(len(column_T)),
        on_host=np.zeros(len(column_T), bool),
        cached=np.zeros(len(column_T), bool),
    )
    traffic = traffic_of(rect, use, machine)
    id_bytes_T = traffic.ids_N * c.BIGINT_DTYPE * np.where(use.weighted, 2, 1)
    answer_bytes_T = traffic.answers_N * rect.columns * use.answer_bytes
    on_host_T = (pattern_T == Pattern.ROWS_ON_HOST) & use.pooled & (world > machine.local_size)
    replica_T = pattern_T == Pattern.REPLICA
    ids_W, flat_W, host_W = np.zeros(world), np.zeros(world), np.zeros(world)
    for i in np.flatnonzero(~replica_T):
        ranks = placement.ranks_U[unit_T[i]]
        np.add.at(ids_W, ranks, id_bytes_T[i])
        np.add.at(host_W if on_host_T[i] else flat_W, ranks, answer_bytes_T[i])
    phases_WP = plan.phases_WP
    table_bytes_T = grid.workload.rows_T * grid.workload.columns_T * use.element_bytes
    even = np.full(world, 1 / world)
    return RankLoads(
        ids_out_W=ids_W.sum() * even,
        ids_in_W=ids_W,
        flat_out_W=flat_W,
        flat_in_W=flat_W.sum() * even,
        host_W=host_W,
        between_out_W=host_W / machine.local_size,
        between_in_W=host_W.sum() / machine.local_size * even,
        replica_bytes=float(table_bytes_T[replica_T].sum()),
        lookup_ms_W=phases_WP[:, PHASES.index("fwd_compute")],
        backward_ms_W=phases_WP[:, PHASES.index("bwd_compute")],
        fetch_ms_W=phases_WP[:, PHASES.index("prefetch_compute")],
    )
