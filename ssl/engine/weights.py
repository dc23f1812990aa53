"""The weights of a run: those that are trained, their moving average, and the bare task that others look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from bocage.ssl.engine.ema import MovingAverage, substitute, substituted
from bocage.ssl.engine.fsdp import copy_whole, is_divided


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a run trains and what it shows.

    Attributes:
        accelerator: of this process.
        task: the bare module, whole.
        learner: the module whose parameters the optimiser changes: ``task``, or a divided copy (``fsdp.learner_of``).
        average: the moving average of the learner's weights, if one is kept.
    """

    accelerator: Accelerator
    task: nn.Module
    learner: nn.Module
    average: MovingAverage | None

    def gathered(self) -> dict[str, torch.Tensor] | None:
        """Bring ``task`` up to date, and return the averaged weights by name if they are kept; all ranks take part.

        What is whole already is not copied.
        """
        if is_divided(self.learner):
            copy_whole(self.learner, self.task)
        return self.average.tensors() if self.average is not None else None

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """Context with ``task`` as it is to be evaluated; all ranks enter together, and then need no other."""
        averaged = self.gathered()
        self.task.to(self.accelerator.device).eval()
        with torch.no_grad(), self.accelerator.autocast(), substituted(self.task, averaged):
            yield self.task
        if is_divided(self.learner):
            self.task.to("cpu")  # the device has its part of the weights, and whole ones only while they are looked at
        else:
            self.task.train()

    def hand_over(self) -> None:
        """Leave ``task`` on its device with the weights that the run ends with; all ranks take part."""
        averaged = self.gathered()
        self.task.to(self.accelerator.device)
        if averaged is not None:
            substitute(self.task, averaged)
