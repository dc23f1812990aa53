"""Samples to one batch in one block of memory: native dtypes, zeros where something is missing, and masks that say so.

A reading process fills the block where it decodes, in shared memory; to the training process travel one file
descriptor and a short description, however many tensors the batch has.
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

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the block."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PackedBatch:
    """A ``Batch`` as it travels: all its tensors in one block.

    Attributes:
        keys, rois: B names each.
        places: by field of ``Batch`` and modality (none for ``seeds`` and ``windows``), where the tensor lies.
        memory: (bytes,) uint8, the block; shared memory when it was made in a reading process.
    """

    keys: list[str]
    rois: list[str]
    places: dict[tuple[str, str], _Place]
    memory: torch.Tensor

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, one copy (the DataLoader calls this)."""
        return replace(self, memory=self.memory.pin_memory())

    def batch(self) -> Batch:
        """The tensors, views of the block."""
        fields: dict[str, dict[str, torch.Tensor]] = {"values": {}, "present": {}, "dates": {}, "padding": {}}
        single: dict[str, torch.Tensor] = {}
        for (field, name), place in self.places.items():
            flat = self.memory[place.offset : place.offset + place.bytes]
            fields.get(field, single)[name or field] = flat.view(getattr(torch, place.dtype)).view(place.shape)
        return Batch(self.keys, self.rois, seeds=single["seeds"], windows=single["windows"], **fields)


class BatchWriter:
    """A batch in the making: ``put`` or ``leave_out`` every modality of every sample.

    Args:
        keys, rois, seeds, windows: of each sample; the windows have one size.
        modalities: what the batch holds.
        longest: by modality with dates, the most dates that a sample has.

    Attributes:
        packed: the batch.
    """

    def __init__(
        self,
        keys: list[str],
        rois: list[str],
        seeds: Sequence[int],
        windows: Sequence[GroundWindow],
        modalities: Sequence[Modality],
        longest: Mapping[str, int],
    ) -> None:
        count = len(keys)
        places: dict[tuple[str, str], _Place] = {}
        end = 0

        def add(field: str, name: str, dtype: str, *shape: int) -> None:
            nonlocal end
            place = places[field, name] = _Place(end, dtype, shape)
            end += -(-place.bytes // _ALIGNMENT) * _ALIGNMENT

        add("seeds", "", "int64", count)
        add("windows", "", "float32", count, 3)
        for modality in modalities:
            name = modality.name
            rows, columns = pixel_slices(modality, windows[0])
            shape: tuple[int, ...] = (len(modality.bands), rows.stop - rows.start, columns.stop - columns.start)
            add("present", name, "bool", count)
            if modality.has_dates:
                add("dates", name, "int32", count, longest[name])
                add("padding", name, "bool", count, longest[name])
                shape = (longest[name], *shape)
            add("values", name, modality.dtype, count, *shape)
        self.packed = PackedBatch(keys, rois, places, _block(end))
        block = self.packed.memory.numpy()
        self._arrays = {key: np.ndarray(place.shape, place.dtype, block, place.offset) for key, place in places.items()}
        self._arrays["seeds", ""][:] = seeds
        self._arrays["windows", ""][:] = [(window.left, window.top, window.side) for window in windows]

    def put(self, index: int, modality: Modality, days: np.ndarray | None) -> np.ndarray:
        """The place of the values of sample ``index``, (C, H, W) or (T, C, H, W), to be written; the rest is padded.

        Args:
            index: of the sample in the batch.
            modality: which of its modalities.
            days: (T,) for a modality with dates.
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

    def leave_out(self, index: int, modality: Modality) -> None:
        """Sample ``index`` lacks the modality: zeros and no date."""
        name = modality.name
        self._arrays["values", name][index] = 0
        self._arrays["present", name][index] = False
        if modality.has_dates:
            self._arrays["dates", name][index] = 0
            self._arrays["padding", name][index] = True


def _block(size: int) -> torch.Tensor:
    """Memory for a batch, not cleared; in a reading process, memory that the training process will share."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As torch's own collation does it: `share_memory_` would copy an ordinary block.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def collate(samples: Sequence[Sample], modalities: Sequence[Modality]) -> Batch:
    """One batch of samples that share a window size.

    A modality that no sample has is there all the same, with zeros (and no date), so that objectives and tasks need
    not ask which modalities a batch happens to hold.
    """
    longest = {
        item.name: max(len(sample.dates[item.name]) if item.name in sample.arrays else 0 for sample in samples)
        for item in modalities
        if item.has_dates
    }
    writer = BatchWriter(
        [sample.key for sample in samples],
        [sample.roi for sample in samples],
        [sample.seed for sample in samples],
        [sample.window for sample in samples],
        modalities,
        longest,
    )
    for index, sample in enumerate(samples):
        for modality in modalities:
            if modality.name in sample.arrays:
                writer.put(index, modality, sample.dates.get(modality.name))[:] = sample.arrays[modality.name]
            else:
                writer.leave_out(index, modality)
    return writer.packed.batch()
