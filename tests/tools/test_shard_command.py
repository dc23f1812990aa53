import json
from pathlib import Path

import pytest
from small_shards import KEYS
from small_tree import write_tree

from bocage.shards.format.manifest import Manifest
from bocage.tools.main import main

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"


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


def test_command_rounds_heights_only_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "tree", KEYS[:1], ["DEM_ELEV", "AERIAL_LABEL-COSIA"])
    sizes = {}
    for out, options in (("exact", []), ("rounded", ["--lossy-dem"])):
        assert main(["shard", str(tmp_path / "tree"), str(tmp_path / out), *options]) == 0
        manifest = Manifest.open(tmp_path / out)
        assert manifest.registry["DEM_ELEV"].codec == ("height-5mm" if options else "height")
        sizes[out] = manifest.shards[0].bytes
    assert sizes["rounded"] < sizes["exact"]
    # The plan tells them apart: a folder never holds both.
    assert main(["shard", str(tmp_path / "tree"), str(tmp_path / "exact"), "--lossy-dem"]) == 2
    assert "another plan" in capsys.readouterr().err


def test_dry_run_tells_sizes_and_time_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(REAL), str(tmp_path / "new" / "out"), "--dry-run", "--workers", "3"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "dry run: nothing is written",
        "patches",
        "shards",
        "estimated size",
        "free disk space",
        "estimated time with --workers 3",
    ):
        assert words in printed
    assert not list(tmp_path.iterdir())


def test_slices_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shard", str(REAL), str(tmp_path / "out")]
    assert main([*words, "--slice", "2/2"]) == 0
    assert "slice 2 of 2: 1 shard written; run --merge when all slices are done" in capsys.readouterr().out
    assert main([*words, "--slice", "1/2"]) == 0
    assert main([*words, "--merge"]) == 0
    assert len(Manifest.open(tmp_path / "out")) == 3


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/"])
def test_a_slice_is_one_of_several(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shard", "tree", "out", f"--slice={text}"])
    assert f"{text!r} is not I/N with 1 <= I <= N" in capsys.readouterr().err


def test_splits_by_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["D012-2019_AF-S1-27_0-0", "D031-2019_AF-S1-1_0-0", "D004-2021_AF-S1-2_0-0"]
    tree = write_tree(tmp_path / "tree", keys, ["SPOT_RGBI"])
    words = ["shard", str(tree), str(tmp_path / "out"), "--split-domains"]
    assert main([*words, "test=D999-2019"]) == 2
    assert "D999-2019" in capsys.readouterr().err
    assert main([*words, "test=rest", "train=rest"]) == 2
    assert "cannot both be the rest" in capsys.readouterr().err
    assert main([*words, "test=D031-2019,D004-2021", "train=rest"]) == 0
    table = Manifest.open(tmp_path / "out").table
    assert dict(zip(table["domain"].to_pylist(), table["split_domains"].to_pylist())) == {
        "D012-2019": "train",
        "D031-2019": "test",
        "D004-2021": "test",
    }
    assert main(["shard", str(tree), str(tmp_path / "more"), "--split-name", "split_x"]) == 2
    assert "--split-name: needs" in capsys.readouterr().err


def test_report_is_printed_first_and_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", KEYS[:3], ["SPOT_RGBI", "AERIAL_RGBI"])
    next(tree.glob("*AERIAL_RGBI/*/*.tif")).unlink()
    (tree / "D012-2019_SPOT_RGBI" / "AF-S1-27" / "notes.txt").touch()
    words = ["shard", str(tree), str(tmp_path / "out"), "--dry-run", "--report"]
    assert main([*words, str(tmp_path / "report.json")]) == 0
    errors = capsys.readouterr().err
    assert "note: 1 of 3 patches without AERIAL_RGBI" in errors
    assert "note: 1 name not understood, e.g. D012-2019_SPOT_RGBI/AF-S1-27/notes.txt" in errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["patches"] == 3
    assert report["missing"]["AERIAL_RGBI"] == 1
    assert report["unparsable"] == 1
    assert main([*words, str(tmp_path / "none" / "report.json")]) == 2
    assert f"--report {tmp_path}/none/report.json: cannot be written: No such file" in capsys.readouterr().err


def test_a_zip_that_cannot_be_read_ends_the_command_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", KEYS[:3], ["SPOT_RGBI", "AERIAL_RGBI"])
    (tree / "D031-2019_SPOT_RGBI.zip").write_bytes(b"PK\3\4, and then the network went away")
    command = ["shard", str(tree), str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tree}/D031-2019_SPOT_RGBI.zip: has no directory at its end" in error
    assert "--skip-unreadable" in error and not (tmp_path / "out").exists()
    assert main([*command, "--skip-unreadable"]) == 0
    assert len(Manifest.open(tmp_path / "out")) == 3
