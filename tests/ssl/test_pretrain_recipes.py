"""Pretraining recipes: their objectives, training of the quickstart recipes, messages about wrong values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.evaluation.probe import Probe, ProbeConfig
from bocage.ssl.pretrain import build_pretraining_model, pretrain
from bocage.ssl.pretrain_config import PretrainConfig

OBJECTIVES = {
    "mae_multimodal": {"masked", "contrastive"},
    "mae_aerial": {"masked"},
    "own_imagery": {"masked"},
    "mae_sentinel": {"masked", "contrastive"},
    "contrastive_crossmodal": {"contrastive"},
    "jepa_multimodal": {"latent"},
}


def resolved(recipe: str, *overrides: str) -> PretrainConfig:
    return recipes.resolve(PretrainConfig, [f"recipe={recipe}", *overrides])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some seconds: patches are simulated and sharded."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=4, seed=3, dates=(3, 4))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


def test_all_pretraining_recipes_are_tested() -> None:
    quickstart = {f"{name}_quickstart" for name in OBJECTIVES if name != "mae_multimodal"} | {"quickstart"}
    assert {
        name for name in recipes.list_recipes() if not name.startswith(("finetune", "label_efficiency", "official/"))
    } == set(OBJECTIVES) | quickstart


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_and_its_quickstart_have_the_same_objectives(name: str) -> None:
    small = resolved("quickstart" if name == "mae_multimodal" else f"{name}_quickstart")
    full = resolved(name)
    assert {objective for objective, weight in full.weights.items() if weight} == OBJECTIVES[name]
    assert small.weights == full.weights and small.modalities == full.modalities
    assert small.engine.steps < full.engine.steps / 50
    assert small.swin.options["embed_dim"] == 32 and full.swin.name.startswith(("swin_base", "swin_tiny"))


# Some 8 s each: up to seven sensors take two steps. The slow ones have the objectives of the first or a subset of them.
@pytest.mark.parametrize(
    "name",
    [
        "mae_multimodal",
        *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES if name != "mae_multimodal"),
    ],
)
def test_quickstart_recipes_train(name: str, manifest: Manifest, tmp_path: Path) -> None:
    recipe = "quickstart" if name == "mae_multimodal" else f"{name}_quickstart"
    overrides = [
        f"shards={manifest.path}",
        f"output={tmp_path}",
        "split=all",
        "batch_size=2",
        "workers=0",
        "reconstructions=1",
    ]
    overrides += ["engine.steps=2", "engine.log_every=1", "engine.optimizer.warmup_steps=0"]
    pretrain(resolved(recipe, *overrides))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(lines[-1][objective] > 0 for objective in OBJECTIVES[name])
    assert (tmp_path / "reconstructions").exists() == ("masked" in OBJECTIVES[name])


def test_contrast_of_a_single_sensor_raises(manifest: Manifest) -> None:
    config = resolved("quickstart", f"shards={manifest.path}", "modalities=[SPOT_RGBI]")
    with pytest.raises(InputError, match=r"modalities has SPOT_RGBI alone: add one, or set weights\.contrastive=0"):
        build_pretraining_model(config, manifest)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["batch_size=1"],
            r"batch_size=1 on one rank leaves no negatives for weights.contrastive: .* or contrastive.queue=4096",
        ),
        (
            ["batch_size=1", "weights.contrastive=0", "weights.pooled_contrast=1"],
            r"no negatives for weights.pooled_contrast",
        ),
        (["masking.modality_ratio=1"], r"masking.modality_ratio=1 leaves one per sample"),
        (["contrastive.cell=0.1"], r"contrastive.cell=0.1: the finest feature map, of AERIAL_RGBI, has cells of 0.8 m"),
        (["contrastive.cell=1000"], r"contrastive.cell=1000: a patch is 102.4 m wide; use contrastive.cell=102.4 or"),
        (["probe.label=AERIAL_LABEL-COSIA", "probe.cell=0.3"], r"probe.cell=0.3 .*probe.patches=64.* 262144"),
        (["probe.label=AERIAL_LABEL-COSIA", "probe.cell=1000"], r"probe.cell=1000: .* 0.2 m, and a patch, 102.4 m"),
        (["probe.label=COSIA"], r"probe.label=COSIA is not a label of .*; labels: AERIAL_LABEL-COSIA"),
        (["output="], r"output= is empty"),
        (["modalities=[AERIAL]"], r"unknown modality 'AERIAL'; did you mean AERIAL_RGBI\?"),
        (["modalities=[spot_rgbi]"], r"did you mean SPOT_RGBI\?"),
    ],
)
def test_runs_that_cannot_learn_stop_before_they_start(
    overrides: list[str], sentence: str, manifest: Manifest, tmp_path: Path
) -> None:
    chosen = any(override.startswith("modalities") for override in overrides)
    modalities = [] if chosen else ["modalities=[AERIAL_RGBI,SPOT_RGBI]"]
    config = resolved(
        "quickstart", f"shards={manifest.path}", f"output={tmp_path / 'run'}", "split=all", *modalities, *overrides
    )
    with pytest.raises(InputError, match=sentence):
        pretrain(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["probe.cell=0"], r"probe.cell=0.0 must be a positive number of metres"),
        (["contrastive.cell=inf"], r"contrastive.cell=inf must be a positive number of metres"),
        (["contrastive.temperature=inf"], r"contrastive.temperature=inf"),
        (["augment.offset=inf"], r"augment.offset=inf"),
        (["augment.date_jitter=400"], r"augment.date_jitter=400 must be between 0 and 182 days"),
        (["masked.decoder.heads=3"], r"masked.decoder.width=128"),
        (["latent.decoder.heads=3"], r"latent.decoder.width=256"),
        (
            ["engine.optimizer.learning_rate=-1"],
            r"command line: engine.optimizer.learning_rate must be positive",
        ),
        (["masking.ratio=1.5"], r"command line: masking.ratio=1.5 must lie"),
        (["modalities=[AERIAL_RGBI"], r"'modalities=\[AERIAL_RGBI' cannot be parsed: .*; close brackets and quotes"),
        (["swin.options={embed_dim:96,depths:[2,2,6,2]}"], r"'swin.options=.*' cannot be parsed"),
        (["weights={masked:1}"], r"'masked:1': in braces, write a space after each colon"),
        (["weights={masked:0.5}"], r"'masked:0.5': in braces, write a space after each colon"),
        (["masking=mask_token"], r"masking is a mapping, not a single value: set one of masking.images, masking.ratio"),
        (["masking.ratios=0.5"], r"masking.ratios is a mapping, not a single value: set masking.ratios.NAME"),
        (["modalities=AERIAL_RGBI"], r"modalities is a list: write modalities=\[AERIAL_RGBI\]"),
        (["seed=3"], r"did you mean 'engine.seed'\?"),
        (["learning_rate=3"], r"did you mean 'engine.optimizer.learning_rate'\?"),
        (["batchsize=3"], r"did you mean 'batch_size'\?"),
    ],
)
def test_a_wrong_value_names_its_full_key(overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resolved("quickstart", *overrides)


def test_probes_run_under_bfloat16_autocast(manifest: Manifest) -> None:
    config = resolved("quickstart", "modalities=[SPOT_RGBI]", "weights.contrastive=0")
    model = build_pretraining_model(config, manifest).eval()
    probe = Probe(manifest, ProbeConfig(label="AERIAL_LABEL-COSIA", patches=4, train="all", test="all"), "all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = probe.scores(model, batch_size=2, workers=0)
    whole = probe.scores(model, batch_size=2, workers=0)
    assert half.keys() == whole.keys()
    assert abs(half["linear_miou/SPOT_RGBI"] - whole["linear_miou/SPOT_RGBI"]) < 10
