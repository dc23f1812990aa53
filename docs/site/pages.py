"""Puts the sources of the documentation together: pages of docs/, the README as home, recipes and modules.

python docs/site/pages.py FOLDER
"""

from __future__ import annotations

import argparse
import ast
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
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.main import build_parser

ROOT = Path(__file__).parents[2]
GUIDES = (
    "cluster",
    "data",
    "objectives",
    "training",
    "finetuning",
    "label-studies",
    "publishing",
    "troubleshooting",
    "adding-a-sensor",
    "adding-an-objective",
    "design-choices",
)
ROOMS = {"shards": "Shards", "ssl": "Encoders, objectives, loop", "finetune": "Fine-tuning, studies, publishing"}
RUNS = {
    "Pretraining": (PretrainConfig, "`accelerate launch pretrain.py recipe=... key=value`"),
    "Fine-tuning": (FinetuneConfig, "`bocage finetune recipe=... key=value`"),
    "Label studies": (StudyConfig, "`bocage study run recipe=... key=value`"),
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|mailto:|#)[^)#\s]+)(#[^)]*)?\)")


def put_together(out: Path) -> None:
    """Write all sources to a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "reference").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "study", out / "extra" / "study")
    for path in (ROOT / "docs").iterdir():
        if path.suffix in (".png", ".svg", ".csv"):
            shutil.copy(path, out)
            shutil.copy(path, out / "extra")
    shutil.copytree(ROOT / "docs" / "study", out / "study", ignore=shutil.ignore_patterns("*.html", "*.tex", "*.csv"))
    (out / "quickstart.md").write_text(relinked(notebook_page("quickstart"), "examples"), encoding="utf-8")
    for name in GUIDES:
        (out / f"{name}.md").write_text(relinked((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), "docs"))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (out / name).write_text(relinked((ROOT / name).read_text(encoding="utf-8"), "."), encoding="utf-8")
    home = relinked((ROOT / "README.md").read_text(encoding="utf-8"), ".").replace("](docs/", "](")
    (out / "index.md").write_text(home + contents(), encoding="utf-8")
    (out / "reference" / "recipes.md").write_text(recipes_reference(), encoding="utf-8")
    (out / "reference" / "commands.md").write_text(commands_reference(), encoding="utf-8")
    modules_reference(out / "reference")


def contents() -> str:
    """The table of contents, which Sphinx wants on the first page."""
    guides = "\n".join(("quickstart", *GUIDES))
    reference = "reference/commands\nreference/recipes\nreference/modules\nCONTRIBUTING\nCHANGELOG"
    return (
        f"\n```{{toctree}}\n:hidden:\n:caption: Guides\n\n{guides}\n```\n"
        f"\n```{{toctree}}\n:hidden:\n:caption: Reference\n\n{reference}\n```\n"
    )


def notebook_page(name: str) -> str:
    """A notebook of examples/ as a page of its texts and code; what it draws is for those who run it."""
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [f"`jupyter lab examples/{name}.ipynb` runs this page."]
    for cell in cells:
        text = "".join(cell["source"])
        code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{code}\n```")
    parts[:2] = parts[1::-1]  # the title comes first
    return "\n\n".join(parts) + "\n"


def relinked(text: str, folder: str) -> str:
    """A page whose links to code, which has no address here, are names, and those to reports lead to them as they are.

    Raises:
        ValueError: a link leads nowhere.
    """

    def told(link: re.Match[str]) -> str:
        name, target, anchor = link[1], link[2], link[3] or ""
        path = (ROOT / folder / target).resolve()
        if not path.exists():
            raise ValueError(f"link to {target}: there is no such file")
        inside = path.relative_to(ROOT).as_posix()
        if inside.startswith("docs/study/") or inside.endswith(".csv"):
            return f'<a href="{inside.removeprefix("docs/")}">{name}</a>'
        if inside == "README.md":
            return f"[{name}](index.md{anchor})"
        if path.suffix == ".md":
            return f"[{name}]({inside.removeprefix('docs/')}{anchor})"
        return name

    return LINK.sub(told, text)


def described(schema: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields."""
    text = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"    ([a-z_]+(?:, [a-z_]+)*): (.*)", line):
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def rows(schema: type, above: str = "", given: Any = None) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every field, those of nested dataclasses below; ``given``: values of a nested one."""
    about, hints = described(schema), get_type_hints(schema)
    for item in fields(schema):
        key, text = f"{above}{item.name}", about.get(item.name, "")
        value = default(item) if given is None else getattr(given, item.name)
        if not text:
            raise ValueError(f"{schema.__name__}.{item.name}: its docstring does not say what it is")
        if is_dataclass(value) and any(is_dataclass(part) for part in (hints[item.name], *get_args(hints[item.name]))):
            yield key, "", text
            yield from rows(type(value), f"{key}.", value)
        else:
            yield key, "" if value is MISSING else f"`{shown(value)}`", text


def default(item: Field[Any]) -> Any:
    """The default of a field; MISSING where there is none."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def recipes_reference() -> str:
    """Every key of every recipe."""
    lines = [
        "# Keys of recipes\n",
        "Made from the dataclasses that recipes become. Defaults are those of the code, which recipes override:",
        "`--print-config` shows what a recipe says.",
    ]
    for title, (schema, command) in RUNS.items():
        lines += [f"\n## {title}\n", f"{command}\n", "| key | default | |", "|---|---|---|"]
        for key, value, text in rows(schema):
            told = re.sub(r"``([^`]*)``", r"`\1`", text)
            lines.append(f"| `{key}` | {value} | {told} |")
    return "\n".join(lines) + "\n"


def commands_reference() -> str:
    """What ``--help`` says of every command."""
    os.environ["COLUMNS"] = "110"
    parser = build_parser()
    lines = [
        "# Commands\n",
        "`bocage COMMAND --help` prints the same. Pretraining is `accelerate launch pretrain.py`: see the guides.",
    ]

    def told(parser: argparse.ArgumentParser, depth: int) -> None:
        lines.append(f"\n{'#' * depth} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```")
        for action in parser._actions:
            for below in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                told(below, depth + 1)

    told(parser, 2)
    return "\n".join(lines) + "\n"


def modules_reference(out: Path) -> None:
    """A page a module, from its docstrings, and a list of them."""
    lines, pages = ["# Modules"], []
    for room, title in ROOMS.items():
        lines += [f"\n## {title}\n", "| module | |", "|---|---|"]
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.name == "__init__.py":
                continue
            name = ".".join(("bocage", *path.relative_to(ROOT).with_suffix("").parts))
            pages.append(name)
            (out / f"{name}.md").write_text(f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
            first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            told = re.sub(r"``([^`]*)``", r"`\1`", first)
            lines.append(f"| [{name}]({name}.md) | {told} |")
    listed = "\n".join(pages)
    (out / "modules.md").write_text("\n".join([*lines, f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"]))


if __name__ == "__main__":
    put_together(Path(sys.argv[1]))
