"""Objectives on pooled window features of two sensors: NT-Xent and VICReg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bocage.shards.counter_rng import uniform
from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.model import EncodedBatch


@dataclass(frozen=True, kw_only=True)
class PooledConfig:
    """Projection heads of the objectives on pooled features.

    Attributes:
        width: channels of the projected vectors.
        hidden: channels of the hidden layer of the projection heads.
        temperature: temperature of NT-Xent.

    Raises:
        ValueError: a number of channels is below 1, or ``temperature`` is not positive.
    """

    width: int = 256
    hidden: int = 512
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for key in ("width", "hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"pooled.{key}={getattr(self, key)} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"pooled.temperature={self.temperature} must be positive")


class PooledVectors(nn.Module):
    """Base class: pool the deepest map of each sensor, project it, and pair two sensors per sample.

    The two sensors are drawn at random among the visible ones. A sample with a single visible sensor is paired with
    itself, which teaches nothing but that samples differ. All ranks therefore compare the same number of pairs.

    Args:
        encoders: encoders, by modality, at least two; only their widths are used.
        config: projection heads.

    Raises:
        InputError: there are fewer than two modalities.
    """

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise InputError(
                f"weights.pooled_contrast and weights.vicreg compare two sensors, and modalities has only "
                f"{', '.join(encoders)}: add one, or set both weights to 0"
            )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(encoder.widths[-1], config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width)
                )
                for name, encoder in encoders.items()
            }
        )

    def pairs(self, encoded: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projected vectors of two sensors per sample, (B, width) float32 each."""
        vectors = torch.stack([head(encoded.features[name][-1].mean(dim=(2, 3))) for name, head in self.heads.items()])
        visible = torch.stack([~encoded.masks[name].dropped for name in self.heads], dim=1)
        scores = uniform(encoded.seeds, "summaries", len(self.heads)).masked_fill(~visible, -1.0)
        first, second = scores.argsort(dim=1, descending=True, stable=True)[:, :2].unbind(dim=1)
        second = torch.where(visible.sum(dim=1) > 1, second, first)
        rows = torch.arange(len(visible), device=visible.device)
        return vectors[first, rows].float(), vectors[second, rows].float()


class PooledContrast(PooledVectors):
    """NT-Xent between the pooled vectors of two sensors, over the samples of all ranks (SimCLR, arXiv 2002.05709)."""

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__(encoders, config)
        from lightly.loss import NTXentLoss  # takes seconds to import

        self.loss = NTXentLoss(temperature=config.temperature, gather_distributed=torch.distributed.is_available())

    def forward(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss, a scalar; there are no metrics to log."""
        first, second = self.pairs(encoded)
        with torch.autocast(first.device.type, enabled=False):
            return self.loss(first, second), {}


class PooledVICReg(PooledVectors):
    """VICReg (arXiv 2105.04906) between the pooled vectors of two sensors; its variance term prevents collapse."""

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__(encoders, config)
        from lightly.loss import VICRegLoss  # takes seconds to import

        self.loss = VICRegLoss(gather_distributed=torch.distributed.is_available())

    def forward(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss, a scalar; there are no metrics to log."""
        first, second = self.pairs(encoded)
        with torch.autocast(first.device.type, enabled=False):
            return self.loss(first, second), {}
