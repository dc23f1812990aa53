"""Samples to one batch: native dtypes, zeros where a modality or a date is missing, and masks that say so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bocage.shards.batch import Batch, Sample
from bocage.shards.crop import crop
from bocage.shards.modality import Modality


def collate(samples: Sequence[Sample], modalities: Sequence[Modality]) -> Batch:
    """One batch of samples that share a window size.

    A modality that no sample has is there all the same, with zeros (and no date), so that objectives and tasks need
    not ask which modalities a batch happens to hold.
    """
    values: dict[str, torch.Tensor] = {}
    present: dict[str, torch.Tensor] = {}
    dates: dict[str, torch.Tensor] = {}
    padding: dict[str, torch.Tensor] = {}
    count = len(samples)
    for modality in modalities:
        name = modality.name
        blank = np.empty((len(modality.bands), modality.size, modality.size), dtype=modality.dtype)
        shape: tuple[int, ...] = crop(blank, modality, samples[0].window).shape
        if modality.has_dates:
            lengths = [len(sample.dates[name]) if name in sample.arrays else 0 for sample in samples]
            longest = max(lengths)
            shape = (longest, *shape)
            days = np.zeros((count, longest), dtype=np.int32)
            empty = np.ones((count, longest), dtype=np.bool_)
        stacked = np.zeros((count, *shape), dtype=modality.dtype)
        here = np.zeros(count, dtype=np.bool_)
        for index, sample in enumerate(samples):
            if name not in sample.arrays:
                continue
            here[index] = True
            if modality.has_dates:
                stacked[index, : lengths[index]] = sample.arrays[name]
                days[index, : lengths[index]] = sample.dates[name]
                empty[index, : lengths[index]] = False
            else:
                stacked[index] = sample.arrays[name]
        values[name] = torch.from_numpy(stacked)
        present[name] = torch.from_numpy(here)
        if modality.has_dates:
            dates[name] = torch.from_numpy(days)
            padding[name] = torch.from_numpy(empty)
    windows = [(sample.window.left, sample.window.top, sample.window.side) for sample in samples]
    return Batch(
        keys=[sample.key for sample in samples],
        rois=[sample.roi for sample in samples],
        seeds=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        windows=torch.tensor(windows, dtype=torch.float32),
        values=values,
        present=present,
        dates=dates,
        padding=padding,
    )
