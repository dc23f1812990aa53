"""Surfaces of the simulated landscape: what covers a piece of ground, and what optical and radar sensors see of it.

A surface is a linear mixture of materials in two phases: ``bright`` (canopy, ridge, sunlit) and ``gap`` (between rows
or crowns). A texture says how much of either phase a pixel holds, so that an average over many pixels stays a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bocage.shards.classes import COSIA, LPIS_3
from bocage.shards.simulate.crop_calendar import CALENDARS, CROPS
from bocage.shards.simulate.noise import TEXTURES
from bocage.shards.simulate.spectra import MATERIALS, spectra

_TILLAGE = 0.25
"""Under this fraction of plant cover a field looks ploughed."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """One kind of ground, or one parcel.

    Attributes:
        cosia: CoSIA class name; ``cosia_gap`` that of the gap phase, when it differs.
        lpis: LPIS class name at level 3.
        leaf, flower, dry, background: materials of the green, flowering, dry and bare fractions.
        calendar: key of ``CALENDARS``; ``delay`` (days) and ``vigour`` (factor) set this parcel apart.
        brightness: factor on the background and dry materials.
        gap_cover: plant cover of the gap phase, relative to the bright phase.
        gap_light: light in the gap phase, relative to the bright phase.
        texture: one of ``TEXTURES``, stretched by ``contrast``; ``row`` (metres) > 0 puts rows at ``angle`` instead.
        height: metres above the terrain; ``canopy`` heights follow the texture, ``grows`` ones the plant cover.
        ground_backscatter, canopy_backscatter: (VV, VH) linear sigma0 without and with full plant cover.
        facets: strength of the double bounce that depends on the orbit (buildings).
        tilled: bare states are labelled plowed.
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
    row: float = 0.0
    angle: float = 0.0
    height: float = 0.0
    canopy: bool = False
    grows: bool = False
    ground_backscatter: tuple[float, float] = (0.05, 0.006)
    canopy_backscatter: tuple[float, float] = (0.07, 0.012)
    facets: float = 0.0
    tilled: bool = False


def _hard(
    cosia: str,
    background: str,
    light: float,
    contrast: float = 1.0,
    texture: str = "grain",
    ground_backscatter: tuple[float, float] = (0.035, 0.004),
) -> Surface:
    """A surface without plants."""
    return Surface(
        cosia=cosia,
        background=background,
        gap_light=light,
        contrast=contrast,
        texture=texture,
        ground_backscatter=ground_backscatter,
    )


def _roof(background: str, light: float, contrast: float = 1.0) -> Surface:
    surface = _hard("building", background, light, contrast, ground_backscatter=(0.28, 0.04))
    return replace(surface, facets=1.0, height=5.0)


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
    "scree": _hard("bare soil", "rock", 0.6, texture="patches", ground_backscatter=(0.13, 0.016)),
    "snow": _hard("snow", "snow", 0.9, texture="patches", ground_backscatter=(0.02, 0.004)),
    "river": _hard("water", "turbid water", 0.9, contrast=0.4, ground_backscatter=(0.005, 0.0008)),
    "pond": _hard("water", "clear water", 0.9, contrast=0.4, ground_backscatter=(0.004, 0.0007)),
    "pool": _hard("swimming pool", "pool water", 0.85, contrast=0.6, ground_backscatter=(0.01, 0.002)),
    "road": _hard("impervious", "asphalt", 0.85, contrast=0.6),
    "yard": _hard("impervious", "concrete", 0.85, texture="patches"),
    "track": _hard("pervious", "gravel", 0.8, texture="patches"),
    "court": _hard("pervious", "gravel", 0.75),
    "tile roof": _roof("clay tile", 0.8),
    "slate roof": _roof("slate", 0.8),
    "flat roof": _roof("concrete", 0.9, contrast=0.5),
    "bitumen roof": _roof("asphalt", 0.9, contrast=0.5),
    "steel roof": _roof("steel roof", 0.93, contrast=0.4),
    "greenhouse": replace(
        _hard("greenhouse", "greenhouse", 0.8, contrast=0.7, ground_backscatter=(0.12, 0.012)),
        height=3.2,
        row=4.0,
        facets=0.4,
    ),
    "unknown": _hard("undefined", "gravel", 0.5, texture="patches", ground_backscatter=(0.1, 0.01)),
}
"""Surfaces that are not agricultural parcels."""


