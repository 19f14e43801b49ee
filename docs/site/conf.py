"""Sphinx's settings for the course's site; scripts/site.py copies this beside the pages and runs it."""

from __future__ import annotations

import logging
import re

logging.disable(logging.INFO)  # FBGEMM names every library that it loads

project = "recsys_edu"
author = "the authors of recsys_edu"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# pages
html_theme = "furo"
html_title = "recsys_edu"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_show_sourcelink = False
html_copy_source = False
toc_object_entries = False  # hundreds of names in the margin of every page take minutes to build
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

# notebooks come executed, and nothing on a page is fetched
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "myst.xref_missing",
    "myst.header",
    "docutils",
    "ref.ref",
    "ref.python",
]

# the reference, from docstrings
default_role = "code"
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
napoleon_google_docstring = True
add_module_names = False
python_use_unqualified_type_names = True

SECTION = re.compile(r"^\s*(Raises|Args|Returns|Yields|Example|Examples|Note|Attributes):\s*$")


def keep_pictures(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """Docstrings draw with indented text; say so to Sphinx, which would join the lines."""
    kept: list[str] = []
    inside = False
    for index, line in enumerate(lines):
        indented = line.startswith("    ")
        after_blank = index > 0 and not lines[index - 1].strip()
        before = next((each for each in reversed(lines[:index]) if each.strip()), "")
        if indented and after_blank and not inside and not SECTION.match(before) and not before.startswith("    "):
            kept += [".. code-block:: text", ""]
            inside = True
        elif line.strip() and not indented:
            inside = False
        kept.append(line)
    lines[:] = kept


def setup(app) -> None:
    app.connect("autodoc-process-docstring", keep_pictures, priority=400)
