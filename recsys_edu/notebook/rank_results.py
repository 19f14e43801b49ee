"""What a cell printed and returned on every rank, as text and as HTML, and the error of a cell that failed."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recsys_edu.viz.theme import VERMILLION, colour

ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class RankOutput:
    """One rank's part of a cell. `failure` is None where it ended well; `seconds` is its time on the rank."""

    rank: int
    host: int
    stdout: str = ""
    stderr: str = ""
    shown: Sequence[Mapping[str, Any]] = ()  # MIME bundles: what it displayed, then the last expression's value
    failure: str | None = None  # one line
    traceback: str = ""  # with ANSI colours
    finished: bool = True

    def text(self) -> str:
        """Everything as lines, each with the rank before it."""
        parts = [self.stdout, self.stderr, *(str(bundle.get("text/plain", "")) for bundle in self.shown)]
        if self.failure:
            parts.append(self.failure)
        lines = [line for part in parts if part for line in part.rstrip("\n").split("\n")]
        return "\n".join(f"[rank {self.rank}] {ANSI_ESCAPE.sub('', line)}" for line in lines)

    def html(self) -> str:
        """A row with the rank at the left, in the rank's colour."""
        body = _preformatted(self.stdout) + _preformatted(self.stderr, VERMILLION)
        body += "".join(_bundle_html(bundle) for bundle in self.shown)
        if self.failure:
            body += _preformatted(self.failure, VERMILLION)
        if not self.finished:
            body += '<span style="opacity:.6">running ...</span>'
        return (
            f'<div style="display:flex;margin:3px 0"><div style="flex:none;width:6.5em;padding:2px .6em;'
            f'border-left:5px solid {colour(self.rank)};font-weight:600">rank {self.rank}'
            f'<div style="font-weight:400;font-size:85%;opacity:.7">host {self.host}</div></div>'
            f'<div style="flex:1;min-width:0;overflow-x:auto;padding:2px .6em">{body}</div></div>'
        )


@dataclass(frozen=True)
class CellOutput:
    """All ranks' outputs of one cell: that of the rank `first` (if any), then other failed ranks', then the rest."""

    ranks: Sequence[RankOutput]
    first: int | None = None

    def _in_order(self) -> list[RankOutput]:
        return sorted(self.ranks, key=lambda output: (output.rank != self.first, output.failure is None, output.rank))

    def __repr__(self) -> str:
        return "\n".join(text for output in self._in_order() if (text := output.text()))

    def _repr_html_(self) -> str:
        silent = [output for output in self._in_order() if output.finished and not output.text()]
        if len(silent) == len(self.ranks):
            return ""
        return "".join(output.html() for output in self._in_order() if output not in silent)

    def is_empty(self) -> bool:
        return not repr(self)


@dataclass(eq=False)
class RankError(RuntimeError):
    """A cell failed, hung or was interrupted. `rank` is the rank to look at first, None where there is no such one."""

    message: str
    rank: int | None
    outputs: Sequence[RankOutput] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.message

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of this process's stack, which only leads into the cluster's code."""
        first = [output.traceback for output in self.outputs if output.rank == self.rank and output.traceback]
        return [*first, f"\x1b[31mRankError\x1b[0m: {self.message}"]


def _preformatted(text: str, ink: str = "inherit") -> str:
    if not text.strip():
        return ""
    clean = html.escape(ANSI_ESCAPE.sub("", text.rstrip("\n")))
    style = "margin:0;background:transparent;white-space:pre-wrap;font-family:monospace"
    return f'<pre style="{style};color:{ink}">{clean}</pre>'


def _bundle_html(bundle: Mapping[str, Any]) -> str:
    if "text/html" in bundle:
        return f"<div>{bundle['text/html']}</div>"
    if "image/svg+xml" in bundle:
        return f"<div>{bundle['image/svg+xml']}</div>"
    if "image/png" in bundle:
        data = bundle["image/png"]
        encoded = base64.b64encode(data).decode() if isinstance(data, bytes) else data
        return f'<img alt="" src="data:image/png;base64,{encoded}">'
    return _preformatted(str(bundle.get("text/plain", "")))