def cultivated(name: str, random: np.random.Generator, soil: str, delay: float, angle: float) -> Surface:
    """A parcel of the crop ``name`` (key of ``CROPS``) on ``soil``, with its own delay, vigour and row direction."""
    crop = CROPS[name]
    grass = crop.leaf == "grass leaf" or name == "alfalfa"
    orchard = crop.open_rows and crop.height > 2
    cosia = "herbaceous" if grass else "vineyard" if name == "vineyard" else "deciduous" if orchard else "agricultural"
    return Surface(
        cosia=cosia,
        cosia_gap="herbaceous" if orchard else None,
        lpis=name,
        leaf=crop.leaf,
        flower=crop.flower,
        dry="dry grass" if grass else "straw",
        background="grass leaf" if crop.evergreen_alley else soil,
        calendar=crop.calendar,
        delay=delay + crop.spread * random.standard_normal(),
        vigour=float(np.clip(random.normal(0.97, 0.08), 0.7, 1.08)),
        brightness=float(np.clip(random.normal(1.0, 0.14), 0.65, 1.4)),
        gap_cover=0.06 if crop.open_rows else 0.72,
        gap_light=0.8 if crop.open_rows else 0.78,
        texture="patches",
        contrast=1.0 if crop.open_rows else float(random.uniform(0.5, 1.0)),
        row=crop.row if crop.row else 0.9,
        angle=angle,
        height=crop.height,
        canopy=crop.open_rows,
        grows=not crop.open_rows,
        ground_backscatter=(0.06, 0.007),
        canopy_backscatter=crop.backscatter,
        tilled=not (grass or crop.open_rows),
    )


