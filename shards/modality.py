"""The modality registry: describe every sensor and label raster. No other module lists them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from bocage.shards.classes import COSIA, LPIS_1, LPIS_2, LPIS_3, ClassScheme
from bocage.shards.errors import InputError

__all__ = ["FLAIR_HUB", "Band", "Baseline", "Modality", "Registry", "SimulatedSensor"]

_MAX_SIZE = 1 << 14  # pixels; windows lie on a lattice of that many steps at most

Role = Literal["image", "series", "mask", "label"]
Quantity = Literal[
    "reflectance",
    "backscatter_vv",
    "backscatter_vh",
    "surface_height",
    "terrain_height",
    "snow_probability",
    "cloud_probability",
    "other",
    "class",
]
Representation = Literal["linear", "decibel", "relief", "elevation"]
CodecName = Literal["colour", "grey", "height", "height-5mm", "float", "reflectance", "plain"]
"""Names of the codecs of shard members; ``format.codec`` defines them."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """One band of a raster.

    Attributes:
        name: name of the band.
        quantity: physical quantity that the band measures, ``other`` for one that has no name here, or ``class`` for
            a band of labels.
        wavelength: centre wavelength in nm; required for reflectance bands, None for others.
        scheme: class scheme of the values; required for class bands, None for others.

    Raises:
        ValueError: wavelength or scheme is missing, or does not apply to the quantity.
    """

    name: str
    quantity: Quantity
    wavelength: float | None = None
    scheme: ClassScheme | None = None

    def __post_init__(self) -> None:
        if (self.quantity == "reflectance") != (self.wavelength is not None):
            raise ValueError(f"band {self.name}: reflectance bands, and only they, have a wavelength")
        if (self.quantity == "class") != (self.scheme is not None):
            raise ValueError(f"band {self.name}: class bands, and only they, have a class scheme")


@dataclass(frozen=True, kw_only=True)
class SimulatedSensor:
    """Radiometry of a sensor in the simulator: stored value = ``gain * quantity**gamma + offset`` + noise.

    Attributes:
        gain, offset, gamma: coefficients of the formula.
        noise: standard deviation of additive noise, in stored units.
        looks: number of looks of multiplicative speckle; None for no speckle.
    """

    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    looks: float | None = None


def representation_channels(representation: Representation, bands: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all channels of a representation of ``bands``, in order."""
    if representation in ("relief", "elevation"):
        return (representation, "height")
    return bands


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Input of the published FLAIR-HUB baselines for one modality, from the configurations of IGN's code.

    Attributes:
        channels: channels that the models read, in their order.
        representation: representation of the values, see ``Modality``.
        mean, std: normalisation of each channel; 0 and 1 for models that read raw values.
        alone: name of the channel, as a tuple of one, that some of the models read instead of ``channels``; empty if
            there are no such models.

    Raises:
        ValueError: the number of means or standard deviations differs from the number of channels.
    """

    channels: tuple[str, ...]
    representation: Representation = "linear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    alone: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise ValueError(f"baseline of {self.channels}: needs one mean and one std per channel")


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One raster of a patch.

    Arrays have shape (C, H, W) for images and labels and (T, C, H, W) for series and masks, with H = W = ``size``.

    Attributes:
        name: name in the dataset and in its file names.
        role: ``image`` and ``series`` are encoder inputs, a ``mask`` is the quality mask of the series ``mask_of``, and
            a ``label`` is a raster of classes.
        bands: bands of the raster, in order.
        dtype: NumPy dtype of the stored values.
        gsd: ground sampling distance, in metres.
        size: side of a patch, in pixels; ``size * gsd`` is the side of the registry's patches.
        codec: name of the codec of the shard member (see ``codec.py``).
        representation: conversion of stored values before standardisation. ``linear``: the values. ``decibel``:
            10 log10 of the values. ``relief``: (surface - mean surface of the window, surface - terrain), in metres.
            ``elevation``: (surface, surface - terrain), in metres, the input of the published baselines.
        groups: groups of correlated channels of the representation, normalised together in reconstruction targets
            (MAESTRO, arXiv 2508.10894).
        unit: side of a mask unit, in pixels; for series, side of the blocks in which targets are normalised.
        dates_table: source of the acquisition dates: NAME in FLAIR-HUB's ``GLOBAL_NAME_MTD_DATES.gpkg``, or
            ``description`` if a dataset description gives them; None if they are unknown.
        historical: whether file names have ``195X`` instead of the image year and images show an older landscape.
        mask_of: name of the series that a mask belongs to.
        mean, std: official statistics of the stored values by band, if IGN publishes them.
        baseline: input of the published baselines, if they read this modality.
        nodata_below: stored values below this are nodata; None if there is no such limit.
        nodata_above: stored values above this are nodata; None if there is no such limit.
        sensor: radiometry in the simulator.

    Raises:
        ValueError: the name contains ``.`` or ``/``; ``size`` or ``gsd`` is out of range; the representation is
            unknown; or, for an input, ``groups`` does not hold each channel once, or ``unit`` does not divide
            ``size``.
    """

    name: str
    role: Role
    bands: tuple[Band, ...]
    dtype: str
    gsd: float
    size: int
    codec: str
    representation: Representation = "linear"
    groups: tuple[tuple[str, ...], ...] = ()
    unit: int = 1
    dates_table: str | None = None
    historical: bool = False
    mask_of: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    baseline: Baseline | None = None
    nodata_below: float | None = None
    nodata_above: float | None = None
    sensor: SimulatedSensor = field(default_factory=SimulatedSensor)

    def __post_init__(self) -> None:
        if "." in self.name or "/" in self.name:
            raise ValueError(f"modality name {self.name!r} must not contain '.' or '/'")
        if type(self.size) is not int or not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"{self.name}: size {self.size!r} is not a number of pixels from 1 to {_MAX_SIZE}")
        if not (type(self.gsd) in (int, float) and 0 < self.gsd < math.inf):
            raise ValueError(f"{self.name}: gsd {self.gsd!r} is not a number of metres")
        if self.representation not in get_args(Representation):
            known = ", ".join(get_args(Representation))
            raise ValueError(f"{self.name}: representation {self.representation!r} is not one of {known}")
        if self.is_input:
            if self.unit < 1 or self.size % self.unit:
                raise ValueError(f"{self.name}: units of {self.unit} px do not divide a patch of {self.size} px")
            grouped = [name for group in self.groups for name in group]
            if sorted(grouped) != sorted(self.channels):
                raise ValueError(f"{self.name}: groups {self.groups} must hold each of {self.channels} once")

    @property
    def is_input(self) -> bool:
        """Whether the modality is an encoder input."""
        return self.role in ("image", "series")

    @property
    def patch_size(self) -> float:
        """Side of a patch on the ground, in metres."""
        return self.size * self.gsd

    @property
    def has_time_axis(self) -> bool:
        """Whether arrays have a leading time axis."""
        return self.role in ("series", "mask")

    def shape(self, dates: int = 0) -> tuple[int, ...]:
        """Shape of an array; ``dates`` is the number of dates, ignored without a time axis."""
        shape = (len(self.bands), self.size, self.size)
        return (dates, *shape) if self.has_time_axis else shape

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels of the representation, in order."""
        return representation_channels(self.representation, tuple(band.name for band in self.bands))

    @property
    def schemes(self) -> tuple[ClassScheme, ...]:
        """Class schemes of a label raster, by band."""
        return tuple(band.scheme for band in self.bands if band.scheme is not None)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form, which ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Modality:
        """Modality from the output of ``to_json``.

        Raises:
            InputError: fields are unknown, missing or wrong.
        """
        values = dict(description)
        try:
            bands = []
            for band in values.pop("bands"):
                scheme = band["scheme"] and ClassScheme(
                    **{key: _tuples(value) for key, value in band["scheme"].items()}
                )
                bands.append(Band(**{**band, "scheme": scheme}))
            sensor = SimulatedSensor(**values.pop("sensor"))
            baseline = values.pop("baseline", None)
            if baseline is not None:
                baseline = Baseline(**{key: _tuples(value) for key, value in baseline.items()})
            rest = {key: _tuples(value) for key, value in values.items()}
            return cls(bands=tuple(bands), sensor=sensor, baseline=baseline, **rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"modality description {description.get('name', '?')!r} cannot be read: {error}"
            ) from error


def _tuples(value: Any) -> Any:
    """Convert nested lists, from JSON, to tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


