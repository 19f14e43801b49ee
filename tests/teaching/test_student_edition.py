"""The student edition holds what a student needs, and neither solutions nor hints."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recsys_edu.notebook.teaching.student import FOLDER_IN_ZIP, main, without_hints, write_student_edition

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edition")
    write_student_edition(ROOT, folder / "course.zip")
    with zipfile.ZipFile(folder / "course.zip") as archive:
        archive.extractall(folder)
    return folder / FOLDER_IN_ZIP


def test_every_notebook_is_there_and_no_solution(edition):
    names = {path.name for path in (edition / "notebooks").rglob("*")}
    assert names == {path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    for path in (edition / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "solutions/" not in text and json.loads(text)["nbformat"] == 4
    assert not list(edition.rglob("test_*.py")) and not list(edition.rglob("*.pyc"))


def test_no_hint_is_left_and_the_checks_still_work(edition):
    for path in sorted((ROOT / "recsys_edu/notebook/exercises").glob("nb*.py")):
        stripped = (edition / "recsys_edu/notebook/exercises" / path.name).read_text(encoding="utf-8")
        assert stripped.count("hints=()") == path.read_text(encoding="utf-8").count("hints=(")
    code = (
        "import torch, recsys_edu\n"
        "from recsys_edu.notebook import check, exercise, hint\n"
        "exercise('11.1'); hint('11.1')\n"
        "check('01.1', lambda lengths: torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))\n"
        "print(recsys_edu.__file__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=edition, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "ask your teacher" in ran.stdout and "Exercise 01.1: correct" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith(str(edition.resolve())), "the zip's own package was used"


def test_what_the_setup_needs_is_in_the_zip(edition):
    for name in ("scripts/setup_env.py", "pyproject.toml", "README.md", "LICENSE", "data/README.md"):
        assert (edition / name).is_file(), name
    readme = (edition / "README.md").read_text(encoding="utf-8")
    assert r".venv\Scripts\recsys_edu data fetch" in readme and "Hints are with your teacher" in readme
    assert not list((edition / "data").glob("movielens*")), "the data's terms do not allow to pass it on"


def test_equal_contents_make_equal_zips_and_hints_can_stay(tmp_path, capsys):
    for name in ("a.zip", "b.zip"):
        write_student_edition(ROOT, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert main(["--out", str(tmp_path / "with.zip"), "--hints"]) == 0 and "no solutions" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "with.zip") as archive:
        text = archive.read(f"{FOLDER_IN_ZIP}/recsys_edu/notebook/exercises/nb11.py").decode()
    assert text == (ROOT / "recsys_edu/notebook/exercises/nb11.py").read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no checkout"):
        write_student_edition(tmp_path, tmp_path / "c.zip")


def test_hints_are_cut_out_wherever_they_stand_even_behind_letters_of_several_bytes():
    source = 'x = "ü"; a = Exercise("1", "ö", hints=(\n    "ä",\n    "b"), check=f)\nb = Exercise(hints=("c",))\n'
    assert without_hints(source) == 'x = "ü"; a = Exercise("1", "ö", hints=(), check=f)\nb = Exercise(hints=())\n'
