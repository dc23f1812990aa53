"""Saved encoders: exact round trips, timm's own loader, and every way a file can be wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.export import load_encoder, save_encoder
from bocage.ssl.encoders.registry import build_encoder

SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
SERIES = {"encoder_widths": (16, 16, 32), "decoder_widths": (16, 16, 32), "n_head": 8, "d_model": 64}


def build(name: str, mask_token: bool = False, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    modality = FLAIR_HUB[name]
    channels = len(modality.channels)
    spec = InputSpec.of(modality, tuple(0.5 + i for i in range(channels)), (1.5,) * channels)
    if modality.role == "series":
        config = EncoderConfig(architecture="utae", options=SERIES)
    else:
        config = EncoderConfig(name="swin_tiny_patch4_window7_224", options=SWIN)
    return build_encoder(spec, config, mask_token).eval()


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    channels = len(FLAIR_HUB[name].channels)
    generator = torch.Generator().manual_seed(1)
    if FLAIR_HUB[name].role == "image":
        return (torch.randn(2, channels, 48, 48, generator=generator),)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    return torch.randn(2, 3, channels, 10, 10, generator=generator), torch.tensor([[0, 40, 0], [3, 50, 90]]), padding


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "DEM_ELEV", "SENTINEL2_TS", "SENTINEL1-ASC_TS"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    encoder = build(name)
    if FLAIR_HUB[name].role == "series":  # running statistics are part of the encoder
        encoder.train()(*inputs(name))
        encoder.eval()
    save_encoder(encoder, tmp_path / "encoder")
    state = torch.random.get_rng_state()
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.training
    assert loaded.spec == encoder.spec
    assert (loaded.widths, loaded.strides) == (encoder.widths, encoder.strides)
    assert list(loaded.state_dict()) == list(encoder.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(loaded(*inputs(name)), encoder(*inputs(name)), strict=True):
            assert torch.equal(mine, theirs)
    save_encoder(loaded, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "encoder" / file).read_bytes()


def test_config_says_what_the_encoder_reads(tmp_path: Path) -> None:
    save_encoder(build("SENTINEL2_TS"), tmp_path / "encoder")
    own = json.loads((tmp_path / "encoder" / "config.json").read_text())["bocage"]
    assert own["schema"] == 1
    assert own["input"]["bands"][:3] == ["B2", "B3", "B4"]
    assert own["input"]["gsd"] == 10.24
    assert own["input"]["mean"][0] == 0.5
    assert own["dates"] == "days since 15 May of the date's own year"


def test_timm_loads_a_saved_swin(tmp_path: Path) -> None:
    encoder = build("AERIAL_RGBI", mask_token=True)
    save_encoder(encoder, tmp_path / "encoder")
    local = f"local-dir:{tmp_path / 'encoder'}"
    (image,) = inputs("AERIAL_RGBI")
    features = timm.create_model(local, pretrained=True, features_only=True).eval()
    whole = timm.create_model(local, pretrained=True).eval()
    fewer = timm.create_model(local, pretrained=True, features_only=True, in_chans=3).eval()
    with torch.no_grad():
        expected = encoder(image)
        for mine, theirs in zip(expected, features(image), strict=True):
            assert torch.equal(mine, theirs.permute(0, 3, 1, 2))
        for mine, theirs in zip(expected, whole.forward_intermediates(image, intermediates_only=True), strict=True):
            assert torch.equal(mine, theirs)
        assert fewer(image[:, :3])[0].shape == (2, 12, 12, 16)


def test_a_mask_token_is_not_published(tmp_path: Path) -> None:
    save_encoder(build("AERIAL_RGBI", mask_token=True), tmp_path / "encoder")
    assert not any("mask_token" in name for name in load_file(tmp_path / "encoder" / "model.safetensors"))
    assert "mask_token" not in load_encoder(tmp_path / "encoder").state_dict()


def test_saving_replaces_an_encoder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    save_encoder(build("SPOT_RGBI"), folder)
    other = build("SPOT_RGBI", seed=1)
    save_encoder(other, folder)
    assert torch.equal(
        load_encoder(folder).state_dict()["model.patch_embed.proj.bias"],
        other.state_dict()["model.patch_embed.proj.bias"],
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text('{"chapters": 7}')
    with pytest.raises(InputError, match="is not an encoder"):
        save_encoder(other, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "config.json").read_text() == '{"chapters": 7}'


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    edit(content["bocage"])
    (folder / "config.json").write_text(json.dumps(content))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "empty weights": (lambda f: _truncate(f / "model.safetensors", 0), "truncated or not a safetensors"),
    "half the header": (lambda f: _truncate(f / "model.safetensors", 100), "truncated or not a safetensors"),
    "half the weights": (lambda f: _truncate(f / "model.safetensors", 60_000), "truncated or not a safetensors"),
    "half the config": (lambda f: _truncate(f / "config.json", 100), "not readable JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not readable JSON"),
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 100_000), "not readable JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no section 'bocage'"),
    "pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Payload(f.parent / "executed"))),
        "truncated or not a safetensors",
    ),
    "torch pickle": (
        lambda f: torch.save(Payload(f.parent / "executed"), f / "model.safetensors"),
        "truncated or not a safetensors",
    ),
    "renamed": (
        lambda f: _edit_weights(f, lambda w: w.__setitem__("inn_norm", w.pop("temporal_encoder.in_norm.weight"))),
        r"1 missing \(temporal_encoder.in_norm.weight\); 1 unknown \(inn_norm\)",
    ),
    "extra": (lambda f: _edit_weights(f, lambda w: w.__setitem__("more", torch.zeros(1))), r"1 unknown \(more\)"),
    "another shape": (
        lambda f: _edit_weights(f, lambda w: w.__setitem__("temporal_encoder.in_norm.weight", torch.zeros(3))),
        r"in_norm.weight \[3\] instead of \[32\]",
    ),
    "many missing": (lambda f: _edit_weights(f, lambda w: [w.pop(k) for k in list(w)[:9]]), r"9 missing \(.*\.\.\.\)"),
    "newer": (lambda f: _edit_config(f, lambda c: c.update(schema=2)), "install a newer bocage"),
    "no version": (lambda f: _edit_config(f, lambda c: c.update(schema="x")), "version number"),
    "unknown key": (lambda f: _edit_config(f, lambda c: c.update(code="import os")), "keys in section 'bocage': code"),
    "missing key": (lambda f: _edit_config(f, lambda c: c.pop("options")), "keys in section 'bocage': options"),
    "architecture": (lambda f: _edit_config(f, lambda c: c.update(architecture="os.system")), "unknown to this bocage"),
    "option": (lambda f: _edit_config(f, lambda c: c["options"].update(run="x")), "option 'run' is unknown"),
    "option value": (lambda f: _edit_config(f, lambda c: c["options"].update(n_head="x")), "cannot be built"),
    "options kind": (lambda f: _edit_config(f, lambda c: c.update(options=[])), "is not a dict"),
    "statistics": (lambda f: _edit_config(f, lambda c: c["input"].update(mean=["x"] * 10)), "finite numbers"),
    "fewer statistics": (lambda f: _edit_config(f, lambda c: c["input"].update(mean=[0.0])), "1 means"),
    "representation": (lambda f: _edit_config(f, lambda c: c["input"].update(representation="x")), "representation"),
    "input field": (lambda f: _edit_config(f, lambda c: c["input"].pop("gsd")), "bocage.input"),
    "other channels": (
        lambda f: _edit_config(f, lambda c: c["input"].update(channels=["VV", "VH"], mean=[0.0, 0.0], std=[1.0, 1.0])),
        "in_conv.conv.conv.0.weight",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faulty_files_end_in_one_sentence(fault: str, tmp_path: Path) -> None:
    save_encoder(build("SENTINEL2_TS"), tmp_path / "encoder")
    break_it, sentence = FAULTS[fault]
    break_it(tmp_path / "encoder")
    with pytest.raises(InputError, match=sentence) as caught:
        load_encoder(tmp_path / "encoder")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    save_encoder(build("SENTINEL1-ASC_TS"), folder)
    whole = (folder / "model.safetensors").read_bytes()
    for eighth in range(8):
        (folder / "model.safetensors").write_bytes(whole[: len(whole) * eighth // 8])
        with pytest.raises(InputError, match="truncated or not a safetensors"):
            load_encoder(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_encoder(tmp_path / "nowhere")


def test_loading_needs_no_dataset_recipe_or_trainer(tmp_path: Path) -> None:
    """Slow because a fresh interpreter imports torch and timm (which imports wandb where it finds it)."""
    save_encoder(build("SENTINEL2_TS"), tmp_path / "encoder")
    script = (
        "import sys; from bocage.ssl.encoders.export import load_encoder; load_encoder(sys.argv[1]);"
        "print(*sorted(name for name in sys.modules if name.startswith('bocage.')));"
        "print(*sorted({'rasterio', 'webdataset', 'accelerate', 'lightly', 'omegaconf', 'pyarrow', 'pyogrio',"
        " 'tifffile'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "encoder")], capture_output=True, text=True, check=True
    )
    own, foreign = result.stdout.split("\n")[:2]
    allowed = {f"bocage.shards.{name}" for name in ("classes", "errors", "files", "modality", "normalize")}
    imported = set(own.split())
    assert {name for name in imported if name.count(".") > 1 and not name.startswith("bocage.ssl.encoders")} <= allowed
    assert foreign == ""
