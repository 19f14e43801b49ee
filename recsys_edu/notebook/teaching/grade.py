"""Grade returned notebooks into a CSV: every notebook runs under limits, and every answer is checked a second time.

    recsys_edu grade returned/ --out grades.csv --notebooks 11 12

What decides is the second check, in a fresh process that takes only definitions from the notebook (recheck.py): a
pasted output, an overwritten `check` or `record`, or a saved "correct" earn nothing. What this does not defend
against is in docs/teaching.md: it is a grader for a class, not a jail.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from recsys_edu.notebook.exercise import Exercise
from recsys_edu.notebook.teaching.limits import Ending, Limits, bare_environment, run_limited
from recsys_edu.notebook.teaching.returned import Returned, find_returned

VERDICTS = (
    "correct", "wrong", "not attempted", "no answer", "time", "memory", "crashed", "tampered", "look", "missing",
    "unreadable",
)  # fmt: skip


@dataclass(frozen=True)
class Grade:
    """One exercise of one student.

    `verdict` is one of VERDICTS and `points` is 1 for "correct" alone. `recorded` is what the notebook itself said
    when it was run here (1 passed, 0 not attempted, empty: nothing, which a failed check leaves). "look" means that
    it said passed and the second check did not agree: a person should look.
    """

    student: str
    notebook: str
    exercise: str
    points: int
    verdict: str
    recorded: str
    ran: str
    seconds: float
    seed: int
    message: str


def course_titles(folder: Path) -> dict[str, str]:
    """The notebooks of the course that have exercises: {"11": "11_table_wise"}."""
    titles = {path.stem[:2]: path.stem for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    return {chapter: title for chapter, title in titles.items() if exercises_of(chapter)}


def exercises_of(chapter: str) -> tuple[Exercise, ...]:
    """The exercises of a notebook; none where it has no file of them."""
    try:
        return importlib.import_module(f"recsys_edu.notebook.exercises.nb{chapter}").EXERCISES
    except ModuleNotFoundError:
        return ()


def grade_folder(
    folder: Path,
    titles: dict[str, str],
    limits: Limits,
    *,
    chapters: Sequence[str] = (),
    run_notebooks: bool = True,
    jobs: int = 1,
) -> list[Grade]:
    """Grades for every student found in `folder`, for `chapters` or for all that anybody returned.

    `run_notebooks=False` leaves out the run from top to bottom, which takes most of the time, and only checks answers.
    """
    returned = find_returned(folder, titles)
    wanted = sorted(chapters or {each.chapter for each in returned})
    by_key = {(each.student, each.chapter): each for each in returned}
    keys = [(student, chapter) for student in sorted({each.student for each in returned}) for chapter in wanted]

    def grade(key: tuple[str, str]) -> list[Grade]:
        student, chapter = key
        if key not in by_key:
            return [_missing(student, titles[chapter], each.number) for each in exercises_of(chapter)]
        return grade_one(by_key[key], titles[chapter], limits, run_notebooks)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return [row for rows in pool.map(grade, keys) for row in rows]


def grade_one(returned: Returned, title: str, limits: Limits, run_notebook: bool = True) -> list[Grade]:
    """Run one notebook under `limits`, then check each of its answers again in a process of its own."""
    numbers = [each.number for each in exercises_of(returned.chapter)]
    with tempfile.TemporaryDirectory(prefix="recsys_edu-grade-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        problem = _unreadable(returned.path)
        if problem:
            common = {"recorded": "", "ran": "not run", "seconds": 0.0, "seed": 0, "message": problem}
            return [Grade(returned.student, title, each, 0, "unreadable", **common) for each in numbers]
        records, ran, seconds = ({}, "not run", 0.0)
        if run_notebook:
            records, ran, seconds = _rerun(returned.path, folder, limits)
        seeds = {number: secrets.randbits(48) for number in numbers}
        found = _recheck(returned.path, folder, numbers, seeds, limits)
    grades = []
    for number in numbers:
        verdict, message = found[number]
        recorded = str(records.get(f"exercise {number}", ""))
        if recorded == "1" and verdict in ("wrong", "not attempted", "no answer"):
            message = f"the notebook says passed, the second check says {verdict}: {message}"
            verdict = "look"
        points = int(verdict == "correct")
        grades.append(
            Grade(
                returned.student,
                title,
                number,
                points,
                verdict,
                recorded,
                ran,
                round(seconds, 1),
                seeds[number],
                message,
            )
        )
    return grades


def write_csv(grades: Iterable[Grade], path: Path) -> None:
    """One line per student and exercise. A cell that a spreadsheet would take for a formula is made text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Grade)])
            writer.writeheader()
            writer.writerows({name: _plain(value) for name, value in asdict(grade).items()} for grade in grades)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def summary(grades: Sequence[Grade]) -> str:
    """Points by student as a plain-text table, and what needs a person's eye."""
    lines = []
    for student in dict.fromkeys(each.student for each in grades):
        mine = [each for each in grades if each.student == student]
        others = [f"{each.exercise} {each.verdict}" for each in mine if each.verdict != "correct"]
        lines.append(f"{student:<24} {sum(each.points for each in mine):>3} of {len(mine):<3} {', '.join(others)}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command `recsys_edu grade`; 0 when all were graded, whatever the grades."""
    from recsys_edu.notebook.runner import notebooks_folder

    parser = argparse.ArgumentParser(prog="recsys_edu grade", description="Grade returned notebooks into a CSV.")
    parser.add_argument("folder", type=Path, help="a folder for each student, or loose notebooks with names in them")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"))
    parser.add_argument("--notebooks", nargs="+", default=[], metavar="NN", help="which (default: all that came back)")
    parser.add_argument("--seconds", type=float, default=300, help="limit of each notebook and each check (300)")
    parser.add_argument("--memory-gib", type=float, default=4, help="limit of each notebook with its ranks (4)")
    parser.add_argument("--jobs", type=int, default=1, help="how many notebooks at once (1)")
    parser.add_argument("--checks-only", action="store_true", help="do not run notebooks from top to bottom")
    options = parser.parse_args(arguments)
    titles = course_titles(notebooks_folder())
    chapters = [name[:2] for name in options.notebooks]
    unknown = [chapter for chapter in chapters if chapter not in titles]
    if unknown:
        print(f"no exercises in notebook {', '.join(unknown)}; there are some in {', '.join(titles)}", file=sys.stderr)
        return 2
    try:
        limits = Limits(options.seconds, options.memory_gib)
        grades = grade_folder(
            options.folder,
            titles,
            limits,
            chapters=chapters,
            run_notebooks=not options.checks_only,
            jobs=max(1, options.jobs),
        )
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(grades))
    try:
        write_csv(grades, options.out)
    except OSError as error:  # the grades took minutes, so they are shown in any case
        print(f"\nthe grades above are not in {options.out}: {error}", file=sys.stderr)
        return 1
    print(f"\ngrades: {options.out}")
    return 0


