"""Write and validate ``config.json`` of a published encoder.

bocage reads the section ``bocage`` only:

- ``schema``: version of this section.
- ``architecture``, ``name``, ``options``, ``fixed_size``: see ``EncoderConfig``.
- ``input``: see ``InputSpec``: sensor, bands with their quantities and wavelengths (nm), channels in the encoder's
  order, representation, mean and standard deviation by channel, ground sampling distance (m), nodata rule.
- ``units``: units of the channels, of ``mean`` and of ``std``.
- ``dates``: unit of the dates of a series; null for images.
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
from bocage.ssl.encoders.timm_format import timm_config

CONFIG_FILE = "config.json"
SCHEMA = 1
"""Version of the section; newer versions are an error."""

_DATES = "days since 15 May of the date's own year"
_UNITS: dict[Representation, str] = {
    "linear": "stored values",
    "decibel": "dB",
    "relief": "m",
    "elevation": "m",
}
_SECTION: dict[str, tuple[Any, str]] = {
    "schema": (int, "an integer"),
    "architecture": (str, "a string"),
    "name": (str, "a string"),
    "options": (dict, "a mapping"),
    "fixed_size": (int | None, "an integer or null"),
    "input": (dict, "a mapping"),
    "units": (str, "a string"),
    "dates": (str | None, "a string or null"),
}
_LISTS = ("bands", "quantities", "wavelengths", "channels", "mean", "std")
_MAX_BYTES = 1 << 18  # of config.json; a real one has a few thousand
_MAX_FIXED_SIZE = 1 << 12  # pixels; attention masks of a fixed size grow with its area


def encoder_config_json(encoder: Encoder) -> dict[str, Any]:
    """Return the content of ``config.json``, for a Swin with the keys that timm reads."""
    spec, config = encoder.spec, encoder.config
    top_level = timm_config(encoder) if config.architecture == "swin" else {"architecture": config.architecture}
    return {
        **top_level,
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


def is_encoder_config(path: Path) -> bool:
    """Whether a file is the ``config.json`` of an encoder, of any schema version."""
    try:
        _read_section(path)
    except InputError:
        return False
    return True


def read_encoder_config(path: Path) -> tuple[InputSpec, EncoderConfig]:
    """Read the input spec and the architecture from ``config.json``.

    Raises:
        InputError: the file is missing, not JSON, not of an encoder, of a newer version, or a value is invalid.
    """
    section = _read_section(path)
    try:
        return _parse_section(section)
    except (TypeError, ValueError, OverflowError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: section 'bocage': {' '.join(str(error).split())}") from error


def _read_section(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing or not a file: {path.parent} is not an encoder saved by bocage")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than any config.json of an encoder")
        content = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("bocage"), dict):
        raise InputError(f"{path} has no section 'bocage': it is not the config.json of a bocage encoder")
    section: dict[str, Any] = content["bocage"]
    return section


def _parse_section(section: dict[str, Any]) -> tuple[InputSpec, EncoderConfig]:
    """Parse the section; raises ``TypeError``, ``ValueError`` or ``OverflowError`` on an invalid key or value."""
    schema = section.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema = {reprlib.repr(schema)} is not a version number")
    if schema > SCHEMA:
        raise ValueError(f"schema {reprlib.repr(schema)} is newer than {SCHEMA}: install a newer bocage")
    _check_keys(section, set(_SECTION), "")
    for key, (kind, expected) in _SECTION.items():
        if not isinstance(section[key], kind):
            raise TypeError(f"{key} = {reprlib.repr(section[key])} is not {expected}")
    if section["architecture"] not in get_args(Architecture):
        raise ValueError(f"architecture = {reprlib.repr(section['architecture'])} is unknown to this version of bocage")
    if section["fixed_size"] is not None and not 0 < section["fixed_size"] <= _MAX_FIXED_SIZE:
        raise ValueError(
            f"fixed_size = {reprlib.repr(section['fixed_size'])} is not an image side from 1 to {_MAX_FIXED_SIZE} px"
        )
    spec = parse_input_spec(section["input"])
    if section["units"] != _UNITS[spec.representation] or section["dates"] != (_DATES if spec.series else None):
        raise ValueError(f"units or dates do not match a {spec.representation} input of this version of bocage")
    return spec, EncoderConfig(
        architecture=section["architecture"],
        name=section["name"],
        options=section["options"],
        fixed_size=section["fixed_size"],
    )


def _check_keys(section: dict[str, Any], valid: set[str], prefix: str) -> None:
    if differing := sorted(set(section) ^ valid):
        raise ValueError(f"missing or unknown keys: {', '.join(prefix + reprlib.repr(key)[1:-1] for key in differing)}")


def parse_input_spec(section: dict[str, Any]) -> InputSpec:
    """Parse the input spec from JSON, with the type checks that a dataclass does not make.

    Raises:
        TypeError, ValueError: a key or value is invalid.
    """
    _check_keys(section, {field.name for field in fields(InputSpec)}, "input.")
    for key in _LISTS:
        if not isinstance(section[key], list) or not section[key]:
            raise TypeError(f"input.{key} = {reprlib.repr(section[key])} is not a list of at least one value")
    for name in (section["modality"], *section["bands"], *section["channels"]):
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise TypeError(f"input: {reprlib.repr(name)} is not the name of a modality, band or channel")
    for quantity in section["quantities"]:
        if quantity not in get_args(Quantity):
            raise ValueError(f"input.quantities: {reprlib.repr(quantity)} is unknown to this version of bocage")
    if section["representation"] not in get_args(Representation):
        raise ValueError(
            f"input.representation = {reprlib.repr(section['representation'])} is unknown to this version of bocage"
        )
    if not isinstance(section["series"], bool):
        raise TypeError(f"input.series = {reprlib.repr(section['series'])} is not true or false")
    _check_numbers("mean", section["mean"])
    _check_numbers("std", section["std"], minimum=0.0)
    _check_numbers("gsd", [section["gsd"]], above=0.0)
    _check_numbers("wavelengths", [value for value in section["wavelengths"] if value is not None], above=0.0)
    for key in ("nodata_below", "nodata_above"):
        _check_numbers(key, [] if section[key] is None else [section[key]])
    return InputSpec.from_json(section)


def _check_numbers(key: str, values: list[Any], *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value) or value < minimum or value <= above:
            raise ValueError(f"input.{key}: {reprlib.repr(value)} is not a finite number in the valid range")
