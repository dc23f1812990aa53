"""Shard weights, gradients and optimiser state over ranks with FSDP2 (Zhao et al., arXiv 2304.11277).

This module calls torch's ``fully_shard`` itself. Accelerate has no FSDP without a GPU, finds blocks by class name, and
writes its checkpoints with pickle.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bocage.ssl.engine.parallel.block_compile import repeated_blocks


@contextmanager
def train_module_of(task: nn.Module, sharded: bool) -> Iterator[nn.Module]:
    """Context with the module whose weights the optimiser updates: ``task`` itself, or a copy of it to be sharded.

    With a sharded copy, ``task`` gets full weights only for evaluation, export and saving (``gather_into``). So
    evaluation needs no collectives, and code that reads ``task`` need not know how it was trained.
    """
    if not sharded:
        yield task
        return
    train_module = copy.deepcopy(task)
    # All ranks must run the same blocks in every step, because sharded weights are gathered by collectives. Encoders
    # normally skip a batch that lacks their sensor; this attribute, which they declare, makes them run on empty input.
    # The engine knows no encoder class: any module may declare the attribute.
    for module in train_module.modules():
        if hasattr(module, "run_without_samples"):
            module.run_without_samples = True  # type: ignore[assignment]
    with warnings.catch_warnings():
        # FSDP warns about every Swin block, but nothing here changes their outputs in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield train_module


def shard(train_module: nn.Module, device: torch.device, ranks: int) -> None:
    """Shard the weights of a module on ``device`` over ``ranks``: each repeated block, then the rest as one group.

    Weights are gathered as float32, also under bf16. FSDP's mixed precision would give norms 16-bit weights and float32
    inputs, which they refuse on the CPU. Autocast keeps copies of the gathered weights for the backward pass; only
    activation checkpointing frees them earlier.
    """
    mesh = init_device_mesh(device.type, (ranks,))
    for block in repeated_blocks(train_module):
        fully_shard(block, mesh=mesh)
    fully_shard(train_module, mesh=mesh)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor of any shape (a collective); return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor of any shape, without a copy; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(like: torch.Tensor, rows: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Build a tensor (N, ...) that is sharded as ``like`` is, on the device of ``like``.

    Args:
        like: sharded tensor, or a plain one.
        rows: function that returns the given rows of the full tensor.
    """
    if not isinstance(like, DTensor):
        return rows(slice(0, like.shape[0])).to(like.device)
    local, mesh = like.to_local(), like.device_mesh
    # fully_shard splits rows as torch.chunk does: equal chunks, the last ones smaller or empty.
    chunk = -(-like.shape[0] // mesh.size())
    start = min(chunk * mesh.get_local_rank(), like.shape[0])
    shard_rows = rows(slice(start, start + local.shape[0])).to(local.device).contiguous()
    return DTensor.from_local(
        shard_rows, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def gather_into(train_module: nn.Module, task: nn.Module) -> None:
    """Copy the weights of a sharded module into ``task``, tensor by tensor (a collective), and this rank's buffers."""
    target: dict[str, torch.Tensor] = task.state_dict()
    for name, tensor in train_module.state_dict().items():
        target[name].copy_(full_tensor(tensor))
