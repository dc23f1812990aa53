"""A bad step once more, from its dump: what is not finite, where it first appears, and in which sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from bocage.shards.batch import Batch
from bocage.ssl.engine.distributed import Precision
from bocage.ssl.engine.dumps import RankDump
from bocage.ssl.engine.randomness import preserved_random_state, restore_random_state

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Finding:
    """What the replay of one micro-batch found.

    Attributes:
        losses: the loss, and what the task logged, by name.
        where: name of the first module whose output is not finite; empty when all are.
        gradients: names of parameters whose gradient is not finite.
        samples: keys of the samples whose loss or gradient is not finite when they are alone.
        inputs: by key and modality, how many values of the batch are not finite.
    """

    losses: dict[str, float]
    where: str
    gradients: list[str]
    samples: list[str]
    inputs: dict[tuple[str, str], int]

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return math.isfinite(self.losses["loss"]) and not self.gradients


def replay(
    task: nn.Module, dump: RankDump, *, precision: Precision, scale: float, threads: int, device: torch.device
) -> Iterator[Finding]:
    """What each micro-batch of a rank gives with the weights of ``task``, which is in training mode afterwards.

    Args:
        task: as it was before the step.
        dump: what the rank had.
        precision: of the forward pass.
        scale: of the loss in the backward pass (fp16).
        threads: of the run, where it computed on a CPU.
        device: where to compute.
    """
    task.to(device).train()
    buffers = {name: value.clone() for name, value in task.named_buffers()}
    restore_random_state(dump.random)
    threads_here = torch.get_num_threads()
    torch.set_num_threads(threads)
    for batch in dump.batches:
        with _first_not_finite(task) as found, _autocast(precision, device):
            loss, logs = task(batch.to(device))
        (loss.float() * scale / len(dump.batches)).backward()
        gradients = _bad_gradients(task)
        losses = {
            "loss": float(loss.detach()),
            **{name: float(value) for name, value in logs.items() if value.ndim != 2},
        }
        finding = Finding(losses, found[0] if found else "", gradients, [], _not_finite_inputs(batch))
        if not finding.finite:
            with preserved_random_state():
                finding.samples += _bad_alone(task, batch, precision, scale, device)
        yield finding
    torch.set_num_threads(threads_here)
    with torch.no_grad():
        for name, value in task.named_buffers():
            value.copy_(buffers[name])


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else nullcontext()


@contextmanager
def _first_not_finite(task: nn.Module) -> Iterator[list[str]]:
    """Context that gathers names of modules whose output is not finite, in the order in which they end."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if any(not tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in task.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _bad_gradients(task: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite; no gradient is left."""
    names = [
        name
        for name, parameter in task.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    task.zero_grad()
    return names


def _bad_alone(
    task: nn.Module, batch: Batch, precision: Precision, scale: float, device: torch.device
) -> Iterator[str]:
    for index, key in enumerate(batch.keys):
        with _autocast(precision, device):
            loss, _ = task(_sample(batch, index).to(device))
        (loss.float() * scale).backward()
        if _bad_gradients(task) or not loss.isfinite():
            yield key


def _sample(batch: Batch, index: int) -> Batch:
    own = slice(index, index + 1)

    def one(value: Any) -> Any:
        return {name: item[own] for name, item in value.items()} if isinstance(value, dict) else value[own]

    return replace(batch, **{item.name: one(getattr(batch, item.name)) for item in fields(batch)})


def _not_finite_inputs(batch: Batch) -> dict[tuple[str, str], int]:
    return {
        (key, name): int((~values[index].isfinite()).sum())
        for name, values in batch.values.items()
        if values.is_floating_point()
        for index, key in enumerate(batch.keys)
        if not values[index].isfinite().all()
    }
