"""Running statistics of a model, kept over a step that may turn out bad."""

from __future__ import annotations

import torch
from torch import nn


class BufferSnapshot:
    """Persistent buffers as they were before a step: a bad batch spoils running statistics in the forward pass."""

    def __init__(self, task: nn.Module) -> None:
        kept = task.state_dict().keys()
        self._places = [
            (module, name)
            for prefix, module in task.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if (f"{prefix}.{name}" if prefix else name) in kept
        ]
        self._values: list[torch.Tensor] = []

    def remember(self) -> None:
        """Before a step."""
        self._values = [getattr(module, name).clone() for module, name in self._places]

    def restore(self) -> None:
        """After a bad one."""
        for (module, name), value in zip(self._places, self._values, strict=True):
            getattr(module, name).copy_(value)
