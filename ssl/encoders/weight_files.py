"""Files of weights to tensors by name, without executing anything that they hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from bocage.shards.errors import InputError

_PICKLED = (".bin", ".pth", ".pt", ".ckpt")
_NESTED_UNDER = ("model", "state_dict")  # keys under which training scripts keep the weights


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, on the CPU.

    Args:
        path: ``.safetensors``; or ``.bin``, ``.pth``, ``.pt`` or ``.ckpt``, which torch reads under ``weights_only``:
            tensors and plain containers, no other object. Weights may be nested under ``model`` or ``state_dict``.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds something else than named tensors.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, no exception for names too long or folders closed to us
        raise InputError(f"{path} is missing or not a file")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in _PICKLED:
        return _pickled(path)
    raise InputError(f"{path} is not a file of weights that bocage reads: .safetensors, {', '.join(_PICKLED)}")


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, and torch's own on dtypes and shapes it cannot hold
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is truncated or not a safetensors file: {reason}") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives end in a dozen kinds, forbidden objects in UnpicklingError
        raise InputError(
            f"{path} is damaged or holds more than tensors, which is never executed: give the weights as .safetensors"
        ) from error
    for key in _NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(_is_plain(tensor) for tensor in content.values()):
        raise InputError(f"{path} does not hold tensors by name")
    return dict(content)


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
