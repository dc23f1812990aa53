"""`pretrain.py` on disks that are full or read-only and over damaged checkpoints: a sentence, then the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_disk import remount, tmpfs
from small_recipes import PRETRAIN

from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

STEPS = 6
LAST, BEFORE = "step-00000006", "step-00000004"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run that saves at steps 2, 4 and 6, over simulated shards (seconds)."""
    folder = tmp_path_factory.mktemp("sample")
    write_tree(folder / "tree", patches=4, seed=3, dates=(3, 4))
    shards = write_shards(Catalogue.open(folder / "tree"), folder / "shards").path
    own = ["modalities=[AERIAL_RGBI,SENTINEL2_TS]", "split=all", "window=51.2", "reconstructions=0", f"shards={shards}"]
    return [*PRETRAIN, *own, f"engine.steps={STEPS}", "engine.save_every=2", "engine.ema_decay=0.5"]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert main(["pretrain", *words, f"output={output}"]) == 0
    return output


def assert_same(output: Path, undisturbed: Path) -> None:
    for path in undisturbed.rglob("*.safetensors"):
        expected, found = load_file(path), load_file(output / path.relative_to(undisturbed))
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], path
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def size(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_spares_what_was_saved(
    words: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = size(undisturbed / "checkpoints" / LAST)
    with tmpfs(tmp_path / "disk", f"{round(1.6 * room)}") as disk:
        output = disk / "run"
        assert main(["pretrain", *words, f"output={output}"]) == 2
        said = capsys.readouterr().err
        assert f"bocage: error: cannot write checkpoint {output}/checkpoints/{BEFORE}: " in said
        assert "space" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
        remount(disk, "size=1g")
        assert main(["pretrain", *words, f"output={output}"]) == 0
        assert "resuming at step 2 of 6" in capsys.readouterr().err
        assert_same(output, undisturbed)


def test_no_room_for_a_line_of_metrics_is_a_sentence_too(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "8k") as disk:
        (disk / "run").mkdir()
        (disk / "filler").write_bytes(bytes(8192))
        assert main(["pretrain", *words, f"output={disk / 'run'}"]) == 2
        said = capsys.readouterr().err
        assert f"bocage: error: {disk}/run/metrics.jsonl cannot be written: No space left on device" in said
        assert "Traceback" not in said


def test_a_read_only_output_is_a_sentence(
    words: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "1g") as disk:
        output = disk / "run"
        shutil.copytree(undisturbed, output)
        shutil.rmtree(output / "checkpoints" / LAST)
        remount(disk, "ro")
        assert main(["pretrain", *words, f"output={output}"]) == 2
        said = capsys.readouterr().err
        assert str(output) in said and "Read-only file system" in said and "Traceback" not in said
        assert main(["pretrain", *words, f"output={disk / 'other'}"]) == 2
        assert "Read-only file system" in capsys.readouterr().err
        remount(disk, "rw")
        assert main(["pretrain", *words, f"output={output}"]) == 0
        assert_same(output, undisturbed)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "ema.safetensors"])
@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    name: str,
    harm: Callable[[Path], None],
    words: list[str],
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    harm(output / "checkpoints" / LAST / name)
    assert main(["pretrain", *words, f"output={output}"]) == 0
    said = capsys.readouterr().err
    what = f"the SHA-256 of {name} is not" if harm is flip else f"{name} has"
    assert f"checkpoint {output}/checkpoints/{LAST} is damaged ({what}" in said
    assert "resuming at step 4 of 6" in said
    shutil.rmtree(output / "checkpoints" / f"{LAST}.damaged")
    assert_same(output, undisturbed)


class Payload:
    """Makes a file when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["optimizer.pt", "ranks.pt", "model.safetensors"])
def test_a_pickle_payload_with_the_right_hash_is_refused(
    name: str,
    words: list[str],
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    folder = output / "checkpoints" / LAST
    torch.save({"optimizer": Payload()}, folder / name)
    data = (folder / name).read_bytes()
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(marker))
    assert main(["pretrain", *words, f"output={output}", "engine.steps=8"]) == 2
    said = capsys.readouterr().err
    assert f"{folder / name}" in said.splitlines()[-1] and "Traceback" not in said
    assert not Path("executed").exists()
