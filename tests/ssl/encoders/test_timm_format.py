"""Saved Swins load in timm without bocage and give the same features, for all families, windows and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
V2_TWO_WINDOWS = "swinv2_base_window12to16_192to256"

CONFIGS = {
    "v1": EncoderConfig(name=V1, options=TINY),
    "v1 with a tag": EncoderConfig(name=f"{V1}.ms_in22k", options=TINY),
    "v1, other window and size": EncoderConfig(name=V1, options={**TINY, "window_size": 8, "img_size": 512}),
    "v1, rectangular image": EncoderConfig(name=V1, options={**TINY, "img_size": (96, 64)}),
    "v1, window per stage": EncoderConfig(name="swin_s3_tiny_224", options=TINY),
    "v1, fixed": EncoderConfig(name=V1, options=TINY, fixed_size=64),
    "v2": EncoderConfig(name=V2, options=TINY),
    "v2, other window and size": EncoderConfig(name=V2, options={**TINY, "window_size": 6, "img_size": 384}),
    "v2 from another window": EncoderConfig(name=V2_TWO_WINDOWS, options=TINY),
    "v2 with pretrained windows": EncoderConfig(name=V2, options={**TINY, "pretrained_window_sizes": [4, 4, 4, 2]}),
    "v2, fixed": EncoderConfig(name=V2_TWO_WINDOWS, options=TINY, fixed_size=64),
}


def saved(config: EncoderConfig, folder: Path, modality: str = "AERIAL_RGBI") -> Encoder:
    torch.manual_seed(0)
    channels = len(FLAIR_HUB[modality].channels)
    spec = InputSpec.from_modality(FLAIR_HUB[modality], tuple(0.5 + i for i in range(channels)), (1.5,) * channels)
    encoder = build_encoder(spec, config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # the blocks of an untrained v2 output zero
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_encoder(encoder, folder)
    return encoder


@pytest.mark.parametrize("case", list(CONFIGS))
def test_timm_computes_the_same(case: str, tmp_path: Path) -> None:
    encoder = saved(CONFIGS[case], tmp_path / "encoder")
    local = f"local-dir:{tmp_path / 'encoder'}"
    image = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        expected = encoder.features(image)
        features = timm.create_model(local, pretrained=True, features_only=True).eval()(image)
        classifier: Any = timm.create_model(local, pretrained=True).eval()
        whole = classifier.forward_intermediates(image, intermediates_only=True)
        ours = load_encoder(tmp_path / "encoder").features(image)
    for mine, listed, inner, loaded in zip(expected, features, whole, ours, strict=True):
        assert torch.equal(mine, listed.permute(0, 3, 1, 2))
        assert torch.equal(mine, inner)
        assert torch.equal(mine, loaded)


@pytest.mark.parametrize("case", ["v1, other window and size", "v2"])
def test_timm_adapts_the_first_convolution(case: str, tmp_path: Path) -> None:
    encoder = saved(CONFIGS[case], tmp_path / "encoder")
    local = f"local-dir:{tmp_path / 'encoder'}"
    three = timm.create_model(local, pretrained=True, features_only=True, in_chans=3).eval()
    stem = encoder.state_dict()["model.patch_embed.proj.weight"]
    torch.testing.assert_close(three.state_dict()["patch_embed.proj.weight"], stem[:, :3] * 4 / 3)
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert tuple(three(image)[0].shape) == (1, 24, 16, 16)


def test_statistics_are_in_the_config_of_timm(tmp_path: Path) -> None:
    saved(CONFIGS["v2"], tmp_path / "encoder", "DEM_ELEV")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())["pretrained_cfg"]
    assert config["mean"] == [0.5, 1.5]
    assert config["std"] == [1.5, 1.5]
    assert config["input_size"] == [2, 224, 224]
