"""The modality registry: what each sensor and label raster is. The only place that lists them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from bocage.shards.classes import COSIA, LPIS_1, LPIS_2, LPIS_3, ClassScheme
from bocage.shards.errors import InputError

PATCH_SIZE = 102.4
"""Side of a patch on the ground, metres."""

Role = Literal["image", "series", "mask", "label"]
Quantity = Literal[
    "reflectance",
    "backscatter_vv",
    "backscatter_vh",
    "surface_height",
    "terrain_height",
    "snow_probability",
    "cloud_probability",
    "class",
]
Representation = Literal["linear", "decibel", "relief", "elevation"]
CodecName = Literal["colour", "grey", "height", "height-5mm", "float", "reflectance", "plain"]
"""Names of the encodings of shard members; ``format.codec`` defines them."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """One band: its name, the physical quantity it measures and, for optical bands, its centre wavelength (nm).

    Label bands carry the class scheme of their values instead.

    Raises:
        ValueError: reflectance without a wavelength, classes without a scheme, or either where it does not belong.
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
class Sensor:
    """How the simulator turns a physical quantity q into the stored value: ``gain * q**gamma + offset``, plus noise.

    ``noise`` is the standard deviation of additive noise in stored units; ``looks`` the number of looks of
    multiplicative speckle (None: no speckle).
    """

    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    looks: float | None = None


def channels_of(representation: Representation, bands: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all channels of a representation of these bands, in order."""
    if representation in ("relief", "elevation"):
        return (representation, "height")
    return bands


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How the published FLAIR-HUB baselines read a modality (configurations of IGN's own code).

    Attributes:
        channels: in the order their models read them.
        representation: see ``Modality``.
        mean, std: what they normalise each of these channels with; 0 and 1 where they read raw values.
        alone: the one channel that some of them read instead.

    Raises:
        ValueError: there is not one mean and one standard deviation a channel.
    """

    channels: tuple[str, ...]
    representation: Representation = "linear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    alone: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise ValueError(f"baseline of {self.channels}: one mean and one std a channel")


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One raster of a patch.

    Arrays are (C, H, W) for images and labels and (T, C, H, W) for series and masks, with H = W = ``size`` pixels of
    ``gsd`` metres.

    Attributes:
        name: the dataset's own name, as it stands in file names.
        role: ``image`` and ``series`` are encoder inputs; a ``mask`` gives the quality of the series ``mask_of``.
        dtype: NumPy dtype of the stored values.
        size: pixels along a side of a patch; ``size * gsd`` is the patch's 102.4 m.
        representation: what an encoder sees before standardisation. ``linear``: the values; ``decibel``:
            10 log10 of the value; ``relief``: (surface - mean surface of the window, surface - terrain), metres;
            ``elevation``: (surface, surface - terrain), metres, as the published baselines read it.
        groups: names of correlated channels of the representation, normalised together in reconstruction targets
            (MAESTRO, arXiv 2508.10894).
        unit: side of a mask unit, pixels; for series, side of the cells in which targets are normalised.
        dates_table: the NAME in ``GLOBAL_NAME_MTD_DATES.gpkg`` that holds acquisition dates.
        historical: the file name carries ``195X`` instead of the image year, and the sensor saw an older landscape.
        mean, std: official statistics of the stored values by band, where IGN publishes them.
        baseline: how the published baselines read it, if they do.
        codec: name of the codec chain of its shard member (see ``codec.py``).
        nodata_below: stored values under this are holes (None: every value is valid).
        sensor: what the simulator needs to know.

    Raises:
        ValueError: a name with ``.`` or ``/``; a ``size`` and a ``gsd`` in whole millimetres that do not make up a
            patch; an unknown ``representation``; or, of an input, groups that do not hold each channel once, or
            units that do not divide a patch.
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
    sensor: Sensor = field(default_factory=Sensor)

    def __post_init__(self) -> None:
        if "." in self.name or "/" in self.name:
            raise ValueError(f"modality name {self.name!r} must not contain '.' or '/'")
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"{self.name}: size {self.size!r} is not a number of pixels")
        # Windows lie on a lattice of whole millimetres (``crop.lattice``).
        whole = self.gsd > 0 and abs(self.gsd - round(self.gsd, 3)) <= 1e-9
        if not whole or abs(self.size * self.gsd - PATCH_SIZE) > 1e-6:
            raise ValueError(
                f"{self.name}: {self.size} px of {self.gsd} m are not whole mm or not a patch of {PATCH_SIZE} m"
            )
        if self.representation not in get_args(Representation):
            known = ", ".join(get_args(Representation))
            raise ValueError(f"{self.name}: representation {self.representation!r} is not one of {known}")
        if self.is_input:
            if self.unit < 1 or self.size % self.unit:
                raise ValueError(f"{self.name}: units of {self.unit} px do not divide a patch of {self.size} px")
            named = [name for group in self.groups for name in group]
            if sorted(named) != sorted(self.channels):
                raise ValueError(f"{self.name}: groups {self.groups} must hold each of {self.channels} once")

    @property
    def is_input(self) -> bool:
        """Whether an encoder reads it."""
        return self.role in ("image", "series")

    @property
    def has_dates(self) -> bool:
        """Whether arrays have a leading time axis."""
        return self.role in ("series", "mask")

    def shape(self, dates: int = 0) -> tuple[int, ...]:
        """Shape of its array; ``dates`` counts only where arrays have a time axis."""
        shape = (len(self.bands), self.size, self.size)
        return (dates, *shape) if self.has_dates else shape

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels of the representation, in order."""
        return channels_of(self.representation, tuple(band.name for band in self.bands))

    @property
    def schemes(self) -> tuple[ClassScheme, ...]:
        """Class schemes of a label raster, by band."""
        return tuple(band.scheme for band in self.bands if band.scheme is not None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable description; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Modality:
        """The modality described by ``to_json``.

        Raises:
            InputError: unknown, missing or wrong fields.
        """
        values = dict(description)
        try:
            bands = []
            for band in values.pop("bands"):
                scheme = band["scheme"] and ClassScheme(
                    **{key: _tuples(value) for key, value in band["scheme"].items()}
                )
                bands.append(Band(**{**band, "scheme": scheme}))
            sensor = Sensor(**values.pop("sensor"))
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
    """JSON lists as the tuples they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


