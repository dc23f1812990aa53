"""The draft of a description: values with comments, written as YAML."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*|\d+ px")
# Words that YAML 1.1 reads as something else than text.
_RESERVED = frozenset("false n nan no null off on true y yes".split())

Keys = tuple[str, ...]
"""Path of a key, such as ``("sensors", "RGB", "pixel")``."""


@dataclass
class Draft:
    """A description with comments, before the user has checked it.

    Attributes:
        root: source folder that the description is for.
        values: keys of ``DatasetDescription``.
        comments: comment of each key by its path.
        notes: what the user should check or repair.
        sampled: what the draft was made from.
    """

    root: Path
    values: dict[str, Any]
    comments: dict[Keys, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sampled: str = ""

    def to_yaml(self) -> str:
        """The draft as the text of ``dataset.yaml``."""
        head = [f"Drafted by `bocage describe` from {self.sampled}.", *(f"Check: {note}." for note in self.notes)]
        return to_yaml(self.values, self.comments, head)


def to_yaml(values: Mapping[str, Any], comments: Mapping[Keys, str], head: Sequence[str] = ()) -> str:
    """Format values as YAML, each with its comment.

    Args:
        values: mappings, lists, texts, numbers and booleans.
        comments: comment of each key by its path, such as ``("sensors", "RGB", "pixel")``.
        head: paragraphs of the comment at the top.
    """
    lines = [line for text in head for line in _comment(text, "")]
    return "\n".join([*lines, *_block(values, comments, ())]) + "\n"


def _block(values: Mapping[Any, Any], comments: Mapping[Keys, str], above: Keys) -> Iterator[str]:
    indent = "  " * len(above)
    for key, value in values.items():
        path = (*above, str(key))
        comment = comments.get(path, "")
        name = f"{indent}{_scalar(key)}:"
        flow = _flow(value)
        line = f"{name} {flow}"
        has_inner = any(other[: len(path)] == path and other != path for other in comments)
        if isinstance(value, Mapping) and value and (_is_deep(value) or has_inner or len(line) > _WIDTH):
            yield from _with_comment(name, comment, indent)
            yield from _block(value, comments, path)
        elif isinstance(value, list) and len(line) > _WIDTH:
            yield from _with_comment(name, comment, indent)
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            yield from _with_comment(line, comment, indent)


def _is_deep(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(inner, Mapping) for inner in value.values())


def _with_comment(line: str, comment: str, indent: str) -> Iterator[str]:
    if comment and len(line) + 4 + len(comment) > _WIDTH:
        yield from _comment(comment, indent)
        comment = ""
    yield f"{line}  # {comment}" if comment else line


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        text = repr(value)
        return text.replace("e", ".0e", 1) if "e" in text and "." not in text else text  # YAML 1.1 wants the point
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return json.dumps(text, ensure_ascii=False)
