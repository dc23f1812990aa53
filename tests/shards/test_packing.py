import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tree import CORNER, raster_path, write_raster, write_tree

from bocage.shards.format.codec import decode, with_lossy_dem
from bocage.shards.format.shard_files import member_name
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.catalogue import Patch
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.source.raster import RasterError
from bocage.shards.write.packing import encode_patch

KEY = "D001-2021_AA-S1-1_0-0"


def first_patch(root: Path) -> Patch:
    return FlairHubCatalogue.open(root).patch(0)


def rewrite(root: Path, name: str, bands: np.ndarray, corner: tuple[float, float] = CORNER) -> Path:
    path = raster_path(root, FLAIR_HUB[name], KEY)
    write_raster(path, bands, FLAIR_HUB[name].gsd, corner)
    return path


@pytest.mark.parametrize(
    ("name", "shift"), [("SPOT_RGBI", (0.9, 0)), ("SENTINEL2_TS", (0, -5.3)), ("DEM_ELEV", (102.4, 0))]
)
def test_corners_of_one_patch_agree_to_half_a_pixel(tmp_path: Path, name: str, shift: tuple[float, float]) -> None:
    write_tree(tmp_path, [KEY], ["AERIAL_RGBI", name], dates=2)
    modality = FLAIR_HUB[name]
    count = len(modality.bands) * (2 if modality.has_time_axis else 1)
    bands = np.ones((count, modality.size, modality.size), modality.dtype)
    near = (CORNER[0] + shift[0] / 1.2, CORNER[1] + shift[1] / 1.2)
    if name != "DEM_ELEV":
        rewrite(tmp_path, name, bands, near)
        assert encode_patch(first_patch(tmp_path), FLAIR_HUB).row["left"] == CORNER[0]
    path = rewrite(tmp_path, name, bands, (CORNER[0] + shift[0], CORNER[1] + shift[1]))
    with pytest.raises(RasterError, match="corners lie up to") as error:
        encode_patch(first_patch(tmp_path), FLAIR_HUB)
    assert str(path) in str(error.value)
    assert str(raster_path(tmp_path, FLAIR_HUB["AERIAL_RGBI"], KEY)) in str(error.value)


def test_a_missing_raster_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, [KEY], ["SPOT_RGBI", "AERIAL-RLT_PAN"])
    patch = first_patch(tmp_path)
    path = raster_path(tmp_path, FLAIR_HUB["SPOT_RGBI"], KEY)
    path.unlink()
    with pytest.raises(RasterError, match="No such file") as error:
        encode_patch(patch, FLAIR_HUB)
    assert str(path) in str(error.value)


def test_statistics_match_the_stored_values(tmp_path: Path) -> None:
    write_tree(tmp_path, [KEY], ["DEM_ELEV"], metadata=False)
    heights = np.random.default_rng(2).normal(150, 3, (2, 512, 512)).astype(np.float32)
    heights[1] = heights[0] - 2
    heights[0, :2] = np.nan
    heights[1, 5, 5:9] = [-9999, np.inf, -np.inf, -3.4e38]
    rewrite(tmp_path, "DEM_ELEV", heights)
    for registry, error in ((FLAIR_HUB, 0.0), (with_lossy_dem(FLAIR_HUB), 2**-8)):
        encoded = encode_patch(first_patch(tmp_path), registry)
        stored = decode(encoded.members[member_name(KEY, "DEM_ELEV")])
        valid = np.abs(heights) < 9000
        assert stored[~valid].tobytes() == heights[~valid].tobytes()
        assert (error / 2 if error else 0) <= np.abs(stored[valid] - heights[valid]).max() <= error
        height = (stored[0] - stored[1])[valid.all(axis=0)].astype(np.float64)
        stats = encoded.stats["DEM_ELEV"]
        assert stats.count.tolist() == [valid[0].sum(), len(height)]
        assert np.allclose([stats.mean[1], stats.std[1]], [height.mean(), height.std()], rtol=1e-12)
        assert encoded.row["mean.DEM_ELEV"] is stats.mean


def test_a_channel_without_valid_values_is_encoded(tmp_path: Path) -> None:
    write_tree(tmp_path, [KEY], ["DEM_ELEV"], metadata=False)
    heights = np.full((2, 512, 512), np.nan, np.float32)
    heights[0] = 100
    rewrite(tmp_path, "DEM_ELEV", heights)
    encoded = encode_patch(first_patch(tmp_path), FLAIR_HUB)
    assert decode(encoded.members[member_name(KEY, "DEM_ELEV")]).tobytes() == heights.tobytes()
    assert encoded.stats["DEM_ELEV"].count.tolist() == [512 * 512, 0]
    assert np.isnan(encoded.row["mean.DEM_ELEV"][1])


# BLAS would give sums that depend on the number of threads.
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    write_tree(tmp_path, [KEY], ["AERIAL_RGBI", "DEM_ELEV", "SENTINEL1-ASC_TS"])
    code = (
        "import hashlib, json, sys\n"
        "from bocage.shards.source.flair_hub.tree import FlairHubCatalogue\n"
        "from bocage.shards.write.packing import encode_patch\n"
        "catalogue = FlairHubCatalogue.open(sys.argv[1])\n"
        "encoded = encode_patch(catalogue.patch(0), catalogue.registry)\n"
        "print(json.dumps({name: item.to_json() for name, item in encoded.stats.items()}))\n"
        "print(hashlib.sha256(b''.join(encoded.members.values())).hexdigest())\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "7")
    ]
    assert printed[0].count("mean") == 3
    assert printed[0] == printed[1] == printed[2]


def test_the_json_member_describes_the_other_members(tmp_path: Path) -> None:
    write_tree(tmp_path, [KEY], ["SENTINEL2_TS", "SPOT_RGBI", "ALL_LABEL-LPIS"], dates=2)
    encoded = encode_patch(first_patch(tmp_path), FLAIR_HUB)
    description = json.loads(encoded.members[f"{KEY}.json"])
    assert list(encoded.members) == [*description["members"], f"{KEY}.json"]
    for member, info in description["members"].items():
        array = decode(encoded.members[member])
        assert (str(array.dtype), list(array.shape)) == (info["dtype"], info["shape"])
        assert encoded.row[f"length.{info['modality']}"] == len(encoded.members[member])
    labels = decode(encoded.members[member_name(KEY, "ALL_LABEL-LPIS")])
    for band, values in zip(FLAIR_HUB["ALL_LABEL-LPIS"].bands, labels):
        assert band.scheme is not None
        counts = [int((values == index).sum()) for index in range(len(band.scheme))]
        assert encoded.row[f"histogram.ALL_LABEL-LPIS.{band.name}"].tolist() == counts
