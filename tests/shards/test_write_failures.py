"""Failures while shards are written: missing sources, full or read-only disks, lost shards; and the resumed run."""

import json
import shutil
from pathlib import Path

import pytest
from small_disk import remount, tmpfs
from small_shards import KEYS, contents, small
from small_tree import content, raster_path, write_raster

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.write.writer import DatasetWriter, write_shards
from bocage.tools.main import main


@pytest.mark.parametrize("remains", ["nothing", "an empty mount point", "all but one modality"])
def test_a_source_that_disappears_ends_the_run_and_skips_no_patch(tmp_path: Path, remains: str) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole", samples_per_shard=2).path)
    tree, moved = tmp_path / "tree", tmp_path / "moved"

    def remove_source(done: int, total: int, written: int) -> None:
        if done == 3 and tree.exists():
            tree.rename(moved)
            if remains != "nothing":
                tree.mkdir()
            if remains == "all but one modality":
                for folder in moved.iterdir():
                    if not folder.name.endswith("SENTINEL2_TS"):
                        shutil.copytree(folder, tree / folder.name)

    # max_bad=1 allows every patch to be skipped: a missing source must still end the run.
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=2, max_bad=1)
    with pytest.raises(InputError, match=rf"^{tree}: the source is gone \(.*\); finished shards are kept"):
        writer.write(progress=remove_source)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shard-000000.tar", "parts"}
    shutil.rmtree(tree, ignore_errors=True)
    moved.rename(tree)
    writer.write()
    assert contents(tmp_path / "out") == whole


# Two processes start.
def test_a_source_that_disappears_ends_a_run_with_workers(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1, max_bad=1)
    writer.write_slice(1, 3)
    (tmp_path / "tree").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'tree'}: the source is gone"):
        writer.write(workers=2)
    (tmp_path / "moved").rename(tmp_path / "tree")
    assert len(writer.write()) == 6


def test_a_full_disk_is_an_input_error_and_the_run_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole", samples_per_shard=1).path)
    with tmpfs(tmp_path / "disk", "100k") as disk:
        writer = DatasetWriter(catalogue, disk / "out", samples_per_shard=1)
        with pytest.raises(InputError, match=rf"^{disk / 'out'}: cannot be written: No space left on device; finished"):
            writer.write()
        assert not list(disk.rglob("*.tmp"))
        assert list((disk / "out").glob("*.tar"))
        remount(disk, "size=20m")
        writer.write()
        assert contents(disk / "out") == whole
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
            file.writelines(bytes(4096) for _ in range(1 << 14))
        assert main(["shard", str(tmp_path / "tree"), str(disk / "more")]) == 2
    errors = capsys.readouterr().err
    assert f"bocage: error: {tmp_path}/disk/more: cannot be written: No space left on device" in errors


def test_a_read_only_target_is_an_input_error_and_the_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole").path)
    arguments = ["shard", str(tmp_path / "tree"), str(tmp_path / "disk" / "out")]
    with tmpfs(tmp_path / "disk", "20m") as disk:
        DatasetWriter(catalogue, disk / "out", shard_bytes=512_000_000).write_slice(1, 2)
        remount(disk, "ro")
        assert main(arguments) == 2
        assert f"error: {disk / 'out'}: cannot be written: Read-only file system; fini" in capsys.readouterr().err
        assert main([*arguments[:2], str(disk / "new")]) == 2
        assert f"error: {disk / 'new'}: cannot be written: Read-only file system; fini" in capsys.readouterr().err
        remount(disk, "rw")
        assert main(arguments) == 0
        written = contents(disk / "out")
    assert {name: digest for name, digest in written.items() if name.endswith(".tar")} == {
        name: digest for name, digest in whole.items() if name.endswith(".tar")
    }


def test_a_shard_that_skipped_a_patch_is_rewritten_once_the_patch_is_readable(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    path = raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0])
    data = path.read_bytes()
    path.write_bytes(b"")
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    writer.write_slice(1, 3)
    shard = tmp_path / "out" / "shard-000000.tar"
    before = shard.stat().st_mtime_ns
    writer.write_slice(1, 3)
    assert shard.stat().st_mtime_ns == before
    path.write_bytes(data)
    writer.write_slice(1, 3)
    assert shard.stat().st_mtime_ns > before
    assert writer.write().skipped == {}


def test_lost_shards_of_a_complete_folder_are_rewritten_to_the_recorded_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0]).write_bytes(b"")  # skipped, also when restored
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    writer.write()
    whole, out = contents(tmp_path / "out"), tmp_path / "out"
    untouched = (out / "shard-000001.tar").stat().st_mtime_ns
    (out / "shard-000000.tar").unlink()
    (out / "shard-000002.tar").write_bytes((out / "shard-000002.tar").read_bytes()[:5000])  # a truncated copy
    assert writer.estimate().remaining == 4
    done_counts: list[int] = []
    assert len(writer.write(progress=lambda done, total, written: done_counts.append(done))) == 5
    assert contents(out) == whole
    assert not (out / "parts").exists()
    assert (out / "shard-000001.tar").stat().st_mtime_ns == untouched
    assert (done_counts[0], done_counts[-1]) == (2, 5)  # the skipped patch is not read again


def test_a_lost_shard_whose_source_has_changed_is_not_replaced(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    writer.write()
    lost = tmp_path / "out" / "shard-000000.tar"
    lost.unlink()
    before = contents(tmp_path / "out")
    spot = FLAIR_HUB["SPOT_RGBI"]
    raster = raster_path(tmp_path / "tree", spot, KEYS[0])
    data = raster.read_bytes()
    write_raster(raster, content(spot, 1, seed=999), spot.gsd)
    with pytest.raises(InputError, match=rf"^{lost}: cannot be restored, its bytes differ from .*: the source"):
        writer.write()
    dataset = tmp_path / "out" / "dataset.json"
    text = dataset.read_text()
    description = json.loads(text)
    description["plan"]["libraries"]["pcodec"] = "0.0.1"
    dataset.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"differ from the manifest: it was made with pcodec 0\.0\.1 \(here "):
        writer.write()
    dataset.write_text(text)
    raster.write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"^{raster}: cannot be read: .*; {lost} contained this patch and cannot be restored"
    ):
        writer.write()
    # The failed shard never got its final name; the next run removes the staging folder.
    assert {name: digest for name, digest in contents(tmp_path / "out").items() if "/" not in name} == before
    raster.write_bytes(data)
    writer.write()
    assert len(Manifest.open(tmp_path / "out")) == 6
    assert not (tmp_path / "out" / "parts").exists()
