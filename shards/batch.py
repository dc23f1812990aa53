"""The typed batch that travels from the reader to objectives and tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch


@dataclass(frozen=True)
class GroundWindow:
    """A square ground window inside a patch: offsets from the patch's upper-left corner and side, metres."""

    left: float
    top: float
    side: float


@dataclass
class Sample:
    """One patch, decoded and cropped, in native dtypes.

    Attributes:
        key: the patch id, e.g. ``D012-2019_AF-S1-27_5-10``.
        roi: ``D012-2019/AF-S1-27``: domain-year and region of interest.
        seed: ``seeds.sample_seed`` of (seed, epoch, key).
        window: the ground window the arrays cover.
        arrays: by modality, (C, H, W) or (T, C, H, W); absent modalities are not listed.
        dates: by modality with dates, (T,) int32 days since 15 May of the date's own year.
    """

    key: str
    roi: str
    seed: int
    window: GroundWindow
    arrays: dict[str, np.ndarray]
    dates: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Batch:
    """A batch of B samples of the same ground size. Its tensors may be views of one block of memory.

    Attributes:
        keys, rois: B names each.
        seeds: (B,) int64, the source of every random draw about a sample (``draws.py``).
        windows: (B, 3) float32, left, top, side of the ground window in metres.
        values: by modality, (B, C, H, W) or (B, T, C, H, W) in the native dtype; where a sample lacks the
            modality its entries are zeros and ``present`` is False. Series are padded with zeros to the longest.
        present: by modality, (B,) bool.
        dates: by modality with dates, (B, T) int32 days since 15 May; 0 where padded.
        padding: by modality with dates, (B, T) bool, True where there is no date.
    """

    keys: list[str]
    rois: list[str]
    seeds: torch.Tensor
    windows: torch.Tensor
    values: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]
    dates: dict[str, torch.Tensor]
    padding: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, rows: Sequence[int]) -> Batch:
        """The samples at ``rows``, in that order; one may come more than once."""
        index = torch.as_tensor(rows)
        chosen = self._mapped(lambda tensor: tensor[index])
        return replace(chosen, keys=[self.keys[row] for row in rows], rois=[self.rois[row] for row in rows])

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            seeds=function(self.seeds),
            windows=function(self.windows),
            values={name: function(tensor) for name, tensor in self.values.items()},
            present={name: function(tensor) for name, tensor in self.present.items()},
            dates={name: function(tensor) for name, tensor in self.dates.items()},
            padding={name: function(tensor) for name, tensor in self.padding.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on ``device``."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))
