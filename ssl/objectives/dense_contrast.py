"""The dense contrastive objective: the same ground looks alike to two sensors, other ground does not."""

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
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.engine.parallel.distributed import all_gather_with_grad, world_size
from bocage.ssl.objectives.decoder import Neck
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.tokens import build_neck, cell_means, georeferenced_tokens

_HOTTEST = math.log(100.0)  # of the learned scale: a limit as CLIP's, without which fp16 overflows


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The dense contrastive objective.

    Attributes:
        width: channels in which sensors are compared.
        cell: side of a cell of the ground grid, metres, rounded so that cells divide the window.
        cells: cells of a sample that are compared in a step, drawn at random.
        keys: cells of all ranks that each cell is compared with, drawn at random. Similarities take a rank
            samples x ``cells`` x (``keys`` + ``queue``) float32 for each ordered pair of sensors.
        queue: cells of earlier steps that are compared with as well, for batches too small to hold many others (MoCo,
            arXiv 1911.05722, without a second encoder: they are as the encoders were then); 0 keeps none.
        temperature: of the softmax; the start when it is learned.
        learn_temperature: whether it is a parameter (as in CLIP, arXiv 2103.00020, at most 100 times sharper than 1).

    Raises:
        ValueError: a size below 1, a negative ``queue``, a ``temperature`` not positive, a ``cell`` not within a patch.
    """

    width: int = 128
    cell: float = 12.8
    cells: int = 16
    keys: int = 4096
    queue: int = 0
    temperature: float = 0.1
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        for key in ("width", "cells", "keys"):
            if getattr(self, key) < 1:
                raise ValueError(f"contrastive.{key}={getattr(self, key)} must be at least 1")
        if self.queue < 0:
            raise ValueError(f"contrastive.queue={self.queue} must not be negative")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"contrastive.temperature={self.temperature} must be a positive number")
        if not 0 < self.cell <= PATCH_SIZE:
            raise ValueError(f"contrastive.cell={self.cell} must be positive, and at most a patch of {PATCH_SIZE} m")


class DenseContrast(nn.Module):
    """InfoNCE (arXiv 1807.03748) between sensors at the same place of the ground, as in OmniSat (arXiv 2404.08351).

    Feature maps of all stages of an encoder are projected linearly, averaged over the cells of a ground grid as far as
    the encoder saw them, and L2-normalised. For each ordered pair of sensors a cell of the one is told from cells of
    *other samples* as the other sees them, on all ranks; cells of the same sample, often next of kin, are no negatives.
    The loss is the mean over all such cells of all ranks and pairs: ranks compute what one rank would with all samples.
    What accumulation adds are samples, not negatives; a queue does that.

    Args:
        encoders: by modality, at least two; only their widths and strides are used.
        modalities: registry entries.
        config: the objective.

    Raises:
        InputError: fewer than two modalities, or cells finer than any feature map.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], modalities: Mapping[str, Modality], config: ContrastiveConfig
    ) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise InputError(
                f"weights.contrastive compares sensors, and modalities has {', '.join(encoders)} alone: add one, or "
                "give weights.contrastive=0"
            )
        finest, name = min((modalities[name].gsd * min(item.strides), name) for name, item in encoders.items())
        if config.cell < finest:
            raise InputError(
                f"contrastive.cell={config.cell:g}: the finest feature map, of {name}, has cells of {finest:g} m"
            )
        self.config = config
        self.necks = nn.ModuleDict(
            {name: build_neck(encoder, modalities[name], config.width) for name, encoder in encoders.items()}
        )
        # One element and not none: FSDP divides no scalars.
        scale = torch.tensor([-math.log(config.temperature)])
        self.log_scale = nn.Parameter(scale) if config.learn_temperature else None
        self.fixed_scale = 1.0 / config.temperature
        self.queue = _Queue(len(encoders), config.queue, config.width) if config.queue else None

    def cells(self, view: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What sensors say of cells, (M, B, cells, width) of length 1, and where they do, (M, B, cells) bool."""
        side = max(1, round(view.side / self.config.cell))
        vectors, known = [], []
        for name, neck in self.necks.items():
            assert isinstance(neck, Neck)
            means, seen = cell_means(georeferenced_tokens(view, name, neck), view.side, side)
            vectors.append(F.normalize(means.float(), dim=-1))
            known.append(seen & ~view.masks[name].whole[:, None])
        return torch.stack(vectors), torch.stack(known)

    def forward(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean of InfoNCE over cells and pairs, a scalar, and what to log.

        Logged are the share of cells told apart from all others, and the temperature if it is learned.
        """
        vectors, known = self.cells(view)
        count = min(self.config.cells, vectors.shape[2])
        draws = uniform(view.seeds, "contrastive cells", vectors.shape[2])
        chosen = draws.argsort(dim=1, stable=True)[:, :count]
        vectors = vectors.gather(2, chosen[None, :, :, None].expand(len(vectors), -1, -1, vectors.shape[-1]))
        known = known.gather(2, chosen[None].expand(len(known), -1, -1))
        keys, keys_known, owners = self._keys(vectors, known, view)
        scale = self.fixed_scale if self.log_scale is None else self.log_scale.clamp(max=_HOTTEST).exp()
        queries, own = vectors.flatten(1, 2), known.flatten(1, 2)
        foreign = view.samples.repeat_interleave(count)[:, None] != owners[None]
        total = vectors.new_zeros(())
        cells, right = vectors.new_zeros(()), vectors.new_zeros(())
        with torch.autocast(vectors.device.type, enabled=False):
            for one, other in permutations(range(len(vectors)), 2):
                allowed = foreign & keys_known[other][None]
                counts = own[one] & own[other] & allowed.any(dim=1)
                same = (queries[one] * queries[other]).sum(dim=-1) * scale
                others = (queries[one] @ keys[other].T * scale).masked_fill(~allowed, -torch.inf)
                losses = torch.logaddexp(same, others.logsumexp(dim=1)) - same
                # Before the sum, not after: what is not counted may be infinite.
                total = total + torch.where(counts, losses, 0.0).sum()
                cells = cells + counts.sum()
                right = right + (counts & (same > others.amax(dim=1))).sum()
        # Ranks average their gradients: each takes its share of the mean over the cells of all.
        everywhere = all_gather_with_grad(cells[None]).sum().clamp_min(1)
        figures = {"told_apart": right / cells.clamp_min(1)}
        if self.log_scale is not None:
            figures["temperature"] = (-self.log_scale.detach().clamp(max=_HOTTEST)).exp()
        return total * world_size() / everywhere, figures

    def _keys(
        self, vectors: torch.Tensor, known: torch.Tensor, view: EncodedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cells of all ranks to compare with: (M, K, width), (M, K) bool, and whose they are, (K,) ``View.samples``.

        Which ones are taken depends on the samples alone, not on their order or their rank. Those of the queue come
        last; while training, the queue then takes in the others in place of its oldest.
        """
        count = vectors.shape[2]
        everyone = all_gather_with_grad(vectors.transpose(0, 1))  # (samples of all ranks, M, cells, width)
        everyones = all_gather_with_grad(known.transpose(0, 1))
        owners, seeds = all_gather_with_grad(view.samples), all_gather_with_grad(view.seeds)
        keys = everyone.transpose(0, 1).flatten(1, 2)
        allowed = everyones.transpose(0, 1).flatten(1, 2)
        of = owners.repeat_interleave(count)
        if len(of) > self.config.keys:
            drawn = uniform(seeds, "contrastive keys", count).flatten().argsort(stable=True)[: self.config.keys]
            keys, allowed, of = keys[:, drawn], allowed[:, drawn], of[drawn]
        return (keys, allowed, of) if self.queue is None else self.queue(keys, allowed, of)


class _Queue(nn.Module):
    """Cells of earlier steps, newest first; in buffers, so that checkpoints keep them and bad steps leave none."""

    vectors: torch.Tensor
    known: torch.Tensor
    owners: torch.Tensor
    keep_to_themselves = True  # all ranks hold the same cells

    def __init__(self, sensors: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(sensors, size, width))
        self.register_buffer("known", torch.zeros(sensors, size, dtype=torch.bool))
        self.register_buffer("owners", torch.zeros(size, dtype=torch.int64))

    def forward(
        self, keys: torch.Tensor, known: torch.Tensor, owners: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The keys of a step and those of the queue; while training, the queue takes them in."""
        size = len(self.owners)
        keys = torch.cat([keys, self.vectors], dim=1)
        known, owners = torch.cat([known, self.known], dim=1), torch.cat([owners, self.owners])
        if self.training:
            # In place: DDP and the moving average hold on to the buffers.
            self.vectors.copy_(keys.detach()[:, :size])
            self.known.copy_(known[:, :size])
            self.owners.copy_(owners[:size])
        return keys, known, owners
