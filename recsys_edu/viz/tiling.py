"""Tilings as rectangles: which rank holds which rows and columns of each table, to scale, coloured by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recsys_edu.distributed.sharding.tiling import Shard, non_empty
from recsys_edu.viz.theme import FAINT, PAPER, colour, styled, text_on

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_TABLES_PER_LINE = 4
COPIES = FAINT  # the colour of a table that belongs to no one rank
NO_GRID = {"showgrid": False, "zeroline": False}


def tiling_figure(
    tables: Mapping[str, Sequence[Shard]],
    *,
    replicated: Mapping[str, tuple[int, int]] | None = None,
    world_size: int | None = None,
    title: str = "Who holds what",
    height: int | None = None,
) -> Figure:
    """Every table as the rectangles its shards cut it into, side by side; rows run downwards as in a matrix.

        tiling_figure({"user, row-wise": row_wise_shards("user", 10, 16, ranks=range(4))})

    Args:
        tables: title of a panel to the shards of its table. Tilings with gaps or overlaps are drawn as they are.
        replicated: title of a panel to (rows, columns) of a table that every rank has a copy of.
        world_size: how many ranks there are; with it the caption names those that hold nothing.
        height: pixels; by default 330 per line of panels.

    Hover over a rectangle for its numbers. Ranks share colours from the ninth on; their numbers stand inside.

    Raises:
        ValueError: nothing to draw.
    """
    from plotly.subplots import make_subplots

    panels = {name: [_of_shard(shard) for shard in non_empty(shards)] for name, shards in tables.items()}
    panels |= {name: [_of_copies(*shape, world_size)] for name, shape in (replicated or {}).items()}
    if not panels:
        raise ValueError("nothing to draw: give at least one table's shards, or one replicated table")
    num_across = min(len(panels), MOST_TABLES_PER_LINE)
    num_lines = math.ceil(len(panels) / num_across)
    figure = make_subplots(
        rows=num_lines,
        cols=num_across,
        subplot_titles=list(panels),
        horizontal_spacing=0.24 / max(num_across, 2),
        vertical_spacing=0.3 / max(num_lines, 2),
    )
    caption = _idle_caption(tables, replicated, world_size)
    styled(figure, title + caption, height=height or 100 + 320 * num_lines, legend=False)
    figure.update_layout(margin={"t": 110 if caption else 90})
    for index, blocks in enumerate(panels.values()):
        where = {"row": index // num_across + 1, "col": index % num_across + 1}
        row_cuts = sorted({cut for b in blocks for cut in (b.rows.start, b.rows.stop)}) or [0, 1]
        column_cuts = sorted({cut for b in blocks for cut in (b.columns.start, b.columns.stop)}) or [0, 1]
        figure.update_yaxes(
            range=[row_cuts[-1], 0],
            title_text="row" if where["col"] == 1 else None,
            tickvals=_few(row_cuts),
            **NO_GRID,
            **where,
        )
        figure.update_xaxes(
            range=[0, column_cuts[-1]], title_text="column", tickvals=_few(column_cuts), **NO_GRID, **where
        )
        for block in blocks:
            # Of the panel's height and of the figure's width: is there room for a line of text, and for "rank 3"?
            height_share = len(block.rows) / row_cuts[-1]
            width_share = len(block.columns) / column_cuts[-1] / num_across
            _add(
                figure, block, where, has_room=height_share > 0.06 and width_share > 0.02, is_narrow=width_share < 0.08
            )
    return figure


@dataclass(frozen=True)
class Block:
    """One rectangle to draw: `text` inside it, or `short` where it is narrow, and `hover` beside the pointer."""

    rows: range
    columns: range
    fill: str
    text: str
    short: str
    hover: str


def _of_shard(shard: Shard) -> Block:
    size = shard.num_rows * shard.num_columns
    hover = (
        f"rank {shard.rank}<br>rows {shard.rows.start}:{shard.rows.stop}<br>columns {shard.columns.start}:"
        f"{shard.columns.stop}<br>{size:,} numbers, {4 * size:,} bytes in float32"
    )
    return Block(shard.rows, shard.columns, colour(shard.rank), f"rank {shard.rank}", str(shard.rank), hover)


def _of_copies(num_rows: int, num_columns: int, world_size: int | None) -> Block:
    ranks = "every rank" if world_size is None else f"each of {world_size} ranks"
    hover = f"a copy on {ranks}<br>{num_rows * num_columns:,} numbers each"
    return Block(range(num_rows), range(num_columns), COPIES, f"a copy on<br>{ranks}", "copies", hover)


def _add(figure: Figure, block: Block, where: dict[str, int], *, has_room: bool, is_narrow: bool) -> None:
    """A filled outline, so that hovering anywhere inside finds it, and its label where one fits."""
    import plotly.graph_objects as go

    top, bottom, left, right = block.rows.start, block.rows.stop, block.columns.start, block.columns.stop
    outline = go.Scatter(
        x=[left, right, right, left, left],
        y=[top, top, bottom, bottom, top],
        mode="lines",
        fill="toself",
        fillcolor=block.fill,
        line={"color": PAPER, "width": 2 if has_room else 0.5},
        hoveron="fills",
        hoverinfo="text",
        text=block.hover,
        showlegend=False,
    )
    figure.add_trace(outline, **where)
    if has_room:
        figure.add_annotation(
            x=(left + right) / 2,
            y=(top + bottom) / 2,
            text=block.short if is_narrow else block.text,
            showarrow=False,
            font={"color": text_on(block.fill), "size": 13},
            **where,
        )


def _few(cuts: list[int]) -> list[int]:
    """At most nine tick marks: every cut where there are few, else evenly chosen ones, the last included."""
    step = math.ceil((len(cuts) - 1) / 8) or 1
    return [*cuts[:-1:step], cuts[-1]]


def _idle_caption(
    tables: Mapping[str, Sequence[Shard]], replicated: Mapping[str, tuple[int, int]] | None, world_size: int | None
) -> str:
    busy = {shard.rank for shards in tables.values() for shard in non_empty(shards)}
    if world_size is None or replicated:
        return ""
    idle = [rank for rank in range(world_size) if rank not in busy]
    if not idle:
        return ""
    if len(idle) > 8:
        return f"<br>{len(idle)} of {world_size} ranks hold nothing"
    return f"<br>{'rank' if len(idle) == 1 else 'ranks'} {', '.join(map(str, idle))}: nothing"
