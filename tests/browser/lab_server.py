"""A Jupyter server for a test, with settings of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def serve(command: list[str], folder: Path, port: int, log: Path) -> Iterator[str]:
    """Run a Jupyter server in `folder` until the block ends; its address."""
    settings = log.parent / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # every cell is in the page, on the screen or not
    settings.joinpath("tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    places = {"JUPYTER_DATA_DIR": "data", "JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    places["JUPYTERLAB_WORKSPACES_DIR"] = "workspaces"
    environment = os.environ | {name: str(log.parent / place) for name, place in places.items()}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "start_new_session": True}
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, **options)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=5):
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.3)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lab_options(port: int) -> list[str]:
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--LabApp.news_url=None"]
    return options + (["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])


def write_notebook(path: Path, sources: list[str]) -> None:
    """A notebook of these code cells."""
    path.parent.mkdir(exist_ok=True)
    notebook = new_notebook(cells=[new_code_cell(text) for text in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def lab_command(port: int) -> list[str]:
    return [sys.executable, "-m", "jupyter", "lab", *lab_options(port)]


def wait_for_kernel(page: Any) -> None:
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    # keys that come before the kernel does are lost
    page.get_by_text(re.compile(r"\| Idle")).first.wait_for()


def run_cells(page: Any, expect: Any, count: int, timeout_ms: int = 90_000) -> None:
    """Shift+Enter in each of the first cells, one after the other: a wrong answer stops "run all", as it should."""
    for cell in range(count):
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(cell).click()
        page.keyboard.press("Shift+Enter")
        prompt = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").nth(cell)
        expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=timeout_ms)
