"""One HTML report of executed notebooks: an index with times and recorded numbers, and a page for each.

Nothing on a page is fetched: plotly.js is embedded once in each page that has figures, and the parts of
nbconvert's template that load from elsewhere (MathJax, widgets, mermaid) are switched off.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from recsys_edu.notebook.runner import NotebookRun, read_executed

PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
REMOTE_SCRIPT = re.compile(r"<script[^>]*\ssrc=\"https?://[^>]*>\s*</script>")
REMOTE_MODULE = re.compile(r"<script type=\"module\">(?:(?!</script>).)*?https?://.*?</script>", re.DOTALL)
WIDGET_NOTE = (
    '<em style="opacity:.7">In a live notebook there are sliders here; the picture shows where they start.</em>'
)

INDEX_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2.5em auto;padding:0 1em}
table{border-collapse:collapse;width:100%} th,td{text-align:left;padding:.45em .8em;border-bottom:1px solid #8884;
vertical-align:top} td.n{text-align:right;font-variant-numeric:tabular-nums}
.ok{color:#009E73;font-weight:600}.bad{color:#D55E00;font-weight:600} pre{white-space:pre-wrap;font-size:13px;
border-left:4px solid #D55E00;padding-left:1em;overflow:auto}
"""


def write_report(runs: Sequence[NotebookRun], out: Path, profile: str) -> Path:
    """Write `out/index.html` and one page per run beside its executed notebook; the path of the index."""
    for run in runs:
        if (notebook := read_executed(run.executed)) is not None:
            _write(run.executed.with_suffix(".html"), page_html(notebook, run.name))
    index = out / "index.html"
    _write(index, index_html(runs, out, profile))
    return index


def page_html(notebook: Any, title: str) -> str:
    """An executed notebook as a page that needs no network."""
    from nbconvert import HTMLExporter

    notebook.cells = [cell for cell in notebook.cells if "setup" not in cell.metadata.get("tags", ())]
    has_figures = still_figures(notebook)
    exporter = HTMLExporter(embed_images=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    exporter.widget_renderer_url = exporter.mermaid_js_url = ""
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    page = REMOTE_MODULE.sub("", REMOTE_SCRIPT.sub("", page))
    if has_figures:
        from plotly.offline import get_plotlyjs

        page = page.replace("</head>", f"<script>{get_plotlyjs()}</script></head>", 1)
    return page


def still_figures(notebook: Any) -> bool:
    """Make an executed notebook readable without a kernel, in place; whether it has plotly figures.

    Figures become HTML that draws them (the page has to load plotly.js), sliders a note that they were there, and the
    pieces of printed text are joined.
    """
    has_figures = False
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.metadata["collapsed"] = True
        if cell.cell_type == "code":
            cell.outputs = tidy_streams(cell.outputs)
        for index, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            if PLOTLY_MIME in data:
                has_figures = True
                figure = figure_html(data[PLOTLY_MIME], f"figure-{cell.id}-{index}")
                output["data"] = nbformat.from_dict({"text/html": figure})
            elif WIDGET_MIME in data:
                output["data"] = nbformat.from_dict({"text/html": WIDGET_NOTE})
    notebook.metadata.pop("widgets", None)  # their state, of no use without a kernel
    return has_figures


def tidy_streams(outputs: Sequence[Any]) -> list[Any]:
    """Join the pieces of each printed text, and keep of a progress bar what it showed last.

    A progress bar is written to stderr, which pages colour as an error; it is none.
    """
    tidy: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            tidy.append(output)
        elif tidy and tidy[-1].output_type == "stream" and tidy[-1].name == output.name:
            tidy[-1].text += output.text
        else:
            tidy.append(nbformat.from_dict(dict(output)))
    for output in tidy:
        if output.output_type == "stream" and "\r" in output.text:
            lines = output.text.replace("\r\n", "\n").split("\n")
            output.text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
            output.name = "stdout"
    return tidy


def figure_html(figure: Any, element: str) -> str:
    """A plotly figure (its JSON form) as a placeholder and the call that draws it."""
    height = figure.get("layout", {}).get("height", 450)
    arguments = ", ".join(
        json.dumps(part).replace("</", "<\\/")
        for part in (figure["data"], figure["layout"], {"responsive": True, "displaylogo": False})
    )
    title = figure["layout"].get("title") or ""
    text = re.sub(r"<[^>]+>", " ", title.get("text") or "" if isinstance(title, dict) else title)
    label = html.escape(" ".join(text.split()) or "figure", quote=True)
    return (
        f'<div id="{element}" role="img" aria-label="{label}" style="height:{height}px;width:100%"></div>'
        f'<script>Plotly.newPlot("{element}", {arguments});</script>'
    )


def index_html(runs: Sequence[NotebookRun], out: Path, profile: str) -> str:
    """The report's first page: one row per notebook, failures in full below."""
    rows, failures = [], []
    for run in runs:
        page = run.executed.with_suffix(".html")
        link = html.escape(run.name)
        if page.exists():
            link = f'<a href="{html.escape(os.path.relpath(page, out))}">{link}</a>'
        verdict = '<span class="ok">ran</span>' if run.error is None else '<span class="bad">failed</span>'
        numbers = "<br>".join(f"{html.escape(name)} = {format_value(value)}" for name, value in run.records.items())
        rows.append(f'<tr><td>{link}</td><td>{verdict}</td><td class="n">{run.seconds:.1f}</td><td>{numbers}</td></tr>')
        if run.error is not None:
            failures.append(f"<h2>{html.escape(run.name)}</h2><pre>{html.escape(run.error)}</pre>")
    failed = sum(run.error is not None for run in runs)
    total = f"{len(runs)} notebooks, {failed} failed, {sum(run.seconds for run in runs):.0f} s of notebook time"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>recsys_edu: executed notebooks</title><style>{INDEX_STYLE}</style>"
        f"<h1>Executed notebooks</h1><p>Profile: <code>{html.escape(profile)}</code>. {total}.</p>"
        "<table><tr><th>notebook</th><th>outcome</th><th>seconds</th><th>recorded numbers</th></tr>"
        f"{''.join(rows)}</table>{''.join(failures)}</html>"
    )


def records_table(runs: Sequence[NotebookRun]) -> str:
    """The recorded numbers as a plain-text table."""
    rows = [(run.name, name, format_value(value)) for run in runs for name, value in run.records.items()]
    if not rows:
        return "(no recorded numbers)"
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def format_value(value: Any) -> str:
    """A recorded value for people: six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
