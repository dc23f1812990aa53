"""Compile or checkpoint each repeated block separately."""

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
    """Find the blocks of ``task``: outermost items of lists and sequences whose class occurs more than once.

    An item without children is no block. Swin blocks, U-TAE's convolution blocks and the blocks of the fusion decoder
    hold nine tenths of the weights of ``mae_multimodal``.
    """
    items = [
        item
        for container in task.modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for item in container
        if not isinstance(item, nn.ModuleList | nn.Sequential) and any(True for _ in item.children())
    ]
    counts = Counter(type(item) for item in items)
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for item in items:
        if counts[type(item)] > 1 and item not in inside:
            blocks.append(item)
            inside.update(item.modules())
    return blocks


@contextmanager
def compiled_blocks(task: nn.Module, backend: CompileBackend) -> Iterator[None]:
    """Context in which the repeated blocks of ``task`` are compiled, each class once (regional compilation).

    Args:
        task: module with repeated blocks; the names of its parameters do not change.
        backend: backend of ``torch.compile``; ``none`` compiles nothing.

    Raises:
        InputError: ``task`` has no repeated blocks.
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
def activation_checkpointing(task: nn.Module, enabled: bool) -> Iterator[None]:
    """Context in which encoders recompute the activations of their blocks in the backward pass.

    Activation checkpointing: Chen et al., arXiv 1604.06174.

    Raises:
        InputError: no module of ``task`` supports it.
    """
    candidates = [getattr(module, "set_gradient_checkpointing", None) for module in task.modules()] if enabled else []
    switches: list[Callable[[bool], None]] = [switch for switch in candidates if switch is not None]
    if enabled and not switches:
        raise InputError(
            "engine.activation_checkpointing: only Swin encoders support it, and this model has none; leave it off"
        )
    for switch in switches:
        switch(True)
    try:
        yield
    finally:
        for switch in switches:
            switch(False)
