"""Guess the bands of an image from its header, its values and the words of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bocage.shards.draft.names import IMAGE_WORDS
from bocage.shards.draft.survey import ImageValues, RasterHeader
from bocage.shards.errors import InputError
from bocage.shards.source.described.description import UNUSED

_COLOURS: dict[str, Any] = {"R": 650, "G": 550, "B": 460, "NIR": 840}
# Centre wavelengths of Sentinel-2A in nm, rounded (ESA, Sentinel-2 spectral response functions 3.0).
_SENTINEL2 = {
    "B1": 443,
    "B2": 490,
    "B3": 560,
    "B4": 665,
    "B5": 705,
    "B6": 740,
    "B7": 783,
    "B8": 842,
    "B8A": 865,
    "B9": 945,
    "B11": 1610,
    "B12": 2190,
}
_OTHERS: dict[str, Any] = {
    "PAN": 580,
    "VV": "backscatter_vv",
    "VH": "backscatter_vh",
    "DSM": "surface_height",
    "DTM": "terrain_height",
    "DEM": "terrain_height",
}
KNOWN: dict[str, Any] = _COLOURS | _SENTINEL2 | _OTHERS
"""Wavelength in nm, or quantity, of bands with common names."""

_ALIASES = {"RED": "R", "GREEN": "G", "BLUE": "B", "INFRARED": "NIR", "IR": "NIR", "I": "NIR", "N": "NIR"}
_ALIASES |= {"NEAR INFRARED": "NIR", "NEAR-INFRARED": "NIR", "NEARINFRARED": "NIR", "PANCHROMATIC": "PAN"}
_INTERPRETATIONS = {"red": "R", "green": "G", "blue": "B", "nir": "NIR", "pan": "PAN"}
_SENTINEL_NAME = re.compile(r"(?:.*[^A-Z0-9])?B(0?)(\d{1,2}A?)(?:[^A-Z0-9].*)?")
_RADAR_NAME = re.compile(r".*[^A-Z](VV|VH)")
_WORD_NAMES = ("rgb", "rgbi", "rgbn", "cir", "irrg", "ms", "pan", "dsm", "dtm", "dem", "ndsm", "chm", "sar", "thermal")


@dataclass(frozen=True)
class DraftBands:
    """Bands of a sensor.

    Attributes:
        name: name for the sensor.
        bands: wavelength, quantity or ``unused`` of each band, see ``SensorDescription``.
        remarks: what the user should check, by band.
        representation: ``decibel`` for radar in linear units, else ``linear``.
    """

    name: str
    bands: dict[str, Any]
    remarks: dict[str, str]
    representation: str


def guess_bands(header: RasterHeader, values: ImageValues, words: Iterable[str]) -> DraftBands:
    """Guess bands from colour interpretations and descriptions; others are ``other``, with a remark.

    Args:
        header: header of a typical file.
        values: values of a sample of files.
        words: words of the file names, in lower case.
    """
    words = tuple(words)
    bands: dict[str, Any] = {}
    remarks: dict[str, str] = {}
    named = name_bands(header.descriptions)
    for index, (colour, name) in enumerate(zip(header.colours, named, strict=True)):
        position = f"B{index + 1}"
        if name is None and colour in _INTERPRETATIONS and _INTERPRETATIONS[colour] not in bands:
            name = _INTERPRETATIONS[colour]
        if name is None and header.bands == 1:
            name = next((found for word in words if (found := _from_word(word))), None)
        if name is not None and name not in bands:
            bands[name] = KNOWN[name]
        elif colour == "alpha" and _is_opacity(values.few[index]):
            name = "A" if "A" not in bands else position
            bands[name] = UNUSED
            remarks[name] = "alpha"
        else:
            bands[position] = "other"
            remarks[position] = _remark_on_unknown(header, index, list(bands))
    is_radar = set(bands) <= {"VV", "VH"}
    is_linear_radar = is_radar and header.dtypes[0] == "float32" and min(values.lowest) >= 0
    return DraftBands(_sensor_name(bands, words), bands, remarks, "decibel" if is_linear_radar else "linear")


def name_bands(texts: Iterable[str]) -> list[str | None]:
    """Known band that each text names, such as ``S2-L2A-B02``, ``red`` or ``S1-SIGMA0-VV``; None for others.

    ``B2`` alone may be a band of any satellite. ``B02`` and ``B8A`` are Sentinel-2's, and so are the bands beside them.
    """
    upper = [_ALIASES.get(text.strip().upper(), text.strip().upper()) for text in texts]
    matches = [_SENTINEL_NAME.fullmatch(text) for text in upper]
    is_sentinel2 = any(match and (match[1] or match[2] == "8A") for match in matches)
    names: list[str | None] = []
    for text, match in zip(upper, matches):
        if text in _COLOURS or text in _OTHERS:
            names.append(text)
        elif radar := _RADAR_NAME.fullmatch(text):
            names.append(radar[1])
        else:
            found = match is not None and is_sentinel2 and f"B{match[2]}" in _SENTINEL2
            names.append(f"B{match[2]}" if match is not None and found else None)
    return names


def parse_bands(text: str) -> dict[str, Any]:
    """Bands from a list such as ``R,G,B,NIR`` or ``R,G,RE=720,T=other,A=unused``.

    Raises:
        InputError: a band is given twice, or has an unknown name and no value.
    """
    bands: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if not name or name in bands:
            raise InputError(f"--bands {text}: {'a name is missing' if not name else f'{name} is given twice'}")
        if value:
            bands[name] = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value
        elif name in KNOWN:
            bands[name] = KNOWN[name]
        else:
            raise InputError(
                f"--bands {text}: the wavelength of {name} is unknown; give it as {name}=NANOMETRES, or {name}=other, "
                f"or {name}=unused to leave the band out"
            )
    return bands


def _from_word(word: str) -> str | None:
    """Known band that a word of a file name names."""
    if word.upper() in _OTHERS or word.upper() == "NIR":
        return word.upper()
    return name_bands([word])[0]


def _is_opacity(values: frozenset[float] | None) -> bool:
    """Whether the values of a band are those of a mask: GDAL also marks the fourth band of any image as alpha."""
    return values is not None and values <= {0, 1, 255, 65535}


def _remark_on_unknown(header: RasterHeader, index: int, known: list[str]) -> str:
    text = header.descriptions[index]
    described = f"described as {text!r}; " if text else ""
    if index == 3 and known[:3] == ["R", "G", "B"]:
        return f"{described}near infrared? Then NIR: 840"
    return f"{described}name it and give its wavelength in nm, or unused"


def _sensor_name(bands: dict[str, Any], words: tuple[str, ...]) -> str:
    used = [name for name, value in bands.items() if value != UNUSED]
    for word in words:
        if word in _WORD_NAMES:
            return word.upper()
    if set(used) == {"R", "G", "B"}:
        return "RGB"
    if set(used) == {"R", "G", "B", "NIR"}:
        return "RGBI"
    known = [name for name in used if bands[name] == KNOWN.get(name)]
    if len(known) == len(used) > 1 and set(used) <= set(_SENTINEL2):
        return "SENTINEL2"
    if set(used) <= {"VV", "VH"}:
        return "SENTINEL1"
    if len(known) == len(used) == 1:
        return used[0]
    return next((word.upper() for word in reversed(words) if word not in IMAGE_WORDS), "IMAGE")
