"""What this machine has: Python, torch, FBGEMM, driver, data, memory. Facts for the doctor, without judgement.

Neither torch nor FBGEMM is imported here: a wheel built for another torch raises while it is imported, hangs,
or takes the whole process down. Both are tried in processes of their own, with a time limit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from recsys_edu.datasets.download import FOLDER_NAME, data_root, is_movielens_100k_cached

BACKEND_VARIABLE = "RECSYS_EDU_BACKEND"
CPU_BUILD, CUDA_BUILD = "fbgemm-gpu-cpu", "fbgemm-gpu"
NOTEBOOK_PACKAGES = ("jupyterlab", "ipywidgets", "ipyparallel", "plotly", "papermill", "nbconvert")
PROBE_SECONDS = 120.0
MARK = "recsys_edu-probe:"

TORCH_PROGRAM = f"""
import json, torch
cuda = torch.version.cuda
found = {{"version": str(torch.__version__), "cuda": cuda, "cuda_usable": bool(cuda) and torch.cuda.is_available()}}
print("{MARK}" + json.dumps(found))
"""
FBGEMM_PROGRAM = f"""
import json, torch, fbgemm_gpu
torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
print("{MARK}" + json.dumps({{"version": getattr(fbgemm_gpu, "__version__", None)}}))
"""


@dataclass(frozen=True)
class Probe:
    """What came of importing a package in a process of its own.

    `outcome` is "loads", "missing" (not installed), "raises", "crashes" (a signal ended the process) or "hangs".
    """

    outcome: str
    detail: str = ""
    found: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything the diagnosis is made from; a test writes one down instead of breaking a machine."""

    python: tuple[int, int, int] = (3, 12, 0)
    executable: str = "python"
    system: str = "Linux"  # as platform.system() says: Linux, Darwin, Windows
    machine: str = "x86_64"
    torch: Probe = Probe("loads", found={"version": "2.13.0", "cuda": None, "cuda_usable": False})
    fbgemm: Probe = Probe("loads")
    fbgemm_builds: dict = field(default_factory=dict)  # distribution -> version
    driver: str | None = None  # NVIDIA driver version
    backend: str = "auto"  # the variable RECSYS_EDU_BACKEND
    data: dict = field(default_factory=dict)  # data set -> megabytes on disk, None where absent
    data_folder: str = "data"
    memory_gib: float | None = None
    num_cores: int = 1
    absent_notebook_packages: tuple[str, ...] = ()


def probe(program: str, seconds: float = PROBE_SECONDS) -> Probe:
    """Run a few lines in a process of their own and say what came of them; never raises."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, timeout=seconds, env=environment, cwd=_empty_folder()
        )
    except subprocess.TimeoutExpired:
        return Probe("hangs", f"no answer within {seconds:.0f} s")
    except OSError as error:
        return Probe("raises", f"cannot start {sys.executable}: {error}")
    output = answer.stdout.decode(errors="replace")
    for line in output.splitlines():
        if line.startswith(MARK):
            return Probe("loads", found=json.loads(line[len(MARK) :]))
    if answer.returncode < 0 or answer.returncode >= 0xC0000000:  # a signal; on Windows an NTSTATUS code
        return Probe("crashes", f"the process died with {_signal_name(answer.returncode)}")
    lines = [line for line in answer.stderr.decode(errors="replace").strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit code {answer.returncode} and no message"
    return Probe("raises", last)


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code:#x}"


def _empty_folder() -> str:
    """Where a probe runs: not here, or a folder called torch beside the notebook would be what it imports."""
    return os.path.dirname(os.path.abspath(sys.executable)) or os.curdir


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version, None without one; the driver's own file first, then its tool."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
        return found.group(1) if found else "unknown version"
    except OSError:
        pass
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def memory_gib() -> float | None:
    """Memory this process may use: the machine's, or its container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return _windows_memory_gib()
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit_file).read_text()))
        except (OSError, ValueError):  # no such limit, or the word "max"
            continue
    return total / 2**30


def _windows_memory_gib() -> float | None:
    try:
        import ctypes

        total_kib = ctypes.c_ulonglong()
        if ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(total_kib)):  # type: ignore[attr-defined]
            return total_kib.value / 2**20
    except (AttributeError, OSError):
        pass
    return None


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def data_on_disk() -> tuple[str, dict]:
    """The data folder, and for each data set in it its megabytes; MovieLens-100K is None unless it is intact."""
    folder = data_root()
    sizes: dict = {FOLDER_NAME: None}
    if folder.is_dir():
        for each in sorted(folder.iterdir()):
            if each.is_dir() and not each.name.startswith("."):
                sizes[each.name] = sum(file.stat().st_size for file in each.rglob("*") if file.is_file()) / 1e6
    if not is_movielens_100k_cached():
        sizes[FOLDER_NAME] = None
    return str(folder), sizes


def examine(probe_seconds: float = PROBE_SECONDS) -> Facts:
    """Look at this machine. Takes the time that importing torch and FBGEMM takes, in other processes."""
    builds = {name: version for name in (CPU_BUILD, CUDA_BUILD) if (version := installed_version(name))}
    torch = Probe("missing")
    if installed_version("torch") or _importable("torch"):
        torch = probe(TORCH_PROGRAM, probe_seconds)
    fbgemm = Probe("missing")
    if builds or _importable("fbgemm_gpu"):
        fbgemm = probe(FBGEMM_PROGRAM, probe_seconds) if torch.outcome == "loads" else Probe("raises", "torch does not")
    folder, data = data_on_disk()
    return Facts(
        python=tuple(sys.version_info[:3]),
        executable=sys.executable,
        system=platform.system(),
        machine=platform.machine(),
        torch=torch,
        fbgemm=fbgemm,
        fbgemm_builds=builds,
        driver=nvidia_driver(),
        backend=os.environ.get(BACKEND_VARIABLE, "auto").lower(),
        data=data,
        data_folder=folder,
        memory_gib=memory_gib(),
        num_cores=num_cores(),
        absent_notebook_packages=tuple(name for name in NOTEBOOK_PACKAGES if not installed_version(name)),
    )


def _importable(name: str) -> bool:
    """Whether a top-level module is there, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
