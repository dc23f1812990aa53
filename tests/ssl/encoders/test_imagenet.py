"""Load ImageNet weights into encoders of other bands: first convolution, keys, kinds of files, and errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.imagenet import channel_wavelengths, colour_weights, load_imagenet
from bocage.ssl.encoders.swin import SwinEncoder

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
STEM = "patch_embed.proj.weight"


def spec_of(name: str, *channels: str) -> InputSpec:
    modality = FLAIR_HUB[name]
    spec = InputSpec.from_modality(modality, (0.0,) * len(modality.channels), (1.0,) * len(modality.channels))
    if not channels:
        return spec
    return replace(spec, channels=channels, mean=(0.0,) * len(channels), std=(1.0,) * len(channels))


def encoder_of(spec: InputSpec, name: str = V1, mask_token: bool = False, **options: Any) -> SwinEncoder:
    encoder = build_encoder(spec, EncoderConfig(name=name, options={**TINY, **options}), mask_token).eval()
    assert isinstance(encoder, SwinEncoder)
    return encoder


def plain_model(name: str = V1, **arguments: Any) -> torch.nn.Module:
    """Build timm's classifier with perturbed weights, because the blocks of an untrained v2 output zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def saved(model: torch.nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def maps_of(model: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("modality", "channels", "weights"),
    [
        ("AERIAL_RGBI", ("R", "G", "B"), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("AERIAL_RGBI", (), [[0.5, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0]]),
        ("SPOT_RGBI", ("NIR", "R", "G"), [[0.5, 0, 0], [0.5, 0, 0], [0, 1, 1]]),
        ("AERIAL-RLT_PAN", (), [[1, 1, 1]]),
        ("DEM_ELEV", (), [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        ("SENTINEL2_TS", ("B2", "B3", "B4", "B11"), [[0, 0, 1], [0, 1, 0], [0.5, 0, 0], [0.5, 0, 0]]),
        ("SENTINEL1-ASC_TS", (), [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
    ],
)
def test_channels_share_the_filters_of_the_nearest_colour(
    modality: str, channels: tuple[str, ...], weights: list[list[float]]
) -> None:
    found = colour_weights(channel_wavelengths(spec_of(modality, *channels)))
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float32))


@pytest.mark.parametrize("wavelengths", [(None, 650.0), (443.0, 490.0, 560.0, None), (12_000.0,), (400.0, 2200.0)])
def test_weights_of_a_colour_sum_to_one(wavelengths: tuple[float | None, ...]) -> None:
    torch.testing.assert_close(colour_weights(wavelengths).sum(dim=0), torch.ones(3))


@pytest.mark.parametrize("name", [V1, V2])
def test_rgb_in_any_order_equals_timm(name: str, tmp_path: Path) -> None:
    model = plain_model(name)
    encoder = encoder_of(spec_of("AERIAL_RGBI", "G", "B", "R"), name)
    report = load_imagenet(encoder, saved(model, tmp_path / "model.safetensors"))
    assert report.complete
    assert set(report.adapted) == {STEM}
    assert sorted(report.dropped) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    assert len(report.loaded) + 1 == len(encoder.state_dict())
    image = torch.randn(1, 3, 224 if name == V1 else 256, 224 if name == V1 else 256)
    with torch.no_grad():
        found = encoder(image[:, [1, 2, 0]])
    for mine, theirs in zip(found, maps_of(model, image), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modality", ["AERIAL_RGBI", "AERIAL-RLT_PAN", "DEM_ELEV", "SPOT_RGBI"])
def test_features_of_a_grey_image_equal_timm(modality: str, tmp_path: Path) -> None:
    model = plain_model()
    spec = spec_of(modality)
    encoder = encoder_of(spec)
    load_imagenet(encoder, saved(model, tmp_path / "model.safetensors"))
    grey = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        found = encoder(grey.expand(1, len(spec.channels), -1, -1))
    for mine, theirs in zip(found, maps_of(model, grey.expand(1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_another_window_resizes_the_tables(tmp_path: Path) -> None:
    encoder = encoder_of(spec_of("AERIAL_RGBI"), mask_token=True, window_size=8, img_size=512)
    assert encoder.mask_token is not None
    token = encoder.mask_token.clone()
    report = load_imagenet(encoder, saved(plain_model(), tmp_path / "model.safetensors"))
    assert report.adapted["layers.0.blocks.0.attn.relative_position_bias_table"] == "169 to 225 offsets"
    start = f"{len(report.loaded)} loaded; 6 adapted ({STEM}: RGB filters remixed for R, G, B, NIR"
    assert str(report).startswith(start)
    assert torch.equal(encoder.mask_token, token)


@pytest.mark.parametrize(
    ("name", "options", "windows"),
    [
        ("swinv2_tiny_window16_256", {}, [16, 16, 16, 8]),
        ("swinv2_base_window12_192", {}, [12, 12, 12, 6]),
        (V2, {"window_size": 16}, [8, 8, 8, 8]),
        ("swinv2_base_window12to16_192to256", {}, None),
        ("swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", {"window_size": 8}, None),
    ],
)
def test_v2_needs_the_windows_of_its_weights(
    name: str, options: dict[str, Any], windows: list[int] | None, tmp_path: Path
) -> None:
    weights = saved(plain_model(name.partition(".")[0]), tmp_path / "model.safetensors")
    spec = spec_of("AERIAL_RGBI")
    if windows is not None:
        with pytest.raises(InputError, match=re.escape(f"set the encoder option pretrained_window_sizes={windows}")):
            load_imagenet(encoder_of(spec, name, **options), weights)
        options = {**options, "pretrained_window_sizes": windows}
    torch.manual_seed(5)
    expected = torch.rand(1)
    encoder = encoder_of(spec, name, **options)
    torch.manual_seed(5)
    assert load_imagenet(encoder, weights).complete
    assert torch.equal(torch.rand(1), expected)


def test_fixed_size_shrinks_tables(tmp_path: Path) -> None:
    encoder = build_encoder(spec_of("AERIAL_RGBI"), EncoderConfig(name=V1, options=TINY, fixed_size=64))
    assert isinstance(encoder, SwinEncoder)
    report = load_imagenet(encoder, saved(plain_model(), tmp_path / "model.safetensors"))
    assert report.adapted["layers.3.blocks.0.attn.relative_position_bias_table"] == "169 to 9 offsets"


def to_authors_format(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert to the Swin authors' format: patch merging ends a stage, computed buffers, a head without ``fc``."""
    renamed = {}
    for name, tensor in weights.items():
        found = re.match(r"layers\.(\d)\.downsample(.*)", name)
        renamed[f"layers.{int(found[1]) - 1}.downsample{found[2]}" if found else name.replace(".fc.", ".")] = tensor
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    renamed["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return renamed


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("weights.pth", lambda weights, path: torch.save(weights, path)),
        ("pytorch_model.bin", lambda weights, path: torch.save(weights, path)),
        ("authors.pth", lambda weights, path: torch.save({"model": to_authors_format(weights)}, path)),
        ("nested.ckpt", lambda weights, path: torch.save({"state_dict": weights, "epoch": 3}, path)),
        ("", lambda weights, path: save_file(weights, path / "model.safetensors")),
        ("", lambda weights, path: torch.save(weights, path / "pytorch_model.bin")),
    ],
)
def test_kinds_of_files(name: str, write: Callable[[dict[str, torch.Tensor], Path], object], tmp_path: Path) -> None:
    model, expected = plain_model(), encoder_of(spec_of("DEM_ELEV"))
    write(model.state_dict(), tmp_path / name)
    load_imagenet(expected, saved(model, tmp_path / "plain.safetensors"))
    encoder = encoder_of(spec_of("DEM_ELEV"))
    assert load_imagenet(encoder, tmp_path / name).complete
    for key, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], tensor)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.safetensors", lambda path: None, "missing or not a file"),
        ("other.txt", lambda path: path.write_text("x"), "not a weight file that bocage reads"),
        ("folder", lambda path: path.mkdir(), "holds neither model.safetensors nor pytorch_model.bin"),
        ("payload.pth", lambda path: torch.save(Payload(path.parent / "executed"), path), "never executed"),
        ("payload.safetensors", lambda path: torch.save(Payload(path.parent / "executed"), path), "not a safetensors"),
        ("noise.pth", lambda path: path.write_bytes(b"PK\x03\x04" + b"\x00" * 99), "damaged"),
        ("empty.pth", lambda path: path.write_bytes(b""), "damaged"),
        ("list.pth", lambda path: torch.save([torch.zeros(1)], path), "does not hold named tensors"),
        ("numbers.pth", lambda path: torch.save({"epoch": 3}, path), "does not hold named tensors"),
        (
            "deeper.safetensors",
            lambda path: saved(plain_model(depths=[1, 1, 2, 2]), path),
            r"13 unexpected \(layers.3.blocks.1",
        ),
        ("wider.safetensors", lambda path: saved(plain_model(embed_dim=32), path), r"mismatched .*\[32, 4, 4, 4\]"),
        ("v2.safetensors", lambda path: saved(plain_model(V2), path), "missing .* unexpected"),
        ("four.safetensors", lambda path: saved(plain_model(in_chans=4), path), "does not read red, green and blue"),
        (
            "complex.safetensors",
            lambda path: saved(plain_model().to(torch.complex64), path),
            "complex64 instead of float32",
        ),
        ("oddtable.safetensors", lambda path: saved(plain_model(window_size=(7, 5)), path), "do not fit a square"),
    ],
)
def test_other_files_raise_input_error_and_change_nothing(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    encoder = encoder_of(spec_of("AERIAL_RGBI"))
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        load_imagenet(encoder, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(before[key], tensor) for key, tensor in encoder.state_dict().items())


def test_error_names_the_options_of_a_narrower_swin(tmp_path: Path) -> None:
    whole = saved(plain_model(embed_dim=32), tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match=f"does not hold the weights of {V1} with embed_dim=16, depths="):
        load_imagenet(encoder_of(spec_of("AERIAL_RGBI")), whole)
