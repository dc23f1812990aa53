"""Crop calendars: plant cover by day of the year, for the crops of the LPIS classes.

A calendar gives the fraction of ground under green leaves and under dry plants (ripe ears, straw, stubble). Dates are
typical of lowland France (AGRESTE crop calendars; FAO crop calendar), and regions shift them. Some crops look alike on
a summer day and differ only over time: winter wheat, durum, barley and triticale; maize, sorghum, sunflower and soy;
the two types of grass and alfalfa.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Knots = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Plant cover over one year.

    Attributes:
        knots: (day of year, green fraction, dry fraction), interpolated linearly and periodically.
        bloom: (day, width in days, fraction of the canopy in flower) of a visible flowering, or None.
    """

    knots: Knots
    bloom: tuple[float, float, float] | None = None

    def green_fraction(self, days: np.ndarray) -> np.ndarray:
        """Green fraction at ``days`` of the year; same shape as ``days``."""
        return self._interpolate(days, 1)

    def dry_fraction(self, days: np.ndarray) -> np.ndarray:
        """Dry fraction at ``days`` of the year; same shape as ``days``."""
        return self._interpolate(days, 2)

    def flower_fraction(self, days: np.ndarray) -> np.ndarray:
        """Fraction of the green canopy in flower at ``days`` of the year; same shape as ``days``."""
        if self.bloom is None:
            return np.zeros_like(days, dtype=np.float64)
        day, width, fraction = self.bloom
        return fraction * np.exp(-0.5 * ((days - day) / width) ** 2)

    def _interpolate(self, days: np.ndarray, column: int) -> np.ndarray:
        return np.interp(days, [knot[0] for knot in self.knots], [knot[column] for knot in self.knots], period=365.0)


def _calendar(table: str, bloom: tuple[float, float, float] | None = None) -> Calendar:
    """Parse a calendar from "day green% dry% | day green% dry% ..."."""
    rows = (tuple(map(float, row.split())) for row in table.split("|"))
    return Calendar(knots=tuple((day, green / 100, dry / 100) for day, green, dry in rows), bloom=bloom)


