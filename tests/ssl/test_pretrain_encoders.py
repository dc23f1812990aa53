"""Initial weights and architectures of encoders in pretraining (``encoders=``, ``architectures=``)."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import required_modalities
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.pretrain import build_pretraining_model
from bocage.ssl.pretrain_config import PretrainConfig

SENSORS = ("AERIAL_RGBI", "SENTINEL2_TS")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some seconds: patches are simulated and sharded."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "tree", patches=3, seed=0, dates=(4, 5))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards")


def resolved(*overrides: str) -> PretrainConfig:
    return recipes.resolve(PretrainConfig, ["recipe=quickstart", f"modalities=[{','.join(SENSORS)}]", *overrides])


def build_model(manifest: Manifest, *overrides: str, seed: int = 3) -> PretrainingModel:
    torch.manual_seed(seed)
    return build_pretraining_model(resolved(*overrides), manifest)


def saved_encoders(manifest: Manifest, folder: Path) -> list[str]:
    """Save encoders of another run; return the arguments that start from them."""
    model = build_model(manifest, "masking.images=mask_token", seed=8)
    for name in SENSORS:
        save_encoder(model.encoder(name), folder / name)
    return [f"encoders.{name}={folder / name}" for name in SENSORS]


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_encoders_start_from_saved_encoders(images: str, manifest: Manifest, tmp_path: Path) -> None:
    overrides = saved_encoders(manifest, tmp_path)
    before = build_model(manifest, "masking.images=mask_token", seed=8).state_dict()
    scratch = build_model(manifest, f"masking.images={images}").state_dict()
    state = build_model(manifest, f"masking.images={images}", *overrides).state_dict()
    for name, tensor in state.items():
        pretrained = name.startswith("encoders.") and not name.endswith("mask_token")
        assert torch.equal(tensor, (before if pretrained else scratch)[name]), name


def test_the_resolved_recipe_contains_the_initial_weights(manifest: Manifest, tmp_path: Path) -> None:
    config = resolved(*saved_encoders(manifest, tmp_path))
    assert asdict(config)["encoders"] == {name: str(tmp_path / name) for name in SENSORS}
    assert str(tmp_path / SENSORS[0]) in recipes.to_yaml(config)


def test_encoders_start_from_imagenet_weights(manifest: Manifest, tmp_path: Path) -> None:
    swin = resolved().swin
    options: dict[str, Any] = dict(swin.options)
    weights = timm.create_model(swin.name, **options).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "weights.safetensors")
    model = build_model(manifest, f"encoders.AERIAL_RGBI=imagenet:{tmp_path / 'weights.safetensors'}")
    state = model.encoder("AERIAL_RGBI").state_dict()
    bias = "layers_3.blocks.0.mlp.fc1.bias"
    assert torch.equal(state[f"model.{bias}"], weights[bias.replace("layers_", "layers.")])
    assert model.encoder("AERIAL_RGBI").spec == manifest.input_spec("AERIAL_RGBI")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["encoders.SPOT_RGBI=x"], r"encoders.SPOT_RGBI: not one of the modalities of this run"),
        (["architectures.SPOT_RGBI.name=x"], r"architectures.SPOT_RGBI: not one of the modalities of this run"),
        (["encoders.AERIAL_RGBI=nowhere"], r"encoders.AERIAL_RGBI=nowhere: nowhere is not a folder"),
        (["encoders.SENTINEL2_TS=imagenet"], r"encoders.SENTINEL2_TS=imagenet: .* not for series"),
        (["swin.options.window_size=4"], r"AERIAL_RGBI: .* window_size = 8, here 4"),
        (["utae.options.d_k=2"], r"SENTINEL2_TS: .* d_k = 4, here 2"),
    ],
)
def test_encoders_that_do_not_fit_raise_a_one_line_message(
    overrides: list[str], sentence: str, manifest: Manifest, tmp_path: Path
) -> None:
    if not any(override.startswith("encoders") for override in overrides):
        overrides = [*overrides, *saved_encoders(manifest, tmp_path)]
    with pytest.raises(InputError, match=sentence) as caught:
        build_model(manifest, *overrides)
    assert "\n" not in str(caught.value)


def test_architecture_of_a_single_modality(manifest: Manifest) -> None:
    options = "{embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2]}"
    model = build_model(manifest, f"architectures.AERIAL_RGBI.options={options}")
    assert model.encoder("AERIAL_RGBI").widths == (16, 32, 64, 128)


def test_mask_units_can_be_smaller_than_those_of_the_shards(manifest: Manifest) -> None:
    model = build_model(manifest, "masking.units.AERIAL_RGBI=16")
    assert model.modalities["AERIAL_RGBI"].unit == 16
    assert model.modalities["SENTINEL2_TS"].unit == manifest.registry["SENTINEL2_TS"].unit
    modalities = required_modalities(manifest.registry, list(SENSORS), [])
    batch = next(iter(evaluation_batches(manifest, np.arange(2), modalities, batch_size=2, window=51.2)))
    encoded = model.encode_batch(batch, augment=False)
    units = encoded.masks["AERIAL_RGBI"].units
    assert units is not None and units.shape == (2, 16, 16)
    assert torch.isfinite(model(batch)[0])
    for wrong, message in (
        ("AERIAL_RGBI=15", "masking.units.AERIAL_RGBI=15: does not divide its 512 px"),
        ("SPOT_RGBI=8", "masking.units.SPOT_RGBI: not one of the modalities of this run"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            build_model(manifest, f"masking.units.{wrong}")
