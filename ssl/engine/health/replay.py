"""Replay a bad step from its dump: which values are not finite, where they first appear, and in which samples."""

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
    """Result of the replay of one micro-batch.

    Attributes:
        losses: loss and logs of the task, by name.
        first_module: name of the first module with a non-finite output; empty if all outputs are finite.
        gradients: names of parameters with a non-finite gradient.
        samples: keys of the samples that alone give a non-finite loss or gradient.
        refusal: error of the task if it does not accept a single sample; else empty.
        inputs: number of non-finite input values, by sample key and modality.
    """

    losses: dict[str, float]
    first_module: str
    gradients: list[str]
    samples: list[str]
    refusal: str
    inputs: dict[tuple[str, str], int]

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are finite."""
        return math.isfinite(self.losses["loss"]) and not self.gradients


def replay(
    task: nn.Module, dump: RankDump, *, precision: Precision, scale: float, threads: int, device: torch.device
) -> Iterator[Finding]:
    """Replay each micro-batch of a rank with the weights of ``task``. The buffers of ``task`` end unchanged.

    If several ranks replay their parts together, all of them must iterate over as many micro-batches.

    Args:
        task: module with the weights from before the step; it ends in training mode.
        dump: inputs of the rank.
        precision: precision of the forward pass.
        scale: loss scale of the backward pass (fp16).
        threads: number of threads of the run, which affects sums on a CPU.
        device: device of the replay.
    """
    task.to(device).train()
    restore_random_state(dump.random)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _preserved_buffers(task):
            for batch in dump.batches:
                with _non_finite_modules(task) as modules:
                    loss, logs = _forward_backward(task, batch, precision, scale / len(dump.batches), device)
                finding = Finding(
                    losses={
                        "loss": float(loss),
                        **{name: float(value) for name, value in logs.items() if value.numel() == 1},
                    },
                    first_module=modules[0] if modules else "",
                    gradients=_non_finite_gradients(task),
                    samples=[],
                    refusal="",
                    inputs=_non_finite_inputs(batch),
                )
                if any(all_gather_object(not finding.finite)):
                    _try_single_samples(finding, task, batch, precision, scale, device)
                yield finding
    finally:
        torch.set_num_threads(threads_before)


def _try_single_samples(
    finding: Finding, task: nn.Module, batch: Batch, precision: Precision, scale: float, device: torch.device
) -> None:
    for index, key in enumerate(batch.keys):
        # The sample is there twice, because batch statistics need two samples.
        with preserved_random_state(), _preserved_buffers(task):
            try:
                loss, _ = _forward_backward(task, batch.subset([index, index]), precision, scale, device)
            except (RuntimeError, ValueError, AssertionError) as error:
                finding.refusal = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                task.zero_grad()
                return
            if _non_finite_gradients(task) or not loss.isfinite():
                finding.samples.append(key)


def _forward_backward(
    task: nn.Module, batch: Batch, precision: Precision, scale: float, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with _autocast(precision, device):
        loss, logs = task(batch.to(device))
    (loss.float() * scale).backward()
    return loss.detach(), logs


@contextmanager
def _preserved_buffers(task: nn.Module) -> Iterator[None]:
    """Context after which running statistics and queues have their values from before."""
    values = {name: value.clone() for name, value in task.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in task.named_buffers():
                value.copy_(values[name])


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else nullcontext()


@contextmanager
def _non_finite_modules(task: nn.Module) -> Iterator[list[str]]:
    """Context that lists the names of modules with a non-finite output, in the order in which they finish."""
    names: list[str] = []

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not tensor.isfinite().all() for tensor in _tensors(output)):
                names.append(name)

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in task.named_modules() if name]
    try:
        yield names
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


def _non_finite_gradients(task: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite; all gradients are cleared."""
    names = [
        name
        for name, parameter in task.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    task.zero_grad()
    return names


def _non_finite_inputs(batch: Batch) -> dict[tuple[str, str], int]:
    return {
        (key, name): int((~values[index].isfinite()).sum())
        for name, values in batch.values.items()
        if values.is_floating_point()
        for index, key in enumerate(batch.keys)
        if not values[index].isfinite().all()
    }
