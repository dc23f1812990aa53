"""Describe a dataset that is not FLAIR-HUB: its sensors, labels, file names and splits.

``dataset.yaml`` holds the keys of ``DatasetDescription``. ``build_registry`` turns them into the modalities that shards
store; the other modules of this package turn them into a catalogue of patches.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from bocage.shards.classes import ClassScheme
from bocage.shards.dataset_info import DatasetInfo
from bocage.shards.errors import InputError, counted
from bocage.shards.modality import (
    Band,
    CodecName,
    Modality,
    Quantity,
    Registry,
    Representation,
    Role,
    representation_channels,
)
from bocage.shards.source.described.nodata import Nodata

Kind = Literal["tiles", "rasters", "table"]
UNUSED = "unused"
"""Quantity of a band of the files that the shards leave out, such as an alpha band."""

IGNORED = "ignored"
"""Name of the class that ``ignore`` values get. Neither losses nor scores count it."""

TABLE_FIELDS = ("key", "date", "block")
"""Fields of a table that need no column."""

DTYPES = ("uint8", "uint16", "int16", "float32")
_MAX_CLASSES = 255
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_GREY_CLASSES = ("background", "other", "none", "unlabelled", "unlabeled")
_COLOUR = re.compile(r"[0-9a-fA-F]{6}")
TAKEN_NAMES = frozenset(
    "apply bfloat16 buffers children clear compile copy cpu cuda double eval float forward fromkeys get half ipu items "
    "keys modules mtia parameters pop popitem setdefault to train training type update values xpu".split()
)
"""Attributes of torch's ModuleDict, which holds encoders by the names of their sensors."""

_MASK_QUANTITIES = ("snow_probability", "cloud_probability")
_SPLIT_VALUES = ("train", "valid", "test")
_UNITS_PER_SIDE = 16  # of a default mask unit; the FLAIR-HUB images have as many or half
_SHORTEST_WAVELENGTH = 100.0  # nm; optical and thermal wavelengths in micrometres are all below
_CHANNEL_GROUPS = (700.0, 1000.0)  # nm; bounds between visible, near infrared and short-wave infrared


