import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_shards import KEYS
from small_tree import write_tree

from bocage.shards.manifest import Manifest
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
