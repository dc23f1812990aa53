"""Match file names against patterns with named fields, such as ``{site}/image/{x}-{y}.tif``."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

from bocage.shards.errors import InputError

RASTER_EXTENSIONS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img", ".bmp")
"""Extensions of the files that count as rasters in a folder without a description, in lower case."""

_TOKEN = re.compile(r"\{(?P<field>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<wild>\*\*/|\*)")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_-]+")


class FilePattern:
    """Pattern of paths relative to a folder.

    ``{name}`` matches one or more characters of one folder or file name and gives a field; a field that occurs twice
    has the same value in both places. ``*`` matches any characters of one name, ``**/`` any folders. Upper and lower
    case of the extension are the same.

    Args:
        text: pattern, with ``/`` between folders.

    Attributes:
        text: the pattern.
        fields: names of the fields, in order.
        literals: number of characters that are neither fields nor wildcards.
        folder: deepest folder that all matching paths are in; empty for any.

    Raises:
        InputError: a brace is unbalanced, or the pattern is absolute or leaves the folder.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields: list[str] = []
        if text.startswith("/") or ".." in text.split("/"):
            raise InputError(f"files: {text!r}: give a path below the source folder")
        expression, position = "", 0
        for token in _TOKEN.finditer(text):
            expression += re.escape(text[position : token.start()])
            position = token.end()
            if token["wild"]:
                expression += "(?:[^/]+/)*" if token["wild"] == "**/" else "[^/]*"
            elif token["field"] in self.fields:
                expression += f"(?P={token['field']})"
            else:
                self.fields.append(token["field"])
                expression += f"(?P<{token['field']}>[^/]+?)"
        rest = text[position:]
        if "{" in re.sub(_TOKEN, "", text) or "}" in re.sub(_TOKEN, "", text):
            raise InputError(f"files: {text!r}: a brace is not closed, or a field is not a plain name")
        self.literals = len(re.sub(_TOKEN, "", text))
        self.folder = "/".join(takewhile(lambda part: not _TOKEN.search(f"{part}/"), text.split("/")[:-1]))
        stem, dot, extension = rest.rpartition(".")
        expression += re.escape(stem) + (re.escape(dot) + f"(?i:{re.escape(extension)})" if dot else re.escape(rest))
        self._expression = re.compile(expression)

    def match(self, path: str) -> dict[str, str] | None:
        """Fields of a path relative to the folder; None if it does not match.

        Raises:
            InputError: the path matches and is not UTF-8.
        """
        match = self._expression.fullmatch(path)
        if match is None:
            return None
        check_name(path)
        return match.groupdict()


def match_patterns(patterns: Mapping[str, FilePattern], path: str) -> dict[str, dict[str, str]]:
    """Fields of a path by name of the patterns that match it.

    Of several patterns, only those with the most literal characters count: ``{tile}_mask.tif`` takes the masks from
    ``{tile}.tif``. Equal patterns share a file.

    Raises:
        InputError: the path matches and is not UTF-8.
    """
    matches = {name: fields for name, pattern in patterns.items() if (fields := pattern.match(path)) is not None}
    most = max((patterns[name].literals for name in matches), default=0)
    return {name: fields for name, fields in matches.items() if patterns[name].literals == most}


def check_name(path: str | Path) -> None:
    """Check that a path is UTF-8, because neither rasterio nor Arrow takes other names.

    Raises:
        InputError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise InputError(f"{shown}: the name is not UTF-8; rename the folder or file, e.g. with convmv") from None


def choose_rasters(paths: Iterable[str]) -> list[str]:
    """Choose the paths with the extension of a raster.

    Raises:
        InputError: one of them is not UTF-8.
    """
    rasters = [path for path in paths if path.lower().endswith(RASTER_EXTENSIONS)]
    for path in rasters:
        check_name(path)
    return rasters


def list_files(root: Path, folders: Collection[str] = ("",)) -> Iterator[str]:
    """Paths of all files below ``root``, relative to it, with ``/`` between folders, in a fixed order.

    Hidden files and folders are left out. Links to folders are followed once.

    Args:
        root: the folder.
        folders: folders below ``root`` to which the search is limited. Of any other folder beside them only its own
            path is given, with ``/`` at the end, because it may be large.

    Raises:
        InputError: ``root`` is no folder or its name is not UTF-8, or a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    check_name(root)
    limits = [f"{folder}/" if folder else "" for folder in folders]
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        prefix = Path(folder).relative_to(root).as_posix().removeprefix(".")
        prefix += "/" if prefix else ""
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield prefix + name
        for name in list(names):
            if not any(_is_within_or_above(f"{prefix}{name}/", wanted) for wanted in limits):
                names.remove(name)
                yield f"{prefix}{name}/"


def _is_within_or_above(folder: str, wanted: str) -> bool:
    """Whether a folder is ``wanted``, inside it, or one that holds it; both end with ``/``, but for the root."""
    return folder.startswith(wanted) or wanted.startswith(folder)


def fill_template(template: str, fields: Mapping[str, str], what: str) -> str:
    """Fill the fields of a template.

    Args:
        template: text with fields in braces.
        fields: value of each field.
        what: key of the description that holds the template, for messages.

    Raises:
        InputError: the template names an unknown field.
    """

    def value(token: re.Match[str]) -> str:
        name = token["field"]
        if name is None:
            return token[0]
        if name not in fields:
            raise InputError(f"{what}: {template!r}: no field {name!r}; fields: {', '.join(fields) or 'none'}")
        return fields[name]

    return _TOKEN.sub(value, template)


def plain_path(text: str) -> str:
    """Text whose parts between ``/`` are plain names."""
    return "/".join(map(plain_name, text.split("/")))


def plain_name(text: str) -> str:
    """Text of ASCII letters, digits, ``-`` and ``_``, for keys, which name members of tars.

    Accents of ASCII letters are dropped, and other letters become their code, such as ``u5317``. Runs of other
    characters become one ``-``.
    """
    if not text.isascii():
        text = "".join(map(_spell, unicodedata.normalize("NFC", "".join(_without_accents(text)))))
    return _FORBIDDEN.sub("-", text)


def _without_accents(text: str) -> Iterator[str]:
    """Decomposed characters without marks of ASCII letters; those of other letters make other letters."""
    base = ""
    for character in unicodedata.normalize("NFKD", text):
        is_mark = bool(unicodedata.combining(character))
        base = base if is_mark else character
        if not (is_mark and base.isascii()):
            yield character


def _spell(character: str) -> str:
    is_letter = character.isalnum() or unicodedata.category(character).startswith("M")  # vowel signs are marks
    return character if character.isascii() or not is_letter else f"u{ord(character):04x}"
