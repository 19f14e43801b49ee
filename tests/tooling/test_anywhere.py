"""The files that bring the course to Binder, into a container and into a devcontainer name things that exist."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def assert_command_exists(command: str) -> None:
    """A command line of the course: its script, its extras and its subcommand are there."""
    from recsys_edu.notebook.cli import COMMANDS

    words = shlex.split(command.replace(".venv/bin/", ""))
    if words[0] == "recsys_edu":
        assert words[1] in COMMANDS, command
    for before, word in itertools.pairwise(words):
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file(), command
        if before == "--extras":
            assert set(word.split(",")) <= EXTRAS, command
        if extras := re.fullmatch(r"\.\[([\w,-]+)\]", word):
            assert set(extras[1].split(",")) <= EXTRAS, command


def test_binder_gets_the_torch_that_the_project_takes_and_the_projects_own_packages():
    yaml = pytest.importorskip("yaml")
    listed = yaml.safe_load(text_of(".binder/environment.yml"))["dependencies"]
    torch = next(each for each in PROJECT["dependencies"] if each.startswith("torch>"))
    assert torch.replace("torch", "pytorch-cpu") in listed
    commands = [
        line for line in text_of(".binder/postBuild").splitlines() if line and not line.startswith(("#", "set"))
    ]
    assert [shlex.split(command)[0] for command in commands] == ["python", "recsys_edu"]
    for command in commands:
        assert_command_exists(command)


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither bash nor permission bits")
def test_binders_script_can_be_run_and_stops_at_the_first_error():
    script = ROOT / ".binder" / "postBuild"
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text_of(".binder/postBuild")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_container_file_has_instructions_in_order_and_commands_that_exist():
    joined = text_of("Containerfile").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    instructions = [line.split()[0] for line in lines]
    assert instructions[0] == "FROM" and instructions[-1] == "CMD"
    assert set(instructions) <= {"FROM", "ARG", "RUN", "WORKDIR", "USER", "COPY", "ENV", "EXPOSE", "CMD"}
    assert instructions.index("USER") < instructions.index("COPY"), "nothing is installed or started as root"
    setup = next(line for line in lines if "setup_env.py" in line)
    for command in setup.removeprefix("RUN ").split("&&"):
        assert_command_exists(command.strip())
    start = json.loads(lines[-1].removeprefix("CMD "))
    assert start[:2] == ["jupyter", "lab"] and "--notebook-dir=notebooks" in start
    ignored = text_of(".containerignore").split()
    assert {".git", ".venv", "build"} <= set(ignored)


def test_the_devcontainer_is_json_with_commands_that_exist():
    settings = json.loads(text_of(".devcontainer/devcontainer.json"))
    for command in settings["postCreateCommand"].split("&&"):
        assert_command_exists(command.strip())
    major, minor = map(int, settings["image"].rsplit(":", 1)[1].split("."))
    assert (major, minor) >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert settings["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"].endswith(
        ".venv/bin/python"
    )
