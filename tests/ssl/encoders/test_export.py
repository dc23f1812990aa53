"""Save and load encoders: exact round trips, and errors of damaged, mismatched or hostile files."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder
from bocage.ssl.encoders.memory_limit import limited_memory
from bocage.ssl.encoders.temporal import AttentionHeads

SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
SERIES = {"encoder_widths": (16, 16, 32), "decoder_widths": (16, 16, 32), "n_head": 8, "d_model": 64}


def build(name: str, mask_token: bool = False, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    modality = FLAIR_HUB[name]
    channels = len(modality.channels)
    spec = InputSpec.from_modality(modality, tuple(0.5 + i for i in range(channels)), (1.5,) * channels)
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
        encoder.train().features(*inputs(name))
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
        for mine, theirs in zip(loaded.features(*inputs(name)), encoder.features(*inputs(name)), strict=True):
            assert torch.equal(mine, theirs)
    save_encoder(loaded, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "encoder" / file).read_bytes()


def test_config_json_describes_the_input(tmp_path: Path) -> None:
    save_encoder(build("SENTINEL2_TS"), tmp_path / "encoder")
    section = json.loads((tmp_path / "encoder" / "config.json").read_text())["bocage"]
    assert section["schema"] == 1
    assert section["input"]["bands"][:3] == ["B2", "B3", "B4"]
    assert section["input"]["quantities"][:3] == ["reflectance"] * 3
    assert section["input"]["wavelengths"][:3] == [490.0, 560.0, 665.0]
    assert section["units"] == "stored values"
    assert section["input"]["gsd"] == 10.24
    assert section["input"]["mean"][0] == 0.5
    assert section["dates"] == "days since 15 May of the date's own year"


def test_mask_token_is_not_saved(tmp_path: Path) -> None:
    save_encoder(build("AERIAL_RGBI", mask_token=True), tmp_path / "encoder")
    assert not any("mask_token" in name for name in load_file(tmp_path / "encoder" / "model.safetensors"))
    assert "mask_token" not in load_encoder(tmp_path / "encoder").state_dict()


def test_saving_replaces_encoders_but_no_other_folder(tmp_path: Path) -> None:
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
        r"1 missing \(temporal_encoder.in_norm.weight\); 1 unexpected \(inn_norm\)",
    ),
    "extra": (lambda f: _edit_weights(f, lambda w: w.__setitem__("more", torch.zeros(1))), r"1 unexpected \(more\)"),
    "another shape": (
        lambda f: _edit_weights(f, lambda w: w.__setitem__("temporal_encoder.in_norm.weight", torch.zeros(3))),
        r"in_norm.weight: shape \[3\] instead of \[32\]",
    ),
    "many missing": (lambda f: _edit_weights(f, lambda w: [w.pop(k) for k in list(w)[:9]]), r"9 missing \(.*\.\.\.\)"),
    "newer": (lambda f: _edit_config(f, lambda c: c.update(schema=2)), "install a newer bocage"),
    "no version": (lambda f: _edit_config(f, lambda c: c.update(schema="x")), "version number"),
    "unknown key": (lambda f: _edit_config(f, lambda c: c.update(code="import os")), "unknown keys: code"),
    "missing key": (lambda f: _edit_config(f, lambda c: c.pop("options")), "unknown keys: options"),
    "architecture": (
        lambda f: _edit_config(f, lambda c: c.update(architecture="os.system")),
        "architecture = 'os.system'",
    ),
    "option": (lambda f: _edit_config(f, lambda c: c["options"].update(run="x")), "option 'run' is unknown"),
    "option value": (
        lambda f: _edit_config(f, lambda c: c["options"].update(n_head="x")),
        "n_head = 'x' is not an integer",
    ),
    "no stride": (lambda f: _edit_config(f, lambda c: c["options"].update(str_conv_s=0)), "str_conv_s = 0 is not"),
    "text to pad": (lambda f: _edit_config(f, lambda c: c["options"].update(pad_value="x")), "pad_value = 'x' is not"),
    "no ground": (lambda f: _edit_config(f, lambda c: c["input"].update(gsd=0)), "input.gsd: 0 is not"),
    "no wavelength": (
        lambda f: _edit_config(f, lambda c: c["input"].update(wavelengths=[0.0] * 10)),
        "input.wavelengths: 0.0 is not",
    ),
    "options kind": (lambda f: _edit_config(f, lambda c: c.update(options=[])), "options = \\[\\] is not a mapping"),
    "statistics": (
        lambda f: _edit_config(f, lambda c: c["input"].update(mean=["x"] * 10)),
        "mean: 'x' is not a finite",
    ),
    "fewer statistics": (lambda f: _edit_config(f, lambda c: c["input"].update(mean=[0.0])), "1 means"),
    "representation": (lambda f: _edit_config(f, lambda c: c["input"].update(representation="x")), "representation"),
    "dates": (lambda f: _edit_config(f, lambda c: c.update(dates="days since 1 January")), "units or dates"),
    "units": (lambda f: _edit_config(f, lambda c: c.update(units="reflectance")), "units or dates"),
    "negative deviation": (lambda f: _edit_config(f, lambda c: c["input"].update(std=[-1.0] * 10)), "input.std: -1.0"),
    "quantity": (
        lambda f: _edit_config(f, lambda c: c["input"].update(quantities=["x"] * 10)),
        "input.quantities: 'x'",
    ),
    "input field": (lambda f: _edit_config(f, lambda c: c["input"].pop("gsd")), "unknown keys: input.gsd"),
    "other channels": (
        lambda f: _edit_config(f, lambda c: c["input"].update(channels=["B2", "B3"], mean=[0.0, 0.0], std=[1.0, 1.0])),
        "in_conv.conv.conv.0.weight",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faulty_files_raise_input_error_in_one_line(fault: str, tmp_path: Path) -> None:
    save_encoder(build("SENTINEL2_TS"), tmp_path / "encoder")
    break_it, message = FAULTS[fault]
    break_it(tmp_path / "encoder")
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(tmp_path / "encoder")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_error_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["SENTINEL2_TS", "AERIAL_RGBI"])
def test_loading_needs_no_dataset_recipe_or_trainer(name: str, tmp_path: Path) -> None:
    """Takes seconds, because a new interpreter imports torch, and timm for a Swin."""
    save_encoder(build(name), tmp_path / "encoder")
    script = (
        "import sys; from bocage.ssl.encoders.export import load_encoder; load_encoder(sys.argv[1]);"
        "print(*sorted(name for name in sys.modules if name.startswith('bocage.')));"
        "print(*sorted({'rasterio', 'webdataset', 'accelerate', 'lightly', 'omegaconf', 'pyarrow', 'pyogrio', 'pandas',"
        " 'tifffile', 'fsspec', 'timm', 'torchvision', 'huggingface_hub', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "encoder")], capture_output=True, text=True, check=True
    )
    bocage_modules, other_modules = result.stdout.split("\n")[:2]
    shards = ("classes", "errors", "files", "modality", "preprocess", "preprocess.normalize")
    allowed = {f"bocage.shards.{name}" for name in shards}
    imported = set(bocage_modules.split())
    assert {name for name in imported if name.count(".") > 1 and not name.startswith("bocage.ssl.encoders")} <= allowed
    if FLAIR_HUB[name].role == "series":
        assert other_modules == ""
    else:  # timm imports further dependencies
        assert not {"rasterio", "webdataset", "accelerate", "lightly", "omegaconf", "pyogrio"} & set(
            other_modules.split()
        )


def test_half_precision_encoder_is_saved_in_float32(tmp_path: Path) -> None:
    encoder = build("SENTINEL2_TS").bfloat16()
    save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder").state_dict()
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(loaded[key], tensor.float() if tensor.is_floating_point() else tensor)


def test_fixed_size_and_selected_channels_are_saved(tmp_path: Path) -> None:
    spec = replace(build("AERIAL_RGBI").spec, channels=("NIR", "R"), mean=(1.0, 2.0), std=(3.0, 4.0))
    encoder = build_encoder(spec, EncoderConfig(options=SWIN, fixed_size=32)).eval()
    save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.spec == spec
    image = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        for mine, theirs in zip(loaded.features(image), encoder.features(image), strict=True):
            assert torch.equal(mine, theirs)


def test_memory_limit_applies_to_its_thread_and_block_only() -> None:
    built: list[torch.nn.Module] = []
    other = threading.Thread(target=lambda: built.append(torch.nn.Linear(99, 99)))
    with limited_memory(parameters=1000, buffers=0):
        torch.nn.Linear(9, 9)
        with pytest.raises(MemoryError, match="parameters take more memory"):
            torch.nn.Linear(99, 99)
        other.start()
        other.join()
    assert len(built) == 1
    torch.nn.Linear(99, 99)
    with limited_memory(parameters=1000, buffers=0), pytest.raises(MemoryError, match="buffers take more memory"):
        torch.nn.BatchNorm1d(1)


def test_memory_limit_applies_before_tensors_are_filled() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited_memory(parameters=1 << 20, buffers=0), pytest.raises(MemoryError, match="parameters take more"):
        AttentionHeads(n_head=4, d_k=10**8, d_model=8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; on some systems bytes