class Palette:
    """The surfaces of a landscape as columns, indexed by the values of a surface map.

    Attributes:
        lpis: (S,) uint8 values at level 3.
        texture, contrast, row, angle, height, canopy: (S,) columns of the surfaces.
    """

    def __init__(self, surfaces: list[Surface]) -> None:
        self._surfaces = surfaces
        self.lpis = np.array([LPIS_3.classes.index(surface.lpis) for surface in surfaces], np.uint8)
        self.texture = np.array([TEXTURES.index(surface.texture) for surface in surfaces], np.intp)
        self.contrast = self._column("contrast")
        self.row = self._column("row")
        self.angle = self._column("angle")
        self.open_rows = np.array([surface.row > 0 and not surface.grows for surface in surfaces])
        self.height = self._column("height")
        self.canopy = np.array([surface.canopy for surface in surfaces])
        self._gap_cover = self._column("gap_cover").astype(np.float64)
        self._gap_light = self._column("gap_light").astype(np.float64)
        self._brightness = self._column("brightness").astype(np.float64)
        self._ground_backscatter = np.array([surface.ground_backscatter for surface in surfaces])
        self._canopy_backscatter = np.array([surface.canopy_backscatter for surface in surfaces])
        self._facets = self._column("facets").astype(np.float64)
        self._plants: dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._materials = {
            part: np.array([MATERIALS.index(getattr(surface, part)) for surface in surfaces])
            for part in ("leaf", "flower", "dry", "background")
        }

    def __len__(self) -> int:
        return len(self._surfaces)

    def _column(self, name: str) -> np.ndarray:
        return np.array([getattr(surface, name) for surface in self._surfaces], np.float32)

    def plants(self, days: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Green, dry and flowering fractions: each (T, S) float64, for (T,) days; kept for the next call."""
        key = days.astype(np.float64).tobytes()
        if key not in self._plants:
            self._plants[key] = self._grow(days)
        return self._plants[key]

    def _grow(self, days: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        green = np.empty((len(days), len(self)))
        dry, flowers = np.empty_like(green), np.empty_like(green)
        for index, surface in enumerate(self._surfaces):
            calendar, local = CALENDARS[surface.calendar], days - surface.delay
            green[:, index] = np.minimum(calendar.green(local) * surface.vigour, 1.0)
            dry[:, index] = np.minimum(calendar.dry(local), 1.0 - green[:, index])
            flowers[:, index] = calendar.flowers(local)
        return green, dry, flowers

    def cosia(self, day: float) -> tuple[np.ndarray, np.ndarray]:
        """CoSIA values on ``day`` of the year, of the bright and the gap phase: (S,) uint8 each."""
        green, dry, _ = self.plants(np.array([day]))
        bright, gap = [], []
        for index, surface in enumerate(self._surfaces):
            bare = surface.tilled and green[0, index] + dry[0, index] < _TILLAGE
            bright.append(COSIA.classes.index("plowed" if bare else surface.cosia))
            gap.append(bright[-1] if surface.cosia_gap is None else COSIA.classes.index(surface.cosia_gap))
        return np.array(bright, np.uint8), np.array(gap, np.uint8)

    def heights(self, day: float) -> np.ndarray:
        """Heights above the terrain on ``day`` of the year, (S,) float32 metres, before texture."""
        green, dry, _ = self.plants(np.array([day]))
        grows = np.array([surface.grows for surface in self._surfaces])
        return np.where(grows, self.height * np.minimum(1.0, green[0] + dry[0]), self.height).astype(np.float32)

    def reflectance(
        self, days: np.ndarray, moisture: np.ndarray, wavelengths: list[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reflectance of the bright and of the gap phase.

        Args:
            days: (T,) days of the year.
            moisture: (T,) soil moisture, 0..1; wet soil is darker.
            wavelengths: B wavelengths, nm.

        Returns:
            Two arrays (T, S, B) float32.
        """
        materials = spectra(wavelengths)
        leaf, flower, dry_matter, background = (
            materials[self._materials[part]] for part in ("leaf", "flower", "dry", "background")
        )
        green, dry, flowers = self.plants(days)
        soil = background * self._brightness[:, None] * (1.1 - 0.3 * moisture)[:, None, None]
        dry_matter = dry_matter * self._brightness[:, None]
        phases = []
        for cover, light in ((1.0, 1.0), (self._gap_cover, self._gap_light)):
            shown = green * cover
            faded = dry * cover
            canopy = leaf + flowers[..., None] * (flower - leaf)
            mixed = shown[..., None] * canopy + faded[..., None] * dry_matter + (1 - shown - faded)[..., None] * soil
            phases.append((mixed * np.reshape(light, (-1, 1))).astype(np.float32))
        return phases[0], phases[1]

    def backscatter(self, days: np.ndarray, moisture: np.ndarray, polarisation: int, orbit: int) -> np.ndarray:
        """Linear sigma0 of the surfaces by a water-cloud mixture (Attema & Ulaby 1978), (T, S) float64.

        Args:
            days, moisture: see ``reflectance``.
            polarisation: 0 for VV, 1 for VH.
            orbit: even and odd orbits look from opposite sides, so double bounces differ.
        """
        green, dry, _ = self.plants(days)
        hidden = 1.0 - np.exp(-2.2 * green - 0.5 * dry)
        wet = np.where(self._facets > 0, 1.0, 0.65 + 0.8 * moisture[:, None])
        bounce = 1.0 + 1.6 * self._facets * np.cos(2.0 * (self.angle + 0.35 * (-1) ** orbit)) ** 4
        ground = self._ground_backscatter[:, polarisation] * wet * bounce
        return hidden * self._canopy_backscatter[:, polarisation] + (1.0 - hidden) * ground
