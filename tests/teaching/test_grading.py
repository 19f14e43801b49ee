"""Grading of notebooks that come back right, wrong, hanging, hungry, crashing, faked, or not at all."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from recsys_edu.notebook.record import RECORD_MIME
from recsys_edu.notebook.teaching.grade import VERDICTS, Grade, course_titles, grade_folder, main, write_csv
from recsys_edu.notebook.teaching.limits import Limits, bare_environment, run_limited
from recsys_edu.notebook.teaching.returned import answers_in, definitions_in, find_returned

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"01": "01_jagged_tensors", "11": "11_table_wise"}
HEADER = "import torch\nfrom recsys_edu.notebook import check, record"
RIGHT = "def offsets_of(lengths):\n    zero = lengths.new_zeros(1)\n    return torch.cat([zero, lengths.cumsum(0)])\n"
CHECK = "check('01.1', offsets_of)"


def hand_in(folder, student, *cells, title="01_jagged_tensors"):
    path = folder / student / f"{title}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in (HEADER, *cells)]), path)
    return path


def grades_of(folder, limits, **options):
    grades = grade_folder(folder, TITLES, limits, **options)
    assert all(each.verdict in VERDICTS and each.points == (each.verdict == "correct") for each in grades)
    return {(each.student, each.exercise): each for each in grades}


@pytest.mark.notebook
@pytest.mark.timeout(600)
def test_right_wrong_and_faked_notebooks_that_also_run_from_top_to_bottom(tmp_path):
    hand_in(tmp_path, "right", RIGHT + CHECK, "1 / 0")
    hand_in(tmp_path, "wrong", "def offsets_of(lengths):\n    return lengths\n" + CHECK)
    fake = hand_in(tmp_path, "faker", "def offsets_of(lengths):\n    return lengths", "check = lambda *_: None",
                   CHECK, "record('exercise 01.1', 1)")  # fmt: skip
    pasted = nbformat.read(fake, 4)
    pasted.cells[3].outputs = [
        new_output("display_data", {RECORD_MIME: {"name": "exercise 01.2", "value": 1, "unit": ""}})
    ]
    nbformat.write(pasted, fake)
    found = grades_of(tmp_path, Limits(seconds=120))
    right, wrong, faker = (found[student, "01.1"] for student in ("right", "wrong", "faker"))
    assert (right.verdict, right.points, right.recorded) == ("correct", 1, "1")
    assert right.ran == "ran; cells 3 failed", "the injected parameters are cell 0"
    assert (wrong.verdict, wrong.points, wrong.recorded) == ("wrong", 0, "") and "expected" in wrong.message
    assert (faker.verdict, faker.points, faker.recorded) == ("look", 0, "1") and "second check" in faker.message
    assert found["faker", "01.2"].recorded == "", "outputs that were handed in are not looked at"
    assert found["right", "01.3"].verdict == "no answer"


@pytest.mark.timeout(600)
def test_one_answer_that_hangs_eats_memory_or_ends_the_process_does_not_take_the_others_along(tmp_path):
    second = "def padded(values, offsets, width):\n    {}\ncheck('01.2', padded)"
    third = "def permute(lengths_FB, values, order):\n    ...\ncheck('01.3', permute)"
    bodies = {
        "slow": "while True: pass",
        "hungry": "return torch.ones(1 << 33)",
        "crashing": "import os; os._exit(7)",
        "replacing": "torch.equal = lambda *_: True; return values",
    }
    for student, body in bodies.items():
        hand_in(tmp_path, student, RIGHT + CHECK, second.format(body), third)
    found = grades_of(tmp_path, Limits(seconds=20, memory_gib=3), run_notebooks=False)
    assert {found[student, "01.1"].verdict for student in bodies} == {"correct"}
    verdicts = {student: found[student, "01.2"].verdict for student in bodies}
    assert verdicts == {"slow": "time", "hungry": "memory", "crashing": "crashed", "replacing": "tampered"}
    assert {found[student, "01.3"].verdict for student in bodies} == {"not attempted"}
    assert "ended with 7" in found["crashing", "01.2"].message and "20 s" in found["slow", "01.2"].message


@pytest.mark.notebook
@pytest.mark.timeout(600)
def test_a_notebook_that_hangs_or_whose_kernel_dies_is_stopped_and_its_answers_still_count(tmp_path):
    hand_in(tmp_path, "slow", RIGHT + CHECK, "import time; time.sleep(600)")
    hand_in(tmp_path, "dead", RIGHT + CHECK, "import os; os._exit(1)")
    found = grades_of(tmp_path, Limits(seconds=25))
    assert found["slow", "01.1"].points == found["dead", "01.1"].points == 1
    assert found["slow", "01.1"].ran == "stopped: over 25 s after cell 2" and found["slow", "01.1"].recorded == "1"
    assert found["dead", "01.1"].ran.startswith("crashed: the kernel died")


def test_missing_and_unreadable_notebooks_have_rows_of_their_own(tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "11_table_wise.ipynb").write_text('{"cells": [')
    found = grades_of(tmp_path, Limits(), chapters=["01", "11"], run_notebooks=False)
    assert found["torn", "01.1"].verdict == "missing"
    assert found["torn", "11.1"].verdict == "unreadable" and "not a notebook" in found["torn", "11.1"].message


def test_who_returned_what_is_read_from_folders_and_from_names(tmp_path):
    hand_in(tmp_path, "alice", "1", title="11_table_wise")
    hand_in(tmp_path, "bob/week 3", "1", title="11_table_wise (2)")
    hand_in(tmp_path, ".", "1", title="11_table_wise_carol")
    hand_in(tmp_path, "alice/.ipynb_checkpoints", "1", title="01_jagged_tensors")
    found = {(each.student, each.chapter) for each in find_returned(tmp_path, TITLES)}
    assert found == {("alice", "11"), ("bob", "11"), ("carol", "11")}
    with pytest.raises(FileNotFoundError, match="no notebook of the course"):
        find_returned(tmp_path / "alice" / ".ipynb_checkpoints", {"02": "02_x"})


def test_answers_are_taken_from_definitions_only():
    cells = [
        "import torch\nwidth = 8\nmodel = train_for_hours()\ntorch.equal = None\nfor i in range(3): print(i)",
        "%matplotlib inline\ndef f(x): return x\n\npicture = '0' * 3\ncheck('14.3', picture)\ncheck('11.1', f)",
        "this is no python",
    ]
    answers = answers_in(cells)
    assert {number: node.id for number, node in answers.items()} == {"14.3": "picture", "11.1": "f"}
    kinds = [type(node).__name__ for node in definitions_in(cells)]
    assert kinds == ["Import", "Assign", "FunctionDef", "Assign"]


def test_a_process_sees_no_secrets_and_a_whole_family_counts_against_the_memory_limit(tmp_path, monkeypatch):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    environment = bare_environment(tmp_path, {})
    assert "SOME_TOKEN" not in environment and environment["HOME"] == str(tmp_path)
    child = "import time; held = bytearray(150 << 20); time.sleep(60)"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"import subprocess, sys, time; [{start} for _ in 'abc']; time.sleep(60)"
    ending = run_limited([sys.executable, "-c", parent], Limits(60, 0.3), environment, tmp_path)
    assert ending.stopped == "memory" and ending.seconds < 60
    mine = [each for each in psutil.process_iter(["cmdline"]) if child in (each.info["cmdline"] or [])]
    assert not mine, "nothing is left behind"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no resource limits")
def test_the_operating_system_refuses_one_process_more_than_its_limit(tmp_path):
    code = "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    print('refused')"
    ending = run_limited([sys.executable, "-c", code], Limits(30, 1), bare_environment(tmp_path, {}), tmp_path)
    if sys.platform == "linux":
        assert ending.log.strip() == "refused"


def test_a_cell_of_the_csv_cannot_become_a_formula(tmp_path):
    grade = Grade("=cmd()", "01", "01.1", 1, "correct", "1", "ran", 1.0, 7, "-1+1")
    write_csv([grade], tmp_path / "grades.csv")
    (row,) = csv.DictReader((tmp_path / "grades.csv").open())
    assert row["student"] == "'=cmd()" and row["message"] == "'-1+1" and row["points"] == "1"


def test_the_command_says_what_it_does_not_know(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2 and "no folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--notebooks", "99"]) == 2
    assert "no exercises in notebook 99" in capsys.readouterr().err
    assert course_titles(ROOT / "notebooks")["11"] == "11_table_wise"


@pytest.mark.timeout(600)
def test_the_courses_own_solutions_get_full_points(tmp_path):
    for path in sorted((ROOT / "notebooks" / "solutions").glob("1[14]_*.ipynb")):
        target = tmp_path / "teacher" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "grades.csv"
    assert main([str(tmp_path), "--checks-only", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 6 and not [row for row in rows if row["verdict"] != "correct"]
    assert json.loads(rows[0]["seed"]) >= 0
