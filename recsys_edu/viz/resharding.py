"""Resharding as a picture: the old tiling, the pieces that both tilings cut, the new tiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.tiling import Shard, intersections, non_empty
from recsys_edu.viz.theme import FAINT, INK, PAPER, colour, styled, text_on

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def moved_bytes(old: Sequence[Shard], new: Sequence[Shard], world_size: int, bytes_per_number: int = 4) -> Tensor:
    """`[W, W]`: what each rank (line) holds of what each rank (column) will hold; the diagonal stays where it is.

    >>> old = [Shard("user", range(0, 10), range(0, 4), 0)]
    >>> new = [Shard("user", range(0, 5), range(0, 4), 0), Shard("user", range(5, 10), range(0, 4), 1)]
    >>> moved_bytes(old, new, world_size=2).tolist()
    [[80, 80], [0, 0]]
    """
    bytes_WW = torch.zeros(world_size, world_size, dtype=torch.int64)
    for piece in intersections(old, new):
        bytes_WW[piece.old.rank, piece.new.rank] += len(piece.rows) * len(piece.columns) * bytes_per_number
    return bytes_WW


def pieces_figure(
    old: Sequence[Shard], new: Sequence[Shard], title: str = "Which rectangle goes where", height: int = 420
) -> Figure:
    """Three panels: who has what, the pieces with their journeys ("2 → 1"), who shall have what.

    In the middle a piece has the colour of the rank it comes from; those that stay on their rank are pale.

    Raises:
        ValueError: tilings without shards.
    """
    from plotly.subplots import make_subplots

    old, new = non_empty(old), non_empty(new)
    if not old or not new:
        raise ValueError("nothing to draw: give the shards of the old and of the new tiling")
    pieces = intersections(old, new)
    num_moved = sum(piece.old.rank != piece.new.rank for piece in pieces)
    names = ["before", f"{len(pieces)} pieces, {num_moved} travel", "after"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=names, horizontal_spacing=0.08)
    styled(figure, title, height=height, legend=False)
    figure.update_layout(margin={"t": 95})
    for panel, shards in ((1, old), (3, new)):
        for shard in shards:
            _rectangle(figure, panel, shard.rows, shard.columns, colour(shard.rank), f"rank {shard.rank}")
    for piece in pieces:
        stays = piece.old.rank == piece.new.rank
        text = "stays" if stays else f"{piece.old.rank} → {piece.new.rank}"
        _rectangle(figure, 2, piece.rows, piece.columns, FAINT if stays else colour(piece.old.rank), text)
    num_rows, num_columns = (max(getattr(s, side).stop for s in old) for side in ("rows", "columns"))
    row_cuts = sorted({cut for piece in pieces for cut in (piece.rows.start, piece.rows.stop)})
    column_cuts = sorted({cut for piece in pieces for cut in (piece.columns.start, piece.columns.stop)})
    figure.update_yaxes(range=[num_rows, 0], tickvals=row_cuts, showgrid=False, zeroline=False)
    figure.update_xaxes(range=[0, num_columns], tickvals=column_cuts, showgrid=False, title_text="column")
    figure.update_yaxes(title_text="row", col=1)
    return figure


def _rectangle(figure: Figure, panel: int, rows: range, columns: range, fill: str, text: str) -> None:
    import plotly.graph_objects as go

    outline = go.Scatter(
        x=[columns.start, columns.stop, columns.stop, columns.start, columns.start],
        y=[rows.start, rows.start, rows.stop, rows.stop, rows.start],
        mode="lines",
        fill="toself",
        fillcolor=fill,
        line={"color": PAPER, "width": 2},
        hoveron="fills",
        hoverinfo="text",
        text=f"{text}<br>rows {rows.start}:{rows.stop}<br>columns {columns.start}:{columns.stop}",
    )
    figure.add_trace(outline, row=1, col=panel)
    figure.add_annotation(
        x=(columns.start + columns.stop) / 2,
        y=(rows.start + rows.stop) / 2,
        text=text,
        showarrow=False,
        font={"color": INK if fill == FAINT else text_on(fill), "size": 13},
        row=1,
        col=panel,
    )
