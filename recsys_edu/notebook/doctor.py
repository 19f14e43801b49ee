"""What is installed, which kernels run and why, and the command that cures each mismatch.

    recsys_edu doctor                                     the console command
    from recsys_edu.notebook import doctor; doctor()      in a notebook
    python -m recsys_edu.notebook.cli doctor              where recsys_edu is not installed

It needs the standard library alone, so it also speaks where torch is missing. `machine.examine()` collects
facts, `diagnose(facts)` judges them.
"""

from __future__ import annotations

import html
import re
import sys
from dataclasses import dataclass

from recsys_edu.datasets.download import FOLDER_NAME as MOVIELENS
from recsys_edu.notebook.machine import BACKEND_VARIABLE, CPU_BUILD, CUDA_BUILD, Facts, examine

OK, NOTE, WARNING, BROKEN = "ok", "note", "warning", "broken"
SYMBOLS = {OK: "✓", NOTE: "·", WARNING: "!", BROKEN: "✗"}
COLOURS = {OK: "#0072b2", NOTE: "#767676", WARNING: "#b35900", BROKEN: "#c5221f"}

# torch -> FBGEMM (both builds carry the same number); the first pair is the one this project installs.
KNOWN_GOOD = {"2.13.0": "1.8.0", "2.11.0": "1.6.0"}
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
BACKEND_CHOICES = ("auto", "fbgemm", "pytorch")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what it is about, how bad it is, and the command that cures it."""

    topic: str
    level: str  # OK, NOTE, WARNING, BROKEN
    text: str
    cure: str | None = None


@dataclass(frozen=True)
class Report:
    """The findings in order; prints as text, shows as a table in a notebook."""

    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """False when something is broken; falling back to PyTorch's kernels is not."""
        return all(finding.level != BROKEN for finding in self.findings)

    @property
    def exit_code(self) -> int:
        return 0 if self.usable else 1

    def verdict(self) -> str:
        if not self.usable:
            return "Something is broken: run the commands after the arrows, then the doctor again."
        if any(finding.level == WARNING for finding in self.findings):
            return "recsys_edu works here; the lines marked ! say what would work better."
        return "recsys_edu works here."

    def __str__(self) -> str:
        width = max(len(finding.topic) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{SYMBOLS[finding.level]} {finding.topic:<{width}}  {finding.text}")
            if finding.cure:
                lines.append(f"  {'':<{width}}  -> {finding.cure}")
        return "\n".join([*lines, "", self.verdict()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top;padding:.25em .8em .25em 0"'
        rows = []
        for finding in self.findings:
            cure = f"<br>→ <code>{html.escape(finding.cure)}</code>" if finding.cure else ""
            mark = f'<td {cell}><b style="color:{COLOURS[finding.level]}">{SYMBOLS[finding.level]}</b></td>'
            topic = f'<td {cell}><b style="white-space:nowrap">{html.escape(finding.topic)}</b></td>'
            rows.append(f"<tr>{mark}{topic}<td {cell}>{html.escape(finding.text)}{cure}</td></tr>")
        return f"<table>{''.join(rows)}</table><p>{html.escape(self.verdict())}</p>"


def diagnose(facts: Facts) -> Report:
    """Judge the facts; nothing is looked up, so equal facts give equal reports."""
    findings = [
        _python(facts),
        *_torch(facts),
        *_fbgemm(facts),
        _driver(facts),
        _kernels(facts),
        _pairs(),
        *_data(facts),
        _notebooks(facts),
        _machine(facts),
    ]
    return Report(tuple(findings))


def release(version: str) -> str:
    """The version without its local part: 2.13.0+cpu is the release 2.13.0."""
    return version.split("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release(version))[:2])


def _pip(facts: Facts, arguments: str) -> str:
    name = "python" if facts.system == "Windows" else "python3"
    interpreter = facts.executable or name
    quoted = f'"{interpreter}"' if " " in interpreter else interpreter
    return f"{quoted} -m pip {arguments}"


def _newest_pair() -> tuple[str, str]:
    return next(iter(KNOWN_GOOD.items()))


def _torch_version(facts: Facts) -> str | None:
    return facts.torch.found.get("version") if facts.torch.outcome == "loads" else None


def fitting_fbgemm(facts: Facts) -> str:
    """The FBGEMM requirement for this torch and machine, as pip takes it."""
    version = KNOWN_GOOD.get(release(_torch_version(facts) or ""), _newest_pair()[1])
    build = CUDA_BUILD if facts.driver and facts.torch.found.get("cuda") else CPU_BUILD
    return f"{build}=={version}"


def _install_pair(facts: Facts) -> str:
    """Install FBGEMM for this torch, or, where no FBGEMM is known to fit it, the newest known pair."""
    version = _torch_version(facts)
    if version is not None and release(version) not in KNOWN_GOOD:
        return _pip(facts, f"install torch=={_newest_pair()[0]} {fitting_fbgemm(facts)}")
    return _pip(facts, f"install {fitting_fbgemm(facts)}")


def _replace_fbgemm(facts: Facts) -> str:
    """Take every FBGEMM out first: both builds write the same folder, so one's removal damages the other."""
    return _pip(facts, f"uninstall -y {CPU_BUILD} {CUDA_BUILD}") + " && " + _install_pair(facts)


def _python(facts: Facts) -> Finding:
    text = f"{'.'.join(map(str, facts.python))} on {facts.system} {facts.machine} ({facts.executable})"
    if facts.python[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding(
            "Python", BROKEN, f"{text}: too old", f"install Python {oldest} or newer, remove .venv, make demo"
        )
    return Finding("Python", OK, text)


def _torch(facts: Facts) -> list[Finding]:
    wanted = _newest_pair()[0]
    if facts.torch.outcome == "missing":
        return [Finding("torch", BROKEN, "not installed", _pip(facts, f"install torch=={wanted}"))]
    if facts.torch.outcome != "loads":
        text = f"installed, but importing it {facts.torch.outcome}: {facts.torch.detail}"
        return [Finding("torch", BROKEN, text, _pip(facts, f"install --force-reinstall torch=={wanted}"))]
    version, cuda = facts.torch.found["version"], facts.torch.found.get("cuda")
    text = f"{version}, " + (f"built for CUDA {cuda}" if cuda else "built for the CPU")
    if not OLDEST_TORCH <= _numbers(version) <= NEWEST_TORCH:
        span = f"{'.'.join(map(str, OLDEST_TORCH))} to {'.'.join(map(str, NEWEST_TORCH))}"
        cure = _pip(facts, f"install torch=={wanted}")
        return [Finding("torch", WARNING, f"{text}; recsys_edu is tested with {span}", cure)]
    return [Finding("torch", OK, text)]


def _fbgemm(facts: Facts) -> list[Finding]:
    if facts.fbgemm.outcome == "missing":
        return [_absent_fbgemm(facts)]
    builds = facts.fbgemm_builds or {"fbgemm_gpu (no package metadata)": facts.fbgemm.found.get("version") or "?"}
    text = " and ".join(f"{name} {version}" for name, version in builds.items())
    findings = []
    if len(builds) > 1:
        both = f"{text} are both installed and overwrite each other's files"
        findings.append(Finding("FBGEMM", WARNING, both, _replace_fbgemm(facts)))
    if facts.torch.outcome != "loads":
        return [*findings, Finding("FBGEMM", NOTE, f"{text}; not tried, since torch does not load")]
    mismatch = _pair_mismatch(facts)
    if facts.fbgemm.outcome != "loads":
        return [*findings, _unloadable_fbgemm(facts, text, mismatch)]
    if mismatch:
        findings.append(Finding("FBGEMM", WARNING, f"{text} loads, but {mismatch}", _replace_fbgemm(facts)))
    elif not findings:
        findings.append(Finding("FBGEMM", OK, f"{text}, loads"))
    return findings


def _absent_fbgemm(facts: Facts) -> Finding:
    if facts.system != "Linux":
        return Finding(
            "FBGEMM", OK, f"has no wheels for {facts.system}; PyTorch's kernels serve, with the same results"
        )
    text = "not installed; PyTorch's kernels serve, with the same results but slower"
    return Finding("FBGEMM", NOTE, text, _install_pair(facts))


def _unloadable_fbgemm(facts: Facts, text: str, mismatch: str | None) -> Finding:
    what = {
        "raises": f"does not load: {facts.fbgemm.detail}",
        "crashes": f"takes the process down while it loads: {facts.fbgemm.detail}",
        "hangs": f"does not finish loading: {facts.fbgemm.detail}",
    }[facts.fbgemm.outcome]
    reason = f" ({mismatch})" if mismatch else ""
    if facts.backend == "pytorch":
        return Finding("FBGEMM", NOTE, f"{text} {what}{reason}; not needed while {BACKEND_VARIABLE}=pytorch")
    # One that raises is caught and replaced by PyTorch's kernels; a crash or a hang stops every program.
    rest = (
        "; PyTorch's kernels take over" if facts.fbgemm.outcome == "raises" else f"; until then: {_use_pytorch(facts)}"
    )
    return Finding("FBGEMM", BROKEN, f"{text} {what}{reason}{rest}", _replace_fbgemm(facts))


def _use_pytorch(facts: Facts) -> str:
    return f"{'set' if facts.system == 'Windows' else 'export'} {BACKEND_VARIABLE}=pytorch"


def _pair_mismatch(facts: Facts) -> str | None:
    """Why these versions do not belong together, None when they do."""
    torch = _torch_version(facts)
    versions = {release(version) for version in facts.fbgemm_builds.values()}
    if torch is None or not versions:
        return None
    cuda = facts.torch.found.get("cuda")
    if set(facts.fbgemm_builds) == {CUDA_BUILD} and not cuda:
        return f"{CUDA_BUILD} is the CUDA build and torch {torch} a CPU build"
    fitting = KNOWN_GOOD.get(release(torch))
    if fitting is None:
        return f"no FBGEMM is known to fit torch {torch}"
    wrong = sorted(versions - {fitting})
    return f"torch {release(torch)} belongs with FBGEMM {fitting}, not {', '.join(wrong)}" if wrong else None


def _driver(facts: Facts) -> Finding:
    if facts.driver is None:
        return Finding("NVIDIA driver", OK, "none; everything runs on the CPU")
    text = facts.driver
    if facts.torch.outcome != "loads":
        return Finding("NVIDIA driver", NOTE, text)
    if not facts.torch.found.get("cuda"):
        cure = _pip(facts, f"install --force-reinstall torch=={_newest_pair()[0]}") + ", from an index with CUDA builds"
        return Finding("NVIDIA driver", WARNING, f"{text}, but torch is a CPU build: the GPU stays idle", cure)
    if not facts.torch.found.get("cuda_usable"):
        cuda = facts.torch.found["cuda"]
        text = f"{text}, but torch cannot use the GPU: the driver is too old for CUDA {cuda}, or no GPU is visible"
        return Finding("NVIDIA driver", WARNING, text, "nvidia-smi; update the driver or look at CUDA_VISIBLE_DEVICES")
    if facts.fbgemm.outcome == "loads" and set(facts.fbgemm_builds) == {CPU_BUILD}:
        text = f"{text}, torch uses the GPU, but FBGEMM is the CPU build: no fused lookups on the GPU"
        return Finding("NVIDIA driver", WARNING, text, _replace_fbgemm(facts))
    return Finding("NVIDIA driver", OK, f"{text}, torch uses the GPU")


def _kernels(facts: Facts) -> Finding:
    """The backend that `recsys_edu.kernels.backend` will choose, by the same rule."""
    topic = "kernels"
    if facts.backend not in BACKEND_CHOICES:
        text = f"{BACKEND_VARIABLE}={facts.backend} is none of {', '.join(BACKEND_CHOICES)}"
        return Finding(topic, BROKEN, text, f"unset {BACKEND_VARIABLE}")
    if facts.torch.outcome != "loads":
        return Finding(topic, BROKEN, "none: torch does not load")
    if facts.backend == "pytorch":
        return Finding(topic, OK, f"PyTorch's, because {BACKEND_VARIABLE}=pytorch asks for them")
    if facts.fbgemm.outcome == "loads":
        return Finding(topic, OK, "FBGEMM's, because FBGEMM is installed and loads")
    why = "is not installed" if facts.fbgemm.outcome == "missing" else "does not load"
    if facts.backend == "fbgemm":
        text = f"none: {BACKEND_VARIABLE}=fbgemm demands FBGEMM, which {why}"
        return Finding(topic, BROKEN, text, f"unset {BACKEND_VARIABLE}")
    return Finding(topic, OK, f"PyTorch's, because FBGEMM {why}")


def _pairs() -> Finding:
    pairs = "; ".join(f"torch {torch} with FBGEMM {fbgemm}" for torch, fbgemm in KNOWN_GOOD.items())
    return Finding("known good", OK, f"{pairs} ({CPU_BUILD}, or {CUDA_BUILD} for CUDA)")


def _data(facts: Facts) -> list[Finding]:
    present = [f"{name} ({size:.0f} MB)" for name, size in facts.data.items() if size is not None]
    findings = []
    if present:
        findings.append(Finding("data", OK, f"{', '.join(present)} in {facts.data_folder}"))
    if facts.data.get(MOVIELENS) is None:
        text = f"MovieLens-100K is not in {facts.data_folder}; the notebooks fetch it when they need it"
        findings.append(Finding("data", NOTE, text, "recsys_edu data fetch"))
    return findings


def _notebooks(facts: Facts) -> Finding:
    absent = facts.absent_notebook_packages
    if absent:
        cure = _pip(facts, 'install -e ".[notebooks]"')
        return Finding("notebooks", NOTE, f"not installed: {', '.join(absent)}", cure)
    return Finding("notebooks", OK, "JupyterLab, widgets, plotly, papermill are installed")


def _machine(facts: Facts) -> Finding:
    memory = "memory unknown" if facts.memory_gib is None else f"{facts.memory_gib:.1f} GiB of memory"
    text = f"{facts.num_cores} core{'s' if facts.num_cores != 1 else ''}, {memory}"
    if facts.memory_gib is not None and facts.memory_gib < 4:
        return Finding("machine", WARNING, f"{text}; cells with four ranks want about 4 GiB")
    return Finding("machine", OK, text)


def doctor() -> Report:
    """Examine this installation and return the report; a notebook shows it as a table.

    >>> doctor()             # doctest: +SKIP
    ✓ Python   3.12.4 on Linux x86_64 (...)
    ✓ torch    2.13.0+cpu, built for the CPU
    ✓ FBGEMM   fbgemm-gpu-cpu 1.8.0, loads
    ...

    Never raises because of what it finds; `report.usable` and `report.exit_code` say the outcome.
    """
    return diagnose(examine())


def main() -> int:
    """Print the report. Exit code 0: recsys_edu works here, on PyTorch's kernels perhaps; 1: something is broken.

    An FBGEMM that is not there is no fault; one that is installed and does not load is, even though
    PyTorch's kernels stand in for it.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console may lack the symbols
    report = doctor()
    print(report)
    return report.exit_code
