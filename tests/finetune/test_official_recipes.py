"""Recipes of the published models and the challenges: their settings, and one training run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import load_segmentation
from bocage.finetune.official.convert import to_official
from bocage.finetune.train import build_task, finetune
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.engine.optim import OptimizerConfig, decay_groups, learning_rate_factor

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "official-models.md"
SPOT, S2, COSIA = "SPOT_RGBI", "SENTINEL2_TS", "AERIAL_LABEL-COSIA"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=6, seed=3, dates=(3, 4), gaps=0.3)
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


def resolved(*words: str) -> FinetuneConfig:
    return recipes.resolve(FinetuneConfig, list(words))


def test_the_table_of_the_docs_matches_the_recipes() -> None:
    rows = re.findall(r"^\| `(official/\w+)` \| ([^|]+) \|", DOCS.read_text(), flags=re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in recipes.list_recipes() if name.startswith("official/")} - {
        "official/base"
    }
    assert len(rows) == 13 + 11
    for name, sensors in rows:
        config = resolved(f"recipe={name}")
        assert config.modalities == sensors.split(", ")
        assert config.labels == [COSIA if "/lc_" in name else "ALL_LABEL-LPIS"]
        images = {sensor for sensor in config.modalities if FLAIR_HUB[sensor].role == "image"}
        assert config.encoders == dict.fromkeys(images, "imagenet")
        assert config.official
        optimizer = config.engine.optimizer
        assert (optimizer.learning_rate, optimizer.schedule, optimizer.weight_decay) == (5e-5, "one_cycle", 0.01)
        assert optimizer.warmup_steps == 0.2 * config.engine.steps


def test_one_cycle_equals_torch() -> None:
    config = OptimizerConfig(learning_rate=5e-5, schedule="one_cycle", warmup_steps=20)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.2, cycle_momentum=False, div_factor=1000)
    expected = []
    for _ in range(100):
        expected.append(float(theirs.get_last_lr()[0]))
        optimizer.step()
        if len(expected) < 100:
            theirs.step()
    assert np.allclose(
        [learning_rate_factor(step, 100, config) for step in range(100)], expected, rtol=1e-6, atol=1e-12
    )


def test_decay_all_decays_every_parameter() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    groups = decay_groups(module, OptimizerConfig(weight_decay=0.01, decay_all=True))
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.01, 4)]


@pytest.mark.slow
def test_an_official_model_trains_from_shards_to_maps(manifest: Manifest, tmp_path: Path) -> None:
    # Some ten seconds: Swin-T on SPOT, which is small, and the official U-TAE.
    torch.set_num_threads(1)
    words = [f"shards={manifest.path}", f"output={tmp_path / 'run'}", f"modalities=[{SPOT},{S2}]", "split=all"]
    words += [
        "swin.name=swin_tiny_patch4_window7_224",
        f"encoders.{SPOT}=scratch",
        "batch_size=2",
        "workers=0",
        "predictions=1",
    ]
    words += [
        "batch_size=2",
        "predictions=1",
        "engine.steps=2",
        "engine.tracker=none",
        "engine.optimizer.warmup_steps=1",
    ]
    words += ["engine.evaluate_every=0"]
    words += [f"auxiliary=[{S2}]"]
    result = finetune(resolved("recipe=official/lc_i", *words))
    held = [all(manifest.row(index)[f"length.{name}"] for name in (SPOT, S2)) for index in range(len(manifest))]
    assert 0 < sum(held) < len(held)
    assert result["patches"]["train"] == sum(held)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["valid"][COSIA]["official"]["oa"] >= 0
    model = load_segmentation(tmp_path / "run" / "model")
    assert model.model.official
    # The head of a series is trained if an auxiliary decoder reads it.
    torch.manual_seed(0)
    started = build_task(resolved("recipe=official/lc_i", *words), manifest).model
    heads = {name: value for name, value in started.named_parameters() if ".out_conv." in name}
    assert heads and all(value.requires_grad for value in heads.values())
    assert model.model.encoder(SPOT).spec.channels == ("NIR", "R", "G")
    assert not to_official(model)[1].missing


@pytest.mark.parametrize(
    "words", [["window=51.2"], ["decoder.width=32"], ["swin.options={embed_dim: 32}"], ["decoder.norm=group"]]
)
def test_settings_that_the_official_architecture_fixes_raise(words: list[str]) -> None:
    with pytest.raises(InputError, match="official=true has a fixed decoder and Swin and trains on whole patches"):
        resolved("recipe=official/lc_i", *words)


@pytest.mark.parametrize(
    ("name", "sensors"), [("flair1", ["AERIAL_RGBI", "DEM_ELEV"]), ("flair2", ["AERIAL_RGBI", S2])]
)
def test_the_challenges_have_twelve_scored_classes(name: str, sensors: list[str], manifest: Manifest) -> None:
    config = resolved(f"recipe=finetune_{name}", "swin.name=swin_tiny_patch4_window7_224")
    assert config.modalities == sensors
    assert len(manifest.split(config.split, config.train))
    scheme = build_task(config, manifest).targets[COSIA].scheme
    assert (len(scheme), len(scheme.scored), scheme.classes[12]) == (13, 12, "other")
