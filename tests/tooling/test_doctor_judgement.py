"""The doctor's judgement: for each situation written down as facts, the level, the reason and the cure."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from recsys_edu.kernels import backend
from recsys_edu.notebook.machine import BACKEND_VARIABLE, Facts, Probe

doctor = importlib.import_module("recsys_edu.notebook.doctor")  # the module: the package's `doctor` is a function

HEALTHY = Facts(
    fbgemm=Probe("loads", found={"version": "1.8.0"}),
    fbgemm_builds={"fbgemm-gpu-cpu": "1.8.0"},
    data={"movielens-100k": 2.1},
    memory_gib=16.0,
    num_cores=4,
)
CUDA_TORCH = Probe("loads", found={"version": "2.13.0+cu130", "cuda": "13.0", "cuda_usable": True})


def torch(version: str, cuda: str | None = None, usable: bool = False) -> Probe:
    return Probe("loads", found={"version": version, "cuda": cuda, "cuda_usable": usable})


def judged(**changes: object) -> doctor.Report:
    return doctor.diagnose(dataclasses.replace(HEALTHY, **changes))


def about(report: doctor.Report, topic: str) -> list[doctor.Finding]:
    return [finding for finding in report.findings if finding.topic == topic]


def test_a_healthy_machine_has_nothing_to_cure():
    report = judged()
    assert report.exit_code == 0
    assert all(finding.level == doctor.OK and finding.cure is None for finding in report.findings)
    assert "FBGEMM's" in about(report, "kernels")[0].text


SITUATIONS = {
    "python too old": (dict(python=(3, 10, 4)), "Python", doctor.BROKEN, "too old", "3.11"),
    "torch missing": (dict(torch=Probe("missing")), "torch", doctor.BROKEN, "not installed", "torch==2.13.0"),
    "torch raises": (
        dict(torch=Probe("raises", "OSError: libtorch_cpu.so")),
        "torch",
        doctor.BROKEN,
        "libtorch_cpu.so",
        "--force-reinstall torch==2.13.0",
    ),
    "torch too old": (dict(torch=torch("2.4.1")), "torch", doctor.WARNING, "2.11 to 2.13", "torch==2.13.0"),
    "FBGEMM missing": (
        dict(fbgemm=Probe("missing"), fbgemm_builds={}),
        "FBGEMM",
        doctor.NOTE,
        "PyTorch's kernels serve",
        "install fbgemm-gpu-cpu==1.8.0",
    ),
    "FBGEMM missing, GPU": (
        dict(fbgemm=Probe("missing"), fbgemm_builds={}, torch=CUDA_TORCH, driver="580.1"),
        "FBGEMM",
        doctor.NOTE,
        "not installed",
        "install fbgemm-gpu==1.8.0",
    ),
    "FBGEMM missing, older torch": (
        dict(fbgemm=Probe("missing"), fbgemm_builds={}, torch=torch("2.11.0+cpu")),
        "FBGEMM",
        doctor.NOTE,
        "not installed",
        "install fbgemm-gpu-cpu==1.6.0",
    ),
    "FBGEMM missing, no pair for this torch": (
        dict(fbgemm=Probe("missing"), fbgemm_builds={}, torch=torch("2.12.1")),
        "FBGEMM",
        doctor.NOTE,
        "not installed",
        "install torch==2.13.0 fbgemm-gpu-cpu==1.8.0",
    ),
    "undefined symbol": (
        dict(fbgemm=Probe("raises", "OSError: fbgemm.so: undefined symbol: _ZN3c10"), torch=torch("2.11.0")),
        "FBGEMM",
        doctor.BROKEN,
        "torch 2.11.0 belongs with FBGEMM 1.6.0, not 1.8.0",
        "install fbgemm-gpu-cpu==1.6.0",
    ),
    "crashes": (
        dict(fbgemm=Probe("crashes", "the process died with SIGSEGV")),
        "FBGEMM",
        doctor.BROKEN,
        "export RECSYS_EDU_BACKEND=pytorch",
        "uninstall -y fbgemm-gpu-cpu fbgemm-gpu",
    ),
    "hangs": (dict(fbgemm=Probe("hangs", "no answer")), "FBGEMM", doctor.BROKEN, "no answer", "uninstall"),
    "broken, but not wanted": (
        dict(fbgemm=Probe("raises", "OSError"), backend="pytorch"),
        "FBGEMM",
        doctor.NOTE,
        "not needed while",
        None,
    ),
    "wrong version that loads": (
        dict(fbgemm_builds={"fbgemm-gpu-cpu": "1.6.0"}),
        "FBGEMM",
        doctor.WARNING,
        "belongs with FBGEMM 1.8.0, not 1.6.0",
        "install fbgemm-gpu-cpu==1.8.0",
    ),
    "CUDA build beside a CPU torch": (
        dict(fbgemm=Probe("raises", "OSError: libcudart"), fbgemm_builds={"fbgemm-gpu": "1.8.0"}),
        "FBGEMM",
        doctor.BROKEN,
        "CUDA build and torch 2.13.0 a CPU build",
        "install fbgemm-gpu-cpu==1.8.0",
    ),
    "both builds": (
        dict(fbgemm_builds={"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"}),
        "FBGEMM",
        doctor.WARNING,
        "both installed",
        "uninstall -y fbgemm-gpu-cpu fbgemm-gpu",
    ),
    "unknown backend": (dict(backend="fast"), "kernels", doctor.BROKEN, "fast", "unset RECSYS_EDU_BACKEND"),
    "FBGEMM demanded and missing": (
        dict(backend="fbgemm", fbgemm=Probe("missing"), fbgemm_builds={}),
        "kernels",
        doctor.BROKEN,
        "demands FBGEMM, which is not installed",
        "unset RECSYS_EDU_BACKEND",
    ),
    "driver without a CUDA torch": (
        dict(driver="580.1"),
        "NVIDIA driver",
        doctor.WARNING,
        "torch is a CPU build",
        "torch==2.13.0",
    ),
    "driver too old": (
        dict(driver="470.1", torch=torch("2.13.0+cu130", "13.0", usable=False)),
        "NVIDIA driver",
        doctor.WARNING,
        "too old for CUDA 13.0",
        "nvidia-smi",
    ),
    "GPU with the CPU build": (
        dict(driver="580.1", torch=CUDA_TORCH),
        "NVIDIA driver",
        doctor.WARNING,
        "FBGEMM is the CPU build",
        "install fbgemm-gpu==1.8.0",
    ),
    "no data": (dict(data={"movielens-100k": None}), "data", doctor.NOTE, "is not in", "recsys_edu data fetch"),
    "no notebook packages": (
        dict(absent_notebook_packages=("papermill",)),
        "notebooks",
        doctor.NOTE,
        "papermill",
        'install -e ".[notebooks]"',
    ),
    "little memory": (dict(memory_gib=2.0), "machine", doctor.WARNING, "2.0 GiB", None),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_each_situation_is_named_with_its_cure(name):
    changes, topic, level, text, cure = SITUATIONS[name]
    report = judged(**changes)
    found = [finding for finding in about(report, topic) if finding.level == level]
    assert len(found) == 1, str(report)
    assert text in found[0].text
    assert (found[0].cure is None) if cure is None else (cure in found[0].cure)
    assert report.exit_code == (1 if level == doctor.BROKEN else 0)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_where_fbgemm_has_no_wheels_its_absence_is_as_it_should_be(system):
    report = judged(system=system, fbgemm=Probe("missing"), fbgemm_builds={})
    assert report.exit_code == 0
    assert about(report, "FBGEMM")[0].level == doctor.OK
    assert "PyTorch's, because FBGEMM is not installed" in about(report, "kernels")[0].text


def test_windows_is_told_its_own_words():
    report = judged(system="Windows", fbgemm=Probe("crashes", "access violation"))
    assert "set RECSYS_EDU_BACKEND=pytorch" in about(report, "FBGEMM")[0].text


def test_an_interpreter_with_a_space_in_its_path_is_quoted():
    report = judged(executable="/some where/python", torch=Probe("missing"))
    assert about(report, "torch")[0].cure.startswith('"/some where/python" -m pip')


def test_the_known_good_pairs_are_always_shown():
    text = str(judged(torch=Probe("missing")))
    assert "torch 2.13.0 with FBGEMM 1.8.0" in text
    assert "torch 2.11.0 with FBGEMM 1.6.0" in text


def test_html_escapes_what_an_error_message_says():
    page = judged(fbgemm=Probe("raises", "ImportError: <lambda> & co"))._repr_html_()
    assert "&lt;lambda&gt; &amp; co" in page
    assert "<lambda>" not in page


def test_the_doctor_and_the_backend_speak_of_the_same_variable():
    assert backend.BACKEND_VARIABLE == BACKEND_VARIABLE
    assert set(backend.BACKEND_CHOICES) == set(doctor.BACKEND_CHOICES)
