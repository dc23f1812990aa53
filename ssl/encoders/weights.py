"""Files of weights to tensors by name, without executing anything that they hold."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bocage.shards.errors import InputError

_PICKLED = (".bin", ".pth", ".pt", ".ckpt")
_NESTED_UNDER = ("model", "state_dict")  # keys under which training scripts keep the weights


class _Inert:
    """Stands where a file has a value that is no weight: takes what it is made from and keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _plain_dict(*_: object) -> dict[object, object]:
    """In place of a ``defaultdict``, whose function for absent keys must not be called."""
    return {}


_PASSED_OVER = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.PurePosixPath"),  # Python 3.13 alone
    *("pathlib._local.WindowsPath", "pathlib._local.PureWindowsPath"),
    *("builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str"),  # of a defaultdict
)
"""What training scripts keep beside the weights and torch does not read by itself: metrics as numpy scalars, paths,
dictionaries with a default. Not even these are constructed (``numpy.dtype`` believes whatever state a file gives it):
their names get a class that does nothing. ``OrderedDict`` is among what torch reads."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, on the CPU.

    Args:
        path: ``.safetensors``; or ``.bin``, ``.pth``, ``.pt`` or ``.ckpt``, which torch reads under ``weights_only``:
            tensors and plain containers. Numpy scalars, paths and ``defaultdict``, which trainers keep beside the
            weights, are passed over; any other object is refused. Weights may be nested under ``model`` or
            ``state_dict``. Tensors are mapped, not read, where the file allows: states of optimisers cost no memory.

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
    stand_ins: list[Any] = [(_plain_dict, "collections.defaultdict"), *((_Inert, name) for name in _PASSED_OVER)]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
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


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is an archive of uncompressed parts, as torch has written them since 1.6."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


def _is_plain(value: object) -> bool:
    """Whether a value is a dense tensor with numbers of its own; a file may also describe tensors without any."""
    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"
