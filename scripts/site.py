"""Build the course as a site: executed notebooks, reference, glossary; readable without a kernel and without a network.

    python scripts/site.py                              execute what is missing or behind, then build
    python scripts/site.py --executed notebooks/out     take what a run has left there (the default place)
    python scripts/site.py --no-run                     build from what there is; the rest is shown without outputs

An executed notebook is taken when its code is that of the notebook today. Solutions are not on the site.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
BUILD = ROOT / "build" / "site"
PARTS = {"0": "One process", "1": "Many ranks", "2": "Serving", "3": "To production"}
DOCUMENTS = {
    "docs/architecture.md": "architecture.md",
    "docs/teaching.md": "teaching.md",
    "GLOSSARY.md": "glossary.md",
    "CONTRIBUTING.md": "contributing.md",
}
NOT_IN_REFERENCE = ("recsys_edu.notebook.exercises", "recsys_edu.notebook.teaching")  # answers; and commands
PLOTLY = '<script src="../_static/plotly.min.js"></script>'
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def without_machinery(cells: Any) -> list[Any]:
    """The cells that a reader should see: not the parameters that papermill put in, nor the set-up cell."""
    return [cell for cell in cells if not {"injected-parameters", "setup"} & set(cell.metadata.get("tags", ()))]


def code_of(notebook: Any) -> list[str]:
    """What a notebook runs."""
    return [cell.source for cell in without_machinery(notebook.cells) if cell.cell_type == "code"]


def is_current(source: Path, executed: Path) -> bool:
    """Whether `executed` is this notebook, run to its end."""
    import nbformat

    if not executed.is_file():
        return False
    done = nbformat.read(executed, as_version=4)
    ended = all(cell.execution_count for cell in done.cells if cell.cell_type == "code" and cell.source.strip())
    return ended and code_of(done) == code_of(nbformat.read(source, as_version=4))


def execute_missing(sources: list[Path], executed: Path, profile: str, jobs: int | None) -> list[str]:
    """Run the notebooks that have no current executed copy; failures in words."""
    from recsys_edu.notebook.runner import run_notebooks

    behind = [path for path in sources if not is_current(path, executed / path.name)]
    if not behind:
        return []
    print(f"executing {', '.join(path.stem for path in behind)} (profile {profile})", flush=True)
    runs = run_notebooks(behind, {"profile": profile}, executed, timeout_s=600, jobs=jobs)
    return [f"{run.name}, {run.error}" for run in runs if run.error is not None]


def write_notebook(source: Path, executed: Path, target: Path) -> bool:
    """The page of one notebook, figures as HTML; whether it has outputs."""
    import nbformat

    from recsys_edu.notebook.report import still_figures

    current = is_current(source, executed)
    notebook = nbformat.read(executed if current else source, as_version=4)
    profile = notebook.metadata.get("papermill", {}).get("parameters", {}).get("profile", "course")
    notebook.cells = without_machinery(notebook.cells)
    has_figures = still_figures(notebook)
    said = f"Executed in the size <code>{profile}</code>." if current else "Shown without outputs: not executed here."
    download = f'<a href="../_static/notebooks/{source.name}" download>Download the notebook</a>'
    links = f'<div class="course-links"><span>{said}</span>{download}{elsewhere(source.name)}</div>'
    note = nbformat.v4.new_markdown_cell(links + (f"\n\n{PLOTLY}" if has_figures else ""))
    notebook.cells.insert(1, note)
    for cell in notebook.cells:
        cell.metadata.pop("collapsed", None)
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^.*notebooks/solutions/.*$\n?", "", cell.source, flags=re.MULTILINE)
    nbformat.write(notebook, target)
    return current


def elsewhere(name: str) -> str:
    """Links that open a notebook on Colab and on Binder; nothing while pyproject.toml declares no address."""
    from setup_cells import binder_link, colab_link, repository

    address = repository(ROOT)
    if address is None:
        return ""
    path = f"notebooks/{name}"
    places = {"Colab": colab_link(address, path), "Binder": binder_link(address, path)}
    return "".join(f'<a href="{link}">Open on {place}</a>' for place, link in places.items())


def write_index(names: list[str], pages: Path) -> None:
    """The first page: what this is, and the notebooks by part."""
    import readme

    lines = [
        "# recsys_edu",
        "",
        "How the world's largest recommenders are trained and served, to be run, taken apart and",
    ]
    lines += ["understood in notebooks on a laptop, with TorchRec's public names.", ""]
    lines += ["Every figure here can be moved and zoomed; sliders need a running notebook (`make lab`).", ""]
    for first, part in PARTS.items():
        members = [name for name in names if name.startswith(first)]
        if members:
            listed = "\n".join(f"notebooks/{name}" for name in members)
            lines += [f"```{{toctree}}\n:caption: {part}\n:maxdepth: 1\n:hidden:\n\n{listed}\n```", ""]
    others = "\n".join(name.removesuffix(".md") for name in DOCUMENTS.values() if (pages / name).is_file())
    lines += [f"```{{toctree}}\n:caption: Beside the notebooks\n:maxdepth: 1\n:hidden:\n\n{others}\nreference\n```", ""]
    lines += ["## The notebooks", "", readme.notebook_table(), ""]
    (pages / "index.md").write_text("\n".join(lines), encoding="utf-8")


def write_reference(pages: Path) -> None:
    """One page for each package, its public modules one below the other."""
    folder = pages / "reference"
    folder.mkdir()
    packages: dict[str, list[str]] = {}
    for path in sorted((ROOT / "recsys_edu").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        private = any(part.startswith("_") for part in name.split("."))
        if not private and not name.startswith(NOT_IN_REFERENCE):
            parts = name.split(".")
            package = ".".join(parts[:3] if (path.parent / "__init__.py").is_file() and len(parts) > 3 else parts[:2])
            if len(parts) == 2 and path.name != "__init__.py":
                package = "recsys_edu"
            packages.setdefault(package, []).append(name)
    for package, modules in packages.items():
        lines = [package, "=" * len(package), ""]
        for name in modules:
            lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
        (folder / f"{package}.rst").write_text("\n".join(lines), encoding="utf-8")
    listed = "\n".join(f"reference/{package}" for package in sorted(packages))
    text = (
        f"# Reference\n\nEvery public module, from its docstrings.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    (pages / "reference.md").write_text(text, encoding="utf-8")


def write_documents(pages: Path) -> None:
    """Documents of the repository, with links between them kept and links to files as plain names."""
    for name, target in DOCUMENTS.items():
        source = ROOT / name
        if not source.is_file():
            continue

        def repoint(match: re.Match, folder: Path = source.parent) -> str:
            path = os.path.relpath(folder / match[2], ROOT).replace(os.sep, "/")
            if path in DOCUMENTS:
                return f"[{match[1]}]({DOCUMENTS[path]}{match[3] or ''})"
            if re.fullmatch(r"notebooks/[0-9]\w+\.ipynb", path):
                return f"[{match[1]}]({path})"
            return match[1] if "`" in match[1] else f"`{match[1]}`"

        (pages / target).write_text(LINK.sub(repoint, source.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, pages / picture.name)
    if (ROOT / "docs" / "images").is_dir():
        shutil.copytree(ROOT / "docs" / "images", pages / "images")


def build(executed: Path, out: Path) -> tuple[int, list[str]]:
    """Write the pages and run Sphinx; its exit status, and the notebooks without outputs."""
    from plotly.offline import get_plotlyjs

    pages = BUILD / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "site" / "_static", pages / "_static")
    shutil.copy(ROOT / "docs" / "site" / "conf.py", pages / "conf.py")
    (pages / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (pages / "_static" / "notebooks").mkdir()
    sources = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    without = []
    for source in sources:
        shutil.copy(source, pages / "_static" / "notebooks" / source.name)
        if not write_notebook(source, executed / source.name, pages / "notebooks" / source.name):
            without.append(source.stem)
    write_documents(pages)
    write_reference(pages)
    write_index([path.stem for path in sources], pages)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(BUILD / "doctrees"), str(pages), str(out)]
    shutil.rmtree(BUILD / "doctrees", ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FBGEMM_LOG_LEVEL": "ERROR"}
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode, without


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--executed", type=Path, default=ROOT / "notebooks" / "out", help="where executed notebooks lie"
    )
    parser.add_argument("--out", type=Path, default=BUILD / "html")
    parser.add_argument("--profile", default="ci", help="size in which missing notebooks are executed (ci)")
    parser.add_argument("--jobs", type=int, default=None, help="how many notebooks at once")
    parser.add_argument("--no-run", action="store_true", help="execute nothing")
    options = parser.parse_args(arguments)
    sources = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    failures = [] if options.no_run else execute_missing(sources, options.executed, options.profile, options.jobs)
    for failure in failures:
        print(f"FAILED {failure}\n", file=sys.stderr)
    status, without = build(options.executed.resolve(), options.out.resolve())
    if without:
        print(f"without outputs: {', '.join(without)}")
    print(f"site: {options.out / 'index.html'}")
    return status or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
