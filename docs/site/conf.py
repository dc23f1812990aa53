"""Configuration of Sphinx. ``pages.py`` writes the pages that it reads."""

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
suppress_warnings = ["ref.python"]  # a name that several classes have, such as ``bytes``, links to none of them
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _split_shared_entries(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Split entries such as ``mean, std: values by channel`` into one entry per name; Napoleon expects one."""
    split: list[str] = []
    names: list[str] = []
    entry: list[str] = []

    def flush() -> None:
        for shared in names:
            split.append(f"    {shared}: {entry[0]}")
            split.extend(entry[1:])
        names.clear()

    for line in lines:
        if start := re.match(r"    (\w+(?:, \w+)+): (.*)", line):
            flush()
            names, entry = start[1].split(", "), [start[2]]
        elif names and line.startswith("        "):
            entry.append(line)
        else:
            flush()
            split.append(line)
    flush()
    lines[:] = split


def setup(app: Any) -> None:
    """Connect to Sphinx, before Napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", _split_shared_entries, priority=400)
