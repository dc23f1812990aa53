"""A bad step once more, from its dump: what is not finite, where it first appears, and in which sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bocage.shards.batch import Batch
from bocage.ssl.engine.health.bad_steps import RankDump
from bocage.ssl.engine.parallel.distributed import Precision, all_gather_object
from bocage.ssl.engine.rng import preserved_random_state, restore_random_state

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Finding:
    """What the replay of one micro-batch found.

    Attributes:
        losses: the loss, and what the task logged, by name.
        where: name of the first module whose output is not finite; empty when all are.
        gradients: names of parameters whose gradient is not finite.
        samples: keys of the samples whose loss or gradient is not finite when they are alone.
        refused: what the task said when it would not take one sample alone.
        inputs: by key and modality, how many values of the batch are not finite.
    """

    losses: dict[str, float]
    where: str
    gradients: list[str]
    samples: list[str]
    refused: str
    inputs: dict[tuple[str, str], int]

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return math.isfinite(self.losses["loss"]) and not self.gradients


def replay(
    task: nn.Module, dump: RankDump, *, precision: Precision, scale: float, threads: int, device: torch.device
) -> Iterator[Finding]:
    """What each micro-batch of a rank gives with the weights of ``task``; its buffers are as before in the end.

    When several ranks replay their parts together, all of them iterate in step.

    Args:
        task: as it was before the step; in training mode afterwards.
        dump: what the rank had.
        precision: of the forward pass.
        scale: of the loss in the backward pass (fp16).
        threads: of the run, where it computed on a CPU.
        device: where to compute.
    """
    task.to(device).train()
    restore_random_state(dump.random)
    threads_here = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _kept_buffers(task):
            for batch in dump.batches:
                with _first_not_finite(task) as found:
                    loss, logs = _passed(task, batch, precision, scale / len(dump.batches), device)
                finding = Finding(
                    {"loss": float(loss), **{name: float(value) for name, value in logs.items() if value.ndim != 2}},
                    found[0] if found else "",
                    _bad_gradients(task),
                    [],
                    "",
                    _not_finite_inputs(batch),
                )
                if any(all_gather_object(not finding.finite)):
                    _look_one_by_one(finding, task, batch, precision, scale, device)
                yield finding
    finally:
        torch.set_num_threads(threads_here)


def _look_one_by_one(
    finding: Finding, task: nn.Module, batch: Batch, precision: Precision, scale: float, device: torch.device
) -> None:
    for index, key in enumerate(batch.keys):
        # Twice the same: statistics of batches want two samples.
        with preserved_random_state(), _kept_buffers(task):
            try:
                loss, _ = _passed(task, batch.subset([index, index]), precision, scale, device)
            except (RuntimeError, ValueError, AssertionError) as error:
                finding.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                task.zero_grad()
                return
            if _bad_gradients(task) or not loss.isfinite():
                finding.samples.append(key)


def _passed(
    task: nn.Module, batch: Batch, precision: Precision, scale: float, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with _autocast(precision, device):
        loss, logs = task(batch.to(device))
    (loss.float() * scale).backward()
    return loss.detach(), logs


@contextmanager
def _kept_buffers(task: nn.Module) -> Iterator[None]:
    """Context whose forward passes leave no trace in running statistics and queues."""
    kept = {name: value.clone() for name, value in task.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in task.named_buffers():
                value.copy_(kept[name])


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


def _not_finite_inputs(batch: Batch) -> dict[tuple[str, str], int]:
    return {
        (key, name): int((~values[index].isfinite()).sum())
        for name, values in batch.values.items()
        if values.is_floating_point()
        for index, key in enumerate(batch.keys)
        if not values[index].isfinite().all()
    }
