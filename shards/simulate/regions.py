"""Kinds of French country that the simulator draws landscapes of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Region:
    """The character of a kind of country.

    Attributes:
        parcel: area of a parcel, square metres.
        covers: weights of what fills a parcel: keys of ``COVERS``, ``crops`` or ``village``, ``works``, ``glass``.
        crops: weights of the crops of ``CROPS``.
        hedges: probability that a parcel border is a hedge.
        roofs: weights of house roofs.
        pools: probability that a house has one.
        rivers: probability that a river crosses a ROI.
        altitude: metres, range of the ROI's mean; ``relief``: metres, standard deviation of the terrain.
        soil: its material.
        delay: days by which seasons are late.
        winter: probability of snow on a winter day.
        cloudiness: mean cloud cover of a kept Sentinel-2 date.
    """

    parcel: float
    covers: dict[str, float]
    crops: dict[str, float]
    hedges: float
    roofs: dict[str, float]
    pools: float
    rivers: float
    altitude: tuple[float, float]
    relief: float
    soil: str
    delay: float
    winter: float
    cloudiness: float


_CEREALS = {"winter-wheat": 4.0, "winter-barley": 3.0, "triticale": 2.0}

REGIONS: dict[str, Region] = {
    "bocage": Region(
        parcel=4200,
        covers={"crops": 6, "broadleaf": 1.2, "village": 2, "scrub": 0.5, "works": 0.3, "conifer": 0.3, "pond": 0.2},
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
        hedges=0.6,
        roofs={"slate roof": 3, "steel roof": 0.5, "bitumen roof": 0.4},
        pools=0.15,
        rivers=0.3,
        altitude=(30, 180),
        relief=6,
        soil="brown soil",
        delay=3,
        winter=0.04,
        cloudiness=0.35,
    ),
    "openfield": Region(
        parcel=10000,
        covers={"crops": 8, "village": 1.5, "broadleaf": 0.6, "works": 0.5, "bare": 0.2},
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
        hedges=0.06,
        roofs={"tile roof": 2, "slate roof": 1, "steel roof": 0.7},
        pools=0.15,
        rivers=0.1,
        altitude=(80, 220),
        relief=4,
        soil="chalk soil",
        delay=4,
        winter=0.08,
        cloudiness=0.35,
    ),
    "vineyards": Region(
        parcel=4500,
        covers={"crops": 6, "scrub": 2, "conifer": 1, "village": 2.2, "broadleaf": 0.6, "bare": 0.7, "glass": 0.5},
        crops={
            "vineyard": 7,
            "olive": 1.5,
            "fruit-orchards": 1.5,
            "lavandin": 1.2,
            "winter-durum": 1.5,
            "sunflower": 1.2,
            "grasses-mix": 1,
        },
        hedges=0.15,
        roofs={"tile roof": 4, "flat roof": 0.5},
        pools=0.5,
        rivers=0.15,
        altitude=(20, 250),
        relief=10,
        soil="red soil",
        delay=-10,
        winter=0.01,
        cloudiness=0.2,
    ),
    "suburb": Region(
        parcel=5000,
        covers={
            "village": 5,
            "works": 2.5,
            "lawn": 1,
            "broadleaf": 0.8,
            "crops": 1.5,
            "bare": 0.6,
            "glass": 0.6,
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
        hedges=0.2,
        roofs={"tile roof": 3, "slate roof": 2, "flat roof": 1, "bitumen roof": 1.5, "steel roof": 0.5},
        pools=0.45,
        rivers=0.2,
        altitude=(20, 160),
        relief=4,
        soil="brown soil",
        delay=0,
        winter=0.04,
        cloudiness=0.3,
    ),
    "mountain": Region(
        parcel=6000,
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
        hedges=0.12,
        roofs={"steel roof": 2, "slate roof": 2, "tile roof": 1},
        pools=0.05,
        rivers=0.35,
        altitude=(700, 1900),
        relief=30,
        soil="brown soil",
        delay=18,
        winter=0.65,
        cloudiness=0.4,
    ),
    "hills": Region(
        parcel=6000,
        covers={"crops": 7, "broadleaf": 1.2, "village": 1.6, "scrub": 0.5, "glass": 0.4, "works": 0.3, "pond": 0.15},
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
        hedges=0.18,
        roofs={"tile roof": 4, "flat roof": 0.3, "steel roof": 0.4},
        pools=0.45,
        rivers=0.2,
        altitude=(100, 300),
        relief=12,
        soil="brown soil",
        delay=-4,
        winter=0.02,
        cloudiness=0.25,
    ),
}
"""Kinds of country by name."""
