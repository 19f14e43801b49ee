"""JupyterLab as a student uses it, in a real browser: run cells, move a slider, answer wrongly, ask, answer rightly."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
STEPS = [
    "from recsys_edu.notebook import check, exercise, explore, hint\nimport torch, plotly.graph_objects as go",
    "explore(lambda bars: go.Figure(go.Bar(y=list(range(bars)))).update_layout(title=f'{bars} bars'), bars=(1, 9, 4))",
    "check('01.1', lambda lengths: lengths)",
    "hint('01.1')",
    "check('01.1', lambda lengths: torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(400),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab over a folder with one notebook."""
    notebook = new_notebook(cells=[new_code_cell(text) for text in STEPS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "steps.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", f"--notebook-dir={tmp_path}"]
    command += ["--IdentityProvider.token=", "--allow-root", "--LabApp.collaborative=False"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and server.poll() is None:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5):
                    break
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/lab/tree/steps.ipynb"
        finally:
            server.terminate()
            server.wait(30)


def test_a_students_hour(lab, tmp_path):
    errors = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(lab)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        # keys that come before the kernel does are lost
        page.get_by_text(re.compile(r"\| Idle")).first.wait_for()

        for cell in range(len(STEPS)):  # Shift+Enter in each: a wrong answer stops "run all", as it should
            page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(cell).click()
            page.keyboard.press("Shift+Enter")
            prompt = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").nth(cell)
            playwright.expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=60_000)

        title = page.locator(".js-plotly-plot .gtitle").first
        playwright.expect(title).to_have_text("4 bars")
        handle = page.locator(".jp-CodeCell .noUi-handle").first
        track = page.locator(".jp-CodeCell .noUi-target").first.bounding_box()
        handle.hover()
        page.mouse.down()
        page.mouse.move(track["x"] + track["width"], track["y"] + track["height"] / 2, steps=5)
        page.mouse.up()
        playwright.expect(page.locator(".widget-readout").first).to_have_text("9")
        playwright.expect(page.locator(".js-plotly-plot .gtitle").first).to_have_text("9 bars", timeout=30_000)

        outputs = page.locator(".jp-Notebook .jp-CodeCell")
        playwright.expect(outputs.nth(2)).to_contain_text("Exercise 01.1: not yet")
        playwright.expect(outputs.nth(3)).to_contain_text("hint 1 of")
        playwright.expect(outputs.nth(4)).to_contain_text("Exercise 01.1: correct")
        page.screenshot(path=os.environ.get("RECSYS_EDU_SCREENSHOT", str(tmp_path / "lab.png")))
        browser.close()
    assert not errors
