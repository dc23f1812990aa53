"""Limit the memory of modules that are built from an untrusted configuration."""

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
    """Limit the bytes of parameters and buffers that modules built in this thread may register.

    Modules register tensors before they fill them, and memory is only taken when tensors are filled. So tensors that
    are too large never take memory. (The meta device would also do, but imports SymPy, which takes longer than to build
    a U-TAE.)

    Args:
        parameters: bytes of all parameters together.
        buffers: bytes of all buffers together.

    Raises:
        MemoryError: a constructor registers more; raised from that constructor.
    """
    thread = threading.get_ident()
    remaining = {"parameters": parameters, "buffers": buffers}

    def account(kind: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        remaining[kind] -= tensor.nbytes
        if remaining[kind] < 0:
            raise MemoryError(f"its {kind} take more memory than allowed")

    def account_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        account("parameters", parameter)

    def account_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
        account("buffers", buffer)

    hooks = [
        register_module_parameter_registration_hook(account_parameter),
        register_module_buffer_registration_hook(account_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