def _rerun(source: Path, folder: Path, limits: Limits) -> tuple[dict[str, object], str, float]:
    """(recorded numbers, "ran" or what went wrong, seconds)."""
    import nbformat

    from recsys_edu.notebook.record import read_records
    from recsys_edu.notebook.runner import read_executed

    executed = folder / "executed.ipynb"
    arguments = ["rerun", str(source), str(executed), json.dumps({"profile": "ci"})]
    ending = _python(arguments, folder, limits)
    notebook = read_executed(executed) or nbformat.v4.new_notebook()
    records, cells = read_records(notebook), notebook.cells
    failed = [
        index for index, cell in enumerate(cells) if any(o.output_type == "error" for o in cell.get("outputs", ()))
    ]
    if ending.stopped:
        return records, f"stopped: {_limit_text(ending, limits)} after cell {_last_executed(cells)}", ending.seconds
    if ending.returncode == 3:
        return records, f"crashed: the kernel died after cell {_last_executed(cells)}", ending.seconds
    if ending.returncode != 0:
        return records, f"crashed: {ending.log.strip().splitlines()[-1:] or ['no word']}", ending.seconds
    return records, "ran" if not failed else f"ran; cells {', '.join(map(str, failed))} failed", ending.seconds


def _recheck(
    source: Path, folder: Path, numbers: Sequence[str], seeds: dict[str, int], limits: Limits
) -> dict[str, tuple[str, str]]:
    """(verdict, message) of every exercise. A process that ends in the middle of one is started again for the rest."""
    found: dict[str, tuple[str, str]] = {}
    while left := [number for number in numbers if number not in found]:
        results = folder / f"results-{secrets.token_hex(8)}"
        arguments = ["recheck", str(source), str(results), json.dumps([seeds[number] for number in left]), *left]
        ending = _python(arguments, folder, limits)
        lines = (
            [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
        )
        found |= {line["exercise"]: (line["verdict"], line["message"]) for line in lines if "verdict" in line}
        begun = [line["exercise"] for line in lines if line["exercise"] not in found]
        what = _what_ended(ending, limits)
        if begun:
            found[begun[0]] = what
        elif not lines:  # it ended in the definitions, before any answer: so it would for the rest
            found |= dict.fromkeys(left, what)
    return found


def _python(arguments: Sequence[str], folder: Path, limits: Limits) -> Ending:
    from recsys_edu.notebook.runner import kernel_environment

    module, *rest = arguments
    environment = kernel_environment(folder / "kernel", jobs=os.cpu_count() or 1)
    own = {name: environment[name] for name in ("JUPYTER_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "PLOTLY_RENDERER")}
    data = Path(__file__).resolve().parents[3] / "data"
    if data.is_dir():
        own["RECSYS_EDU_DATA"] = os.environ.get("RECSYS_EDU_DATA", str(data))
    command = [sys.executable, "-m", f"recsys_edu.notebook.teaching.{module}", *rest]
    return run_limited(command, limits, bare_environment(folder, own), folder)


def _what_ended(ending: Ending, limits: Limits) -> tuple[str, str]:
    if ending.stopped:
        return ending.stopped, f"stopped: {_limit_text(ending, limits)}"
    last = ending.log.strip().splitlines()[-1:]
    return "crashed", f"its process ended with {ending.returncode}" + (f": {last[0]}" if last else "")


def _limit_text(ending: Ending, limits: Limits) -> str:
    return f"over {limits.seconds:g} s" if ending.stopped == "time" else f"over {limits.memory_gib:g} GiB"


def _last_executed(cells: Sequence) -> int | str:
    done = [index for index, cell in enumerate(cells) if cell.get("execution_count")]
    return done[-1] if done else "none"


def _unreadable(path: Path) -> str:
    import nbformat

    try:
        nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        return f"not a notebook: {type(error).__name__}: {str(error)[:200]}"
    return ""


def _missing(student: str, title: str, number: str) -> Grade:
    return Grade(student, title, number, 0, "missing", "", "not run", 0.0, 0, "no notebook came back")


def _plain(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
