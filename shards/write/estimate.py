"""How large the shards of a catalogue will be and how long they will take, from encoding a few of its patches."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.raster_source import RasterError
from bocage.shards.source.rasters import gdal_environment
from bocage.shards.write.jobs import check_source
from bocage.shards.write.packing import encode_patch

_PROBES = 8
_TAR_OVERHEAD = 1024  # bytes a member: its header, and padding of half a block or so


@dataclass(frozen=True)
class EncodingSample:
    """What a few patches, read and encoded, tell of all.

    Attributes:
        patch_bytes: in a shard, mean.
        patch_seconds: of one process, mean.
    """

    patch_bytes: float
    patch_seconds: float


def encode_sample(catalogue: Catalogue, rows: np.ndarray) -> EncodingSample:
    """Encodes a few of the patches ``rows``, evenly spread.

    Args:
        catalogue: the tree.
        rows: (N,) int64, catalogue indices.

    Raises:
        InputError: none of these patches is readable, or the source is gone.
    """
    check_source(catalogue.root)
    tried = rows[:: max(1, len(rows) // _PROBES)][:_PROBES].tolist()
    sizes: list[int] = []
    seconds: list[float] = []
    failure: RasterError | None = None
    with gdal_environment():
        for row in tried:
            try:
                # The first is read twice: what a library does once must not count for every patch.
                for _ in range(1 if sizes else 2):
                    started = time.perf_counter()
                    members = encode_patch(catalogue.patch(row), catalogue.registry).members
                seconds.append(time.perf_counter() - started)
                sizes.append(sum(len(data) + _TAR_OVERHEAD for data in members.values()))
            except RasterError as error:
                failure = error
    if not sizes:
        raise InputError(f"none of the {len(tried)} patches that were tried can be read, e.g. {failure}") from failure
    return EncodingSample(float(np.mean(sizes)), float(np.mean(seconds)))


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Attributes:
        patches: of the catalogue.
        shards: they make.
        bytes: of all shards, roughly.
        waiting: patches in shards that are not written yet.
        seconds: that ``waiting`` takes one process, roughly.
    """

    patches: int
    shards: int
    bytes: int
    waiting: int
    seconds: float
