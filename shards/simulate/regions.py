"""Regions: types of French landscape that the simulator can draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Region:
    """Parameters of one type of landscape.

    Attributes:
        parcel_area: mean area of a parcel, in square metres.
        covers: weights of what covers a parcel: keys of ``COVERS``, or ``crops``, ``village``, ``industry`` or
            ``greenhouses``.
        crops: weights of the crops, keys of ``CROPS``.
        hedge_probability: probability that a parcel border is a hedge.
        roofs: weights of house roofs, keys of ``COVERS``.
        pool_probability: probability that a house has a pool.
        river_probability: probability that a river crosses a ROI.
        altitude: range of a ROI's mean altitude, in metres.
        relief: standard deviation of the terrain, in metres.
        soil: material of bare soil.
        delay: days by which the seasons are late.
        snow_probability: probability of snow on a winter day.
        cloudiness: mean cloud cover of a Sentinel-2 date, 0..1.
        haze: light that the air scatters into images, relative to a clear day.
        afternoon: mean hour angle of the sun in images, in radians after noon.
    """

    parcel_area: float
    covers: dict[str, float]
    crops: dict[str, float]
    hedge_probability: float
    roofs: dict[str, float]
    pool_probability: float
    river_probability: float
    altitude: tuple[float, float]
    relief: float
    soil: str
    delay: float
    snow_probability: float
    cloudiness: float
    haze: float = 1.0
    afternoon: float = 0.0


_CEREALS = {"winter-wheat": 4.0, "winter-barley": 3.0, "triticale": 2.0}

REGIONS: dict[str, Region] = {
    "bocage": Region(
        parcel_area=4200,
        covers={"crops": 6, "broadleaf": 1.2, "village": 2, "scrub": 0.5, "industry": 0.3, "conifer": 0.3, "pond": 0.2},
        crops={
            **_CEREALS,
            "maize": 4,
            "grasses-mix": 5,
            "grasses-mono": 3,
            "rapeseed": 1.5,
            "sunflower": 1,
            "soy": 0.7,
            "potatoes": 0.6,
            "alfalfa": 0.5,
        },
        hedge_probability=0.6,
        roofs={"slate roof": 3, "steel roof": 0.5, "bitumen roof": 0.4},
        pool_probability=0.15,
        river_probability=0.3,
        altitude=(30, 180),
        relief=6,
        soil="brown soil",
        delay=3,
        snow_probability=0.04,
        cloudiness=0.35,
    ),
    "openfield": Region(
        parcel_area=10000,
        covers={"crops": 8, "village": 1.5, "broadleaf": 0.6, "industry": 0.5, "bare": 0.2},
        crops={
            **_CEREALS,
            "spring-barley": 2,
            "rapeseed": 2.5,
            "beetroots": 2,
            "maize": 1.5,
            "alfalfa": 1,
            "spring-peas": 1,
            "fiber-flax": 1,
            "potatoes": 1,
            "sunflower": 2,
        },
        hedge_probability=0.06,
        roofs={"tile roof": 2, "slate roof": 1, "steel roof": 0.7},
        pool_probability=0.15,
        river_probability=0.1,
        altitude=(80, 220),
        relief=4,
        soil="chalk soil",
        delay=4,
        snow_probability=0.08,
        cloudiness=0.35,
    ),
    "vineyards": Region(
        parcel_area=4500,
        covers={
            "crops": 6,
            "scrub": 2,
            "conifer": 1,
            "village": 2.2,
            "broadleaf": 0.6,
            "bare": 0.7,
            "greenhouses": 0.5,
        },
        crops={
            "vineyard": 7,
            "olive": 1.5,
            "fruit-orchards": 1.5,
            "lavandin": 1.2,
            "winter-durum": 1.5,
            "sunflower": 1.2,
            "grasses-mix": 1,
        },
        hedge_probability=0.15,
        roofs={"tile roof": 4, "flat roof": 0.5},
        pool_probability=0.5,
        river_probability=0.15,
        altitude=(20, 250),
        relief=10,
        soil="red soil",
        delay=-10,
        snow_probability=0.01,
        cloudiness=0.2,
    ),
    "suburb": Region(
        parcel_area=5000,
        covers={
            "village": 5,
            "industry": 2.5,
            "lawn": 1,
            "broadleaf": 0.8,
            "crops": 1.5,
            "bare": 0.6,
            "greenhouses": 0.6,
            "pond": 0.2,
        },
        crops={
            "winter-wheat": 2,
            "maize": 2,
            "rapeseed": 1,
            "winter-barley": 1,
            "grasses-mix": 2,
            "sunflower": 1,
            "soy": 1,
            "fruit-orchards": 1,
            "potatoes": 1,
        },
        hedge_probability=0.2,
        roofs={"tile roof": 3, "slate roof": 2, "flat roof": 1, "bitumen roof": 1.5, "steel roof": 0.5},
        pool_probability=0.45,
        river_probability=0.2,
        altitude=(20, 160),
        relief=4,
        soil="brown soil",
        delay=0,
        snow_probability=0.04,
        cloudiness=0.3,
    ),
    "mountain": Region(
        parcel_area=6000,
        covers={
            "conifer": 3,
            "broadleaf": 1.2,
            "heath": 2,
            "scree": 1.6,
            "snow": 0.9,
            "scrub": 1.5,
            "crops": 1.2,
            "clear cut": 0.4,
            "village": 0.8,
            "pond": 0.15,
        },
        crops={"grasses-mix": 4, "grasses-mono": 1.5, "lavandin": 0.7, "triticale": 0.7, "alfalfa": 0.6},
        hedge_probability=0.12,
        roofs={"steel roof": 2, "slate roof": 2, "tile roof": 1},
        pool_probability=0.05,
        river_probability=0.35,
        altitude=(700, 1900),
        relief=30,
        soil="brown soil",
        delay=18,
        snow_probability=0.65,
        cloudiness=0.4,
    ),
    "hills": Region(
        parcel_area=6000,
        covers={
            "crops": 7,
            "broadleaf": 1.2,
            "village": 1.6,
            "scrub": 0.5,
            "greenhouses": 0.4,
            "industry": 0.3,
            "pond": 0.15,
        },
        crops={
            "sunflower": 4,
            "maize": 3,
            "soy": 3,
            "sorghum": 2,
            "winter-wheat": 3,
            "winter-durum": 1.5,
            "winter-barley": 1.5,
            "rapeseed": 1,
            "grasses-mix": 1.5,
            "alfalfa": 1,
            "vineyard": 0.7,
        },
        hedge_probability=0.18,
        roofs={"tile roof": 4, "flat roof": 0.3, "steel roof": 0.4},
        pool_probability=0.45,
        river_probability=0.2,
        altitude=(100, 300),
        relief=12,
        soil="brown soil",
        delay=-4,
        snow_probability=0.02,
        cloudiness=0.25,
    ),
}
"""Regions by name."""
