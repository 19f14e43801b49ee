"""Sliders over a drawing, with a picture that stays useful when nobody is there to drag.

`ipywidgets.interact` leaves nothing behind in an exported page. Here the drawing is an ordinary output of
the cell, made with the starting values; the sliders beside it only *replace* it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

PLOTLY_MIME = "application/vnd.plotly.v1+json"
BLANK = '<div style="min-height:12em"></div>'


def explore(draw: Callable[..., Any], /, **controls: Any) -> None:
    """Show `draw(**starting values)`, and sliders that redraw it where a kernel is running.

        explore(padding_figure, batch_size=(1, 64, 8), alpha=(1.1, 3.0, 1.5))

    A control is `(low, high, start)` for a slider (whole numbers give a whole-number slider), or a list of
    choices of which the first is the start. `draw` returns anything a notebook can display.

    Raises:
        ValueError: a control of another form, or a start outside its range.
    """
    starts = {name: _start(name, control) for name, control in controls.items()}
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        draw(**starts)
        return
    if get_ipython() is None:
        draw(**starts)
        return
    sliders = _sliders(controls)
    if sliders:
        import ipywidgets

        layout = ipywidgets.Layout(display="flex", flex_flow="row wrap")
        display(ipywidgets.Box(list(sliders.values()), layout=layout))
    replace = show_replaceable(draw(**starts))

    def redraw(_change: Mapping[str, Any]) -> None:
        replace(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(redraw, names="value")


def show_replaceable(drawn: Any) -> Callable[[Any], None]:
    """Display something in a notebook; calling what this returns puts something else in its place.

    A plotly figure shows itself when it is displayed and knows nothing of places, so its data is displayed instead.
    JupyterLab's renderer of that data draws once; output of another kind in between makes a new one.
    """
    from IPython.display import display

    def displayed(thing: Any) -> dict[str, Any]:
        if not hasattr(thing, "to_plotly_json"):
            return {"obj": thing}
        bundle = {PLOTLY_MIME: json.loads(thing.to_json()), "text/plain": "a figure of plotly"}
        return {"obj": bundle, "raw": True}

    first = displayed(drawn)
    place = display(first.pop("obj"), display_id=True, **first)

    def replace(thing: Any) -> None:
        place.update({"text/html": BLANK, "text/plain": ""}, raw=True)
        place.update(**displayed(thing))

    return replace


def _start(name: str, control: Any) -> Any:
    if isinstance(control, list) and control:
        return control[0]
    if isinstance(control, tuple) and len(control) == 3:
        low, high, start = control
        if not low <= start <= high:
            raise ValueError(f"explore({name}={control}): the start {start} lies outside {low} to {high}")
        return start
    raise ValueError(f"explore({name}={control!r}): expected (low, high, start) or a list of choices")


def _sliders(controls: Mapping[str, Any]) -> dict[str, Any]:
    """One widget per control, or none at all where ipywidgets is not installed."""
    try:
        import ipywidgets
    except ImportError:
        return {}
    common = {"style": {"description_width": "initial"}, "layout": ipywidgets.Layout(width="24em")}
    sliders = {}
    for name, control in controls.items():
        label = name.replace("_", " ")
        if isinstance(control, list):
            sliders[name] = ipywidgets.Dropdown(options=control, value=control[0], description=label, **common)
            continue
        low, high, start = control
        whole = all(isinstance(value, int) for value in control)
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = max(1, (high - low) // 50) if whole else (high - low) / 50
        sliders[name] = kind(
            value=start, min=low, max=high, step=step, description=label, continuous_update=False, **common
        )
    return sliders
