"""What ``config.json`` of a published encoder says: its versioned schema, written and strictly read.

Section ``bocage`` is all that bocage reads:

- ``schema``: version of this section.
- ``architecture``, ``name``, ``options``, ``fixed_size``: see ``EncoderConfig``.
- ``input``: see ``InputSpec``: sensor, bands with their quantities and wavelengths (nm), channels in the encoder's
  order, representation, mean and standard deviation by channel, ground sampling distance (m), no-data rule.
- ``units``: of the channels, of ``mean`` and of ``std``.
- ``dates``: for series, what dates count; null for images.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from bocage.shards.errors import InputError
from bocage.shards.modality import Quantity, Representation
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Architecture, Encoder, EncoderConfig
from bocage.ssl.encoders.timm_format import timm_description

CONFIG_FILE = "config.json"
SCHEMA = 1
"""Version of the section; a loader refuses a newer one."""

_DATES = "days since 15 May of the date's own year"
_UNITS: dict[Representation, str] = {
    "linear": "stored values",
    "decibel": "dB",
    "relief": "m",
    "elevation": "m",
}
_SECTION: dict[str, tuple[Any, str]] = {
    "schema": (int, "a whole number"),
    "architecture": (str, "a text"),
    "name": (str, "a text"),
    "options": (dict, "a mapping"),
    "fixed_size": (int | None, "a whole number or null"),
    "input": (dict, "a mapping"),
    "units": (str, "a text"),
    "dates": (str | None, "a text or null"),
}
_LISTS = ("bands", "quantities", "wavelengths", "channels", "mean", "std")
_LARGEST = 1 << 18  # bytes; a real description takes a few thousand
_LARGEST_IMAGE = 1 << 12  # pixels a side: attention masks of fixed sizes grow with the area


def describe(encoder: Encoder) -> dict[str, Any]:
    """The content of ``config.json``; for a Swin, what timm needs as well."""
    spec, config = encoder.spec, encoder.config
    others = timm_description(encoder) if config.architecture == "swin" else {"architecture": config.architecture}
    return {
        **others,
        "bocage": {
            "schema": SCHEMA,
            "architecture": config.architecture,
            "name": config.name,
            "options": config.options,
            "fixed_size": config.fixed_size,
            "input": spec.to_json(),
            "units": _UNITS[spec.representation],
            "dates": _DATES if spec.series else None,
        },
    }


def is_description(path: Path) -> bool:
    """Whether a file is the description of an encoder, of this version or another."""
    try:
        _section(path)
    except InputError:
        return False
    return True


def read_description(path: Path) -> tuple[InputSpec, EncoderConfig]:
    """What a ``config.json`` says of the input and the architecture.

    Raises:
        InputError: the file is missing, not JSON, not of an encoder, of a newer version, or a value is wrong.
    """
    section = _section(path)
    try:
        return _checked(section)
    except (TypeError, ValueError, OverflowError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: section 'bocage': {' '.join(str(error).split())}") from error


def _section(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing or not a file: {path.parent} is not an encoder that bocage wrote")
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path} is larger than any description of an encoder")
        content = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("bocage"), dict):
        raise InputError(f"{path} has no section 'bocage': it does not describe an encoder of bocage")
    section: dict[str, Any] = content["bocage"]
    return section


def _checked(section: dict[str, Any]) -> tuple[InputSpec, EncoderConfig]:
    """Raises ``TypeError``, ``ValueError`` or ``OverflowError``, in a sentence, on anything out of order."""
    schema = section.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema = {reprlib.repr(schema)} is not a version number")
    if schema > SCHEMA:
        raise ValueError(f"schema {reprlib.repr(schema)} is newer than {SCHEMA}, which is read: install a newer bocage")
    _check_keys(section, set(_SECTION), "")
    for key, (kind, words) in _SECTION.items():
        if not isinstance(section[key], kind):
            raise TypeError(f"{key} = {reprlib.repr(section[key])} is not {words}")
    if section["architecture"] not in get_args(Architecture):
        raise ValueError(f"architecture = {reprlib.repr(section['architecture'])} is unknown to this bocage")
    if section["fixed_size"] is not None and not 0 < section["fixed_size"] <= _LARGEST_IMAGE:
        raise ValueError(f"fixed_size = {reprlib.repr(section['fixed_size'])} is not the side of an image")
    spec = checked_input(section["input"])
    if section["units"] != _UNITS[spec.representation] or section["dates"] != (_DATES if spec.series else None):
        raise ValueError(f"units or dates are not those of a {spec.representation} input of this bocage")
    return spec, EncoderConfig(
        architecture=section["architecture"],
        name=section["name"],
        options=section["options"],
        fixed_size=section["fixed_size"],
    )


def _check_keys(given: dict[str, Any], valid: set[str], where: str) -> None:
    if differing := sorted(set(given) ^ valid):
        raise ValueError(f"missing or unknown keys: {', '.join(where + reprlib.repr(key)[1:-1] for key in differing)}")


def checked_input(given: dict[str, Any]) -> InputSpec:
    """The input spec that JSON describes, after the checks that a dataclass does not make.

    Raises:
        TypeError, ValueError: a key or value is wrong.
    """
    _check_keys(given, {field.name for field in fields(InputSpec)}, "input.")
    for key in _LISTS:
        if not isinstance(given[key], list) or not given[key]:
            raise TypeError(f"input.{key} = {reprlib.repr(given[key])} is not a list of at least one value")
    for name in (given["modality"], *given["bands"], *given["channels"]):
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise TypeError(f"input: {reprlib.repr(name)} is not the name of a modality, band or channel")
    for quantity in given["quantities"]:
        if quantity not in get_args(Quantity):
            raise ValueError(f"input.quantities: {reprlib.repr(quantity)} is unknown to this bocage")
    if given["representation"] not in get_args(Representation):
        raise ValueError(f"input.representation = {reprlib.repr(given['representation'])} is unknown to this bocage")
    if not isinstance(given["series"], bool):
        raise TypeError(f"input.series = {reprlib.repr(given['series'])} is neither true nor false")
    _check_numbers("mean", given["mean"])
    _check_numbers("std", given["std"], least=0.0)
    _check_numbers("gsd", [given["gsd"]], above=0.0)
    _check_numbers("wavelengths", [value for value in given["wavelengths"] if value is not None], above=0.0)
    _check_numbers("nodata_below", [] if given["nodata_below"] is None else [given["nodata_below"]])
    return InputSpec.from_json(given)


def _check_numbers(key: str, values: list[Any], *, least: float = -math.inf, above: float = -math.inf) -> None:
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value) or value < least or value <= above:
            raise ValueError(f"input.{key}: {reprlib.repr(value)} is not a finite number in its range")
