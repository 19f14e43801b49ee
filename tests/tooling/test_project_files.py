"""The files around the library agree with it and with each other."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> list[Path]:
    """Files git would commit: tracked ones and those it does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


# ------------------------------------------------------------ environments


def environment() -> tuple[list[str], list[str]]:
    """environment.yml's conda packages and pip requirements."""
    yaml = pytest.importorskip("yaml")
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = next(each["pip"] for each in listed if isinstance(each, dict))
    return [each for each in listed if isinstance(each, str)], pip


def test_environment_installs_the_project_with_extras_that_exist():
    _, pip = environment()
    editable = [re.fullmatch(r"-e \.\[([\w,-]+)\]", line) for line in pip if line.startswith("-e")]
    extras = editable[0][1].split(",")
    assert len(editable) == 1
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert {"notebooks", "dev", "fbgemm-cpu"} <= set(extras)


def test_environment_names_nothing_that_pyproject_names_too_except_torchs_pin():
    _, pip = environment()
    pins = [line for line in pip if not line.startswith("-e")]
    assert pins == [script("setup_env").TORCH]


def test_environments_python_is_one_the_project_takes():
    conda, _ = environment()
    versions = [line.removeprefix("python=") for line in conda if line.startswith("python=")]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert len(versions) == 1
    assert tuple(map(int, versions[0].split("."))) >= tuple(map(int, oldest.split(".")))
    assert tuple(map(int, oldest.split("."))) == script("setup_env").OLDEST_PYTHON


def test_the_torch_that_is_installed_fits_the_projects_range_and_the_fbgemm_pin():
    requirements = pytest.importorskip("packaging.requirements")
    doctor = importlib.import_module("recsys_edu.notebook.doctor")
    pinned = requirements.Requirement(script("setup_env").TORCH)
    version = str(pinned.specifier).removeprefix("==")
    ranged = next(each for each in map(requirements.Requirement, PROJECT["dependencies"]) if each.name == "torch")
    assert version in ranged.specifier
    for extra in ("fbgemm-cpu", "fbgemm-cuda"):
        fbgemm = requirements.Requirement(PROJECT["optional-dependencies"][extra][0])
        assert str(fbgemm.specifier) == f"=={doctor.KNOWN_GOOD[version]}"
    for torch in doctor.KNOWN_GOOD:
        assert torch in ranged.specifier


def test_doctor_looks_for_packages_of_the_notebooks_extra():
    machine = importlib.import_module("recsys_edu.notebook.machine")
    named = {re.split(r"[<>=;\[ ]", line)[0] for line in PROJECT["optional-dependencies"]["notebooks"]}
    assert set(machine.NOTEBOOK_PACKAGES) <= named


# ------------------------------------------------------------ README


def test_readme_is_in_step_with_docstrings_notebooks_and_results():
    readme = script("readme")
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_generated_parts(text) == text, "run: make readme"


def test_reading_order_names_each_file_once_and_each_exists():
    names = [name for chapter in script("readme").READING_ORDER.values() for name in chapter]
    assert len(names) == len(set(names)) >= 20
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_generated_parts_notice_a_changed_docstring(tmp_path):
    module = tmp_path / "m.py"
    module.write_text('"""One thing: and\nthe rest of it. Another sentence.\n\nMore."""\n')
    assert script("readme").first_sentence(module) == "One thing: and the rest of it."


