"""Draw random landscapes as vector plans: parcels, roads, hedges, villages and rivers.

A plan covers one ROI. Coordinates are metres from the ROI's upper-left corner, x to the east, y to the south. The plan
of the 1950s shares terrain, roads and rivers with today's; it has smaller parcels, more hedges and fewer buildings.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np

from bocage.shards.simulate.noise import SmoothField, generator
from bocage.shards.simulate.regions import Region
from bocage.shards.simulate.surfaces import COVERS, Palette, Surface, crop_surface, draw_cover, vary_colour

MARGIN = 30.0
"""Width of the landscape around a ROI, in metres: objects there cast shadows into the ROI."""

Border = tuple[np.ndarray, int]
"""Segment between two parcels, (2, 2), and the recursion depth of the split that made it."""


@dataclass(frozen=True)
class Shape:
    """A convex polygon, or a segment with a width, painted with one surface.

    Attributes:
        points: corners of the polygon in order, (n, 2) metres. With ``width`` > 0, the two ends of a segment; equal
            ends make a disc.
        surface: index into the surfaces of the plan.
        width: width of a segment, in metres; 0 for a polygon.
        inset: distance by which the polygon shrinks, in metres.
        ragged: distance by which noise moves the outline, in metres.
        pitch: slope of a roof: metres of height per metre from the edge.
    """

    points: np.ndarray
    surface: int
    width: float = 0.0
    inset: float = 0.0
    ragged: float = 0.0
    pitch: float = 0.0


@dataclass
class LandUsePlan:
    """Shapes of one ROI in one era (today or the 1950s), painted from first to last.

    Attributes:
        shapes: shapes in painting order.
    """

    shapes: list[Shape] = field(default_factory=list)
    _indices: dict[Surface, int] = field(default_factory=dict)

    @property
    def surfaces(self) -> list[Surface]:
        """Distinct surfaces of the shapes."""
        return list(self._indices)

    def surface_index(self, surface: Surface) -> int:
        """Index of ``surface`` in ``surfaces``; a new surface is appended."""
        return self._indices.setdefault(surface, len(self._indices))

    def paint(self, points: np.ndarray, surface: Surface, **options: float) -> None:
        """Paint a shape over the earlier ones. ``points``: (n, 2) metres; ``options``: other fields of ``Shape``."""
        self.shapes.append(Shape(points, self.surface_index(surface), **options))


@dataclass(frozen=True)
class Landscape:
    """Terrain, plans and palettes of one ROI.

    Attributes:
        region: parameters of the region.
        altitude: mean altitude, in metres.
        terrain: relief, scaled by ``region.relief``.
        outline: noise that makes outlines ragged.
        plans: plans by era: ``now``, and ``then`` for the 1950s.
        palettes: palettes of the plans, by era.
    """

    region: Region
    altitude: float
    terrain: SmoothField
    outline: SmoothField
    plans: dict[str, LandUsePlan]
    palettes: dict[str, Palette]


def _choose_weighted(random: np.random.Generator, weights: dict[str, float]) -> str:
    values = np.array(list(weights.values()), float)
    return list(weights)[int(random.choice(len(values), p=values / values.sum()))]


def _polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def _split_polygon(
    polygon: np.ndarray, point: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split a convex polygon along a line; return both parts and the segment between them."""
    side = (polygon - point) @ normal
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    crossings = []
    for index in range(len(polygon)):
        start_side, end_side = side[index], side[(index + 1) % len(polygon)]
        parts[int(start_side > 0)].append(polygon[index])
        if (start_side > 0) != (end_side > 0):
            edge = polygon[(index + 1) % len(polygon)] - polygon[index]
            crossing = polygon[index] + edge * start_side / (start_side - end_side)
            crossings.append(crossing)
            parts[0].append(crossing)
            parts[1].append(crossing)
    return np.array(parts[0]), np.array(parts[1]), np.array(crossings)


def _long_axis(polygon: np.ndarray) -> float:
    """Direction of the longest side, in radians."""
    sides = np.roll(polygon, -1, axis=0) - polygon
    longest = sides[int(np.argmax((sides**2).sum(1)))]
    return math.atan2(longest[1], longest[0])


