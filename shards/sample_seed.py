"""The seed of a sample, from which everything that is drawn about it comes; needs no torch."""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """Signed 64-bit seed of one sample in one epoch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
