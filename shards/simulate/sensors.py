"""What a sensor of the registry records of a patch: from ground and weather to stored values.

Nothing here names a sensor: bands say which quantity they measure and at which wavelength, the modality says at which
pixel, in which dtype and through which gain, gamma, noise or speckle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bocage.shards.classes import COSIA, LPIS_1, LPIS_2, LPIS_3, ClassScheme
from bocage.shards.modality import PATCH_SIZE, Band, Modality, Sensor
from bocage.shards.simulate.ground import Ground, Sun
from bocage.shards.simulate.landscape import Landscape
from bocage.shards.simulate.noise import SmoothField, generator
from bocage.shards.simulate.spectra import spectrum


@dataclass(frozen=True)
class Weather:
    """The weather of one ROI over a year: soil moisture and snow cover, 0..1, by day of the year, (367,) float64."""

    moisture: np.ndarray
    snow: np.ndarray

    @classmethod
    def draw(cls, winter: float, *names: object) -> Weather:
        """A year of weather; ``winter`` is the probability of snow on a winter day."""
        random = generator(*names, "weather")
        knots = np.arange(0, 380, 6)
        moisture = 0.5 + 0.25 * np.cos(2 * np.pi * knots / 365) + 0.22 * random.standard_normal(len(knots))
        season = np.clip(1.6 * np.cos(2 * np.pi * (knots - 20) / 365) - 0.6, 0, 1)
        snow = np.clip(4 * (winter * season - random.random(len(knots))) + 0.5, 0, 1) * (winter * season > 0.01)
        days = np.arange(0, 367)
        return cls(np.clip(np.interp(days, knots, moisture), 0, 1), np.interp(days, knots, snow))


@dataclass(frozen=True)
class Sky:
    """Clouds over one ROI at the T dates of a series.

    Attributes:
        fields: T smooth fields.
        cover: (T,) cloud cover, 0..1.
        wind: metres to the south, and 0.6 of it to the east, from a cloud to its shadow.
    """

    fields: SmoothField
    cover: np.ndarray
    wind: float

    @classmethod
    def draw(cls, dates: int, cloudiness: float, side: float, *names: object) -> Sky:
        """Skies of ``dates`` dates over a ROI of ``side`` metres: mostly clear or mostly covered."""
        random = generator(*names, "sky")
        fields = SmoothField(random, -300.0, side + 600.0, cell=260.0, octaves=3, roughness=0.5, shape=(dates,))
        return cls(fields, random.beta(0.45 * cloudiness, 0.45 * (1 - cloudiness), dates), random.uniform(60, 160))

    def opacity(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cloud opacity at ground positions (metres from the ROI's corner), (T, H, W) float32, 0..1."""
        threshold = (3.2 * (0.5 - self.cover)).astype(np.float32)[:, None, None]
        return np.clip(np.float32(1.4) * (self.fields.at(rows, columns) - threshold), 0.0, 1.0)

    def shadow(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Shadow of the clouds at ground positions, (T, H, W) float32, 0..1."""
        return self.opacity(rows - self.wind, columns - 0.6 * self.wind)


@dataclass(frozen=True)
class Scene:
    """One patch as every sensor meets it.

    Attributes:
        place: the ROI's landscape; ``weather`` its year.
        grounds: rasters of the patch by era, ``now`` and ``then``, those that are needed.
        left, top: metres from the ROI's upper-left corner.
        names: what random draws depend on (seed, domain, ROI, position).
        roi: the same for draws that patches of a ROI share.
    """

    place: Landscape
    weather: Weather
    grounds: dict[str, Ground]
    left: float
    top: float
    names: tuple[object, ...]
    roi: tuple[object, ...]


def average(field: np.ndarray, size: int) -> np.ndarray:
    """Area average of a (..., N, N) field to (..., size, size); finer sizes repeat pixels."""
    count = field.shape[-1]
    if size >= count:
        index = np.arange(size) * count // size
        return field[..., index[:, None], index]
    if count % size == 0:
        factor = count // size
        if factor == 1:
            return field
        lines = field.reshape(*field.shape[:-2], size, factor, count).mean(axis=-2)
        return lines.reshape(*field.shape[:-2], size, size, factor).mean(axis=-1)
    starts = np.arange(size) * count // size
    pixels = np.diff(np.append(starts, count))
    sums = np.add.reduceat(np.add.reduceat(field, starts, axis=-2), starts, axis=-1)
    return sums / (pixels[:, None] * pixels)


def _shares(ground: Ground, surfaces: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of every surface in every coarse cell, bright and gap phase: (size * size, surfaces) float64 each."""
    count = ground.surface.shape[0]
    cell = np.arange(count) * size // count
    index = ((cell[:, None] * size + cell) * surfaces + ground.surface).ravel()
    total = np.bincount(index, minlength=size * size * surfaces).reshape(-1, surfaces).astype(np.float64)
    bright = np.bincount(index, ground.phase.ravel(), minlength=size * size * surfaces).reshape(-1, surfaces)
    pixels = total.sum(1, keepdims=True)
    return bright / pixels, (total - bright) / pixels


def store(values: np.ndarray, sensor: Sensor, dtype: str, random: np.random.Generator) -> np.ndarray:
    """Physical values, of any shape, to stored ones: speckle, gamma, gain, offset, noise, rounding and clipping.

    They are reflectances, linear backscatter, metres or probabilities; ``sensor`` says what is made of them.
    """
    values = values.astype(np.float32, copy=False)
    if sensor.looks is not None:
        values = values * random.standard_gamma(sensor.looks, values.shape, np.float32) / np.float32(sensor.looks)
    if sensor.gamma != 1.0:
        values = np.maximum(values, 0.0) ** np.float32(sensor.gamma)
    if sensor.gain != 1.0 or sensor.offset != 0.0:
        values = values * np.float32(sensor.gain) + np.float32(sensor.offset)
    if sensor.noise:
        values = values + np.float32(sensor.noise) * random.standard_normal(values.shape, np.float32)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return np.clip(np.rint(values), limits.min, limits.max).astype(kind)
    return values.astype(kind)


def _wavelengths(bands: list[Band]) -> list[float]:
    return [band.wavelength for band in bands if band.wavelength is not None]


def _classes(scheme: ClassScheme, scene: Scene, ground: Ground, day: float) -> np.ndarray:
    """Class values of one label band at the ground's own pixel."""
    palette = scene.place.palettes["now"]
    if scheme.name == COSIA.name:
        bright, gap = palette.cosia(day)
        return np.where(ground.phase > 0.5, bright[ground.surface], gap[ground.surface])
    values = palette.lpis
    levels = {LPIS_3.name: (), LPIS_2.name: (LPIS_3,), LPIS_1.name: (LPIS_3, LPIS_2)}
    if scheme.name not in levels:
        raise ValueError(f"the simulator has no classes of the scheme {scheme.name!r}")
    for below in levels[scheme.name]:
        values = np.array(below.parents, np.uint8)[values]
    return values[ground.surface]


def label(modality: Modality, scene: Scene, day: float) -> np.ndarray:
    """A label raster, (C, size, size) in the modality's dtype; cover classes are those of ``day`` of the year.

    Raises:
        ValueError: a class scheme that the simulator does not have.
    """
    ground = scene.grounds["now"]
    centres = ((2 * np.arange(modality.size) + 1) * ground.surface.shape[0]) // (2 * modality.size)
    maps = [_classes(scheme, scene, ground, day) for scheme in modality.schemes]
    return np.stack([band[np.ix_(centres, centres)] for band in maps]).astype(modality.dtype)


def _orbit_tilt(ground: Ground, size: int, orbit: int) -> np.ndarray:
    """Factor on backscatter from slopes towards (> 1) or away from the radar, (size, size)."""
    _, slope = np.gradient(average(ground.terrain, size), PATCH_SIZE / size)
    return np.clip(1.0 + (-1) ** orbit * 1.8 * slope, 0.4, 2.5)


def image(modality: Modality, scene: Scene, day: float, sun: Sun, orbit: int) -> np.ndarray:
    """One cloudless image, (C, size, size) in the modality's dtype.

    ``day`` is the day of the year; ``orbit`` tells apart radars that look from different sides.

    Raises:
        ValueError: a band that images of the simulator do not have.
    """
    era = "then" if modality.historical else "now"
    ground, palette = scene.grounds[era], scene.place.palettes[era]
    if not modality.historical and 2 * modality.size <= ground.surface.shape[0]:
        # Coarse images average many pixels: every second one carries the same mean.
        ground = Ground(2 * ground.pixel, ground.surface[::2, ::2], ground.phase[::2, ::2], ground.terrain, ground.top)
        light = scene.grounds[era].light(sun)[::2, ::2]
    else:
        light = ground.light(sun)
    days, moisture = np.array([day]), scene.weather.moisture[[int(day)]]
    optical = [band for band in modality.bands if band.quantity == "reflectance"]
    wavelengths = _wavelengths(optical)
    bright, gap = palette.reflectance(days, moisture, wavelengths)
    haze = generator(*scene.roi[:2], modality.name, "haze")
    path = 0.028 * haze.uniform(0.5, 1.5)
    planes: list[np.ndarray] = []
    for band in modality.bands:
        if band.quantity == "reflectance":
            index = optical.index(band)
            low, high = gap[0, :, index], bright[0, :, index]
            value = low[ground.surface] + (high - low)[ground.surface] * ground.phase
            # Images are not corrected for the air, which adds light at short wavelengths; series are.
            air = path * (490.0 / wavelengths[index]) ** 3
            value = value * (light * np.float32(haze.normal(1.0, 0.06))) + np.float32(air)
            planes.append(average(value, modality.size))
        elif band.quantity in ("backscatter_vv", "backscatter_vh"):
            sigma = palette.backscatter(days, moisture, int(band.quantity == "backscatter_vh"), orbit)[0]
            tilt = _orbit_tilt(scene.grounds[era], modality.size, orbit)
            planes.append(average(sigma[ground.surface], modality.size) * tilt)
        elif band.quantity == "terrain_height":
            planes.append(average(scene.grounds[era].terrain, modality.size))
        elif band.quantity == "surface_height":
            planes.append(average(scene.grounds[era].terrain + scene.grounds[era].height, modality.size))
        else:
            raise ValueError(
                f"the simulator cannot draw band {band.name} ({band.quantity}) of the image {modality.name}"
            )
    random = generator(*scene.names, modality.name)
    vignette = _vignette(modality, scene) if modality.historical else np.float32(1.0)
    stored = []
    for band, plane in zip(modality.bands, planes, strict=True):
        # Terrain models are filtered products of coarser posting: they have no pixel noise.
        sensor = replace(modality.sensor, noise=0.0) if band.quantity == "terrain_height" else modality.sensor
        stored.append(store(plane * vignette, sensor, modality.dtype, random))
    return np.stack(stored)


def _vignette(modality: Modality, scene: Scene) -> np.ndarray:
    """Fall-off of light away from the centre of an old photograph that covers the ROI, (size, size) float32."""
    centre = generator(*scene.roi, modality.name, "centre").uniform(-250, 450, 2)
    steps = (np.arange(modality.size) + 0.5) * modality.gsd
    down, right = (scene.top + steps - centre[0])[:, None], scene.left + steps - centre[1]
    return (1.0 / (1.0 + (down**2 + right**2) / 700.0**2)).astype(np.float32)


def series(modality: Modality, scene: Scene, days: np.ndarray, sky: Sky, orbit: int) -> np.ndarray:
    """A time series or its quality mask, (T, C, size, size) in the modality's dtype.

    Args:
        days: (T,) days of the year.
        sky: clouds at these dates; a mask is given the sky of the series that it belongs to.
        orbit: tells apart radars that look from different sides.

    Raises:
        ValueError: a band that series of the simulator do not have.
    """
    size, ground, palette = modality.size, scene.grounds["now"], scene.place.palettes["now"]
    moisture, snow = scene.weather.moisture[days.astype(int)], scene.weather.snow[days.astype(int)]
    bright, gap = _shares(ground, len(palette), size)
    used = np.flatnonzero((bright + gap).any(0))
    bright, gap = bright[:, used], gap[:, used]
    optical = [band for band in modality.bands if band.quantity == "reflectance"]
    steps = (np.arange(size) + 0.5) * (PATCH_SIZE / size)
    rows, columns = scene.top + steps, scene.left + steps
    radar = any(band.quantity.startswith("backscatter") for band in modality.bands)
    opacity, shadow = sky.opacity(rows, columns), sky.shadow(rows, columns)
    # Trees and roofs keep less snow than open ground.
    open_ground = 1.0 - 0.6 * (bright + gap) @ (palette.height[used] > 2.5)
    snowy = np.clip(snow[:, None] * 1.2, 0, 1) * open_ground
    snowy = snowy.reshape(len(days), size, size)
    values = np.empty((len(days), len(modality.bands), size, size))
    if optical:
        phases = palette.reflectance(days, moisture, _wavelengths(optical))
    for index, band in enumerate(modality.bands):
        if band.quantity == "reflectance":
            position = optical.index(band)
            at = phases[0][:, used, position], phases[1][:, used, position]
            mixed = (at[0] @ bright.T + at[1] @ gap.T).reshape(len(days), size, size)
            mixed += snowy * (spectrum("snow", _wavelengths([band]))[0] - mixed)
            mixed *= 1.0 - 0.6 * shadow
            mixed += opacity * (spectrum("cloud", _wavelengths([band]))[0] - mixed)
        elif band.quantity in ("backscatter_vv", "backscatter_vh"):
            sigma = palette.backscatter(days, moisture, int(band.quantity == "backscatter_vh"), orbit)[:, used]
            mixed = (sigma @ (bright + gap).T).reshape(len(days), size, size) * _orbit_tilt(ground, size, orbit)
            mixed *= 1.0 - 0.4 * snowy
        elif band.quantity == "cloud_probability":
            mixed = np.maximum(opacity, 0.25 * (shadow > 0.5))
        elif band.quantity == "snow_probability":
            mixed = snowy * (1.0 - opacity)
        else:
            raise ValueError(
                f"the simulator cannot draw band {band.name} ({band.quantity}) of the series {modality.name}"
            )
        values[:, index] = mixed
    random = generator(*scene.names, modality.name)
    if radar:
        _swath_edges(values, modality, scene)
    return store(values, modality.sensor, modality.dtype, random)


def _swath_edges(values: np.ndarray, modality: Modality, scene: Scene) -> None:
    """Zeros beyond the edge of the swath, at rare dates, in place: the edge crosses all patches of the ROI."""
    random = generator(*scene.roi, modality.name, "swath")
    steps = (np.arange(modality.size) + 0.5) * modality.gsd
    for date in np.flatnonzero(random.random(len(values)) < 0.03):
        edge = random.uniform(0, 250) + 0.2 * (scene.top + steps)
        outside = (scene.left + steps) > edge[:, None]
        values[date] *= ~outside


def sun_at(day: float, hour_angle: float, latitude: float = 46.0) -> Sun:
    """The sun over France on ``day`` of the year, ``hour_angle`` radians after noon, never lower than 20 degrees.

    Its declination is after Cooper (1969); ``latitude`` is in degrees.
    """
    declination = math.radians(23.44) * math.sin(2 * math.pi * (day - 81) / 365)
    north = math.radians(latitude)
    sine = math.sin(north) * math.sin(declination) + math.cos(north) * math.cos(declination) * math.cos(hour_angle)
    elevation = math.asin(sine)
    azimuth = math.atan2(
        math.sin(hour_angle), math.cos(hour_angle) * math.sin(north) - math.tan(declination) * math.cos(north)
    )
    return Sun(azimuth + math.pi, max(elevation, math.radians(20)))
