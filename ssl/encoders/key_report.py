"""The account of tensor names that every loader of weights gives, and by which it refuses a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Floating dtypes that weights may be cast between."""

_NAMES_SHOWN = 3
_LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """What became of every tensor of a file, and of every tensor a module has. ``str`` gives one line.

    Attributes:
        loaded: names copied as they are.
        adapted: what was done before copying, by name.
        dropped: names in the file that the module has no use for, for a known reason.
        missing: names of the module that the file lacks.
        unknown: names in the file that nothing explains.
        unfit: what is wrong with a tensor that both have, by name.
    """

    loaded: tuple[str, ...] = ()
    adapted: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every tensor of both sides is accounted for."""
        return not (self.missing or self.unknown or self.unfit)

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} loaded"]
        for finding, names in (
            ("adapted", [f"{_printable(name)}: {what}" for name, what in self.adapted.items()]),
            ("dropped", [_printable(name) for name in self.dropped]),
            ("missing", [_printable(name) for name in self.missing]),
            ("unknown", [_printable(name) for name in self.unknown]),
            ("unfit", [f"{_printable(name)}: {what}" for name, what in self.unfit.items()]),
        ):
            if names:
                more = ", ..." if len(names) > _NAMES_SHOWN else ""
                counts.append(f"{len(names)} {finding} ({', '.join(names[:_NAMES_SHOWN])}{more})")
        return "; ".join(counts)


def _printable(name: str) -> str:
    """A name as one short line, whatever a file calls its tensors."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}..."


def compare(
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    *,
    adapted: Mapping[str, str] | None = None,
    dropped: tuple[str, ...] = (),
    cast: bool = False,
) -> KeyReport:
    """The report of copying ``stored`` onto ``wanted``.

    Args:
        wanted: tensors of the module, of any shape.
        stored: tensors of the file under the module's names, after adaptation.
        adapted, dropped: what was done to the file's tensors before.
        cast: whether floating numbers of another precision are taken, as weights of others may be stored in half or
            double; the report has them as adapted. ``Tensor.copy_`` and ``load_state_dict`` do the cast.
    """
    adapted = dict(adapted or {})
    shared = [name for name in wanted if name in stored]
    unfit = {name: what for name in shared if (what := _misfit(wanted[name], stored[name], cast))}
    fitting = [name for name in shared if name not in unfit]
    for name in fitting:
        if stored[name].dtype != wanted[name].dtype:
            precision = f"{_dtype(stored[name])} to {_dtype(wanted[name])}"
            adapted[name] = f"{adapted[name]}, {precision}" if name in adapted else precision
    return KeyReport(
        loaded=tuple(name for name in fitting if name not in adapted),
        adapted={name: adapted[name] for name in fitting if name in adapted},
        dropped=dropped,
        missing=tuple(name for name in wanted if name not in stored),
        unknown=tuple(name for name in stored if name not in wanted),
        unfit=unfit,
    )


def _misfit(wanted: torch.Tensor, stored: torch.Tensor, cast: bool) -> str | None:
    """Why a stored tensor cannot become a wanted one, if so."""
    if stored.shape != wanted.shape:
        return f"shape {list(stored.shape)} instead of {list(wanted.shape)}"
    if stored.dtype != wanted.dtype and not (cast and {stored.dtype, wanted.dtype} <= PRECISIONS):
        return f"{_dtype(stored)} instead of {_dtype(wanted)}"
    if stored.is_floating_point() and not bool(stored.to(wanted.dtype).isfinite().all()):
        return f"holds NaN, infinity or numbers that {_dtype(wanted)} cannot hold"
    return None


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
