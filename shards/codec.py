"""Array to bytes of a shard member and back, lossless: a small JSON header that says all, then compressed values.

A member is ``magic (4) | CRC-32 (4) | header length (2) | header | payload``, numbers little-endian; the checksum
covers everything after itself. The header holds dtype, shape and the steps that were applied, so that a member is
decoded without any registry. Chains were chosen by measurement on FLAIR-HUB's own kinds of content; a step that
does not fit an array is left out, and the header then does not list it.

Entropy coders are numcodecs' Zstandard and Blosc (Alted, https://blosc.org) and pcodec (Loncaric et al.,
arXiv 2502.06112).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numcodecs import Blosc, Zstd, blosc
from pcodec import ChunkConfig, ModeSpec, standalone

MAX_BYTES = 1 << 30
"""Arrays above this size (1 GiB) are refused, when written and when read: no patch comes near it."""

_MAGIC = b"BCG1"
_PREFIX = struct.Struct("<4sIH")
_CHECKED_FROM = 8  # the checksum covers what follows it
_MAX_DIMENSIONS = 8
_KINDS = "biufc"
_BLOSC_HEADER = 16  # bytes
_PCODEC_DTYPES = frozenset(
    ("float16", "float32", "float64", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
)
# One thread: whoever wants more has processes, and a pool of threads in each of them only costs.
blosc.use_threads = False


class CodecError(ValueError):
    """Bytes that are not an intact member, or an array that cannot be one."""


@dataclass(frozen=True)
class Chain:
    """Steps of an encoding: reversible transforms of the array, then one entropy coder.

    Each step is a JSON object with an ``id``; the rest are its parameters. Transforms are ``colour`` (inter-band
    differences of R, G, B, NIR) and ``delta`` (differences of neighbours along ``axis``).
    """

    transforms: tuple[dict[str, Any], ...]
    coder: dict[str, Any]


_PLAIN = {"id": "zstd", "level": 3}

CHAINS = {
    "colour": Chain(({"id": "colour"}, {"id": "delta", "axis": -1}), {"id": "zstd", "level": 1}),
    "grey": Chain(({"id": "delta", "axis": -1},), {"id": "zstd", "level": 1}),
    "float": Chain((), {"id": "pcodec", "level": 8}),
    "spectral": Chain(({"id": "delta", "axis": -3},), {"id": "bitshuffle-zstd", "level": 1}),
    "reflectance": Chain((), {"id": "bitshuffle-zstd", "level": 5}),
    "plain": Chain((), _PLAIN),
}
"""Encodings by the name that ``Modality.codec`` holds."""


def encode(array: np.ndarray, codec: str) -> bytes:
    """The member that holds ``array``.

    Args:
        array: any shape of at most eight dimensions; bool, integer, float or complex; any byte order and strides.
        codec: a name of ``CHAINS``. Where a step of the chain does not fit the array it is left out.

    Raises:
        CodecError: unknown codec name, unsupported dtype, or an array above ``MAX_BYTES``.
    """
    if codec not in CHAINS:
        raise CodecError(f"unknown codec {codec!r}; known ones: {', '.join(CHAINS)}")
    too_large = max(array.nbytes, *array.shape, 0) > MAX_BYTES
    if array.dtype.kind not in _KINDS or array.ndim > _MAX_DIMENSIONS or too_large:
        raise CodecError(f"cannot encode {array.dtype} of shape {array.shape} ({array.nbytes} bytes)")
    # Not ascontiguousarray: it turns a scalar into an array of one dimension.
    values = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    chain = CHAINS[codec]
    applied = []
    coder: dict[str, Any] | None = None
    payload = b""
    if values.size:
        for transform in chain.transforms:
            if _transform_fits(transform, values):
                values = _transformed(transform, values)
                applied.append(transform)
        coder = chain.coder if _coder_fits(chain.coder, values) else _PLAIN
        payload = _compressed(coder, values)
    header = json.dumps(
        {"dtype": array.dtype.newbyteorder("<").str, "shape": array.shape, "transforms": applied, "coder": coder},
        separators=(",", ":"),
    ).encode()
    checksum = zlib.crc32(payload, zlib.crc32(header, zlib.crc32(struct.pack("<H", len(header)))))
    return b"".join((_PREFIX.pack(_MAGIC, checksum, len(header)), header, payload))


def decode(data: bytes, most: int = MAX_BYTES) -> np.ndarray:
    """The array that ``encode`` was given: bit-exact, C-contiguous, writable, in native byte order.

    Args:
        data: the member.
        most: bytes that the array may take; whoever knows what to expect need not hold more of a hostile member.

    Raises:
        CodecError: the bytes are not an intact member. Damage never goes unnoticed and never yields an array.
    """
    shape, dtype, transforms, coder, payload = _parsed(data, most)
    # Zeros, not empty: whatever a hostile payload leaves unwritten must not show this process's memory.
    values = np.zeros(shape, dtype)
    if coder is not None:
        if not _coder_fits(coder, values):
            raise CodecError(f"coder {coder['id']} does not fit {dtype}")
        try:
            _decompress(coder, payload, values)
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise CodecError(f"payload cannot be decompressed: {error}") from error
    elif values.size or payload:
        raise CodecError("header names no coder for a payload that needs one")
    for transform in reversed(transforms):
        if not values.size or not _transform_fits(transform, values):
            raise CodecError(f"step {transform} does not fit {dtype} of shape {shape}")
        values = _restored(transform, values)
    return values


def _parsed(
    data: bytes, most: int
) -> tuple[tuple[int, ...], np.dtype[Any], list[dict[str, Any]], dict[str, Any] | None, memoryview]:
    if len(data) < _PREFIX.size:
        raise CodecError(f"{len(data)} bytes are too few for a member")
    magic, checksum, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CodecError(f"member starts with {magic!r}, not {_MAGIC!r}")
    view = memoryview(data)
    if zlib.crc32(view[_CHECKED_FROM:]) != checksum:
        raise CodecError("checksum does not match: the bytes are damaged")
    start = _PREFIX.size + length
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]))
        shape = tuple(int(size) for size in header["shape"])
        dtype = np.dtype(str(header["dtype"]))
        transforms, coder = list(header["transforms"]), header["coder"]
        known = all(transform["id"] in ("colour", "delta") for transform in transforms)
        known &= coder is None or coder["id"] in ("zstd", "bitshuffle-zstd", "pcodec")
    # NumPy parses the dtype as Python where it does not know it: hence SyntaxError.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SyntaxError) as error:
        raise CodecError(f"header cannot be read: {error!r}") from error
    if not known:
        raise CodecError(f"header names unknown steps: {transforms}, {coder}")
    if dtype.kind not in _KINDS or len(shape) > _MAX_DIMENSIONS or any(not 0 <= size <= MAX_BYTES for size in shape):
        raise CodecError(f"header declares an impossible array: {dtype} of shape {shape}")
    if math.prod(shape) * dtype.itemsize > most:
        raise CodecError(f"header declares an array above {most} bytes: {dtype} of shape {shape}")
    return shape, dtype.newbyteorder("="), transforms, coder, view[start:]


def _transform_fits(transform: dict[str, Any], values: np.ndarray) -> bool:
    if transform["id"] == "colour":
        return values.dtype == np.uint8 and values.ndim >= 3 and values.shape[-3] == 4
    axis = transform.get("axis")
    return isinstance(axis, int) and values.dtype.kind in "iu" and -values.ndim <= axis < values.ndim


def _transformed(transform: dict[str, Any], values: np.ndarray) -> np.ndarray:
    if transform["id"] == "delta":
        return imagecodecs.delta_encode(values, axis=transform["axis"])
    differences = values.copy()
    bands, (red, green, _, _) = np.moveaxis(differences, -3, 0), np.moveaxis(values, -3, 0)
    bands[0] -= green
    bands[2] -= green
    bands[3] -= red
    return differences


def _restored(transform: dict[str, Any], values: np.ndarray) -> np.ndarray:
    """Undoes ``_transformed``; may work in place."""
    if transform["id"] == "delta":
        return imagecodecs.delta_decode(values, axis=transform["axis"], out=values)
    bands = np.moveaxis(values, -3, 0)
    bands[0] += bands[1]
    bands[2] += bands[1]
    bands[3] += bands[0]
    return values


def _coder_fits(coder: dict[str, Any], values: np.ndarray) -> bool:
    return coder["id"] != "pcodec" or values.dtype.name in _PCODEC_DTYPES


def _compressed(coder: dict[str, Any], values: np.ndarray) -> bytes:
    flat = values.reshape(-1)
    if coder["id"] == "pcodec":
        # Classic: on real height models the automatic mode took twice the time for 4 % more bytes.
        config = ChunkConfig(compression_level=coder["level"], mode_spec=ModeSpec.classic())
        return standalone.simple_compress(flat, config)
    if coder["id"] == "bitshuffle-zstd":
        return bytes(Blosc(cname="zstd", clevel=coder["level"], shuffle=Blosc.BITSHUFFLE).encode(flat))
    return bytes(Zstd(level=coder["level"]).encode(flat))


def _decompress(coder: dict[str, Any], payload: memoryview, values: np.ndarray) -> None:
    """Fills ``values``; raises ``RuntimeError`` or ``ValueError`` on a payload of another size or a damaged one."""
    flat = values.reshape(-1)
    if coder["id"] == "pcodec":
        progress = standalone.simple_decompress_into(bytes(payload), flat)
        if progress.n_processed != flat.size or not progress.finished:
            raise ValueError(f"it does not hold {flat.size} values")
        return
    shuffled = coder["id"] == "bitshuffle-zstd"
    size = _blosc_size(payload) if shuffled else _zstandard_size(payload)
    if size != flat.nbytes:
        raise ValueError(f"it holds {size} bytes where the header declares {flat.nbytes}")
    (Blosc() if shuffled else Zstd()).decode(payload, out=flat)


def _blosc_size(payload: memoryview) -> int:
    """Decompressed bytes that a Blosc 1 buffer declares; raises ``ValueError`` unless the buffer is whole.

    Blosc believes the compressed size in its header and reads that far, whatever it was given.
    """
    declared = int.from_bytes(payload[12:16], "little")
    if len(payload) < _BLOSC_HEADER or declared != len(payload):
        raise ValueError(f"its {len(payload)} bytes are not the {declared} that they declare")
    return int.from_bytes(payload[4:8], "little")


def _zstandard_size(payload: memoryview) -> int:
    """Decompressed bytes that a Zstandard frame declares (RFC 8878, section 3.1.1.1); -1 when it does not."""
    if len(payload) < 5:
        return -1
    descriptor = payload[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if width == 0:
        return -1
    return int.from_bytes(payload[start : start + width], "little") + (256 if width == 2 else 0)
