"""Recorded numbers, checks, hints, the runner and its report, on notebooks made on the spot."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import recsys_edu.notebook as nb
from recsys_edu.notebook.__main__ import main, parse_value
from recsys_edu.notebook.report import figure_html, format_value, tidy_streams
from recsys_edu.notebook.runner import find_notebooks, run_notebooks


def write_notebook(path, *cells, parameters=None):
    made = [new_markdown_cell("# Title")]
    if parameters is not None:
        made.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook = new_notebook(cells=made + [new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


@pytest.mark.notebook
def test_runner_injects_the_profile_and_reads_records_back(tmp_path):
    source = write_notebook(
        tmp_path / "01_toy.ipynb",
        "from recsys_edu.notebook import by_profile, record\nimport sys",
        "record('steps', by_profile(profile, ci=3, course=30, full=300))\nrecord('rate', rate)",
        "record('python', sys.executable)",
        parameters="profile = 'course'\nrate = 0.5",
    )
    (run,) = run_notebooks([source], {"profile": "ci", "rate": 0.25}, tmp_path / "out", timeout_s=120)
    assert run.error is None
    assert run.records == {"steps": 3, "rate": 0.25, "python": sys.executable}
    assert not nbformat.read(source, 4).cells[2].outputs, "the source stays as it was"


@pytest.mark.notebook
def test_a_failing_cell_is_shown(tmp_path, capsys):
    source = write_notebook(tmp_path / "01_wrong.ipynb", "print('so far')", "1 / 0")
    out = tmp_path / "out"
    assert main(["run", str(source), "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "FAILED 01_wrong" in shown.out
    assert re.search(r"cell \d+:\n    1 / 0", shown.err) and "ZeroDivisionError" in shown.err
    index = (out / "index.html").read_text()
    assert "ZeroDivisionError" in index and 'href="01_wrong.html"' in index


@pytest.mark.notebook
def test_a_notebook_that_hangs_is_stopped(tmp_path, capsys):
    source = write_notebook(tmp_path / "01_slow.ipynb", "import time", "time.sleep(600)")
    assert main(["run", str(source), "--out", str(tmp_path / "out"), "--timeout", "10", "--no-html"]) == 1
    assert "stopped after its time limit of 10 s" in capsys.readouterr().err


@pytest.mark.notebook
def test_the_page_draws_plotly_without_a_network(tmp_path):
    cells = [
        "import plotly.graph_objects as go",
        "go.Figure(go.Bar(y=[1, 2, 3], name='</script>bars'))",
        "go.Figure(go.Scatter(y=[1, 2, 3])).show()",
        "from recsys_edu.notebook import explore\nexplore(lambda size: f'drawn with {size}', size=(1, 9, 4))",
        "box = [w for w in __import__('ipywidgets').Widget.widgets.values() if hasattr(w, 'max')]\nbox[0].value = 7",
    ]
    source = write_notebook(tmp_path / "01_figure.ipynb", *cells)
    out = tmp_path / "out"
    assert main(["run", str(source), "--out", str(out)]) == 0
    page = (out / "01_figure.html").read_text()
    assert page.count("Plotly.newPlot(") >= 2 and page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link)[^>]*(src|href)=\"https?://", page)
    assert "sliders here" in page and "drawn with 7" in page, "the slider replaced the drawing"


def test_a_wrong_call_says_what_it_knows(tmp_path, capsys, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "01_toy.ipynb", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "77"]) == 2
    assert "no notebook '77'" in capsys.readouterr().err
    assert [path.name for path in find_notebooks(["01"])] == ["01_toy.ipynb"]
    assert [path.name for path in find_notebooks()] == ["01_toy.ipynb"]


def test_record_takes_numbers_and_refuses_the_rest(capsys):
    nb.record("auc", torch.tensor(0.75))
    assert capsys.readouterr().out == "auc = 0.75\n"
    with pytest.raises(ValueError, match="nan"):
        nb.record("loss", float("nan"))
    with pytest.raises(TypeError, match="one number"):
        nb.record("loss", torch.zeros(3))
    with pytest.raises(TypeError, match="dict"):
        nb.record("loss", {})
    with pytest.raises(ValueError, match="name"):
        nb.record("", 1)


def test_profiles():
    assert nb.by_profile("ci", ci=1, course=2, full=3) == 1
    with pytest.raises(ValueError, match="ci, course, full"):
        nb.by_profile("fast", ci=1, course=2, full=3)


def test_parameters_on_the_command_line_are_literals_or_text():
    assert parse_value("512") == 512 and parse_value("[1, 2]") == [1, 2] and parse_value("adam w") == "adam w"


def test_figure_data_cannot_end_the_script():
    text = figure_html({"data": [{"name": "</script>"}], "layout": {}}, "x")
    assert text.count("</script>") == 1 and json.dumps("</script>").replace("</", "<\\/") in text


def test_explore_refuses_a_start_outside_its_range():
    with pytest.raises(ValueError, match="outside 1 to 5"):
        nb.explore(print, size=(1, 5, 9))
    with pytest.raises(ValueError, match="expected"):
        nb.explore(print, size=3)


def test_format_value():
    assert format_value(0.123456789) == "0.123457" and format_value(7) == "7"


def test_importing_the_machinery_needs_no_notebook_packages():
    code = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('IPython', 'ipywidgets', 'plotly', 'papermill')})\n"
        "import recsys_edu.notebook as nb\nnb.record('auc', 0.5)\nnb.predict('Rows?', 3)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "auc = 0.5" in ran.stdout and "Answer: 3" in ran.stdout


@pytest.mark.notebook
def test_hints_come_one_at_a_time_and_a_wrong_answer_is_explained(tmp_path):
    cells = [
        "from recsys_edu.notebook import CheckFailed, check, exercise, hint",
        "exercise('01.1')",
        "hint('01.1')",
        "hint('01.1')",
        "try:\n    check('01.1', lambda lengths: lengths)\nexcept CheckFailed as failure:\n    print(failure)",
        "try:\n    check('01.1', lambda lengths: 1 / 0)\nexcept CheckFailed as failure:\n    print(failure)",
        "check('01.1', lambda lengths: None)",
    ]
    source = write_notebook(tmp_path / "01_toy.ipynb", *cells)
    (run,) = run_notebooks([source], {}, tmp_path / "out", timeout_s=120)
    assert run.error is None and run.records == {"exercise 01.1": 0}
    outputs = [cell.outputs for cell in nbformat.read(run.executed, 4).cells if cell.cell_type == "code"]
    header, first, second, wrong, raised, stub = (out[0] for out in outputs[1:])
    assert "difficulty" in header.data["text/plain"]
    assert "hint 1 of 3" in first.data["text/plain"] and "hint 2 of 3" in second.data["text/plain"]
    assert "expected" in wrong.data["text/plain"] and "got" in wrong.data["text/plain"]
    assert "your answer raised ZeroDivisionError: division by zero" in raised.data["text/plain"]
    assert "not attempted yet" in stub.data["text/plain"]


def test_an_unknown_exercise_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"01\.1, 01\.2, 01\.3"):
        nb.exercise("01.9")
    with pytest.raises(KeyError, match="numbers look like"):
        nb.check("99.1", print)


def test_progress_bars_are_shown_by_their_last_state():
    pieces = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in ("\r 0%", "\r50%", "\r99%\n")]
    (tidy,) = tidy_streams(pieces)
    assert tidy.text == "99%\n" and tidy.name == "stdout"
    printed = [nbformat.v4.new_output("stream", name="stdout", text="a\n"), nbformat.v4.new_output("display_data")]
    assert [output.output_type for output in tidy_streams(printed)] == ["stream", "display_data"]