@dataclass(frozen=True, kw_only=True)
class SensorDescription:
    """One sensor of a dataset.

    Attributes:
        role: ``image``, ``series`` (images of several dates), or ``mask`` (snow and cloud probability of a series).
        files: pattern of the paths below the source folder, see ``file_patterns``; not for tables.
        bands: centre wavelength in nm, or name of the quantity, of each band of the files, in order. ``unused`` leaves
            the band out.
        columns: column of each band in a table; the default is the name of the band.
        dtype: type of the values: ``uint8``, ``uint16``, ``int16`` or ``float32``.
        pixel: side of a pixel on the ground, in metres; not for tables, whose patches are one pixel.
        pixel_tolerance: relative difference between ``pixel`` and the pixel of a file that is still accepted.
        nodata: values that mark missing pixels; ``.nan`` for NaN. A value up to 0 also marks all lower ones, a value
            above 0 all higher ones.
        representation: conversion of the values before standardisation, see ``modality.Modality``.
        groups: groups of correlated channels, see ``modality.Modality``; the default groups by wavelength.
        unit: side of a mask unit, in pixels; 0 chooses it from the size of a patch.
        codec: codec of the shards; empty chooses it from the dtype.
        mask_of: series that a mask belongs to.

    Raises:
        ValueError: a value is missing, unknown or out of range.
    """

    role: str = "image"
    files: str = ""
    bands: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    pixel: float = 0.0
    pixel_tolerance: float = 0.01
    nodata: list[float] = field(default_factory=list)
    representation: str = "linear"
    groups: list[list[str]] = field(default_factory=list)
    unit: int = 0
    codec: str = ""
    mask_of: str = ""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("role", self.role, get_args(Role)[:3]),
            ("dtype", self.dtype, DTYPES),
            ("representation", self.representation, get_args(Representation)),
            ("codec", self.codec or "plain", get_args(CodecName)),
        ):
            if value not in known:
                raise ValueError(f"{key}={value!r} is none of {', '.join(known)}")
        if not self.used_bands:
            raise ValueError("bands: name at least one, e.g. bands: {R: 650, G: 550, B: 460}")
        if not 0 <= self.pixel < math.inf:
            raise ValueError(f"pixel={self.pixel} must be a positive number of metres")
        if unknown := sorted(set(self.columns) - set(self.bands)):
            raise ValueError(f"columns.{unknown[0]}: not among the bands {', '.join(self.bands)}")
        if not 0 < self.pixel_tolerance < 1:
            raise ValueError(f"pixel_tolerance={self.pixel_tolerance} must be between 0 and 1")
        if (self.role == "mask") != bool(self.mask_of):
            raise ValueError("mask_of: masks, and only they, name the series that they belong to")
        for name, value in self.bands.items():
            _band(name, value)
        if self.role == "mask" and (wrong := [b.name for b in self.used_bands if b.quantity not in _MASK_QUANTITIES]):
            raise ValueError(f"bands.{wrong[0]}: bands of a mask are {' and '.join(_MASK_QUANTITIES)}, in percent")

    @property
    def used_bands(self) -> tuple[Band, ...]:
        """Bands of the shards, in the order of the files."""
        return tuple(_band(name, value) for name, value in self.bands.items() if value != UNUSED)

    @property
    def used_indices(self) -> tuple[int, ...]:
        """Positions of these bands in the files, from 0."""
        return tuple(index for index, value in enumerate(self.bands.values()) if value != UNUSED)

    @property
    def missing(self) -> Nodata:
        """Which values are missing, and what the shards store for them."""
        return Nodata.of_sensor(self.dtype, self.nodata)

    @property
    def valid_limits(self) -> tuple[float | None, float | None]:
        """Lowest and highest valid value of the dtype; None if ``nodata`` sets no such limit."""
        below, above = self.missing.below, self.missing.above
        if self.dtype == "float32":
            lowest = None if below is None else float(np.nextafter(np.float32(below), np.float32(np.inf)))
            highest = None if above is None else float(np.nextafter(np.float32(above), np.float32(-np.inf)))
            return lowest, highest
        return None if below is None else below + 1, None if above is None else above - 1


