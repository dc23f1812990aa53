"""A bound on the memory of modules while they are built from a description that nobody has checked yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)


@contextmanager
def limited_memory(*, parameters: int, buffers: int) -> Iterator[None]:
    """While it lasts, modules that this thread builds may not register more than so many bytes.

    Tensors are registered before they are filled, and until then take no memory: what is too large is never touched.
    (Building on the meta device would do as well, but imports SymPy there, which takes longer than a whole U-TAE.)

    Raises:
        MemoryError: from the constructor that asks for more.
    """
    thread = threading.get_ident()
    left = {"parameters": parameters, "buffers": buffers}

    def take(kind: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left[kind] -= tensor.nbytes
        if left[kind] < 0:
            raise MemoryError(f"its {kind} take more memory than they should")

    def take_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        take("parameters", parameter)

    def take_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
        take("buffers", buffer)

    hooks = [
        register_module_parameter_registration_hook(take_parameter),
        register_module_buffer_registration_hook(take_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
