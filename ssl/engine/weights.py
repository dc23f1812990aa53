"""The weights of a run: those that are trained, their moving average, and the bare task that others look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from bocage.ssl.engine.ema import MovingAverage, substitute, substituted
from bocage.ssl.engine.parallel.distributed import broadcast_
from bocage.ssl.engine.parallel.fsdp import gather_into, is_sharded


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a run trains and what it shows.

    Attributes:
        accelerator: of this process.
        task: the bare module, whole.
        learner: the module whose parameters the optimiser changes: ``task``, or a divided copy (``fsdp.train_module``).
        average: the moving average of the learner's weights, if one is kept.
    """

    accelerator: Accelerator
    task: nn.Module
    learner: nn.Module
    average: MovingAverage | None

    def gather(self) -> None:
        """Bring ``task`` up to date, with the running statistics of rank 0 on all of them; all ranks take part.

        What is whole already is not copied.
        """
        kept = self.learner.state_dict(keep_vars=True)
        for name, buffer in self.learner.named_buffers():
            if name in kept:
                broadcast_(buffer)
        if is_sharded(self.learner):
            gather_into(self.learner, self.task)

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """Context with ``task`` as it is to be evaluated; all ranks enter together, and then need no other."""
        self.gather()
        averages = self.average.tensors() if self.average is not None else None
        self.task.to(self.accelerator.device).eval()
        with torch.no_grad(), self.accelerator.autocast(), substituted(self.task, averages):
            yield self.task
        if is_sharded(self.learner):
            self.task.to("cpu")  # the device has its part of the weights, and whole ones only while they are looked at
        else:
            self.task.train()

    def hand_over(self) -> None:
        """Leave ``task`` on its device with the weights that the run ends with; all ranks take part."""
        self.gather()
        self.task.to(self.accelerator.device)
        if self.average is not None:
            substitute(self.task, self.average.tensors())