class Registry(Mapping[str, Modality]):
    """An ordered, immutable mapping from names to modalities, whose patches cover the same ground.

    Raises:
        ValueError: a modality is listed twice, a mask without its series, or two modalities have patches of different
            sides.
        InputError: on lookup, the name is unknown; the message suggests the closest one.
    """

    def __init__(self, modalities: tuple[Modality, ...]) -> None:
        self._by_name = {modality.name: modality for modality in modalities}
        if len(self._by_name) != len(modalities):
            raise ValueError("a modality is listed twice")
        for modality in modalities:
            if modality.mask_of is not None and modality.mask_of not in self._by_name:
                raise ValueError(f"{modality.name} masks {modality.mask_of}, which is not listed")
            if not math.isclose(modality.patch_size, modalities[0].patch_size, rel_tol=1e-6):
                raise ValueError(
                    f"{modality.name}: {modality.size} px of {modality.gsd:g} m make {modality.patch_size:g} m, "
                    f"but a patch of {modalities[0].name} has {modalities[0].patch_size:g} m"
                )

    def __getitem__(self, name: str) -> Modality:
        try:
            return self._by_name[name]
        except KeyError:
            closest = [known for known in self._by_name if str(name).upper() in known][:1]
            closest = closest or difflib.get_close_matches(str(name).upper(), self._by_name, n=1)
            hint = f"did you mean {closest[0]}? Known" if closest else "known"
            raise InputError(f"unknown modality {name!r}; {hint} ones: {', '.join(self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def patch_size(self) -> float:
        """Side of a patch on the ground, in metres.

        Raises:
            ValueError: the registry is empty.
        """
        for modality in self._by_name.values():
            return modality.patch_size
        raise ValueError("an empty registry has no patch size")

    def with_modality(self, modality: Modality) -> Registry:
        """Copy of the registry with one more modality.

        Raises:
            InputError: the codec of the modality is unknown.
        """
        if modality.codec not in get_args(CodecName):
            raise InputError(f"{modality.name}: codec {modality.codec!r} is none of {', '.join(get_args(CodecName))}")
        return Registry((*self._by_name.values(), modality))

    def subset(self, names: tuple[str, ...] | list[str]) -> Registry:
        """Copy of the registry with the named modalities only, in this registry's order.

        Raises:
            InputError: a name is unknown, or a mask is listed without its series.
        """
        selected = {self[name].name for name in names}
        for name in selected:
            series = self[name].mask_of
            if series is not None and series not in selected:
                raise InputError(f"{name} is the quality mask of {series} and useless without it: name both")
        return Registry(tuple(modality for modality in self._by_name.values() if modality.name in selected))

    def by_role(self, *roles: Role) -> tuple[Modality, ...]:
        """Modalities with one of these roles, in order."""
        return tuple(modality for modality in self._by_name.values() if modality.role in roles)

    @property
    def inputs(self) -> tuple[Modality, ...]:
        """Encoder inputs: images, then series, in the order in which their features are fused."""
        return (*self.by_role("image"), *self.by_role("series"))

    @property
    def labels(self) -> tuple[Modality, ...]:
        """Label rasters."""
        return self.by_role("label")


def _reflectance(**wavelengths: float) -> tuple[Band, ...]:
    return tuple(Band(name=name, quantity="reflectance", wavelength=value) for name, value in wavelengths.items())


def _raw_baseline(*channels: str) -> Baseline:
    """Baseline that reads the stored values without normalisation."""
    return Baseline(channels=channels, mean=(0.0,) * len(channels), std=(1.0,) * len(channels))


_RGBI = _reflectance(R=650.0, G=550.0, B=460.0, NIR=840.0)
_VV_VH = (Band(name="VV", quantity="backscatter_vv"), Band(name="VH", quantity="backscatter_vh"))
# Sigma0 in linear units is 0 at the edge of the swath; ``normalize.represent`` clips it before the logarithm.
_SENTINEL1_SENSOR = SimulatedSensor(looks=4.4)

FLAIR_HUB = Registry(
    (
        Modality(
            name="AERIAL_RGBI",
            role="image",
            bands=_RGBI,
            dtype="uint8",
            gsd=0.2,
            size=512,
            codec="colour",
            groups=(("NIR",), ("R", "G", "B")),
            unit=32,
            dates_table="AERIAL",
            mean=(105.66, 111.35, 102.18, 106.59),
            std=(52.23, 45.62, 44.30, 39.78),
            baseline=Baseline(channels=("NIR", "R", "G"), mean=(106.59, 105.66, 111.35), std=(39.78, 52.23, 45.62)),
            sensor=SimulatedSensor(gain=430.0, offset=10.0, gamma=0.62, noise=3.0),
        ),
        Modality(
            name="AERIAL-RLT_PAN",
            role="image",
            bands=_reflectance(PAN=580.0),
            dtype="uint8",
            gsd=0.4,
            size=256,
            codec="grey",
            groups=(("PAN",),),
            unit=16,
            dates_table="AERIAL-RLT",
            historical=True,
            mean=(125.92,),
            std=(38.45,),
            baseline=Baseline(channels=("PAN",), mean=(125.92,), std=(38.45,)),
            sensor=SimulatedSensor(gain=500.0, offset=15.0, gamma=0.6, noise=9.0),
        ),
        Modality(
            name="DEM_ELEV",
            role="image",
            bands=(Band(name="DSM", quantity="surface_height"), Band(name="DTM", quantity="terrain_height")),
            dtype="float32",
            gsd=0.2,
            size=512,
            codec="height",
            representation="relief",
            groups=(("height",), ("relief",)),
            unit=32,
            mean=(311.06, 307.06),
            std=(537.55, 537.82),
            # The baselines use the statistics of the surface for both channels, so height differences keep their scale.
            baseline=Baseline(
                channels=("elevation", "height"),
                representation="elevation",
                mean=(311.06, 311.06),
                std=(537.55, 537.55),
                alone=("height",),
            ),
            nodata_below=-500.0,
            sensor=SimulatedSensor(noise=0.04),
        ),
        Modality(
            name="SPOT_RGBI",
            role="image",
            bands=_RGBI,
            dtype="uint16",
            gsd=1.6,
            size=64,
            codec="reflectance",
            groups=(("NIR",), ("R", "G", "B")),
            unit=8,
            dates_table="SPOT",
            mean=(433.26, 508.75, 467.77, 1137.03),
            std=(312.76, 284.61, 226.02, 543.11),
            # The published configuration assigns the statistics of R, G, B to these channels, in that order: near
            # infrared gets those of red. The weights were trained with this input, so it is kept.
            baseline=Baseline(channels=("NIR", "R", "G"), mean=(433.26, 508.75, 467.77), std=(312.76, 284.61, 226.02)),
            sensor=SimulatedSensor(gain=4500.0, noise=25.0),
        ),
        Modality(
            name="SENTINEL2_TS",
            role="series",
            bands=_reflectance(
                B2=490.0,
                B3=560.0,
                B4=665.0,
                B5=705.0,
                B6=740.0,
                B7=783.0,
                B8=842.0,
                B8A=865.0,
                B11=1610.0,
                B12=2190.0,
            ),
            dtype="uint16",
            gsd=10.24,
            size=10,
            codec="reflectance",
            groups=(("B2", "B3", "B4", "B8"), ("B5", "B6", "B7", "B8A"), ("B11", "B12")),
            unit=5,
            dates_table="SENTINEL2",
            baseline=_raw_baseline("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
            sensor=SimulatedSensor(gain=10_000.0, noise=60.0),
        ),
        Modality(
            name="SENTINEL2_MSK-SC",
            role="mask",
            bands=(Band(name="snow", quantity="snow_probability"), Band(name="cloud", quantity="cloud_probability")),
            dtype="uint16",
            gsd=10.24,
            size=10,
            codec="plain",
            mask_of="SENTINEL2_TS",
            sensor=SimulatedSensor(gain=100.0),
        ),
        Modality(
            name="SENTINEL1-ASC_TS",
            role="series",
            bands=_VV_VH,
            dtype="float32",
            gsd=10.24,
            size=10,
            codec="float",
            representation="decibel",
            groups=(("VV",), ("VH",)),
            unit=5,
            dates_table="SENTINEL1-ASC",
            baseline=_raw_baseline("VV", "VH"),
            sensor=_SENTINEL1_SENSOR,
        ),
        Modality(
            name="SENTINEL1-DESC_TS",
            role="series",
            bands=_VV_VH,
            dtype="float32",
            gsd=10.24,
            size=10,
            codec="float",
            representation="decibel",
            groups=(("VV",), ("VH",)),
            unit=5,
            dates_table="SENTINEL1-DESC",
            baseline=_raw_baseline("VV", "VH"),
            sensor=_SENTINEL1_SENSOR,
        ),
        Modality(
            name="AERIAL_LABEL-COSIA",
            role="label",
            bands=(Band(name="COSIA", quantity="class", scheme=COSIA),),
            dtype="uint8",
            gsd=0.2,
            size=512,
            codec="plain",
        ),
        Modality(
            name="ALL_LABEL-LPIS",
            role="label",
            bands=tuple(
                Band(name=f"level-{level}", quantity="class", scheme=scheme)
                for level, scheme in enumerate((LPIS_1, LPIS_2, LPIS_3), start=1)
            ),
            dtype="uint8",
            gsd=0.2,
            size=512,
            codec="plain",
        ),
    )
)
"""The ten rasters of FLAIR-HUB, in the order of the official fusion: images, then series."""
