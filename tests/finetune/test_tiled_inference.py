"""Tiled inference: agreement with patch prediction, seams, nodata, pixel sizes, resuming, two ranks, refused inputs."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from small_map import COMMAND, ENVIRONMENT, LEFT, NODATA, TOP, dates_file, ground, model, read, saved, write
from tiny_segmentation import AERIAL, COSIA, LPIS, S2

from bocage.finetune.evaluation.predict import predict_patches
from bocage.finetune.mapping.map_grid import plan_grid
from bocage.finetune.mapping.map_rasters import open_rasters
from bocage.finetune.mapping.tiled_inference import PROBABILITY_LEVELS, write_map
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.read.patches import ShardPatches
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"


def test_the_map_of_one_patch_equals_its_prediction(tmp_path: Path) -> None:
    manifest = write_shards(FlairHubCatalogue.open(REAL), tmp_path / "shards")
    chosen = model(AERIAL)
    predict_patches(chosen, ShardPatches(manifest), np.arange(1), tmp_path / "patches")
    row = manifest.row(0)
    domain, roi, cell = row["key"].split("_")
    image = REAL / f"{domain}_{AERIAL}" / roi / f"{domain}_{AERIAL}_{roi}_{cell}.tif"
    rasters, reference = open_rasters(chosen, {AERIAL: image}, {})
    paths = write_map(chosen, rasters, plan_grid(chosen, reference, 12.8), tmp_path / "map")
    with rasterio.open(paths[COSIA]) as whole, rasterio.open(tmp_path / "patches" / f"{row['key']}.tif") as patch:
        assert whole.transform.almost_equals(patch.transform, precision=1e-6)
        assert whole.crs == patch.crs
        assert np.array_equal(whole.read(1), patch.read(1))
        assert whole.colormap(1)[3] == patch.colormap(1)[3]
        assert whole.tags(1)["CLASS_3"] == "impervious"
        assert whole.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert whole.nodata == NODATA
    assert [path.name for path in (tmp_path / "map").rglob("*.tif")] == [f"{COSIA}.tif"]


def blended_in_memory(chosen: Segmentation, image: np.ndarray, stride: int) -> np.ndarray:
    """Reference: blend the probabilities of all windows in one array of the whole area, (classes, H, W)."""
    height, width = image.shape[1:]
    overlap = 512 - stride
    along = np.minimum(1, (np.minimum(np.arange(512), 511 - np.arange(512)) + 0.5) / overlap)
    weight = np.outer(along, along)
    total = np.zeros((20, height + 1024, width + 1024))
    padded = np.full((4, height + 1024, width + 1024), np.nan, np.float32)
    padded[:, :height, :width] = image

    def starts(length: int) -> list[int]:
        """Window starts: one stride apart, the last window ends with the axis."""
        return [min(at, max(0, length - 512)) for at in range(0, max(1, length - overlap), stride)]

    for top in starts(height):
        for left in starts(width):
            batch = Batch(
                keys=["x"],
                rois=["x"],
                seeds=torch.zeros(1, dtype=torch.int64),
                sample_ids=torch.zeros(1, dtype=torch.int64),
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


@pytest.mark.slow
def test_maps_have_no_seams_for_any_tile_size(tmp_path: Path) -> None:
    # Some ten seconds: 3 x 3 windows for each of four maps.
    chosen = model(AERIAL)
    image = ground(1100, 1250)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "image.tif", image, 0.2)}, {})
    expected = blended_in_memory(chosen, image, 448)
    plan = plan_grid(chosen, reference, 12.8)
    maps = {}
    for across in (1, 8):
        coarser = replace(plan, windows_per_tile=across)
        (path,) = write_map(chosen, rasters, coarser, tmp_path / f"across-{across}", batch_size=1).values()
        maps[across] = read(path)
    assert np.array_equal(maps[1], maps[8])
    assert (maps[8][0] == expected.argmax(axis=0)).mean() > 0.9999  # rounding may change single pixels
    (path,) = write_map(chosen, rasters, plan, tmp_path / "shares", kind="probabilities", batch_size=1).values()
    with rasterio.open(path) as file:
        assert file.scales == (1 / PROBABILITY_LEVELS,) * 19
        assert file.descriptions[3] == "impervious"
        assert np.abs(file.read() / PROBABILITY_LEVELS - expected).max() < 0.5 / PROBABILITY_LEVELS + 1e-4


def test_pixels_without_data_are_nodata(tmp_path: Path) -> None:
    chosen = model(AERIAL, S2)
    image = ground(700, 700)
    image[:, :600, :650] = 0
    series = np.full((30, 4, 4), 1000, np.uint16)  # 40 m of the upper left corner
    files = {AERIAL: write(tmp_path / "a.tif", image, 0.2, nodata=0), S2: write(tmp_path / "s2.tif", series, 10.0)}
    rasters, reference = open_rasters(chosen, files, {S2: dates_file(tmp_path, 3)})
    plan = plan_grid(chosen, reference, 12.8)
    (found,) = read(write_map(chosen, rasters, plan, tmp_path / "map")[COSIA])
    nothing = found == NODATA
    assert not nothing[600:].any()
    assert not nothing[:, 650:].any()
    assert not nothing[:190, :190].any()
    assert nothing[250:590, 250:640].all()


def test_windows_end_with_the_map(tmp_path: Path) -> None:
    """A window across the edge would contain less ground than training windows, e.g. with another mean elevation."""
    chosen = model(AERIAL)
    _, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "image.tif", ground(520, 520), 0.2)}, {})
    plan = plan_grid(chosen, reference, 12.8)
    assert [plan.window_start(number, 520) for number in plan.window_range(0, 520, 520)] == [0, 8]
    assert [plan.window_start(number, 300) for number in plan.window_range(0, 300, 300)] == [0]
    for length in (512, 513, 960, 961, 3000):
        for start in range(0, length, 97):
            stop = min(length, start + 450)
            starts = [plan.window_start(number, length) for number in plan.window_range(start, stop, length)]
            every = [plan.window_start(number, length) for number in plan.window_range(0, length, length)]
            assert every[-1] + 512 == length
            assert starts == [at for at in every if at < stop and at + 512 > start]


@pytest.mark.slow  # Some twenty seconds: the command is killed and started again.
def test_a_killed_and_resumed_map_is_the_same_file(tmp_path: Path) -> None:
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
def test_two_ranks_write_the_same_file_as_one(tmp_path: Path) -> None:
    run, raster = saved(tmp_path / "run"), write(tmp_path / "image.tif", ground(600, 3900), 0.2)
    words = ["--raster", f"{AERIAL}={raster}", "--batch-size", "2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND[1:]]
    for line, out in ((two, "two"), (COMMAND, "one")):
        subprocess.run([*line, str(run), str(tmp_path / out), *words], env=ENVIRONMENT, check=True)
    assert (tmp_path / "two" / f"{COSIA}.tif").read_bytes() == (tmp_path / "one" / f"{COSIA}.tif").read_bytes()


# Runs a command in a process with limited memory and prints its peak memory, in bytes. getrusage would not do: a new
# process inherits the peak of the process that started it.
LIMITED = """
import resource, sys
from bocage.tools.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
status = main(sys.argv[2:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
sys.exit(status)
"""


@pytest.mark.slow  # Some minutes: an area of 32 km2 with islands of data, 12.8 GB of pixels.
def test_an_area_eight_times_larger_than_memory(tmp_path: Path) -> None:
    side, limit = 28_288, 1_600_000_000
    profile = {"driver": "GTiff", "count": 4, "height": side, "width": side, "dtype": "float32", "nodata": 0}
    profile |= {"tiled": True, "sparse_ok": True, "bigtiff": "yes", "crs": "EPSG:2154"}
    raster = tmp_path / "area.tif"
    with rasterio.open(raster, "w", transform=Affine(0.2, 0, LEFT, 0, -0.2, TOP), **profile) as file:
        for at in (1000, 12_000, 26_700):
            file.write(np.maximum(ground(1500, 1500), 1).astype(np.float32), window=((at, at + 1500), (at, at + 1500)))
    size = 4 * 4 * side * side
    assert size >= 8 * limit
    words = [str(saved(tmp_path / "run")), str(tmp_path / "out"), "--raster", f"{AERIAL}={raster}"]
    line = [sys.executable, "-c", LIMITED, str(limit), "map", *words]
    done = subprocess.run(line, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
    peak = int(done.stdout.decode().splitlines()[-1])
    print(f"peak memory {peak / 1e9:.2f} GB for an area of {size / 1e9:.1f} GB")
    assert peak < limit
    with rasterio.open(tmp_path / "out" / f"{COSIA}.tif") as file:
        assert (file.height, file.width) == (side, side)
        assert (file.read(1, window=((12_000, 13_500), (12_000, 13_500))) != NODATA).all()
        assert (file.read(1, window=((18_000, 19_000), (18_000, 19_000))) == NODATA).all()


def test_each_label_has_its_map(tmp_path: Path) -> None:
    chosen = model(AERIAL, labels=(COSIA, LPIS))
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(300, 300), 0.2)}, {})
    paths = write_map(chosen, rasters, plan_grid(chosen, reference, 0.0), tmp_path / "map")
    assert {name: read(path).shape for name, path in paths.items()} == dict.fromkeys((COSIA, LPIS), (1, 300, 300))


def test_wrong_rasters_and_options_are_named_in_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, both = saved(tmp_path / "run"), saved(tmp_path / "both", AERIAL, S2)
    image = ground(60, 60)
    good = f"{AERIAL}={write(tmp_path / 'good.tif', image, 0.2)}"
    series = f"{S2}={tmp_path / 'good.tif'}"
    far = write(tmp_path / "utm.tif", np.ones((10, 9, 9), np.uint16), 10.0, crs="EPSG:32631")
    three = write(tmp_path / "three.tif", image[:3], 0.2)
    degrees = write(tmp_path / "degrees.tif", image, 1e-5, left=2.0, top=48.0, crs="EPSG:4326")
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
        (run, [f"{AERIAL}={three}"], "three.tif has 3 bands; AERIAL_RGBI needs 4: give a raster with all of them"),
        (run, [series], f"--raster {S2}: not an input of the model; its inputs are AERIAL_RGBI"),
        (run, [AERIAL], "expected MODALITY=VALUE, each modality once"),
        (run, [f"{AERIAL}={degrees}"], "degrees.tif: coordinates in degrees (EPSG:4326): reproject"),
        (both, [good, series], f"--dates {S2}=FILE is missing"),
        (both, [good, series, *dated], "good.tif has 4 bands; SENTINEL2_TS needs 30 (3 dates with 10 bands each)"),
        (
            both,
            [good, series, "--dates", f"{S2}={tmp_path / 'bad.txt'}"],
            "bad.txt: '15' is not a date; write one per line",
        ),
        (both, [good, f"{S2}={far}", "--dates", f"{S2}={dates_file(tmp_path, 1)}"], "utm.tif is in EPSG:32631 and"),
        (both, [good, f"{S2}={away}", *dated], "away.tif and"),
        (run, [f"{AERIAL}={mixed}"], "mixed.tif has 5 bands; AERIAL_RGBI needs 4: choose bands"),
        (run, [good, "--overlap", "60"], "--overlap 60 must be between 0 and 51.2 m"),
    ]
    for folder, words, sentence in cases:
        assert main(["map", str(folder), str(tmp_path / "out"), "--raster", *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main(["map", str(run), str(tmp_path / "out"), "--raster", good]) == 0
    assert main(["map", str(run), str(tmp_path / "out"), "--raster", good, "--overlap", "0"]) == 2
    assert "has a map with other settings or inputs (grid): choose another folder" in capsys.readouterr().err


def test_a_finished_map_is_not_computed_again_and_leftovers_are_handled(tmp_path: Path) -> None:
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(300, 300), 0.2)}, {})
    plan, out = plan_grid(chosen, reference, 0.0), tmp_path / "map"
    done: list[int] = []

    def make() -> bytes:
        done.clear()
        (path,) = write_map(chosen, rasters, plan, out, progress=lambda number, _: done.append(number)).values()
        return path.read_bytes()

    first = make()
    assert done == [1]
    assert not (out / "tiles" / "classes").exists()
    assert make() == first
    assert not done
    description = out / "classes.json"
    # As if the process had been killed before it updated the description.
    description.write_text(description.read_text().replace('"finished": true', '"finished": false'))
    (out / "tiles" / "classes" / COSIA).mkdir(parents=True)
    write(out / "tiles" / "classes" / COSIA / "0_0.tif", read(out / f"{COSIA}.tif"), 0.2)
    assert make() == first
    assert not done
    description.unlink()
    (out / f"{COSIA}.tif").write_bytes(b"another map")
    assert make() == first
    assert done == [1]
    description.write_text("")
    with pytest.raises(InputError, match=r"classes.json is not a description of a map"):
        make()


# Locks a folder until its standard input is closed.
HOLDER = """
import sys
from pathlib import Path
from bocage.ssl.engine.parallel.distributed import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_write_to_one_folder(tmp_path: Path) -> None:
    # Some five seconds: another process loads torch.
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: write(tmp_path / "a.tif", ground(60, 60), 0.2)}, {})
    plan, out = plan_grid(chosen, reference, 0.0), tmp_path / "map"
    out.mkdir()  # as the other process would
    line = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(line, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=r"map"):
            write_map(chosen, rasters, plan, out)
        holder.stdin.close()
    assert write_map(chosen, rasters, plan, out)[COSIA].is_file()
