"""FSDP trains, saves and resumes like DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_run import IMAGES, PRETRAINING
from safetensors.torch import load_file

from bocage import recipes
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.checkpoint.reader import load_tensors
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

SCRIPT = Path(__file__).parents[1] / "support" / "fsdp_run.py"
STEP = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds: patches are simulated and sharded."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=8, seed=3, dates=(4, 6))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path


def on_two_ranks(shards: Path, output: Path, *cases: str) -> str:
    """Run cases of the script on two ranks; return its stderr."""
    arguments = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        str(shards),
        str(output),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        [sys.executable, *arguments, *cases], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stderr


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_similar(one: Path, other: Path) -> None:
    """Losses of two runs agree, gradients less closely."""
    first, second = records(one), records(other)
    assert len(first) == len(second) > 0
    for line, match in zip(first, second, strict=True):
        assert line["loss"] == pytest.approx(match["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(match["gradient_norm"], rel=1e-3)


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# About 25 s: torchrun starts two interpreters, which train twice. Some batches of one sample lack a sensor.
@pytest.mark.slow
def test_fsdp_trains_like_ddp(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "ddp", "fsdp", "gather")
    assert_similar(tmp_path / "ddp", tmp_path / "fsdp")
    saved = tmp_path / "fsdp" / STEP
    shard_files = sorted(path.name for path in saved.glob("optimizer-*"))
    assert shard_files == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    listed = json.loads((saved / "complete.json").read_text())["files"]
    assert set(shard_files) < set(listed)
    # Each rank saves half of the optimiser state.
    sizes = [(saved / name).stat().st_size for name in shard_files]
    full_size = (tmp_path / "ddp" / STEP / "optimizer.pt").stat().st_size
    assert max(sizes) < 0.6 * full_size
    assert (saved / "optimizer.pt").stat().st_size < 0.3 * full_size
    for name in ("model", "ema"):
        one, other = (load_file(tmp_path / run / STEP / f"{name}.safetensors") for run in ("ddp", "fsdp"))
        assert one.keys() == other.keys()
        difference = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
        assert difference < 1e-4, name
    for name in ("AERIAL_RGBI", "SENTINEL2_TS"):
        assert (tmp_path / "fsdp" / "encoders" / name / "model.safetensors").is_file()


# About 2 min: several trainings on two ranks.
@pytest.mark.slow
def test_sharded_checkpoints_resume_sharded_or_not_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "fsdp", "resharded", "images", "half")
    assert_same(tmp_path / "fsdp" / STEP / "model.safetensors", tmp_path / "resharded" / STEP / "model.safetensors")
    assert_same(tmp_path / "fsdp" / STEP / "ema.safetensors", tmp_path / "resharded" / STEP / "ema.safetensors")
    assert not list((tmp_path / "resharded" / STEP).glob("optimizer-*"))
    state = load_tensors(tmp_path / "resharded" / STEP / "optimizer.pt")["optimizer"]["state"]
    assert all(torch.is_tensor(value) for values in state.values() for value in values.values())
    # One rank with the same samples per step resumes the run of two.
    overrides = [
        *PRETRAINING,
        IMAGES,
        f"shards={shards}",
        f"output={tmp_path / 'half'}",
        "engine.accumulation=4",
        "engine.resume_allow=['*']",
    ]
    pretrain(recipes.resolve(PretrainConfig, overrides))
    assert_similar(tmp_path / "images", tmp_path / "half")


# About a minute: several trainings on two ranks.
@pytest.mark.slow
def test_fsdp_with_lars_compiled_blocks_and_fine_tuning(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "lars_ddp", "lars", "compiled", "tuned", "tuned_fsdp")
    assert_similar(tmp_path / "lars_ddp", tmp_path / "lars")
    assert_similar(tmp_path / "tuned", tmp_path / "tuned_fsdp")
    assert records(tmp_path / "compiled")
    ddp, fsdp = (
        json.loads((tmp_path / name / "metrics.json").read_text())["valid"] for name in ("tuned", "tuned_fsdp")
    )
    assert ddp.keys() == fsdp.keys() and ddp  # scores by label
    for label, scores in ddp.items():
        assert scores["strict"]["miou"] == pytest.approx(fsdp[label]["strict"]["miou"], abs=0.1), label


# About 30 s: two trainings on two ranks.
@pytest.mark.slow
def test_a_rank_that_cannot_write_its_shard_stops_all_ranks(shards: Path, tmp_path: Path) -> None:
    text = on_two_ranks(shards, tmp_path, "blocked")
    for rank in (0, 1):
        assert f"refused on rank {rank}: cannot write checkpoint" in text
    assert "step-00000004" in text
    assert [path.name for path in (tmp_path / "blocked" / "checkpoints").iterdir()] == ["step-00000002"]


def test_sharded_checkpoints_need_fsdp() -> None:
    with pytest.raises(ValueError, match=r"engine\.checkpoint=sharded needs engine\.parallel=fsdp"):
        EngineConfig(checkpoint="sharded")
