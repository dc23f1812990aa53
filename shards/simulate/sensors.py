"""Simulate the rasters of a patch: images, time series, quality masks and labels, as stored values.

No sensor is named here. The bands of a modality give the measured quantity and the wavelength; the modality gives the
pixel size, the dtype, and the gain, gamma, noise or speckle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bocage.shards.classes import COSIA, LPIS_1, LPIS_2, LPIS_3, ClassScheme
from bocage.shards.modality import Band, Modality, SimulatedSensor
from bocage.shards.simulate.ground import PATCH_SIZE, GroundRasters, SunPosition
from bocage.shards.simulate.landscape import Landscape
from bocage.shards.simulate.noise import SmoothField, generator
from bocage.shards.simulate.spectra import spectrum


@dataclass(frozen=True)
class Weather:
    """Weather of one ROI over a year.

    Attributes:
        moisture: soil moisture in 0..1 by day of the year, (367,) float64.
        snow: snow cover in 0..1 by day of the year, (367,) float64.
    """

    moisture: np.ndarray
    snow: np.ndarray

    @classmethod
    def draw(cls, snow_probability: float, *names: object) -> Weather:
        """Draw a year of weather; ``snow_probability`` is the probability of snow on a winter day."""
        random = generator(*names, "weather")
        knots = np.arange(0, 380, 6)
        moisture = 0.5 + 0.25 * np.cos(2 * np.pi * knots / 365) + 0.22 * random.standard_normal(len(knots))
        season = np.clip(1.6 * np.cos(2 * np.pi * (knots - 20) / 365) - 0.6, 0, 1)
        snow = np.clip(4 * (snow_probability * season - random.random(len(knots))) + 0.5, 0, 1)
        snow = snow * (snow_probability * season > 0.01)
        days = np.arange(0, 367)
        return cls(np.clip(np.interp(days, knots, moisture), 0, 1), np.interp(days, knots, snow))


@dataclass(frozen=True)
class CloudCover:
    """Clouds over one ROI at the T dates of a series.

    Attributes:
        noise: stack of T smooth fields.
        fraction: cloud cover in 0..1, (T,).
        shadow_offset: distance in metres from a cloud to its shadow, to the south; to the east it is 0.6 times that.
    """

    noise: SmoothField
    fraction: np.ndarray
    shadow_offset: float

    @classmethod
    def draw(cls, dates: int, cloudiness: float, side: float, *names: object) -> CloudCover:
        """Draw the clouds of ``dates`` dates over a ROI of ``side`` metres; most dates are almost clear or overcast."""
        random = generator(*names, "sky")
        noise = SmoothField(random, -300.0, side + 600.0, cell=260.0, octaves=3, roughness=0.5, shape=(dates,))
        return cls(noise, random.beta(0.45 * cloudiness, 0.45 * (1 - cloudiness), dates), random.uniform(60, 160))

    def opacity(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cloud opacity at ground positions in metres from the ROI's corner, (T, H, W) float32 in 0..1."""
        threshold = (3.2 * (0.5 - self.fraction)).astype(np.float32)[:, None, None]
        return np.clip(np.float32(1.4) * (self.noise.at(rows, columns) - threshold), 0.0, 1.0)

    def shadow(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cloud shadow at ground positions in metres from the ROI's corner, (T, H, W) float32 in 0..1."""
        return self.opacity(rows - self.shadow_offset, columns - 0.6 * self.shadow_offset)


@dataclass(frozen=True)
class Scene:
    """The state of one patch, shared by all sensors.

    Attributes:
        landscape: landscape of the ROI.
        weather: weather of the ROI.
        grounds: rasters of the patch by era (``now``, ``then``); only the required eras.
        left: x of the patch's upper-left corner, in metres from that of the ROI.
        top: y of the patch's upper-left corner, in metres from that of the ROI.
        seed_names: names that seed the random numbers of the patch (seed, domain, ROI, cell).
        roi_seed_names: names that seed the random numbers that patches of a ROI share (seed, domain, ROI).
    """

    landscape: Landscape
    weather: Weather
    grounds: dict[str, GroundRasters]
    left: float
    top: float
    seed_names: tuple[object, ...]
    roi_seed_names: tuple[object, ...]


def area_average(field: np.ndarray, size: int) -> np.ndarray:
    """Resample a (..., N, N) field to (..., size, size) by area average; a size above N repeats pixels."""
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


def _surface_fractions(ground: GroundRasters, surfaces: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fraction of each surface in each coarse cell, for bright and gap phase: (size * size, surfaces) float64 each."""
    count = ground.surface.shape[0]
    cell = np.arange(count) * size // count
    index = ((cell[:, None] * size + cell) * surfaces + ground.surface).ravel()
    total = np.bincount(index, minlength=size * size * surfaces).reshape(-1, surfaces).astype(np.float64)
    bright = np.bincount(index, ground.phase.ravel(), minlength=size * size * surfaces).reshape(-1, surfaces)
    pixels = total.sum(1, keepdims=True)
    return bright / pixels, (total - bright) / pixels


def to_stored_values(
    values: np.ndarray, sensor: SimulatedSensor, dtype: str, random: np.random.Generator
) -> np.ndarray:
    """Convert physical values to stored values: speckle, gamma, gain, offset, noise, rounding and clipping.

    Args:
        values: reflectances, linear backscatter, metres or probabilities, of any shape.
        sensor: parameters of the conversion.
        dtype: dtype of the stored values.
        random: random generator of speckle and noise.
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
    stored_dtype = np.dtype(dtype)
    if stored_dtype.kind in "iu":
        limits = np.iinfo(stored_dtype)
        return np.clip(np.rint(values), limits.min, limits.max).astype(stored_dtype)
    return values.astype(stored_dtype)


def _wavelengths(bands: list[Band]) -> list[float]:
    return [band.wavelength for band in bands if band.wavelength is not None]


def _class_map(scheme: ClassScheme, scene: Scene, ground: GroundRasters, day: float) -> np.ndarray:
    """Class indices of one label band at the pixel size of the ground rasters."""
    palette = scene.landscape.palettes["now"]
    if scheme.name == COSIA.name:
        bright, gap = palette.cosia_classes(day)
        return np.where(ground.phase > 0.5, bright[ground.surface], gap[ground.surface])
    values = palette.lpis
    levels = {LPIS_3.name: (), LPIS_2.name: (LPIS_3,), LPIS_1.name: (LPIS_3, LPIS_2)}
    if scheme.name not in levels:
        raise ValueError(f"the simulator does not know the class scheme {scheme.name!r}")
    for finer in levels[scheme.name]:
        values = np.array(finer.parents, np.uint8)[values]
    return values[ground.surface]


def render_label(modality: Modality, scene: Scene, day: float) -> np.ndarray:
    """Render a label raster, (C, size, size) in the modality's dtype. Land cover is that of ``day`` of the year.

    Raises:
        ValueError: the simulator does not know a class scheme.
    """
    ground = scene.grounds["now"]
    centres = ((2 * np.arange(modality.size) + 1) * ground.surface.shape[0]) // (2 * modality.size)
    maps = [_class_map(scheme, scene, ground, day) for scheme in modality.schemes]
    return np.stack([band[np.ix_(centres, centres)] for band in maps]).astype(modality.dtype)


def _radar_slope_factor(ground: GroundRasters, size: int, orbit: int) -> np.ndarray:
    """Factor on the backscatter, (size, size): above 1 on slopes that face the radar, below 1 on the others."""
    _, slope = np.gradient(area_average(ground.terrain, size), PATCH_SIZE / size)
    return np.clip(1.0 + (-1) ** orbit * 1.8 * slope, 0.4, 2.5)


def render_image(modality: Modality, scene: Scene, day: float, sun: SunPosition, orbit: int) -> np.ndarray:
    """Render one cloudless image, (C, size, size) in the modality's dtype.

    Args:
        modality: image modality.
        scene: state of the patch.
        day: day of the year.
        sun: position of the sun.
        orbit: orbit number of a radar; even and odd orbits look from opposite sides.

    Raises:
        ValueError: the simulator cannot render the quantity of a band in an image.
    """
    era = "then" if modality.historical else "now"
    ground, palette = scene.grounds[era], scene.landscape.palettes[era]
    if not modality.historical and 2 * modality.size <= ground.surface.shape[0]:
        # Coarse images average many pixels: every second pixel gives nearly the same mean.
        ground = GroundRasters(
            2 * ground.pixel, ground.surface[::2, ::2], ground.phase[::2, ::2], ground.terrain, ground.padded_height
        )
        light = scene.grounds[era].light(sun)[::2, ::2]
    else:
        light = ground.light(sun)
    days, moisture = np.array([day]), scene.weather.moisture[[int(day)]]
    optical = [band for band in modality.bands if band.quantity == "reflectance"]
    wavelengths = _wavelengths(optical)
    bright, gap = palette.reflectance(days, moisture, wavelengths)
    haze = generator(*scene.roi_seed_names[:2], modality.name, "haze")
    path_radiance = 0.028 * scene.landscape.region.haze * haze.uniform(0.5, 1.5)
    planes: list[np.ndarray] = []
    for band in modality.bands:
        if band.quantity == "reflectance":
            index = optical.index(band)
            low, high = gap[0, :, index], bright[0, :, index]
            value = low[ground.surface] + (high - low)[ground.surface] * ground.phase
            # Images, unlike series, are not atmospherically corrected: scattering adds light at short wavelengths.
            scattered = path_radiance * (490.0 / wavelengths[index]) ** 3
            value = value * (light * np.float32(haze.normal(1.0, 0.06))) + np.float32(scattered)
            planes.append(area_average(value, modality.size))
        elif band.quantity in ("backscatter_vv", "backscatter_vh"):
            sigma = palette.backscatter(days, moisture, int(band.quantity == "backscatter_vh"), orbit)[0]
            slope_factor = _radar_slope_factor(scene.grounds[era], modality.size, orbit)
            planes.append(area_average(sigma[ground.surface], modality.size) * slope_factor)
        elif band.quantity == "terrain_height":
            planes.append(area_average(scene.grounds[era].terrain, modality.size))
        elif band.quantity == "surface_height":
            planes.append(area_average(scene.grounds[era].terrain + scene.grounds[era].height, modality.size))
        else:
            raise ValueError(
                f"the simulator cannot render band {band.name} ({band.quantity}) of the image {modality.name}"
            )
    random = generator(*scene.seed_names, modality.name)
    vignette = _vignette(modality, scene) if modality.historical else np.float32(1.0)
    stored = []
    for band, plane in zip(modality.bands, planes, strict=True):
        # Terrain models are filtered and come from coarser data: they have no pixel noise.
        sensor = replace(modality.sensor, noise=0.0) if band.quantity == "terrain_height" else modality.sensor
        stored.append(to_stored_values(plane * vignette, sensor, modality.dtype, random))
    return np.stack(stored)


def _vignette(modality: Modality, scene: Scene) -> np.ndarray:
    """Light fall-off from the centre of a historical photograph that covers the ROI, (size, size) float32."""
    centre = generator(*scene.roi_seed_names, modality.name, "centre").uniform(-250, 450, 2)
    steps = (np.arange(modality.size) + 0.5) * modality.gsd
    down, right = (scene.top + steps - centre[0])[:, None], scene.left + steps - centre[1]
    return (1.0 / (1.0 + (down**2 + right**2) / 700.0**2)).astype(np.float32)


def render_series(modality: Modality, scene: Scene, days: np.ndarray, clouds: CloudCover, orbit: int) -> np.ndarray:
    """Render a time series or its quality mask, (T, C, size, size) in the modality's dtype.

    Args:
        modality: time series or quality mask.
        scene: state of the patch.
        days: days of the year, (T,).
        clouds: clouds at these dates; a mask gets the clouds of its series.
        orbit: orbit number of a radar; even and odd orbits look from opposite sides.

    Raises:
        ValueError: the simulator cannot render the quantity of a band in a series.
    """
    size, ground, palette = modality.size, scene.grounds["now"], scene.landscape.palettes["now"]
    moisture, snow = scene.weather.moisture[days.astype(int)], scene.weather.snow[days.astype(int)]
    bright, gap = _surface_fractions(ground, len(palette), size)
    present = np.flatnonzero((bright + gap).any(0))
    bright, gap = bright[:, present], gap[:, present]
    optical = [band for band in modality.bands if band.quantity == "reflectance"]
    steps = (np.arange(size) + 0.5) * (PATCH_SIZE / size)
    rows, columns = scene.top + steps, scene.left + steps
    radar = any(band.quantity.startswith("backscatter") for band in modality.bands)
    opacity, shadow = clouds.opacity(rows, columns), clouds.shadow(rows, columns)
    # Trees and roofs hold less snow than open ground.
    open_ground = 1.0 - 0.6 * (bright + gap) @ (palette.height[present] > 2.5)
    snowy = np.clip(snow[:, None] * 1.2, 0, 1) * open_ground
    snowy = snowy.reshape(len(days), size, size)
    values = np.empty((len(days), len(modality.bands), size, size))
    if optical:
        phases = palette.reflectance(days, moisture, _wavelengths(optical))
    for index, band in enumerate(modality.bands):
        if band.quantity == "reflectance":
            position = optical.index(band)
            mixture = phases[0][:, present, position], phases[1][:, present, position]
            mixed = (mixture[0] @ bright.T + mixture[1] @ gap.T).reshape(len(days), size, size)
            mixed += snowy * (spectrum("snow", _wavelengths([band]))[0] - mixed)
            mixed *= 1.0 - 0.6 * shadow
            mixed += opacity * (spectrum("cloud", _wavelengths([band]))[0] - mixed)
        elif band.quantity in ("backscatter_vv", "backscatter_vh"):
            sigma = palette.backscatter(days, moisture, int(band.quantity == "backscatter_vh"), orbit)[:, present]
            mixed = (sigma @ (bright + gap).T).reshape(len(days), size, size) * _radar_slope_factor(ground, size, orbit)
            mixed *= 1.0 - 0.4 * snowy
        elif band.quantity == "cloud_probability":
            mixed = np.maximum(opacity, 0.25 * (shadow > 0.5))
        elif band.quantity == "snow_probability":
            mixed = snowy * (1.0 - opacity)
        else:
            raise ValueError(
                f"the simulator cannot render band {band.name} ({band.quantity}) of the series {modality.name}"
            )
        values[:, index] = mixed
    random = generator(*scene.seed_names, modality.name)
    if radar:
        _zero_outside_swath(values, modality, scene)
    return to_stored_values(values, modality.sensor, modality.dtype, random)


def _zero_outside_swath(values: np.ndarray, modality: Modality, scene: Scene) -> None:
    """Set pixels beyond the edge of the swath to zero at rare dates, in place; the edge is shared by the ROI."""
    random = generator(*scene.roi_seed_names, modality.name, "swath")
    steps = (np.arange(modality.size) + 0.5) * modality.gsd
    for date in np.flatnonzero(random.random(len(values)) < 0.03):
        edge = random.uniform(0, 250) + 0.2 * (scene.top + steps)
        outside = (scene.left + steps) > edge[:, None]
        values[date] *= ~outside


def sun_position(day: float, hour_angle: float, latitude: float = 46.0) -> SunPosition:
    """Position of the sun, at least 20 degrees high. The declination follows Cooper (1969).

    Args:
        day: day of the year.
        hour_angle: hour angle after noon, in radians.
        latitude: latitude, in degrees.
    """
    declination = math.radians(23.44) * math.sin(2 * math.pi * (day - 81) / 365)
    north = math.radians(latitude)
    sine = math.sin(north) * math.sin(declination) + math.cos(north) * math.cos(declination) * math.cos(hour_angle)
    elevation = math.asin(sine)
    azimuth = math.atan2(
        math.sin(hour_angle), math.cos(hour_angle) * math.sin(north) - math.tan(declination) * math.cos(north)
    )
    return SunPosition(azimuth + math.pi, max(elevation, math.radians(20)))
