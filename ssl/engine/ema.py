"""The moving average of a task's weights, which evaluation and export use in place of the last ones.

Polyak & Juditsky, "Acceleration of stochastic approximation by averaging" (1992), with exponential weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bocage.ssl.engine.parallel.distributed import broadcast_, unshared_buffers
from bocage.ssl.engine.parallel.fsdp import full_tensor, local_shard, shard_like

FILE = "ema.safetensors"


class MovingAverage:
    """Exponential moving average of the parameters and persistent buffers of ``task``; starts as they are now.

    ``average = decay * average + (1 - decay) * value``. Integer and boolean buffers (counters, index tables) are
    copied: averaged and rounded they would point elsewhere; so are ``unshared_buffers``. A tied weight is averaged
    once. torch's ``AveragedModel`` does not do the first, timm's ``ModelEmaV3`` not the last.

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
        self._buffers = set(buffers)
        self._copied = set(unshared_buffers(task))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step just done."""
        floating = [
            name for name, value in self._live.items() if value.is_floating_point() and name not in self._copied
        ]
        averages = [local_shard(self._average[name]) for name in floating]
        self._blend(averages, [local_shard(self._live[name].detach()) for name in floating], 0)
        for name in self._live.keys() - set(floating):
            self._average[name].copy_(self._live[name])

    def tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The averages by name, on the CPU: what ``FILE`` holds. All ranks take part; those that ``keep`` get them.

        They have the shape of the whole weights: divided ones are put together one by one. Buffers are those of rank 0,
        as in DDP.
        """
        found = {}
        for name, value in self._average.items():
            if name in self._buffers:
                broadcast_(value)
            tensor = full_tensor(value)
            if keep:
                found[name] = tensor.cpu().contiguous()
        return found

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; one of a run that kept no average leaves it at the weights of that checkpoint."""
        if (folder / FILE).is_file():
            saved = load_file(folder / FILE)
            for name, own in self._average.items():
                value = saved[name]
                own.copy_(shard_like(own, value.__getitem__) if isinstance(own, DTensor) else value)


@contextmanager
def substituted(task: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Context in which ``task`` has other parameters and buffers, by name, of the same shape; None changes nothing."""
    if tensors is None:
        yield
        return
    last = {name: value.detach().clone() for name, value in _values(task, tensors).items()}
    substitute(task, tensors)
    try:
        yield
    finally:
        substitute(task, last)


@torch.no_grad()
def substitute(task: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give ``task`` other parameters and buffers, by name, of the same shape, for good."""
    for name, value in _values(task, tensors).items():
        value.copy_(tensors[name])


def _values(task: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    found = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    return {name: found[name] for name in names}
