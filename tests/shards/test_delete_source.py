"""``bocage shard --delete-source`` deletes the zips that verified shards replace, and nothing else."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from full_tree import zip_folders
from small_shards import SMALL
from small_tree import raster_path, write_tree

from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.tools.main import main

# Two image years of one department share its historical images.
KEYS = [f"D017-{year}_AF-S1-27_0-{column}" for year in (2018, 2021) for column in range(2)]
MODALITIES = [*SMALL, "AERIAL-RLT_PAN"]
HISTORICAL, METADATA = "D017-195X_AERIAL-RLT_PAN.zip", "GLOBAL_ALL_MTD.zip"
ZIPS = [f"D017-{year}_{name}.zip" for year in (2018, 2021) for name in SMALL] + [HISTORICAL]


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = write_tree(tmp_path_factory.mktemp("zipped"), KEYS, MODALITIES)
    zip_folders(tree)
    return tree


@pytest.fixture
def tree(zipped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zipped, tmp_path / "tree"))


def names(tree: Path) -> set[str]:
    return {path.name for path in tree.iterdir()}


def shard(tree: Path, *options: str) -> int:
    return main(["shard", str(tree), str(tree.parent / "out"), "--delete-source", *options])


def replace_member(path: Path, member: str, content: bytes) -> None:
    """Write the zip again with another content of one member; new members come last."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {**members, member: content}.items():
            file.writestr(name, data)


def test_zips_are_deleted_and_nothing_else(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "notes").mkdir()
    (tree / "notes" / "D017-2018_SPOT_RGBI.zip").write_bytes(b"elsewhere")
    (tree / "other.zip").write_bytes(b"not of the dataset")
    (tree / "D017-2018_SPOT_RGBI.csv").touch()
    others = names(tree) - set(ZIPS)
    assert set(ZIPS) <= names(tree)
    assert shard(tree) == 0
    assert names(tree) == others
    printed = capsys.readouterr().out
    assert f"deleted {len(ZIPS)} zips of {tree}, 0." in printed
    assert all(name in printed for name in ZIPS)
    assert f"kept 1, metadata: {METADATA}" in printed
    assert "kept 1, not a zip of one modality: other.zip" in printed
    assert len(Manifest.open(tree.parent / "out")) == len(KEYS)
    assert main(["verify", str(tree.parent / "out")]) == 0


def test_a_zip_that_changed_after_the_shards_were_written_stays(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tree.parent / "out"
    assert main(["shard", str(tree), str(out)]) == 0
    changed = tree / ZIPS[0]
    later = (out / "dataset.json").stat().st_mtime + 10
    os.utime(changed, (later, later))
    capsys.readouterr()
    assert shard(tree) == 0
    assert f"kept 1, changed after the shards were written: {changed.name}" in capsys.readouterr().out
    assert set(ZIPS) & names(tree) == {changed.name}


def test_zips_of_other_modalities_stay(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tree, "--modalities", "SPOT_RGBI") == 0
    deleted = {name for name in ZIPS if "SPOT" in name}
    assert names(tree) == {*ZIPS, METADATA} - deleted
    assert f"kept {len(ZIPS) - len(deleted)}, not read for these shards: " in capsys.readouterr().out


def test_zips_of_a_skipped_patch_stay(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = raster_path(Path(), FLAIR_HUB["SPOT_RGBI"], KEYS[0])
    replace_member(tree / "D017-2018_SPOT_RGBI.zip", str(damaged), b"no tiff")
    assert shard(tree) == 0
    # The historical images also belong to the skipped patch.
    kept = {name for name in ZIPS if "2018" in name} | {HISTORICAL}
    assert names(tree) == {*kept, METADATA}
    assert f"kept {len(kept)}, the shards lack some of its files: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "member", ["D017-2018_SPOT_RGBI/AF-S1-27/readme.txt", "D017-2018_SPOT_RGBI/AF-S1-27/D017-2018_SPOT_RGBI_0-0.tif"]
)
def test_a_zip_with_a_file_that_is_not_understood_stays(tree: Path, member: str) -> None:
    replace_member(tree / "D017-2018_SPOT_RGBI.zip", member, b"?")
    assert shard(tree) == 0
    assert names(tree) == {"D017-2018_SPOT_RGBI.zip", METADATA}


def test_a_zip_stays_whose_raster_is_also_in_a_folder(tree: Path) -> None:
    with zipfile.ZipFile(tree / "D017-2018_SPOT_RGBI.zip") as file:
        file.extract(str(raster_path(Path(), FLAIR_HUB["SPOT_RGBI"], KEYS[0])), tree)
    assert shard(tree) == 0
    assert names(tree) == {"D017-2018_SPOT_RGBI.zip", "D017-2018_SPOT_RGBI", METADATA}


def test_a_series_without_dates_stays(tree: Path) -> None:
    (tree / METADATA).unlink()
    assert shard(tree) == 0
    assert names(tree) == {name for name in ZIPS if "SENTINEL" in name}


def test_unreadable_zips_stay(tree: Path) -> None:
    broken = tree / "D017-2018_SPOT_RGBI.zip"
    broken.write_bytes(broken.read_bytes()[:-30])
    assert shard(tree) == 2
    assert set(ZIPS) <= names(tree)
    assert shard(tree, "--skip-unreadable") == 0
    assert names(tree) == {broken.name, METADATA}


def test_links_stay(tree: Path) -> None:
    moved = (tree / "D017-2018_SPOT_RGBI.zip").rename(tree.parent / "elsewhere.zip")
    (tree / "D017-2018_SPOT_RGBI.zip").symlink_to(moved)
    assert shard(tree) == 0
    assert names(tree) == {"D017-2018_SPOT_RGBI.zip", METADATA} and moved.is_file()


def test_rounded_heights_are_no_replacement(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", KEYS[:1], ["DEM_ELEV", "SPOT_RGBI"])
    zip_folders(tree)
    assert shard(tree, "--lossy-dem") == 0
    assert names(tree) == {"D017-2018_DEM_ELEV.zip", METADATA}


def test_nothing_is_deleted_if_a_shard_is_broken(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tree.parent / "out"
    assert main(["shard", str(tree), str(out)]) == 0
    tar = out / Manifest.open(out).shards[-1].name
    content = tar.read_bytes()
    tar.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    assert shard(tree) == 2
    assert f"{tar.name} is broken, so nothing was deleted" in capsys.readouterr().err
    assert names(tree) == {*ZIPS, METADATA}
    tar.write_bytes(content)  # shards that an earlier run has written are verified, too
    assert shard(tree) == 0
    assert names(tree) == {METADATA}


def test_only_complete_shards_allow_deletion(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--slice", "1/2"], ["--dry-run"]):
        assert shard(tree, *option) == 2
        assert "--delete-source: needs complete shards" in capsys.readouterr().err
        assert not (tree.parent / "out").exists()
    for number in ("1/2", "2/2"):
        assert main(["shard", str(tree), str(tree.parent / "out"), "--slice", number]) == 0
    assert names(tree) == {*ZIPS, METADATA}
    assert shard(tree, "--merge") == 0
    assert names(tree) == {METADATA}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete from any folder")
def test_a_folder_without_permission_is_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree.chmod(0o500)
    try:
        assert shard(tree) == 2
    finally:
        tree.chmod(0o700)
    assert "cannot be deleted: Permission denied" in capsys.readouterr().err
