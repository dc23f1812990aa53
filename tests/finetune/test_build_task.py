"""Models built from pretrained and random encoders with one seed differ only in the pretrained encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.train import build_task
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import save_encoder

AERIAL = "AERIAL_RGBI"
RECIPE = ("recipe=finetune_quickstart", f"modalities=[{AERIAL},SENTINEL2_TS]")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some seconds: three simulated patches as shards."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=3, seed=0, dates=(4, 5))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


def weights_of(manifest: Manifest, *overrides: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the model's weights and the next number of torch's generator."""
    torch.manual_seed(3)
    state = build_task(recipes.resolve(FinetuneConfig, [*RECIPE, *overrides]), manifest).state_dict()
    return state, torch.rand(1)


def assert_only_the_encoder_differs(manifest: Manifest, source: str) -> None:
    scratch, random_after_scratch = weights_of(manifest)
    pretrained, random_after_pretrained = weights_of(manifest, f"encoders.{AERIAL}={source}")
    assert torch.equal(random_after_scratch, random_after_pretrained)
    different = {name for name in scratch if not torch.equal(scratch[name], pretrained[name])}
    assert different
    assert all(name.startswith(f"model.encoders.{AERIAL}.") for name in different)


def test_a_saved_encoder_replaces_the_encoder_only(manifest: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(11)
    task = build_task(recipes.resolve(FinetuneConfig, list(RECIPE)), manifest)
    save_encoder(task.model.encoder(AERIAL), tmp_path / "encoder")
    assert_only_the_encoder_differs(manifest, str(tmp_path / "encoder"))


def test_imagenet_weights_replace_the_encoder_only(manifest: Manifest, tmp_path: Path) -> None:
    swin = recipes.resolve(FinetuneConfig, list(RECIPE)).swin
    weights = timm.create_model(swin.name, **swin.options).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "weights.safetensors")
    assert_only_the_encoder_differs(manifest, f"imagenet:{tmp_path / 'weights.safetensors'}")


@pytest.mark.parametrize("source", ["imagenet:", "hf:", "''"])
def test_an_incomplete_source_names_the_key_and_the_forms(manifest: Manifest, source: str) -> None:
    """An empty shell variable leaves a colon at the end, which YAML reads as a mapping."""
    with pytest.raises(InputError, match=f"encoders.{AERIAL}: .*hf:org/name, imagenet or imagenet:FILE"):
        weights_of(manifest, f"encoders.{AERIAL}={source}")


def test_labels_are_named_where_the_shards_have_several(manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"labels is not set: .* has AERIAL_LABEL-COSIA, ALL_LABEL-LPIS; name those"):
        weights_of(manifest, "labels=[]")
