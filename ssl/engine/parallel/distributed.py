"""Ranks: the only file that knows how many processes train together and how they agree."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from bocage.ssl.engine.parallel.fsdp import is_sharded, shard

Precision = Literal["fp32", "bf16", "fp16"]
Value = TypeVar("Value")

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(precision: Precision, tracker: str, folder: Path, rank_timeout: float) -> Accelerator:
    """The Accelerator of this process: GPU when there is one, DDP when a launcher started several ranks.

    On machines without a GPU several ranks are started by ``torchrun --nproc_per_node N`` and talk through gloo.
    Weights stay float32; ``bf16`` and ``fp16`` are autocast (and loss scaling) around the forward pass.

    Args:
        precision: of the forward pass.
        tracker: ``none`` or the name of an Accelerate tracker.
        folder: where trackers write.
        rank_timeout: seconds after which a rank gives up waiting for another.

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
    # Accelerate keeps its settings for the life of the process and refuses a second run with another precision, but
    # one process may pretrain and then fine-tune. The process group (PartialState) stays.
    AcceleratorState._reset_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_MIXED_PRECISION[precision],
            log_with=None if tracker == "none" else tracker,
            project_dir=folder,
            # A sensor absent from a whole batch leaves its encoder without a gradient in that step.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout)),
            ],
        )
    if torch.distributed.is_initialized():
        atexit.register(_leave)
    return accelerator


@contextmanager
def prepared_model(accelerator: Accelerator, learner: nn.Module, divides: bool) -> Iterator[nn.Module]:
    """Context with ``learner`` on its device, in its precision, copied to all ranks (DDP) or divided among them.

    Args:
        accelerator: of this process.
        learner: what the optimiser will train; it leaves as it came, but on the device.
        divides: by ``fsdp.shard``, for good.
    """
    # Read by DDP, which has no other way to be told.
    learner.__dict__["_ddp_params_and_buffers_to_ignore"] = unshared_buffers(learner)
    model = accelerator.prepare_model(learner, evaluation_mode=divides)
    try:
        if divides:
            shard(learner, accelerator.device, accelerator.num_processes)
        yield model
    finally:
        # Accelerate replaced `forward` by one that runs under autocast.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def unshared_buffers(learner: nn.Module) -> list[str]:
    """Names of the buffers of modules that say they ``keep_to_themselves``: no rank needs them of another, and what
    they hold are no statistics that could be averaged over steps."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in learner.named_modules()
        if getattr(module, "keep_to_themselves", False)
        for name, _ in module.named_buffers(recurse=False)
    ]


def micro_batch(accelerator: Accelerator, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Context of one forward and backward pass; under DDP ranks average their gradients in the ``last`` of a step."""
    # Unless they are averaged at once, gradients of divided weights would be kept whole.
    return nullcontext() if last or is_sharded(model) else accelerator.no_sync(model)


def _leave() -> None:
    # DDP's reference cycles hold on to the process group: a group destroyed before them now and then aborts the exit.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_max(accelerator: Accelerator, *flags: torch.Tensor) -> list[int]:
    """The largest value over all ranks of each flag (a scalar, small and not negative), the same answer on all of them.

    One all-reduce of a few bytes and one device-to-host copy: what a decision before the optimiser step costs.
    """
    values = torch.stack([flag.to(accelerator.device, torch.int32) for flag in flags])
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def all_gather_object(value: Value) -> list[Value]:
    """``value`` of every rank, by rank, on all of them (pickled between our own processes only)."""
    return list(gather_object([value]))


def run_on_all_ranks(action: Callable[[], Value]) -> list[Value]:
    """What ``action`` gives on every rank, by rank.

    Raises:
        InputError: any rank's ``action`` raised it; then all do.
    """
    value, problem = None, None
    try:
        value = action()
    except InputError as error:
        problem = str(error)
    answers = all_gather_object((value, problem))
    for _, said in answers:
        if said is not None:
            raise InputError(said)
    return [cast(Value, answer) for answer, _ in answers]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all ranks, of one shape and dtype, below each other: (ranks * N, ...).

    The gradient that any rank has for them reaches the rank they come from, summed over ranks.
    """
    if world_size() == 1:
        return tensor
    own = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor  # gloo knows no bool
    everyones: torch.Tensor = _Gather.apply(own.contiguous())
    return everyones.to(tensor.dtype)


class _Gather(torch.autograd.Function):
    """torch's own, deprecated by now, gives wrong gradients under gloo where those that come in are not contiguous."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """(N, ...) of this rank to (ranks * N, ...)."""
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """What all ranks want of this rank's part."""
        rank, ranks = rank_and_world()
        (gradient,) = gradients
        whole = gradient.contiguous()
        if torch.distributed.get_backend() == "nccl":
            own = whole.new_empty((len(whole) // ranks, *whole.shape[1:]))
            torch.distributed.reduce_scatter_tensor(own, whole)
            return own
        whole = whole.clone()  # autograd may have given what others still need
        torch.distributed.all_reduce(whole)
        return whole.chunk(ranks)[rank]


def broadcast_(tensor: torch.Tensor) -> None:
    """Give all ranks what rank 0 has in ``tensor``, of any shape, in place."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, src=0)


def world_size() -> int:
    """How many ranks train together; 1 outside a launcher."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on all ranks."""
    return broadcast_object_list([value])[0]


def launcher_rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks as a launcher tells them, before the process group exists: (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    state = PartialState()
    return state.process_index, state.num_processes


def is_main() -> bool:
    """Whether this process is rank 0."""
    return rank_and_world()[0] == 0
