"""Notebook 15's first picture in a real browser: dragging memory to its end plans anew, and says what would help."""

from __future__ import annotations

import re

import nbformat
import pytest
from lab_server import ROOT, free_port, lab_command, run_cells, serve, wait_for_kernel, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(500)]


def cells_of_the_picture() -> list[str]:
    """The imports and the `explore` call, as they stand in the notebook."""
    notebook = nbformat.read(ROOT / "notebooks" / "15_the_planner.ipynb", as_version=4)
    wanted = [cell.source for cell in notebook.cells if re.search(r"import explore\b|^explore\(replan", cell.source)]
    assert len(wanted) == 2
    return wanted


def drag(page, slider: int, end: float) -> None:
    """Move the handle of a slider, counted from the top, to a share of its track."""
    track = page.locator(".jp-CodeCell .noUi-target").nth(slider).bounding_box()
    page.locator(".jp-CodeCell .noUi-handle").nth(slider).hover()
    page.mouse.down()
    page.mouse.move(track["x"] + end * track["width"], track["y"] + track["height"] / 2, steps=5)
    page.mouse.up()


def test_sliders_plan_anew(open_page, expect, picture, tmp_path) -> None:
    folder = tmp_path / "notebooks"
    write_notebook(folder / "picture.ipynb", cells_of_the_picture())
    port = free_port()
    with serve(lab_command(port), folder, port, tmp_path / "lab.log") as address:
        page, seen = open_page()
        page.goto(f"{address}/lab/tree/picture.ipynb")
        wait_for_kernel(page)
        run_cells(page, expect, 2)
        title = page.locator(".js-plotly-plot .gtitle").first
        expect(title).to_contain_text("0.561 ms on the busiest rank")

        drag(page, slider=0, end=0.0)  # GPU memory
        output = page.locator(".jp-Notebook .jp-CodeCell").nth(1)
        expect(output).to_contain_text("no plan fits", timeout=60_000)
        expect(output).to_contain_text("24 ranks instead of 16 (3 hosts of 8)")
        picture(page, "planner_refuses")

        drag(page, slider=1, end=1.0)  # host memory
        expect(page.locator(".js-plotly-plot .gtitle").first).to_contain_text("1 in host memory", timeout=60_000)
        picture(page, "planner_uses_host_memory")
    assert not seen.errors and not seen.elsewhere
