"""Objectives over whole windows: what two sensors say of a sample as a whole belongs together."""

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
    """Objectives over whole windows.

    Attributes:
        width: channels in which sensors are compared.
        hidden: channels of the layer before.
        temperature: of NT-Xent.

    Raises:
        ValueError: channels below 1, or a ``temperature`` that is not positive.
    """

    width: int = 256
    hidden: int = 512
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for key in ("width", "hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"summaries.{key}={getattr(self, key)} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"summaries.temperature={self.temperature} must be positive")


class PooledVectors(nn.Module):
    """Two sensors' summaries of each sample: means of their deepest maps, through a head for each sensor.

    Which two of the sensors that are visible is drawn for each sample; one that is visible alone is paired with itself,
    which teaches nothing but that samples differ. So all ranks compare as many pairs, whatever their samples lack.

    Args:
        encoders: by modality, at least two; only their widths are used.
        config: of the objective.

    Raises:
        InputError: fewer than two modalities.
    """

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise InputError(f"weights: two sensors are compared, and modalities has {', '.join(encoders)} alone")
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(encoder.widths[-1], config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width)
                )
                for name, encoder in encoders.items()
            }
        )

    def pairs(self, view: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summaries of each sample by the one and by the other sensor, (B, width) float32 each."""
        summaries = torch.stack([head(view.maps[name][-1].mean(dim=(2, 3))) for name, head in self.heads.items()])
        visible = torch.stack([~view.masks[name].whole for name in self.heads], dim=1)
        draws = uniform(view.seeds, "summaries", len(self.heads)).masked_fill(~visible, -1.0)
        first, second = draws.argsort(dim=1, descending=True, stable=True)[:, :2].unbind(dim=1)
        second = torch.where(visible.sum(dim=1) > 1, second, first)
        rows = torch.arange(len(visible), device=visible.device)
        return summaries[first, rows].float(), summaries[second, rows].float()


class PooledContrast(PooledVectors):
    """NT-Xent between summaries of two sensors, over the samples of all ranks (SimCLR, arXiv 2002.05709; lightly)."""

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__(encoders, config)
        from lightly.loss import NTXentLoss  # takes seconds to import

        self.loss = NTXentLoss(temperature=config.temperature, gather_distributed=torch.distributed.is_available())

    def forward(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a scalar, and nothing else to log."""
        one, other = self.pairs(view)
        with torch.autocast(one.device.type, enabled=False):
            return self.loss(one, other), {}


class PooledVICReg(PooledVectors):
    """Variance, invariance and covariance of summaries (VICReg, arXiv 2105.04906; lightly), against collapse."""

    def __init__(self, encoders: Mapping[str, Encoder], config: PooledConfig) -> None:
        super().__init__(encoders, config)
        from lightly.loss import VICRegLoss  # takes seconds to import

        self.loss = VICRegLoss(gather_distributed=torch.distributed.is_available())

    def forward(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a scalar, and nothing else to log."""
        one, other = self.pairs(view)
        with torch.autocast(one.device.type, enabled=False):
            return self.loss(one, other), {}
