"""Pretraining, probes, fine-tuning, maps and cards of datasets that are not FLAIR-HUB, at the size of tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from other_dataset import CROPS, OPTICAL, RADAR, RGB, ROOFS, SPLIT, THERMAL, write_crops, write_roofs
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.shards.format.manifest import Manifest
from bocage.ssl.encoders.export import load_encoder
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import OBJECTIVES, PretrainConfig

LABELS = {"roofs": ROOFS, "crops": CROPS}
SENSORS = {"roofs": (RGB, THERMAL), "crops": (OPTICAL, RADAR)}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Shards of 16 patches of each dataset."""
    folder = tmp_path_factory.mktemp("data")
    return {"roofs": write_roofs(folder / "roofs", 16), "crops": write_crops(folder / "crops")}


def pretraining(manifest: Manifest, output: Path, *words: str) -> PretrainConfig:
    settings = [f"shards={manifest.path}", f"output={output}", f"split={SPLIT}", "window=null", "batch_size=4"]
    return recipes.resolve(PretrainConfig, [*PRETRAIN, *settings, "engine.steps=3", *words])


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# About 4 s for each objective: three steps of two small encoders, and probes.
@pytest.mark.parametrize("dataset", LABELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(dataset: str, objective: str, manifests: dict[str, Manifest], tmp_path: Path) -> None:
    words = ["weights.masked=0", f"weights.{objective}=1", "latent.decoder.width=32", "latent.decoder.heads=4"]
    words += [f"probe.label={LABELS[dataset]}", "probe.patches=8", "engine.evaluate_every=3"]
    assert pretrain(pretraining(manifests[dataset], tmp_path, *words)).exit_code == 0
    lines = records(tmp_path)
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    for name in SENSORS[dataset]:
        assert 0 <= lines[-1][f"evaluation/linear_miou/{name}"] <= 100
        spec = load_encoder(tmp_path / "encoders" / name).spec
        assert spec.bands == tuple(band.name for band in manifests[dataset].registry[name].bands)
    assert (tmp_path / "reconstructions").exists() == (objective == "masked")
