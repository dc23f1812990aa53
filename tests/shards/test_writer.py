import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from small_tree import raster_path, series_date, write_raster, write_tree

from bocage.shards import rasters
from bocage.shards.codec import decode
from bocage.shards.errors import InputError
from bocage.shards.flairhub import Catalogue
from bocage.shards.inputs import wanted_modalities
from bocage.shards.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.moments import Moments, merge
from bocage.shards.normalize import represent
from bocage.shards.stream import evaluation_batches
from bocage.shards.writer import write_shards
from bocage.tools.main import main

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"
KEYS = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(2) for column in range(3)]
SMALL = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patches with all ten rasters; the last lacks two of them."""
    root = write_tree(tmp_path_factory.mktemp("tree"), KEYS[:4])
    for name in ("DEM_ELEV", "SENTINEL1-DESC_TS"):
        raster_path(root, FLAIR_HUB[name], KEYS[3]).unlink()
    return root


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(Catalogue.open(tree), tmp_path_factory.mktemp("shards") / "out", samples_per_shard=3)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def small(tmp_path: Path, patches: int = 6) -> Catalogue:
    return Catalogue.open(write_tree(tmp_path / "tree", KEYS[:patches], SMALL))


def test_every_raster_comes_back_by_offset(tree: Path, shards: Manifest) -> None:
    catalogue = Catalogue.open(tree)
    patches = {patch.key: patch for patch in map(catalogue.patch, range(len(catalogue)))}
    assert len(shards) == 4
    for index in range(len(shards)):
        row = shards.row(index)
        data = shards.shard_path(row["shard"]).read_bytes()
        patch = patches.pop(row["key"])
        assert (row["roi"], row["domain"], row["crs"]) == (patch.roi, patch.domain, "EPSG:2154")
        assert (row["left"], row["top"]) == (650_000 + 102.4 * int(patch.key[-1]), 6_860_000)
        assert row["split_1"] == patch.splits["split_1"]
        for name, modality in shards.registry.items():
            offset, length = row[f"offset.{name}"], row[f"length.{name}"]
            assert (length > 0) == (name in patch.sources)
            if length:
                raster = rasters.read(patch.sources[name], modality)
                array = decode(data[offset : offset + length])
                assert array.dtype == raster.array.dtype
                assert np.array_equal(array, raster.array)
            elif modality.is_input:
                assert row[f"mean.{name}"] is None
        assert row["dates.SENTINEL1-ASC_TS"] == [series_date(number).toordinal() - 719_163 for number in (1, 2, 3)]
        assert len(row["dates.AERIAL_RGBI"]) == 1
        assert "dates.DEM_ELEV" not in row
        assert "dates.AERIAL_LABEL-COSIA" not in row
    assert not patches


def test_values_in_the_manifest_are_those_of_the_rasters(tree: Path, shards: Manifest) -> None:
    labels, heights = [], []
    catalogue = Catalogue.open(tree)
    for index in range(4):
        row = shards.row(index)
        patch = next(patch for patch in map(catalogue.patch, range(4)) if patch.key == row["key"])
        label = rasters.read(patch.sources["ALL_LABEL-LPIS"], FLAIR_HUB["ALL_LABEL-LPIS"]).array
        for band, (level, scheme) in enumerate(zip((1, 2, 3), FLAIR_HUB["ALL_LABEL-LPIS"].schemes)):
            histogram = row[f"histogram.ALL_LABEL-LPIS.level-{level}"]
            assert histogram == [int((label[band] == value).sum()) for value in range(len(scheme))]
        labels.append(sum(histogram))
        if "DEM_ELEV" in patch.sources:
            dem = rasters.read(patch.sources["DEM_ELEV"], FLAIR_HUB["DEM_ELEV"]).array.astype(np.float64)
            relief = np.stack((dem[0] - dem[0].mean(), dem[0] - dem[1]))
            heights.append(relief)
            assert np.allclose(row["mean.DEM_ELEV"], relief.mean((1, 2)), atol=1e-4)
            assert np.allclose(row["minimum.DEM_ELEV"], relief.min((1, 2)), atol=1e-4)
            assert np.allclose(row["maximum.DEM_ELEV"], relief.max((1, 2)), atol=1e-4)
    assert labels == [512 * 512] * 4
    every = np.stack(heights)
    mean, std = shards.statistics["DEM_ELEV"]
    assert np.allclose(mean, every.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(std, every.std((0, 2, 3)), rtol=1e-5)


def test_stock_webdataset_reads_the_shards(shards: Manifest) -> None:
    paths = [str(shards.shard_path(index)) for index in range(shards.shard_count)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == shards.column("key").to_pylist()
    for sample in samples:
        fields = {name for name in sample if not name.startswith("__")}
        expected = {name.lower() + ".bin" for name in shards.registry} | {"json"}
        assert fields <= expected
        assert len(expected - fields) == (2 if sample["__key__"] == KEYS[3] else 0)
        assert decode(sample["aerial_rgbi.bin"]).shape == (4, 512, 512)
        assert sample["json"]["key"] == sample["__key__"]
        assert sample["json"]["dates"]["SENTINEL2_TS"] == [str(series_date(number)) for number in (1, 2, 3)]
        listed = {name.split(".", 1)[1].lower() for name in sample["json"]["members"]}
        assert listed | {"json"} == fields


def test_tar_is_plain_and_in_the_documented_order(shards: Manifest) -> None:
    for index in range(shards.shard_count):
        path = shards.shard_path(index)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shards.shards[index].sha256
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert all(member.isreg() and member.mtime == 0 and member.uid == 0 for member in members)
        keys = [member.name.split(".")[0] for member in members]
        assert sorted(set(keys), key=keys.index) == [key for key, _ in _grouped(keys)]
        first = [member.name.split(".", 1)[1] for member in members if member.name.startswith(keys[0])]
        order = [*FLAIR_HUB.inputs, *FLAIR_HUB.by_role("mask"), *FLAIR_HUB.labels]
        documented = [f"{modality.name}.bin" for modality in order] + ["json"]
        assert first == [name for name in documented if name in first]


def _grouped(keys: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for key in keys:
        if runs and runs[-1][0] == key:
            runs[-1] = (key, runs[-1][1] + 1)
        else:
            runs.append((key, 1))
    return runs


# Two spawned processes import torch and rasterio: several seconds.
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    seen: list[tuple[int, int, int]] = []
    write_shards(catalogue, tmp_path / "one", samples_per_shard=2, progress=lambda *counts: seen.append(counts))
    write_shards(catalogue, tmp_path / "two", samples_per_shard=2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (seen[0][:2], seen[-1][:2]) == ((0, 6), (6, 6))
    assert seen == sorted(seen)


def test_order(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    orders = {
        name: write_shards(catalogue, tmp_path / name, samples_per_shard=4, **options).column("key").to_pylist()
        for name, options in {
            "roi": {"order": "roi"},
            "first": {"seed": 1},
            "again": {"seed": 1},
            "second": {"seed": 2},
        }.items()
    }
    assert orders["roi"] == catalogue.keys()
    assert orders["first"] == orders["again"] != orders["second"] != orders["roi"]
    assert sorted(orders["first"]) == sorted(orders["second"]) == sorted(catalogue.keys())


class _KilledError(Exception):
    pass


def test_interrupted_run_keeps_whole_shards_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2)

    def stop_at(patches: int) -> None:
        def progress(done: int, total: int, written: int) -> None:
            if done == patches:
                raise _KilledError

        with pytest.raises(_KilledError):
            write_shards(catalogue, tmp_path / "out", samples_per_shard=2, progress=progress)

    stop_at(3)
    assert [path.name for path in (tmp_path / "out").glob("shard*")] == ["shard-000000.tar"]
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(tmp_path / "out")
    first = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"half of it")  # a tar whose part was never written
    (tmp_path / "out" / "shard-000002.tar.tmp").write_bytes(b"rubbish")
    stop_at(5)
    write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first
    assert not (tmp_path / "out" / "parts").exists()


# Python, torch and rasterio are imported by four processes: several seconds.
def test_killed_process_leaves_nothing_half_done(tmp_path: Path) -> None:
    catalogue = Catalogue.open(write_tree(tmp_path / "tree", KEYS, ["AERIAL_RGBI", "DEM_ELEV"]))
    write_shards(catalogue, tmp_path / "whole", shard_bytes=1)
    script = (
        "import sys; from bocage.shards import writer; from bocage.shards.flairhub import Catalogue\n"
        "if __name__ == '__main__':\n"
        "    print('ready', flush=True)\n"
        "    writer.write_shards(Catalogue.open(sys.argv[1]), sys.argv[2], shard_bytes=1)\n"
    )
    for delay in (0.1, 0.25):
        command = [sys.executable, "-c", script, str(tmp_path / "tree"), str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    write_shards(catalogue, tmp_path / "out", shard_bytes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    catalogue = small(tmp_path, patches=2)
    write_shards(catalogue, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(write_shards(catalogue, tmp_path / "out", workers=2)) == 2
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_other_plans_and_strangers_are_refused(tmp_path: Path) -> None:
    catalogue = small(tmp_path, patches=2)
    write_shards(catalogue, tmp_path / "out")
    with pytest.raises(InputError, match="seed"):
        write_shards(catalogue, tmp_path / "out", seed=5)
    with pytest.raises(InputError, match="the patches or modalities"):
        write_shards(Catalogue.open(tmp_path / "tree", modalities=["SPOT_RGBI"]), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="new or empty"):
        write_shards(catalogue, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_unreadable_patch_is_named_left_out_and_tolerated_once(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    broken = [raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], key) for key in KEYS]
    broken[2].write_bytes(broken[2].read_bytes()[:900])
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert len(manifest) == 5
    assert list(manifest.skipped) == [KEYS[2]]
    assert str(broken[2]) in manifest.skipped[KEYS[2]]
    with pytest.raises(InputError, match=r"1 patches cannot be read where 0 are tolerated.*_0-2\.tif"):
        write_shards(catalogue, tmp_path / "strict", samples_per_shard=2, max_bad=0)


def test_too_many_unreadable_patches_end_the_run_until_they_are_repaired(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=1)
    broken = {path: path.read_bytes() for path in (tmp_path / "tree").glob("*SPOT_RGBI/*/*.tif")}
    for path in list(broken)[:3]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="2 patches cannot be read where 1 are tolerated"):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=1)
    for path, data in broken.items():
        path.write_bytes(data)
    write_shards(catalogue, tmp_path / "out", samples_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# The patch that is broken stands in a shard that is finished when the run is broken off.
def test_repaired_patches_enter_when_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2, order="roi")
    path = raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0])
    data = path.read_bytes()
    path.write_bytes(b"")

    def stop(done: int, total: int, written: int) -> None:
        if done == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi", progress=stop)
    path.write_bytes(data)
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    assert (len(manifest), manifest.skipped) == (6, {})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_broken_shard_ends_the_run_and_the_first_may_be_repaired(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    broken = {raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[index]): b"" for index in (0, 2, 3)}
    for path in broken:
        broken[path] = path.read_bytes()
        path.write_bytes(b"")
    # Two in one shard: the tolerance ends the run inside it, after the first shard was finished with a gap.
    with pytest.raises(InputError, match="2 patches cannot be read where 1 are tolerated"):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    for path, data in broken.items():
        path.write_bytes(data)
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    assert (len(manifest), manifest.skipped) == (6, {})


# Statistics come from large rasters: torch splits only these among its threads. Two processes start.
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", KEYS[:2], ["AERIAL_RGBI", "DEM_ELEV", "SENTINEL1-ASC_TS"], dates=40)
    catalogue = Catalogue.open(tree)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            write_shards(catalogue, tmp_path / f"threads{threads}", samples_per_shard=1)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    write_shards(catalogue, tmp_path / "workers", samples_per_shard=1, workers=2)
    assert contents(tmp_path / "threads1") == contents(tmp_path / "threads2") == contents(tmp_path / "workers")


def test_an_infinite_pixel_does_not_disable_its_sensor(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:1], ["DEM_ELEV"])
    bands = np.full((2, 512, 512), 100.0, np.float32)
    bands[0, 5, 5] = np.inf
    write_raster(raster_path(root, FLAIR_HUB["DEM_ELEV"], KEYS[0]), bands, 0.2)
    manifest = write_shards(Catalogue.open(root), tmp_path / "out")
    assert manifest.input_spec("DEM_ELEV").mean == (0.0, 0.0)
    assert manifest.row(0)["maximum.DEM_ELEV"] == [0.0, 0.0]


def test_a_patch_with_a_mask_and_no_series_can_be_read(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:2], SMALL)
    raster_path(root, FLAIR_HUB["SENTINEL2_TS"], KEYS[0]).unlink()
    manifest = write_shards(Catalogue.open(root), tmp_path / "out")
    modalities = wanted_modalities(manifest.registry, ["SPOT_RGBI", "SENTINEL2_TS"], [])
    (batch,) = evaluation_batches(manifest, np.arange(2), modalities, batch_size=2)
    for name in ("SENTINEL2_TS", "SENTINEL2_MSK-SC"):
        assert dict(zip(batch.keys, batch.present[name].tolist())) == {KEYS[0]: False, KEYS[1]: True}


def test_dates_must_be_as_many_as_the_raster_holds(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:1], SMALL, dates=3)
    other = write_tree(tmp_path / "other", KEYS[:1], SMALL, dates=4)
    path = raster_path(root, FLAIR_HUB["SENTINEL2_TS"], KEYS[0])
    path.write_bytes(raster_path(other, FLAIR_HUB["SENTINEL2_TS"], KEYS[0]).read_bytes())
    with pytest.raises(InputError, match="4 dates in the file, 3 in the metadata"):
        write_shards(Catalogue.open(root), tmp_path / "out", max_bad=0)


def test_small_dataset_gets_several_shards(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(5) for column in range(8)]
    catalogue = Catalogue.open(write_tree(tmp_path / "tree", keys, ["SPOT_RGBI"]))
    assert [shard.samples for shard in write_shards(catalogue, tmp_path / "out").shards] == [16, 16, 8]
    tiny = write_shards(catalogue, tmp_path / "tiny", shard_bytes=100_000)
    assert tiny.shard_count > 3
    assert max(shard.bytes for shard in tiny.shards) < 150_000


def test_no_place_left_is_one_sentence(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        write_shards(catalogue, tmp_path / "file" / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written: File too large; .* resumes"):
            write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.tmp"))
    write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_modality_that_the_registry_learns_is_written_like_the_others(tmp_path: Path) -> None:
    thermal = dataclasses.replace(FLAIR_HUB["SPOT_RGBI"], name="THERMAL-X")
    registry = FLAIR_HUB.with_modality(thermal)
    root = write_tree(tmp_path / "tree", KEYS[:2], ["SPOT_RGBI"])
    for key in KEYS[:2]:
        path = raster_path(root, thermal, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raster_path(root, FLAIR_HUB["SPOT_RGBI"], key).read_bytes())
    manifest = write_shards(Catalogue.open(root, registry), tmp_path / "out")
    assert list(manifest.registry) == ["SPOT_RGBI", "THERMAL-X"]
    assert manifest.registry["THERMAL-X"] == thermal
    assert manifest.statistics["THERMAL-X"] == manifest.statistics["SPOT_RGBI"]


def test_moments_merge_to_those_of_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn((3, 2, size, 7), generator=generator) * 50 + 1e4 for size in (1, 5, 9)]
    chunks[1][:, 0, :2] = torch.nan
    empty = torch.full((1, 2, 2, 2), torch.nan)
    total = merge(Moments.of(represent(chunk.numpy(), "linear")) for chunk in (empty, *chunks, empty))
    assert total is not None
    for channel in range(2):
        values = np.concatenate([chunk[:, channel].double().numpy().ravel() for chunk in chunks])
        values = values[~np.isnan(values)]
        found = (total.count, total.mean, total.std, total.minimum, total.maximum)
        expected = (len(values), values.mean(), values.std(), values.min(), values.max())
        assert np.allclose([item[channel] for item in found], expected, rtol=1e-12)
    assert json.loads(json.dumps(total.to_json())) == Moments.from_json(total.to_json()).to_json()


def test_command_shards_the_real_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(REAL), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "patches" in printed
    assert "DEM_ELEV" in printed
    manifest = Manifest.open(tmp_path / "out")
    assert len(manifest) == 3
    assert list(manifest.registry) == ["AERIAL_RGBI", "AERIAL_LABEL-COSIA"]
    assert manifest.row(0)["dates.AERIAL_RGBI"] is None
    assert main(["shard", str(tmp_path), str(tmp_path / "out2")]) == 2
    assert "error" in capsys.readouterr().err


def test_command_takes_csv_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = "../D051-2019_AERIAL_RGBI/UN-S0-15/D051-2019_AERIAL_RGBI_UN-S0-15_1-1.tif"
    (tmp_path / "train.csv").write_text(f"AERIAL_RGBI;DEM_ELEV\n{row};\n")
    words = ["shard", str(REAL), str(tmp_path / "out"), "--split-name", "split_mine", "--split-csv"]
    assert main([*words, "train"]) == 2
    assert "VALUE=FILE" in capsys.readouterr().err
    assert main([*words, f"train={tmp_path / 'train.csv'}"]) == 0
    manifest = Manifest.open(tmp_path / "out")
    rows = manifest.split("split_mine", "train")
    assert [manifest.row(int(row))["key"] for row in rows] == ["D051-2019_UN-S0-15_1-1"]


# A process that imports torch, and Ctrl-C after its first shard.
def test_ctrl_c_ends_the_command_quietly_and_it_can_go_on(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", KEYS, ["AERIAL_RGBI", "DEM_ELEV"])
    words = ["shard", str(tmp_path / "tree"), str(tmp_path / "out"), "--shard-mb", "1", "--workers", "2"]
    script = f"import sys; from bocage.tools.main import main\nif __name__ == '__main__': sys.exit(main({words!r}))"
    (tmp_path / "run.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/shard-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, errors = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == 130
    assert "same command goes on" in errors
    assert "Traceback" not in errors
    assert main(words[:-2]) == 0
    assert len(Manifest.open(tmp_path / "out")) == 6
