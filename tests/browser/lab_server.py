"""A Jupyter server for a test, with settings of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

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
