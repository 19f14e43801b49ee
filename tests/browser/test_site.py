"""The site of a small course: its links lead somewhere, nothing comes from elsewhere, the search finds its words."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("sphinx", reason="the site's packages are not installed (extra: site)")
pytest.importorskip("myst_nb", reason="the site's packages are not installed (extra: site)")
pytest.importorskip("furo", reason="the site's packages are not installed (extra: site)")

ROOT = Path(__file__).resolve().parents[2]
HEAD = "# {title}\n\n**The promise:** {promise}\n\n| | |\n|---|---|\n| Time | 5 minutes |\n"
FIGURE = {"data": [{"type": "bar", "y": [1, 2]}], "layout": {"title": {"text": "Bars <b>two</b>"}}}
SOLUTIONS = "Solutions: `notebooks/solutions/01_second.ipynb`.\n\n## Summary\n\nKumquat."


def course_notebook(title, *cells, run):
    """A notebook as the course's are, with a set-up cell and parameters; `run` as papermill leaves it."""
    setup = new_code_cell("import os  # set-up", metadata={"tags": ["setup"]})
    parameters = new_code_cell('profile = "course"', metadata={"tags": ["parameters"]})
    injected = [new_code_cell('profile = "ci"', metadata={"tags": ["injected-parameters"]})] if run else []
    first = new_markdown_cell(HEAD.format(title=title, promise=f"you learn of {title}."))
    notebook = new_notebook(cells=[first, setup, parameters, *injected, *cells])
    if run:
        notebook.metadata["papermill"] = {"parameters": {"profile": "ci"}}
        for number, cell in enumerate((each for each in notebook.cells if each.cell_type == "code"), 1):
            cell.execution_count = number
    return notebook


def with_output(cell, data):
    """The cell, executed."""
    cell.outputs = [new_output("display_data", data)]
    return cell


