"""Run notebooks from beginning to end, each in a process of its own, and say what came of them.

    python -m recsys_edu.notebook run                       every notebook, in the ci profile
    python -m recsys_edu.notebook run --profile course 03   one notebook, in the size of a course
    python -m recsys_edu.notebook run 02 -p batch_size 512  another value for a cell tagged "parameters"

The kernel is the interpreter that runs this, whatever kernels the machine has registered: a kernel spec in
a temporary folder says so. Executed notebooks and the HTML report go to `notebooks/out/`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from recsys_edu.notebook.record import read_records

GIB_PER_NOTEBOOK = 2.0
KERNEL_NAME = "python3"
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


MEASURING = ("01", "02")
"""How the names of notebooks begin whose recorded numbers are times or bandwidths."""


@dataclass(frozen=True)
class NotebookRun:
    """What came of one notebook: `error` is None where it ran to its end."""

    source: Path
    executed: Path
    seconds: float
    error: str | None = None
    records: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See `notebook_name`."""
        return notebook_name(self.source)


def notebook_name(path: Path) -> str:
    """A notebook's name; solutions are told apart by their folder."""
    return f"solutions/{path.stem}" if path.parent.name == "solutions" else path.stem


def notebooks_folder() -> Path:
    """The repository's `notebooks/`: below the working directory, or beside the package.

    Raises:
        FileNotFoundError: neither place has one.
    """
    candidates = [Path.cwd() / "notebooks", Path(__file__).resolve().parents[2] / "notebooks"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no notebooks here: looked in {' and '.join(map(str, candidates))}; run in the repository")


def find_notebooks(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The notebooks that `names` mean: paths, or beginnings of names ("02", "solutions/01").

    Without names: every notebook, not the solutions ("solutions" means those).

    Raises:
        FileNotFoundError: a name that means no notebook.
    """
    folder = folder or notebooks_folder()
    if not names:
        return sorted(folder.glob("[0-9]*.ipynb"))
    found: list[Path] = []
    for name in names:
        if name.endswith(".ipynb") and Path(name).is_file():
            matches = [Path(name).resolve()]
        elif name == "solutions":
            matches = sorted((folder / "solutions").glob("*.ipynb"))
        else:
            matches = sorted(folder.glob(f"{name.removesuffix('.ipynb')}*.ipynb"))
        if not matches:
            known = ", ".join(path.stem for path in sorted(folder.glob("*.ipynb")))
            raise FileNotFoundError(f"no notebook {name!r}: it is no file, and none of {known} begins so")
        found += [path for path in matches if path not in found]
    return found


def run_notebooks(
    notebooks: Sequence[Path],
    parameters: Mapping[str, Any],
    out: Path,
    *,
    timeout_s: float = 1800,
    jobs: int | None = None,
) -> list[NotebookRun]:
    """Execute the notebooks with papermill, several at once where memory and cores allow; results in the order given.

    Notebooks that measure speed (`MEASURING`) run afterwards, one at a time: beside others they would measure those.
    """
    jobs = min(len(notebooks) or 1, jobs or jobs_that_fit())
    out.mkdir(parents=True, exist_ok=True)
    alone = [path for path in notebooks if path.parent.name != "solutions" and path.name.startswith(MEASURING)]
    runs: dict[Path, NotebookRun] = {}
    for paths, at_once in (([path for path in notebooks if path not in alone], jobs), (alone, 1)):
        runs |= zip(paths, _run_side_by_side(paths, parameters, out, timeout_s, at_once))
    return [runs[path] for path in notebooks]


def _run_side_by_side(
    paths: Sequence[Path], parameters: Mapping[str, Any], out: Path, timeout_s: float, jobs: int
) -> list[NotebookRun]:
    with tempfile.TemporaryDirectory(prefix="recsys_edu-kernel-") as kernel_home:
        environment = kernel_environment(Path(kernel_home), jobs)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return list(pool.map(lambda path: run_one(path, parameters, out, timeout_s, environment), paths))


def run_one(
    source: Path, parameters: Mapping[str, Any], out: Path, timeout_s: float, environment: Mapping[str, str]
) -> NotebookRun:
    """Execute one notebook in a process of its own; after `timeout_s` seconds it is stopped and reported."""
    executed = out / ("solutions" if source.parent.name == "solutions" else ".") / source.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    for stale in (executed, executed.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    command = [sys.executable, "-m", "recsys_edu.notebook", "execute", str(source), str(executed)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, json.dumps(dict(parameters))],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        log, _ = process.communicate(timeout=timeout_s)
        error = None if process.returncode == 0 else failure_text(executed, log)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            log, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            log, _ = process.communicate()
        error = failure_text(executed, log, f"stopped after its time limit of {timeout_s:g} s")
    seconds = time.perf_counter() - started
    notebook = read_executed(executed)
    records = read_records(notebook) if notebook is not None else {}
    return NotebookRun(source, executed, seconds, error, records)


def execute(source: Path, executed: Path, parameters: Mapping[str, Any]) -> None:
    """Run one notebook in this process through papermill, writing after every cell.

    Raises:
        papermill.PapermillExecutionError: a cell failed; what was executed is in `executed`.
    """
    import papermill

    papermill.execute_notebook(
        str(source),
        str(executed),
        parameters=dict(parameters),
        kernel_name=KERNEL_NAME,
        cwd=str(source.parent),
        progress_bar=False,
        start_timeout=120,
        log_output=False,
    )


def read_executed(executed: Path) -> Any | None:
    """An executed notebook; None where there is none, or only a part of one (a full disk)."""
    try:
        return nbformat.read(executed, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return None


def failure_text(executed: Path, log: str, reason: str = "") -> str:
    """The cell at which a notebook stopped, its code and its output; the process's log where there is none."""
    notebook = read_executed(executed)
    if notebook is not None:
        for index, cell in enumerate(notebook.cells):
            status = cell.metadata.get("papermill", {}).get("status")
            failed = any(output.output_type == "error" for output in cell.get("outputs", ()))
            if failed or (reason and status == "running"):
                heading = f"cell {index}" + (f" ({reason})" if reason else "")
                return f"{heading}:\n{_indent(cell.source)}\noutput:\n{_indent(_output_text(cell))}"
    return f"{reason}\n{log[-4000:]}".strip()


def jobs_that_fit() -> int:
    """How many notebooks may run at once: one per core, and per 2 GiB of free memory."""
    try:
        import psutil

        free_gib = psutil.virtual_memory().available / 2**30
    except ImportError:
        free_gib = 4.0  # nothing is known: be careful
    return max(1, min(os.cpu_count() or 1, int(free_gib / GIB_PER_NOTEBOOK)))


def kernel_environment(kernel_home: Path, jobs: int) -> dict[str, str]:
    """The environment of every kernel: this interpreter, this package, and no more threads than cores."""
    spec = kernel_home / "kernels" / KERNEL_NAME
    spec.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "recsys_edu", "language": "python"}), encoding="utf-8"
    )
    environment = dict(os.environ)
    package_root = str(Path(__file__).resolve().parents[2])
    for variable, first in (("JUPYTER_PATH", str(kernel_home)), ("PYTHONPATH", package_root)):
        rest = environment.get(variable)
        environment[variable] = f"{first}{os.pathsep}{rest}" if rest else first
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    environment["PLOTLY_RENDERER"] = "plotly_mimetype"  # figures stay data; the report draws them
    environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    return environment


def _output_text(cell: Any, limit: int = 4000) -> str:
    parts = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts.append("\n".join(output.traceback))
        else:
            parts.append(str(output.data.get("text/plain", "")))
    return ANSI_ESCAPE.sub("", "\n".join(parts))[-limit:]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
