"""Surfaces of the simulated landscape: their classes, optical reflectance and radar backscatter.

A surface is a linear mixture of materials in two phases: ``bright`` (canopy, ridge, sunlit) and ``gap`` (between rows
or crowns). A texture gives the fraction of each phase in a pixel, so the average of many pixels is again a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bocage.shards.classes import COSIA, LPIS_3
from bocage.shards.simulate.crop_calendar import CALENDARS, CROPS
from bocage.shards.simulate.noise import TEXTURES
from bocage.shards.simulate.spectra import MATERIALS, spectra

_PLOUGHED_BELOW = 0.25
"""A tilled field with less plant cover than this fraction is labelled as ploughed."""

_LEAVES = ("crop leaf", "grass leaf", "broad leaf", "shrub leaf", "needle")
_MINERALS = (
    *("clay tile", "slate", "concrete", "asphalt", "gravel", "rock", "steel roof"),
    *("brown soil", "chalk soil", "red soil"),
)
_WATERS = ("clear water", "turbid water", "pool water")


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Parameters of one land cover, or of one agricultural parcel.

    Attributes:
        cosia: CoSIA class name.
        cosia_gap: CoSIA class name of the gap phase, or None if it is the same.
        lpis: LPIS class name at level 3.
        leaf: material of the green fraction.
        flower: material of the flowering fraction.
        dry: material of the dry fraction.
        background: material of the bare fraction.
        calendar: key of ``CALENDARS``.
        delay: delay of the calendar, in days.
        vigour: factor on the green fraction.
        brightness: factor on the reflectance of all materials.
        gap_cover: plant cover of the gap phase, relative to the bright phase.
        gap_light: light in the gap phase, relative to the bright phase.
        texture: name of the texture, one of ``TEXTURES``.
        contrast: factor on the texture's contrast.
        row_spacing: distance between plant rows, in metres; 0 without rows.
        angle: direction of the rows or of the roof, in radians.
        height: height above the terrain, in metres.
        canopy: whether the height follows the texture.
        grows: whether the height follows the plant cover.
        ground_backscatter: (VV, VH) linear sigma0 without plants.
        canopy_backscatter: (VV, VH) linear sigma0 at full plant cover.
        double_bounce: strength of the double bounce, which depends on the orbit (buildings).
        tilled: whether the surface is labelled as ploughed while it is bare.
    """

    cosia: str
    cosia_gap: str | None = None
    lpis: str = "background"
    leaf: str = "grass leaf"
    flower: str = "yellow flower"
    dry: str = "dry grass"
    background: str = "brown soil"
    calendar: str = "none"
    delay: float = 0.0
    vigour: float = 1.0
    brightness: float = 1.0
    gap_cover: float = 1.0
    gap_light: float = 1.0
    texture: str = "grain"
    contrast: float = 1.0
    row_spacing: float = 0.0
    angle: float = 0.0
    height: float = 0.0
    canopy: bool = False
    grows: bool = False
    ground_backscatter: tuple[float, float] = (0.05, 0.006)
    canopy_backscatter: tuple[float, float] = (0.07, 0.012)
    double_bounce: float = 0.0
    tilled: bool = False


def vary_colour(surface: Surface, random: np.random.Generator) -> Surface:
    """Draw the materials and the brightness of one object, so that land covers share colours.

    Plants draw their leaf, hard surfaces their mineral, and waters their water, each from one set for all classes.
    Texture, shape, neighbourhood, height and season distinguish the classes. Tilled crops keep their leaf, because
    only their calendars distinguish them. Snow keeps its colour.
    """
    brightness = surface.brightness * float(random.uniform(0.7, 1.35))
    if surface.background in _WATERS:
        return replace(surface, background=str(random.choice(_WATERS)), brightness=brightness)
    if surface.tilled:
        return replace(surface, brightness=brightness)
    if surface.calendar != "none":
        leaf = str(random.choice(_LEAVES))
        return replace(surface, leaf=leaf, brightness=brightness, vigour=surface.vigour * float(random.uniform(0.8, 1)))
    if surface.background in (*_MINERALS, "greenhouse"):
        return replace(surface, background=str(random.choice(_MINERALS)), brightness=brightness)
    return surface


def _hard_surface(
    cosia: str,
    background: str,
    light: float,
    contrast: float = 1.0,
    texture: str = "grain",
    ground_backscatter: tuple[float, float] = (0.035, 0.004),
) -> Surface:
    """Surface without plants."""
    return Surface(
        cosia=cosia,
        background=background,
        gap_light=light,
        contrast=contrast,
        texture=texture,
        ground_backscatter=ground_backscatter,
    )


