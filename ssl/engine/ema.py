"""Keep an exponential moving average (EMA) of a task's weights, for evaluation and export.

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

from bocage.ssl.engine.parallel.distributed import broadcast_, rank_local_buffer_names
from bocage.ssl.engine.parallel.fsdp import full_tensor, local_shard, shard_like

EMA_FILE = "ema.safetensors"


class MovingAverage:
    """Exponential moving average of the parameters and persistent buffers of ``task``; starts at their present values.

    ``average = decay * average + (1 - decay) * value``. Integer and boolean buffers (counters, index tables) are
    copied, because an averaged and rounded index would point elsewhere. Rank-local buffers are copied too. A tied
    weight is averaged once. torch's ``AveragedModel`` averages integers, and timm's ``ModelEmaV3`` tied weights twice.

    Args:
        task: module on its device.
        decay: decay per update, in (0, 1); the average spans about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, task: nn.Module, decay: float) -> None:
        persistent = task.state_dict().keys()
        buffers = {name: value for name, value in task.named_buffers() if name in persistent}
        self._live: dict[str, torch.Tensor] = {**dict(task.named_parameters()), **buffers}
        self._average = {name: value.detach().clone() for name, value in self._live.items()}
        self._blend = get_ema_multi_avg_fn(decay)
        self._buffers = set(buffers)
        rank_local = set(rank_local_buffer_names(task))
        self._averaged = [
            name for name, value in self._live.items() if value.is_floating_point() and name not in rank_local
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average, after an optimiser step."""
        averages = [local_shard(self._average[name]) for name in self._averaged]
        self._blend(averages, [local_shard(self._live[name].detach()) for name in self._averaged], 0)
        for name in self._live.keys() - set(self._averaged):
            self._average[name].copy_(self._live[name])

    def tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Gather the averages by name, on the CPU, as ``EMA_FILE`` holds them (a collective).

        Sharded weights are gathered tensor by tensor to their full shape. Buffers are rank 0's, as in DDP.

        Args:
            keep: whether this rank needs the result; other ranks return an empty mapping.
        """
        gathered = {}
        for name, value in self._average.items():
            if name in self._buffers:
                broadcast_(value)
            tensor = full_tensor(value)
            if keep:
                gathered[name] = tensor.cpu().contiguous()
        return gathered

    def load(self, folder: Path) -> None:
        """Load the average from a checkpoint. If the checkpoint has none, keep the weights of the checkpoint."""
        if (folder / EMA_FILE).is_file():
            saved = load_file(folder / EMA_FILE)
            for name, average in self._average.items():
                value = saved[name]
                average.copy_(shard_like(average, value.__getitem__) if isinstance(average, DTensor) else value)


@contextmanager
def swapped_weights(task: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Context in which ``task`` has other parameters and buffers, by name, of the same shape; None changes nothing."""
    if tensors is None:
        yield
        return
    original = {name: value.detach().clone() for name, value in _parameters_and_buffers(task, tensors).items()}
    copy_weights(task, tensors)
    try:
        yield
    finally:
        copy_weights(task, original)


@torch.no_grad()
def copy_weights(task: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy parameters and buffers, by name, into those of ``task``, of the same shape."""
    for name, value in _parameters_and_buffers(task, tensors).items():
        value.copy_(tensors[name])


def _parameters_and_buffers(task: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    values = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    return {name: values[name] for name in names}
