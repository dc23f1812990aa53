"""Fuzz the files of encoders: damaged or hostile files load or raise InputError, and no code is executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder

SWIN = EncoderConfig(
    name="swinv2_tiny_window8_256",
    options={"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
)
SERIES = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": [8, 8], "decoder_widths": [8, 8], "n_head": 4, "d_model": 16, "d_k": 2},
)
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small saved encoder of each architecture."""
    folders: dict[str, Path] = {}
    for name, config in (("AERIAL_RGBI", SWIN), ("SENTINEL1-ASC_TS", SERIES)):
        channels = len(FLAIR_HUB[name].channels)
        spec = InputSpec.from_modality(FLAIR_HUB[name], (0.5,) * channels, (1.5,) * channels)
        folders[config.architecture] = tmp_path_factory.mktemp(config.architecture) / "encoder"
        save_encoder(build_encoder(spec, config), folders[config.architecture])
    return folders


def loads(folder: Path) -> bool:
    """Whether the folder loads; if not, the error must be one printable line that names it."""
    try:
        load_encoder(folder)
    except InputError as error:
        message = str(error)
        assert message.isprintable(), message
        assert str(folder) in message
        assert len(message) < 3000
        return False
    return True


def lengths(size: int, count: int) -> Iterator[int]:
    """Yield about ``count`` lengths from 0 to ``size``, including all short ones."""
    yield from range(0, min(size, 16))
    yield from range(16, size, max(1, size // count))
    yield size - 1


@pytest.mark.parametrize("architecture", ["swin", "utae"])
def test_truncated_files_raise_input_error(architecture: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoders[architecture], folder)
    for name in (WEIGHTS, CONFIG):
        whole = (folder / name).read_bytes().rstrip(b"\n")
        for length in lengths(len(whole), 150):
            (folder / name).write_bytes(whole[:length])
            assert not loads(folder)
        (folder / name).write_bytes(whole)
    assert loads(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_overwritten_bytes(places: list[tuple[int, bytes]], encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoders["utae"], folder, dirs_exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        content = bytearray((encoders["utae"] / name).read_bytes())
        limit = min(len(content), 6000)  # the headers, not the weights
        for place, new in places:
            start = place % limit
            content[start : start + len(new)] = new
        (folder / name).write_bytes(content)
        loads(folder)
        shutil.copy(encoders["utae"] / name, folder / name)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["SENTINEL2_TS", "os.system", "__import__('os')", "../..", "\n\x1b[2J", "swin_tiny", "\ud800"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON tree except the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@pytest.mark.parametrize("architecture", ["swin", "utae"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_values_in_config_json(
    architecture: str, data: st.DataObject, encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoders[architecture], folder, dirs_exist_ok=True)
    config = json.loads((encoders[architecture] / CONFIG).read_text())
    *parents, key = data.draw(st.sampled_from(list(paths(config["bocage"]))))
    node = config["bocage"]
    for parent in parents:
        node = node[parent]
    node[key] = data.draw(VALUES)
    (folder / CONFIG).write_text(json.dumps(config))
    loads(folder)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def option(key: str, value: object) -> Callable[[Path], None]:
    """Set an option of the architecture in config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["bocage"]["options"][key] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Edit the tensors of the weight file."""

    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        edit(weights)
        save_file(weights, folder / WEIGHTS)

    return change


def header(text: bytes) -> Callable[[Path], object]:
    """Write a weight file with this header and no tensor."""
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file by something else."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def first(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.ndim > 1)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "pickle as weights": lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(folder / "executed"))),
    "torch archive as weights": lambda folder: torch.save(Payload(folder / "executed"), folder / WEIGHTS),
    "pickle as config.json": lambda folder: (folder / CONFIG).write_bytes(pickle.dumps(Payload(folder / "executed"))),
    "a folder as weights": replaced(WEIGHTS, Path.mkdir),
    "a folder as config.json": replaced(CONFIG, Path.mkdir),
    "a link to itself as weights": replaced(WEIGHTS, lambda path: path.symlink_to(path)),
    "a link to itself as config.json": replaced(CONFIG, lambda path: path.symlink_to(path)),
    "a pipe as weights": replaced(WEIGHTS, os.mkfifo),
    "a pipe as config.json": replaced(CONFIG, os.mkfifo),
    "not UTF-8": lambda folder: (folder / CONFIG).write_bytes(b'{"bocage": "\xe9"}'),
    "deep nesting": lambda folder: (folder / CONFIG).write_text('{"bocage":' + "[" * 100_000),
    "deep option": option("str_conv_k", json.loads("[" * 400 + "]" * 400)),
    "a long number": lambda folder: (folder / CONFIG).write_text('{"bocage": {"schema": ' + "9" * 100_000 + "}}"),
    "a long config.json": lambda folder: (folder / CONFIG).write_text(" " * (1 << 20)),
    "a long header": lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
    "a large empty tensor": header(b'{"in_conv":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'),
    "an unknown dtype": header(b'{"in_conv":{"dtype":"C999","shape":[0],"data_offsets":[0,0]}}'),
    "no tensor at all": header(b"{}"),
    "a huge width": option("d_model", 10**12),
    "many heads": option("n_head", 10**9),
    "wide maps": option("encoder_widths", [10**9, 10**9]),
    "many levels": option("encoder_widths", [8] * 30_000),
    "not a number": tensors(lambda weights: weights[first(weights)].view(-1)[:1].fill_(torch.nan)),
    "infinity": tensors(lambda weights: weights[first(weights)].view(-1)[:1].fill_(-torch.inf)),
    "half precision": tensors(lambda weights: weights.update({first(weights): weights[first(weights)].half()})),
    "whole numbers": tensors(lambda weights: weights.update({first(weights): weights[first(weights)].long()})),
    "flat": tensors(lambda weights: weights.update({first(weights): weights[first(weights)].reshape(-1)})),
    "an unprintable tensor name": tensors(lambda weights: weights.update({"\n\x1b[2J" * 1000: torch.zeros(1)})),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_files(case: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoders["utae"], folder)
    HOSTILE[case](folder)
    assert not loads(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("utae", "d_k", 10**6),
        ("utae", "d_k", 10**9),
        ("utae", "d_model", 1 << 20),
        ("utae", "n_head", 1 << 20),
        ("utae", "encoder_widths", [1 << 20, 8]),
        ("utae", "str_conv_k", 1 << 16),
        ("swin", "window_size", 100),
        ("swin", "window_size", 5000),
        ("swin", "window_size", [4, 10**4]),
        ("swin", "embed_dim", 10**9),
        ("swin", "depths", [10**9, 1, 1, 1]),
        ("swin", "depths", 10**9),
        ("swin", "window_size", 300),
        ("swin", "window_size", 10**6),
        ("swin", "num_heads", [10**9, 1, 1, 1]),
        ("swin", "mlp_ratio", 1e300),
        ("swin", "mlp_ratio", 1e6),
        ("swin", "patch_size", 10**9),
        ("swin", "img_size", -1),
        ("swin", "norm_layer", "os.system"),
    ],
)
def test_huge_options_raise_input_error_without_allocating(
    architecture: str, key: str, value: object, encoders: dict[str, Path], tmp_path: Path
) -> None:
    """The memory of this process hardly grows."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoders[architecture], folder)
    option(key, value)(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not loads(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; on some systems bytes


def test_huge_fixed_size_raises_input_error(encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoders["swin"], folder)
    config = json.loads((folder / CONFIG).read_text())
    config["bocage"]["fixed_size"] = 1 << 20
    (folder / CONFIG).write_text(json.dumps(config))
    assert not loads(folder)
