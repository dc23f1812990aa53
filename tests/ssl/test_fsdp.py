"""Ranks that divide the weights train to what ranks with all weights do, and save and resume as they do."""

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
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.checkpoint.files import load_tensors
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
    return write_shards(Catalogue.open(folder / "tree"), folder / "shards").path


def on_two_ranks(shards: Path, output: Path, *cases: str) -> str:
    """Run cases of the script; returns what it said."""
    words = [
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
        [sys.executable, *words, *cases], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stderr


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one: Path, other: Path) -> None:
    """The losses of two runs agree, and their gradients nearly: AdamW also follows the sign of next to nothing."""
    first, second = records(one), records(other)
    assert len(first) == len(second) > 0
    for line, match in zip(first, second, strict=True):
        assert line["loss"] == pytest.approx(match["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(match["gradient_norm"], rel=1e-2)


def assert_same(one: Path, other: Path) -> None:
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


# About 25 s: torchrun starts two interpreters, which train twice; batches of one sample lack sensors now and then.
def test_divided_weights_train_as_whole_ones(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "ddp", "fsdp", "gather")
    assert_alike(tmp_path / "ddp", tmp_path / "fsdp")
    saved = tmp_path / "fsdp" / STEP
    parts = sorted(path.name for path in saved.glob("optimizer-*"))
    assert parts == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    listed = json.loads((saved / "complete.json").read_text())["files"]
    assert set(parts) < set(listed)
    # A rank has half of what there is.
    sizes = [(saved / name).stat().st_size for name in parts]
    whole = (tmp_path / "ddp" / STEP / "optimizer.pt").stat().st_size
    assert max(sizes) < 0.6 * whole
    assert (saved / "optimizer.pt").stat().st_size < 0.3 * whole
    for name in ("model", "ema"):
        one, other = (load_file(tmp_path / run / STEP / f"{name}.safetensors") for run in ("ddp", "fsdp"))
        assert one.keys() == other.keys()
        difference = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
        assert difference < 1e-3, name
    for name in ("AERIAL_RGBI", "SENTINEL2_TS"):
        assert (tmp_path / "fsdp" / "encoders" / name / "model.safetensors").is_file()


# About 2 min: several trainings on two ranks.
@pytest.mark.slow
def test_divided_checkpoints_resume_whole_or_divided_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "fsdp", "parts", "images", "half")
    assert_same(tmp_path / "fsdp" / STEP / "model.safetensors", tmp_path / "parts" / STEP / "model.safetensors")
    assert_same(tmp_path / "fsdp" / STEP / "ema.safetensors", tmp_path / "parts" / STEP / "ema.safetensors")
    assert not list((tmp_path / "parts" / STEP).glob("optimizer-*"))
    state = load_tensors(tmp_path / "parts" / STEP / "optimizer.pt")["optimizer"]["state"]
    assert all(torch.is_tensor(value) for values in state.values() for value in values.values())
    # One rank of as many samples a step goes on as the two would.
    words = [
        *PRETRAINING,
        IMAGES,
        f"shards={shards}",
        f"output={tmp_path / 'half'}",
        "engine.accumulation=4",
        "engine.resume_allow=['*']",
    ]
    pretrain(recipes.resolve(PretrainConfig, words))
    assert_alike(tmp_path / "images", tmp_path / "half")


# About a minute: several trainings on two ranks.
@pytest.mark.slow
def test_other_optimisers_compiled_blocks_and_fine_tuning_divide_too(shards: Path, tmp_path: Path) -> None:
    on_two_ranks(shards, tmp_path, "lars_ddp", "lars", "compiled", "tuned", "tuned_fsdp")
    assert_alike(tmp_path / "lars_ddp", tmp_path / "lars")
    assert_alike(tmp_path / "tuned", tmp_path / "tuned_fsdp")
    assert records(tmp_path / "compiled")
    scores = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("tuned", "tuned_fsdp")]
    assert scores[0]["valid"]["strict"]["miou"] == pytest.approx(scores[1]["valid"]["strict"]["miou"], abs=0.1)


# About 30 s: two trainings on two ranks.
@pytest.mark.slow
def test_a_rank_that_cannot_write_its_part_stops_all_and_spares_what_was_saved(shards: Path, tmp_path: Path) -> None:
    said = on_two_ranks(shards, tmp_path, "blocked")
    for rank in (0, 1):
        assert f"refused on rank {rank}: cannot write checkpoint" in said
    assert "step-00000004" in said
    assert [path.name for path in (tmp_path / "blocked" / "checkpoints").iterdir()] == ["step-00000002"]


def test_parts_need_something_to_divide() -> None:
    with pytest.raises(ValueError, match=r"engine\.checkpoint=sharded needs engine\.parallel=fsdp"):
        EngineConfig(checkpoint="sharded")
