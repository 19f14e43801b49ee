"""Tilings: what `validate` accepts and refuses, pictures, cuts, intersections, the public form and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.distributed.sharding.column_wise import column_wise_shards
from recsys_edu.distributed.sharding.data_parallel import data_parallel_shards
from recsys_edu.distributed.sharding.grid import grid_shards
from recsys_edu.distributed.sharding.row_wise import row_wise_shards
from recsys_edu.distributed.sharding.table_column_wise import table_column_wise_shards
from recsys_edu.distributed.sharding.table_row_wise import table_row_wise_shards
from recsys_edu.distributed.sharding.table_wise import table_wise_shards
from recsys_edu.distributed.sharding.tiling import (
    CUSTOM,
    Shard,
    column_cuts,
    draw,
    intersections,
    non_empty,
    parameter_sharding_from,
    row_cuts,
    shards_from,
    validate,
)
from recsys_edu.distributed.types import ParameterSharding, ShardingType


def shard(rows: tuple[int, int], columns: tuple[int, int], rank: int, table: str = "user") -> Shard:
    return Shard(table, range(*rows), range(*columns), rank)


@st.composite
def tilings(draw_from: st.DrawFn, max_ranks: int = 4) -> tuple[list[Shard], int, int, int]:
    """A random valid tiling: shared row cuts, and in every row block its own column cuts. Some shards are empty."""
    world_size = draw_from(st.integers(1, max_ranks))
    num_rows = draw_from(st.integers(1, 12))
    num_columns = 4 * draw_from(st.integers(1, 4))
    rows = sorted({0, num_rows, *draw_from(st.lists(st.integers(0, num_rows), max_size=3))})
    shards = []
    for top, bottom in itertools.pairwise(rows):
        inner = draw_from(st.lists(st.integers(0, num_columns // 4), max_size=3))
        columns = sorted({0, num_columns, *(4 * cut for cut in inner)})
        for left, right in itertools.pairwise(columns):
            shards.append(shard((top, bottom), (left, right), draw_from(st.integers(0, world_size - 1))))
    if draw_from(st.booleans()):
        shards.append(shard((num_rows, num_rows), (0, num_columns), 0))
    return draw_from(st.permutations(shards)), num_rows, num_columns, world_size


def cover_counts(shards: list[Shard], num_rows: int, num_columns: int) -> torch.Tensor:
    counts = torch.zeros(num_rows, num_columns, dtype=torch.int64)
    for s in shards:
        counts[s.rows.start : s.rows.stop, s.columns.start : s.columns.stop] += 1
    return counts


@given(tilings())
@settings(max_examples=60, deadline=None)
def test_every_exact_tiling_is_valid(case: tuple[list[Shard], int, int, int]) -> None:
    shards, num_rows, num_columns, world_size = case
    validate(shards, num_rows, num_columns, world_size, "user")
    assert (cover_counts(shards, num_rows, num_columns) == 1).all()


@given(tilings(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_tiling_with_one_shard_moved_is_refused_unless_it_still_tiles(
    case: tuple[list[Shard], int, int, int], data: st.DataObject
) -> None:
    shards, num_rows, num_columns, world_size = case
    index = data.draw(st.integers(0, len(shards) - 1))
    row_start = data.draw(st.integers(0, num_rows))
    row_stop = data.draw(st.integers(row_start, num_rows))
    column_start = 4 * data.draw(st.integers(0, num_columns // 4))
    column_stop = 4 * data.draw(st.integers(column_start // 4, num_columns // 4))
    changed = list(shards)
    changed[index] = shard((row_start, row_stop), (column_start, column_stop), 0)
    is_exact = bool((cover_counts(changed, num_rows, num_columns) == 1).all())
    inner_cuts = row_cuts(changed)
    is_blocked = all(not any(s.rows.start < c < s.rows.stop for c in inner_cuts) for s in non_empty(changed))
    if is_exact and is_blocked:
        validate(changed, num_rows, num_columns, world_size, "user")
    else:
        with pytest.raises(ValueError, match="table 'user'"):
            validate(changed, num_rows, num_columns, world_size, "user")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([shard((0, 5), (0, 8), 0)], r"gap: no shard holds rows 5:6, columns 0:8"),
        ([], r"gap: no shard holds rows 0:6, columns 0:8"),
        (
            [shard((0, 6), (0, 8), 0), shard((2, 3), (4, 8), 1)],
            r"overlap: rows 0:6, columns 0:8 on rank 0 and rows 2:3, columns 4:8 on rank 1 both hold rows 2:3",
        ),
        ([shard((0, 7), (0, 8), 0)], r"rows 0:7, columns 0:8 on rank 0 reaches outside the table, which has rows 0:6"),
        ([shard((0, 6), (0, 12), 0)], r"which has columns 0:8"),
        ([shard((0, 6), (0, 8), 4)], r"on rank 4, but the ranks are 0 to 3"),
        ([shard((0, 6), (0, 8), -1)], r"on rank -1, but the ranks are 0 to 3"),
        ([shard((0, 6), (0, 6), 0), shard((0, 6), (6, 8), 1)], r"column cut 6 is not a multiple of 4.*Cut at 4 or 8"),
        (
            [shard((0, 6), (0, 4), 0), shard((0, 2), (4, 8), 1), shard((2, 6), (4, 8), 1)],
            r"rows 0:6, columns 0:4 on rank 0 spans several row blocks: another column block is cut at row 2",
        ),
        ([shard((0, 6), (0, 8), 0, table="item")], r"table 'user': got a shard of table 'item'"),
        ([Shard("user", range(0, 6, 2), range(8), 0)], r"has rows in steps of 2"),
    ],
)
def test_what_is_wrong_is_said_in_words(shards: list[Shard], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(shards, 6, 8, 4, "user")


def test_an_uncut_table_may_have_any_width() -> None:
    validate([shard((0, 6), (0, 7), 0)], 6, 7, 1, "user")


def test_errors_about_many_shards_have_no_picture() -> None:
    shards = row_wise_shards("user", 100, 8, range(100))
    with pytest.raises(ValueError, match="gap") as few:
        validate(shards[:20], 100, 8, 100, "user")
    with pytest.raises(ValueError, match="gap") as many:
        validate(shards[:99], 100, 8, 100, "user")
    assert "+----" in str(few.value)
    assert "+----" not in str(many.value)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_every_named_type_tiles(num_rows: int, num_hosts: int, local_size: int, width: int) -> None:
    world_size = num_hosts * local_size
    num_columns = 4 * width * world_size
    host = num_hosts - 1
    for shards in (
        table_wise_shards("user", num_rows, num_columns, world_size - 1),
        row_wise_shards("user", num_rows, num_columns, range(world_size)),
        column_wise_shards("user", num_rows, num_columns, range(world_size)),
        table_row_wise_shards("user", num_rows, num_columns, host, local_size),
        table_column_wise_shards("user", num_rows, num_columns, host, local_size),
        grid_shards("user", num_rows, num_columns, range(num_hosts), local_size),
    ):
        validate(shards, num_rows, num_columns, world_size, "user")
    assert data_parallel_shards("user", num_rows, num_columns) == []


def test_row_wise_blocks_are_rounded_up_and_the_last_ranks_may_get_nothing() -> None:
    assert [s.num_rows for s in row_wise_shards("user", 10, 4, range(4))] == [3, 3, 3, 1]
    few = row_wise_shards("user", 9, 4, range(8))
    assert [s.num_rows for s in few] == [2, 2, 2, 2, 1, 0, 0, 0]
    assert [s.rank for s in non_empty(few)] == [0, 1, 2, 3, 4]
    assert row_cuts(few) == [0, 2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: row_wise_shards("user", 10, 4, []), "needs at least one rank"),
        (lambda: row_wise_shards("user", 10, 4, [0, 1], [4, 5]), "add up to the table's 10 rows"),
        (lambda: row_wise_shards("user", 10, 4, [0, 1], [10]), "expected 2 sizes"),
        (lambda: column_wise_shards("user", 10, 16, [0, 1, 2]), "16 columns cannot be divided evenly into 3 blocks"),
        (lambda: column_wise_shards("user", 10, 16, [0, 1], [8, 4]), "add up to the table's 16 columns"),
        (lambda: column_wise_shards("user", 10, 16, []), "into 0 blocks"),
    ],
)
def test_constructors_refuse_sizes_that_do_not_fit(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_cuts_and_picture_of_a_grid() -> None:
    shards = grid_shards("user", 6, 8, [0, 1], local_size=2)
    assert row_cuts(shards) == [0, 3, 6]
    assert column_cuts(shards) == [0, 4, 8]
    assert draw(shards) == (
        "user: 6 rows x 8 columns\n"
        "     0:4      4:8\n"
        "    +--------+--------+\n"
        "0:3 | rank 0 | rank 2 |\n"
        "    +--------+--------+\n"
        "3:6 | rank 1 | rank 3 |\n"
        "    +--------+--------+"
    )
    assert draw([]) == "(no shards)"


def test_picture_shows_gaps_and_overlaps() -> None:
    picture = draw([shard((0, 2), (0, 8), 0), shard((0, 2), (4, 8), 1)], num_rows=3, num_columns=8)
    lines = picture.splitlines()
    assert lines[3] == "0:2 | rank 0   | rank 0+1 |"
    assert lines[5] == "2:3 | --       | --       |"


@given(tilings(), st.data())
@settings(max_examples=60, deadline=None)
def test_intersections_move_every_cell_exactly_once(
    case: tuple[list[Shard], int, int, int], data: st.DataObject
) -> None:
    old_shards, num_rows, num_columns, _ = case
    ranks = data.draw(st.integers(1, 4))
    new_shards = row_wise_shards("user", num_rows, num_columns, range(ranks))
    pieces = intersections(old_shards, new_shards)
    assert (cover_counts([Shard("user", p.rows, p.columns, 0) for p in pieces], num_rows, num_columns) == 1).all()
    for piece in pieces:
        for whole in (piece.old, piece.new):
            assert whole.rows.start <= piece.rows.start < piece.rows.stop <= whole.rows.stop
            assert whole.columns.start <= piece.columns.start < piece.columns.stop <= whole.columns.stop


def test_shards_of_different_tables_share_nothing() -> None:
    assert shard((0, 4), (0, 4), 0).intersect(shard((0, 4), (0, 4), 0, table="item")) is None


@given(tilings(), st.sampled_from(["cpu", "cuda"]))
@settings(max_examples=30, deadline=None)
def test_the_public_form_and_back(case: tuple[list[Shard], int, int, int], device_type: str) -> None:
    shards, num_rows, num_columns, _ = case
    sharding = parameter_sharding_from(shards, CUSTOM, "fused", device_type, local_size=2)
    assert shards_from("user", sharding, num_rows, num_columns) == shards
    assert sharding.ranks == [s.rank for s in shards]
    placements = [str(m.placement) for m in sharding.sharding_spec.shards]
    devices = [p.split("/")[1] for p in placements]
    assert devices == [device_type if device_type == "cpu" else f"cuda:{s.rank % 2}" for s in shards]


def test_data_parallel_has_no_rectangles_and_other_types_need_them() -> None:
    assert shards_from("user", ParameterSharding("data_parallel", "dense"), 6, 8) == []
    with pytest.raises(ValueError, match=r"'user'.*'row_wise' but has no sharding_spec"):
        shards_from("user", ParameterSharding("row_wise", "dense"), 6, 8)
    with pytest.raises(ValueError, match="diagonal"):
        parameter_sharding_from([shard((0, 6), (0, 8), 0)], "diagonal", "dense")
    with pytest.raises(ValueError, match="2 device types"):
        parameter_sharding_from([shard((0, 6), (0, 8), 0)], ShardingType.TABLE_WISE, "dense", ["cpu", "cpu"])


def figure_of(*args, **kwargs):
    pytest.importorskip("plotly")
    from recsys_edu.viz.tiling import tiling_figure

    return tiling_figure(*args, **kwargs)


def test_a_figure_has_a_rectangle_and_a_label_for_every_shard_that_holds_something() -> None:
    shards = row_wise_shards("user", 9, 16, range(8))  # ranks 5, 6 and 7 hold nothing
    figure = figure_of({"user": shards}, world_size=8)
    assert [(min(t.y), max(t.y)) for t in figure.data] == [(s.rows.start, s.rows.stop) for s in non_empty(shards)]
    labels = [a.text for a in figure.layout.annotations]
    assert labels == ["user", *(f"rank {rank}" for rank in range(5))]
    assert "ranks 5, 6, 7: nothing" in figure.layout.title.text
    assert list(figure.layout.yaxis.range) == [9, 0]  # rows run downwards


def test_a_figure_puts_tables_side_by_side_and_says_what_is_replicated() -> None:
    tables = {name: table_wise_shards(name, 6, 8, rank) for rank, name in enumerate("abcde")}
    figure = figure_of(tables, replicated={"f": (3, 4)}, world_size=5)
    assert len(figure.data) == 6
    assert len({t.fillcolor for t in figure.data}) == 6
    assert "a copy on<br>each of 5 ranks" in [a.text for a in figure.layout.annotations]
    assert len({t.xaxis for t in figure.data}) == 6


def test_a_figure_of_many_thin_shards_leaves_the_labels_out() -> None:
    figure = figure_of({"user": row_wise_shards("user", 1024, 16, range(64))}, world_size=128)
    assert len(figure.data) == 64
    assert [a.text for a in figure.layout.annotations] == ["user"]
    assert len(figure.layout.yaxis.tickvals) <= 9 and figure.layout.yaxis.tickvals[-1] == 1024
    assert "64 of 128 ranks hold nothing" in figure.layout.title.text
    with pytest.raises(ValueError, match="nothing to draw"):
        figure_of({})
