"""Small pieces of HTML that look right on a light and on a dark page, and how to show them.

Colours come from the page's own text colour (`currentColor`) with one accent per meaning, so nothing
here needs to know whether the reader's theme is light or dark.
"""

from __future__ import annotations

import html
import re

ACCENTS = {"info": "#0072B2", "good": "#009E73", "bad": "#D55E00", "idle": "#999999"}


def card(title: str, body: str = "", accent: str = "info") -> str:
    """A titled box; `title` and `body` are HTML.

    Raises:
        ValueError: `accent` is none of info, good, bad, idle.
    """
    if accent not in ACCENTS:
        raise ValueError(f"accent={accent!r}: expected one of {', '.join(ACCENTS)}")
    inner = f'<div style="margin-top:.35em">{body}</div>' if body else ""
    return (
        f'<div style="border-left:4px solid {ACCENTS[accent]};background:{ACCENTS[accent]}14;'
        f'padding:.55em .9em;border-radius:3px;max-width:62em"><strong>{title}</strong>{inner}</div>'
    )


def inline_code(text: str) -> str:
    """Escape `text` for HTML and set what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def preformatted(text: str) -> str:
    """`text` as it is, spaces and line breaks kept."""
    return f'<pre style="margin:.3em 0;background:transparent;white-space:pre-wrap">{html.escape(text)}</pre>'


def show(bundle: dict[str, object]) -> None:
    """Display a MIME bundle in a notebook; print its `text/plain` elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(bundle["text/plain"])
        return
    if get_ipython() is None:
        print(bundle["text/plain"])
    else:
        display(bundle, raw=True)
