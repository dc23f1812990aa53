"""The segmentation loss: cross-entropy over the pixels whose class is scored."""

from __future__ import annotations

import torch
from torch.nn import functional

from bocage.shards.classes import ClassScheme

IGNORED = -100


def scored_targets(labels: torch.Tensor, present: torch.Tensor, scheme: ClassScheme) -> torch.Tensor:
    """Label values with ``IGNORED`` in unscored classes and in samples without the label.

    Args:
        labels: (B, H, W) uint8, values of ``scheme`` (sharding has checked them; another one raises ``IndexError``).
        present: (B,) bool.
        scheme: the classes.

    Returns:
        (B, H, W) int64.
    """
    table = torch.arange(len(scheme), device=labels.device)
    table[list(scheme.unscored)] = IGNORED
    return torch.where(present.view(-1, 1, 1), table[labels.long()], IGNORED)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ``IGNORED``; 0 with a zero gradient when there is none.

    Args:
        logits: (B, classes, H, W); computed in float32 whatever their dtype.
        targets: (B, H, W) int64.
    """
    total = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)
