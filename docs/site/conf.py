"""Sphinx configuration: pages are put together by ``pages.py``."""

import importlib.metadata
import re
from typing import Any

project = "bocage"
author = copyright = "The bocage developers"
release = importlib.metadata.version("bocage")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"bocage {release}"
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_extra_path = ["../../build/docs-src/extra"]  # reports of studies, pages of their own
# A name that several classes have, as ``bytes``, is a link to none of them.
suppress_warnings = ["ref.python"]
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _parted(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """One entry a name, where a docstring tells of several in one, as ``mean, std: by channel``."""
    parted: list[str] = []
    names: list[str] = []
    entry: list[str] = []

    def leave() -> None:
        for own in names:
            parted.append(f"    {own}: {entry[0]}")
            parted.extend(entry[1:])
        names.clear()

    for line in lines:
        if start := re.match(r"    (\w+(?:, \w+)+): (.*)", line):
            leave()
            names, entry = start[1].split(", "), [start[2]]
        elif names and line.startswith("        "):
            entry.append(line)
        else:
            leave()
            parted.append(line)
    leave()
    lines[:] = parted


def setup(app: Any) -> None:
    """Called by Sphinx; before Napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", _parted, priority=400)
