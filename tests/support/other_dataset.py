"""Shards of two datasets that are not FLAIR-HUB: roofs in small images, and crops in series of a single pixel."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
from small_tree import CORNER, raster_path, write_raster, write_table

from bocage.shards.classes import ClassScheme
from bocage.shards.dataset_info import DatasetInfo
from bocage.shards.format.manifest import DATASET_FILE, Manifest
from bocage.shards.modality import Band, Modality, Registry
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

RGB, THERMAL, ROOFS = "ORTHO_RGB", "THERMAL", "ROOFS"
OPTICAL, RADAR, TERRAIN, CROPS = "PIXEL_S2", "PIXEL_S1", "TERRAIN", "CROPS"
SPLIT = "split_blocks"
ROOF_INFO = DatasetInfo(name="Roofs", licence="CC-BY-4.0", attribution="Town hall", source="https://example.org/roofs")
CROP_INFO = DatasetInfo(name="Crops")

ROOF_SCHEME = ClassScheme(
    name="roof materials",
    classes=("background", "concrete", "tin", "unclear"),
    colours=("202020", "b0b0b0", "3060d0", "ff00ff"),
    unscored=(3,),
)
CROP_SCHEME = ClassScheme(
    name="crops",
    classes=("maize", "wheat", "grass", "no crop"),
    colours=("f0c000", "c08020", "30a030", "000000"),
    background=3,
)


def _optical(**wavelengths: float) -> tuple[Band, ...]:
    return tuple(Band(name=name, quantity="reflectance", wavelength=value) for name, value in wavelengths.items())


def _class_raster(name: str, scheme: ClassScheme, gsd: float, size: int) -> Modality:
    band = Band(name="class", quantity="class", scheme=scheme)
    return Modality(name=name, role="label", bands=(band,), dtype="uint8", gsd=gsd, size=size, codec="plain")


ROOF_REGISTRY = Registry(
    (
        Modality(
            name=RGB,
            role="image",
            bands=_optical(R=640.0, G=550.0, B=470.0),
            dtype="uint8",
            gsd=0.132,
            size=128,
            codec="colour",
            groups=(("R", "G", "B"),),
            unit=16,
        ),
        Modality(
            name=THERMAL,
            role="image",
            bands=(Band(name="temperature", quantity="other"),),
            dtype="uint16",
            gsd=0.264,
            size=64,
            codec="reflectance",
            groups=(("temperature",),),
            unit=8,
        ),
        _class_raster(ROOFS, ROOF_SCHEME, 0.132, 128),
    )
)
"""Patches of 16.896 m: an RGB image without near infrared, an image of one band, and labels with an unscored class."""

CROP_REGISTRY = Registry(
    (
        Modality(
            name=OPTICAL,
            role="series",
            bands=_optical(B2=490.0, B3=560.0, B4=665.0, B8=842.0, B11=1610.0),
            dtype="uint16",
            gsd=10.0,
            size=1,
            codec="reflectance",
            groups=(("B2", "B3", "B4"), ("B8",), ("B11",)),
            dates_table="PIXEL-S2",
        ),
        Modality(
            name=RADAR,
            role="series",
            bands=(Band(name="VV", quantity="backscatter_vv"), Band(name="VH", quantity="backscatter_vh")),
            dtype="float32",
            gsd=10.0,
            size=1,
            codec="float",
            representation="decibel",
            groups=(("VV",), ("VH",)),
            dates_table="PIXEL-S1",
        ),
        Modality(
            name=TERRAIN,
            role="image",
            bands=(Band(name="slope", quantity="other"), Band(name="height", quantity="terrain_height")),
            dtype="float32",
            gsd=10.0,
            size=1,
            codec="plain",
            groups=(("slope",), ("height",)),
        ),
        _class_raster(CROPS, CROP_SCHEME, 10.0, 1),
    )
)
"""Patches of one pixel of 10 m: an optical and a radar series, the terrain, and the crop of the pixel."""


def write_roofs(folder: Path, patches: int = 8, modalities: tuple[str, ...] = (RGB, THERMAL, ROOFS)) -> Manifest:
    """Write shards of roofs whose material decides their colour; the fourth patch lacks the image of one band."""
    registry, tree = ROOF_REGISTRY.subset(list(modalities)), folder / "tree"
    for index, key in enumerate(_keys(patches)):
        random = np.random.default_rng(index)
        cells = random.choice(4, (8, 8), p=(0.4, 0.3, 0.25, 0.05))
        for modality in registry.values():
            if modality.name == THERMAL and index == 3:
                continue
            size = modality.size
            classes = cells.repeat(size // 8, 0).repeat(size // 8, 1)
            if modality.role == "label":
                array = classes[None].astype(np.uint8)
            elif modality.name == RGB:
                colours = np.array([[60, 90, 40], [170, 170, 170], [60, 90, 200], [120, 120, 120]]).T
                array = (colours[:, classes] + random.normal(0, 8, (3, size, size))).clip(0, 255).astype(np.uint8)
            else:
                warmth = np.array([29_000, 30_500, 32_000, 30_000])[classes]
                array = (warmth + random.normal(0, 100, (1, size, size))).astype(np.uint16)
            corner = (CORNER[0] + modality.patch_size * index, CORNER[1])
            write_raster(raster_path(tree, modality, key), array, modality.gsd, corner)
    _write_splits(tree, patches)
    return _write(tree, registry, folder / "shards", patches, ROOF_INFO)


def write_crops(
    folder: Path, patches: int = 16, modalities: tuple[str, ...] = (OPTICAL, RADAR, TERRAIN, CROPS)
) -> Manifest:
    """Write shards of crops whose season of growth decides their series; the fourth patch lacks the radar series."""
    registry, tree = CROP_REGISTRY.subset(list(modalities)), folder / "tree"
    days: dict[str, list[list[int]]] = {item.name: [] for item in registry.by_role("series")}
    keys = _keys(patches)
    for index, key in enumerate(keys):
        random = np.random.default_rng(index)
        crop = (index + index // 4) % 4
        for modality in registry.values():
            array: np.ndarray
            if modality.role == "label":
                array = np.full((1, 1, 1), crop, np.uint8)
            elif modality.role == "image":
                array = np.array([random.gamma(2.0, 3.0), random.normal(150, 40)], np.float32).reshape(2, 1, 1)
            else:
                dates = np.sort(random.choice(np.arange(10, 350), 12 + index % 3, replace=False))
                days[modality.name].append(dates.tolist())
                peak = (200, 140, 100, 1000)[crop]
                green = np.exp(-(((dates - peak) / 40.0) ** 2))[:, None]
                if modality.name == OPTICAL:
                    soil, leaf = np.array([[900, 1100, 1400, 2200, 3000]]), np.array([[400, 800, 400, 4500, 1800]])
                    values = soil + green * (leaf - soil) + random.normal(0, 60, (len(dates), 5))
                else:
                    values = np.array([[0.06, 0.012]]) * (1 + 2 * green) * random.gamma(9.0, 1 / 9, (len(dates), 2))
                if modality.name == RADAR and index == 3:
                    continue
                array = values.reshape(-1, 1, 1).astype(modality.dtype)
            corner = (CORNER[0] + modality.patch_size * index, CORNER[1])
            write_raster(raster_path(tree, modality, key), array, modality.gsd, corner)
    for name, lists in days.items():
        texts = [_dates_text(dates) for dates in lists]
        path = tree / "GLOBAL_ALL_MTD" / f"GLOBAL_{registry[name].dates_table}_MTD_DATES.gpkg"
        write_table(path, {"patch_id": keys, "acquisition_dates": texts})
    _write_splits(tree, patches)
    return _write(tree, registry, folder / "shards", patches, CROP_INFO)


def _write(tree: Path, registry: Registry, out: Path, patches: int, info: DatasetInfo) -> Manifest:
    """Write the rasters as two shards of another dataset; their files are named like those of FLAIR-HUB."""
    path = write_shards(FlairHubCatalogue.open(tree, registry), out, samples_per_shard=max(1, patches // 2)).path
    description = json.loads((path / DATASET_FILE).read_text())
    (path / DATASET_FILE).write_text(json.dumps({**description, "dataset": info.to_json()}))
    return Manifest.open(path)


def _keys(patches: int) -> list[str]:
    """Keys of patches in regions of two patches each, of two domains."""
    return [f"D{1 + index % 2:03}-2021_R{index // 4}_0-{index}" for index in range(patches)]


def _dates_text(days: list[int]) -> str:
    first = datetime.date(2021, 1, 1)
    texts = {str(number): f"{first + datetime.timedelta(days=day):%Y%m%d}" for number, day in enumerate(days, start=1)}
    return json.dumps(texts)


def _write_splits(tree: Path, patches: int) -> None:
    """Half of the patches are for training, a quarter each for validation and for tests."""
    values = [("train", "valid", "train", "test")[index // 2 % 4] for index in range(patches)]
    path = tree / "GLOBAL_ALL_MTD" / "GLOBAL_ALL_MTD_SPLIT.gpkg"
    write_table(path, {"patch_id": _keys(patches), SPLIT: values})
