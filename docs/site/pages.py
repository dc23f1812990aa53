"""Write the source pages of the documentation for Sphinx.

python docs/site/pages.py FOLDER

The pages of docs/ keep their folders. Links to code, which has no page, become plain names. Four kinds of pages are
generated: commands from their ``--help``, keys of recipes from the dataclasses, recipes with their comments, and the
public Python API from its docstrings.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.study.study_config import StudyConfig
from bocage.recipes import list_recipes
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HOME = "docs/index.md" if (DOCS / "index.md").exists() else "README.md"
NOTEBOOK = "examples/quickstart.ipynb"
SECTIONS = {
    "tutorials": "Tutorials",
    "how-to": "How-to guides",
    "reference": "Reference",
    "explanation": "Explanation",
}
# Pages that come first in their section, in this order; the others follow by name.
FIRST = {
    "tutorials": ("quickstart", "notebook", "flair-hub", "drone-images", "use-an-encoder"),
    "how-to": (
        "shard",
        "datasets",
        "pretrain",
        "cluster",
        "finetune",
        "map",
        "label-studies",
        "publish",
        "official-models",
    ),
    "reference": ("commands", "recipes", "recipe-keys", "recipe-files", "formats", "metrics", "api"),
    "explanation": ("architecture", "objectives", "masking", "determinism", "statistics", "design-choices"),
}
CONFIGURATIONS = {
    "Pretraining": (PretrainConfig, "`bocage pretrain recipe=NAME key=value` or `pretrain.py`"),
    "Fine-tuning": (FinetuneConfig, "`bocage finetune recipe=NAME key=value`"),
    "Label studies": (StudyConfig, "`bocage study run recipe=NAME key=value`"),
}
PACKAGES = ("bocage", "recipes", "shards", "ssl", "finetune", "tools")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|mailto:|#)[^)#\s]+)(#[^)]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(((?!https?://)[^)\s]+)\)")


def write_pages(out: Path) -> None:
    """Write all source pages to a new folder.

    Raises:
        ValueError: a link leads nowhere, or a key of a recipe is not documented.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for source in source_pages():
        text = notebook_page(source) if source.endswith(".ipynb") else (ROOT / source).read_text(encoding="utf-8")
        write(out / site_path(source), resolve_links(text, source))
    for path in sorted(DOCS.rglob("*")):
        if path.suffix in (".png", ".svg", ".csv"):
            target = out / path.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    reference = out / "reference"
    write(reference / "commands.md", commands_page())
    write(reference / "recipe-keys.md", recipe_keys_page())
    write(reference / "recipe-files.md", recipe_files_page())
    write_api_pages(reference)
    home = out / site_path(HOME)
    write(home, home.read_text(encoding="utf-8") + contents(out))


