"""``bocage doctor``: what it finds, what it calls a fault, and that it prints no secrets."""

from pathlib import Path

import pytest

from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main


def test_a_healthy_machine_and_healthy_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = FLAIR_HUB.subset(["SPOT_RGBI"])
    write_tree(tmp_path / "tree", patches=4, seed=0, registry=registry)
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree", registry), tmp_path / "shards")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "alsoverysecret")
    monkeypatch.setenv("COLUMNS", "200")
    before = sorted(path for path in tmp_path.rglob("*"))
    words = ["doctor", "--shards", str(tmp_path / "shards"), "--output", str(tmp_path / "runs")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    for line in ("hub token", "W&B key", "4 patches in 1 tar", "split_1", "all present", "0 faults"):
        assert line in text
    assert sorted(path for path in tmp_path.rglob("*")) == before

    tar = tmp_path / "shards" / manifest.shards[0].name
    tar.write_bytes(tar.read_bytes()[:-1])
    assert main(words) == 1
    text = capsys.readouterr().out
    assert f"1 missing or of the wrong size ({tar.name}): copy or write them again" in text
    assert "1 fault" in text


def test_what_is_not_there_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", "--shards", str(tmp_path / "none")]) == 1
    text = capsys.readouterr().out
    assert "no such folder" in text
    assert "runs are recorded offline" in text