@dataclass(frozen=True, kw_only=True)
class LabelDescription:
    """One label raster of a dataset, or one label column of a table.

    Attributes:
        files: pattern of the paths below the source folder, see ``file_patterns``; not for tables.
        band: band of the files, from 1.
        column: column of a table; the default is the name of the label.
        pixel: side of a pixel on the ground, in metres; not for tables.
        pixel_tolerance: see ``SensorDescription``.
        classes: name of the class of each value. Values with the same name are one class. Shards number the classes
            from 0, in this order.
        colours: colour ``rrggbb`` of classes, by one of their values; others get a colour from a fixed sequence.
        ignore: values without a class, which losses and scores do not count.
        unscored: one value of each class that losses and scores do not count.

    Raises:
        ValueError: a value is missing, unknown, out of range or given twice.
    """

    files: str = ""
    band: int = 1
    column: str = ""
    pixel: float = 0.0
    pixel_tolerance: float = 0.01
    classes: dict[int, str] = field(default_factory=dict)
    colours: dict[int, str] = field(default_factory=dict)
    ignore: list[int] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("classes: name at least one, e.g. classes: {0: background, 1: building}")
        if both := sorted(set(self.ignore) & set(self.classes)):
            raise ValueError(f"ignore: {both[0]} is the class {self.classes[both[0]]!r} too")
        if len(self.class_names) + bool(self.ignore) > _MAX_CLASSES:
            raise ValueError(
                f"classes: {counted(len(self.class_names), 'class')} are more than shards hold, {_MAX_CLASSES}"
            )
        for key, values in (("colours", self.colours), ("unscored", self.unscored)):
            if unknown := [value for value in values if value not in self.classes]:
                raise ValueError(f"{key}: {unknown[0]} is not among the classes")
        colours: dict[str, str] = {}
        for value, colour in self.colours.items():
            if not _COLOUR.fullmatch(colour):
                raise ValueError(f"colours.{value}={colour!r} is not a colour rrggbb")
            if colours.setdefault(self.classes[value], colour) != colour:
                raise ValueError(f"colours.{value}={colour!r}: the class {self.classes[value]!r} has another colour")
        if not 0 <= self.pixel < math.inf:
            raise ValueError(f"pixel={self.pixel} must be a positive number of metres")
        if self.band < 1:
            raise ValueError(f"band={self.band} must be at least 1")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by their number in the shards."""
        return tuple(dict.fromkeys(self.classes.values()))

    @property
    def stored_values(self) -> dict[int, int]:
        """Class number in the shards of each value of the files."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        stored = {value: numbers[name] for value, name in self.classes.items()}
        return stored | dict.fromkeys(self.ignore, len(numbers))

    def scheme(self, name: str) -> ClassScheme:
        """Classes of the shards: those of ``classes`` in order, then ``ignored`` if there are values to ignore."""
        names = list(self.class_names)
        chosen = {self.classes[value]: colour for value, colour in self.colours.items()}
        colours = [
            chosen.get(class_name, _default_colour(number, class_name)) for number, class_name in enumerate(names)
        ]
        unscored = sorted({self.stored_values[value] for value in self.unscored})
        if self.ignore:
            names, colours, unscored = [*names, IGNORED], [*colours, "000000"], [*unscored, len(names)]
        return ClassScheme(name=name, classes=tuple(names), colours=tuple(colours), unscored=tuple(unscored))


