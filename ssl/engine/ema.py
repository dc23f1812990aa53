"""The moving average of a task's weights, which evaluation and export use in place of the last ones.

Polyak & Juditsky, "Acceleration of stochastic approximation by averaging" (1992), with exponential weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

FILE = "ema.safetensors"


class MovingAverage:
    """Exponential moving average of the parameters and persistent buffers of ``task``; starts as they are now.

    ``average = decay * average + (1 - decay) * value``. Integer and boolean buffers (counters, index tables) are
    copied: averaged and rounded they would point elsewhere. A tied weight is averaged once. torch's ``AveragedModel``
    does not do the first, timm's ``ModelEmaV3`` not the second.

    Args:
        task: on its device already.
        decay: in (0, 1); it averages over about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, task: nn.Module, decay: float) -> None:
        kept = task.state_dict().keys()
        buffers = {name: value for name, value in task.named_buffers() if name in kept}
        self._live: dict[str, torch.Tensor] = {**dict(task.named_parameters()), **buffers}
        self._average = {name: value.detach().clone() for name, value in self._live.items()}
        self._blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step just done."""
        floating = [name for name, value in self._live.items() if value.is_floating_point()]
        self._blend([self._average[name] for name in floating], [self._live[name].detach() for name in floating], 0)
        for name in self._live.keys() - set(floating):
            self._average[name].copy_(self._live[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the task has the averaged weights."""
        last = {name: value.detach().clone() for name, value in self._live.items()}
        self.apply()
        try:
            yield
        finally:
            self._write(last)

    def apply(self) -> None:
        """Give the task the averaged weights for good."""
        self._write(self._average)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in self._live.items():
            value.copy_(values[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What ``FILE`` of a checkpoint holds."""
        return {name: value.contiguous() for name, value in self._average.items()}

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; one of a run that kept no average leaves it at the weights of that checkpoint."""
        if (folder / FILE).is_file():
            for name, value in load_file(folder / FILE).items():
                self._average[name].copy_(value)