def _roof_surface(background: str, light: float, contrast: float = 1.0) -> Surface:
    surface = _hard_surface("building", background, light, contrast, ground_backscatter=(0.28, 0.04))
    return replace(surface, double_bounce=1.0, height=5.0)


COVERS: dict[str, Surface] = {
    "verge": Surface(cosia="herbaceous", calendar="lawn", texture="patches", gap_cover=0.6, gap_light=0.75),
    "lawn": Surface(cosia="herbaceous", calendar="lawn", texture="grain", gap_cover=0.7, gap_light=0.72),
    "heath": Surface(cosia="herbaceous", calendar="lawn", texture="patches", vigour=0.8, gap_cover=0.5, gap_light=0.85),
    "broadleaf": Surface(
        cosia="deciduous",
        leaf="broad leaf",
        dry="litter",
        background="litter",
        calendar="broadleaf",
        gap_light=0.3,
        texture="broadleaf crowns",
        height=14,
        ground_backscatter=(0.11, 0.03),
        canopy_backscatter=(0.12, 0.042),
        canopy=True,
    ),
    "hedge": Surface(
        cosia="deciduous",
        leaf="broad leaf",
        dry="litter",
        background="litter",
        calendar="broadleaf",
        gap_light=0.4,
        texture="broadleaf crowns",
        height=7,
        ground_backscatter=(0.1, 0.025),
        canopy_backscatter=(0.12, 0.036),
        canopy=True,
    ),
    "conifer": Surface(
        cosia="coniferous",
        leaf="needle",
        dry="litter",
        background="litter",
        calendar="evergreen",
        gap_light=0.45,
        texture="conifer crowns",
        height=16,
        ground_backscatter=(0.09, 0.025),
        canopy_backscatter=(0.1, 0.03),
        canopy=True,
    ),
    "scrub": Surface(
        cosia="brushwood",
        leaf="shrub leaf",
        dry="dry grass",
        calendar="shrubs",
        gap_cover=0.45,
        gap_light=0.7,
        texture="conifer crowns",
        height=2.0,
        canopy_backscatter=(0.09, 0.02),
        canopy=True,
    ),
    "clear cut": Surface(
        cosia="clear cut",
        leaf="shrub leaf",
        dry="litter",
        calendar="shrubs",
        vigour=0.35,
        gap_cover=0.5,
        gap_light=0.8,
        texture="patches",
        ground_backscatter=(0.09, 0.014),
    ),
    "bare": Surface(
        cosia="bare soil",
        calendar="lawn",
        vigour=0.08,
        gap_light=0.75,
        texture="patches",
        ground_backscatter=(0.06, 0.006),
    ),
    "scree": _hard_surface("bare soil", "rock", 0.6, texture="patches", ground_backscatter=(0.13, 0.016)),
    "snow": _hard_surface("snow", "snow", 0.9, texture="patches", ground_backscatter=(0.02, 0.004)),
    "river": _hard_surface("water", "turbid water", 0.9, contrast=0.4, ground_backscatter=(0.005, 0.0008)),
    "pond": _hard_surface("water", "clear water", 0.9, contrast=0.4, ground_backscatter=(0.004, 0.0007)),
    "pool": _hard_surface("swimming pool", "pool water", 0.85, contrast=0.6, ground_backscatter=(0.01, 0.002)),
    "road": _hard_surface("impervious", "asphalt", 0.85, contrast=0.4),
    "yard": _hard_surface("impervious", "concrete", 0.85, contrast=0.4),
    "track": _hard_surface("pervious", "gravel", 0.6, texture="patches"),
    "court": _hard_surface("pervious", "gravel", 0.6, texture="patches"),
    "tile roof": _roof_surface("clay tile", 0.8),
    "slate roof": _roof_surface("slate", 0.8),
    "flat roof": _roof_surface("concrete", 0.9, contrast=0.5),
    "bitumen roof": _roof_surface("asphalt", 0.9, contrast=0.5),
    "steel roof": _roof_surface("steel roof", 0.93, contrast=0.4),
    "greenhouse": replace(
        _hard_surface("greenhouse", "greenhouse", 0.8, contrast=0.7, ground_backscatter=(0.12, 0.012)),
        height=3.2,
        row_spacing=4.0,
        double_bounce=0.4,
    ),
    "unknown": _hard_surface("undefined", "gravel", 0.5, texture="patches", ground_backscatter=(0.1, 0.01)),
}
"""Surfaces other than agricultural parcels, by name."""