def _split_into_parcels(
    random: np.random.Generator, polygon: np.ndarray, area: float, depth: int = 0
) -> tuple[list[np.ndarray], list[Border]]:
    """Split a polygon recursively across its long axis into convex parcels; return the parcels and their borders."""
    if _polygon_area(polygon) < area * random.uniform(1.1, 2.4):
        return [polygon], []
    axis = _long_axis(polygon)
    angle = axis + random.normal(0, 0.07)
    centre = polygon.mean(0)
    along = np.array([math.cos(axis), math.sin(axis)])
    extent = np.ptp(polygon @ along)
    across = np.ptp(polygon @ np.array([-along[1], along[0]]))
    if across > extent:
        angle += math.pi / 2
    normal = np.array([math.cos(angle), math.sin(angle)])
    first, second, border = _split_polygon(
        polygon, centre + normal * random.normal(0, 0.12) * max(extent, across), normal
    )
    if len(border) != 2 or min(len(first), len(second)) < 3:
        return [polygon], []
    parcels, borders = [], [(border, depth)]
    for part in (first, second):
        inner_parcels, inner_borders = _split_into_parcels(random, part, area, depth + 1)
        parcels += inner_parcels
        borders += inner_borders
    return parcels, borders


def _rectangle(centre: np.ndarray, length: float, width: float, angle: float) -> np.ndarray:
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    corners = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    return np.array([centre + a * length * along + b * width * across for a, b in corners])


