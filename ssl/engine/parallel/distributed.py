"""Set up ranks (Accelerate, DDP) and call collectives. Only this module knows how many processes train together."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.locks import FileLock
from bocage.ssl.engine.parallel.fsdp import shard

Precision = Literal["fp32", "bf16", "fp16"]
Value = TypeVar("Value")

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(precision: Precision, tracker: str, folder: Path, rank_timeout: float) -> Accelerator:
    """Build the Accelerator of this process: a GPU if there is one, DDP if a launcher started several ranks.

    On machines without a GPU, ``torchrun --nproc_per_node N`` starts the ranks and gloo connects them. Weights stay
    float32; ``bf16`` and ``fp16`` mean autocast (and loss scaling) around the forward pass.

    Args:
        precision: precision of the forward pass.
        tracker: name of an Accelerate tracker, or ``none``.
        folder: folder in which the tracker writes.
        rank_timeout: seconds after which a collective fails because a rank does not answer.

    Raises:
        InputError: fp16 without a GPU, or a launcher that asks for Accelerate's FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            "the launcher asks for Accelerate's own FSDP (ACCELERATE_USE_FSDP): take fsdp_config and --use_fsdp out of "
            "its configuration and set engine.parallel=fsdp instead"
        )
    cpu = not torch.accelerator.is_available()
    if cpu and precision == "fp16":
        raise InputError("engine.precision=fp16 needs a GPU; use bf16 or fp32")
    # Accelerate keeps its settings for the life of the process and refuses a second run with another precision. But
    # one process may pretrain and then fine-tune. The process group (PartialState) stays.
    AcceleratorState._reset_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_MIXED_PRECISION[precision],
            log_with=None if tracker == "none" else tracker,
            project_dir=folder,
            # If a whole batch lacks a sensor, the encoder of that sensor gets no gradient in that step.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout)),
            ],
        )
    if torch.distributed.is_initialized():
        atexit.register(_destroy_process_group)
    return accelerator


def _destroy_process_group() -> None:
    # DDP's reference cycles hold the process group. Destroying the group before them sometimes aborts the exit.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def prepared_model(accelerator: Accelerator, train_module: nn.Module, sharded: bool) -> Iterator[nn.Module]:
    """Context with ``train_module`` on its device, in its precision, replicated (DDP) or sharded (FSDP).

    Args:
        accelerator: the Accelerator of this process.
        train_module: the module that the optimiser trains. On exit it is unwrapped but stays on the device.
        sharded: whether to shard the weights with ``fsdp.shard``, which cannot be undone.
    """
    # DDP reads this attribute; it has no argument for it.
    train_module.__dict__["_ddp_params_and_buffers_to_ignore"] = rank_local_buffer_names(train_module)
    model = accelerator.prepare_model(train_module, evaluation_mode=sharded)
    try:
        if sharded:
            shard(train_module, accelerator.device, accelerator.num_processes)
        yield model
    finally:
        # Accelerate replaced `forward` with one that runs under autocast.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def rank_local_buffer_names(module: nn.Module) -> list[str]:
    """List the buffers of sub-modules that set ``skip_buffer_broadcast``, such as a queue.

    Ranks do not synchronise these buffers, and their values are no statistics that an average over steps could keep.
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, submodule in module.named_modules()
        if getattr(submodule, "skip_buffer_broadcast", False)
        for name, _ in submodule.named_buffers(recurse=False)
    ]


def gradient_sync(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Context of one forward and backward pass, after which DDP averages the gradients over ranks if ``enabled``."""
    return nullcontext() if enabled else accelerator.no_sync(model)


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Context in which no other run writes in ``output``; all ranks enter together.

    Raises:
        InputError: another run writes there.
    """
    with ExitStack() as stack:

        def acquire() -> None:
            # If the folder cannot be written, the first file written there raises the error.
            if is_main():
                with suppress(OSError):
                    stack.enter_context(FileLock(output / ".lock", range(1), output))

        run_on_all_ranks(acquire)
        yield


def all_reduce_max(accelerator: Accelerator, *flags: torch.Tensor) -> list[int]:
    """Reduce each flag, a small non-negative scalar, to its maximum over ranks; all ranks get the same list.

    This costs one all-reduce of a few bytes and one device-to-host copy.
    """
    values = torch.stack([flag.to(accelerator.device, torch.int32) for flag in flags])
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def all_gather_object(value: Value) -> list[Value]:
    """Gather ``value`` of every rank, in rank order, on all ranks (pickled between our own processes only)."""
    return list(gather_object([value]))


def run_on_all_ranks(action: Callable[[], Value]) -> list[Value]:
    """Call ``action`` on every rank and gather the results in rank order.

    Raises:
        InputError: on all ranks, if ``action`` raised it on any rank.
    """
    value, message = None, None
    try:
        value = action()
    except InputError as error:
        message = str(error)
    results = all_gather_object((value, message))
    for _, message in results:
        if message is not None:
            raise InputError(message)
    return [cast(Value, value) for value, _ in results]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors (N, ...) of all ranks, of one shape and dtype, to (ranks * N, ...).

    The backward pass returns to each rank the sum over ranks of the gradients of its rows.
    """
    if world_size() == 1:
        return tensor
    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor  # gloo has no bool
    gathered: torch.Tensor = _AllGather.apply(sent.contiguous())
    return gathered.to(tensor.dtype)


class _AllGather(torch.autograd.Function):
    """All-gather with a gradient.

    torch's own function is deprecated. Under gloo it gives wrong gradients if incoming gradients are not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """(N, ...) of this rank to (ranks * N, ...)."""
        rows = [torch.empty_like(tensor) for _ in range(world_size())]
        torch.distributed.all_gather(rows, tensor)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of this rank's rows over ranks."""
        rank, ranks = rank_and_world()
        (gradient,) = gradients
        total = gradient.contiguous()
        if torch.distributed.get_backend() == "nccl":
            rows = total.new_empty((len(total) // ranks, *total.shape[1:]))
            torch.distributed.reduce_scatter_tensor(rows, total)
            return rows
        total = total.clone()  # autograd may pass a tensor that others still read
        torch.distributed.all_reduce(total)
        return total.chunk(ranks)[rank]


def broadcast_(tensor: torch.Tensor) -> None:
    """Copy rank 0's ``tensor``, of any shape, to all ranks, in place."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, src=0)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on all ranks."""
    return broadcast_object_list([value])[0]


def world_size() -> int:
    """Number of ranks; 1 without a launcher."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def launcher_rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks from the launcher's environment, before the process group exists; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of ranks."""
    state = PartialState()
    return state.process_index, state.num_processes


def is_main() -> bool:
    """Whether this process is rank 0."""
    return rank_and_world()[0] == 0
