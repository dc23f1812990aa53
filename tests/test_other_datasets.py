"""Pretraining, probes, fine-tuning, maps and cards of datasets that are not FLAIR-HUB, at the size of tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from other_dataset import CROPS, OPTICAL, RADAR, RGB, ROOFS, SPLIT, THERMAL, write_crops, write_roofs
from small_recipes import PRETRAIN

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.official.convert import to_official
from bocage.finetune.train import build_task, finetune
from bocage.shards.errors import InputError
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


def finetuning(manifest: Manifest, output: Path, *words: str) -> FinetuneConfig:
    """Configuration of a small model of all sensors of the shards, for their only label."""
    small = [word for word in PRETRAIN if word.startswith(("swin", "utae", "workers", "engine"))]
    settings = [f"shards={manifest.path}", f"output={output}", f"split={SPLIT}", "window=null", "batch_size=4"]
    settings += ["labels=[]", "modalities=[]", "engine.steps=4", "engine.evaluate_every=2"]
    return recipes.resolve(FinetuneConfig, ["recipe=finetune_quickstart", *small, *settings, *words])


# Some seconds each: four steps of a small model, evaluation and prediction of a few patches.
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dataset", LABELS)
def test_a_model_of_the_only_label_trains(
    dataset: str, norm: str, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    manifest, label = manifests[dataset], LABELS[dataset]
    auxiliary = f"auxiliary=[{SENSORS[dataset][1]}]"
    result = finetune(finetuning(manifest, tmp_path, f"decoder.norm={norm}", auxiliary))
    scheme = manifest.registry[label].schemes[0]
    assert result["labels"] == {
        label: {
            "level": 1,
            "grouping": "",
            "classes": list(scheme.classes),
            "unscored": list(scheme.unscored),
            "background": scheme.background,
        }
    }
    assert np.sum(result["test"][label]["confusion"]) == 4 * manifest.registry[label].size ** 2
    assert (tmp_path / "predictions" / "panels.png").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["split=split_1"], r"no split 'split_1'; splits: split_blocks; split=all takes every sample"),
        (["valid=val"], r"no sample has split_blocks = 'val'; values: test, train, valid"),
        ([f"tasks.{ROOFS}.grouping=flair_challenge"], r"groups the classes of FLAIR-HUB's COSIA only: leave it out"),
        ([f"tasks.{ROOFS}.level=2"], r"ROOFS has one level, not 2"),
        (["window=10.032"], r"THERMAL: 10.032 m are 38 px, which do not divide into the 4-px patches of its Swin"),
        (["labels=[COSIA]"], r"labels: COSIA is not a label of .*; its labels are ROOFS"),
    ],
)
def test_settings_of_flair_hub_are_refused_in_one_sentence(
    words: list[str], sentence: str, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        finetune(finetuning(manifests["roofs"], tmp_path / "run", *words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_official_models_are_for_flair_hub_only(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    words = ["recipe=official/lc_a", "labels=[]", "modalities=[]", f"split={SPLIT}"]
    for dataset, name in (("roofs", RGB), ("crops", OPTICAL)):
        config = recipes.resolve(FinetuneConfig, [*words, f"shards={manifests[dataset].path}", f"output={tmp_path}"])
        with pytest.raises(InputError, match=f"models of FLAIR-HUB, which read AERIAL_RGBI, .*: {name} of these"):
            finetune(replace(config, encoders={}))
    config = replace(finetuning(manifests["roofs"], tmp_path), decoder=UPerNetConfig())
    task = build_task(config, manifests["roofs"])
    with pytest.raises(InputError, match="official checkpoints are for FLAIR-HUB, which has no ORTHO_RGB"):
        to_official(task)
