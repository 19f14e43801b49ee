"""Every notebook and every solution runs in the ci profile, learns what it claims, and is committed clean.

Ranges are wide enough for another machine and another seed, and narrow enough that a model that learns
nothing falls outside.
"""

import statistics
from pathlib import Path

import nbformat
import pytest

from recsys_edu.datasets.download import DataUnavailableError, fetch_movielens_100k
from recsys_edu.notebook.exercise import find_exercise
from recsys_edu.notebook.runner import find_notebooks, run_notebooks

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = find_notebooks(folder=FOLDER)
SOLUTIONS = find_notebooks(["solutions"], folder=FOLDER)
EVERY = [*NOTEBOOKS, *SOLUTIONS]

# notebook: recorded number: (lowest, highest)
# Times depend on the machine and its load: they must be there and be positive, no more.
POSITIVE = (1e-9, float("inf"))
EXPECTED = {
    "00_start_here": {
        "auc": (0.785, 0.82),
        "auc of biases": (0.765, 0.795),
        "probability of the first recommendation": (0.7, 1.0),
        "AUC on two ranks": (0.785, 0.82),
        "int8: AUC lost": (-0.001, 0.001),
        "int8: bytes saved, times": (1.9, 2.1),
    },
    "01_jagged_tensors": {
        "padding waste, MovieLens": (0.84, 0.87),
        "jagged speed-up over padded": POSITIVE,
    },
    "02_embedding_bags_and_kernels": {
        "streaming bandwidth": POSITIVE,
        "gather bandwidth, 256-byte rows": POSITIVE,
        "one call over 26 calls, batch of 64": POSITIVE,
        "one call over 26 calls, batch of 2,048": POSITIVE,
        "lookup, share of gather bandwidth": POSITIVE,
        "fused against autograd, largest difference": (0.0, 1e-5),
        "fused step over dense gradient": POSITIVE,
        "fused step over sparse gradient": POSITIVE,
    },
    "03_dlrm": {
        "share of weights in tables": (0.99, 1.0),
        "synthetic Criteo: AUC": (0.72, 0.79),
        "synthetic Criteo: best possible AUC": (0.77, 0.81),
        "synthetic Criteo: normalised entropy": (0.8, 0.92),
        "synthetic Criteo: calibration": (0.85, 1.15),
        "MovieLens: AUC": (0.785, 0.82),
        "MovieLens: AUC of biases": (0.765, 0.795),
        "MovieLens: normalised entropy": (0.7, 0.85),
        "MovieLens: calibration": (0.93, 1.07),
        "MovieLens: AUC lost without the film's mean": (0.005, 0.2),
    },
    "04_two_towers": {
        "top-100, seen kept": (0.2134, 0.45),
        "top-100, seen removed": (0.55, 0.65),
        "top-100 without the correction, seen removed": (0.2, 0.4),
        "RecBole's protocol: recall@10": (0.2416, 0.3),
        "best recall@100 of an approximate index": (0.8, 1.0),
        "rating RMSE": (0.88, 0.94),
        "rating RMSE of biases": (0.93, 0.955),
        "share of science fiction, horror, action, thriller in a fan's list": (0.3, 1.0),
    },
    "05_sequences": {
        "EASE: Hit@10": (0.138, 0.144),
        "popularity: Hit@10": (0.083, 0.089),
        "pairs compared, padded over ragged": (1.3, 2.5),
        "pairs computed in groups, over ragged": (1.0, 1.3),
        "SASRec: Hit@10": (0.135, 0.21),
        "SASRec, order lost: Hit@10": (0.06, 0.135),
        "share of science fiction, action, horror in a fan's list": (0.4, 1.0),
        "BERT4Rec: Hit@10": (0.05, 0.2),
    },
    "10_talking_ranks": {
        "bytes of embeddings per byte of ids": (10.0, 11.5),
        "share of moved bytes that cross hosts": (0.66, 0.674),
        "KiB between hosts, four real ranks": (17.0, 18.5),
    },
    "11_table_wise": {
        "bytes back per byte of ids": (3.55, 3.56),
        "heaviest rank over average, memory": (2.0, 2.05),
        "busiest rank over average, traffic": (2.0, 2.5),
        "rows with a gradient": (3, 3),
    },
    "12_row_wise": {
        "bytes back, row-wise over table-wise": (4.0, 4.0),
        "busiest rank over average, films as numbered": (2.0, 2.7),
        "busiest rank over average, uneven blocks": (1.0, 1.05),
        "busiest rank over average, shuffled": (1.0, 1.1),
    },
    "13_column_wise": {
        "ids per bag from which row-wise is cheaper": (33, 33),
        "busiest rank over average, column-wise": (1.0, 1.0),
        "busiest rank over average, row-wise": (4.0, 4.0),
    },
    "14_table_row_wise_and_grid": {
        "flat over two hops, 2 ranks per host": (2.0, 2.0),
        "flat over two hops, 4 ranks per host": (4.0, 4.0),
        "row-wise over grid, bytes between hosts": (2.5, 2.9),
        "bytes between hosts, grid on real ranks": (450, 520),
    },
    "15_the_planner": {
        "work on all ranks, row-wise over table-wise": (3.9, 4.1),
        "planner over greedy by hand": (0.8, 1.0),
        "gap to the bound": (0.0, 0.05),
        "cost of the demands": (1.0, 2.0),
        "8 GiB and host memory over 10 GiB without": (0.5, 1.5),
        "ms of a step's lookups here": POSITIVE,
        "numbers held on both ranks over numbers in the tables": (1.0, 1.1),  # small tables may be copied
    },
    "16_a_trillion_parameters": {
        "1.25T: gap to the bound": (0.0, 0.15),
        "1.25T: seconds of planning": POSITIVE,
        "3T: ranks of 80 GiB that suffice": (168, 168),
        "3T: host memory over two more hosts than the fewest": (0.9, 1.3),
        "3T: gap to the bound": (0.0, 0.5),
        "bytes on all ranks over bytes of the model": (0.5, 1.5),
        "1.25T: share of a step that is computing": (0.03, 0.2),
        "DLRM, weak: throughput of 4,096 ranks over 8": (5.0, 512.0),
    },
    "17_the_pipelined_trainer": {
        "simulated speed-up": (1.67, 1.68),
        "simulated share hidden": (0.8, 0.81),
        "waits for sizes and ids, base": POSITIVE,
        "waits for sizes and ids, sparse-dist": (0, float("inf")),
        "waiting that sparse-dist takes away, over the delay": (0.5, 50),  # 2 on a quiet machine, 0 without overlap
        "speed-up on the slow network": POSITIVE,
        "AUC after a few steps": (0.62, 0.76),
        "steps with the same loss after a restart": (30, 30),
    },
    "18_checkpoints_and_resharding": {
        "share of the table that travelled": (0.75, 0.75),
        "last loss over first": (0.0, 0.7),
        "largest difference of losses, resumed on two": (0.0, 1e-4),
    },
    "20_quantisation": {
        "relative error, one grid over a grid per row": (50.0, 500.0),
        "lookup, float32 time over int8 time": POSITIVE,
        "AUC, float32": (0.785, 0.82),
        "AUC lost, FP16": (-0.0002, 0.0002),
        "AUC lost, INT8": (-0.0005, 0.0005),
        "AUC lost, INT4": (-0.005, 0.005),
        "AUC lost with half of the films' rows": (-0.01, 0.02),
        "largest difference, two devices and one": (0.0, 1e-5),
    },
    "21_quantised_inference": {
        "AUC, int8": (0.785, 0.82),
        "time of 256 examples over time of one": POSITIVE,
        "largest difference, two devices and one": (0.0, 1e-4),
        "largest difference, package and model": (0.0, 1e-4),
        "simulated gain from batching": (1.0, 32.1),
        "largest difference, server and model": (0.0, 1e-4),
        "answers a second with batching over one by one": POSITIVE,
        "median ms of a lone client": POSITIVE,
    },
    "30_to_production": {
        "ranks on two hosts": (2, 2),
        "sum on every rank": (24, 24),
        "lines that change": (4, 4),
        "AUC on two launchers": (0.6, 0.82),
    },
}