@pytest.mark.parametrize("num_rows", [1, 13])
def test_a_result_file_becomes_a_table_with_its_conditions(tmp_path, monkeypatch, num_rows):
    readme = script("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    assert "No measurement" in readme.results()
    (tmp_path / "results").mkdir()
    (tmp_path / "lookup.py").write_text('"""One lookup. And more."""')
    machine = {"cores": 2, "gpu": None, "versions": {"torch": "2.13.0"}, "command": "python lookup.py"}
    result = {"machine": machine, "rows": [{"what": "ours", "ms": 86.123}] * num_rows}
    (tmp_path / "results" / "lookup.json").write_text(json.dumps(result))
    lines = readme.results().splitlines()
    assert ("<details>" in lines[0]) == (num_rows > 12)
    assert "One lookup" in lines[0]
    assert lines[2:5] == ["| what | ms |", "| --- | --- |", "| ours | 86.1 |"]
    assert "Conditions: cores 2; torch 2.13.0; `python lookup.py`." in lines


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "GLOSSARY.md", "CHANGELOG.md", "docs/architecture.md"]
)
def test_relative_links_lead_somewhere(name):
    path = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_every_make_target_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md", ".ci/run", ".github/workflows/ci.yml"):
        named = set(re.findall(r"\bmake ([a-z][a-z-]*)", (ROOT / name).read_text(encoding="utf-8")))
        assert named - {"a", "the", "there"} <= targets, name


def test_glossary_terms_in_code_type_exist_in_the_library():
    glossary = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "recsys_edu").rglob("*.py"))
    names = set(re.findall(r"`([A-Za-z_][\w]*)`", glossary))
    assert len(names) > 8
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", sources)) == []


# ------------------------------------------------------------ what may not be committed


# Written apart, so that this file does not find itself.
FORBIDDEN = {
    "a machine's path": re.compile("(?<![\\w.])/" + r"(?:work|root|home/\w+|Users/\w+)/\w"),
    "a package registry's host": re.compile(
        r"(?:pypi\.org|" + r"pythonhosted\." + r"org|download\.pytorch" + r"\.org|registry\.|" + r"/sim" + r"ple/)"
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_committed_text_names(what):
    found = []
    for path in committed():
        if path.suffix in {".png", ".gz", ".parquet", ".zip", ".npy"} or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_data_set_is_committed():
    kept = [path.relative_to(ROOT).as_posix() for path in committed() if path.relative_to(ROOT).parts[0] == "data"]
    assert kept == ["data/README.md"]


def test_notebooks_are_committed_clean():
    clean = script("clean_notebooks")
    unclean = {
        path.name: complaints
        for path in clean.notebook_paths()
        if (complaints := clean.complaints(json.loads(path.read_text(encoding="utf-8"))))
    }
    assert unclean == {}, "run: make clean-notebooks"


def test_cleaning_takes_outputs_and_keeps_tags(tmp_path):
    clean = script("clean_notebooks")
    cell = {"cell_type": "code", "id": "a", "source": "1", "outputs": [{}], "execution_count": 3}
    metadata = {"tags": ["parameters"], "collapsed": True}
    empty = {"cell_type": "code", "id": "b", "metadata": {}, "source": "", "outputs": [], "execution_count": None}
    dirty = {
        "cells": [{**cell, "metadata": metadata}, empty],
        "metadata": {"kernelspec": {"name": "mine"}},
        "nbformat": 4,
    }
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(dirty))
    assert len(clean.complaints(dirty)) == 4
    assert clean.rewrite(path)
    after = json.loads(path.read_text())
    assert clean.complaints(after) == []
    assert [each["metadata"] for each in after["cells"]] == [{"tags": ["parameters"]}]
    assert not clean.rewrite(path)


# ------------------------------------------------------------ what starts it all


def test_ci_calls_make_test_with_an_honest_exit_code():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.strip().endswith("exec make test")
    assert "make test" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_hosted_ci_is_valid_yaml_with_the_three_systems():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    systems = {each["os"] for each in jobs["elsewhere"]["strategy"]["matrix"]["include"]}
    assert jobs["linux"]["runs-on"] == "ubuntu-latest"
    assert systems == {"macos-latest", "windows-latest"}


def test_make_help_lists_the_promised_targets():
    if sys.platform == "win32":
        pytest.skip("no make on Windows")
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lab", "check", "bench"):
        assert f"make {target} " in text
