"""Maps of zones: equal to patches, without seams, over holes, from several pixels, killed, on two ranks, refused."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from tiny_task import AERIAL, COSIA, DEM, LPIS, S2, task

from bocage.finetune.predict import predict_patches
from bocage.finetune.task import Segmentation, save_segmentation
from bocage.finetune.zone import LEVELS, map_zone, plan_zone
from bocage.finetune.zone_rasters import ZoneRaster, open_rasters
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.flairhub import Catalogue
from bocage.shards.inputs import unclear_dates
from bocage.shards.patches import ShardPatches
from bocage.shards.writer import write_shards
from bocage.tools.main import main

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"
LEFT, TOP = 700_000.0, 6_600_000.0
NODATA = 255
COMMAND = [sys.executable, "-m", "bocage.tools.main", "map"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write(
    path: Path,
    values: np.ndarray,
    gsd: float,
    left: float = LEFT,
    top: float = TOP,
    crs: str | None = "EPSG:2154",
    nodata: float | None = None,
) -> Path:
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    profile |= {"crs": crs, "transform": Affine(gsd, 0, left, 0, -gsd, top), "nodata": nodata}
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
    return path


def ground(height: int, width: int) -> np.ndarray:
    """Blobs of many sizes in four bands, uint8."""
    random = np.random.default_rng(0)
    total = np.zeros((4, height, width))
    for cell in (8, 40, 160):
        coarse = random.normal(size=(4, height // cell + 2, width // cell + 2))
        total += coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]
    return np.clip(128 + 40 * total, 0, 255).astype(np.uint8)


def model(*names: str, **settings: Any) -> Segmentation:
    torch.set_num_threads(1)
    return task(*names, **settings).eval()


def saved(folder: Path, *names: str) -> Path:
    save_segmentation(model(*(names or (AERIAL,))), folder / "model")
    return folder


def dates_file(folder: Path, count: int) -> Path:
    path = folder / f"dates-{count}.txt"
    path.write_text("".join(f"2021-{month:02d}-15\n" for month in range(1, count + 1)))
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_a_zone_of_one_patch_is_what_predict_makes_of_it(tmp_path: Path) -> None:
    manifest = write_shards(Catalogue.open(REAL), tmp_path / "shards")
    chosen = model(AERIAL)
    predict_patches(chosen, ShardPatches(manifest), np.arange(1), tmp_path / "patches")
    row = manifest.row(0)
    domain, roi, cell = row["key"].split("_")
    image = REAL / f"{domain}_{AERIAL}" / roi / f"{domain}_{AERIAL}_{roi}_{cell}.tif"
    rasters, reference = open_rasters(chosen, {AERIAL: image}, {})
    paths = map_zone(chosen, rasters, plan_zone(chosen, reference, 12.8), tmp_path / "zone")
    with rasterio.open(paths[COSIA]) as zone, rasterio.open(tmp_path / "patches" / f"{row['key']}.tif") as patch:
        assert zone.transform.almost_equals(patch.transform, precision=1e-6)
        assert zone.crs == patch.crs
        assert np.array_equal(zone.read(1), patch.read(1))
        assert zone.colormap(1)[3] == patch.colormap(1)[3]
        assert zone.tags(1)["CLASS_3"] == "impervious"
        assert zone.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert zone.nodata == NODATA
    assert [path.name for path in (tmp_path / "zone").rglob("*.tif")] == [f"{COSIA}.tif"]


def plainly(chosen: Segmentation, image: np.ndarray, step: int) -> np.ndarray:
    """Probabilities of all windows blended in one array of the whole zone, (classes, H, W)."""
    height, width = image.shape[1:]
    overlap = 512 - step
    along = np.minimum(1, (np.minimum(np.arange(512), 511 - np.arange(512)) + 0.5) / overlap)
    weight = np.outer(along, along)
    total = np.zeros((20, height + 1024, width + 1024))
    padded = np.full((4, height + 1024, width + 1024), np.nan, np.float32)
    padded[:, :height, :width] = image

    def begins(length: int) -> list[int]:
        """Of windows: a step apart, the last one at the end."""
        return [min(at, max(0, length - 512)) for at in range(0, max(1, length - overlap), step)]

    for top in begins(height):
        for left in begins(width):
            batch = Batch(
                keys=["x"],
                rois=["x"],
                seeds=torch.zeros(1, dtype=torch.int64),
                windows=torch.tensor([[0.0, 0.0, 102.4]]),
                values={AERIAL: torch.from_numpy(padded[None, :, top : top + 512, left : left + 512].copy())},
                present={AERIAL: torch.tensor([True])},
                dates={},
                padding={},
            )
            with torch.no_grad():
                shares = chosen.logits(batch)[COSIA][0].softmax(dim=0).numpy()
            total[:19, top : top + 512, left : left + 512] += shares * weight
            total[19, top : top + 512, left : left + 512] += weight
    return (total[:19] / np.maximum(total[19], 1e-30))[:, :height, :width]


def test_tiles_show_no_seams(tmp_path: Path) -> None:
    # Some ten seconds: 3 x 3 windows, again and again.
    chosen = model(AERIAL)
    image = ground(1100, 1250)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "image.tif", image, 0.2)}, {})
    expected = plainly(chosen, image, 448)
    plan = plan_zone(chosen, reference, 12.8)
    maps = {}
    for across in (1, 2, 8):
        own = replace(plan, across=across)
        (path,) = map_zone(chosen, rasters, own, tmp_path / f"across-{across}", batch_size=1).values()
        maps[across] = read(path)
    assert np.array_equal(maps[1], maps[8])
    assert np.array_equal(maps[2], maps[8])
    assert (maps[8][0] == expected.argmax(axis=0)).mean() > 0.9999  # but for last digits
    (path,) = map_zone(chosen, rasters, plan, tmp_path / "shares", kind="probabilities", batch_size=1).values()
    with rasterio.open(path) as file:
        assert file.scales == (1 / LEVELS,) * 19
        assert file.descriptions[3] == "impervious"
        assert np.abs(file.read() / LEVELS - expected).max() < 0.5 / LEVELS + 1e-4


def test_where_there_are_no_data_there_is_no_map(tmp_path: Path) -> None:
    chosen = model(AERIAL, S2)
    image = ground(700, 700)
    image[:, :600, :650] = 0
    series = np.full((30, 4, 4), 1000, np.uint16)  # 40 m of the upper left corner
    files = {AERIAL: write(tmp_path / "a.tif", image, 0.2, nodata=0), S2: write(tmp_path / "s2.tif", series, 10.0)}
    rasters, reference = open_rasters(chosen, files, {S2: dates_file(tmp_path, 3)})
    plan = plan_zone(chosen, reference, 12.8)
    (found,) = read(map_zone(chosen, rasters, plan, tmp_path / "zone")[COSIA])
    nothing = found == NODATA
    assert not nothing[600:].any()
    assert not nothing[:, 650:].any()
    assert not nothing[:190, :190].any()
    assert nothing[250:590, 250:640].all()


def test_infrared_is_no_alpha_and_an_alpha_is(tmp_path: Path) -> None:
    image = np.full((5, 40, 40), 100, np.uint8)
    image[3, :20] = 0
    image[4] = 255
    image[4, :, 30:] = 0
    four, five = write(tmp_path / "four.tif", image[:4], 0.2), write(tmp_path / "five.tif", image, 0.2)
    with rasterio.open(five, "r+") as file:
        file.colorinterp = [
            *file.colorinterp[:3],
            rasterio.enums.ColorInterp.undefined,
            ColorInterp.alpha,
        ]
    with rasterio.open(four) as file:
        assert file.colorinterp[3] == ColorInterp.alpha  # what GDAL takes infrared for
    for left in (LEFT, LEFT + 0.1):  # on the pixels of the raster, and beside them
        found = ZoneRaster("X", four, 4, 0.2, None).read(left, TOP, 6.4)
        assert np.isfinite(found).all()
        assert (found[3, :19] == 0).all()
        assert (found[0] == 100).all()
        masked = ZoneRaster("X", five, 4, 0.2, None).read(left, TOP, 6.4)
        assert np.isfinite(masked[:, :, :29]).all()
        assert np.isnan(masked[:, :, 30:]).all()


@pytest.mark.parametrize("inside", [True, False])
def test_a_mask_beside_the_bands_tells_where_there_are_no_data(inside: bool, tmp_path: Path) -> None:
    image = np.full((4, 600, 600), 100, np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        path = write(tmp_path / "masked.tif", image, 0.2)
        mask = np.full((600, 600), 255, np.uint8)
        mask[:, 300:] = 0
        with rasterio.open(path, "r+") as file:
            file.write_mask(mask)
    assert (tmp_path / "masked.tif.msk").exists() != inside
    for left in (LEFT, LEFT + 0.1):  # on the pixels of the raster, and beside them
        found = ZoneRaster("X", path, 4, 0.2, None).read(left, TOP, 102.4)
        assert np.isfinite(found[:, :, :298]).all()
        assert (found[:, :, :298] == 100).all()
        assert np.isnan(found[:, :, 300:]).all()
        assert np.isnan(ZoneRaster("X", path, 4, 0.2, None).read(LEFT - 51.2, TOP, 102.4)[:, :, :255]).all()
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: path}, {})
    (found,) = read(map_zone(chosen, rasters, plan_zone(chosen, reference, 12.8), tmp_path / "zone")[COSIA])
    assert (found[:, 300:] == NODATA).all()
    assert not (found[:, :300] == NODATA).any()


def test_heights_that_no_ground_has_are_holes(tmp_path: Path) -> None:
    heights = np.full((2, 512, 512), 300.0, np.float32)
    heights[:, :, 256:] = -9999.0  # and the file does not say so
    chosen = model(DEM)
    rasters, reference = open_rasters(chosen, {DEM: write(tmp_path / "dem.tif", heights, 0.2)}, {})
    assert np.isnan(rasters[DEM].read(LEFT, TOP, 102.4)[:, :, 256:]).all()
    (found,) = read(map_zone(chosen, rasters, plan_zone(chosen, reference, 12.8), tmp_path / "zone")[COSIA])
    assert (found[:, 256:] == NODATA).all()
    assert not (found[:, :256] == NODATA).any()


def test_values_in_other_units_are_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reflectances where the model has learned from digital numbers, or larger numbers than bytes."""
    chosen = model(AERIAL)
    usual = np.array(chosen.model.encoder(AERIAL).spec.mean)
    for values, doubted in ((ground(300, 300).astype(np.float32) / 255, True), (ground(300, 300), False)):
        assert values.max() < usual.min() / 20 or not doubted
        path = write(tmp_path / f"{doubted}.tif", values, 0.2, crs=None)
        rasters, reference = open_rasters(chosen, {AERIAL: path}, {})
        map_zone(chosen, rasters, plan_zone(chosen, reference, 12.8), tmp_path / str(doubted))
        said = capsys.readouterr().err
        assert (said.count("are they in the same units?") == 1) == doubted
        assert f"{path} has no coordinate system, and the map will have none" in said
    large = write(tmp_path / "large.tif", np.full((4, 60, 60), 4000, np.uint16), 0.2)
    with pytest.raises(InputError, match=r"large.tif holds uint16, and models learn AERIAL_RGBI from uint8"):
        open_rasters(chosen, {AERIAL: large}, {})


