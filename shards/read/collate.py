"""Collate samples into a batch that lies in one block of memory.

Arrays keep their native dtypes. Missing modalities and padded dates are zeros, and masks mark them.

A DataLoader worker decodes straight into a block of shared memory. Only one file descriptor and a short description
travel to the training process, however many tensors the batch has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import get_worker_info

from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.modality import Modality
from bocage.shards.read.windows import pixel_slices
from bocage.shards.sample_seed import sample_id

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class _TensorSlot:
    """Offset, dtype and shape of one tensor in the block."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PackedBatch:
    """A ``Batch`` packed for transport between processes: all its tensors lie in one block.

    Attributes:
        keys: B sample keys.
        rois: B names of regions of interest.
        layout: slot of each tensor, by (field of ``Batch``, modality); the modality is empty for ``seeds``,
            ``sample_ids`` and ``windows``.
        memory: (bytes,) uint8, the block; shared memory if a DataLoader worker made it.
    """

    keys: list[str]
    rois: list[str]
    layout: dict[tuple[str, str], _TensorSlot]
    memory: torch.Tensor

    def pin_memory(self) -> PackedBatch:
        """Copy the batch into pinned memory at once (the DataLoader calls this)."""
        return replace(self, memory=self.memory.pin_memory())

    def unpack(self) -> Batch:
        """The batch, whose tensors are views of the block."""
        fields: dict[str, dict[str, torch.Tensor]] = {"values": {}, "present": {}, "dates": {}, "padding": {}}
        single: dict[str, torch.Tensor] = {}
        for (field, name), slot in self.layout.items():
            flat = self.memory[slot.offset : slot.offset + slot.bytes]
            fields.get(field, single)[name or field] = flat.view(getattr(torch, slot.dtype)).view(slot.shape)
        seeds, sample_ids, windows = single["seeds"], single["sample_ids"], single["windows"]
        return Batch(self.keys, self.rois, seeds=seeds, sample_ids=sample_ids, windows=windows, **fields)


class BatchWriter:
    """Fill a batch sample by sample: call ``add`` or ``add_missing`` for every modality of every sample.

    Args:
        keys: key of each sample.
        rois: region of interest of each sample.
        seeds: seed of each sample.
        windows: ground window of each sample; all windows have one size.
        modalities: modalities of the batch.
        max_dates: largest number of dates of any sample, by modality with dates.

    Attributes:
        packed: the batch; complete once every modality of every sample was added.
    """

    def __init__(
        self,
        keys: list[str],
        rois: list[str],
        seeds: Sequence[int],
        windows: Sequence[GroundWindow],
        modalities: Sequence[Modality],
        max_dates: Mapping[str, int],
    ) -> None:
        count = len(keys)
        layout: dict[tuple[str, str], _TensorSlot] = {}
        end = 0

        def reserve(field: str, name: str, dtype: str, *shape: int) -> None:
            nonlocal end
            slot = layout[field, name] = _TensorSlot(end, dtype, shape)
            end += -(-slot.bytes // _ALIGNMENT) * _ALIGNMENT

        reserve("seeds", "", "int64", count)
        reserve("sample_ids", "", "int64", count)
        reserve("windows", "", "float32", count, 3)
        for modality in modalities:
            name = modality.name
            rows, columns = pixel_slices(modality, windows[0])
            shape: tuple[int, ...] = (len(modality.bands), rows.stop - rows.start, columns.stop - columns.start)
            reserve("present", name, "bool", count)
            if modality.has_time_axis:
                reserve("dates", name, "int32", count, max_dates[name])
                reserve("padding", name, "bool", count, max_dates[name])
                shape = (max_dates[name], *shape)
            reserve("values", name, modality.dtype, count, *shape)
        self.packed = PackedBatch(keys, rois, layout, _allocate(end))
        block = self.packed.memory.numpy()
        self._arrays = {key: np.ndarray(slot.shape, slot.dtype, block, slot.offset) for key, slot in layout.items()}
        self._arrays["seeds", ""][:] = seeds
        self._arrays["sample_ids", ""][:] = [sample_id(key) for key in keys]
        self._arrays["windows", ""][:] = [(window.left, window.top, window.side) for window in windows]

    def add(self, index: int, modality: Modality, days: np.ndarray | None) -> np.ndarray:
        """Mark a modality of a sample as present, and pad its series.

        Args:
            index: index of the sample in the batch.
            modality: modality to add.
            days: (T,) dates of a modality with dates, else None.

        Returns:
            View of the block, (C, H, W) or (T, C, H, W); the caller writes the values into it.
        """
        name = modality.name
        values = self._arrays["values", name][index]
        self._arrays["present", name][index] = True
        if days is None:
            return values
        count = len(days)
        dates, padding = self._arrays["dates", name][index], self._arrays["padding", name][index]
        dates[:count], dates[count:] = days, 0
        padding[:count], padding[count:] = False, True
        values[count:] = 0
        return values[:count]

    def add_missing(self, index: int, modality: Modality) -> None:
        """Mark a modality of sample ``index`` as missing: zeros and no date."""
        name = modality.name
        self._arrays["values", name][index] = 0
        self._arrays["present", name][index] = False
        if modality.has_time_axis:
            self._arrays["dates", name][index] = 0
            self._arrays["padding", name][index] = True


def _allocate(size: int) -> torch.Tensor:
    """Uninitialised memory for a batch; shared with the training process if this is a DataLoader worker."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # torch's default_collate does the same; `share_memory_` would copy an ordinary block.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def collate(samples: Sequence[Sample], modalities: Sequence[Modality]) -> Batch:
    """Collate samples that share a window size into one batch.

    The batch holds every modality of ``modalities``. One that no sample has is all zeros without dates, so objectives
    and tasks need not check which modalities a batch holds.
    """
    max_dates = {
        item.name: max(len(sample.dates[item.name]) if item.name in sample.arrays else 0 for sample in samples)
        for item in modalities
        if item.has_time_axis
    }
    writer = BatchWriter(
        [sample.key for sample in samples],
        [sample.roi for sample in samples],
        [sample.seed for sample in samples],
        [sample.window for sample in samples],
        modalities,
        max_dates,
    )
    for index, sample in enumerate(samples):
        for modality in modalities:
            if modality.name in sample.arrays:
                writer.add(index, modality, sample.dates.get(modality.name))[:] = sample.arrays[modality.name]
            else:
                writer.add_missing(index, modality)
    return writer.packed.unpack()
