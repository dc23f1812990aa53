"""The seed of a sample, from which all its random numbers derive. Needs no torch."""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """Signed 64-bit seed of the sample ``key`` in one epoch of a run with ``seed``."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample_id(key: str) -> int:
    """Signed 64-bit hash of a sample's key: the same in every epoch and for every run seed."""
    return sample_seed(0, 0, key)