def test_windows_end_with_the_zone(tmp_path: Path) -> None:
    """A window over the edge sees less ground than any that models learn from: relief is that of another mean."""
    chosen = model(AERIAL)
    _, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "image.tif", ground(520, 520), 0.2)}, {})
    plan = plan_zone(chosen, reference, 12.8)
    assert [plan.begin(number, 520) for number in plan.windows(0, 520, 520)] == [0, 8]
    assert [plan.begin(number, 300) for number in plan.windows(0, 300, 300)] == [0]
    for length in (512, 513, 960, 961, 3000):
        for start in range(0, length, 97):
            stop = min(length, start + 450)
            begins = [plan.begin(number, length) for number in plan.windows(start, stop, length)]
            every = [plan.begin(number, length) for number in plan.windows(0, length, length)]
            assert every[-1] + 512 == length
            assert begins == [at for at in every if at < stop and at + 512 > start]


def test_a_gap_of_one_date_is_no_gap_of_another(tmp_path: Path) -> None:
    series = np.full((20, 12, 12), 1000, np.int16)
    series[:10, :, 6:] = -9999
    path = write(tmp_path / "s2.tif", series, 10.0, nodata=-9999)
    found = ZoneRaster(S2, path, 10, 10.24, np.array([0, 30])).read(LEFT, TOP, 102.4)
    assert np.isnan(found[0, :, :, 7:]).all()
    assert (found[0, :, :, :5] == 1000).all()
    assert (found[1] == 1000).all()
    fine = np.full((4, 1100, 1100), 200, np.uint8)
    fine[1, 500:] = 0
    found = ZoneRaster("X", write(tmp_path / "fine.tif", fine, 0.1, nodata=0), 4, 0.2, None).read(LEFT, TOP, 102.4)
    assert np.isnan(found[1, 251:]).all()
    assert (found[[0, 2, 3]] == 200).all()


