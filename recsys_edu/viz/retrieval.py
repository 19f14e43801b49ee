"""Pictures of retrieval: a map of films, recall curves beside baselines, and a widget that answers queries.

film_map(vectors, ...)        item vectors in the plane, coloured by genre, titles on hover
recall_curves(curves)         recall over the length of the list, one line per recommender
speed_and_recall(rows)        indexes: milliseconds beside recall
recommender_widget(r)         pick a user or rate a few films; candidates, list, reasons
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recsys_edu.viz.theme import BLACK, BLUE, GREEN, MUTED, ORANGE, PURPLE, SKY, VERMILLION, colour, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from recsys_edu.retrieval.recommender import Recommendation, TwoStageRecommender

# the first of these that a film has colours it: from telling to vague
GENRE_COLOURS = {
    "Animation": PURPLE, "Children's": PURPLE, "Horror": BLACK, "Sci-Fi": BLUE, "Action": ORANGE, "Romance": VERMILLION,
    "Comedy": GREEN, "Drama": SKY,
}  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "pentagon")


def film_map(
    vectors_ID: Tensor, titles: Sequence[str], genres: Sequence[Sequence[str]], counts: Sequence[int], least: int = 30
) -> Figure:
    """The films with at least `least` ratings on the two directions in which their unit vectors differ most.

    Marker areas grow with the number of ratings. Two dimensions show only a part; the title says how much.
    """
    import plotly.graph_objects as go
    import torch

    chosen = [film for film, count in enumerate(counts) if count >= least]
    unit_ID = torch.nn.functional.normalize(vectors_ID[chosen], dim=1)
    centred_ID = unit_ID - unit_ID.mean(0)
    left_ID, sizes_D, _ = torch.linalg.svd(centred_ID, full_matrices=False)
    place_I2 = (left_ID * sizes_D)[:, :2].tolist()
    share = float(sizes_D[:2].square().sum() / sizes_D.square().sum())
    groups: dict[str, list[int]] = {}
    for row, film in enumerate(chosen):
        groups.setdefault(_group(genres[film]), []).append(row)
    figure = go.Figure()
    names = [*dict.fromkeys(_merged(name) for name in GENRE_COLOURS), "other"]
    for number, name in enumerate(names):
        rows = groups.get(name, [])
        if not rows:
            continue
        first = next((value for key, value in GENRE_COLOURS.items() if _merged(key) == name), MUTED)
        size = [5 + 0.8 * counts[chosen[row]] ** 0.5 for row in rows]
        marker = {"color": first, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": size, "opacity": 0.7}
        text = [
            f"{titles[chosen[row]]}<br>{', '.join(genres[chosen[row]])}<br>{counts[chosen[row]]} ratings"
            for row in rows
        ]
        x, y = ([place_I2[row][axis] for row in rows] for axis in (0, 1))
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, marker=marker, text=text, hovertemplate="%{text}<extra></extra>"
        )
    title = (
        f"A map of {len(chosen)} films<br>learned from who watched what, never from genres;"
        f" two directions hold {share:.0%} of the differences"
    )
    styled(figure, title, "first principal direction", "second principal direction", height=620)
    figure.update_layout(legend={"itemsizing": "constant"})
    return figure


def recall_curves(curves: Mapping[str, Mapping[int, float]], title: str, y: str = "recall@k") -> Figure:
    """One line per recommender: k -> share found. The first is drawn thick."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (name, points) in enumerate(curves.items()):
        line = {
            "color": colour(number),
            "width": 4 if number == 0 else 2,
            "dash": ("solid", "dash", "dot", "dashdot")[number % 4],
        }
        figure.add_scatter(
            x=list(points), y=list(points.values()), name=name, mode="lines+markers", line=line,
            marker={"symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 8},
            hovertemplate="k = %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    styled(figure, title, "k, films in the list", y)
    ticks = next(iter(curves.values()))
    figure.update_xaxes(type="log", tickvals=list(ticks), ticktext=[str(k) for k in ticks])
    figure.update_yaxes(rangemode="tozero")
    return figure


def speed_and_recall(rows: Sequence[Mapping[str, Any]], k: int) -> Figure:
    """Indexes as points; each row has `index`, `ms` and `recall`. Up and to the left is better."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, row in enumerate(rows):
        marker = {"size": 13, "color": colour(number), "symbol": _SYMBOLS[number % len(_SYMBOLS)]}
        figure.add_scatter(
            x=[row["ms"]], y=[row["recall"]], name=row["index"], mode="markers", marker=marker,
            hovertemplate="%{x:.3f} ms, recall %{y:.3f}<extra>" + str(row["index"]) + "</extra>",
        )  # fmt: skip
    styled(figure, "Looking at less: time and what it costs", "ms per query", f"recall@{k} against exact search")
    steps = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
    figure.update_xaxes(type="log", tickvals=steps, ticktext=[f"{step:g}" for step in steps])
    figure.update_yaxes(rangemode="tozero")
    return figure


def recommendation_html(
    recommender: TwoStageRecommender,
    who: str,
    found: Sequence[Recommendation],
    k: int = 10,
    before: Sequence[Recommendation] | None = None,
) -> str:
    """Two lists side by side: the candidates as the towers order them, and the final order with reasons.

    Films that were not in the first k of the list `before` are marked as new.
    """
    by_retrieval = sorted(found, key=lambda each: each.retrieval_rank)[:k]
    left = "".join(f"<li>{html.escape(recommender.title(each.item))}</li>" for each in by_retrieval)
    old = None if before is None else {each.item for each in before[:k]}
    rows = "".join(
        f"<tr><td>{place}</td>{_cell(_title(recommender, each, old))}<td>{each.stars:.2f}</td>"
        f"<td>{each.retrieval_rank}</td>{_cell(_reason(recommender, each))}</tr>"
        for place, each in enumerate(found[:k], 1)
    )
    return (
        f"<p><b>{html.escape(who)}</b></p>"
        "<div style='display:flex;gap:1.5em;flex-wrap:wrap;align-items:flex-start;font-size:0.92em'>"
        f"<div><b>Retrieved</b> (towers' order)<ol style='padding-left:2em;margin-top:0.4em'>{left}</ol></div>"
        f"<div><b>Ranked</b><table style='margin-top:0.4em'><tr><th></th>{_cell('film', 'th')}<th>predicted stars</th>"
        f"<th>candidate</th>{_cell('because you liked', 'th')}</tr>{rows}</table></div></div>"
    )


def _cell(text: str, tag: str = "td") -> str:
    return f"<{tag} style='text-align:left'>{text}</{tag}>"


def _title(recommender: TwoStageRecommender, each: Recommendation, old: set[int] | None) -> str:
    mark = " <b>(new)</b>" if old is not None and each.item not in old else ""
    return html.escape(recommender.title(each.item)) + mark


def recommender_widget(
    recommender: TwoStageRecommender, user: int = 41, ratings: Mapping[int, float] | None = None
) -> None:
    """Show the answer for `user` (a number) or for a stranger's `ratings`; where a kernel runs, with controls above.

    The table is an ordinary output of the cell, so it stays in an exported page; the controls replace it. After every
    rating the films that are new in the list are marked.
    """
    from IPython.display import HTML, display

    mine, last = dict(ratings or {}), []

    def answer(chosen: int) -> Any:
        who = f"User number {chosen}"
        if mine:
            who = "You rated " + ", ".join(f"{recommender.title(item)}: {stars:g}" for item, stars in mine.items())
        found = recommender.for_ratings(mine, 100) if mine else recommender.for_user(chosen, 100)
        before, last[:] = (list(last) or None) if mine else None, found
        return HTML(recommendation_html(recommender, who, found, before=before))

    try:
        import ipywidgets as widgets
    except ImportError:
        display(answer(user))
        return
    names = {"style": {"description_width": "initial"}}
    picker = widgets.BoundedIntText(
        user, 0, recommender.train.num_users - 1, description="user number", layout={"width": "170px"}, **names
    )
    text = widgets.Text(
        placeholder="part of a title",
        description="find a film",
        continuous_update=False,
        layout={"width": "280px"},
        **names,
    )
    films = widgets.Dropdown(options=recommender.find("", 10), layout={"width": "300px"})
    stars = widgets.IntSlider(5, min=1, max=5, description="stars", layout={"width": "220px"}, **names)
    rate, forget = widgets.Button(description="rate it"), widgets.Button(description="forget my ratings")
    display(widgets.VBox([widgets.HBox([picker, text, films]), widgets.HBox([stars, rate, forget])]))
    shown = display(answer(user), display_id=True)

    def found(_change: Any) -> None:
        films.options = recommender.find(text.value) or {"no such film": -1}

    def rated(_button: Any) -> None:
        if films.value is not None and films.value >= 0:
            mine[films.value] = float(stars.value)
            shown.update(answer(picker.value))

    def forgotten(_change: Any) -> None:
        mine.clear()
        shown.update(answer(picker.value))

    text.observe(found, names="value")
    picker.observe(forgotten, names="value")
    rate.on_click(rated)
    forget.on_click(forgotten)


def _reason(recommender: TwoStageRecommender, each: Recommendation) -> str:
    return "" if each.because is None else html.escape(recommender.title(each.because))


def _merged(genre: str) -> str:
    return "Children's, Animation" if genre in ("Children's", "Animation") else genre


def _group(genres: Sequence[str]) -> str:
    return next((_merged(name) for name in GENRE_COLOURS if name in genres), "other")
