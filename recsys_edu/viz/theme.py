"""One look for every figure: the Okabe-Ito colours, titles, axis labels with units, and paper of its own.

The eight colours can be told apart with any of the common kinds of colour blindness (Okabe and Ito,
"Color Universal Design", 2008). Figures bring a white background with dark text, so that they read the
same on a light and on a dark page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILLION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
BLACK = "#000000"
OKABE_ITO = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, YELLOW, BLACK)

PAPER = "#FFFFFF"
INK = "#222222"
FAINT = "#E4E4E4"
MUTED = "#8A8A8A"


def colour(index: int) -> str:
    """The colour of series number `index`; after eight they repeat."""
    return OKABE_ITO[index % len(OKABE_ITO)]


def text_on(background: str) -> str:
    """Black or white, whichever reads better on a colour given as "#RRGGBB"."""
    red, green, blue = (int(background[start : start + 2], 16) for start in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def styled(
    figure: Figure,
    title: str,
    x: str | None = None,
    y: str | None = None,
    height: int = 420,
    legend: bool | None = None,
) -> Figure:
    """Give `figure` the shared look, its title and its axis labels (units belong in them); returns it.

    `title` may hold a second line after `<br>`, which is set smaller.
    """
    first, _, rest = title.partition("<br>")
    heading = f"<b>{first}</b>" + (f'<br><span style="font-size:13px">{rest}</span>' if rest else "")
    axes = {"gridcolor": FAINT, "linecolor": MUTED, "zerolinecolor": FAINT, "ticks": "outside", "tickcolor": MUTED}
    figure.update_layout(
        title={"text": heading, "x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 17}},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        font={"color": INK, "size": 13, "family": "system-ui, -apple-system, 'Segoe UI', sans-serif"},
        colorway=list(OKABE_ITO),
        margin={"l": 70, "r": 30, "t": 80 if rest else 60, "b": 60},
        height=height,
        hoverlabel={"bgcolor": PAPER, "font": {"color": INK}},
    )
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    if x is not None:
        figure.update_xaxes(title_text=x)
    if y is not None:
        figure.update_yaxes(title_text=y)
    if legend is not None:
        figure.update_layout(showlegend=legend)
    return figure
