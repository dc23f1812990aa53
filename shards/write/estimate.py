"""Estimate size and time of sharding a catalogue by encoding a few of its patches."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bocage.shards.errors import InputError, counted
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.raster import RasterError, gdal_environment
from bocage.shards.write.packing import encode_patch
from bocage.shards.write.tasks import check_source

_SAMPLE_PATCHES = 8
_TAR_OVERHEAD = 1024  # bytes per member: the header, and about half a block of padding


@dataclass(frozen=True)
class EncodingCost:
    """Mean cost of encoding a patch.

    Attributes:
        patch_bytes: mean size of a patch in a shard.
        patch_seconds: mean time of one process per patch.
        sampled: number of patches that were tried.
        unreadable: reason why a sampled patch cannot be encoded, by key.
    """

    patch_bytes: float
    patch_seconds: float
    sampled: int
    unreadable: dict[str, str]


def measure_encoding(catalogue: Catalogue, rows: np.ndarray) -> EncodingCost:
    """Measure the encoding cost of a few evenly spaced patches among ``rows``.

    Args:
        catalogue: source of the patches.
        rows: catalogue indices, (N,) int64.

    Raises:
        InputError: none of the sampled patches is readable, or the source is gone.
    """
    check_source(catalogue.root)
    sampled = rows[:: max(1, len(rows) // _SAMPLE_PATCHES)][:_SAMPLE_PATCHES].tolist()
    sizes: list[int] = []
    seconds: list[float] = []
    unreadable: dict[str, str] = {}
    with gdal_environment():
        for row in sampled:
            patch = catalogue.patch(row)
            try:
                # The first patch is encoded twice, so that one-time initialisation of libraries is not measured.
                for _ in range(1 if sizes else 2):
                    started = time.perf_counter()
                    members = encode_patch(patch, catalogue.registry).members
                seconds.append(time.perf_counter() - started)
                sizes.append(sum(len(data) + _TAR_OVERHEAD for data in members.values()))
            except RasterError as error:
                unreadable[patch.key] = str(error)
    if not sizes:
        example = next(iter(unreadable.values()))
        raise InputError(f"none of {counted(len(sampled), 'sampled patch')} can be read, e.g. {example}")
    return EncodingCost(float(np.mean(sizes)), float(np.mean(seconds)), len(sampled), unreadable)


@dataclass(frozen=True)
class Estimate:
    """Estimated size and time of a run.

    Attributes:
        patches: number of patches in the catalogue.
        shards: number of shards.
        bytes: approximate size of all shards.
        remaining: number of patches in shards that are not written yet.
        seconds: approximate time that one process takes for the remaining patches.
        sampled: number of patches that were encoded for the estimate, or failed.
        unreadable: reason why a sampled patch cannot be encoded, by key.
    """

    patches: int
    shards: int
    bytes: int
    remaining: int
    seconds: float
    sampled: int
    unreadable: dict[str, str]
