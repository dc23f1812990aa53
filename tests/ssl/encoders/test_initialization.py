"""Initialise encoders from folders, the hub's cache and ImageNet, and errors of sources that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder
from bocage.ssl.encoders.imagenet import load_imagenet
from bocage.ssl.encoders.initialization import initialize_encoder
from bocage.ssl.encoders.swin import SwinEncoder

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
V1 = "swin_tiny_patch4_window7_224"
SWIN = EncoderConfig(name=V1, options=TINY)
SERIES = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": (16, 16, 32), "decoder_widths": (16, 16, 32), "n_head": 8, "d_model": 64},
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec_of(name: str, mean: float = 0.0) -> InputSpec:
    channels = len(FLAIR_HUB[name].channels)
    return InputSpec.from_modality(FLAIR_HUB[name], (mean,) * channels, (1.0,) * channels)


def build(name: str = "AERIAL_RGBI", config: EncoderConfig = SWIN, mask_token: bool = False, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return build_encoder(spec_of(name, mean=float(seed)), config, mask_token)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Offline hub: a function that puts a folder into the empty local cache as a repository."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fill(repository: str, content: Path, revision: str = "main") -> None:
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / revision).write_text(COMMIT)
        shutil.copytree(content, folder / "snapshots" / COMMIT)

    return fill


def equal_weights(first: Encoder, second: Encoder) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if name != "mask_token")


@pytest.mark.parametrize(("name", "config"), [("AERIAL_RGBI", SWIN), ("SENTINEL2_TS", SERIES)])
def test_saved_encoder_replaces_scratch_or_is_loaded_into_it(name: str, config: EncoderConfig, tmp_path: Path) -> None:
    saved = build(name, config, seed=1)
    save_encoder(saved, tmp_path / "encoder")
    scratch = build(name, config, mask_token=True)
    loaded = initialize_encoder(scratch, str(tmp_path / "encoder"), keep_architecture=False)
    assert loaded is not scratch
    assert equal_weights(saved, loaded)
    assert not equal_weights(saved, scratch)
    token = getattr(scratch, "mask_token", None)
    kept = initialize_encoder(scratch, str(tmp_path / "encoder"), keep_architecture=True)
    assert kept is scratch
    assert equal_weights(saved, kept)
    assert kept.spec.mean == saved.spec.mean == loaded.spec.mean
    assert getattr(kept, "mask_token", None) is token


def test_hub_repositories_are_read_from_the_cache(tmp_path: Path, hub: Callable[..., None]) -> None:
    saved = build(seed=1)
    save_encoder(saved, tmp_path / "encoder")
    hub("org/aerial", tmp_path / "encoder")
    hub("org/tagged", tmp_path / "encoder", "v2")
    assert equal_weights(load_encoder("hf:org/aerial"), saved)
    assert equal_weights(load_encoder(f"hf:org/aerial@{COMMIT}"), saved)
    assert equal_weights(initialize_encoder(build(), "hf:org/tagged@v2", keep_architecture=False), saved)
    with pytest.raises(InputError, match=r"hf:org/tagged is not in the local cache"):
        load_encoder("hf:org/tagged")


def imagenet(folder: Path) -> Path:
    torch.manual_seed(2)
    folder.mkdir()
    model = timm.create_model(V1, **TINY)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("keep_architecture", [False, True])
def test_imagenet_is_loaded_into_scratch(keep_architecture: bool, tmp_path: Path, hub: Callable[..., None]) -> None:
    folder = imagenet(tmp_path / "weights")
    hub(f"timm/{V1}.ms_in1k", folder)
    hub(f"timm/{V1}.ms_in22k", folder)
    expected: Encoder | None = None
    for name, source in [
        (V1, "imagenet"),
        (f"{V1}.ms_in22k", "imagenet"),
        (V1, f"imagenet:{folder}"),
        (V1, f"imagenet:{folder / 'model.safetensors'}"),
    ]:
        scratch = build(config=replace(SWIN, name=name), mask_token=True)
        found = initialize_encoder(scratch, source, keep_architecture=keep_architecture)
        assert found is scratch
        assert found.spec == spec_of("AERIAL_RGBI")
        expected = expected or found
        assert equal_weights(found, expected)
    assert expected is not None and not equal_weights(expected, build())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_imagenet_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """The tables are resized from another window."""
    torch.manual_seed(2)
    model = timm.create_model(V1, **{**TINY, "window_size": 7}).to(dtype)
    torch.save({"model": model.state_dict(), "max_accuracy": np.float64(81.2)}, tmp_path / "swin.pth")
    save_file({name: tensor.float() for name, tensor in model.state_dict().items()}, tmp_path / "swin.safetensors")
    found, expected = build(), build()
    assert isinstance(found, SwinEncoder) and isinstance(expected, SwinEncoder)
    report = load_imagenet(found, tmp_path / "swin.pth")
    load_imagenet(expected, tmp_path / "swin.safetensors")
    name = str(dtype).removeprefix("torch.")
    assert not report.loaded
    assert report.adapted["patch_embed.norm.weight"] == f"{name} to float32"
    assert report.adapted["patch_embed.proj.weight"] == f"RGB filters remixed for R, G, B, NIR, {name} to float32"
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert report.adapted[table] == f"169 to 49 offsets, {name} to float32"
    for key, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (49, 0), (0, 3, 4, 4), (16, 3, 4, 4), (169, 1)])
def test_tensors_of_wrong_shape_or_dtype_raise_input_error(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """For the first convolution, a dropped tensor, and a table of position biases."""
    weights = timm.create_model(V1, **TINY).state_dict()
    encoder = build()
    assert isinstance(encoder, SwinEncoder)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    fitting = {"patch_embed.proj.weight": (16, 3, 4, 4), table: (169, 1)}
    for name in (*fitting, "norm.weight"):
        torch.save({**weights, name: torch.ones(shape).to(dtype)}, tmp_path / "swin.pth")
        if name == "norm.weight" or (dtype == torch.float32 and shape == fitting.get(name)):
            load_imagenet(encoder, tmp_path / "swin.pth")
            continue
        with pytest.raises(InputError, match=r"swin\.pth"):
            load_imagenet(encoder, tmp_path / "swin.pth")


def test_error_without_network_says_what_to_do(hub: Callable[..., None]) -> None:
    with pytest.raises(InputError) as caught:
        initialize_encoder(build(), "imagenet", keep_architecture=False)
    # A download would not help, so the message does not suggest one.
    assert str(caught.value) == (
        f"encoders.AERIAL_RGBI=imagenet: timm's published weights of {V1} do not fit a Swin built with embed_dim=16, "
        "depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]: leave these options out, or give a file with matching weights as "
        "imagenet:FILE"
    )
    fitting = replace(SWIN, options={"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]})
    with pytest.raises(InputError) as caught:
        initialize_encoder(build(config=fitting), "imagenet", keep_architecture=False)
    assert str(caught.value) == (
        f"encoders.AERIAL_RGBI=imagenet: ImageNet weights of {V1}: hf:timm/{V1}.ms_in1k is not in the local cache and "
        "huggingface.co cannot be reached: copy model.safetensors from there to a folder and give that folder, "
        "as imagenet:FOLDER"
    )
    with pytest.raises(InputError, match=r"hf:org/name is not in the local cache .* config.json and model.safetensors"):
        load_encoder("hf:org/name")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"encoders.AERIAL_RGBI=nowhere: nowhere is not a folder"),
        ("", r"encoders.AERIAL_RGBI: give a folder"),
        ("hf:", r"not of the form hf:org/name"),
        ("hf:name", r"not of the form hf:org/name"),
        ("hf:a/b/c", r"not of the form hf:org/name"),
        ("hf:a--b/x", r"is not a valid name of a repository"),
        ("hf:bad name!/x", r"is not of the form hf:org/name"),
        ("hf:org/name@", r"is not of the form hf:org/name or hf:org/name@revision"),
        ("hf:org/name@../../x", r"not in the local cache|cannot be downloaded"),
        ("imagenet:", r"give a file after 'imagenet:'"),
        ("imagenet:nowhere.safetensors", r"nowhere.safetensors is missing"),
        ("imagenet:" + "x" * 5000, r"missing or not a file"),
        ("imagenet2", r"imagenet2 is not a folder"),
        ("a\0b", r"not a folder"),
        ("x" * 5000, r"not a folder"),
    ],
)
@pytest.mark.parametrize("keep_architecture", [False, True])
def test_wrong_sources_raise_input_error_in_one_line(
    source: str, message: str, keep_architecture: bool, hub: Callable[..., None]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        initialize_encoder(build(), source, keep_architecture=keep_architecture)
    assert "\n" not in str(caught.value)


def test_imagenet_is_not_for_series() -> None:
    with pytest.raises(InputError, match=r"encoders.SENTINEL2_TS=imagenet: .* not for series"):
        initialize_encoder(build("SENTINEL2_TS", SERIES), "imagenet", keep_architecture=False)


def test_encoder_of_another_sensor_or_other_bands_raises_input_error(tmp_path: Path) -> None:
    save_encoder(build("SPOT_RGBI"), tmp_path / "spot")
    other = replace(spec_of("AERIAL_RGBI"), bands=("G", "R", "B", "NIR"), channels=("G", "R", "B", "NIR"))
    save_encoder(build_encoder(other, SWIN), tmp_path / "bands")
    for keep_architecture in (False, True):
        with pytest.raises(InputError, match="is an encoder of SPOT_RGBI, not of AERIAL_RGBI"):
            initialize_encoder(build(), str(tmp_path / "spot"), keep_architecture=keep_architecture)
        with pytest.raises(InputError, match="reads bands G, R, B, NIR, but the shards have R, G, B, NIR"):
            initialize_encoder(build(), str(tmp_path / "bands"), keep_architecture=keep_architecture)


def test_encoder_of_fewer_channels_can_replace_scratch_only(tmp_path: Path) -> None:
    fewer = replace(spec_of("AERIAL_RGBI"), channels=("NIR", "R"), mean=(0.0, 0.0), std=(1.0, 1.0))
    save_encoder(build_encoder(fewer, SWIN), tmp_path / "encoder")
    source = str(tmp_path / "encoder")
    assert initialize_encoder(build(), source, keep_architecture=False).spec == fewer
    with pytest.raises(InputError, match="reads channels NIR, R, but the shards have R, G, B, NIR"):
        initialize_encoder(build(), source, keep_architecture=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"options": {**TINY, "window_size": 8}}, "window_size = 8, here 4"),
        ({"options": {**TINY, "mlp_ratio": 2.0}}, "mlp_ratio = 2.0, here the default"),
        ({"name": "swin_small_patch4_window7_224"}, f"name = swin_small_patch4_window7_224, here {V1}"),
        ({"fixed_size": 64}, "fixed_size = 64, here None"),
        ({"options": {**TINY, "drop_path_rate": 0.3, "img_size": 64}}, None),
        ({"name": f"{V1}.ms_in22k"}, None),
        ({"options": {**TINY, "depths": (1, 1, 1, 1)}}, None),
    ],
)
def test_keep_architecture_requires_the_same_architecture(
    changes: dict[str, Any], difference: str | None, tmp_path: Path
) -> None:
    saved = build(config=replace(SWIN, **changes), seed=1)
    save_encoder(saved, tmp_path / "encoder")
    if difference is None:
        assert equal_weights(initialize_encoder(build(), str(tmp_path / "encoder"), keep_architecture=True), saved)
        return
    with pytest.raises(InputError, match=f"another architecture than this recipe: {difference}"):
        initialize_encoder(build(), str(tmp_path / "encoder"), keep_architecture=True)
