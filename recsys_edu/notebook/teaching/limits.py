"""Run a command that nobody has read: its own process group, limits on time and memory, and nothing of yours to see.

Two things watch over memory. The operating system refuses a single process more than the limit (`resource`, where
there is one), which turns a mistake into a MemoryError in the cell that made it. The parent adds up the resident
memory of the whole process tree (psutil) and stops it where the sum goes over, which also catches many small ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 0.1
LOG_CHARACTERS = 4000
LARGEST_FILE_BYTES = 1 << 30
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "SYSTEMDRIVE", "PATHEXT", "COMSPEC", "NUMBER_OF_PROCESSORS")
OWN_VARIABLES = "RECSYS_EDU_"

# Runs first in the child: limits that exec and every descendant inherit.
# RLIMIT_DATA counts what a process allocates; RLIMIT_AS would count mapped libraries too, gigabytes for a CUDA torch.
LIMITING_PROGRAM = """
import os, sys
memory, seconds, file_bytes = map(int, sys.argv[1:4])
try:
    import resource
    wanted = {"RLIMIT_DATA": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": file_bytes, "RLIMIT_CORE": 0}
    for name, value in wanted.items():
        try:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            pass
except ImportError:
    pass
os.execv(sys.argv[4], sys.argv[4:])
"""


@dataclass(frozen=True)
class Limits:
    """What a command may use: wall-clock seconds, and GiB of memory, of it and of everything it starts."""

    seconds: float = 300.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.memory_gib <= 0:
            raise ValueError(f"limits are positive, got {self.seconds:g} s and {self.memory_gib:g} GiB")

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes."""
        return int(self.memory_gib * 2**30)


@dataclass(frozen=True)
class Ending:
    """How a command ended: `stopped` is "" where it ended by itself, "time" or "memory" where it was stopped."""

    returncode: int
    stopped: str
    log: str
    seconds: float


def run_limited(command: Sequence[str], limits: Limits, environment: Mapping[str, str], folder: Path) -> Ending:
    """Run `command` in `folder` until it ends or goes over a limit; then the whole process tree is ended."""
    cpu_seconds = int(limits.seconds * (os.cpu_count() or 1)) + 5
    with tempfile.TemporaryFile() as log:
        # `exec` in the child keeps its process id; Windows has neither exec nor limits, and starts the command itself
        guard = [
            sys.executable,
            "-c",
            LIMITING_PROGRAM,
            *map(str, (limits.memory_bytes, cpu_seconds, LARGEST_FILE_BYTES)),
        ]
        started = time.monotonic()
        process = subprocess.Popen(
            [*([] if os.name == "nt" else guard), *command],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stopped = ""
        try:
            stopped = _watch(process, limits, started)
        finally:
            end_tree(process)
        seconds = time.monotonic() - started
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - LOG_CHARACTERS))
        return Ending(process.returncode, stopped, log.read().decode(errors="replace"), seconds)


def bare_environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """What a graded notebook sees of your environment: the search path, the language, this project's own settings.

    Tokens and passwords in variables stay behind, and `home` takes the place of your home folder.
    """
    kept = {name: value for name, value in os.environ.items() if name.upper() in KEPT_VARIABLES}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(OWN_VARIABLES)}
    homes = dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "IPYTHONDIR"), str(home))
    return kept | homes | {"PYTHONDONTWRITEBYTECODE": "1"} | dict(extra)


def tree_memory_bytes(pid: int) -> int:
    """The resident memory of a process and its descendants together; 0 where psutil is absent."""
    total = 0
    for process in _tree(pid):
        with suppress(_psutil_error()):
            total += process.memory_info().rss
    return total


def end_tree(process: subprocess.Popen) -> None:
    """End a process, its descendants and its process group, and wait for it."""
    descendants = _tree(process.pid)
    if os.name != "nt":
        import signal

        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for each in descendants:
        with suppress(_psutil_error()):
            each.kill()
    process.kill()
    process.wait()
    if descendants:
        import psutil

        psutil.wait_procs(descendants, timeout=10)  # a busy machine takes a moment to end what was killed


def _watch(process: subprocess.Popen, limits: Limits, started: float) -> str:
    while True:
        try:
            process.wait(LOOK_EVERY_S)
            return ""
        except subprocess.TimeoutExpired:
            if time.monotonic() - started > limits.seconds:
                return "time"
            if tree_memory_bytes(process.pid) > limits.memory_bytes:
                return "memory"


def _tree(pid: int) -> list:
    try:
        import psutil
    except ImportError:
        return []
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _psutil_error() -> type[Exception]:
    try:
        import psutil
    except ImportError:
        return OSError
    return psutil.Error