CALENDARS: dict[str, Calendar] = {
    "none": _calendar("0 0 0"),
    "evergreen": _calendar("0 86 5 | 150 90 3 | 365 86 5"),
    "broadleaf": _calendar("0 5 10 | 95 8 10 | 125 80 0 | 150 95 0 | 265 90 0 | 300 40 35 | 325 5 20"),
    "shrubs": _calendar("0 50 20 | 100 55 15 | 150 80 5 | 230 62 20 | 330 50 20"),
    "lawn": _calendar("0 70 10 | 90 80 5 | 140 90 3 | 210 62 28 | 270 70 15"),
    "meadow": _calendar("0 55 15 | 80 65 10 | 130 92 3 | 165 75 20 | 172 35 40 | 205 60 25 | 270 70 15"),
    "ley": _calendar(
        "0 60 5 | 70 75 0 | 115 97 0 | 122 40 30 | 155 92 0 | 162 40 30 | 210 75 10 | 240 80 5 | 247 40 20 | 290 75 5",
    ),
    "alfalfa": _calendar(
        "0 35 10 | 85 60 0 | 130 97 0 | 137 25 25 | 168 95 0 | 175 25 25 | 210 92 0 | 217 25 25 | 255 85 0 | 300 50 10",
    ),
    "winter wheat": _calendar(
        "0 22 0 | 60 38 0 | 105 85 0 | 140 97 0 | 168 75 22 | 188 12 85 | 200 3 60 | 235 8 40 | "
        "262 0 5 | 305 5 0 | 340 15 0",
    ),
    "winter barley": _calendar(
        "0 30 0 | 60 50 0 | 95 92 0 | 125 95 0 | 145 60 37 | 163 10 85 | 174 3 60 | 205 25 35 | "
        "250 30 20 | 262 0 5 | 300 10 0 | 340 25 0",
    ),
    "triticale": _calendar(
        "0 25 0 | 60 42 0 | 100 90 0 | 150 97 0 | 180 70 28 | 200 12 85 | 215 4 60 | 285 15 35 | 300 0 5 | 340 15 0",
    ),
    "winter durum": _calendar(
        "0 12 0 | 60 28 0 | 100 75 0 | 128 90 0 | 155 55 40 | 172 8 85 | 185 2 55 | 240 3 40 | 255 0 5 | 320 2 0",
    ),
    "spring barley": _calendar(
        "0 30 5 | 40 20 10 | 50 0 0 | 85 5 0 | 120 60 0 | 145 92 0 | 170 55 40 | 188 8 85 | 198 3 55 | "
        "230 30 25 | 300 50 5 | 330 35 5",
    ),
    "rapeseed": _calendar(
        "0 60 0 | 55 60 0 | 90 92 0 | 140 95 0 | 165 60 35 | 182 8 80 | 192 5 50 | 225 15 10 | "
        "235 0 0 | 262 35 0 | 300 70 0",
        bloom=(107, 9, 0.75),
    ),
    "spring peas": _calendar(
        "0 5 10 | 60 0 0 | 95 15 0 | 130 85 0 | 155 90 5 | 176 20 70 | 186 3 30 | 215 15 20 | 290 20 5",
    ),
    "maize": _calendar(
        "0 3 30 | 80 10 20 | 100 0 0 | 140 4 0 | 170 40 0 | 195 93 0 | 240 95 2 | 268 65 30 | "
        "290 15 75 | 300 0 45 | 340 2 35",
    ),
    "sorghum": _calendar(
        "0 3 30 | 90 15 15 | 115 0 0 | 155 5 0 | 185 45 0 | 210 90 0 | 255 85 8 | 285 30 60 | 298 0 45 | 340 2 35",
    ),
    "sunflower": _calendar(
        "0 5 5 | 60 5 0 | 110 0 0 | 130 8 0 | 158 60 0 | 180 92 0 | 212 88 5 | 235 40 50 | 252 5 75 | "
        "262 0 30 | 300 0 5",
        bloom=(192, 8, 0.35),
    ),
    "soy": _calendar(
        "0 15 10 | 100 20 10 | 118 0 0 | 150 6 0 | 178 50 0 | 198 95 0 | 242 95 0 | 262 45 50 | 276 4 40 | 300 2 10",
    ),
    "beetroots": _calendar(
        "0 0 5 | 85 0 0 | 120 8 0 | 150 55 0 | 172 97 0 | 260 93 0 | 296 85 5 | 304 5 10 | 330 2 0",
    ),
    "potatoes": _calendar(
        "0 10 5 | 80 0 0 | 125 3 0 | 155 75 0 | 175 95 0 | 210 85 10 | 232 15 60 | 248 2 5 | 320 8 0",
    ),
    "flax": _calendar(
        "0 30 5 | 60 0 0 | 90 10 0 | 125 85 0 | 158 85 5 | 178 25 70 | 190 3 85 | 215 3 40 | 240 20 10 | 320 35 0",
        bloom=(160, 5, 0.25),
    ),
    "vineyard": _calendar("0 2 15 | 100 3 10 | 135 45 0 | 175 92 0 | 255 88 3 | 295 45 40 | 320 3 20"),
    "lavandin": _calendar("0 40 20 | 100 50 10 | 165 85 0 | 205 75 10 | 212 50 25 | 300 45 20", bloom=(185, 12, 0.7)),
}


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Parameters of one crop.

    Attributes:
        lpis: class name at level 3 of the LPIS scheme.
        calendar: key of ``CALENDARS``.
        leaf: material of the canopy (see ``spectra``).
        flower: material of the flowers.
        height: height at full cover, in metres.
        row_spacing: distance between visible rows, in metres; 0 without rows.
        open_rows: whether the ground shows between the rows (vines, trees); otherwise the canopy is closed.
        grass_alley: whether grass, not soil, grows between the rows.
        backscatter: (VV, VH) of the closed canopy, linear sigma0.
        delay_std: standard deviation of the delay of a parcel, in days.
    """

    lpis: str
    calendar: str
    leaf: str = "crop leaf"
    flower: str = "yellow flower"
    height: float = 0.8
    row_spacing: float = 0.0
    open_rows: bool = False
    grass_alley: bool = False
    backscatter: tuple[float, float] = (0.06, 0.012)
    delay_std: float = 4.0


CROPS: dict[str, Crop] = {
    crop.lpis: crop
    for crop in (
        Crop(lpis="winter-wheat", calendar="winter wheat", height=0.9, backscatter=(0.035, 0.008)),
        Crop(lpis="winter-barley", calendar="winter barley", height=1.0, backscatter=(0.032, 0.011)),
        Crop(lpis="triticale", calendar="triticale", height=1.2, backscatter=(0.035, 0.012)),
        Crop(lpis="winter-durum", calendar="winter durum", height=0.8, backscatter=(0.036, 0.008)),
        Crop(lpis="spring-barley", calendar="spring barley", height=0.8, backscatter=(0.034, 0.01)),
        Crop(lpis="rapeseed", calendar="rapeseed", height=1.4, backscatter=(0.11, 0.034)),
        Crop(lpis="spring-peas", calendar="spring peas", height=0.7, backscatter=(0.08, 0.018)),
        Crop(lpis="maize", calendar="maize", height=2.4, row_spacing=0.8, backscatter=(0.12, 0.028)),
        Crop(lpis="sorghum", calendar="sorghum", height=1.5, row_spacing=0.8, backscatter=(0.1, 0.02)),
        Crop(lpis="sunflower", calendar="sunflower", height=1.6, row_spacing=0.8, backscatter=(0.16, 0.034)),
        Crop(lpis="soy", calendar="soy", height=0.8, row_spacing=0.8, backscatter=(0.085, 0.014)),
        Crop(lpis="beetroots", calendar="beetroots", height=0.5, backscatter=(0.13, 0.022)),
        Crop(lpis="potatoes", calendar="potatoes", height=0.6, row_spacing=0.9, backscatter=(0.14, 0.025)),
        Crop(lpis="fiber-flax", calendar="flax", flower="violet flower", height=0.9, backscatter=(0.05, 0.015)),
        Crop(lpis="alfalfa", calendar="alfalfa", height=0.7, backscatter=(0.07, 0.013)),
        Crop(
            lpis="grasses-mix",
            calendar="meadow",
            leaf="grass leaf",
            height=0.3,
            backscatter=(0.07, 0.012),
            delay_std=10,
        ),
        Crop(
            lpis="grasses-mono", calendar="ley", leaf="grass leaf", height=0.4, backscatter=(0.065, 0.011), delay_std=6
        ),
        Crop(
            lpis="vineyard", calendar="vineyard", height=1.5, row_spacing=2.4, open_rows=True, backscatter=(0.08, 0.014)
        ),
        Crop(
            lpis="olive",
            calendar="evergreen",
            leaf="olive leaf",
            height=3.5,
            row_spacing=6.4,
            open_rows=True,
            backscatter=(0.11, 0.026),
        ),
        Crop(
            lpis="fruit-orchards",
            calendar="broadleaf",
            leaf="broad leaf",
            height=3.5,
            row_spacing=4.6,
            open_rows=True,
            grass_alley=True,
            backscatter=(0.11, 0.025),
        ),
        Crop(
            lpis="lavandin",
            calendar="lavandin",
            leaf="shrub leaf",
            flower="violet flower",
            height=0.6,
            row_spacing=1.8,
            open_rows=True,
            backscatter=(0.06, 0.011),
        ),
    )
}