@pytest.fixture(scope="module")
def site_module():
    spec = importlib.util.spec_from_file_location("_course_site", ROOT / "scripts" / "site.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A checkout in small: two notebooks, one of them executed, a package of one module, the real settings."""
    root = tmp_path_factory.mktemp("course")
    for folder in ("notebooks/out", "docs"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "site", root / "docs" / "site")
    (root / "pyproject.toml").write_text('[project]\nname = "small"\n')
    (root / "GLOSSARY.md").write_text("# Glossary\n\n**Kumquat.** A fruit: [the first](notebooks/00_first.ipynb).\n")
    (root / "docs" / "teaching.md").write_text("# For teachers\n\n![A batch](batch.svg)\n[words](../GLOSSARY.md)\n")
    shutil.copy(ROOT / "docs" / "batch.svg", root / "docs")
    package = root / "recsys_edu"
    package.mkdir()
    (package / "__init__.py").write_text('"""A small package."""\n')
    (package / "fruit.py").write_text(
        '"""Fruit.\n\nA picture:\n\n    (o)\n"""\n\n\ndef peel(count: int) -> int:\n    """How many are peeled."""\n'
    )
    plotly = {"application/vnd.plotly.v1+json": FIGURE}
    slider = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"}
    wide = {"text/plain": "'" + "x" * 400 + "'"}
    for run in (False, True):
        cells = [new_code_cell("draw()"), new_code_cell("slide()"), new_code_cell("'x' * 400")]
        if run:
            cells = [with_output(cell, data) for cell, data in zip(cells, (plotly, slider, wide))]
        cells.append(new_markdown_cell("Then [on](01_second.ipynb)."))
        folder = root / "notebooks" / ("out" if run else ".")
        nbformat.write(course_notebook("00 First", *cells, run=run), folder / "00_first.ipynb")
    second = course_notebook("01 Second", new_code_cell("1 + 1"), new_markdown_cell(SOLUTIONS), run=False)
    nbformat.write(second, root / "notebooks" / "01_second.ipynb")
    return root


@pytest.fixture(scope="module")
def site(site_module, course):
    """The folder of the built pages."""
    import readme

    patch = pytest.MonkeyPatch()
    patch.setattr(site_module, "ROOT", course)
    patch.setattr(site_module, "BUILD", course / "build")
    patch.setattr(readme, "ROOT", course)
    try:
        status, without = site_module.build(course / "notebooks" / "out", course / "html")
    finally:
        patch.undo()
    assert status == 0 and without == ["01_second"]
    return course / "html"


class Page(HTMLParser):
    """What a page links to, loads, calls its parts, and shows as pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.pictures, self.language = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "html":
            self.language = found.get("lang")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical" and found.get("href"):
            self.loads.append(found["href"])
        if tag == "img":
            self.pictures.append(found.get("alt"))


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_link_between_pages_leads_to_a_file(pages, site):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme and parts.path and not (path.parent / unquote(parts.path)).exists():
                broken.append(f"{path.relative_to(site)}: {link}")
    assert len(pages) > 8 and not broken


def test_nothing_is_loaded_from_elsewhere(pages, site):
    loads = {load for page in pages.values() for load in page.loads}
    assert loads and not [load for load in loads if urlsplit(load).scheme in ("http", "https") or load.startswith("//")]
    assert (site / "_static" / "plotly.min.js").stat().st_size > 1e6


def test_a_screen_reader_is_told_the_language_and_what_pictures_and_figures_show(pages, site):
    assert {page.language for page in pages.values()} == {"en"}
    assert all(alt for page in pages.values() for alt in page.pictures)
    first = (site / "notebooks" / "00_first.html").read_text(encoding="utf-8")
    assert 'role="img" aria-label="Bars two"' in first and "Plotly.newPlot(" in first


def test_an_executed_notebook_shows_its_outputs_and_neither_machinery_nor_solutions(site):
    first = (site / "notebooks" / "00_first.html").read_text(encoding="utf-8")
    second = (site / "notebooks" / "01_second.html").read_text(encoding="utf-8")
    assert "Executed in the size" in first and "sliders here" in first
    assert "not executed here" in second and "plotly.min.js" not in second
    for page in (first, second):
        assert "set-up" not in page and "notebooks/solutions" not in page
        assert "profile" in page and "injected" not in page
    assert (site / "_static" / "notebooks" / "00_first.ipynb").is_file(), "the notebook can be downloaded"


def test_the_search_index_knows_words_of_notebooks_glossary_and_reference(site):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text.strip(), re.DOTALL)[1])
    where = index["terms"]["kumquat"]
    names = {index["docnames"][number] for number in (where if isinstance(where, list) else [where])}
    assert names == {"glossary", "notebooks/01_second"}
    assert "peel" in json.dumps(index["objects"])


def test_an_executed_copy_counts_only_while_its_code_is_that_of_the_notebook(site_module, course, tmp_path):
    source, executed = course / "notebooks" / "00_first.ipynb", course / "notebooks" / "out" / "00_first.ipynb"
    assert site_module.is_current(source, executed)
    assert not site_module.is_current(source, tmp_path / "missing.ipynb")
    changed = nbformat.read(source, as_version=4)
    changed.cells[-2].source = "slide(further=True)"
    nbformat.write(changed, tmp_path / "00_first.ipynb")
    assert not site_module.is_current(tmp_path / "00_first.ipynb", executed)
    stopped = nbformat.read(executed, as_version=4)
    stopped.cells[-2].execution_count = None
    nbformat.write(stopped, tmp_path / "stopped.ipynb")
    assert not site_module.is_current(source, tmp_path / "stopped.ipynb"), "it did not run to its end"


# ------------------------------------------------------------ in a browser


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_opened_as_files_draw_their_figures_and_fit_a_phone(site, open_page, picture, scheme):
    page, seen = open_page(390, 844, color_scheme=scheme, offline=True)
    for name in ("index", "notebooks/00_first", "glossary", "reference/recsys_edu"):
        page.goto((site / f"{name}.html").as_uri())
        page.locator("h1").first.wait_for()
        wider_by = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider_by == 0, f"{name} is {wider_by} pixels wider than a phone"
        picture(page, f"site_{name.rpartition('/')[2]}_{scheme}")
    page.goto((site / "notebooks" / "00_first.html").as_uri())
    page.locator(".js-plotly-plot .gtitle").first.wait_for()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert not seen.errors and not seen.elsewhere


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1100, 1440])
def test_a_wide_output_is_pushed_by_itself(site, open_page, width):
    page, _ = open_page(width, 900, offline=True)
    page.goto((site / "notebooks" / "00_first.html").as_uri())
    page.locator(".js-plotly-plot .gtitle").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_the_search_works_on_pages_opened_as_files(site, open_page):
    page, seen = open_page(1200, 900, offline=True)
    page.goto((site / "index.html").as_uri())
    page.locator(".sidebar-search").fill("kumquat")
    page.keyboard.press("Enter")
    page.locator("#search-results li").nth(1).wait_for()
    assert "2 pages" in page.locator("#search-results").inner_text()
    assert not seen.errors and not seen.elsewhere


@pytest.mark.browser
def test_everything_that_can_be_clicked_has_a_name_and_can_be_reached_with_the_keyboard(site, open_page):
    page, _ = open_page(800, 900, offline=True)
    page.goto((site / "notebooks" / "00_first.html").as_uri())
    labels = page.locator("label[for]:not(.overlay)")
    assert labels.count() >= 3
    for index in range(labels.count()):
        assert labels.nth(index).get_attribute("aria-label") and labels.nth(index).get_attribute("tabindex") == "0"
    page.locator("label[for=__navigation][role=button]:visible").first.focus()
    assert not page.locator("#__navigation").is_checked()
    page.keyboard.press("Enter")
    assert page.locator("#__navigation").is_checked(), "Enter opens what a click opens"