def draw_cover(name: str, random: np.random.Generator) -> Surface:
    """Surface of one object of the cover ``name``, a key of ``COVERS``, with a random colour."""
    return vary_colour(COVERS[name], random)


def crop_surface(name: str, random: np.random.Generator, soil: str, delay: float, angle: float) -> Surface:
    """Surface of one parcel of the crop ``name``, with random delay, vigour and colour.

    Args:
        name: key of ``CROPS``.
        random: random generator.
        soil: material of the soil.
        delay: delay of the region, in days.
        angle: direction of the rows, in radians.
    """
    crop = CROPS[name]
    grass = crop.leaf == "grass leaf" or name == "alfalfa"
    orchard = crop.open_rows and crop.height > 2
    cosia = "herbaceous" if grass else "vineyard" if name == "vineyard" else "deciduous" if orchard else "agricultural"
    surface = Surface(
        cosia=cosia,
        cosia_gap="herbaceous" if orchard else None,
        lpis=name,
        leaf=crop.leaf,
        flower=crop.flower,
        dry="dry grass" if grass else "straw",
        background="grass leaf" if crop.grass_alley else soil,
        calendar=crop.calendar,
        delay=delay + crop.delay_std * random.standard_normal(),
        vigour=float(np.clip(random.normal(0.97, 0.08), 0.7, 1.08)),
        gap_cover=0.06 if crop.open_rows else 0.72,
        gap_light=0.8 if crop.open_rows else 0.78,
        texture="patches",
        contrast=1.0 if crop.open_rows else float(random.uniform(0.5, 1.0)),
        # Meadows are not drilled: rows and wheel tracks tell crops from them.
        row_spacing=crop.row_spacing or (0.0 if grass else 0.9),
        angle=angle,
        height=crop.height,
        canopy=crop.open_rows,
        grows=not crop.open_rows,
        ground_backscatter=(0.06, 0.007),
        canopy_backscatter=crop.backscatter,
        tilled=not (grass or crop.open_rows),
    )
    return vary_colour(surface, random)


