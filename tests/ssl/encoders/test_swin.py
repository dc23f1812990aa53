"""Swin encoders give timm's features at any size, with any bands, with and without masked tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.swin import SwinEncoder, list_swin_names
from bocage.ssl.encoders.timm_format import ANY_SIZE_ARGS

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def input_spec(name: str) -> InputSpec:
    modality = FLAIR_HUB[name]
    channels = len(modality.channels)
    return InputSpec.from_modality(modality, (0.0,) * channels, (1.0,) * channels)


def build(name: str = V1, mask_token: bool = False, in_channels: int = 4, **options: Any) -> SwinEncoder:
    torch.manual_seed(0)
    return perturbed(SwinEncoder(in_channels, name, {**TINY, **options}, mask_token))


def perturbed(encoder: SwinEncoder) -> SwinEncoder:
    """Perturb all weights, because the blocks of an untrained v2 output zero."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def timm_maps(name: str, weights: dict[str, torch.Tensor], image: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
    """Compute the feature maps of timm's model with these weights, channels first."""
    model = timm.create_model(name, features_only=True, in_chans=image.shape[1], **{**TINY, **arguments}).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return [maps.permute(0, 3, 1, 2) for maps in model(image)]


def assert_equal_maps(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", list_swin_names())
def test_features_equal_timm_for_every_name(name: str) -> None:
    encoder = build(name)
    image = torch.randn(1, 4, 64, 96)
    with torch.no_grad():
        found = encoder(image)
    assert [tuple(maps.shape[1:]) for maps in found] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert_equal_maps(found, timm_maps(name, encoder.model.state_dict(), image, **ANY_SIZE_ARGS))


@pytest.mark.parametrize("name", [V1, "swin_base_patch4_window12_384", V2, "swinv2_tiny_window16_256"])
@pytest.mark.parametrize(
    "size",
    [(4, 4), (16, 8), (64, 64), (64, 128), (100, 36), (128, 128), (256, 256), (384, 384), (448, 448), (512, 512)],
)
def test_one_set_of_weights_serves_every_size(name: str, size: tuple[int, int]) -> None:
    """The maps equal those of a model that timm builds for this size, with static attention masks."""
    encoder = build(name, img_size=256)
    assert encoder.widths == (16, 32, 64, 128)
    assert encoder.strides == (4, 8, 16, 32)
    image = torch.randn(1, 4, *size)
    with torch.no_grad():
        found = encoder(image)
    for maps, width, stride in zip(found, encoder.widths, encoder.strides, strict=True):
        assert tuple(maps.shape) == (1, width, -(-size[0] // stride), -(-size[1] // stride))
        assert bool(maps.isfinite().all())
    weights = encoder.model.state_dict()
    assert_equal_maps(found, timm_maps(name, weights, image, img_size=size, always_partition=True))


def test_timm_has_pretrained_weights_for_every_name() -> None:
    for name in list_swin_names():
        pretrained = timm.models.get_pretrained_cfg(name)
        assert pretrained is not None and pretrained.hf_hub_id is not None
        assert pretrained.hf_hub_id.startswith("timm/swin")


@pytest.mark.parametrize("in_channels", [1, 2, 10])
def test_any_band_count(in_channels: int) -> None:
    with torch.no_grad():
        assert len(build(in_channels=in_channels)(torch.randn(1, in_channels, 32, 32))) == 4


@pytest.mark.parametrize("name", [V1, V2, "swinv2_base_window12to16_192to256"])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_fixed_size_equals_timm(name: str, size: int) -> None:
    encoder = perturbed(SwinEncoder(3, name, TINY, fixed_size=size))
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        found = encoder(image)
    assert_equal_maps(found, timm_maps(name, encoder.model.state_dict(), image, img_size=size))
    with pytest.raises(InputError, match=f"built for {size} px only"):
        encoder(torch.randn(1, 3, size, 2 * size))


def test_fixed_size_in_the_configuration() -> None:
    encoder = build_encoder(input_spec("AERIAL_RGBI"), EncoderConfig(options=TINY, fixed_size=64))
    assert encoder.state_dict()["model.layers_3.blocks.0.attn.relative_position_bias_table"].shape == (9, 4)
    with pytest.raises(InputError, match="for images"):
        build_encoder(input_spec("SENTINEL2_TS"), EncoderConfig(architecture="utae", fixed_size=64))
    with pytest.raises(InputError, match="not both"):
        build_encoder(input_spec("AERIAL_RGBI"), EncoderConfig(options={**TINY, "img_size": 64}, fixed_size=64))


def test_v2_keeps_pretrained_window_sizes() -> None:
    """They scale the offsets from which position biases are computed, so the weights depend on them."""
    name = "swinv2_base_window12to16_192to256"
    encoder = build(name)
    trained_with = [encoder.get_submodule(f"model.layers_{i}.blocks.0.attn").pretrained_window_size for i in range(4)]
    assert trained_with == [(12, 12), (12, 12), (12, 12), (6, 6)]
    other = build(name, pretrained_window_sizes=[8, 8, 8, 4])
    other.load_state_dict(encoder.state_dict())
    image = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(encoder(image)[0], other(image)[0])


@pytest.mark.parametrize("name", [V1, V2])
def test_empty_mask_changes_nothing_and_masked_pixels_have_no_influence(name: str) -> None:
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


def test_mask_token_is_trained_and_optional() -> None:
    encoder = build(mask_token=True)
    encoder.features(torch.randn(1, 4, 32, 32), mask=torch.ones(1, 8, 8, dtype=torch.bool))[-1].sum().backward()
    assert encoder.mask_token is not None
    assert encoder.mask_token.grad is not None
    plain = build()
    assert "mask_token" not in dict(plain.named_parameters())
    with pytest.raises(TypeError, match="mask_token"):
        plain.features(torch.randn(1, 4, 32, 32), mask=torch.ones(1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize("name", [V1, V2])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients, computed = [], []
    for enable in (False, True):
        encoder = build(name, mask_token=True, drop_path_rate=0.0).train()
        encoder.set_gradient_checkpointing(enable)
        calls: list[int] = []
        for stage in range(4):
            attention = encoder.get_submodule(f"model.layers_{stage}.blocks.0.attn")
            attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        mask = torch.rand(1, 16, 16) < 0.5
        encoder(torch.randn(1, 4, 64, 64), mask)[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
        computed.append(len(calls))
    assert computed == [4, 8]
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "AERIAL-RLT_PAN", "DEM_ELEV", "SPOT_RGBI"])
def test_every_image_modality(name: str) -> None:
    spec = input_spec(name)
    encoder = build_encoder(spec, EncoderConfig(options=TINY)).eval()
    assert encoder.spec is spec
    assert len(encoder(torch.randn(1, len(spec.channels), 32, 32))) == 4


@pytest.mark.parametrize(
    ("modality", "config", "message"),
    [
        ("AERIAL_RGBI", {"name": "swin_tinny_patch4_window7_224"}, "swin_tiny_patch4_window7_224"),
        ("AERIAL_RGBI", {"name": "resnet50"}, "not a timm Swin"),
        ("AERIAL_RGBI", {"name": f"{V1}.ms_in2k"}, f"available: {V1}.ms_in1k"),
        ("AERIAL_RGBI", {"options": {"window_sise": 4}}, "window_size"),
        ("AERIAL_RGBI", {"options": {"in_chans": 3}}, "in_chans"),
        ("AERIAL_RGBI", {"options": {"depths": 3}}, "cannot be built"),
        ("AERIAL_RGBI", {"architecture": "utae"}, "AERIAL_RGBI is an image"),
        ("AERIAL_RGBI", {"architecture": "vit"}, "vit"),
        ("SENTINEL2_TS", {"architecture": "swin"}, "SENTINEL2_TS is a time series"),
        ("SENTINEL2_TS", {"architecture": "utae", "options": {"n_heads": 8}}, "did you mean 'n_head'"),
        ("SENTINEL2_TS", {"architecture": "utae", "options": {"n_head": 0}}, "n_head = 0 is not"),
        ("AERIAL_RGBI", {"options": {"window_size": [4, 4, 65, 4]}}, "window_size"),
        ("AERIAL_RGBI", {"options": {"window_size": [[7, 0]] * 4}}, "window_size"),
    ],
)
def test_wrong_configurations_raise_input_error(modality: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_encoder(input_spec(modality), EncoderConfig(**config))


@pytest.mark.parametrize("size", [(30, 32), (10, 10), (1, 1), (3, 50)])
def test_images_of_any_size_have_maps_of_their_extent(size: tuple[int, int]) -> None:
    encoder, larger = build(), [-(-side // 4) * 4 for side in size]
    constant = torch.randn(1, 4, 1, 1)
    with torch.no_grad():
        maps, expected = encoder(constant.expand(1, 4, *size)), encoder(constant.expand(1, 4, *larger))
    for features, enlarged, stride in zip(maps, expected, encoder.strides, strict=True):
        assert tuple(features.shape[-2:]) == (-(-size[0] // stride), -(-size[1] // stride))
        torch.testing.assert_close(features, enlarged)


def test_masked_images_divide_into_patches() -> None:
    with pytest.raises(InputError, match="30 x 32 px does not divide into Swin's 4-px patches, as masks need"):
        build(mask_token=True)(torch.randn(1, 4, 30, 32), torch.zeros(1, 8, 8, dtype=torch.bool))
