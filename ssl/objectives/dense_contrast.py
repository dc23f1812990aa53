"""Dense cross-sensor InfoNCE on ground cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import nn

from bocage.shards.counter_rng import uniform
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.engine.parallel.distributed import all_gather_with_grad, world_size
from bocage.ssl.objectives.decoder import Neck
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.tokens import build_neck, cell_means, georeferenced_tokens

_CELLS_PER_PATCH = 8  # default number of ground cells along a side of a patch: cells of 12.8 m in FLAIR-HUB
_MAX_LOG_SCALE = math.log(100.0)  # upper limit of the learned logit scale, as in CLIP; fp16 overflows without it


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Dense contrast.

    Attributes:
        width: channels of the projected vectors.
        cell: side of a ground cell, in metres, rounded so that cells divide the window; null for an eighth of a patch,
            or a cell of the finest feature map where that is larger.
        cells_per_sample: random cells of a sample that are used as queries in a step.
        keys: random cells of all ranks that each query is compared with. The similarities of a rank take
            samples x ``cells_per_sample`` x (``keys`` + ``queue``) float32 values for each ordered pair of sensors.
        queue: cells of earlier steps that serve as additional keys, for batches with too few other samples (MoCo,
            arXiv 1911.05722, without a momentum encoder: the keys come from the encoders of their step); 0 disables it.
        temperature: temperature of the softmax; its initial value if it is learned.
        learn_temperature: whether the temperature is a parameter (CLIP, arXiv 2103.00020; at least 0.01).

    Raises:
        ValueError: a size is below 1, ``queue`` is negative, or ``temperature`` or ``cell`` is not positive.
    """

    width: int = 128
    cell: float | None = None
    cells_per_sample: int = 16
    keys: int = 4096
    queue: int = 0
    temperature: float = 0.1
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        for key in ("width", "cells_per_sample", "keys"):
            if getattr(self, key) < 1:
                raise ValueError(f"contrastive.{key}={getattr(self, key)} must be at least 1")
        if self.queue < 0:
            raise ValueError(f"contrastive.queue={self.queue} must not be negative")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"contrastive.temperature={self.temperature} must be a positive number")
        if self.cell is not None and not 0 < self.cell < math.inf:
            raise ValueError(f"contrastive.cell={self.cell} must be a positive number of metres")