def _distance_inside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance from (n, 2) points to the nearest side of a convex polygon, (n,); negative outside."""
    sides = np.roll(polygon, -1, axis=0) - polygon
    normals = np.stack((-sides[:, 1], sides[:, 0]), 1) / (np.hypot(sides[:, 0], sides[:, 1]) + 1e-9)[:, None]
    normals *= np.sign(((polygon.mean(0) - polygon) * normals).sum(1))[:, None]
    return ((points[:, None] - polygon) * normals).sum(2).min(1)


def _building_plots(
    random: np.random.Generator, polygon: np.ndarray, spacing: tuple[float, float]
) -> list[tuple[np.ndarray, float]]:
    """Centres and directions of building plots, on a jittered grid along the long axis of a parcel."""
    angle = _long_axis(polygon)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    steps = np.stack(np.meshgrid(np.arange(-6, 7), np.arange(-6, 7) + 0.5, indexing="ij"), -1).reshape(-1, 2)
    steps = (steps + random.uniform(-0.14, 0.14, steps.shape)) * spacing
    points = polygon.mean(0) + steps[:, :1] * along + steps[:, 1:] * across
    points = points[_distance_inside(polygon, points) > 0.3 * min(spacing)]
    return [(point, angle + turn) for point, turn in zip(points, random.normal(0, 0.05, len(points)), strict=True)]


def _paint_tree(plan: LandUsePlan, random: np.random.Generator, point: np.ndarray) -> None:
    cover = draw_cover("hedge" if random.random() < 0.75 else "conifer", random)
    plan.paint(
        np.array([point, point]),
        replace(cover, height=float(round(random.uniform(4, 10)))),
        width=float(random.uniform(3.5, 8)),
        ragged=0.6,
    )


def _paint_village(
    plan: LandUsePlan, random: np.random.Generator, polygon: np.ndarray, region: Region, built: float
) -> None:
    """Paint houses with gardens, drives, pools and trees; each plot has a house with probability ``built``."""
    plan.paint(polygon, draw_cover("lawn", random), inset=2.0)
    for centre, angle in _building_plots(random, polygon, (19.0, 23.0)):
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        if random.random() > built:
            _paint_tree(plan, random, centre)
            continue
        if random.random() < 0.75:
            drive = draw_cover(_choose_weighted(random, {"court": 2, "yard": 1, "road": 1}), random)
            plan.paint(np.array([centre, centre + across * 14]), drive, width=float(random.uniform(3, 6)))
        if random.random() < 0.4:
            terrace = draw_cover(_choose_weighted(random, {"court": 2, "yard": 1}), random)
            plan.paint(_rectangle(centre + along * 7, 6, 8, angle), terrace)
        if random.random() < region.pool_probability:
            pool = centre - across * 10 + along * random.uniform(-4, 4)
            plan.paint(_rectangle(pool, 11, 7, angle), draw_cover("yard", random))
            plan.paint(_rectangle(pool, 8.5, 4.2, angle), draw_cover("pool", random))
        name = _choose_weighted(random, region.roofs)
        turn = angle + (math.pi / 2 if random.random() < 0.3 else 0.0)
        roof = replace(
            draw_cover(name, random),
            angle=turn,
            height=round(float(random.uniform(3.0, 6.5)), 1),
        )
        pitch = 0.0 if name in ("flat roof", "bitumen roof", "steel roof") else 0.55
        length, width = random.uniform(9, 15), random.uniform(7, 10)
        plan.paint(_rectangle(centre, length, width, turn), roof, pitch=pitch)
        if random.random() < 0.4:
            plan.paint(_rectangle(centre + along * length * 0.5, 7, 6, turn), roof, pitch=pitch)
        for _ in range(random.integers(0, 4)):
            _paint_tree(plan, random, centre + random.uniform(-11, 11, 2))


def _paint_industry(plan: LandUsePlan, random: np.random.Generator, polygon: np.ndarray) -> None:
    """Paint large buildings on paved or gravelled ground."""
    ground = draw_cover(_choose_weighted(random, {"road": 2, "yard": 1, "track": 1}), random)
    plan.paint(polygon, ground, inset=3.0)
    for centre, angle in _building_plots(random, polygon, (48.0, 42.0)):
        kind = _choose_weighted(random, {"steel roof": 2, "flat roof": 1, "bitumen roof": 2})
        roof = replace(draw_cover(kind, random), height=round(float(random.uniform(5, 12))), angle=angle)
        plan.paint(_rectangle(centre, random.uniform(20, 38), random.uniform(14, 28), angle), roof)
    for centre, _ in _building_plots(random, polygon, (17.0, 21.0)):
        if random.random() < 0.12:
            _paint_tree(plan, random, centre)


def _paint_greenhouses(plan: LandUsePlan, random: np.random.Generator, polygon: np.ndarray) -> None:
    ground = draw_cover(_choose_weighted(random, {"court": 2, "bare": 1, "lawn": 2}), random)
    plan.paint(polygon, ground, inset=2.0)
    for centre, angle in _building_plots(random, polygon, (34.0, 13.0)):
        house = replace(draw_cover("greenhouse", random), angle=angle + math.pi / 2)
        plan.paint(_rectangle(centre, random.uniform(20, 32), random.uniform(8, 11.5), angle), house, pitch=0.25)


def _fill_parcel(
    plan: LandUsePlan, random: np.random.Generator, polygon: np.ndarray, region: Region, kind: str
) -> None:
    """Paint one parcel with ``kind``: a key of ``region.covers``, or ``hamlet``."""
    if kind in ("village", "hamlet"):
        _paint_village(plan, random, polygon, region, 0.92 if kind == "village" else 0.3)
    elif kind == "industry":
        _paint_industry(plan, random, polygon)
    elif kind == "greenhouses":
        _paint_greenhouses(plan, random, polygon)
    elif kind == "pond":
        plan.paint(polygon, draw_cover("verge", random), inset=1.0)
        centre, radius = polygon.mean(0), 0.6 * math.sqrt(_polygon_area(polygon))
        offset = random.normal(0, 0.15, 2) * radius
        pond = draw_cover("pond", random)
        plan.paint(np.array([centre - offset, centre + offset]), pond, width=radius, ragged=3.0)
    elif kind == "crops":
        angle = _long_axis(polygon)
        crop = crop_surface(_choose_weighted(random, region.crops), random, region.soil, region.delay, angle)
        plan.paint(polygon, crop, inset=float(random.uniform(0.6, 2.0)))
    else:
        cover = COVERS[kind]
        background = region.soil if cover.background == "brown soil" else cover.background
        if cover.canopy and kind != "scrub":
            cover = replace(cover, height=cover.height * random.uniform(0.6, 1.3), vigour=random.uniform(0.92, 1.05))
        cover = vary_colour(replace(cover, background=background, delay=region.delay), random)
        plan.paint(polygon, cover, inset=0.5, ragged=1.5)
    if random.random() < 0.02:
        plan.paint(np.array([polygon.mean(0)] * 2), COVERS["unknown"], width=12.0, ragged=2.0)


def _former_land_use(random: np.random.Generator, region: Region, kind: str) -> str:
    """Draw the land use in the 1950s of a parcel that is ``kind`` today."""
    if kind == "village":
        return "hamlet" if random.random() < 0.35 else "crops"
    if kind in ("industry", "greenhouses"):
        return "crops"
    if kind in region.covers and random.random() < 0.2:
        return _former_land_use(random, region, _choose_weighted(random, region.covers))
    return kind


def _river_line(random: np.random.Generator, side: float) -> np.ndarray:
    """Draw a meandering line across a ROI, (n, 2)."""
    angle = random.uniform(0, math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    steps = np.linspace(-0.8 * side, 0.8 * side, 26)
    bends = np.cumsum(random.normal(0, 3.0, len(steps)))
    bends += 14 * np.sin(steps / 45 + random.uniform(0, 6)) - bends.mean()
    middle = np.full(2, side / 2) + random.uniform(-0.25, 0.25, 2) * side
    return middle + steps[:, None] * along + bends[:, None] * across


def _paint_line(plan: LandUsePlan, line: np.ndarray, surface: Surface, width: float, ragged: float = 0.0) -> None:
    for start, end in itertools.pairwise(line):
        plan.paint(np.array([start, end]), surface, width=width, ragged=ragged)


def _paint_lanes_and_hedges(
    plan: LandUsePlan,
    random: np.random.Generator,
    borders: list[Border],
    verge: Surface,
    *,
    hedges: float,
    paved: bool,
) -> None:
    """Paint lanes and hedges along parcel borders."""
    for border, depth in borders:
        if depth == 1 or random.random() < 0.12:
            road = depth == 1 and paved
            plan.paint(border, verge, width=7.5 if road else 5.0)
            lane = draw_cover("road" if road else "track", random)
            plan.paint(border, lane, width=5.0 if road else 3.0, ragged=0.0 if road else 0.3)
        if random.random() < hedges:
            offset = np.array([border[0, 1] - border[1, 1], border[1, 0] - border[0, 0]])
            offset *= (4.0 if depth == 1 else 0.0) / (np.hypot(*offset) + 1e-9)
            hedge = replace(draw_cover("hedge", random), height=float(random.integers(3, 11)))
            plan.paint(border + offset, hedge, width=float(random.uniform(2.5, 6)), ragged=1.2)


def _draw_plan(region: Region, side: float, today: bool, *names: object) -> LandUsePlan:
    """Draw the plan of one era. Both eras share the random roads, rivers and parcels of today."""
    layout, random = generator(*names, "layout"), generator(*names, "now" if today else "then")
    plan = LandUsePlan()
    verge = vary_colour(replace(COVERS["verge"], delay=region.delay, background=region.soil), random)
    plan.surface_index(verge)
    low, high = -MARGIN, side + MARGIN
    ground = np.array([(low, low), (high, low), (high, high), (low, high)])
    turn = layout.uniform(0, math.pi)
    point, normal = np.full(2, side / 2) + layout.normal(0, side / 8, 2), np.array([math.cos(turn), math.sin(turn)])
    first, second, main_road = _split_polygon(ground, point, normal)
    river = _river_line(layout, side) if layout.random() < region.river_probability else None
    river_width = layout.uniform(5, 16)
    parcels, borders = [], []
    for half in (first, second):
        inner_parcels, inner_borders = _split_into_parcels(layout, half, region.parcel_area, 1)
        parcels += inner_parcels
        borders += inner_borders
    for parcel in parcels:
        kind = _choose_weighted(layout, region.covers)
        if today:
            _fill_parcel(plan, random, parcel, region, kind)
            continue
        strips, inner_borders = _split_into_parcels(random, parcel, 0.45 * region.parcel_area, 2)
        borders += inner_borders
        kind = _former_land_use(random, region, kind)
        for strip in strips:
            _fill_parcel(plan, random, strip, region, kind)
    if river is not None:
        trees = replace(draw_cover("hedge", random), height=11.0)
        _paint_line(plan, river, trees, river_width + 12, ragged=4.0)
        _paint_line(plan, river, draw_cover("river", random), river_width, ragged=1.0)
    hedges = region.hedge_probability if today else min(0.95, 1.6 * region.hedge_probability + 0.1)
    paved = today and layout.random() < 0.6
    _paint_lanes_and_hedges(plan, random, borders, verge, hedges=hedges, paved=paved)
    plan.paint(main_road, verge, width=11.0)
    road = draw_cover("road" if today else "track", random)
    plan.paint(main_road, road, width=6.5 if today else 4.5)
    for _ in range(random.integers(2, 9)):
        _paint_tree(plan, random, random.uniform(low, high, 2))
    return plan


def build_landscape(region: Region, side: float, *names: object) -> Landscape:
    """Draw the landscape of a ROI of ``side`` metres, from ``region`` and the seed names (seed, domain, ROI)."""
    random = generator(*names, "relief")
    span = side + 2 * MARGIN
    altitude = random.uniform(*region.altitude)
    plans = {era: _draw_plan(region, side, era == "now", *names) for era in ("now", "then")}
    return Landscape(
        region=region,
        altitude=altitude,
        terrain=SmoothField(random, -MARGIN, span, cell=160.0, octaves=5, roughness=0.36),
        outline=SmoothField(random, -MARGIN, span, cell=12.0, octaves=3, roughness=0.6),
        plans=plans,
        palettes={era: Palette(plan.surfaces) for era, plan in plans.items()},
    )
