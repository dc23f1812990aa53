"""FSDP2: weights, gradients and optimiser state divided among ranks (Zhao et al., arXiv 2304.11277).

torch's ``fully_shard`` is called here and not by Accelerate, which has no FSDP without a GPU, tells blocks by the names
of classes, and writes its checkpoints with pickle.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bocage.ssl.engine.parallel.block_compile import repeated_blocks


@contextmanager
def train_module(task: nn.Module, divided: bool) -> Iterator[nn.Module]:
    """Context with the module whose weights the optimiser changes: ``task`` itself, or a copy of it to be divided.

    While it is divided, ``task`` only receives whole weights when they are evaluated, exported or saved
    (``gather_into``): so evaluation needs no other rank, and what reads a task need not know how it was trained.
    """
    if not divided:
        yield task
        return
    learner = copy.deepcopy(task)
    # All ranks must run the same blocks and have the same gradients, also one whose batch lacks a sensor.
    for module in learner.modules():
        if hasattr(module, "runs_always"):
            module.runs_always = True
    with warnings.catch_warnings():
        # Said of every Swin block: nothing here changes their outputs in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield learner


def shard(learner: nn.Module, device: torch.device, ranks: int) -> None:
    """Divide the weights of a module on ``device`` among ``ranks``: by block, and in one go what does not repeat.

    They are gathered as float32, also under bf16: FSDP's own mixed precision would give norms 16-bit weights and
    float32 inputs, which they refuse on the CPU. What autocast copies of them for the backward pass is only let go of
    early by recomputed blocks (``regions.recomputed``).
    """
    mesh = init_device_mesh(device.type, (ranks,))
    for block in repeated_blocks(learner):
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` had it."""
    return isinstance(module, FSDPModule)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A divided tensor, of any shape, put together (all ranks take part); any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor of any shape, in the same memory: rows of a divided one, all of another."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(like: torch.Tensor, rows: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """A tensor (N, ...) divided as ``like`` is, from the rows that ``rows`` gives of it, on the device of ``like``."""
    if not isinstance(like, DTensor):
        return rows(slice(0, like.shape[0])).to(like.device)
    local, mesh = like.to_local(), like.device_mesh
    # fully_shard divides rows as torch.chunk does: equal chunks, the last ones smaller or empty.
    chunk = -(-like.shape[0] // mesh.size())
    start = min(chunk * mesh.get_local_rank(), like.shape[0])
    own = rows(slice(start, start + local.shape[0])).to(local.device).contiguous()
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def gather_into(learner: nn.Module, task: nn.Module) -> None:
    """Give ``task`` the weights of a divided copy of it, one by one (all ranks take part), and its own buffers."""
    own: dict[str, Any] = task.state_dict()
    for name, tensor in learner.state_dict().items():
        own[name].copy_(full_tensor(tensor))
