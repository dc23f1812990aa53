"""Counter-based random draws: a function of (seed, epoch, sample key, purpose), never of rank, worker or order.

Every draw hashes its coordinates with SplitMix64's finaliser (Steele, Lea & Flood 2014), so that a sample gets the
same crop, flip and mask wherever and whenever it is processed, on the CPU and on an accelerator, with no generator
state to save.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as torch's int64 holds it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _purpose(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shifted(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shifted(value, 27)) * _signed(_MIX_2)
    return value ^ _shifted(value, 31)


def uniform(seeds: torch.Tensor, purpose: str, *shape: int) -> torch.Tensor:
    """Uniform draws in [0, 1).

    Args:
        seeds: (B,) int64, one ``seeds.sample_seed`` a sample.
        purpose: what the draws are for; another purpose gives independent draws.
        shape: trailing shape of the draws of one sample.

    Returns:
        ``(B, *shape)`` float32 on the device of ``seeds``, with 24 random bits each.
    """
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64) * _signed(_GOLDEN)
    stream = _mixed(seeds ^ _purpose(purpose))
    bits = _mixed(stream[:, None] + counter[None, :])
    return (_shifted(bits, 40).to(torch.float32) / float(1 << 24)).reshape(len(seeds), *shape)


def integers(seeds: torch.Tensor, purpose: str, high: int, *shape: int) -> torch.Tensor:
    """Integers in [0, high), ``(B, *shape)`` int64; see ``uniform``."""
    return (uniform(seeds, purpose, *shape) * high).long().clamp_(max=high - 1)


def permutations(seeds: torch.Tensor, purpose: str, count: int) -> torch.Tensor:
    """One random permutation of range(count) a sample, (B, count) int64."""
    return uniform(seeds, purpose, count).argsort(dim=1, stable=True)
