"""The catalogue of zips, of folders, and of a mix: duplicate, empty and unreadable files."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from full_tree import write_folders, write_metadata, write_zips, zip_folders
from small_tree import raster_path, write_tree

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.source.raster import RasterError
from bocage.shards.write.writer import write_shards

SMALL = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC", "AERIAL-RLT_PAN"]
KEYS = [f"D012-2019_AF-S1-{roi}_5-{column}" for roi in (2, 10) for column in range(3)] + ["D017-2018_UU-S2-1_3-4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("folders"), KEYS, SMALL)


@pytest.fixture
def tree(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders, tmp_path / "tree"))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_and_folders_give_the_same_catalogue(folders: Path, tree: Path, nested: bool, method: int) -> None:
    zip_folders(tree, method, nested)
    assert not any(path.is_dir() for path in tree.iterdir())
    first, second = FlairHubCatalogue.open(folders), FlairHubCatalogue.open(tree)
    assert first.fingerprint() == second.fingerprint()
    assert first.report() == second.report()
    for index in range(len(first)):
        one, other = first.patch(index), second.patch(index)
        assert {name: source.read() for name, source in one.sources.items()} == {
            name: source.read() for name, source in other.sources.items()
        }
        assert (one.key, one.roi, one.splits) == (other.key, other.roi, other.splits)
        assert {name: days.tolist() for name, days in one.dates.items()} == {
            name: days.tolist() for name, days in other.dates.items()
        }
        # Sources are picklable for worker processes.
        assert pickle.loads(pickle.dumps(other)).sources == other.sources
    assert str(second.patch(0).sources["SPOT_RGBI"]).startswith(f"{tree / 'D012-2019_SPOT_RGBI.zip'}/")


def test_zips_and_folders_give_the_same_shards(folders: Path, tree: Path, tmp_path: Path) -> None:
    zip_folders(tree, zipfile.ZIP_DEFLATED)
    for root, name in ((folders, "a"), (tree, "b")):
        write_shards(FlairHubCatalogue.open(root), tmp_path / name, samples_per_shard=4)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_duplicates_in_folders_and_zips_are_counted(folders: Path, tree: Path) -> None:
    folder = tree / "D012-2019_SPOT_RGBI"
    copy = Path(shutil.copytree(folder, tree.parent / "copy"))
    zip_folders(tree)
    copy.rename(folder)
    shutil.rmtree(folder / "AF-S1-10")
    catalogue = FlairHubCatalogue.open(tree)
    assert catalogue.fingerprint() == FlairHubCatalogue.open(folders).fingerprint()
    sources = {catalogue.patch(index).key: catalogue.patch(index).sources["SPOT_RGBI"] for index in range(6)}
    assert [sources[key].member is None for key in KEYS[:6]] == [True] * 3 + [False] * 3
    report = catalogue.report()
    assert report.duplicates == 3
    assert report.duplicate_examples[0] == "D012-2019_SPOT_RGBI/AF-S1-2/D012-2019_SPOT_RGBI_AF-S1-2_5-0.tif"


def test_duplicate_members_of_a_zip_are_counted(tree: Path) -> None:
    zip_folders(tree)
    path = tree / "D012-2019_SPOT_RGBI.zip"
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("AF-S1-2/D012-2019_SPOT_RGBI_AF-S1-2_5-0.tif", b"another")
        file.writestr("D012-2019_SPOT_RGBI/readme.txt", b"hello")
        file.writestr("D013-2019_SPOT_RGBI/AF-S1-2/D013-2019_SPOT_RGBI_AF-S1-2_5-0.tif", b"of another domain")
    catalogue = FlairHubCatalogue.open(tree)
    assert (catalogue.report().duplicates, catalogue.report().unparsable) == (1, 2)
    assert catalogue.patch(0).sources["SPOT_RGBI"].read() != b"another"


def test_broken_zips_are_left_out_and_named(tree: Path) -> None:
    zip_folders(tree)
    cut = tree / "D012-2019_SPOT_RGBI.zip"
    cut.write_bytes(cut.read_bytes()[:-40])
    (tree / "D031-2019_SPOT_RGBI.zip.incomplete").touch()
    bomb = tree / "D099-2019_SPOT_RGBI.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("AA-S1-1/D099-2019_SPOT_RGBI_AA-S1-1_0-0.tif", bytes(10_000_000))
    catalogue = FlairHubCatalogue.open(tree)
    report = catalogue.report()
    assert report.unreadable == 3
    assert report.unreadable_examples[0].startswith(f"{cut}: has no directory at its end")
    assert "unfinished download" in report.unreadable_examples[1]
    assert report.unreadable_examples[2].startswith(f"{bomb}: member ") and "at most" in report.unreadable_examples[2]
    assert report.present["SPOT_RGBI"] == 1
    assert report.missing_examples["SPOT_RGBI"] == KEYS[:5]
    assert any(f"left out: {cut}" in remark for remark in report.warnings())
    assert json.loads(json.dumps(report.to_json()))["missing"]["SPOT_RGBI"] == 6


def test_broken_metadata_zip_is_an_error(tree: Path) -> None:
    zip_folders(tree)
    path = tree / "GLOBAL_ALL_MTD.zip"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"GLOBAL_ALL_MTD\.zip: has no directory at its end"):
        FlairHubCatalogue.open(tree)


def test_empty_files_are_counted_and_fail_when_read(tree: Path) -> None:
    raster_path(tree, FLAIR_HUB["SPOT_RGBI"], KEYS[1]).write_bytes(b"")
    for zipped in (False, True):
        if zipped:
            zip_folders(tree)
        report = FlairHubCatalogue.open(tree).report()
        assert (report.empty, report.present["SPOT_RGBI"]) == (1, 7)
        assert report.empty_examples[0].endswith("D012-2019_SPOT_RGBI_AF-S1-2_5-1.tif")


def test_folder_without_read_permission_is_counted(tree: Path) -> None:
    folder = tree / "D012-2019_SPOT_RGBI" / "AF-S1-10"
    folder.chmod(0)
    tree.chmod(0o755)
    # Run as nobody, because root may read everything.
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from bocage.shards.modality import FLAIR_HUB\n"
        "from bocage.shards.source.report import CatalogueReport\n"
        "from bocage.shards.source.flair_hub.scan import Scan\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "report = CatalogueReport()\n"
        "Scan(Path('.'), FLAIR_HUB, report)\n"
        "print(report.unreadable, *report.unreadable_examples)\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code, tree], capture_output=True, text=True, check=False)
    finally:
        folder.chmod(0o755)
    assert done.stdout == "1 D012-2019_SPOT_RGBI/AF-S1-10: cannot be read: Permission denied\n", done.stderr


def test_deleted_raster_is_named(tree: Path) -> None:
    source = FlairHubCatalogue.open(tree).patch(0).sources["SPOT_RGBI"]
    source.path.unlink()
    with pytest.raises(RasterError, match=r"_5-0\.tif: cannot be read: No such file"):
        source.read()


def test_file_names_with_any_bytes_can_be_reported(tree: Path) -> None:
    roi = os.fsencode(tree / "D012-2019_SPOT_RGBI" / "AF-S1-2")
    Path(os.fsdecode(roi + b"/\xff\x1b[31m.tif")).touch()
    report = FlairHubCatalogue.open(tree).report()
    assert report.unparsable == 1
    assert report.unparsable_examples[0].encode().isascii() and report.unparsable_examples[0].isprintable()


def test_domain_split(tree: Path) -> None:
    catalogue = FlairHubCatalogue.open(tree).with_domain_split("split_mine", {"test": ["D017-2018"]}, rest="train")
    assert [catalogue.patch(index).splits["split_mine"] for index in range(7)] == ["train"] * 6 + ["test"]
    alone = catalogue.with_domain_split("split_alone", {"test": ["D017-2018"]})
    assert [alone.patch(index).splits["split_alone"] for index in (0, 6)] == [None, "test"]
    with pytest.raises(InputError, match="D099-2019"):
        catalogue.with_domain_split("split_x", {"test": ["D099-2019"]})
    with pytest.raises(InputError, match="listed as test and as valid"):
        catalogue.with_domain_split("split_x", {"test": ["D017-2018"], "valid": ["D017-2018"]})


def test_domain_and_roi_ids(tree: Path) -> None:
    domains, rois = FlairHubCatalogue.open(tree).domain_and_roi_ids()
    assert domains.tolist() == [0] * 6 + [1]
    assert [len(set(rois[:3])), len(set(rois[3:6])), len(set(rois))] == [1, 1, 3]


def test_benchmark_tree_as_folders_and_as_zips(tmp_path: Path) -> None:
    """The benchmark makes the same tree at full size."""
    count = 500
    write_folders(tmp_path / "folders", count)
    write_zips(tmp_path / "zips", count)
    for name in ("folders", "zips"):
        write_metadata(tmp_path / name / "GLOBAL_ALL_MTD", count)
    first, second = (FlairHubCatalogue.open(tmp_path / name) for name in ("folders", "zips"))
    assert len(first) == len(second) == count
    assert first.fingerprint() == second.fingerprint()
    assert set(first.report().present.values()) == {count}
    assert first.report().empty == 10 * count and second.report().warnings() == []
    patch = second.patch(count - 1)
    assert {source.read() for source in patch.sources.values()} == {b"a"}
    assert set(patch.splits) == {*(f"split_{n}" for n in range(1, 6)), "split_flairchallenge", "split_toy"}
    assert {len(days) for days in patch.dates.values()} == {1, 91}
