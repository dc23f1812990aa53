"""Read tensors from weight files without executing their content, and compare them with the tensors of a module."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bocage.shards.errors import InputError

FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Floating-point dtypes between which weights may be cast."""

_PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_NESTED_KEYS = ("model", "state_dict")  # keys under which training scripts store the weights
_MAX_NAMES_SHOWN = 3
_MAX_NAME_LENGTH = 120


class _IgnoredObject:
    """Placeholder for an object that is not a tensor: accepts any constructor arguments and state, stores nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _plain_dict(*_: object) -> dict[object, object]:
    """Replace a ``defaultdict`` by an empty dictionary, so that its default factory is never called."""
    return {}


_IGNORED_CLASSES = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.PurePosixPath"),  # Python 3.13 only
    *("pathlib._local.WindowsPath", "pathlib._local.PureWindowsPath"),
    *("builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str"),  # of a defaultdict
)
"""Classes that training scripts store beside the weights and that ``torch.load(weights_only=True)`` rejects: numpy
scalars (metrics), paths and ``defaultdict``. They are not constructed either, because ``numpy.dtype`` trusts any state
that a file contains: ``_IgnoredObject`` replaces them. torch itself accepts ``OrderedDict``."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file, by name, on the CPU.

    Args:
        path: ``.safetensors`` file, or a ``.bin``, ``.pth``, ``.pt`` or ``.ckpt`` file, which ``torch.load`` reads with
            ``weights_only``: tensors and plain containers. Numpy scalars, paths and ``defaultdict``, which trainers
            store beside the weights, are ignored; any other object is an error. Weights may be nested under ``model``
            or ``state_dict``. Files are memory-mapped where possible, so optimizer states cost no memory.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds something other than named tensors.
    """
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long and for unreadable folders
        raise InputError(f"{path} is missing or not a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise InputError(f"{path} is not a weight file that bocage reads: give .safetensors, {', '.join(_PICKLE_SUFFIXES)}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, and torch's errors for unsupported dtypes and shapes
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is truncated or not a safetensors file: {reason}") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    replacements: list[Any] = [
        (_plain_dict, "collections.defaultdict"),
        *((_IgnoredObject, name) for name in _IGNORED_CLASSES),
    ]
    try:
        with torch.serialization.safe_globals(replacements):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # damaged archives raise many kinds of errors, forbidden objects UnpicklingError
        raise InputError(
            f"{path} is damaged or holds more than tensors, which is never executed: give the weights as .safetensors"
        ) from error
    for key in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(_is_dense_cpu_tensor(value) for value in content.values()):
        raise InputError(f"{path} does not hold named tensors")
    return dict(content)


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is an uncompressed zip archive, the format of ``torch.save`` since 1.6."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


def _is_dense_cpu_tensor(value: object) -> bool:
    """Whether a value is a dense tensor with data; a file may also describe tensors without data (meta, sparse)."""
    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """Report of loading a file into a module: one entry per tensor of either. ``str`` gives one line.

    Attributes:
        loaded: names of tensors copied unchanged.
        adapted: changes made before copying, by name.
        dropped: names in the file that the module does not need, for a known reason.
        missing: names of the module that the file lacks.
        unexpected: names in the file that the module lacks.
        mismatched: differences in shape, dtype or values between tensors that both have, by name.
    """

    loaded: tuple[str, ...] = ()
    adapted: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the file fits: no missing, unexpected or mismatched tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} loaded"]
        for outcome, names in (
            ("adapted", [f"{_printable(name)}: {change}" for name, change in self.adapted.items()]),
            ("dropped", [_printable(name) for name in self.dropped]),
            ("missing", [_printable(name) for name in self.missing]),
            ("unexpected", [_printable(name) for name in self.unexpected]),
            ("mismatched", [f"{_printable(name)}: {reason}" for name, reason in self.mismatched.items()]),
        ):
            if names:
                more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
                counts.append(f"{len(names)} {outcome} ({', '.join(names[:_MAX_NAMES_SHOWN])}{more})")
        return "; ".join(counts)


def compare_weights(
    expected: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    *,
    adapted: Mapping[str, str] | None = None,
    dropped: tuple[str, ...] = (),
    cast: bool = False,
) -> KeyReport:
    """Compare the tensors of a file with those of a module, before copying them.

    Args:
        expected: tensors of the module, of any shape.
        stored: tensors of the file by the module's names, after adaptation.
        adapted: changes already made to tensors of the file, by name.
        dropped: names of the file already left out.
        cast: whether to accept floating-point tensors of another precision, because published weights may be stored in
            half or double precision. The report lists them as adapted; ``Tensor.copy_`` and ``load_state_dict`` do the
            cast.

    Returns:
        Report of all tensors.
    """
    adapted = dict(adapted or {})
    shared = [name for name in expected if name in stored]
    mismatched = {name: reason for name in shared if (reason := _mismatch(expected[name], stored[name], cast))}
    matching = [name for name in shared if name not in mismatched]
    for name in matching:
        if stored[name].dtype != expected[name].dtype:
            precision = f"{_dtype_name(stored[name])} to {_dtype_name(expected[name])}"
            adapted[name] = f"{adapted[name]}, {precision}" if name in adapted else precision
    return KeyReport(
        loaded=tuple(name for name in matching if name not in adapted),
        adapted={name: adapted[name] for name in matching if name in adapted},
        dropped=dropped,
        missing=tuple(name for name in expected if name not in stored),
        unexpected=tuple(name for name in stored if name not in expected),
        mismatched=mismatched,
    )


def _mismatch(expected: torch.Tensor, stored: torch.Tensor, cast: bool) -> str | None:
    """Explain why a stored tensor cannot be copied to an expected one; None if it can."""
    if stored.shape != expected.shape:
        return f"shape {list(stored.shape)} instead of {list(expected.shape)}"
    if stored.dtype != expected.dtype and not (cast and {stored.dtype, expected.dtype} <= FLOAT_DTYPES):
        return f"{_dtype_name(stored)} instead of {_dtype_name(expected)}"
    if stored.is_floating_point() and not bool(stored.to(expected.dtype).isfinite().all()):
        return f"holds NaN, infinity or numbers that {_dtype_name(expected)} cannot represent"
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _printable(name: str) -> str:
    """Shorten a tensor name to one printable line, because a file may contain any text."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= _MAX_NAME_LENGTH else f"{shown[:_MAX_NAME_LENGTH]}..."
