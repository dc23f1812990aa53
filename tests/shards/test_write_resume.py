import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from small_shards import KEYS, contents, small
from small_tree import raster_path, write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards


# Slow: two spawned processes import rasterio and the codecs.
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    counts: list[tuple[int, int, int]] = []
    write_shards(catalogue, tmp_path / "one", samples_per_shard=2, progress=lambda *values: counts.append(values))
    write_shards(catalogue, tmp_path / "two", samples_per_shard=2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (counts[0][:2], counts[-1][:2]) == ((0, 6), (6, 6))
    assert counts == sorted(counts)


def test_order(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    arguments: dict[str, dict[str, Any]] = {
        "roi": {"order": "roi"},
        "first": {"seed": 1},
        "again": {"seed": 1},
        "second": {"seed": 2},
    }
    orders = {
        name: write_shards(catalogue, tmp_path / name, samples_per_shard=4, **options).column("key").to_pylist()
        for name, options in arguments.items()
    }
    assert orders["roi"] == catalogue.keys()
    assert orders["first"] == orders["again"] != orders["second"] != orders["roi"]
    assert sorted(orders["first"]) == sorted(orders["second"]) == sorted(catalogue.keys())


class _StopError(Exception):
    pass


def test_an_interrupted_run_keeps_finished_shards_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2)

    def stop_at(patches: int) -> None:
        def progress(done: int, total: int, written: int) -> None:
            if done == patches:
                raise _StopError

        with pytest.raises(_StopError):
            write_shards(catalogue, tmp_path / "out", samples_per_shard=2, progress=progress)

    stop_at(3)
    assert [path.name for path in (tmp_path / "out").glob("shard*")] == ["shard-000000.tar"]
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(tmp_path / "out")
    first = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"half of it")  # a tar without its part
    (tmp_path / "out" / "shard-000002.tar.tmp").write_bytes(b"rubbish")
    stop_at(5)
    write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first
    assert not (tmp_path / "out" / "parts").exists()


def test_a_finished_run_writes_nothing(tmp_path: Path) -> None:
    catalogue = small(tmp_path, patches=2)
    write_shards(catalogue, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(write_shards(catalogue, tmp_path / "out", workers=2)) == 2
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_folders_of_other_plans_or_other_content_are_rejected(tmp_path: Path) -> None:
    catalogue = small(tmp_path, patches=2)
    write_shards(catalogue, tmp_path / "out")
    with pytest.raises(InputError, match="seed"):
        write_shards(catalogue, tmp_path / "out", seed=5)
    with pytest.raises(InputError, match="the patches or modalities"):
        write_shards(FlairHubCatalogue.open(tmp_path / "tree", modalities=["SPOT_RGBI"]), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="new or empty"):
        write_shards(catalogue, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_one_unreadable_patch_is_skipped_and_recorded(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    broken = [raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], key) for key in KEYS]
    broken[2].write_bytes(broken[2].read_bytes()[:900])
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert len(manifest) == 5
    assert list(manifest.skipped) == [KEYS[2]]
    assert str(broken[2]) in manifest.skipped[KEYS[2]]
    with pytest.raises(InputError, match=r"1 unreadable patch, but --max-bad allows 0.*_0-2\.tif"):
        write_shards(catalogue, tmp_path / "strict", samples_per_shard=2, max_bad=0)


def test_too_many_unreadable_patches_end_the_run_which_resumes_after_repair(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=1)
    broken = {path: path.read_bytes() for path in (tmp_path / "tree").glob("*SPOT_RGBI/*/*.tif")}
    for path in list(broken)[:3]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="2 unreadable patches, but --max-bad allows 1"):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=1)
    for path, data in broken.items():
        path.write_bytes(data)
    write_shards(catalogue, tmp_path / "out", samples_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# The broken patch is in a shard that is finished when the run is interrupted.
def test_a_resumed_run_adds_repaired_patches_to_finished_shards(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2, order="roi")
    path = raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0])
    data = path.read_bytes()
    path.write_bytes(b"")

    def stop(done: int, total: int, written: int) -> None:
        if done == 5:
            raise _StopError

    with pytest.raises(_StopError):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi", progress=stop)
    path.write_bytes(data)
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    assert (len(manifest), manifest.skipped) == (6, {})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_skipped_patches_count_across_shards_and_may_be_repaired(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    broken = {raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[index]): b"" for index in (0, 2, 3)}
    for path in broken:
        broken[path] = path.read_bytes()
        path.write_bytes(b"")
    # The first shard finishes and skips one patch; the second exceeds the limit.
    with pytest.raises(InputError, match="2 unreadable patches, but --max-bad allows 1"):
        write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    for path, data in broken.items():
        path.write_bytes(data)
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    assert (len(manifest), manifest.skipped) == (6, {})


# Large rasters, because torch uses several threads only for these. Two processes start.
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", KEYS[:2], ["AERIAL_RGBI", "DEM_ELEV", "SENTINEL1-ASC_TS"], dates=40)
    catalogue = FlairHubCatalogue.open(tree)
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


def test_a_small_dataset_gets_several_shards(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(5) for column in range(8)]
    catalogue = FlairHubCatalogue.open(write_tree(tmp_path / "tree", keys, ["SPOT_RGBI"]))
    assert [shard.samples for shard in write_shards(catalogue, tmp_path / "out").shards] == [16, 16, 8]
    tiny = write_shards(catalogue, tmp_path / "tiny", shard_bytes=100_000)
    assert tiny.shard_count > 3
    assert max(shard.bytes for shard in tiny.shards) < 150_000


def test_write_errors_name_the_folder_and_the_cause(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=2)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        write_shards(catalogue, tmp_path / "file" / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written: File too large; .* to resume"):
            write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.tmp"))
    write_shards(catalogue, tmp_path / "out", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
