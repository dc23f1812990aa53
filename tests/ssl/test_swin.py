"""Swin encoders: timm's own features, at any size, with any bands, with and without hidden tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.normalize import InputSpec
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.registry import build_encoder
from bocage.ssl.encoders.swin import SwinEncoder

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def input_spec(name: str) -> InputSpec:
    modality = FLAIR_HUB[name]
    channels = len(modality.channels)
    return InputSpec.of(modality, (0.0,) * channels, (1.0,) * channels)


def build(name: str = V1, mask_token: bool = False, in_channels: int = 4, **options: Any) -> SwinEncoder:
    torch.manual_seed(0)
    return SwinEncoder(in_channels, name, {**TINY, **options}, mask_token).eval()


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 48), (64, 128), (100, 100), (256, 256)])
def test_maps_of_any_size(name: str, size: tuple[int, int]) -> None:
    encoder = build(name)
    assert encoder.widths == (16, 32, 64, 128)
    assert encoder.strides == (4, 8, 16, 32)
    with torch.no_grad():
        maps = encoder(torch.randn(2, 4, *size))
    for m, width, stride in zip(maps, encoder.widths, encoder.strides, strict=True):
        assert tuple(m.shape) == (2, width, -(-size[0] // stride), -(-size[1] // stride))
        assert bool(m.isfinite().all())


@pytest.mark.parametrize("name", [V1, V2])
def test_features_are_timm_s(name: str) -> None:
    encoder = build(name)
    plain = timm.create_model(
        name, features_only=True, in_chans=4, always_partition=True, strict_img_size=False, **TINY
    )
    plain.eval().load_state_dict(encoder.model.state_dict(), strict=True)
    image = torch.randn(1, 4, 96, 96)
    with torch.no_grad():
        for mine, theirs in zip(encoder(image), plain(image), strict=True):
            torch.testing.assert_close(mine, theirs.permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("name", [V1, V2])
def test_an_empty_mask_changes_nothing_and_hidden_pixels_have_no_influence(name: str) -> None:
    encoder = build(name, mask_token=True)
    image = torch.randn(2, 4, 64, 64)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    with torch.no_grad():
        for plain, masked in zip(encoder(image), encoder.features(image, mask=mask)):
            torch.testing.assert_close(masked, plain, rtol=0, atol=0)
        mask[:, 8:] = True
        other = image.clone()
        other[:, :, 32:] = torch.randn(2, 4, 32, 64)
        for first, second in zip(encoder.features(image, mask=mask), encoder.features(other, mask=mask)):
            torch.testing.assert_close(second, first, rtol=0, atol=0)
        assert not torch.equal(encoder.features(image, mask=mask)[0], encoder(image)[0])


def test_the_mask_token_learns_and_exists_only_when_asked_for() -> None:
    encoder = build(mask_token=True)
    encoder.features(torch.randn(1, 4, 32, 32), mask=torch.ones(1, 8, 8, dtype=torch.bool))[-1].sum().backward()
    assert encoder.mask_token is not None
    assert encoder.mask_token.grad is not None
    plain = build()
    assert "mask_token" not in dict(plain.named_parameters())
    with pytest.raises(TypeError, match="mask_token"):
        plain.features(torch.randn(1, 4, 32, 32), mask=torch.ones(1, 8, 8, dtype=torch.bool))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for enable in (False, True):
        encoder = build(drop_path_rate=0.0).train()
        encoder.set_gradient_checkpointing(enable)
        torch.manual_seed(1)
        encoder(torch.randn(1, 4, 64, 64))[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "AERIAL-RLT_PAN", "DEM_ELEV", "SPOT_RGBI"])
def test_every_image_modality(name: str) -> None:
    spec = input_spec(name)
    encoder = build_encoder(spec, EncoderConfig(options=TINY)).eval()
    assert encoder.spec is spec
    assert len(encoder(torch.randn(1, len(spec.channels), 32, 32))) == 4


@pytest.mark.parametrize(
    ("modality", "config", "sentence"),
    [
        ("AERIAL_RGBI", {"name": "swin_tinny_patch4_window7_224"}, "swin_tiny_patch4_window7_224"),
        ("AERIAL_RGBI", {"name": "resnet50"}, "not a timm Swin"),
        ("AERIAL_RGBI", {"options": {"window_sise": 4}}, "window_size"),
        ("AERIAL_RGBI", {"options": {"in_chans": 3}}, "in_chans"),
        ("AERIAL_RGBI", {"options": {"depths": 3}}, "cannot be built"),
        ("AERIAL_RGBI", {"architecture": "utae"}, "AERIAL_RGBI is an image"),
        ("AERIAL_RGBI", {"architecture": "vit"}, "vit"),
        ("SENTINEL2_TS", {"architecture": "swin"}, "SENTINEL2_TS is a time series"),
        ("SENTINEL2_TS", {"architecture": "utae", "options": {"n_heads": 8}}, "did you mean 'n_head'"),
        ("SENTINEL2_TS", {"architecture": "utae", "options": {"n_head": 0}}, "cannot be built"),
    ],
)
def test_wrong_configurations_end_in_one_sentence(modality: str, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build_encoder(input_spec(modality), EncoderConfig(**config))


def test_sides_must_divide_into_patches() -> None:
    with pytest.raises(InputError, match="30 x 32 px"):
        build()(torch.randn(1, 4, 30, 32))
