"""The set-up's decisions, with pip and the environment's interpreter replaced by recorders."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """scripts/setup_env.py with its environment in a temporary folder and every pip call recorded."""
    spec = importlib.util.spec_from_file_location("_setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []
    module.installed = set()

    def pip_install(python: str, *arguments: str) -> None:
        module.calls.append(arguments)
        if any("fbgemm" in argument for argument in arguments) and not module.fbgemm_available:
            raise module.SetupError("no matching distribution")
        module.installed.update(arguments)

    module.fbgemm_available = True
    monkeypatch.setattr(module, "VENV", str(tmp_path))
    monkeypatch.setattr(module, "STAMP", str(tmp_path / "stamp.json"))
    monkeypatch.setattr(module, "make_venv", lambda: sys.executable)
    monkeypatch.setattr(module, "pip_install", pip_install)
    monkeypatch.setattr(
        module, "missing", lambda python, wanted: [each for each in wanted if each not in module.installed]
    )
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.delenv(module.TORCH_INDEX_VARIABLE, raising=False)
    return module


def test_torch_comes_first_and_alone_then_fbgemm_then_the_rest_then_the_project(setup):
    assert setup.set_up({"notebooks"})
    assert setup.calls[0] == (setup.TORCH,)
    assert setup.calls[1] == (setup.TORCH, "fbgemm-gpu-cpu==1.8.0; sys_platform == 'linux'")
    assert setup.calls[2][0] == setup.TORCH
    assert any(text.startswith("jupyterlab") for text in setup.calls[2])
    assert not any(text.startswith("pytest") for text in setup.calls[2])
    assert setup.calls[3] == ("--no-deps", "--no-build-isolation", "--editable", ".")


def test_the_second_time_nothing_happens(setup):
    assert setup.set_up({"notebooks"})
    setup.calls.clear()
    assert not setup.set_up({"notebooks"})
    assert setup.calls == []


def test_another_extra_adds_to_what_is_there(setup):
    setup.set_up({"notebooks"})
    assert setup.set_up({"dev"})
    assert json.loads(Path(setup.STAMP).read_text())["extras"] == ["dev", "notebooks"]
    assert not setup.set_up({"notebooks", "dev"})


def test_where_everything_is_installed_a_new_key_downloads_nothing(setup):
    setup.set_up({"notebooks"})
    setup.calls.clear()
    Path(setup.STAMP).write_text(json.dumps({"key": "of an older pyproject", "extras": ["notebooks"]}))
    assert setup.set_up({"notebooks"})
    assert setup.calls == [("--no-deps", "--no-build-isolation", "--editable", ".")]


def test_a_torn_stamp_counts_as_none(setup):
    Path(setup.STAMP).write_text('{"key": ')
    assert setup.set_up({"notebooks"})


def test_another_index_is_used_for_torch_alone(setup, monkeypatch):
    monkeypatch.setenv(setup.TORCH_INDEX_VARIABLE, "file:///some/index")
    setup.set_up({"notebooks"})
    assert setup.calls[0] == (setup.TORCH, "--index-url", "file:///some/index")
    assert not any("--index-url" in call for call in setup.calls[1:])


def test_without_fbgemm_the_set_up_goes_on_and_says_so_in_one_line(setup, capsys):
    setup.fbgemm_available = False
    assert setup.set_up({"notebooks"})
    lines = [line for line in capsys.readouterr().out.splitlines() if "going on with PyTorch's kernels" in line]
    assert len(lines) == 1
    assert setup.calls[-1] == ("--no-deps", "--no-build-isolation", "--editable", ".")


@pytest.mark.parametrize(
    "platform, driver, cuda, extra",
    [
        ("linux", False, "", "fbgemm-cpu"),
        ("linux", True, "13.0", "fbgemm-cuda"),
        ("linux", True, "", "fbgemm-cpu"),
        ("darwin", False, "", None),
        ("win32", True, "13.0", None),
    ],
)
def test_the_fbgemm_build_follows_from_system_driver_and_torch(setup, monkeypatch, platform, driver, cuda, extra):
    class Answer:
        stdout = cuda + "\n"

    monkeypatch.setattr(setup.sys, "platform", platform)
    monkeypatch.setattr(setup.subprocess, "run", lambda *arguments, **options: Answer)
    assert setup.wanted_fbgemm("python", driver) == extra


def test_an_unknown_extra_is_refused_with_the_known_ones(setup, capsys):
    assert setup.main(["--extras", "notebook"]) == 1
    message = capsys.readouterr().err
    assert "unknown extras: notebook" in message
    assert "notebooks" in message


def test_an_old_python_is_told_what_is_needed(setup, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("_setup_env_plain", ROOT / "scripts" / "setup_env.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    monkeypatch.setattr(plain, "VENV", "nowhere")
    monkeypatch.setattr(plain, "STAMP", "nowhere/stamp")
    monkeypatch.setattr(plain, "venv_python", lambda: "nowhere/python")
    monkeypatch.setattr(plain, "OLDEST_PYTHON", (99, 0))
    assert plain.main([]) == 1
    assert "Python 99.0 or newer is needed" in capsys.readouterr().err


def test_requirements_are_compared_with_what_is_installed():
    spec = importlib.util.spec_from_file_location("_setup_env_plain", ROOT / "scripts" / "setup_env.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    pytest.importorskip("pip._vendor.packaging.requirements")
    wanted = ["pytest>=1", "pytest>=1000", "no-such-package-here", "no-such-package-here; python_version < '3'"]
    assert plain.missing(sys.executable, wanted) == ["pytest>=1000", "no-such-package-here"]