def name_of(path):
    return f"solutions/{path.stem}" if path in SOLUTIONS else path.stem


@pytest.fixture(scope="session")
def runs(tmp_path_factory, request):
    """The notebooks of the selected tests, executed once through the runner, by path."""
    users = [item for item in request.session.items if item.path == Path(__file__) and "runs" in item.fixturenames]
    wanted = [path for path in EVERY if any(item.callspec.params["path"] == path for item in users)]
    try:
        fetch_movielens_100k()
    except DataUnavailableError as error:
        pytest.skip(f"the notebooks read MovieLens-100K: {error}")
    out = tmp_path_factory.mktemp("notebooks")
    return dict(zip(wanted, run_notebooks(wanted, {"profile": "ci"}, out, timeout_s=600)))


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_runs_to_its_end(path, runs):
    assert runs[path].error is None, runs[path].error


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_recorded_numbers_are_in_range(path, runs):
    records = runs[path].records
    assert EXPECTED[path.stem].keys() <= records.keys()
    outside = {
        name: (records[name], low, high)
        for name, (low, high) in EXPECTED[path.stem].items()
        if not low <= records[name] <= high
    }
    assert not outside, f"(got, lowest, highest): {outside}"


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", SOLUTIONS, ids=name_of)
def test_every_solution_passes_its_check(path, runs):
    chapter = path.stem.split("_")[0]
    exercises = {number for number in numbers_in(FOLDER / path.name) if number.startswith(chapter)}
    assert {f"exercise {number}": 1 for number in exercises}.items() <= runs[path].records.items()


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_stubs_are_reported_as_not_attempted(path, runs):
    assert all(runs[path].records[f"exercise {number}"] == 0 for number in numbers_in(path))


def numbers_in(path):
    """The exercises that a notebook checks."""
    cells = nbformat.read(path, as_version=4).cells
    return {line.split('"')[1] for cell in cells for line in cell.source.splitlines() if line.startswith("check(")}


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_committed_without_outputs_and_with_clean_metadata(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata.language_info) == {"name"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}, cell.source
    assert "/work/" not in path.read_text() and "/tmp/" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_has_what_every_notebook_has(path):
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1 and 'profile = "course"' in tagged[0]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for heading in ("The promise", "You need", "Time", "You will be able to", "## Summary", "In TorchRec this is"):
        assert heading in text, f"no {heading!r}"
    assert "## Read next" in text and path.stem.split("_")[0] in notebook.cells[0].source.splitlines()[0]
    assert path.stem in EXPECTED


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_code_cells_are_short(path):
    sizes = [
        len([line for line in cell.source.splitlines() if line.strip()])
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]
    assert statistics.median(sizes) <= 3
    assert sum(size < 8 for size in sizes) >= 0.85 * len(sizes) and max(sizes) <= 12
    too_wide = [
        line
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
        if len(line) > 115
    ]
    assert not too_wide, "wider than a page of the report"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_exercises_have_hints_and_a_solution(path):
    for number in numbers_in(path):
        assert len(find_exercise(number).hints) >= 2
        assert number in numbers_in(FOLDER / "solutions" / path.name)
