"""Every benchmark runs at tiny sizes and writes what the README's table is made of; committed results are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402

NAMES = (
    "embedding_lookup",
    "dlrm_step",
    "dlrm_ranks",
    "import_time",
    "pipeline",
    "planner",
    "quantization_quality",
    "quantized_lookup",
    "serving",
    "step_simulator",
)


def run_tiny(name: str, folder: Path, **environment: str) -> dict:
    command = [
        sys.executable,
        f"benchmarks/{name}.py",
        "--tiny",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(folder),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs_and_writes_its_result(name, tmp_path):
    result = run_tiny(name, tmp_path)
    assert result["machine"]["command"].startswith(f"python benchmarks/{name}.py --tiny")
    assert result["machine"]["versions"]["torch"]
    columns = set(result["rows"][0])
    assert all(set(row) == columns for row in result["rows"])
    for gate in result.get("gates", []):  # without TorchRec some benchmarks promise nothing
        assert gate["measured"] > 0
        assert (gate["at_least"] is None) != (gate["at_most"] is None)
    if name.startswith(("embedding", "dlrm")):
        ours = [row for row in result["rows"] if common.OURS in (row.get("contestant"), row.get("library"))]
        assert ours and all(row["time / ours"] == 1 for row in ours)


def test_lookup_benchmark_runs_without_fbgemm(tmp_path):
    result = run_tiny("embedding_lookup", tmp_path, RECSYS_EDU_BACKEND="pytorch")
    assert "raw FBGEMM" not in {row["contestant"] for row in result["rows"]}


def test_every_contestant_computes_the_same_model():
    """A comparison of speed is worth nothing between models of different size."""
    from benchmarks.dlrm_step import TINY_LAYERS, HandWrittenDlrm, dlrm, our_library
    from benchmarks.embedding_lookup import TINY, SparseBags

    ours = dlrm(our_library(), TINY, TINY_LAYERS)
    bags = SparseBags(TINY)
    by_hand = HandWrittenDlrm(lambda batch: bags(batch.per_feature), TINY, TINY_LAYERS)
    sizes_by_hand = [parameter.shape for parameter in (*bags.parameters(), *by_hand.parameters())]
    assert [parameter.shape for parameter in ours.parameters()] == sizes_by_hand


def test_contestants_share_every_round():
    calls: list[str] = []
    samples = common.time_samples({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4, budget_ms=0.0)
    assert [len(times) for times in samples.values()] == [4, 4]
    assert calls[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_ratio_compares_within_a_round():
    # Round 2 was ten times slower for both: the ratio of that round is as good as any other.
    assert common.ratio({"x": [2.0, 20.0, 2.0], "y": [1.0, 10.0, 1.0]}, "x", "y") == 2.0


def test_gates_say_on_which_side_they_are_met():
    assert common.Gate("share", 0.9, at_least=0.85).met
    assert not common.Gate("share", 0.8, at_least=0.85).met
    assert not common.Gate("seconds", 0.4, at_most=0.3).met


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_belong_to_a_benchmark(path):
    result = json.loads(path.read_text())
    assert (ROOT / "benchmarks" / f"{path.stem}.py").exists()
    assert result["machine"]["processor"] and result["machine"]["versions"]
    assert "/" not in result["machine"]["command"].removeprefix("python benchmarks/").split(" --out")[0]
    assert all(set(row) == set(result["rows"][0]) for row in result["rows"])
