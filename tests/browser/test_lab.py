"""JupyterLab as a student uses it, in a real browser: run cells, move a slider, answer wrongly, ask, answer rightly."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import urllib.request

import nbformat
import pytest
from lab_server import ROOT, free_port, lab_command, lab_options, run_cells, serve, wait_for_kernel, write_notebook
from nbformat.v4 import new_code_cell

pytestmark = [pytest.mark.browser, pytest.mark.timeout(500)]
STEPS = [
    "from recsys_edu.notebook import check, exercise, explore, hint\nimport torch, plotly.graph_objects as go",
    "explore(lambda bars: go.Figure(go.Bar(y=list(range(bars)))).update_layout(title=f'{bars} bars'), bars=(1, 9, 4))",
    "check('01.1', lambda lengths: lengths)",
    "hint('01.1')",
    "check('01.1', lambda lengths: torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))",
]


def test_a_students_hour(open_page, expect, picture, tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder / "steps.ipynb", STEPS)
    port = free_port()
    with serve(lab_command(port), folder, port, tmp_path / "lab.log") as address:
        page, seen = open_page()
        page.goto(f"{address}/lab/tree/steps.ipynb")
        wait_for_kernel(page)
        run_cells(page, expect, len(STEPS))

        title = page.locator(".js-plotly-plot .gtitle").first
        expect(title).to_have_text("4 bars")
        handle = page.locator(".jp-CodeCell .noUi-handle").first
        track = page.locator(".jp-CodeCell .noUi-target").first.bounding_box()
        handle.hover()
        page.mouse.down()
        page.mouse.move(track["x"] + track["width"], track["y"] + track["height"] / 2, steps=5)
        page.mouse.up()
        expect(page.locator(".widget-readout").first).to_have_text("9")
        expect(page.locator(".js-plotly-plot .gtitle").first).to_have_text("9 bars", timeout=30_000)

        outputs = page.locator(".jp-Notebook .jp-CodeCell")
        expect(outputs.nth(2)).to_contain_text("Exercise 01.1: not yet")
        expect(outputs.nth(3)).to_contain_text("hint 1 of")
        expect(outputs.nth(4)).to_contain_text("Exercise 01.1: correct")
        picture(page, "students_hour")
    assert not seen.errors and not seen.elsewhere


def command_of_make_lab(port):
    """What `make lab` runs at last, with this interpreter in place of the one it would set up."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    options = shlex.join(lab_options(port))
    command = ["make", "--no-print-directory", "-n", "lab", f"ARGS={options}"]  # a make may be running this test
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    interpreter, *rest = shlex.split(ran.stdout.strip().splitlines()[-1])
    assert interpreter.endswith("python") and rest[:3] == ["-m", "jupyter", "lab"]
    return [sys.executable, *rest]


def test_make_lab_opens_notebook_00_with_the_right_kernel_and_all_its_cells_run(open_page, expect, picture, tmp_path):
    folder = tmp_path / "course"
    (folder / "notebooks").mkdir(parents=True)
    notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = 'profile = "ci"'
    notebook.cells.append(new_code_cell("import sys\nprint('kernel:', sys.executable)"))
    opened = folder / "notebooks" / "00_start_here.ipynb"
    nbformat.write(notebook, opened)
    # a kernel of that name which somebody registered for another Python
    other = tmp_path / "data" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    other.joinpath("kernel.json").write_text(json.dumps(spec | {"display_name": "another Python"}))

    port = free_port()
    with serve(command_of_make_lab(port), folder, port, tmp_path / "lab.log") as address:
        page, seen = open_page()
        page.goto(address)
        wait_for_kernel(page)
        assert page.url.endswith("/lab/tree/00_start_here.ipynb")
        expect(page.locator(".jp-Notebook h1").first).to_contain_text("00 Start here")
        (session,) = json.load(urllib.request.urlopen(f"{address}/api/sessions"))
        assert session["path"] == "00_start_here.ipynb" and session["kernel"]["name"] == "python3"
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(page.locator(".jp-Notebook .jp-CodeCell").last).to_contain_text(
            f"kernel: {sys.executable}", timeout=300_000
        )
        assert page.locator(".jp-Notebook .js-plotly-plot .gtitle").count() >= 2
        assert page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]').count() == 0
        page.locator(".jp-Notebook .js-plotly-plot").first.scroll_into_view_if_needed()
        picture(page, "make_lab")
        page.keyboard.press("Control+s")
        expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    executed = [cell for cell in nbformat.read(opened, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in executed)
    assert not [output for cell in executed for output in cell.outputs if output.output_type == "error"]
    assert not seen.errors and not seen.elsewhere
