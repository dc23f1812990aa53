"""Save and load published encoders: a folder with ``config.json`` and ``model.safetensors``.

bocage reads the section ``bocage`` of ``config.json`` (see ``description.py``). For a Swin, the rest of ``config.json``
and the names in ``model.safetensors`` follow timm, so ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads
the encoder without bocage. Weights are stored in float32, in whatever precision the encoder computes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_folder
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.description import CONFIG_FILE, encoder_config_json, is_encoder_config, read_encoder_config
from bocage.ssl.encoders.hub import HUB_PREFIX, download
from bocage.ssl.encoders.memory_limit import limited_memory
from bocage.ssl.encoders.timm_format import add_final_norm, timm_weights
from bocage.ssl.encoders.weights import compare_weights, read_tensors

__all__ = ["WEIGHTS_FILE", "load_encoder", "save_encoder"]

WEIGHTS_FILE = "model.safetensors"

_CLASSIFIER_BYTES = 1 << 24  # allowance for the classifier that timm builds and drops
_BUFFER_BYTES = 1 << 30  # allowance for attention masks and position indices, which are computed and not stored
_MAX_ZIP_RATIO = 8  # unpacked to packed size; trained weights hardly compress, but zeros do


def _published_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors by published name, without a mask token; a Swin gets timm's final norm."""
    if encoder.config.architecture != "swin":
        return encoder.state_dict()
    return add_final_norm(timm_weights(encoder), encoder.widths[-1])


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Save an encoder to a folder, atomically.

    Args:
        encoder: encoder from ``build_encoder`` or ``load_encoder``; its mask token is not saved.
        folder: new or empty folder, or a folder with an encoder, which is replaced.

    Raises:
        InputError: ``folder`` exists and holds something other than an encoder.
    """
    folder = Path(folder)
    replaceable = folder.is_dir() and (is_encoder_config(folder / CONFIG_FILE) or not any(folder.iterdir()))
    if folder.exists() and not replaceable:
        raise InputError(f"{folder} exists and is not an encoder: choose another folder")
    with atomic_folder(folder) as temporary:
        weights = {name: _to_cpu_float32(tensor) for name, tensor in _published_weights(encoder).items()}
        save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(encoder_config_json(encoder), indent=2, ensure_ascii=False)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _to_cpu_float32(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def load_encoder(source: str | Path) -> Encoder:
    """Load an encoder that ``save_encoder`` wrote, in evaluation mode and on the CPU.

    Loading needs no dataset, recipe or trainer, executes no stored code, and does not change the random state.

    Args:
        source: folder of the encoder, a ``.zip`` of it, or ``hf:org/name`` or ``hf:org/name@revision`` for a Hugging
            Face repository that contains ``config.json`` and ``model.safetensors``.

    Raises:
        InputError: the folder or a file is missing, unreadable or of a newer version, or the weights do not fit
            ``config.json``; the message names the file and the difference.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        folder = download(source, (CONFIG_FILE, WEIGHTS_FILE))
    elif os.path.isfile(source) and Path(source).suffix == ".zip":
        with tempfile.TemporaryDirectory(prefix="bocage-") as temporary:
            _unpack(Path(source), Path(temporary))
            try:
                return load_encoder(temporary)
            except InputError as error:
                raise InputError(str(error).replace(temporary, str(source))) from error
    else:
        folder = Path(source)
        if not os.path.isdir(folder):  # Path.is_dir raises for names that are too long and for unreadable folders
            hub = f"; on the Hugging Face hub: {HUB_PREFIX}{source}" if str(source).count("/") == 1 else ""
            raise InputError(
                f"{folder} is not a folder: an encoder is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or its .zip"
                f"{hub}"
            )
    spec, config = read_encoder_config(folder / CONFIG_FILE)
    stored = read_tensors(folder / WEIGHTS_FILE)
    _check_option_lengths(folder, config, stored)
    # config.json is untrusted and may ask for any size, so the parameters are limited by the size of the weights: twice
    # that size, and the classifier that timm builds and drops.
    allowed = 2 * sum(tensor.nbytes for tensor in stored.values()) + _CLASSIFIER_BYTES
    with torch.random.fork_rng(devices=[]), limited_memory(parameters=allowed, buffers=_BUFFER_BYTES):
        try:
            encoder = build_encoder(spec, config)
        except InputError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    weights = _published_weights(encoder)
    report = compare_weights(weights, stored)
    if not report.complete:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {report}")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    return encoder.eval()


def _unpack(path: Path, folder: Path) -> None:
    """Extract the two files of an encoder from a zip to ``folder``; the paths inside the zip are ignored.

    Raises:
        InputError: the file is not a zip of exactly one encoder, or unpacks to far more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                parts = [part for part in archive.infolist() if part.filename.rpartition("/")[2] == name]
                if len(parts) != 1:
                    raise InputError(f"{path} holds {len(parts)} files named {name}: give a zip of one encoder")
                if parts[0].file_size > _MAX_ZIP_RATIO * (parts[0].compress_size + _CLASSIFIER_BYTES):
                    raise InputError(f"{path}: {name} unpacks to {parts[0].file_size} bytes, too many for its size")
                with archive.open(parts[0]) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)  # zipfile stops at file_size bytes
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked: {error}") from error


def _check_option_lengths(folder: Path, config: EncoderConfig, stored: Mapping[str, torch.Tensor]) -> None:
    """Raise ``InputError`` if an option has more levels or blocks than the file has tensors; building could hang."""
    for key, value in config.options.items():
        values = value if isinstance(value, list | tuple) else [value]
        blocks = sum(item for item in values if isinstance(item, int)) if key == "depths" else 0
        if max(blocks, len(values)) > len(stored):
            raise InputError(f"{folder / CONFIG_FILE}: option {key} asks for more layers than {WEIGHTS_FILE} holds")
