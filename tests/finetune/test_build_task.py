"""Fine-tuning that starts from ImageNet differs from scratch in the encoder alone, down to the last random draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from bocage import recipes
from bocage.finetune.config import FinetuneConfig
from bocage.finetune.train import build_task
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards

AERIAL = "AERIAL_RGBI"
WORDS = ("recipe=finetune_quickstart", f"modalities=[{AERIAL},SENTINEL2_TS]")


def weights_of(manifest: Manifest, *words: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's weights, and what the generator gives next."""
    torch.manual_seed(3)
    state = build_task(recipes.resolve(FinetuneConfig, [*WORDS, *words]), manifest).state_dict()
    return state, torch.rand(1)


def test_imagenet_replaces_the_encoder_and_nothing_else(tmp_path: Path) -> None:
    """Some seconds: patches are simulated and sharded."""
    write_tree(tmp_path / "tree", patches=3, seed=0, dates=(4, 5))
    manifest = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    own = recipes.resolve(FinetuneConfig, list(WORDS)).swin
    plain = timm.create_model(own.name, **own.options).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, tmp_path / "weights.safetensors")
    scratch, drawn = weights_of(manifest)
    found, drawn_after = weights_of(manifest, f"encoders.{AERIAL}=imagenet:{tmp_path / 'weights.safetensors'}")
    assert torch.equal(drawn, drawn_after)
    different = {name for name in scratch if not torch.equal(scratch[name], found[name])}
    assert different
    assert all(name.startswith(f"model.encoders.{AERIAL}.") for name in different)


@pytest.mark.parametrize("source", ["imagenet:", "hf:", "''"])
def test_an_unfinished_source_is_one_sentence(tmp_path: Path, source: str) -> None:
    """An empty shell variable leaves a colon at the end, which YAML reads as a mapping."""
    write_tree(tmp_path / "tree", patches=1, seed=0, dates=(4, 5))
    manifest = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    with pytest.raises(InputError, match=f"encoders.{AERIAL}: give a folder, hf:org/name, imagenet or imagenet:FILE"):
        weights_of(manifest, f"encoders.{AERIAL}={source}")