@dataclass(frozen=True, kw_only=True)
class SplitDescription:
    """How patches are divided into train, valid and test.

    Attributes:
        by: what is assigned as a whole: ``domain``, ``region``, ``block``, ``key``, another field of the file names, or
            ``file`` for lists of keys.
        train, valid, test: for ``file``, a text file with a key in each line; otherwise a list of values of ``by``,
            ``rest`` for all others, or a fraction of the patches. Fractions are drawn at random.
        seed: seed of the fractions.
        allow_mixed_regions: whether patches of one region may get different values.

    Raises:
        ValueError: no part is given, two are the rest, or fractions add up to more than 1.
    """

    by: str = "region"
    train: Any = None
    valid: Any = None
    test: Any = None
    seed: int = 0
    allow_mixed_regions: bool = False

    def __post_init__(self) -> None:
        parts = self.parts
        if not parts:
            raise ValueError("give train, valid or test")
        for key, part in parts.items():
            is_number = isinstance(part, int | float) and not isinstance(part, bool)
            if self.by == "file" and not isinstance(part, str):
                raise ValueError(f"{key}={part!r} is not the path of a list of keys")
            if self.by != "file" and not (is_number or part == "rest" or isinstance(part, list)):
                raise ValueError(f"{key}={part!r} is neither a list of values of {self.by}, nor rest, nor a fraction")
            if is_number and not 0 < part <= 1:
                raise ValueError(f"{key}={part} must be above 0 and at most 1")
        if list(parts.values()).count("rest") > 1:
            raise ValueError("only one of train, valid and test can be the rest")
        if (total := sum(part for part in parts.values() if isinstance(part, int | float))) > 1 + 1e-9:
            raise ValueError(f"the fractions add up to {total:g}, more than 1")

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that are given, by value of the split."""
        return {key: getattr(self, key) for key in _SPLIT_VALUES if getattr(self, key) is not None}


@dataclass(frozen=True, kw_only=True)
class TableDescription:
    """Columns of a table of pixel series, with a row for each date of a series.

    Attributes:
        files: pattern of the Parquet files below the source folder, see ``file_patterns``.
        key: column that identifies the series; its rows are its dates.
        date: column of the dates: a date, a timestamp, or a text or number in the form ``date_format``.
        longitude, latitude: columns of the position, in degrees (WGS 84); empty if unknown.
        fields: column of each field that ``key``, ``domain``, ``region`` and splits may name, besides ``key``, the
            value of the column ``key``, and the fields of ``files``.

    Raises:
        ValueError: a column is missing, or a field is computed.
    """

    files: str = "*.parquet"
    key: str = "sample_id"
    date: str = "timestamp"
    longitude: str = ""
    latitude: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in (("key", self.key), ("date", self.date)):
            if not column:
                raise ValueError(f"table.{name}: name a column")
        if bool(self.longitude) != bool(self.latitude):
            raise ValueError("table.longitude and table.latitude: name both columns or none")
        if taken := next((name for name in TABLE_FIELDS if name in self.fields), None):
            raise ValueError(f"table.fields.{taken}: {taken} is computed; give the field another name")


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A dataset that is not FLAIR-HUB.

    Attributes:
        name: name of the dataset, for cards and reports.
        licence: licence of the data.
        attribution: credit that the licence demands.
        source: address of the dataset.
        citation: publication that users should cite.
        kind: ``tiles`` (one file a patch and sensor), ``rasters`` (rasters of any size, cut into patches) or ``table``
            (pixel series in Parquet).
        patch: side of a patch on the ground, in metres; or ``512 px`` of the first sensor. Patches of a table are one
            pixel.
        crs: coordinate system of files that have none, such as ``EPSG:2154``.
        key, domain, region: templates of the key, the domain and the region of a patch, with fields of the file names
            in braces, such as ``{site}_{x}-{y}``. The default key is the field ``key`` or all fields; the default
            domain the field ``domain`` or the name of the dataset; the default region the field ``region``, the block
            or the domain.
        blocks: side of the ground blocks of the field ``block``, in metres; 0 for none.
        date_format: format of the field ``date`` of file names, or of text dates of a table, as in
            ``datetime.strptime``.
        min_coverage: smallest fraction of valid pixels of a patch that is cut from rasters.
        table: columns of a table.
        sensors: sensors by name.
        labels: labels by name.
        splits: splits by name, which starts with ``split_``.

    Raises:
        ValueError: a value is missing, unknown or out of range.
    """

    name: str = ""
    licence: str = ""
    attribution: str = ""
    source: str = ""
    citation: str = ""
    kind: str = "tiles"
    patch: Any = None
    crs: str = ""
    key: str = ""
    domain: str = ""
    region: str = ""
    blocks: float = 0.0
    date_format: str = "%Y%m%d"
    min_coverage: float = 1.0
    table: TableDescription = field(default_factory=TableDescription)
    sensors: dict[str, SensorDescription] = field(default_factory=dict)
    labels: dict[str, LabelDescription] = field(default_factory=dict)
    splits: dict[str, SplitDescription] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: give the dataset a name")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is none of {', '.join(get_args(Kind))}")
        if not any(sensor.role != "mask" for sensor in self.sensors.values()):
            raise ValueError("sensors: describe at least one image or series")
        for name in (*self.sensors, *self.labels):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r}: names of sensors and labels have letters, digits, - and _ only")
            if name in TAKEN_NAMES:
                raise ValueError(f"{name!r}: torch has an attribute of this name; give the sensor or label another")
        if both := set(self.sensors) & set(self.labels):
            raise ValueError(f"{min(both)} is a sensor and a label")
        for name, sensor in self.sensors.items():
            if sensor.mask_of and getattr(self.sensors.get(sensor.mask_of), "role", None) != "series":
                raise ValueError(f"sensors.{name}: mask_of={sensor.mask_of!r} is no series among the sensors")
        for name, split in self.splits.items():
            if not (name.startswith("split_") and _NAME.fullmatch(name)):
                raise ValueError(f"splits.{name}: names of splits begin with split_, e.g. split_site")
            if split.by == "block" and not self.blocks:
                raise ValueError(f"splits.{name}: by=block needs blocks, the side of the blocks in metres")
        for name, item in (self.sensors | self.labels).items():
            if self.kind == "table":
                _check_column(name, item)
            else:
                _check_files(name, item)
        if not 0 < self.min_coverage <= 1:
            raise ValueError(f"min_coverage={self.min_coverage} must be above 0 and at most 1")
        if self.blocks < 0:
            raise ValueError(f"blocks={self.blocks} must not be negative")

    @property
    def info(self) -> DatasetInfo:
        """Name, licence and origin."""
        return DatasetInfo(
            name=self.name,
            licence=self.licence,
            attribution=self.attribution,
            source=self.source,
            citation=self.citation,
        )

    @property
    def patch_size(self) -> float:
        """Side of a patch on the ground, in metres.

        Raises:
            InputError: ``patch`` is neither metres nor pixels.
        """
        first = next(iter(self.sensors.values()))
        if isinstance(self.patch, int | float) and not isinstance(self.patch, bool) and 0 < self.patch < math.inf:
            return float(self.patch)
        match = re.fullmatch(r"(\d+) ?px", str(self.patch))
        if match is None or int(match[1]) < 1 or self.kind == "table":
            raise InputError(f"patch={self.patch!r}: give the side of a patch in metres, or as pixels, e.g. 512 px")
        return int(match[1]) * first.pixel