class DenseContrast(nn.Module):
    """InfoNCE (arXiv 1807.03748) between sensors on the same ground cell, as in OmniSat (arXiv 2404.08351).

    The feature maps of an encoder are projected, averaged over the visible part of each ground cell, and L2-normalised.
    For each ordered pair of sensors, the positive of a query cell is the same cell in the other sensor. Its negatives
    are cells of other samples in the other sensor, on all ranks. Cells of the same sample are excluded because
    neighbours are near-duplicates. The loss is the mean over the cells of all ranks and sensor pairs, so several ranks
    compute the loss that one rank would compute from all samples. Gradient accumulation adds samples but no negatives;
    a queue adds negatives.

    Args:
        encoders: encoders, by modality, at least two; only their widths and strides are used.
        modalities: registry entries, by modality.
        config: dense contrast.

    Raises:
        InputError: there are fewer than two modalities, or cells are finer than every feature map or larger than a
            patch.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], modalities: Mapping[str, Modality], config: ContrastiveConfig
    ) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise InputError(
                f"weights.contrastive compares sensors, and modalities has {', '.join(encoders)} alone: add one, or "
                "set weights.contrastive=0"
            )
        patch_size = next(iter(modalities.values())).patch_size
        # A map of one cell covers the patch, even if the cell is larger.
        cells = {name: min(modalities[name].gsd * min(item.strides), patch_size) for name, item in encoders.items()}
        finest, name = min((side, name) for name, side in cells.items())
        self.cell = config.cell or max(patch_size / _CELLS_PER_PATCH, finest)
        if self.cell < finest:
            raise InputError(
                f"contrastive.cell={self.cell:g}: the finest feature map, of {name}, has cells of {finest:g} m; use "
                f"contrastive.cell={finest:g} or more"
            )
        if self.cell > patch_size:
            raise InputError(
                f"contrastive.cell={self.cell:g}: a patch is {patch_size:g} m wide; use "
                f"contrastive.cell={patch_size:g} or less"
            )
        self.config = config
        self.necks = nn.ModuleDict(
            {name: build_neck(encoder, modalities[name], config.width) for name, encoder in encoders.items()}
        )
        # One element instead of a scalar, because FSDP cannot shard scalars.
        scale = torch.tensor([-math.log(config.temperature)])
        self.log_scale = nn.Parameter(scale) if config.learn_temperature else None
        self.fixed_scale = 1.0 / config.temperature
        self.queue = _KeyQueue(len(encoders), config.queue, config.width) if config.queue else None

    def cell_vectors(self, encoded: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the vectors of all ground cells for M sensors.

        Returns:
            (M, B, cells, width) vectors of length 1, and (M, B, cells) bool: where a sensor has visible tokens.
        """
        side = max(1, round(encoded.side / self.cell))
        vectors, valid = [], []
        for name, neck in self.necks.items():
            assert isinstance(neck, Neck)
            means, visible = cell_means(georeferenced_tokens(encoded, name, neck), encoded.side, side)
            vectors.append(F.normalize(means.float(), dim=-1))
            valid.append(visible & ~encoded.masks[name].dropped[:, None])
        return torch.stack(vectors), torch.stack(valid)

    def forward(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the mean InfoNCE over cells and sensor pairs.

        Returns:
            The loss, a scalar, and metrics: ``accuracy``, the fraction of queries whose positive scores above all
            negatives, and ``temperature`` if it is learned.
        """
        vectors, valid = self.cell_vectors(encoded)
        count = min(self.config.cells_per_sample, vectors.shape[2])
        scores = uniform(encoded.seeds, "contrastive cells", vectors.shape[2])
        chosen = scores.argsort(dim=1, stable=True)[:, :count]
        vectors = vectors.gather(2, chosen[None, :, :, None].expand(len(vectors), -1, -1, vectors.shape[-1]))
        valid = valid.gather(2, chosen[None].expand(len(valid), -1, -1))
        keys, valid_keys, key_samples = self._keys(vectors, valid, encoded)
        scale = self.fixed_scale if self.log_scale is None else self.log_scale.clamp(max=_MAX_LOG_SCALE).exp()
        queries, valid_queries = vectors.flatten(1, 2), valid.flatten(1, 2)
        other_sample = encoded.sample_ids.repeat_interleave(count)[:, None] != key_samples[None]
        total = vectors.new_zeros(())
        cells, correct = vectors.new_zeros(()), vectors.new_zeros(())
        with torch.autocast(vectors.device.type, enabled=False):
            for sensor, other in permutations(range(len(vectors)), 2):
                is_negative = other_sample & valid_keys[other][None]
                counted = valid_queries[sensor] & valid_queries[other] & is_negative.any(dim=1)
                positive = (queries[sensor] * queries[other]).sum(dim=-1) * scale
                negatives = (queries[sensor] @ keys[other].T * scale).masked_fill(~is_negative, -torch.inf)
                losses = torch.logaddexp(positive, negatives.logsumexp(dim=1)) - positive
                # Masked before the sum, because losses that are not counted may be infinite.
                total = total + torch.where(counted, losses, 0.0).sum()
                cells = cells + counted.sum()
                correct = correct + (counted & (positive > negatives.amax(dim=1))).sum()
        # DDP averages gradients over ranks: each rank returns its part of the global mean, times the number of ranks.
        all_cells = all_gather_with_grad(cells[None]).sum().clamp_min(1)
        metrics = {"accuracy": correct / cells.clamp_min(1)}
        if self.log_scale is not None:
            metrics["temperature"] = (-self.log_scale.detach().clamp(max=_MAX_LOG_SCALE)).exp()
        return total * world_size() / all_cells, metrics

    def _keys(
        self, vectors: torch.Tensor, valid: torch.Tensor, encoded: EncodedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gather the keys of all ranks, followed by those of the queue.

        The choice of keys depends on the samples alone, not on their order or their rank. In training, the new keys
        then replace the oldest keys of the queue.

        Returns:
            (M, K, width) keys, (M, K) bool whether the sensor has the key, and (K,) int64 sample ids of the keys.
        """
        count = vectors.shape[2]
        all_vectors = all_gather_with_grad(vectors.transpose(0, 1))  # (samples of all ranks, M, cells, width)
        all_valid = all_gather_with_grad(valid.transpose(0, 1))
        sample_ids, seeds = all_gather_with_grad(encoded.sample_ids), all_gather_with_grad(encoded.seeds)
        keys = all_vectors.transpose(0, 1).flatten(1, 2)
        valid_keys = all_valid.transpose(0, 1).flatten(1, 2)
        key_samples = sample_ids.repeat_interleave(count)
        if len(key_samples) > self.config.keys:
            scores = uniform(seeds, "contrastive keys", count).flatten()
            chosen = scores.argsort(stable=True)[: self.config.keys]
            keys, valid_keys, key_samples = keys[:, chosen], valid_keys[:, chosen], key_samples[chosen]
        return (keys, valid_keys, key_samples) if self.queue is None else self.queue(keys, valid_keys, key_samples)


class _KeyQueue(nn.Module):
    """Keys of earlier steps, newest first.

    They are buffers, so that checkpoints save them and a skipped bad step restores them.
    """

    vectors: torch.Tensor
    valid: torch.Tensor
    sample_ids: torch.Tensor
    skip_buffer_broadcast = True  # all ranks hold the same keys, so DDP need not broadcast them

    def __init__(self, sensors: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(sensors, size, width))
        self.register_buffer("valid", torch.zeros(sensors, size, dtype=torch.bool))
        self.register_buffer("sample_ids", torch.zeros(size, dtype=torch.int64))

    def forward(
        self, keys: torch.Tensor, valid: torch.Tensor, sample_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append the keys of the queue to those of a step; in training, store the newest keys."""
        size = len(self.sample_ids)
        keys = torch.cat([keys, self.vectors], dim=1)
        valid, sample_ids = torch.cat([valid, self.valid], dim=1), torch.cat([sample_ids, self.sample_ids])
        if self.training:
            # In place, because DDP and the EMA hold references to the buffers.
            self.vectors.copy_(keys.detach()[:, :size])
            self.valid.copy_(valid[:, :size])
            self.sample_ids.copy_(sample_ids[:size])
        return keys, valid, sample_ids
