"""Try a sharding and look at it: sliders over type and sizes, and a pad on which to draw a tiling of one's own.

    sharding_explorer()                    sliders: tiling, traffic and memory, redrawn together
    draw_your_own(picture)                 a text of rank digits becomes a plan, runs, and is compared with unsharded

Every picture is made by running the real engine on a world of simulated ranks in this process.

Suffix: W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from recsys_edu.distributed.sharding.tiling import COLUMN_ALIGNMENT, Shard, shards_from
from recsys_edu.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    custom,
    data_parallel,
    grid_shard,
    row_wise,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.notebook.explore import explore, show_replaceable
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.viz.theme import INK, VERMILLION, styled
from recsys_edu.viz.tiling import tiling_figure
from recsys_edu.viz.traffic import Traffic, add_memory, add_traffic, bytes_text, record_traffic

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TABLE = "user"
ROW_WISE, TABLE_WISE, COLUMN_WISE = "row-wise", "table-wise", "column-wise"
TABLE_ROW_WISE, TABLE_COLUMN_WISE, GRID = "table-row-wise", "table-column-wise", "grid"
DATA_PARALLEL, DRAWN = "data-parallel", "drawn"
TYPES = [ROW_WISE, TABLE_WISE, COLUMN_WISE, TABLE_ROW_WISE, TABLE_COLUMN_WISE, GRID, DATA_PARALLEL]
GAP = "."


@dataclass(frozen=True)
class Setting:
    """One table and the world it is cut for: `num_hosts` of equal size, `batch_size` bags per rank of `pooling` ids."""

    kind: str
    num_ranks: int
    num_hosts: int
    num_rows: int
    num_columns: int
    batch_size: int
    pooling: int

    @property
    def local_size(self) -> int:
        return self.num_ranks // self.num_hosts


@dataclass(frozen=True)
class Trial:
    """What came of running one setting: its rectangles, bytes sent, bytes held, and how far off the answer was."""

    setting: Setting
    shards: list[Shard]
    traffic: Traffic
    memory_W: list[dict[str, int]]
    largest_difference: float

    @property
    def agrees(self) -> bool:
        """Equal to the unsharded table up to the order of float32 additions."""
        return self.largest_difference <= 1e-4


def run_trial(setting: Setting, shards: Sequence[Shard] | None = None) -> Trial:
    """Shard a table as `setting` says (or as `shards` say), run one forward on simulated ranks, compare with unsharded.

    Raises:
        ValueError: the setting cannot be cut so, or `shards` do not tile the table; the message says what is wrong.
    """
    generator = custom(shards) if shards is not None else _generator(setting)
    config = EmbeddingBagConfig(
        name=TABLE, num_embeddings=setting.num_rows, embedding_dim=setting.num_columns, feature_names=[TABLE]
    )
    collection = EmbeddingBagCollection(tables=[config])
    plan = construct_module_sharding_plan(
        collection,
        {TABLE: generator},
        local_size=setting.local_size,
        world_size=setting.num_ranks,
        device_type="cpu",
    )
    modules = simulate(collection, plan, setting.num_ranks, local_size=setting.local_size)
    batches = [_batch(setting, seed) for seed in range(setting.num_ranks)]
    with torch.no_grad():
        answers, traffic = record_traffic(modules, lambda: forward_all(modules, batches))
        differences = [
            float((answer.values() - collection(batch).values()).abs().max()) for answer, batch in zip(answers, batches)
        ]
    tiles = shards_from(TABLE, plan[TABLE], setting.num_rows, setting.num_columns)
    memory_W = [_memory(setting, tiles, traffic, rank) for rank in range(setting.num_ranks)]
    # A data-parallel table sends nothing forward, and its traffic is that of one host or of several all the same.
    traffic = Traffic(traffic.steps, setting.local_size)
    return Trial(setting, tiles, traffic, memory_W, max(differences))


def trial_figure(trial: Trial) -> Figure:
    """Tiling, traffic matrix and memory of one trial, side by side."""
    from plotly.subplots import make_subplots

    setting, traffic = trial.setting, trial.traffic
    figure = make_subplots(
        rows=1,
        cols=3,
        column_widths=[0.3, 0.38, 0.32],
        horizontal_spacing=0.13,
        subplot_titles=("who holds what", "bytes sent (grey: stays)", "memory of each rank"),
    )
    hosts = f"{setting.num_hosts} {'host' if setting.num_hosts == 1 else 'hosts'}"
    crossing = f", {bytes_text(traffic.between_bytes)} between hosts" if setting.num_hosts > 1 else ""
    verdict = "equal to unsharded" if trial.agrees else f"DIFFERS from unsharded by {trial.largest_difference:.2g}"
    heaviest = max(sum(parts.values()) for parts in trial.memory_W)
    styled(
        figure,
        f"{setting.kind}: {setting.num_rows:,} x {setting.num_columns} on {setting.num_ranks} ranks, {hosts}<br>"
        f"{bytes_text(traffic.inside_bytes)} inside hosts{crossing}; heaviest rank {bytes_text(heaviest)}; {verdict}",
        height=430,
    )
    _add_tiling(figure, trial)
    add_traffic(figure, traffic, {"row": 1, "col": 2}, compact=True)
    add_memory(figure, trial.memory_W, {"row": 1, "col": 3})
    unit = next(u for u, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 0)) if heaviest >= 2 * size)
    figure.update_xaxes(title_text="rank", tickvals=list(range(setting.num_ranks)), row=1, col=3)
    figure.update_yaxes(title_text=f"{unit} on the rank", rangemode="tozero", row=1, col=3)
    figure.update_layout(
        margin={"t": 120, "b": 100}, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -0.24}
    )
    return figure


def explorer_figure(
    kind: str = ROW_WISE,
    ranks: int = 4,
    hosts: int = 2,
    rows: int = 1000,
    dim: int = 32,
    batch: int = 64,
    pooling: int = 8,
) -> Figure:
    """The picture behind the sliders; a setting that cannot be cut becomes a picture of the reason.

    `hosts` that do not divide the ranks are lowered to the next number that does.
    """
    hosts = next(count for count in range(min(hosts, ranks), 0, -1) if ranks % count == 0)
    setting = Setting(kind, ranks, hosts, rows, dim, batch, pooling)
    try:
        return trial_figure(run_trial(setting))
    except ValueError as problem:
        return message_figure(f"{kind} cannot cut {rows:,} x {dim} for {ranks} ranks", str(problem))


def sharding_explorer() -> None:
    """Sliders for type, ranks, hosts, rows, dim, batch per rank and ids per bag; redraws all three pictures at once."""
    explore(
        explorer_figure,
        kind=[GRID, *[kind for kind in TYPES if kind != GRID]],
        ranks=[4, 2, 8],
        hosts=[2, 1, 4],
        rows=(100, 20_000, 4000),
        dim=[32, 4, 8, 16, 64, 128],
        batch=(1, 512, 64),
        pooling=(0, 64, 8),
    )


def shards_from_drawing(picture: str, num_rows: int, num_columns: int, table: str = TABLE) -> list[Shard]:
    """The rectangles of a drawing: every character is a rank, every line an equal share of the rows.

    >>> for shard in shards_from_drawing("0011\\n2222", num_rows=10, num_columns=16): print(shard)
    rows 0:5, columns 0:8 on rank 0
    rows 0:5, columns 8:16 on rank 1
    rows 5:10, columns 0:16 on rank 2

    Equal lines that follow each other are one row block. `.` leaves a gap, so that you can see what `validate` says.
    Ranks above 9 are letters: a is 10.

    Raises:
        ValueError: lines of unequal length, a character that is no rank, or more characters than the table has parts.
    """
    lines = ["".join(line.split()) for line in picture.strip().splitlines() if line.strip()]
    if not lines:
        raise ValueError("an empty drawing: write one line of rank digits for each block of rows, such as 0011")
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise ValueError(
                f"line {number} ({line!r}) has {len(line)} characters, line 1 has {width}: make them equal"
            )
        wrong = [character for character in line if character != GAP and not character.isalnum()]
        if wrong:
            raise ValueError(f"line {number} has {wrong[0]!r}: expected ranks 0 to 9, a to z, or {GAP!r} for a gap")
    if len(lines) > num_rows or width * COLUMN_ALIGNMENT > num_columns:
        raise ValueError(
            f"the drawing has {len(lines)} lines of {width} characters; a table of {num_rows} rows x {num_columns} "
            f"columns can be cut into at most {num_rows} x {num_columns // COLUMN_ALIGNMENT} (columns come in "
            f"{COLUMN_ALIGNMENT}s)"
        )
    row_at = [line * num_rows // len(lines) for line in range(len(lines) + 1)]
    column_at = [character * num_columns // width for character in range(width + 1)]
    shards, first_line = [], 0
    for line, repeats in groupby(lines):
        last_line = first_line + len(list(repeats))
        rows = range(row_at[first_line], row_at[last_line])
        first = 0
        for rank, run in groupby(line):
            last = first + len(list(run))
            if rank != GAP:
                shards.append(Shard(table, rows, range(column_at[first], column_at[last]), int(rank, 36)))
            first = last
        first_line = last_line
    return shards


def drawing_figure(
    picture: str,
    ranks: int = 4,
    hosts: int = 2,
    rows: int = 1000,
    dim: int = 32,
    batch: int = 64,
    pooling: int = 8,
) -> Figure:
    """Run a drawn tiling on the engine and show it; a drawing that is no tiling becomes a picture of what is wrong."""
    setting = Setting(DRAWN, ranks, hosts, rows, dim, batch, pooling)
    try:
        return trial_figure(run_trial(setting, shards_from_drawing(picture, rows, dim)))
    except ValueError as problem:
        return message_figure("This drawing is not a tiling yet", str(problem))


def draw_your_own(picture: str, **sizes: Any) -> None:
    """A text field with `picture` in it, and the trial of whatever is drawn there; `sizes` as in `drawing_figure`.

    Where no kernel runs, the picture of the first drawing stays.
    """
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is None or get_ipython() is None:
        drawing_figure(picture, **sizes)
        return
    field = _text_field(picture)
    if field is not None:
        display(field)
    replace = show_replaceable(drawing_figure(picture, **sizes))
    if field is not None:
        field.observe(lambda change: replace(drawing_figure(change["new"], **sizes)), names="value")


def message_figure(title: str, message: str) -> Figure:
    """Words in the place of a picture, in the same frame, so that sliders keep their place on the page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    styled(figure, title, height=430)
    text, _, art = message.partition("\n")
    wrapped = "<br>".join(_wrapped(text, 100)) + ("<br><br>" + _fixed_width(art) if art else "")
    figure.add_annotation(
        x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="top", align="left", showarrow=False,
        text=wrapped, font={"size": 14, "color": INK}, bordercolor=VERMILLION, borderwidth=2, borderpad=10,
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _generator(setting: Setting) -> Any:
    hosts = list(range(setting.num_hosts))
    generators = {
        TABLE_WISE: lambda: table_wise(rank=setting.num_ranks - 1),
        ROW_WISE: row_wise,
        COLUMN_WISE: lambda: column_wise(ranks=list(range(setting.num_ranks))),
        TABLE_ROW_WISE: lambda: table_row_wise(host_index=hosts[-1]),
        TABLE_COLUMN_WISE: lambda: table_column_wise(host_index=hosts[-1]),
        GRID: lambda: grid_shard(host_indexes=hosts),
        DATA_PARALLEL: data_parallel,
    }
    if setting.kind not in generators:
        raise ValueError(f"sharding type {setting.kind!r}: expected one of {', '.join(generators)}")
    return generators[setting.kind]()


def _batch(setting: Setting, seed: int) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.full((setting.batch_size,), setting.pooling)
    values = torch.randint(0, setting.num_rows, (setting.batch_size * setting.pooling,), generator=random)
    return KeyedJaggedTensor.from_lengths_sync([TABLE], values, lengths)


def _memory(setting: Setting, shards: list[Shard], traffic: Traffic, rank: int) -> dict[str, int]:
    """Weights from the rectangles; ids and embeddings in flight are what the rank received."""
    if setting.kind == DATA_PARALLEL:
        weights = setting.num_rows * setting.num_columns * 4
    else:
        weights = sum(shard.num_rows * shard.num_columns * 4 for shard in shards if shard.rank == rank)
    inputs = sum(int(matrix[:, rank].sum()) for label, matrix in traffic.steps.items() if label in INPUT_STEPS)
    answers = sum(int(matrix[:, rank].sum()) for label, matrix in traffic.steps.items() if label not in INPUT_STEPS)
    return {"weights": weights, "ids received": inputs, "embeddings received": answers}


INPUT_STEPS = ("sizes", "lengths and ids", "weights")


def _add_tiling(figure: Figure, trial: Trial) -> None:
    setting, where = trial.setting, {"row": 1, "col": 1}
    if setting.kind == DATA_PARALLEL:
        shape = (setting.num_rows, setting.num_columns)
        alone = tiling_figure({}, replicated={TABLE: shape}, world_size=setting.num_ranks)
    else:
        alone = tiling_figure({TABLE: trial.shards}, world_size=setting.num_ranks)
    figure.add_traces(list(alone.data), rows=1, cols=1)
    for note in alone.layout.annotations:
        if note.xref == "x":
            figure.add_annotation(x=note.x, y=note.y, text=note.text, font=note.font, showarrow=False, **where)
    for update, axis in ((figure.update_xaxes, alone.layout.xaxis), (figure.update_yaxes, alone.layout.yaxis)):
        update(range=axis.range, tickvals=axis.tickvals, title_text=axis.title.text, showgrid=False, **where)


def _text_field(picture: str) -> Any:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets.Textarea(
        value=picture.strip(),
        rows=7,
        description="ranks",
        continuous_update=False,
        layout=ipywidgets.Layout(width="24em"),
    )


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def _fixed_width(art: str) -> str:
    lines = [line.replace(" ", "&nbsp;") for line in art.splitlines()]
    return f'<span style="font-family:monospace">{"<br>".join(lines)}</span>'