def source_pages() -> list[str]:
    """Paths of the pages that people write, relative to the root of the repository."""
    guides = [path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    return sorted({HOME, *guides, "CONTRIBUTING.md", "CHANGELOG.md", NOTEBOOK})


def site_path(source: str) -> str:
    """Path of a page in the documentation.

    Args:
        source: path of the page or file, relative to the root of the repository.
    """
    if source == "README.md":
        return "index.md"
    if source == NOTEBOOK:
        return "tutorials/notebook.md"
    return source.removeprefix("docs/")


def write(path: Path, text: str) -> None:
    """Write a page, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def contents(out: Path) -> str:
    """Tables of contents for the home page, one per section."""
    parts = []
    for folder, title in SECTIONS.items():
        names = sorted(path.stem for path in (out / folder).glob("*.md"))
        names.sort(key=lambda name: FIRST[folder].index(name) if name in FIRST[folder] else len(FIRST[folder]))
        parts.append(toctree([f"{folder}/{name}" for name in names], title))
    return "".join([*parts, toctree(["CONTRIBUTING", "CHANGELOG"], "Project")])


def toctree(pages: list[str], caption: str = "") -> str:
    """A table of contents that only the sidebar shows."""
    title = f":caption: {caption}\n" if caption else ""
    listed = "\n".join(pages)
    return f"\n```{{toctree}}\n:hidden:\n{title}\n{listed}\n```\n"


def notebook_page(source: str) -> str:
    """The text and code of a notebook, without outputs."""
    cells = json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{code}\n```")
    parts.insert(1, f"`jupyter lab {source}` runs this page.")  # below the title
    return "\n\n".join(parts) + "\n"


def resolve_links(text: str, source: str) -> str:
    """Rewrite the links of a page for its place in the documentation. A link to code becomes its plain text.

    Args:
        text: text of the page.
        source: path of the page, relative to the root of the repository.

    Raises:
        ValueError: a link leads nowhere.
    """
    pages = source_pages()

    def target_of(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(ROOT / Path(source).parent / link[2]))
        if not path.exists():
            raise ValueError(f"{source}: the link to {link[2]} leads nowhere")
        return path.relative_to(ROOT).as_posix()

    def site_link(target: str) -> str:
        return os.path.relpath(site_path(target), Path(site_path(source)).parent)

    def link(match: re.Match[str]) -> str:
        target = target_of(match)
        if target == "README.md":
            return f"[{match[1]}]({site_link(HOME)}{match[3] or ''})"
        if target in pages or target.endswith(".csv"):
            return f"[{match[1]}]({site_link(target)}{match[3] or ''})"
        return match[1]

    def image(match: re.Match[str]) -> str:
        return f"![{match[1]}]({site_link(target_of(match))})"

    return IMAGE.sub(image, LINK.sub(link, text))


def commands_page() -> str:
    """The ``--help`` of every command."""
    os.environ["COLUMNS"] = "110"
    lines = ["# Commands\n", "`bocage COMMAND --help` prints the same text."]

    def add(parser: argparse.ArgumentParser, depth: int) -> None:
        lines.append(f"\n{'#' * depth} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```")
        for action in parser._actions:
            for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                add(command, depth + 1)

    add(build_parser(), 2)
    return "\n".join(lines) + "\n"


def recipe_keys_page() -> str:
    """Every key of a recipe with its default and meaning, from the dataclasses."""
    lines = [
        "# Keys of recipes\n",
        "Defaults are those of the code. A recipe overrides them: `--print-config` prints the values of a run.",
    ]
    for title, (schema, command) in CONFIGURATIONS.items():
        lines += [f"\n## {title}\n", f"{command}\n", "| key | default | meaning |", "|---|---|---|"]
        lines += [f"| `{key}` | {value} | {as_markdown(text)} |" for key, value, text in key_rows(schema)]
    return "\n".join(lines) + "\n"


def key_rows(schema: type, prefix: str = "", values: Any = None) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every field of a dataclass; fields of nested dataclasses follow theirs.

    Args:
        schema: dataclass of a configuration.
        prefix: start of every key.
        values: instance of ``schema`` with the defaults; by default those of the fields.

    Raises:
        ValueError: the docstring of a dataclass does not describe a field.
    """
    meanings, hints = attribute_texts(schema), get_type_hints(schema)
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if item.name not in meanings:
            raise ValueError(f"{schema.__name__}.{item.name}: not described in the docstring")
        value = default_of(item) if values is None else getattr(values, item.name)
        if is_dataclass(value) and any(is_dataclass(kind) for kind in (hints[item.name], *get_args(hints[item.name]))):
            yield key, "", meanings[item.name]
            yield from key_rows(type(value), f"{key}.", value)
        else:
            yield key, "" if value is MISSING else f"`{as_yaml(value)}`", meanings[item.name]


def attribute_texts(schema: type) -> dict[str, str]:
    """Texts of the section ``Attributes`` of a docstring, by attribute."""
    section = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:")[2]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if start := re.match(r"    ([a-z_]+(?:, [a-z_]+)*): (.*)", line):
            names = start[1].split(", ")
            texts |= dict.fromkeys(names, start[2])
        elif line.startswith("        "):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def default_of(item: Field[Any]) -> Any:
    """The default of a field, MISSING without one."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def as_yaml(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def as_markdown(docstring: str) -> str:
    """Text of a docstring, with Markdown's quotes around code."""
    return re.sub(r"``([^`]*)``", r"`\1`", docstring)


def recipe_files_page() -> str:
    """Every recipe that comes with bocage, with its comments."""
    lines = ["# Files of recipes\n", "`base` names recipes whose values come first (see [recipes](recipes.md))."]
    for name in list_recipes():
        (path,) = (ROOT / "recipes").glob(f"*/{Path(name).name}.yaml")
        lines.append(f"\n## {name}\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```")
    return "\n".join(lines) + "\n"


def write_api_pages(reference: Path) -> None:
    """Write a page for every module with ``__all__``, and a list of them."""
    names = list(public_modules())
    lines = ["# Python API\n", "| module | content |", "|---|---|"]
    for name in names:
        write(reference / "api" / f"{name}.md", f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
        summary = inspect.cleandoc(importlib.import_module(name).__doc__ or "").splitlines()[0]
        lines.append(f"| [{name}](api/{name}.md) | {as_markdown(summary)} |")
    write(reference / "api.md", "\n".join(lines) + "\n" + toctree([f"api/{name}" for name in names]))


def public_modules() -> Iterator[str]:
    """Names of the modules that define ``__all__``."""
    for package in PACKAGES:
        folder = ROOT / package
        paths = [folder / "__init__.py"] if package == "bocage" else sorted(folder.rglob("*.py"))
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(("bocage", *parts)).replace("bocage.bocage", "bocage").removesuffix(".__init__")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