class Palette:
    """Parameters of the S surfaces of a landscape as arrays, indexed by the values of a surface map.

    Attributes:
        lpis: LPIS classes at level 3, (S,) uint8.
        texture: indices of the textures in ``TEXTURES``, (S,) int.
        contrast: contrast factors, (S,) float32.
        row_spacing: distances between rows in metres, (S,) float32.
        angle: directions in radians, (S,) float32.
        open_rows: whether the ground shows between the rows, (S,) bool.
        height: heights in metres, (S,) float32.
        canopy: whether the height follows the texture, (S,) bool.
    """

    def __init__(self, surfaces: list[Surface]) -> None:
        self._surfaces = surfaces
        self.lpis = np.array([LPIS_3.classes.index(surface.lpis) for surface in surfaces], np.uint8)
        self.texture = np.array([TEXTURES.index(surface.texture) for surface in surfaces], np.intp)
        self.contrast = self._column("contrast")
        self.row_spacing = self._column("row_spacing")
        self.angle = self._column("angle")
        self.open_rows = np.array([surface.row_spacing > 0 and not surface.grows for surface in surfaces])
        self.height = self._column("height")
        self.canopy = np.array([surface.canopy for surface in surfaces])
        self._gap_cover = self._column("gap_cover").astype(np.float64)
        self._gap_light = self._column("gap_light").astype(np.float64)
        self._brightness = self._column("brightness").astype(np.float64)
        self._ground_backscatter = np.array([surface.ground_backscatter for surface in surfaces])
        self._canopy_backscatter = np.array([surface.canopy_backscatter for surface in surfaces])
        self._double_bounce = self._column("double_bounce").astype(np.float64)
        self._fractions_by_days: dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._materials = {
            component: np.array([MATERIALS.index(getattr(surface, component)) for surface in surfaces])
            for component in ("leaf", "flower", "dry", "background")
        }

    def __len__(self) -> int:
        return len(self._surfaces)

    def _column(self, name: str) -> np.ndarray:
        return np.array([getattr(surface, name) for surface in self._surfaces], np.float32)

    def plant_fractions(self, days: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Green, dry and flowering fractions on (T,) days, each (T, S) float64; results are cached."""
        key = days.astype(np.float64).tobytes()
        if key not in self._fractions_by_days:
            self._fractions_by_days[key] = self._compute_plant_fractions(days)
        return self._fractions_by_days[key]

    def _compute_plant_fractions(self, days: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        green = np.empty((len(days), len(self)))
        dry, flowers = np.empty_like(green), np.empty_like(green)
        for index, surface in enumerate(self._surfaces):
            calendar, shifted_days = CALENDARS[surface.calendar], days - surface.delay
            green[:, index] = np.minimum(calendar.green_fraction(shifted_days) * surface.vigour, 1.0)
            dry[:, index] = np.minimum(calendar.dry_fraction(shifted_days), 1.0 - green[:, index])
            flowers[:, index] = calendar.flower_fraction(shifted_days)
        return green, dry, flowers

    def cosia_classes(self, day: float) -> tuple[np.ndarray, np.ndarray]:
        """CoSIA classes of the bright and the gap phase on ``day`` of the year, (S,) uint8 each."""
        green, dry, _ = self.plant_fractions(np.array([day]))
        bright, gap = [], []
        for index, surface in enumerate(self._surfaces):
            bare = surface.tilled and green[0, index] + dry[0, index] < _PLOUGHED_BELOW
            bright.append(COSIA.classes.index("plowed" if bare else surface.cosia))
            gap.append(bright[-1] if surface.cosia_gap is None else COSIA.classes.index(surface.cosia_gap))
        return np.array(bright, np.uint8), np.array(gap, np.uint8)

    def heights(self, day: float) -> np.ndarray:
        """Heights above the terrain on ``day`` of the year in metres, before the texture is applied, (S,) float32."""
        green, dry, _ = self.plant_fractions(np.array([day]))
        grows = np.array([surface.grows for surface in self._surfaces])
        return np.where(grows, self.height * np.minimum(1.0, green[0] + dry[0]), self.height).astype(np.float32)

    def reflectance(
        self, days: np.ndarray, moisture: np.ndarray, wavelengths: list[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reflectance of the bright and of the gap phase.

        Args:
            days: days of the year, (T,).
            moisture: soil moisture in 0..1, (T,); wet soil is darker.
            wavelengths: B wavelengths, in nm.

        Returns:
            bright: reflectance of the bright phase, (T, S, B) float32.
            gap: reflectance of the gap phase, (T, S, B) float32.
        """
        materials = spectra(wavelengths)
        leaf, flower, dry_matter, background = (
            materials[self._materials[component]] for component in ("leaf", "flower", "dry", "background")
        )
        green, dry, flowers = self.plant_fractions(days)
        soil = background * (1.1 - 0.3 * moisture)[:, None, None]
        phases = []
        for cover, light in ((1.0, 1.0), (self._gap_cover, self._gap_light)):
            green_cover = green * cover
            dry_cover = dry * cover
            canopy = leaf + flowers[..., None] * (flower - leaf)
            bare = 1 - green_cover - dry_cover
            mixed = green_cover[..., None] * canopy + dry_cover[..., None] * dry_matter + bare[..., None] * soil
            phases.append((mixed * np.reshape(light * self._brightness, (-1, 1))).astype(np.float32))
        return phases[0], phases[1]

    def backscatter(self, days: np.ndarray, moisture: np.ndarray, polarisation: int, orbit: int) -> np.ndarray:
        """Linear sigma0 of the surfaces after the water-cloud model (Attema & Ulaby 1978), (T, S) float64.

        Args:
            days: days of the year, (T,).
            moisture: soil moisture in 0..1, (T,).
            polarisation: 0 for VV, 1 for VH.
            orbit: orbit number; even and odd orbits look from opposite sides, so double bounces differ.
        """
        green, dry, _ = self.plant_fractions(days)
        canopy_weight = 1.0 - np.exp(-2.2 * green - 0.5 * dry)
        moisture_factor = np.where(self._double_bounce > 0, 1.0, 0.65 + 0.8 * moisture[:, None])
        bounce_factor = 1.0 + 1.6 * self._double_bounce * np.cos(2.0 * (self.angle + 0.35 * (-1) ** orbit)) ** 4
        ground = self._ground_backscatter[:, polarisation] * moisture_factor * bounce_factor
        return canopy_weight * self._canopy_backscatter[:, polarisation] + (1.0 - canopy_weight) * ground
