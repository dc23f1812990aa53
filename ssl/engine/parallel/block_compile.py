"""The blocks a model repeats: compiled or recomputed one by one, they cost what few do and help as all would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn

from bocage.shards.errors import InputError

CompileBackend = Literal["none", "inductor", "aot_eager", "eager"]
COMPILE_BACKENDS: tuple[str, ...] = get_args(CompileBackend)


def repeated_blocks(task: nn.Module) -> list[nn.Module]:
    """The outermost modules of lists and sequences that have parts and whose class occurs more than once in ``task``.

    Blocks of Swins, of U-TAE's convolutions and of the fusion decoder: nine tenths of the weights of
    ``mae_multimodal``.
    """
    held = [
        module
        for container in task.modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for module in container
        if not isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in module.children())
    ]
    counts = Counter(type(module) for module in held)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in held:
        if counts[type(module)] > 1 and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


@contextmanager
def compiled_blocks(task: nn.Module, backend: CompileBackend) -> Iterator[None]:
    """Context in which the repeated blocks of ``task`` are compiled, each class once (regional compilation).

    Args:
        task: names of its parameters do not change.
        backend: of ``torch.compile``; ``none`` leaves the blocks as they are.

    Raises:
        InputError: nothing in ``task`` repeats.
    """
    blocks = repeated_blocks(task) if backend != "none" else []
    if backend != "none" and not blocks:
        raise InputError(f"engine.compile={backend}: {type(task).__name__} has no repeated blocks to compile; use none")
    for block in blocks:
        block.compile(backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def activation_checkpointing(task: nn.Module, wanted: bool) -> Iterator[None]:
    """Context in which encoders keep no activations of their blocks but compute them again in the backward pass.

    Activation checkpointing: Chen et al., arXiv 1604.06174.

    Raises:
        InputError: no part of ``task`` can.
    """
    switches = [getattr(module, "set_gradient_checkpointing", None) for module in task.modules()] if wanted else []
    able: list[Callable[[bool], None]] = [switch for switch in switches if switch is not None]
    if wanted and not able:
        raise InputError("engine.activation_checkpointing: only Swin encoders can, and there is none; leave it off")
    for switch in able:
        switch(True)
    try:
        yield
    finally:
        for switch in able:
            switch(False)
