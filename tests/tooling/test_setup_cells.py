"""The first code cell of every notebook: nothing where the course is installed, the right thing everywhere else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTED = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
ADDRESS = "https://github.com/someone/course"


@pytest.fixture(scope="module")
def setup_cells():
    spec = importlib.util.spec_from_file_location("_setup_cells", ROOT / "scripts" / "setup_cells.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_cell(source, monkeypatch, *, installed, variable=None):
    """Run the cell as IPython would and return the magics it called."""
    manager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    for name in HOSTED:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    called = []
    shell = SimpleNamespace(run_line_magic=lambda name, line: called.append(f"%{name} {line}"))
    exec(manager.transform_cell(source), {"get_ipython": lambda: shell})
    return called


@pytest.mark.parametrize("variable", [None, *HOSTED])
def test_nothing_happens_where_the_course_is_installed(setup_cells, monkeypatch, variable):
    for address in (None, ADDRESS):
        assert run_cell(setup_cells.cell_source(address), monkeypatch, installed=True, variable=variable) == []


@pytest.mark.parametrize("variable", HOSTED)
def test_hosted_machines_install_it_from_the_declared_address_or_from_the_student_zip(
    setup_cells, monkeypatch, variable
):
    called = {
        address: run_cell(setup_cells.cell_source(address), monkeypatch, installed=False, variable=variable)
        for address in (None, ADDRESS)
    }
    assert called[None] == ['%pip install -q "recsys_edu-student.zip[notebooks]"']
    assert called[ADDRESS] == [f'%pip install -q "recsys_edu[notebooks] @ git+{ADDRESS}"']


def test_another_kernel_is_told_what_to_do_and_nothing_is_installed_into_it(setup_cells, monkeypatch):
    with pytest.raises(ImportError, match=r"make lab.*%pip install -e \.\./\.\.\[notebooks\]"):
        run_cell(setup_cells.cell_source(None, up="../.."), monkeypatch, installed=False)


def test_every_notebook_has_the_cell_once_and_in_its_place(setup_cells, capsys):
    assert setup_cells.main(["--check"]) == 0, capsys.readouterr().out
    notebook = json.loads((ROOT / "notebooks" / "01_jagged_tensors.ipynb").read_text(encoding="utf-8"))
    again = setup_cells.with_setup_cell(notebook, setup_cells.cell_source(ADDRESS))
    tagged = [index for index, cell in enumerate(again["cells"]) if "setup" in cell["metadata"].get("tags", ())]
    assert tagged == [1] and len(again["cells"]) == len(notebook["cells"])
    assert f"git+{ADDRESS}" in "".join(again["cells"][1]["source"])


def test_the_address_is_the_one_that_pyproject_declares(setup_cells, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n')
    assert setup_cells.repository(tmp_path) is None
    project.write_text('[project]\nname = "x"\n[project.urls]\nRepository = "https://example.org/elsewhere"\n')
    assert setup_cells.repository(tmp_path) is None, "Colab and Binder open GitHub's addresses"
    project.write_text(f'[project]\nname = "x"\n[project.urls]\nRepository = "{ADDRESS}/"\n')
    assert setup_cells.repository(tmp_path) == ADDRESS


def test_links_that_open_a_notebook_elsewhere(setup_cells):
    name = "notebooks/01_jagged_tensors.ipynb"
    colab = setup_cells.colab_link(ADDRESS, name)
    assert colab == f"https://colab.research.google.com/github/someone/course/blob/main/{name}"
    binder = setup_cells.binder_link(ADDRESS, name)
    assert binder == f"https://mybinder.org/v2/gh/someone/course/main?urlpath=lab%2Ftree%2F{name.replace('/', '%2F')}"