def _check_files(name: str, item: SensorDescription | LabelDescription) -> None:
    """Check what sensors and labels of files need; raises ``ValueError``."""
    if not item.files:
        raise ValueError(f"{name}: files: give the pattern of its files, e.g. images/{{key}}.tif")
    if not item.pixel:
        raise ValueError(f"{name}: pixel: give the side of a pixel on the ground, in metres")
    if item.columns if isinstance(item, SensorDescription) else item.column:
        raise ValueError(f"{name}: only tables have columns; leave them out, or set kind: table")


def _check_column(name: str, item: SensorDescription | LabelDescription) -> None:
    """Check that a sensor or label of a table has no keys of files; raises ``ValueError``."""
    if item.files:
        raise ValueError(f"{name}: files: a table has one pattern of files, table.files; leave this one out")
    if item.pixel:
        raise ValueError(f"{name}: pixel: series of a table are one pixel, as large as patch; leave pixel out")


def build_registry(description: DatasetDescription) -> Registry:
    """Modalities of the shards: the sensors in their order, then the labels.

    Raises:
        InputError: a pixel does not divide the patch, or a sensor contradicts itself.
    """
    modalities = [_sensor(name, sensor, description) for name, sensor in description.sensors.items()]
    side = description.patch_size
    for name, label in description.labels.items():
        size = _size(name, side, label.pixel or side)
        band = Band(name=name, quantity="class", scheme=label.scheme(name))
        modalities.append(
            Modality(name=name, role="label", bands=(band,), dtype="uint8", gsd=side / size, size=size, codec="plain")
        )
    try:
        return Registry(tuple(modalities))
    except ValueError as error:
        raise InputError(f"dataset {description.name}: {error}") from error


def _sensor(name: str, sensor: SensorDescription, description: DatasetDescription) -> Modality:
    side = description.patch_size
    size = _size(name, side, sensor.pixel or side)
    bands = sensor.used_bands
    channels = representation_channels(_literal(sensor.representation), tuple(band.name for band in bands))
    lowest, highest = sensor.valid_limits
    try:
        return Modality(
            name=name,
            role=_literal(sensor.role),
            bands=bands,
            dtype=sensor.dtype,
            gsd=side / size,
            size=size,
            codec=sensor.codec or _default_codec(sensor, len(bands), size),
            representation=_literal(sensor.representation),
            groups=tuple(tuple(group) for group in sensor.groups) or _default_groups(bands, channels),
            unit=sensor.unit or default_unit(size, sensor.role),
            dates_table="description" if _is_dated(sensor, description) else None,
            mask_of=sensor.mask_of or None,
            nodata_below=lowest,
            nodata_above=highest,
        )
    except ValueError as error:
        raise InputError(f"sensors.{error}") from error


