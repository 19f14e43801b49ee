"""The training programs' arguments: numbers are checked, --help knows the defaults, mistakes are one line, status 2."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_edu.examples import command_line
from recsys_edu.examples.command_line import CommandLineError, number, one_line, users_mistakes, whole_number

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["train_dlrm", "train_two_tower", "train_sequence"]


def parse(program: str, *arguments: str):
    return importlib.import_module(f"recsys_edu.examples.{program}").parse_arguments(list(arguments))


def options_of(program: str, monkeypatch) -> list:
    """Every option of the program's parser."""
    made = []
    original = command_line.add_option

    def noted(parser, name, **settings):
        made.append((name, settings))
        original(parser, name, **settings)

    module = importlib.import_module(f"recsys_edu.examples.{program}")
    with monkeypatch.context() as patched:
        patched.setattr(module, "add_option", noted)
        module.parse_arguments([])
    return made


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_number_is_taken_unchecked(program: str, monkeypatch) -> None:
    """Every option with a value refuses a negative number, text and nothing at all; -0.5 and nan where it takes 0.5."""
    checked = 0
    for name, settings in options_of(program, monkeypatch):
        if settings.get("action") or settings.get("choices") or name in ("--data", "--out", "--features", "--sharding"):
            continue
        for bad in ("-1", "-0.5", "nan", "inf", "many", ""):
            with pytest.raises(CommandLineError, match=rf"argument {name}: expected a (whole )?number .* got '{bad}'"):
                parse(program, f"{name}={bad}")
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_tells_every_default(program: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(program, "--help")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    entries = shown.split(" --")[1:]
    switches = ("help", "check", "verbose", "load-ahead", "tensorboard")
    for entry in entries:
        if not entry.startswith(switches) and not entry.startswith("no-"):
            followed = "--" + entry
            assert "(default: " in followed or f"{entry.split(',')[0]}, --no-" in shown, followed


@pytest.mark.parametrize(
    "program, arguments, told",
    [
        ("train_dlrm", ["--steps", "0"], "argument --steps: expected a whole number of 1 or more, got '0'"),
        ("train_dlrm", ["--dataset", "netflix"], "invalid choice: 'netflix'"),
        ("train_dlrm", ["--epochx", "3"], "unrecognized arguments: --epochx 3"),
        ("train_dlrm", ["--data", "nowhere"], "argument --data: 'nowhere' is not there"),
        ("train_dlrm", ["--data", __file__], "is no folder"),
        ("train_dlrm", ["--out", f"{__file__}/run"], "is a file"),
        ("train_dlrm", ["--patience", "2"], "--patience needs --out FOLDER"),
        ("train_dlrm", ["--tensorboard"], "--tensorboard needs --out FOLDER"),
        ("train_dlrm", ["--patience", "1", "--out", "run", "--evaluate-every", "0"], "makes only one, at the end"),
        ("train_dlrm", ["--dataset", "synthetic-criteo", "--data", "."], "is made, not read"),
        ("train_two_tower", ["--temperature", "0"], "expected a number above 0, got '0'"),
        ("train_two_tower", ["--protocol", "rating", "--num-hard", "3"], "--num-hard: the rating protocol has no"),
        ("train_sequence", ["--dropout", "1"], "expected a number of 0 or more and below 1, got '1'"),
        ("train_sequence", ["--dim", "7"], "2 heads of attention do not divide it"),
    ],
)
def test_a_mistake_is_told_in_one_line(program: str, arguments: list[str], told: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        parse(program, *arguments)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_settings_reach_the_models() -> None:
    from recsys_edu.examples import train_sequence, train_two_tower
    from recsys_edu.retrieval.sequence_training import SequenceSettings
    from recsys_edu.retrieval.training import TowerSettings

    assert train_sequence.sequence_settings(parse("train_sequence"), 0) == SequenceSettings()
    changed = parse("train_sequence", "--dim", "8", "--dropout", "0", "--learning-rate", "1e-2")
    assert train_sequence.sequence_settings(changed, 3) == SequenceSettings(
        dim=8, dropout=0.0, learning_rate=0.01, seed=3
    )
    assert train_two_tower.tower_settings(parse("train_two_tower"), 0) == TowerSettings()
    changed = parse("train_two_tower", "--features", "user,item,title", "--no-log-q")
    assert train_two_tower.tower_settings(changed, 0) == TowerSettings(features=("user", "item", "title"), log_q=False)


def test_numbers() -> None:
    assert whole_number(0)("0") == 0 and number(above=0)("1e-9") == 1e-9 and number(at_least=0, below=1)("0") == 0.0


def test_errors_of_files_and_settings_become_one_line() -> None:
    with pytest.raises(CommandLineError, match=r"^one two$") as caught, users_mistakes():
        raise ValueError("one\n  two")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ZeroDivisionError), users_mistakes():  # a bug keeps its traceback
        _ = 1 / 0
    with pytest.raises(CommandLineError, match=r"^as it is$"), users_mistakes():
        raise CommandLineError("as it is")
    with pytest.raises(CommandLineError) as missing, users_mistakes():
        Path("/nowhere/at/all").read_text()
    assert str(missing.value) == "/nowhere/at/all: No such file or directory"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("a\n b\nc\nd\ne")) == "a b c (and 2 more)"


def run(*arguments: str, program: str = "train_dlrm", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"recsys_edu.examples.{program}", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_program_prints_the_line_and_no_traceback(tmp_path) -> None:
    done = run("--dataset", "criteo", "--data", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"train_dlrm: error: {tmp_path}: expected <day>_dense.npy (and sparse, labels) of two days, found []\n"
    )


def test_a_rank_says_who_it_is(tmp_path) -> None:
    done = run("--sharding", "diagonal", "--dataset", "synthetic-criteo", RANK="0", WORLD_SIZE="1", MASTER_PORT="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train_dlrm, rank 0: error: " in done.stderr and "MASTER_ADDR" in done.stderr
