"""Who sends whom how many bytes: recorded from a sharded module's exchanges, drawn rank by rank, hosts framed.

    answers, traffic = record_traffic(modules, lambda: forward_all(modules, batches))
    traffic_figure({"row-wise": traffic})

Nothing here is estimated: every exchange logs what it sends, and these functions only add up.

Suffix: W ranks; `bytes_WW[i, j]` is what rank i sent rank j.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from recsys_edu.distributed.exchange import TransferRecord
from recsys_edu.viz.theme import BLUE, FAINT, INK, MUTED, ORANGE, SKY, VERMILLION, colour, styled, text_on

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

T = TypeVar("T")

SCALE = ((0.0, "#FFFFFF"), (0.35, "#A6CEE6"), (0.7, "#3B8FC4"), (1.0, "#00456E"))
STAYS = "stays on its rank"
INSIDE = "between ranks of one host"
BETWEEN = "between hosts"
KINDS = {STAYS: FAINT, INSIDE: SKY, BETWEEN: VERMILLION}


@dataclass(frozen=True)
class Traffic:
    """What W ranks sent each other, exchange by exchange.

    >>> step = torch.tensor([[4, 8], [0, 4]])
    >>> traffic = Traffic({"pooled embeddings": step}, local_size=1)
    >>> traffic.stays_bytes, traffic.inside_bytes, traffic.between_bytes
    (8, 0, 8)

    Args:
        steps: label of an exchange to its `[W, W]` bytes, in the order in which they happened.
        local_size: ranks per host.
    """

    steps: Mapping[str, Tensor]
    local_size: int

    @property
    def bytes_WW(self) -> Tensor:
        """All exchanges together."""
        return torch.stack(list(self.steps.values())).sum(0)

    @property
    def world_size(self) -> int:
        return len(next(iter(self.steps.values())))

    @property
    def stays_bytes(self) -> int:
        """What ranks "sent" to themselves: it goes through the same code but over no wire."""
        return int(self.bytes_WW.diagonal().sum())

    @property
    def inside_bytes(self) -> int:
        """Between different ranks of one host."""
        return int(self.bytes_WW[self._same_host()].sum()) - self.stays_bytes

    @property
    def between_bytes(self) -> int:
        """Between ranks of different hosts."""
        return int(self.bytes_WW[~self._same_host()].sum())

    @property
    def moved_bytes(self) -> int:
        """Everything that left its rank."""
        return self.inside_bytes + self.between_bytes

    def step(self, *labels: str) -> Traffic:
        """These exchanges alone.

        Raises:
            KeyError: no exchange of that label; the message lists those there are.
        """
        missing = [label for label in labels if label not in self.steps]
        if missing:
            raise KeyError(f"no exchange {missing[0]!r}; there are {', '.join(map(repr, self.steps))}")
        return Traffic({label: self.steps[label] for label in labels}, self.local_size)

    def _same_host(self) -> Tensor:
        host = torch.arange(self.world_size) // self.local_size
        return host[:, None] == host[None, :]


def traffic_from_logs(logs: Sequence[Sequence[TransferRecord]], local_size: int | None = None) -> Traffic:
    """The traffic of a world from each rank's `exchange.log`, in rank order; exchanges of one label are added.

    Args:
        local_size: ranks per host; default: all on one.

    Raises:
        ValueError: a log is missing, or hosts of that size do not divide the ranks.
    """
    world_size = len(logs)
    local_size = local_size or world_size
    if world_size % local_size:
        raise ValueError(f"{world_size} ranks cannot be divided into hosts of {local_size}")
    steps: dict[str, Tensor] = {}
    for rank, log in enumerate(logs):
        if log is None:
            raise ValueError(f"rank {rank} has no log: set `exchange.log = []` before the forward")
        for record in log:
            matrix = steps.setdefault(record.label, torch.zeros(world_size, world_size, dtype=torch.int64))
            matrix[rank] += torch.tensor(record.bytes_W)
    return Traffic(steps or {"nothing": torch.zeros(world_size, world_size, dtype=torch.int64)}, local_size)


def record_traffic(modules: Sequence[nn.Module], run: Callable[[], T]) -> tuple[T, Traffic]:
    """Call `run` while every simulated rank's exchange keeps a log; what it returned, and the traffic.

    Args:
        modules: the sharded collections that `simulate` made, one per rank.
    """
    exchanges = [module.shards.exchange for module in modules]
    layout = modules[0].shards.layout
    before = [exchange.log for exchange in exchanges]
    for exchange in exchanges:
        exchange.log = []
    try:
        result = run()
        return result, traffic_from_logs([exchange.log for exchange in exchanges], layout.local_size)
    finally:
        for exchange, log in zip(exchanges, before):
            exchange.log = log


def bytes_text(num_bytes: float) -> str:
    """A number of bytes for people.

    >>> bytes_text(96), bytes_text(10_240), bytes_text(3_500_000)
    ('96 B', '10.0 KiB', '3.3 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def traffic_figure(
    worlds: Traffic | Mapping[str, Traffic], title: str = "Who sends whom how much", height: int | None = None
) -> Figure:
    """One heat map per traffic, on a common scale: source rank downwards, destination across, a frame per host.

    The diagonal is grey: what a rank keeps crosses no wire.
    """
    from plotly.subplots import make_subplots

    worlds = {"": worlds} if isinstance(worlds, Traffic) else dict(worlds)
    across = min(len(worlds), 4)
    lines = -(-len(worlds) // across)
    figure = make_subplots(
        rows=lines,
        cols=across,
        subplot_titles=[_panel_title(name, traffic) for name, traffic in worlds.items()],
        horizontal_spacing=0.22 / max(across, 2),
        vertical_spacing=0.5 / max(lines, 2),
    )
    styled(figure, f"{title}<br>{_legend_text(worlds.values())}", height=height or 160 + 330 * lines)
    figure.update_layout(margin={"t": 150}, width=520 if len(worlds) == 1 else None)
    figure.update_layout(title={"yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 16}})
    figure.update_annotations(font_size=13)
    largest = max(int(_off_diagonal(traffic).max()) for traffic in worlds.values())
    for index, traffic in enumerate(worlds.values()):
        where = {"row": index // across + 1, "col": index % across + 1}
        add_traffic(figure, traffic, where, largest, y_title=where["col"] == 1)
    return figure


def add_traffic(
    figure: Figure,
    traffic: Traffic,
    where: dict[str, int],
    largest: int | None = None,
    y_title: bool = True,
    compact: bool = False,
) -> None:
    """Draw one heat map into the panel `where` of a figure; `largest` is what the darkest colour stands for.

    `compact` writes 16K instead of 16,384, as more than four ranks always do.
    """
    import plotly.graph_objects as go

    moved_WW, ranks = _off_diagonal(traffic), list(range(traffic.world_size))
    size = {2: 14, 4: 12}.get(len(ranks), 10 if len(ranks) <= 6 else 8)
    compact = compact or len(ranks) > 4
    all_WW = traffic.bytes_WW.tolist()
    text = [[_cell_text(number, compact) for number in row] for row in all_WW]
    hover = [
        [f"rank {i} to rank {j}: {all_WW[i][j]:,} bytes{' (stays)' if i == j else ''}" for j in ranks] for i in ranks
    ]
    heat = go.Heatmap(
        z=[[None if i == j else int(moved_WW[i, j]) for j in ranks] for i in ranks],
        x=ranks,
        y=ranks,
        zmin=0,
        zmax=max(largest or 0, int(moved_WW.max()), 1),
        colorscale=[list(stop) for stop in SCALE],
        showscale=False,
        text=[["" if i == j else text[i][j] for j in ranks] for i in ranks],
        texttemplate="%{text}",
        textfont={"size": size},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure.add_trace(heat, **where)
    for rank in ranks:
        box = {"x0": rank - 0.5, "x1": rank + 0.5, "y0": rank - 0.5, "y1": rank + 0.5}
        figure.add_shape(type="rect", fillcolor=FAINT, line_width=0, layer="below", **box, **where)
        figure.add_annotation(
            x=rank, y=rank, text=text[rank][rank], showarrow=False, font={"size": size, "color": MUTED}, **where
        )
    for first in range(0, len(ranks), traffic.local_size):
        low, high = first - 0.5, first + traffic.local_size - 0.5
        figure.add_shape(
            type="rect", x0=low, x1=high, y0=low, y1=high, line={"color": INK, "width": 2.5}, fillcolor="rgba(0,0,0,0)",
            **where,
        )  # fmt: skip
    edges = [-0.55, len(ranks) - 0.45]
    plain = {"showgrid": False, "zeroline": False, "tickvals": ranks}
    figure.update_xaxes(title_text="to rank", range=edges, constrain="domain", **plain, **where)
    figure.update_yaxes(title_text="from rank" if y_title else None, range=edges[::-1], **plain, **where)


def all_to_all_figure(num_ranks: int = 4) -> Figure:
    """The pieces of an all-to-all before and after: one line per rank, pieces coloured by their source."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.16,
        subplot_titles=("before: made by this rank", "after: sent to this rank"),
    )
    styled(figure, "All-to-all: every rank has a piece for every rank<br>2→0 is what rank 2 has for rank 0", height=380)
    for panel, other in ((1, "piece for rank"), (2, "piece from rank")):
        where = {"row": 1, "col": panel}
        for holder in range(num_ranks):
            for slot in range(num_ranks):
                source, destination = (holder, slot) if panel == 1 else (slot, holder)
                box = {"x0": slot - 0.46, "x1": slot + 0.46, "y0": holder - 0.46, "y1": holder + 0.46}
                figure.add_shape(type="rect", fillcolor=colour(source), line_width=0, **box, **where)
                ink = {"color": text_on(colour(source)), "size": 14}
                text = f"{source}→{destination}"
                figure.add_annotation(x=slot, y=holder, text=text, showarrow=False, font=ink, **where)
        plain = {"showgrid": False, "zeroline": False, "tickvals": list(range(num_ranks))}
        figure.update_xaxes(title_text=other, range=[-0.6, num_ranks - 0.4], **plain, **where)
        figure.update_yaxes(title_text="rank that holds it", range=[num_ranks - 0.4, -0.6], **plain, **where)
    figure.update_layout(margin_t=110)
    return figure


def split_figure(worlds: Mapping[str, Traffic], title: str = "Where the bytes go") -> Figure:
    """One bar per traffic: bytes that stay, that cross inside a host, and that cross between hosts."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = list(worlds)
    unit, size = _unit(max(int(traffic.bytes_WW.sum()) for traffic in worlds.values()))
    parts = {
        STAYS: [traffic.stays_bytes for traffic in worlds.values()],
        INSIDE: [traffic.inside_bytes for traffic in worlds.values()],
        BETWEEN: [traffic.between_bytes for traffic in worlds.values()],
    }
    for kind, numbers in parts.items():
        if any(numbers):
            figure.add_bar(
                y=names,
                x=[number / size for number in numbers],
                name=kind,
                orientation="h",
                marker_color=KINDS[kind],
                text=[bytes_text(number) if number else "" for number in numbers],
                textposition="inside",
                insidetextanchor="middle",
            )
    styled(figure, f"{title}<br>all ranks together, measured", f"{unit} sent", height=170 + 44 * len(names))
    figure.update_layout(barmode="stack", legend={"orientation": "h", "y": -0.34, "yanchor": "top"}, margin_b=90)
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    return figure


def step_figure(traffic: Traffic, title: str = "One exchange at a time") -> Figure:
    """The bytes of each exchange of one traffic, in the order in which they happened."""
    steps = {label: traffic.step(label) for label in traffic.steps}
    return split_figure(steps, title)


def memory_figure(parts_W: Sequence[Mapping[str, int]], title: str = "What each rank holds") -> Figure:
    """Stacked bars, one per rank; `parts_W[r]` is the bytes of rank r by what they are."""
    import plotly.graph_objects as go

    figure = go.Figure()
    add_memory(figure, parts_W)
    unit, _ = _unit(_largest_sum(parts_W))
    styled(figure, title, "rank", f"{unit} on the rank", height=340)
    figure.update_xaxes(tickvals=list(range(len(parts_W))))
    return figure


def add_memory(figure: Figure, parts_W: Sequence[Mapping[str, int]], where: dict[str, int] | None = None) -> None:
    """Draw the bars of `memory_figure` into the panel `where` of a figure."""
    unit, size = _unit(_largest_sum(parts_W))
    names = list(dict.fromkeys(name for parts in parts_W for name in parts))
    for name, fill in zip(names, (BLUE, ORANGE, SKY, VERMILLION)):
        figure.add_bar(
            x=list(range(len(parts_W))),
            y=[parts.get(name, 0) / size for parts in parts_W],
            name=name,
            marker_color=fill,
            hovertemplate=f"rank %{{x}}, {name}: %{{y:.3g}} {unit}<extra></extra>",
            **(where or {}),
        )
    figure.update_layout(barmode="stack")


def rank_bars(series: Mapping[str, Sequence[float]], title: str, y: str) -> Figure:
    """One group of bars per rank, one bar per name of `series`; the dotted line is the average of the first."""
    import plotly.graph_objects as go

    figure = go.Figure()
    patterns = ("", "/", ".", "x")
    for index, (name, numbers) in enumerate(series.items()):
        ranks = [f"rank {rank}" for rank in range(len(numbers))]
        marker = {"color": colour(index), "pattern": {"shape": patterns[index % 4], "fgcolor": "#FFFFFF", "size": 6}}
        figure.add_bar(x=ranks, y=list(numbers), name=name, marker=marker)
    first = list(next(iter(series.values())))
    average = sum(first) / len(first)
    figure.add_hline(y=average, line={"dash": "dot", "color": INK}, annotation_text=f"even: {average:,.0f}")
    styled(figure, title, None, y, height=360, legend=len(series) > 1)
    figure.update_layout(barmode="group")
    return figure


def crossover_figure(curves: Mapping[str, Sequence[float]], x: Sequence[float], title: str, x_title: str) -> Figure:
    """Bytes of each sharding over one quantity; dashes tell the lines apart as well as colours."""
    import plotly.graph_objects as go

    figure = go.Figure()
    unit, size = _unit(max(max(numbers) for numbers in curves.values()))
    for index, (name, numbers) in enumerate(curves.items()):
        line = {"color": colour(index), "width": 3, "dash": ("solid", "dash", "dot", "dashdot")[index % 4]}
        figure.add_scatter(x=list(x), y=[number / size for number in numbers], name=name, mode="lines", line=line)
    styled(figure, title, x_title, f"{unit} sent, all ranks", height=400, legend=True)
    figure.update_yaxes(rangemode="tozero")
    return figure


def memory_of(module: nn.Module) -> dict[str, int]:
    """Bytes that one rank of a sharded collection holds: weights, and optimizer state where there is any."""
    held = [kernel.memory_bytes() for kernel in module.shards.lookup.kernels]
    parts = {"weights": sum(part["weights"] for part in held)}
    state = sum(part["optimizer_state"] for part in held)
    return parts | ({"optimizer state": state} if state else {})


def _off_diagonal(traffic: Traffic) -> Tensor:
    bytes_WW = traffic.bytes_WW
    return bytes_WW - bytes_WW.diagonal().diag()


def _panel_title(name: str, traffic: Traffic) -> str:
    if traffic.local_size == traffic.world_size:
        numbers = f"{bytes_text(traffic.inside_bytes)} between ranks"
    else:
        numbers = f"{bytes_text(traffic.between_bytes)} between hosts,<br>{bytes_text(traffic.inside_bytes)} inside"
    return f"<b>{name}</b><br>{numbers}" if name else numbers


def _legend_text(worlds: Any) -> str:
    hosts = max(traffic.world_size // traffic.local_size for traffic in worlds)
    frame = "; a frame is one host" if hosts > 1 else ""
    return f"bytes; the grey diagonal stays on its rank{frame}"


def _cell_text(number: int, compact: bool) -> str:
    if not number:
        return "0"
    if not compact or number < 1000:
        return f"{number:,}" if number < 100_000 else bytes_text(number)
    amount, unit = bytes_text(number).replace(",", "").split()
    digits = f"{float(amount):.0f}" if float(amount) >= 10 else amount.removesuffix(".0")
    return digits + unit[0].replace("B", "")


def _unit(num_bytes: float) -> tuple[str, int]:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= 2 * size:
            return unit, size
    return "bytes", 1


def _largest_sum(parts_W: Sequence[Mapping[str, int]]) -> int:
    return max((sum(parts.values()) for parts in parts_W), default=0)
