"""The published form of an encoder: a folder with ``config.json`` and ``model.safetensors``, and nothing else needed.

``config.json`` keeps all that bocage knows under the key ``bocage``. For a Swin the rest of it, and the names in
``model.safetensors``, are timm's own, so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the
encoder with no code of ours. timm's model ends in a normalisation that feature maps do not pass; the file holds it as
the identity it starts as.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bocage.shards.errors import InputError
from bocage.shards.files import flush
from bocage.shards.modality import Representation
from bocage.shards.normalize import InputSpec
from bocage.ssl.encoders.base import Architecture, Encoder, EncoderConfig
from bocage.ssl.encoders.registry import build_encoder
from bocage.ssl.encoders.swin import ANY_SIZE, SwinEncoder

SCHEMA = 1
"""Version of the published form; a loader refuses a newer one."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_DATES = "days since 15 May of the date's own year"
_FIELDS = {"schema", "architecture", "name", "options", "input", "dates"}
_FINAL_NORM = ("norm.weight", "norm.bias")
_NAMES_SHOWN = 3


def _published_name(name: str) -> str:
    """timm's plain name of a parameter of ``SwinEncoder``: ``model.layers_0.x`` is ``layers.0.x``."""
    return name.removeprefix("model.").replace("layers_", "layers.", 1)


def _published_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Weights by published name, the encoder's own tensors; a mask token is left out."""
    weights = encoder.state_dict()
    if not isinstance(encoder, SwinEncoder):
        return weights
    weights.pop("mask_token", None)
    weights = {_published_name(name): tensor for name, tensor in weights.items()}
    one = next(iter(weights.values())).new_ones(encoder.widths[-1])
    return {**weights, "norm.weight": one, "norm.bias": torch.zeros_like(one)}


def _description(encoder: Encoder) -> dict[str, Any]:
    """The content of ``config.json``."""
    spec, config = encoder.spec, encoder.config
    own = {
        "schema": SCHEMA,
        "architecture": config.architecture,
        "name": config.name,
        "options": config.options,
        "input": spec.to_json(),
        "dates": _DATES if spec.series else None,
    }
    if not isinstance(encoder, SwinEncoder):
        return {"architecture": config.architecture, "bocage": own}
    channels = len(spec.channels)
    side = config.options.get("img_size", 224)
    size = [side, side] if isinstance(side, int) else list(side)
    return {
        "architecture": config.name,
        "num_classes": 0,
        "num_features": encoder.widths[-1],
        "model_args": {"in_chans": channels, **ANY_SIZE, **config.options},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [channels, *size],
            "fixed_input_size": False,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
        "bocage": own,
    }


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Write ``encoder`` to ``folder``, which appears whole or stays as it was.

    Args:
        encoder: one that ``build_encoder`` or ``load_encoder`` made; its mask token is not written.
        folder: a new folder, or one that holds an encoder, which is replaced.

    Raises:
        InputError: ``folder`` exists and is something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (_is_encoder(folder) or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists and is not an encoder: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _published_weights(encoder).items()}
        save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(_description(encoder), indent=2, ensure_ascii=False)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for path in (new / WEIGHTS_FILE, new / CONFIG_FILE, new):
            flush(path)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        flush(folder.parent)


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder that ``save_encoder`` wrote, in evaluation mode and on the CPU.

    Nothing of a dataset, recipe or trainer is needed, nothing stored is executed, and the random generator of the
    caller is left alone.

    Raises:
        InputError: the folder or a file is missing, unreadable, of a newer version, or the weights do not fit the
            description; the sentence names the file and what differs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: an encoder is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    spec, config = _read_description(folder / CONFIG_FILE)
    with torch.random.fork_rng(devices=[]):
        try:
            encoder = build_encoder(spec, config)
        except InputError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    _read_weights(encoder, folder / WEIGHTS_FILE)
    return encoder.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not an encoder that bocage wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("bocage"), dict):
        raise InputError(f"{path} has no section 'bocage': it does not describe an encoder of bocage")
    return content


def _is_encoder(folder: Path) -> bool:
    try:
        _read_json(folder / CONFIG_FILE)
    except InputError:
        return False
    return True


def _read_description(path: Path) -> tuple[InputSpec, EncoderConfig]:
    """What ``config.json`` says of the input and the architecture."""
    own = _read_json(path)["bocage"]
    if not isinstance(own.get("schema"), int) or own["schema"] < 1:
        raise InputError(f"{path}: bocage.schema = {own.get('schema')!r} is not a version number")
    if own["schema"] > SCHEMA:
        raise InputError(f"{path} has schema {own['schema']}, this bocage reads up to {SCHEMA}: install a newer bocage")
    if set(own) != _FIELDS:
        differing = ", ".join(sorted(set(own) ^ _FIELDS))
        raise InputError(f"{path}: missing or unknown keys in section 'bocage': {differing}")
    kinds = {"architecture": str, "name": str, "options": dict, "input": dict}
    for key, kind in kinds.items():
        if not isinstance(own[key], kind):
            raise InputError(f"{path}: bocage.{key} = {own[key]!r} is not a {kind.__name__}")
    if own["architecture"] not in get_args(Architecture):
        raise InputError(f"{path}: bocage.architecture = {own['architecture']!r} is unknown to this bocage")
    try:
        spec = InputSpec.from_json(own["input"])
        _check_spec(spec)
    except (TypeError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: bocage.input: {error}") from error
    return spec, EncoderConfig(architecture=own["architecture"], name=own["name"], options=own["options"])


def _check_spec(spec: InputSpec) -> None:
    """Raises ``TypeError`` or ``ValueError`` when a field is not of its type, which a dataclass does not notice."""
    if not all(isinstance(name, str) for name in (spec.modality, *spec.bands, *spec.channels)):
        raise TypeError("modality, bands and channels must be names")
    if isinstance(spec.bands, str) or isinstance(spec.channels, str) or not spec.channels:
        raise TypeError("bands and channels must be lists of names")
    if spec.representation not in get_args(Representation):
        raise ValueError(f"representation {spec.representation!r} is unknown to this bocage")
    if not isinstance(spec.series, bool):
        raise TypeError(f"series = {spec.series!r} must be true or false")
    numbers = (*spec.mean, *spec.std, spec.gsd, 0.0 if spec.nodata_below is None else spec.nodata_below)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise TypeError("mean, std, gsd and nodata_below must be finite numbers")


def _read_weights(encoder: Encoder, path: Path) -> None:
    """Copy the weights of ``path`` into ``encoder``, all of them or none."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    weights = _published_weights(encoder)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_names(path, weights, shapes)
            stored = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}") from error
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])


def _check_names(path: Path, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``InputError`` with a report of missing, unknown and misshapen tensors."""
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    findings = {
        "missing": [name for name in weights if name not in shapes],
        "unknown": [name for name in shapes if name not in weights],
        "of another shape": misshapen,
    }
    report = [
        f"{len(names)} {finding} ({', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''})"
        for finding, names in findings.items()
        if names
    ]
    if report:
        raise InputError(f"{path} does not fit {CONFIG_FILE} beside it, of {len(weights)} tensors: {'; '.join(report)}")
