"""The doctor run as a command in bare environments, in which torch and FBGEMM are stand-ins that fail in given ways."""

from __future__ import annotations

import importlib
import os
import subprocess
import time
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ("-m", "recsys_edu.notebook.cli", "doctor")

TORCH = """
__version__ = "2.13.0+cpu"
class version:
    cuda = None
class ops:
    class fbgemm:
        asynchronous_complete_cumsum = staticmethod(lambda lengths: lengths)
def tensor(values):
    return values
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter with nothing installed, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture
def situation(bare_python, tmp_path):
    """Packages and distributions to put on the path, and the doctor's answer to them."""

    def package(name: str, source: str, distribution: str | None = None, version: str = "") -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(source)
        if distribution:
            metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

    def answer(backend: str = "auto", arguments: tuple[str, ...] = DOCTOR) -> tuple[int, str]:
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "RECSYS_EDU_BACKEND": backend}
        environment |= {"RECSYS_EDU_DATA": str(tmp_path / "data"), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [bare_python, *arguments], capture_output=True, env=environment, cwd=tmp_path, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr.decode(), done.stderr.decode()
        return done.returncode, done.stdout.decode()

    answer.package = package
    return answer


def with_torch(situation) -> None:
    situation.package("torch", TORCH, "torch", "2.13.0+cpu")


def with_fbgemm(situation, source: str, version: str = "1.8.0", build: str = "fbgemm-gpu-cpu") -> None:
    with_torch(situation)
    situation.package("fbgemm_gpu", source, build, version)


def test_torch_missing_entirely(situation):
    code, text = situation()
    assert code == 1
    assert "torch          not installed" in text
    assert "pip install torch==2.13.0" in text


def test_torch_that_does_not_import(situation):
    situation.package("torch", "raise OSError('libtorch.so: cannot open shared object file')", "torch", "2.13.0")
    code, text = situation()
    assert code == 1
    assert "libtorch.so: cannot open shared object file" in text
    assert "--force-reinstall torch==2.13.0" in text


def test_fbgemm_missing_is_usable(situation):
    with_torch(situation)
    code, text = situation()
    assert code == 0
    assert "PyTorch's, because FBGEMM is not installed" in text


def test_fbgemm_that_loads(situation):
    with_fbgemm(situation, "__version__ = '1.8.0'")
    code, text = situation()
    assert code == 0
    assert "fbgemm-gpu-cpu 1.8.0, loads" in text
    assert "FBGEMM's, because FBGEMM is installed and loads" in text


@pytest.mark.parametrize(
    "source, told",
    [
        ("raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN2at4_ops5zeros4callE')", "undefined symbol"),
        ("raise RuntimeError('operator fbgemm::something does not exist')", "does not exist"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
    ids=["undefined symbol", "operator missing", "segmentation fault", "leaves"],
)
def test_fbgemm_installed_but_broken(situation, source, told):
    if "SIGSEGV" in source and os.name == "nt":
        pytest.skip("no signals on Windows")
    with_fbgemm(situation, source)
    code, text = situation()
    assert code == 1
    assert told in text
    assert "uninstall -y fbgemm-gpu-cpu fbgemm-gpu" in text
    assert "PyTorch's, because FBGEMM does not load" in text


def test_broken_fbgemm_does_not_matter_when_pytorch_is_asked_for(situation):
    with_fbgemm(situation, "raise OSError('undefined symbol')")
    code, text = situation(backend="pytorch")
    assert code == 0
    assert "RECSYS_EDU_BACKEND=pytorch asks for them" in text


def test_wrong_version_is_named_with_the_right_one(situation):
    with_fbgemm(situation, "raise OSError('undefined symbol: x')", version="1.6.0")
    code, text = situation()
    assert code == 1
    assert "torch 2.13.0 belongs with FBGEMM 1.8.0, not 1.6.0" in text
    assert "install fbgemm-gpu-cpu==1.8.0" in text


def test_both_builds_at_once(situation):
    with_fbgemm(situation, "__version__ = '1.8.0'")
    situation.package("fbgemm_gpu", "__version__ = '1.8.0'", "fbgemm-gpu", "1.8.0")
    code, text = situation()
    assert code == 0
    assert "overwrite each other's files" in text


def test_the_console_command_is_what_these_tests_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"recsys_edu": "recsys_edu.__main__:main"}


def test_there_is_help_for_who_does_not_know_the_commands(situation):
    code, text = situation(arguments=("-m", "recsys_edu.notebook.cli"))
    assert code == 0
    assert all(f"recsys_edu {name} " in text for name in ("doctor", "data", "demo", "notebooks", "bench"))
    assert situation(arguments=("-m", "recsys_edu.notebook.cli", "docter"))[0] == 2


def test_an_import_that_never_ends_is_given_up():
    from recsys_edu.notebook.machine import probe

    start = time.monotonic()
    found = probe("import time; time.sleep(600)", seconds=0.5)
    assert found.outcome == "hangs"
    assert time.monotonic() - start < 60


def test_in_this_environment_the_doctor_agrees_with_the_library():
    from recsys_edu.kernels.backend import fbgemm_status

    report = importlib.import_module("recsys_edu.notebook.doctor").doctor()
    kernels = next(finding for finding in report.findings if finding.topic == "kernels")
    assert kernels.text.startswith("FBGEMM's") == fbgemm_status().available
    assert report._repr_html_().startswith("<table>")