def test_clouds_count_at_the_border_and_where_zero_is_nodata(tmp_path: Path) -> None:
    clouds = np.zeros((4, 12, 12), np.uint8)
    clouds[:2] = 100  # the first of two dates
    days = np.array([0, 30])
    for nodata in (None, 0):
        path = write(tmp_path / f"clouds-{nodata}.tif", clouds, 10.24, nodata=nodata)
        raster = ZoneRaster("SENTINEL2_MSK-SC", path, 2, 10.24, days, counted=True)
        for left in (LEFT, LEFT + 51.2):  # inside, and beyond the border by a third
            values = torch.from_numpy(raster.read(left, TOP, 102.4))[None]
            assert unclear_dates(values, torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[True, False]]


@pytest.mark.parametrize(("gsd", "pixel"), [(0.2, 0.2), (0.2, 0.05), (0.2, 0.5), (1.6, 1.5), (10.24, 10.0)])
def test_an_edge_stays_where_it_is_whatever_the_pixel(gsd: float, pixel: float, tmp_path: Path) -> None:
    edge = 61.3  # metres to the right of a corner that lies beside the grid of the windows
    size = round(150 / pixel)
    centres = (np.arange(size) + 0.5) * pixel
    values = np.where(centres < edge, 0, 200).astype(np.uint8)[None, None].repeat(size, axis=1)
    path = write(tmp_path / "edge.tif", values, pixel, left=LEFT - 7.3, top=TOP + 7.3)
    found = ZoneRaster("X", path, 1, gsd, None).read(LEFT, TOP, 102.4)[0]
    assert found.shape == (round(102.4 / gsd),) * 2
    crossing = np.interp(100.0, found[len(found) // 2], (np.arange(len(found)) + 0.5) * gsd)
    assert abs(crossing - (edge - 7.3)) <= max(gsd, pixel) / 2 + 1e-6


def test_killed_and_resumed_it_is_the_same_file(tmp_path: Path) -> None:
    # Some twenty seconds: four processes, two tiles.
    run, raster = saved(tmp_path / "run"), write(tmp_path / "image.tif", ground(600, 3900), 0.2)

    def command(out: str) -> list[str]:
        return [*COMMAND, str(run), str(tmp_path / out), "--raster", f"{AERIAL}={raster}", "--batch-size", "2"]

    killed = subprocess.Popen(command("killed"), env=ENVIRONMENT)
    first = tmp_path / "killed" / "tiles" / "classes" / COSIA / "0_0.tif"
    while not first.exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / f"{COSIA}.tif").exists()
    made = first.stat().st_mtime_ns
    resumed = subprocess.Popen(command("killed"), env=ENVIRONMENT)
    times = set()
    while resumed.poll() is None:
        try:
            times.add(first.stat().st_mtime_ns)
        except FileNotFoundError:  # the map is whole
            break
        time.sleep(0.02)
    assert resumed.wait() == 0
    assert times == {made}
    subprocess.run(command("whole"), env=ENVIRONMENT, check=True)
    whole, other = (tmp_path / out / f"{COSIA}.tif" for out in ("whole", "killed"))
    assert whole.read_bytes() == other.read_bytes()
    assert read(whole).shape == (1, 600, 3900)
    finished = whole.stat().st_mtime_ns
    subprocess.run(command("whole"), env=ENVIRONMENT, check=True)
    assert whole.stat().st_mtime_ns == finished


@pytest.mark.slow  # Some twenty seconds: two ranks, and one.
def test_two_ranks_make_the_same_file_as_one(tmp_path: Path) -> None:
    run, raster = saved(tmp_path / "run"), write(tmp_path / "image.tif", ground(600, 3900), 0.2)
    words = ["--raster", f"{AERIAL}={raster}", "--batch-size", "2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND[1:]]
    for line, out in ((two, "two"), (COMMAND, "one")):
        subprocess.run([*line, str(run), str(tmp_path / out), *words], env=ENVIRONMENT, check=True)
    assert (tmp_path / "two" / f"{COSIA}.tif").read_bytes() == (tmp_path / "one" / f"{COSIA}.tif").read_bytes()


# Maps a zone in a process whose memory is limited, and says how much it took at most, in bytes.
LIMITED = """
import resource, sys
from bocage.tools.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
status = main(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


@pytest.mark.slow  # Some minutes: a zone of 32 km2 with islands of data, 12.8 GB of pixels.
def test_a_zone_eight_times_larger_than_memory(tmp_path: Path) -> None:
    side, limit = 28_288, 1_600_000_000
    profile = {"driver": "GTiff", "count": 4, "height": side, "width": side, "dtype": "float32", "nodata": 0}
    profile |= {"tiled": True, "sparse_ok": True, "bigtiff": "yes", "crs": "EPSG:2154"}
    raster = tmp_path / "zone.tif"
    with rasterio.open(raster, "w", transform=Affine(0.2, 0, LEFT, 0, -0.2, TOP), **profile) as file:
        for at in (1000, 12_000, 26_700):
            file.write(np.maximum(ground(1500, 1500), 1).astype(np.float32), window=((at, at + 1500), (at, at + 1500)))
    size = 4 * 4 * side * side
    assert size >= 8 * limit
    words = [str(saved(tmp_path / "run")), str(tmp_path / "out"), "--raster", f"{AERIAL}={raster}"]
    line = [sys.executable, "-c", LIMITED, str(limit), "map", *words]
    done = subprocess.run(line, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
    peak = int(done.stdout.decode().splitlines()[-1])
    print(f"peak memory {peak / 1e9:.2f} GB of a zone of {size / 1e9:.1f} GB")
    assert peak < limit
    with rasterio.open(tmp_path / "out" / f"{COSIA}.tif") as file:
        assert (file.height, file.width) == (side, side)
        assert (file.read(1, window=((12_000, 13_500), (12_000, 13_500))) != NODATA).all()
        assert (file.read(1, window=((18_000, 19_000), (18_000, 19_000))) == NODATA).all()


def test_several_labels_are_several_maps(tmp_path: Path) -> None:
    chosen = model(AERIAL, labels=(COSIA, LPIS))
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(300, 300), 0.2)}, {})
    paths = map_zone(chosen, rasters, plan_zone(chosen, reference, 0.0), tmp_path / "zone")
    assert {name: read(path).shape for name, path in paths.items()} == dict.fromkeys((COSIA, LPIS), (1, 300, 300))


def test_what_cannot_be_mapped_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, both = saved(tmp_path / "run"), saved(tmp_path / "both", AERIAL, S2)
    image = ground(60, 60)
    good = f"{AERIAL}={write(tmp_path / 'good.tif', image, 0.2)}"
    series = f"{S2}={tmp_path / 'good.tif'}"
    far = write(tmp_path / "utm.tif", np.ones((10, 9, 9), np.uint16), 10.0, crs="EPSG:32631")
    three = write(tmp_path / "three.tif", image[:3], 0.2)
    degrees = write(tmp_path / "degrees.tif", image, 1e-5, left=2.0, top=48.0, crs="EPSG:4326")
    feet = write(tmp_path / "feet.tif", image, 0.2, crs="EPSG:2263")
    away = write(tmp_path / "away.tif", np.ones((30, 9, 9), np.uint16), 10.0, left=LEFT + 200_000)
    mixed = write(tmp_path / "mixed.tif", np.concatenate([image, image[:1]]), 0.2)
    with rasterio.open(mixed, "r+") as file:
        file.colorinterp = [*file.colorinterp[:3], ColorInterp.alpha, ColorInterp.undefined]
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "bad.txt").write_text("2021-05-15\n15 May\n")
    dated = ["--dates", f"{S2}={dates_file(tmp_path, 3)}"]
    cases = [
        (run, [f"{AERIAL}={tmp_path / 'none.tif'}"], "none.tif: cannot be opened as a raster"),
        (run, [f"{AERIAL}={tmp_path / 'text.tif'}"], "text.tif: cannot be opened as a raster"),
        (run, [f"{AERIAL}={three}"], "three.tif has 3 bands; AERIAL_RGBI needs 4"),
        (run, [series], f"--raster {S2}: the model reads AERIAL_RGBI"),
        (run, [AERIAL], "expected MODALITY=VALUE, each modality once"),
        (run, [f"{AERIAL}={degrees}"], "degrees.tif is in EPSG:4326, not in metres"),
        (both, [good, series], f"--dates {S2}=FILE is missing"),
        (both, [good, series, *dated], "good.tif has 4 bands; SENTINEL2_TS needs 30 of 3 dates with 10 bands each"),
        (
            both,
            [good, series, "--dates", f"{S2}={tmp_path / 'bad.txt'}"],
            "bad.txt: '15' is not a date; one a line is expected",
        ),
        (both, [good, f"{S2}={far}", "--dates", f"{S2}={dates_file(tmp_path, 1)}"], "utm.tif is in EPSG:32631 and"),
        (both, [good, f"{S2}={away}", *dated], "away.tif and"),
        (run, [f"{AERIAL}={feet}"], "feet.tif is in EPSG:2263, not in metres"),
        (run, [f"{AERIAL}={mixed}"], "mixed.tif has 5 bands; AERIAL_RGBI needs 4"),
        (run, [good, "--overlap", "60"], "--overlap 60: it must be between 0 and 51.2 m"),
    ]
    for folder, words, sentence in cases:
        assert main(["map", str(folder), str(tmp_path / "out"), "--raster", *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main(["map", str(run), str(tmp_path / "out"), "--raster", good]) == 0
    assert main(["map", str(run), str(tmp_path / "out"), "--raster", good, "--overlap", "0"]) == 2
    assert "holds a map made otherwise (grid): choose another folder" in capsys.readouterr().err


def test_whatever_is_left_of_a_map_it_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(300, 300), 0.2)}, {})
    plan, out = plan_zone(chosen, reference, 0.0), tmp_path / "zone"
    done: list[int] = []

    def make() -> bytes:
        done.clear()
        (path,) = map_zone(chosen, rasters, plan, out, progress=lambda number, _: done.append(number)).values()
        return path.read_bytes()

    first = make()
    assert done == [1]
    assert not (out / "tiles" / "classes").exists()
    assert make() == first
    assert not done
    facts = out / "classes.json"
    facts.write_text(facts.read_text().replace('"finished": true', '"finished": false'))  # killed before it was said
    (out / "tiles" / "classes" / COSIA).mkdir(parents=True)
    write(out / "tiles" / "classes" / COSIA / "0_0.tif", read(out / f"{COSIA}.tif"), 0.2)
    assert make() == first
    assert not done
    facts.unlink()
    (out / f"{COSIA}.tif").write_bytes(b"another map")
    assert make() == first
    assert done == [1]
    facts.write_text("")
    with pytest.raises(InputError, match=r"classes.json is not a description of a map"):
        make()


# Holds a folder until its standard input is closed.
HOLDER = """
import sys
from pathlib import Path
from bocage.ssl.engine.resume import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_map_into_one_folder(tmp_path: Path) -> None:
    # Some five seconds: another process loads torch.
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(60, 60), 0.2)}, {})
    plan, out = plan_zone(chosen, reference, 0.0), tmp_path / "zone"
    out.mkdir()  # as the other process would
    line = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(line, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=r"zone"):
            map_zone(chosen, rasters, plan, out)
        holder.stdin.close()
    assert map_zone(chosen, rasters, plan, out)[COSIA].is_file()


def test_another_name_of_the_same_coordinate_system_is_taken(tmp_path: Path) -> None:
    renamed = rasterio.crs.CRS.from_epsg(2154).to_wkt().replace("RGF93 v1 / Lambert-93", "Lambert 93 of IGN")
    first = ZoneRaster(AERIAL, write(tmp_path / "one.tif", ground(60, 60), 0.2), 4, 0.2, None)
    second = ZoneRaster(AERIAL, write(tmp_path / "other.tif", ground(60, 60), 0.2, crs=renamed), 4, 0.2, None)
    second.check_crs(first)
    nothing = ZoneRaster(AERIAL, write(tmp_path / "none.tif", ground(60, 60), 0.2, crs=None), 4, 0.2, None)
    with pytest.raises(InputError, match=r"none.tif has no coordinate system"):
        nothing.check_crs(first)
