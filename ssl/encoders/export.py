"""The published form of an encoder: a folder with ``config.json`` and ``model.safetensors``, and nothing else needed.

``config.json`` keeps all that bocage reads under the key ``bocage`` (see ``description.py``). For a Swin the rest of
it, and the names in ``model.safetensors``, are timm's own, so that ``timm.create_model("local-dir:FOLDER",
pretrained=True)`` loads the encoder with no code of ours. Weights are float32, whatever the encoder computes in.
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
from bocage.shards.files import folder_written_whole
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.description import CONFIG_FILE, describe, is_description, read_description
from bocage.ssl.encoders.hub import PREFIX, download
from bocage.ssl.encoders.key_report import compare
from bocage.ssl.encoders.memory_limit import limited_memory
from bocage.ssl.encoders.timm_format import plain_weights, with_final_norm
from bocage.ssl.encoders.weights import read_tensors

WEIGHTS_FILE = "model.safetensors"

_ROOM_FOR_CLASSIFIER = 1 << 24  # bytes
_LARGEST_RATIO = 8  # of unpacked to packed weights; zeros compress better, trained weights hardly
_ROOM_FOR_BUFFERS = 1 << 30  # bytes of attention masks and position indices, which are computed and not stored


def _published_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The encoder's own tensors by published name; a mask token is left out, a Swin's final norm added."""
    if encoder.config.architecture != "swin":
        return encoder.state_dict()
    return with_final_norm(plain_weights(encoder), encoder.widths[-1])


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Write ``encoder`` to ``folder``, which appears whole or stays as it was.

    Args:
        encoder: one that ``build_encoder`` or ``load_encoder`` made; its mask token is not written.
        folder: a new folder, or one that holds an encoder, which is replaced.

    Raises:
        InputError: ``folder`` exists and is something else.
    """
    folder = Path(folder)
    replaceable = folder.is_dir() and (is_description(folder / CONFIG_FILE) or not any(folder.iterdir()))
    if folder.exists() and not replaceable:
        raise InputError(f"{folder} exists and is not an encoder: choose another folder")
    with folder_written_whole(folder) as new:
        weights = {name: _portable(tensor) for name, tensor in _published_weights(encoder).items()}
        save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(describe(encoder), indent=2, ensure_ascii=False)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _portable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def load_encoder(source: str | Path) -> Encoder:
    """The encoder that ``save_encoder`` wrote, in evaluation mode and on the CPU.

    Nothing of a dataset, recipe or trainer is needed, nothing stored is executed, and the random generator of the
    caller is left alone.

    Args:
        source: the folder, a ``.zip`` of it, or ``hf:org/name`` or ``hf:org/name@revision`` for a Hugging Face
            repository that holds its two files.

    Raises:
        InputError: the folder or a file is missing, unreadable, of a newer version, or the weights do not fit the
            description; the sentence names the file and what differs.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
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
        if not os.path.isdir(folder):  # unlike Path.is_dir, no exception for names too long or folders closed to us
            hub = f"; on the hub: {PREFIX}{source}" if str(source).count("/") == 1 else ""
            raise InputError(
                f"{folder} is not a folder: an encoder is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or its .zip"
                f"{hub}"
            )
    spec, config = read_description(folder / CONFIG_FILE)
    stored = read_tensors(folder / WEIGHTS_FILE)
    _check_lengths(folder, config, stored)
    # What the description asks for may be as large as anyone cares to write, but not larger than the weights; twice
    # and a little more leaves room for the classifier that timm builds and drops.
    room = 2 * sum(tensor.nbytes for tensor in stored.values()) + _ROOM_FOR_CLASSIFIER
    with torch.random.fork_rng(devices=[]), limited_memory(parameters=room, buffers=_ROOM_FOR_BUFFERS):
        try:
            encoder = build_encoder(spec, config)
        except InputError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    wanted = _published_weights(encoder)
    report = compare(wanted, stored)
    if not report.complete:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {report}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    return encoder.eval()


def _unpack(path: Path, folder: Path) -> None:
    """Write the two files of an encoder in a zip to ``folder``, under their own names; the zip's paths are not used.

    Raises:
        InputError: not a zip of one encoder, or one that unpacks to far more than it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                parts = [part for part in archive.infolist() if part.filename.rpartition("/")[2] == name]
                if len(parts) != 1:
                    raise InputError(f"{path} holds {len(parts)} files {name}: give a zip of one encoder")
                if parts[0].file_size > _LARGEST_RATIO * (parts[0].compress_size + _ROOM_FOR_CLASSIFIER):
                    raise InputError(f"{path}: {name} unpacks to {parts[0].file_size} bytes, more than weights would")
                with archive.open(parts[0]) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)  # at most file_size bytes, which zipfile holds itself to
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked: {error}") from error


def _check_lengths(folder: Path, config: EncoderConfig, stored: Mapping[str, torch.Tensor]) -> None:
    """Raises ``InputError`` for more levels or blocks than the file has tensors: building could take for ever."""
    for key, value in config.options.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        blocks = sum(number for number in numbers if isinstance(number, int)) if key == "depths" else 0
        if max(blocks, len(numbers)) > len(stored):
            raise InputError(f"{folder / CONFIG_FILE}: option {key} asks for more than {WEIGHTS_FILE} holds")
