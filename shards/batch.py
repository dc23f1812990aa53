"""The typed batch that the data loader yields and that objectives and tasks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch


@dataclass(frozen=True)
class GroundWindow:
    """A square window on the ground, inside a patch.

    Attributes:
        left, top: offset from the upper-left corner of the patch, in metres.
        side: side of the window, in metres.
    """

    left: float
    top: float
    side: float


@dataclass
class Sample:
    """One patch, decoded and cropped, in native dtypes.

    Attributes:
        key: patch id, e.g. ``D012-2019_AF-S1-27_5-10``.
        roi: domain-year and region of interest, e.g. ``D012-2019/AF-S1-27``.
        seed: seed of the sample in this epoch (``sample_seed.sample_seed``).
        window: ground window that the arrays cover.
        arrays: array of each present modality, (C, H, W) or (T, C, H, W).
        dates: acquisition dates of each present series, (T,) int32 days since 15 May of the date's own year.
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
        keys: patch ids.
        rois: domain-year and region of interest of each sample.
        seeds: sample seeds, (B,) int64, from which all random numbers of a sample derive (``counter_rng``).
        sample_ids: hash of each patch id, (B,) int64, the same in every epoch (``sample_seed.sample_id``).
        windows: left, top and side of each ground window in metres, (B, 3) float32.
        values: values by modality, (B, C, H, W) or (B, T, C, H, W) in the native dtype. Samples that lack the modality
            have zeros. Series are padded with zeros to the longest.
        present: whether each sample has the modality, by modality, (B,) bool.
        dates: acquisition dates by series, (B, T) int32 days since 15 May; 0 where padded.
        padding: mask of padded dates by series, (B, T) bool.
    """

    keys: list[str]
    rois: list[str]
    seeds: torch.Tensor
    sample_ids: torch.Tensor
    windows: torch.Tensor
    values: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]
    dates: dict[str, torch.Tensor]
    padding: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, rows: Sequence[int]) -> Batch:
        """Batch of the samples at ``rows``, in that order. Rows may repeat."""
        index = torch.as_tensor(rows)
        selected = self._map_tensors(lambda tensor: tensor[index])
        return replace(selected, keys=[self.keys[row] for row in rows], rois=[self.rois[row] for row in rows])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Copy of the batch on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            seeds=function(self.seeds),
            sample_ids=function(self.sample_ids),
            windows=function(self.windows),
            values={name: function(tensor) for name, tensor in self.values.items()},
            present={name: function(tensor) for name, tensor in self.present.items()},
            dates={name: function(tensor) for name, tensor in self.dates.items()},
            padding={name: function(tensor) for name, tensor in self.padding.items()},
        )
