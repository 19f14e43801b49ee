"""All options of a model as a list of `ShardingOption`s: the public form of the grid in options.py.

Counterpart: torchrec.distributed.planner.enumerators
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from recsys_edu.distributed.planner.options import OptionGrid, enumerate_options, grouped_reasons
from recsys_edu.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from recsys_edu.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    PartitionByType,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardEstimator,
    ShardingOption,
    Topology,
    sharder_data_of,
)
from recsys_edu.distributed.planner.utils import sharder_name
from recsys_edu.distributed.planner.workload import read_workload
from recsys_edu.distributed.types import ModuleSharder, ShardingType


def get_partition_by_type(sharding_type: str) -> str:
    """How a sharding type has to be placed.

    >>> get_partition_by_type("row_wise"), get_partition_by_type("table_row_wise")
    ('uniform', 'host')

    Raises:
        ValueError: an unknown sharding type.
    """
    t, by = ShardingType, PartitionByType
    return {
        t.TABLE_WISE: by.DEVICE,
        t.COLUMN_WISE: by.DEVICE,
        t.ROW_WISE: by.UNIFORM,
        t.DATA_PARALLEL: by.UNIFORM,
        t.TABLE_ROW_WISE: by.HOST,
        t.TABLE_COLUMN_WISE: by.HOST,
        t.GRID_SHARD: by.MULTI_HOST,
    }[t(sharding_type)].value


class EmbeddingEnumerator(Enumerator):
    """Per table every sharding type and kernel that the sharder and the constraints allow, sized and estimated.

    Options that come to the same thing (column-wise with one column block is table-wise) appear once, unless the
    constraint names only the one; options that fit no rank are listed all the same, a partitioner will say so.

    Args:
        estimator: default: storage and perf.
        use_exact_enumerate_order: accepted; the order is always that of modules, tables, types, kernels.

    Counterpart: torchrec.distributed.planner.enumerators.EmbeddingEnumerator
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints] | None = None,
        estimator: ShardEstimator | list[ShardEstimator] | None = None,
        use_exact_enumerate_order: bool | None = False,
    ) -> None:
        del use_exact_enumerate_order
        self._topology = topology
        self._batch_size = batch_size
        self._constraints = constraints
        if estimator is None:
            estimator = [
                EmbeddingPerfEstimator(topology, constraints),
                EmbeddingStorageEstimator(topology, constraints),
            ]
        self._estimators = estimator if isinstance(estimator, list) else [estimator]
        self._sharder_map: dict[str, ModuleSharder[Any]] = {}
        self._last_stored_search_space: list[ShardingOption] | None = None

    @property
    def sharder_map(self) -> dict[str, ModuleSharder[Any]]:
        """Sharders by the name of the module type they shard."""
        return self._sharder_map

    @property
    def last_stored_search_space(self) -> list[ShardingOption] | None:
        """What `enumerate` found last."""
        return self._last_stored_search_space

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> list[ShardingOption]:
        self._sharder_map = {sharder_name(sharder.module_type): sharder for sharder in sharders}
        workload = read_workload(module, sharders, self._topology, self._batch_size, self._constraints)
        grid = enumerate_options(workload, self._topology, check_sizes=False)
        wanted = [(int(i), int(j)) for i, j in np.argwhere(grid.valid_TJ)]
        options = options_from(grid, wanted, self._batch_size)
        missing = sorted(set(range(len(workload))) - {i for i, _ in wanted})
        if missing:
            i = missing[0]
            raise PlannerError(
                f"table {workload.tables[i].name!r} has no option: " + "; ".join(grouped_reasons(grid, i)),
                PlannerErrorType.STRICT_CONSTRAINTS,
            )
        self.populate_estimates(options)
        self._last_stored_search_space = copy.deepcopy(options)
        return options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimate (again) what the shards cost."""
        data = sharder_data_of(self._sharder_map.values())
        for estimator in self._estimators:
            estimator.estimate(sharding_options, data)


def options_from(grid: OptionGrid, wanted: Sequence[tuple[int, int]], batch_size: int) -> list[ShardingOption]:
    """The `ShardingOption` of each (table, column) of a grid, with its shards but without costs and ranks."""
    options = []
    for i, j in wanted:
        table, (sharding_type, kernel) = grid.workload.tables[i], grid.pairs[j]
        constraint = table.constraint
        options.append(
            ShardingOption(
                name=table.name,
                tensor=table.parameter,
                module=(table.path, table.module),
                input_lengths=list(table.pooling_factors),
                batch_size=batch_size,
                sharding_type=sharding_type,
                partition_by=get_partition_by_type(sharding_type),
                compute_kernel=kernel,
                shards=[
                    Shard(size=[len(rows), len(columns)], offset=[rows.start, columns.start])
                    for rows, columns in grid.rectangles(i, j)
                ],
                cache_params=constraint.cache_params,
                enforce_hbm=constraint.enforce_hbm,
                stochastic_rounding=constraint.stochastic_rounding,
                bounds_check_mode=constraint.bounds_check_mode,
                dependency=constraint.together,
                is_pooled=bool(grid.workload.lookups.pooled[i]),
                feature_names=list(table.features),
                output_dtype=constraint.output_dtype,
                key_value_params=constraint.key_value_params,
                num_poolings=list(table.num_poolings),
            )
        )
    return options
