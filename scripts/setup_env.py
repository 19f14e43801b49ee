"""Make the virtual environment in .venv, once: torch, FBGEMM where it has a wheel, and the asked-for extras.

The Makefile calls this before each of its targets; where there is no make (Windows), call it by hand:

    python scripts/setup_env.py                 # enough for the notebooks
    python scripts/setup_env.py --extras dev    # and for the tests

A second call finds its stamp and returns at once. The stamp's key is what decides the contents:
pyproject.toml, this machine's kind, the Python version. Where everything needed is installed already,
nothing is downloaded, so a new key does not need a network either.

Needs Python >= 3.11 and nothing else. TORCH_INDEX_URL may name another index for torch alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, ".recsys_edu_setup.json")
TORCH = "torch==2.13.0"
BUILD_TOOLS = "setuptools>=77"
TORCH_INDEX_VARIABLE = "TORCH_INDEX_URL"
OLDEST_PYTHON = (3, 11)

# Runs inside the environment: which of these requirements does it not meet? pip carries the parser.
MISSING_PROGRAM = """
import importlib.metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
missing = []
for text in json.loads(sys.argv[1]):
    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        missing.append(text)
print(json.dumps(missing))
"""


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def venv_python(venv: str = VENV) -> str:
    """The environment's interpreter, whether or not it exists yet."""
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return os.path.join(venv, folder, name)


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded: its kernel module shows itself, or its tool answers."""
    if os.path.exists("/proc/driver/nvidia/version"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def stamp_key(driver: bool) -> str:
    """A digest of everything that decides what belongs into the environment."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        digest = hashlib.sha256(file.read())
    about = [sys.platform, platform.machine(), driver, TORCH, ROOT, list(interpreter_version(venv_python()) or ())]
    digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def read_stamp() -> dict:
    try:
        with open(STAMP, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def write_stamp(key: str, extras: set[str], fbgemm: str) -> None:
    aside = STAMP + ".part"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump({"key": key, "extras": sorted(extras), "fbgemm": fbgemm}, file, indent=1)
    os.replace(aside, STAMP)


def interpreter_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of an interpreter, or None where it does not run."""
    program = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60)
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def make_venv() -> str:
    """The environment's interpreter; makes the environment where it is missing or no longer runs."""
    python = venv_python()
    version = interpreter_version(python)
    if version is not None and version >= OLDEST_PYTHON:
        return python
    if sys.version_info < OLDEST_PYTHON:
        wanted, found = ".".join(map(str, OLDEST_PYTHON)), platform.python_version()
        raise SetupError(
            f"Python {wanted} or newer is needed, this is {found} ({sys.executable}). Install a newer one."
        )
    say(f"making .venv with Python {platform.python_version()}")
    import venv

    try:
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=os.name != "nt").create(VENV)
    except (OSError, subprocess.CalledProcessError) as error:
        hint = "on Debian and Ubuntu: apt install python3-venv"
        raise SetupError(f"Python's venv module cannot make .venv: {error} ({hint})") from error
    return python


def pip_install(python: str, *arguments: str) -> None:
    """pip install, quietly unless someone watches. Raises SetupError where pip fails."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # errors only
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *quiet, *arguments]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SetupError(f"pip install {' '.join(arguments)} failed; its own message stands above")


def missing(python: str, requirements: list[str]) -> list[str]:
    """Those of `requirements` that the environment does not meet."""
    answer = subprocess.run([python, "-c", MISSING_PROGRAM, json.dumps(requirements)], capture_output=True, text=True)
    if answer.returncode != 0:
        raise SetupError(f"pip is missing or broken in .venv; remove that folder and start again\n{answer.stderr}")
    return json.loads(answer.stdout)


def install_torch(python: str, driver: bool) -> None:
    """torch first and by itself: whatever needs it later finds it and pulls no other build."""
    if not missing(python, [TORCH]):
        return
    index = os.environ.get(TORCH_INDEX_VARIABLE)
    if sys.platform.startswith("linux") and not driver and not index:
        say(f"no NVIDIA driver and no {TORCH_INDEX_VARIABLE}: if pip fetches CUDA libraries (gigabytes), see README")
    say(f"installing {TORCH}" + (f" from {TORCH_INDEX_VARIABLE}" if index else ""))
    pip_install(python, TORCH, *(["--index-url", index] if index else []))


def wanted_fbgemm(python: str, driver: bool) -> str | None:
    """The extra with the FBGEMM build for this machine, None where FBGEMM has no wheels."""
    if not sys.platform.startswith("linux"):
        return None
    if not driver:
        return "fbgemm-cpu"
    program = "import torch; print(torch.version.cuda or '')"
    cuda = subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()
    return "fbgemm-cuda" if cuda else "fbgemm-cpu"  # the CUDA build does not load beside a CPU torch


def install_fbgemm(python: str, optional: dict[str, list[str]], driver: bool) -> str:
    """Install FBGEMM where it can be; otherwise one line says what happens instead. Returns what it said."""
    extra = wanted_fbgemm(python, driver)
    if extra is None:
        return "none (no wheels for this system; PyTorch's kernels serve)"
    requirements = missing(python, optional[extra])
    if requirements:
        say(f"installing {extra}")
        try:
            pip_install(python, TORCH, *requirements)
        except SetupError:
            say(f"{extra} cannot be installed here; going on with PyTorch's kernels (slower, same results)")
            return "none (its installation failed)"
    return extra


def install_project(python: str, project: dict, extras: set[str]) -> None:
    """The project's requirements, then the project itself, editable, without a second resolution."""
    optional = project["optional-dependencies"]
    required = [BUILD_TOOLS, *project["dependencies"], *(text for extra in sorted(extras) for text in optional[extra])]
    requirements = missing(python, required)
    if requirements:
        say(f"installing {len(requirements)} more packages for: {', '.join(sorted(extras))}")
        pip_install(python, TORCH, *requirements)
    say("installing recsys_edu itself (editable)")
    pip_install(python, "--no-deps", "--no-build-isolation", "--editable", ".")


def set_up(extras: set[str]) -> bool:
    """Bring .venv to what `extras` need. Returns whether anything was done."""
    driver = has_nvidia_driver()
    stamp = read_stamp()
    known = set(stamp.get("extras", []))
    if stamp and extras <= known and stamp.get("key") == stamp_key(driver):
        return False
    start = time.monotonic()
    python = make_venv()
    import tomllib  # not at the top: an older Python still gets the message above

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    unknown = extras - set(project["optional-dependencies"])
    if unknown:
        offered = ", ".join(project["optional-dependencies"])
        raise SetupError(f"unknown extras: {', '.join(sorted(unknown))}; pyproject.toml has {offered}")
    extras |= known & set(project["optional-dependencies"])
    install_torch(python, driver)
    fbgemm = install_fbgemm(python, project["optional-dependencies"], driver)
    install_project(python, project, extras)
    write_stamp(stamp_key(driver), extras, fbgemm)
    say(f"ready after {time.monotonic() - start:.0f} s; FBGEMM: {fbgemm}")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install what the project needs, once.")
    parser.add_argument("--extras", default="notebooks", help="comma-separated extras of pyproject.toml")
    options = parser.parse_args(arguments)
    extras = {extra.strip() for extra in options.extras.split(",") if extra.strip()}
    try:
        if not set_up(extras):
            return 0
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
