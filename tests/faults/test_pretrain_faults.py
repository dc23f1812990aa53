"""Pretraining on full or read-only disks and from damaged checkpoints: one-line errors, then the same bits."""

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
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

STEPS = 6
LAST, PREVIOUS = "step-00000006", "step-00000004"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that saves at steps 2, 4 and 6, on simulated shards (seconds)."""
    folder = tmp_path_factory.mktemp("sample")
    write_tree(folder / "tree", patches=4, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path
    data = [
        "modalities=[AERIAL_RGBI,SENTINEL2_TS]",
        "split=all",
        "window=51.2",
        "reconstructions=0",
        f"shards={shards}",
    ]
    return [*PRETRAIN, *data, f"engine.steps={STEPS}", "engine.save_every=2", "engine.ema_decay=0.5"]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert main(["pretrain", *arguments, f"output={output}"]) == 0
    return output


def assert_same_weights(output: Path, uninterrupted: Path) -> None:
    for path in uninterrupted.rglob("*.safetensors"):
        expected, actual = load_file(path), load_file(output / path.relative_to(uninterrupted))
        assert [name for name in expected if not torch.equal(expected[name], actual[name])] == [], path
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def disk_usage(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_keeps_earlier_checkpoints(
    arguments: list[str], uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = disk_usage(uninterrupted / "checkpoints" / LAST)
    with tmpfs(tmp_path / "disk", f"{round(1.6 * room)}") as disk:
        output = disk / "run"
        assert main(["pretrain", *arguments, f"output={output}"]) == 2
        errors = capsys.readouterr().err
        assert f"bocage: error: cannot write checkpoint {output}/checkpoints/{PREVIOUS}: " in errors
        assert "space" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
        remount(disk, "size=1g")
        assert main(["pretrain", *arguments, f"output={output}"]) == 0
        assert "resuming at step 2 of 6" in capsys.readouterr().err
        assert_same_weights(output, uninterrupted)


def test_no_space_for_the_metrics_file_is_a_one_line_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "8k") as disk:
        (disk / "run").mkdir()
        (disk / "filler").write_bytes(bytes(8192))
        assert main(["pretrain", *arguments, f"output={disk / 'run'}"]) == 2
        errors = capsys.readouterr().err
        assert f"bocage: error: {disk}/run/metrics.jsonl cannot be written: No space left on device" in errors
        assert "Traceback" not in errors


def test_a_read_only_output_is_a_one_line_error(
    arguments: list[str], uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "1g") as disk:
        output = disk / "run"
        shutil.copytree(uninterrupted, output)
        shutil.rmtree(output / "checkpoints" / LAST)
        remount(disk, "ro")
        assert main(["pretrain", *arguments, f"output={output}"]) == 2
        errors = capsys.readouterr().err
        assert str(output) in errors and "Read-only file system" in errors and "Traceback" not in errors
        assert main(["pretrain", *arguments, f"output={disk / 'other'}"]) == 2
        assert "Read-only file system" in capsys.readouterr().err
        remount(disk, "rw")
        assert main(["pretrain", *arguments, f"output={output}"]) == 0
        assert_same_weights(output, uninterrupted)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "ema.safetensors"])
@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    name: str,
    harm: Callable[[Path], None],
    arguments: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    harm(output / "checkpoints" / LAST / name)
    assert main(["pretrain", *arguments, f"output={output}"]) == 0
    errors = capsys.readouterr().err
    what = f"the SHA-256 of {name} differs" if harm is flip else f"{name} has"
    assert f"checkpoint {output}/checkpoints/{LAST} is damaged ({what}" in errors
    assert "resuming at step 4 of 6" in errors
    shutil.rmtree(output / "checkpoints" / f"{LAST}.damaged")
    assert_same_weights(output, uninterrupted)


class Payload:
    """Makes a file when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["optimizer.pt", "ranks.pt", "model.safetensors"])
def test_a_pickle_payload_with_the_right_hash_is_refused(
    name: str,
    arguments: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    folder = output / "checkpoints" / LAST
    torch.save({"optimizer": Payload()}, folder / name)
    data = (folder / name).read_bytes()
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(marker))
    assert main(["pretrain", *arguments, f"output={output}", "engine.steps=8"]) == 2
    errors = capsys.readouterr().err
    assert f"{folder / name}" in errors.splitlines()[-1] and "Traceback" not in errors
    assert not Path("executed").exists()
