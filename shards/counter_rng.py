"""Counter-based random numbers: a function of (seed, epoch, sample key, purpose), not of rank, worker or order.

Each number is a hash of its coordinates by the finaliser of SplitMix64 (Steele, Lea & Flood 2014). A sample thus gets
the same crop, flip and mask in any batch and on any device, and there is no generator state to save.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _to_int64(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as signed, as torch's int64 stores it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _hash_purpose(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _logical_shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64; torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64."""
    value = (value ^ _logical_shift_right(value, 30)) * _to_int64(_MIX_1)
    value = (value ^ _logical_shift_right(value, 27)) * _to_int64(_MIX_2)
    return value ^ _logical_shift_right(value, 31)


def uniform(seeds: torch.Tensor, purpose: str, *shape: int) -> torch.Tensor:
    """Uniform random numbers in [0, 1).

    Args:
        seeds: sample seeds (``sample_seed.sample_seed``), (B,) int64.
        purpose: name of the use, e.g. "orientation". Different purposes give independent numbers.
        shape: shape of the numbers of one sample.

    Returns:
        ``(B, *shape)`` float32 on the device of ``seeds``, with 24 random bits each.
    """
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64) * _to_int64(_GOLDEN)
    stream = _mix(seeds ^ _hash_purpose(purpose))
    bits = _mix(stream[:, None] + counter[None, :])
    return (_logical_shift_right(bits, 40).to(torch.float32) / float(1 << 24)).reshape(len(seeds), *shape)


def integers(seeds: torch.Tensor, purpose: str, high: int, *shape: int) -> torch.Tensor:
    """Random integers in [0, high), ``(B, *shape)`` int64; arguments as in ``uniform``."""
    return (uniform(seeds, purpose, *shape) * high).long().clamp_(max=high - 1)


def permutations(seeds: torch.Tensor, purpose: str, count: int) -> torch.Tensor:
    """One random permutation of range(count) per sample, (B, count) int64; arguments as in ``uniform``."""
    return uniform(seeds, purpose, count).argsort(dim=1, stable=True)
