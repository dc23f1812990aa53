"""Deterministic weights and inputs for the reference outputs in this folder: no weights need to be stored.

Every tensor is drawn from numpy's PCG64 seeded with the CRC-32 of its name in the official naming, so any
implementation that can name its tensors the same way gets the same numbers.
"""

import zlib

import numpy as np
import torch


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array of ``shape``, a function of ``name`` alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Value of the parameter or buffer ``name`` (integer tensors stay as built)."""
    if not tensor.is_floating_point():
        return tensor
    values = torch.from_numpy(draw(name, tuple(tensor.shape)))
    if name.endswith("running_var"):
        return values.abs() + 0.5
    if name.endswith("running_mean"):
        return 0.1 * values
    if tensor.ndim <= 1:  # norms and biases: weights near one, biases near zero
        return (1.0 if name.endswith("weight") else 0.0) + 0.05 * values
    fan_in = int(np.prod(tensor.shape[1:]))
    return values / fan_in**0.5


def fill_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: fill(name, tensor) for name, tensor in state.items()}


def make_input(modality: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Image (B, C, H, W) or series (B, T, C, H, W) under the name ``input:<modality>``."""
    return torch.from_numpy(draw(f"input:{modality}", shape))
