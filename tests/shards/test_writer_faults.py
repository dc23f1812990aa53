"""Sources that vanish, disks that are full or read-only, shards that are lost: exact sentences, and going on after."""

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
from bocage.shards.write.writer import Sharding, write_shards
from bocage.tools.main import main


@pytest.mark.parametrize("left", ["nothing", "an empty mount point", "all but one modality"])
def test_a_source_that_vanishes_half_way_ends_the_run_and_no_patch_is_blamed(tmp_path: Path, left: str) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole", samples_per_shard=2).path)
    tree, away = tmp_path / "tree", tmp_path / "away"

    def vanish(done: int, total: int, written: int) -> None:
        if done == 3 and tree.exists():
            tree.rename(away)
            if left != "nothing":
                tree.mkdir()
            if left == "all but one modality":
                for folder in away.iterdir():
                    if not folder.name.endswith("SENTINEL2_TS"):
                        shutil.copytree(folder, tree / folder.name)

    # All patches may be bad: what is missing must not become one that is skipped.
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=2, max_bad=1)
    with pytest.raises(InputError, match=rf"^{tree}: the source is gone \(.*\); finished shards are kept"):
        sharding.write(progress=vanish)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shard-000000.tar", "parts"}
    shutil.rmtree(tree, ignore_errors=True)
    away.rename(tree)
    sharding.write()
    assert contents(tmp_path / "out") == whole


# Two processes start.
def test_a_source_that_vanishes_under_workers_ends_the_run(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=1, max_bad=1)
    sharding.write_slice(1, 3)
    (tmp_path / "tree").rename(tmp_path / "away")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'tree'}: the source is gone"):
        sharding.write(workers=2)
    (tmp_path / "away").rename(tmp_path / "tree")
    assert len(sharding.write()) == 6


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole", samples_per_shard=1).path)
    with tmpfs(tmp_path / "disk", "100k") as disk:
        sharding = Sharding(catalogue, disk / "out", samples_per_shard=1)
        with pytest.raises(InputError, match=rf"^{disk / 'out'}: cannot be written: No space left on device; finished"):
            sharding.write()
        assert not list(disk.rglob("*.tmp"))
        assert list((disk / "out").glob("*.tar"))
        remount(disk, "size=20m")
        sharding.write()
        assert contents(disk / "out") == whole
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
            file.writelines(bytes(4096) for _ in range(1 << 14))
        assert main(["shard", str(tmp_path / "tree"), str(disk / "more")]) == 2
    errors = capsys.readouterr().err
    assert f"bocage: error: {tmp_path}/disk/more: cannot be written: No space left on device" in errors


def test_a_read_only_target_is_one_sentence_and_the_run_goes_on_when_it_is_writable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole").path)
    words = ["shard", str(tmp_path / "tree"), str(tmp_path / "disk" / "out")]
    with tmpfs(tmp_path / "disk", "20m") as disk:
        Sharding(catalogue, disk / "out", shard_bytes=512_000_000).write_slice(1, 2)
        remount(disk, "ro")
        assert main(words) == 2
        assert f"error: {disk / 'out'}: cannot be written: Read-only file system; fini" in capsys.readouterr().err
        assert main([*words[:2], str(disk / "new")]) == 2
        assert f"error: {disk / 'new'}: cannot be written: Read-only file system; fini" in capsys.readouterr().err
        remount(disk, "rw")
        assert main(words) == 0
        found = contents(disk / "out")
    assert {name: digest for name, digest in found.items() if name.endswith(".tar")} == {
        name: digest for name, digest in whole.items() if name.endswith(".tar")
    }


def test_a_finished_shard_with_a_gap_is_rewritten_only_when_its_patch_can_be_read(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    path = raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0])
    data = path.read_bytes()
    path.write_bytes(b"")
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    sharding.write_slice(1, 3)
    shard = tmp_path / "out" / "shard-000000.tar"
    before = shard.stat().st_mtime_ns
    sharding.write_slice(1, 3)
    assert shard.stat().st_mtime_ns == before
    path.write_bytes(data)
    sharding.write_slice(1, 3)
    assert shard.stat().st_mtime_ns > before
    assert sharding.write().skipped == {}


def test_lost_shards_of_a_complete_folder_are_rewritten_to_the_recorded_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[0]).write_bytes(b"")  # left out, and it stays so
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    sharding.write()
    whole, out = contents(tmp_path / "out"), tmp_path / "out"
    kept = (out / "shard-000001.tar").stat().st_mtime_ns
    (out / "shard-000000.tar").unlink()
    (out / "shard-000002.tar").write_bytes((out / "shard-000002.tar").read_bytes()[:5000])  # a copy that broke off
    assert sharding.estimate().waiting == 4
    seen: list[int] = []
    assert len(sharding.write(progress=lambda done, total, written: seen.append(done))) == 5
    assert contents(out) == whole
    assert not (out / "parts").exists()
    assert (out / "shard-000001.tar").stat().st_mtime_ns == kept
    assert (seen[0], seen[-1]) == (2, 5)  # the patch that was left out is not read again


def test_a_lost_shard_whose_source_has_changed_is_not_replaced(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=2, order="roi")
    sharding.write()
    lost = tmp_path / "out" / "shard-000000.tar"
    lost.unlink()
    before = contents(tmp_path / "out")
    spot = FLAIR_HUB["SPOT_RGBI"]
    raster = raster_path(tmp_path / "tree", spot, KEYS[0])
    data = raster.read_bytes()
    write_raster(raster, content(spot, 1, seed=999), spot.gsd)
    with pytest.raises(InputError, match=rf"^{lost}: cannot be restored, its bytes are others than .*: the source"):
        sharding.write()
    dataset = tmp_path / "out" / "dataset.json"
    text = dataset.read_text()
    description = json.loads(text)
    description["plan"]["libraries"]["pcodec"] = "0.0.1"
    dataset.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"others than the manifest says: it was made with pcodec 0\.0\.1 \(here "):
        sharding.write()
    dataset.write_text(text)
    raster.write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"^{raster}: cannot be read: .*; {lost} held this patch and cannot be restored"
    ):
        sharding.write()
    # Nothing came under a final name; what lies aside goes with the next run.
    assert {name: digest for name, digest in contents(tmp_path / "out").items() if "/" not in name} == before
    raster.write_bytes(data)
    sharding.write()
    assert len(Manifest.open(tmp_path / "out")) == 6
    assert not (tmp_path / "out" / "parts").exists()
