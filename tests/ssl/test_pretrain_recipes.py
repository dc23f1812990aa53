"""The recipes for pretraining: what they optimise, and that each of CPU size trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.flairhub import Catalogue
from bocage.shards.manifest import Manifest
from bocage.shards.scene import write_tree
from bocage.shards.writer import write_shards
from bocage.ssl.pretrain import PretrainConfig, build_task, pretrain

TERMS = {
    "mae_multimodal": {"masked", "contrastive"},
    "mae_aerial": {"masked"},
    "mae_sentinel": {"masked", "contrastive"},
    "contrastive_crossmodal": {"contrastive"},
    "jepa_multimodal": {"latent"},
}


def resolved(recipe: str, *words: str) -> PretrainConfig:
    return recipes.resolve(PretrainConfig, [f"recipe={recipe}", *words])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some seconds: patches are simulated and sharded."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=4, seed=3, dates=(3, 4))
    return write_shards(Catalogue.open(folder / "tree"), folder / "shards")


def test_every_recipe_for_pretraining_is_listed_here() -> None:
    small = {f"{name}_quickstart" for name in TERMS if name != "mae_multimodal"} | {"quickstart"}
    assert {name for name in recipes.names() if not name.startswith("finetune")} == set(TERMS) | small


@pytest.mark.parametrize("name", TERMS)
def test_a_recipe_and_its_small_one_optimise_the_same(name: str) -> None:
    small = resolved("quickstart" if name == "mae_multimodal" else f"{name}_quickstart")
    full = resolved(name)
    assert {term for term, weight in full.weights.items() if weight} == TERMS[name]
    assert small.weights == full.weights and small.modalities == full.modalities
    assert small.engine.steps < full.engine.steps / 100
    assert small.swin.options["embed_dim"] == 32 and full.swin.name.startswith("swin_base")


# Some 8 s each: seven sensors take two steps.
@pytest.mark.parametrize("name", TERMS)
def test_the_small_recipes_train(name: str, manifest: Manifest, tmp_path: Path) -> None:
    recipe = "quickstart" if name == "mae_multimodal" else f"{name}_quickstart"
    words = [f"shards={manifest.path}", f"output={tmp_path}", "split=all", "batch_size=2", "workers=0", "pictures=1"]
    words += ["engine.steps=2", "engine.log_every=1", "engine.optimizer.warmup_steps=0"]
    pretrain(resolved(recipe, *words))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(lines[-1][term] > 0 for term in TERMS[name])
    assert (tmp_path / "pictures").exists() == ("masked" in TERMS[name])


def test_one_sensor_alone_cannot_be_contrasted(manifest: Manifest) -> None:
    config = resolved("quickstart", f"shards={manifest.path}", "modalities=[SPOT_RGBI]")
    with pytest.raises(InputError, match=r"modalities has SPOT_RGBI alone: add one, or give weights\.contrastive=0"):
        build_task(config, manifest)