def _is_dated(sensor: SensorDescription, description: DatasetDescription) -> bool:
    """Whether the source gives acquisition dates; an image of a table holds what no date changes, such as heights."""
    return sensor.role != "image" if description.kind == "table" else "{date}" in sensor.files


def _literal(value: str) -> Any:
    """A text that was checked to be one of a ``Literal``."""
    return value


def _size(name: str, side: float, pixel: float) -> int:
    """Pixels along a patch; raises ``InputError`` if they are not a whole number to a hundredth of a pixel."""
    size = round(side / pixel)
    if size < 1 or abs(side / pixel - size) > 0.01:
        counts = (math.floor(side / pixel), math.ceil(side / pixel))
        fitting = " or ".join(f"{count * pixel:g}" for count in counts if count)
        raise InputError(
            f"{name}: pixels of {pixel:g} m do not divide a patch of {side:g} m; use a patch of {fitting} m"
        )
    return size


def default_unit(size: int, role: str) -> int:
    """Side of the mask units of a sensor, in pixels.

    Packed masking needs pairs of units, and Swin merges 32 pixels into one cell; so this is the largest of 32, 16, 8
    and 4 pixels with which a patch has at least 8 units, else the largest divisor that leaves two.
    """
    if role == "image":
        for unit in (32, 16, 8, 4):
            if size % (2 * unit) == 0 and size // unit >= min(_UNITS_PER_SIDE // 2, size // 4):
                return unit
    return next((size // parts for parts in range(2, size + 1) if size % parts == 0), 1)


def _default_codec(sensor: SensorDescription, bands: int, size: int) -> CodecName:
    if sensor.role == "mask" or size == 1:
        return "plain"  # a series of one pixel has no neighbours to predict from
    if sensor.dtype == "uint8":
        return "colour" if bands >= 3 else "grey"
    if sensor.dtype == "float32":
        return "height" if sensor.representation in ("relief", "elevation") else "float"
    return "reflectance"


def _default_groups(bands: Sequence[Band], channels: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Channels grouped by wavelength; each channel without a wavelength forms a group alone."""
    if channels != tuple(band.name for band in bands):
        return tuple((channel,) for channel in channels)
    groups: dict[Any, list[str]] = {}
    for band in bands:
        spectral = None if band.wavelength is None else sum(band.wavelength >= bound for bound in _CHANNEL_GROUPS)
        groups.setdefault(band.name if spectral is None else spectral, []).append(band.name)
    return tuple(tuple(group) for group in groups.values())


def _band(name: str, value: Any) -> Band:
    """Band from a wavelength or the name of a quantity; raises ``ValueError``."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        if value < _SHORTEST_WAVELENGTH:
            raise ValueError(f"bands.{name}={value:g}: wavelengths are in nm, e.g. 650 for red")
        return Band(name=name, quantity="reflectance", wavelength=float(value))
    known = [quantity for quantity in get_args(Quantity) if quantity not in ("reflectance", "class")]
    if value == UNUSED:
        return Band(name=name, quantity="other")
    if value not in known:
        raise ValueError(
            f"bands.{name}={value!r} is neither a wavelength in nm nor one of {', '.join(known)}, {UNUSED}"
        )
    return Band(name=name, quantity=_literal(value))


def _default_colour(number: int, name: str) -> str:
    """Colour of a class: grey for the background, else hues at the golden angle, far from each other."""
    if name.lower() in _GREY_CLASSES:
        return "c8c8c8"
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.65 if number % 2 else 0.85, 0.95)
    return f"{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