class Registry(Mapping[str, Modality]):
    """An ordered, immutable collection of modalities by name. ``with_modality`` returns a larger copy.

    Raises:
        ValueError: a modality is listed twice, or a mask without its series.
        InputError: a name that is asked for is not listed; the message gives the nearest.
    """

    def __init__(self, modalities: tuple[Modality, ...]) -> None:
        self._by_name = {modality.name: modality for modality in modalities}
        if len(self._by_name) != len(modalities):
            raise ValueError("a modality is listed twice")
        for modality in modalities:
            if modality.mask_of is not None and modality.mask_of not in self._by_name:
                raise ValueError(f"{modality.name} masks {modality.mask_of}, which is not listed")

    def __getitem__(self, name: str) -> Modality:
        try:
            return self._by_name[name]
        except KeyError:
            near = [known for known in self._by_name if str(name).upper() in known][:1]
            near = near or difflib.get_close_matches(str(name).upper(), self._by_name, n=1)
            hint = f"did you mean {near[0]}? Known" if near else "known"
            raise InputError(f"unknown modality {name!r}; {hint} ones: {', '.join(self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def with_modality(self, modality: Modality) -> Registry:
        """A copy with one more modality.

        Raises:
            InputError: shards have no encoding of the name of its ``codec``.
        """
        if modality.codec not in get_args(CodecName):
            raise InputError(f"{modality.name}: codec {modality.codec!r} is none of {', '.join(get_args(CodecName))}")
        return Registry((*self._by_name.values(), modality))

    def subset(self, names: tuple[str, ...] | list[str]) -> Registry:
        """Only the named modalities, in this registry's order.

        Raises:
            InputError: an unknown name, or a mask without the series that it belongs to.
        """
        wanted = {self[name].name for name in names}
        for name in wanted:
            series = self[name].mask_of
            if series is not None and series not in wanted:
                raise InputError(f"{name} tells the quality of {series} and is of no use without it: name both")
        return Registry(tuple(modality for modality in self._by_name.values() if modality.name in wanted))

    def by_role(self, *roles: Role) -> tuple[Modality, ...]:
        """Modalities of these roles, in order."""
        return tuple(modality for modality in self._by_name.values() if modality.role in roles)

    @property
    def inputs(self) -> tuple[Modality, ...]:
        """What encoders read: images first, then series, in the order fusion uses."""
        return (*self.by_role("image"), *self.by_role("series"))

    @property
    def labels(self) -> tuple[Modality, ...]:
        """Label rasters."""
        return self.by_role("label")


def _reflectance(**wavelengths: float) -> tuple[Band, ...]:
    return tuple(Band(name=name, quantity="reflectance", wavelength=value) for name, value in wavelengths.items())


def _raw(*channels: str) -> Baseline:
    return Baseline(channels=channels, mean=(0.0,) * len(channels), std=(1.0,) * len(channels))


_RGBI = _reflectance(R=650.0, G=550.0, B=460.0, NIR=840.0)
_VV_VH = (Band(name="VV", quantity="backscatter_vv"), Band(name="VH", quantity="backscatter_vh"))
# Sigma0 in linear units holds zeros at the swath's edge: the logarithm is floored where it is taken (normalize.py).
_SENTINEL1_SENSOR = Sensor(looks=4.4)

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
            sensor=Sensor(gain=430.0, offset=10.0, gamma=0.62, noise=3.0),
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
            sensor=Sensor(gain=500.0, offset=15.0, gamma=0.6, noise=9.0),
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
            # The surface's statistics for both: differences of height keep their scale.
            baseline=Baseline(
                channels=("elevation", "height"),
                representation="elevation",
                mean=(311.06, 311.06),
                std=(537.55, 537.55),
                alone=("height",),
            ),
            nodata_below=-500.0,
            sensor=Sensor(noise=0.04),
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
            # The published configuration gives these channels the statistics of R, G and B in that order, near
            # infrared those of red. The weights were trained so, and read their input so.
            baseline=Baseline(channels=("NIR", "R", "G"), mean=(433.26, 508.75, 467.77), std=(312.76, 284.61, 226.02)),
            sensor=Sensor(gain=4500.0, noise=25.0),
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
            baseline=_raw("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
            sensor=Sensor(gain=10_000.0, noise=60.0),
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
            sensor=Sensor(gain=100.0),
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
            baseline=_raw("VV", "VH"),
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
            baseline=_raw("VV", "VH"),
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
"""The ten rasters of FLAIR-HUB, in the order the official fusion uses (images, then series)."""
