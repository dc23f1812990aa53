"""Array to bytes of a shard member and back: a small JSON header that says all, then compressed values.

A member is ``magic (4) | CRC-32 (4) | header length (2) | header | payload``, numbers little-endian; the checksum
covers everything after itself. The header holds dtype, shape and the steps that were applied (``transforms``), so that
a member is decoded without any registry. An image of more than 256 rows is a payload of strips, each a member of 256
rows, so that a window costs no more than the strips that it touches. Chains were chosen by measurement on FLAIR-HUB's
own kinds of content, real and simulated (``tests/bench/sharding.py``); a step that does not fit an array is left out,
and the header then does not list it. All are lossless but ``height-5mm``, which nothing uses unless it is asked for
(``lossy_dem``).

Entropy coders are Zstandard (RFC 8878) and pcodec (Loncaric et al., arXiv 2502.06112).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zstandard
from imagecodecs import deflate_crc32, zstd_decode
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from bocage.shards.format import transforms
from bocage.shards.format.transforms import Step
from bocage.shards.modality import Registry

MAX_BYTES = 1 << 30
"""Arrays above this size (1 GiB) are refused, when written and when read: no patch comes near it."""

_MAGIC = b"BCG1"
_PREFIX = struct.Struct("<4sIH")
_CHECKED_FROM = 8  # the checksum covers what follows it
_MAX_DIMENSIONS = 8
_KINDS = "biufc"
_PCODEC_DTYPES = frozenset(
    ("float16", "float32", "float64", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
)
_PCODEC_BATCH = 256  # values; what it decompresses less of than there are is a multiple
_MOST_PARTS = 16
_STRIP = 256  # rows
_CODERS_OF_STRIPS = ("zstd", "pcodec")
_CODERS = (*_CODERS_OF_STRIPS, "strips")


class CodecError(ValueError):
    """Bytes that are not an intact member, or an array that cannot be one."""


@dataclass(frozen=True)
class Chain:
    """An encoding: steps (see ``transforms``), then one entropy coder.

    Coders are ``zstd`` with its ``level``, searched for noise where it is ``noisy``, and ``pcodec``, which compresses
    each band for itself, with its ``level`` and how it takes differences: ``auto`` leaves that to pcodec, ``none`` is
    for values that are differences already, ``fitted`` takes the order whose differences are smallest. ``multiple``:
    floats are multiples of this.
    """

    transforms: tuple[Step, ...]
    coder: dict[str, Any]


_PLAIN = {"id": "zstd", "level": 3}
_NOISY = {"id": "zstd", "level": 1, "noisy": True}
# What repeats in noise does so by chance and costs more than its symbols: little is searched, and Huffman tables are
# made anew every 32 KiB. Genuine aerial images take 3 % less than by the level's own parameters, in half the time.
_FOR_NOISE = {"min_match": 7, "hash_log": 6, "window_log": 15}
_HEIGHT = {"id": "pcodec", "level": 9, "delta": "fitted"}
# A power of two, so that scaling is exact; half of it is the largest error, 3.9 mm. Beyond the limits are no heights.
_HEIGHT_STEP = 2.0**-7
_ROUND = {"id": "round", "step": _HEIGHT_STEP, "lowest": -500.0, "highest": 9000.0}

CHAINS = {
    "colour": Chain(({"id": "interpolate"}, {"id": "bands"}), _NOISY),
    "grey": Chain(({"id": "interpolate"},), _NOISY),
    "height": Chain((), _HEIGHT),
    "height-5mm": Chain((_ROUND,), {**_HEIGHT, "multiple": _HEIGHT_STEP}),
    "float": Chain((), {"id": "pcodec", "level": 6, "delta": "auto"}),
    "reflectance": Chain(({"id": "interpolate"}, {"id": "bands"}), {"id": "pcodec", "level": 6, "delta": "none"}),
    "plain": Chain((), _PLAIN),
}
"""Encodings by the name that ``Modality.codec`` holds."""


def lossy_dem(registry: Registry) -> Registry:
    """The registry with height models rounded when they are written: by at most 3.9 mm, documented as 5 mm.

    NaN, infinities and values below -500 m or above 9000 m, nodata among them, keep their bits.
    """
    return Registry(
        tuple(
            replace(modality, codec="height-5mm") if modality.codec == "height" else modality
            for modality in registry.values()
        )
    )


def as_stored(array: np.ndarray, codec: str) -> np.ndarray:
    """What ``decode`` will give for ``array``, of any shape: the array itself unless ``codec`` is lossy."""
    for step in CHAINS[codec].transforms:
        if step["id"] == "round" and transforms.fits(step, array):
            array = transforms.rounded(array, step)
    return array


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
    # Labels are decoded faster than a second header.
    if values.ndim == 3 and values.size and values.shape[-2] > _STRIP and chain.coder != _PLAIN:
        starts = range(0, values.shape[-2], _STRIP)
        strips = [encode(values[..., start : start + _STRIP, :], codec) for start in starts]
        coder, payload = {"id": "strips", "rows": _STRIP, "sizes": [len(strip) for strip in strips]}, b"".join(strips)
    elif values.size:
        for step in chain.transforms:
            if transforms.fits(step, values):
                values, done = transforms.applied(step, values)
                applied += [done] if done is not None else []
        coder, payload = _compressed(chain.coder if _coder_fits(chain.coder, values) else _PLAIN, values)
    header = json.dumps(
        {"dtype": array.dtype.newbyteorder("<").str, "shape": array.shape, "transforms": applied, "coder": coder},
        separators=(",", ":"),
    ).encode()
    checked = b"".join((struct.pack("<H", len(header)), header, payload))
    # Eighteen times as fast as zlib's: a tenth of decoding.
    return _MAGIC + struct.pack("<I", deflate_crc32(checked)) + checked


def decode(data: bytes | memoryview) -> np.ndarray:
    """The array that ``encode`` was given, of any shape, bit-exact if the chain is lossless.

    It is C-contiguous, writable and of native byte order.

    Raises:
        CodecError: the bytes are not an intact member. Damage never goes unnoticed and never yields an array.
    """
    return EncodedArray(data).array()


class EncodedArray:
    """An encoded array whose checksum and header are good.

    Args:
        data: of the member.
        coders: those that may have made it.

    Attributes:
        shape, dtype: of the array, in native byte order; known before it takes any memory.

    Raises:
        CodecError: the bytes are not an intact member.
    """

    def __init__(self, data: bytes | memoryview, coders: tuple[str, ...] = _CODERS) -> None:
        self.shape, self.dtype, self._steps, self._coder, self._payload = _parsed(data, coders)

    def array(self, window: tuple[slice, slice] | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The array, writable.

        Args:
            window: rows and columns of the last two axes that are wanted; steps are undone for little more than them.
                What is returned may then be a view.
            out: where to put what is wanted, of its shape and dtype; returned.

        Raises:
            CodecError: the payload is not what the header says.
        """
        if self._coder is not None and self._coder["id"] == "strips":
            return self._joined(self._coder, window, out)
        if out is not None and window is None and not self._steps and (self._coder or _PLAIN)["id"] == "pcodec":
            values = out  # decompressed where it belongs
        else:
            # Zeros, not empty: whatever a hostile payload leaves unwritten must not show this process's memory.
            values = np.zeros(self.shape, self.dtype)
        if self._coder is not None:
            if not _coder_fits(self._coder, values):
                raise CodecError(f"coder {self._coder['id']} does not fit {self.dtype}")
            # Without steps a row depends on nothing below it.
            last = window[0].stop if window is not None and not self._steps else None
            try:
                _decompress(self._coder, self._payload, values, last)
            except (RuntimeError, ValueError, TypeError, OverflowError, zstandard.ZstdError) as error:
                raise CodecError(f"payload cannot be decompressed: {error}") from error
        elif values.size or self._payload:
            raise CodecError("header names no coder for a payload that needs one")
        for step in self._steps:
            if not values.size or not transforms.fits(step, values) or (step["id"] == "bands" and "terms" not in step):
                raise CodecError(f"step {step} does not fit {self.dtype} of shape {self.shape}")
        if window is not None:
            values, window = transforms.narrowed(self._steps, values, *window)
        for step in reversed(self._steps):
            values = transforms.restored(step, values)
        values = values if window is None else values[..., window[0], window[1]]
        if out is None or out is values:
            return values
        out[...] = values
        return out

    def _joined(self, coder: dict[str, Any], window: tuple[slice, slice] | None, out: np.ndarray | None) -> np.ndarray:
        """The array, or its window, from the strips that hold it; the others are not looked at."""
        if self._steps or len(self.shape) != 3:
            raise CodecError(f"strips do not fit {self.dtype} of shape {self.shape}")
        *leading, height, width = self.shape
        try:
            rows, sizes = int(coder["rows"]), [int(size) for size in coder["sizes"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CodecError(f"header cannot be read: {error!r}") from error
        if (
            rows < 1
            or len(sizes) != -(-height // rows)
            or sum(sizes) != len(self._payload)
            or min(sizes, default=0) < 0
        ):
            raise CodecError(f"its {len(self._payload)} bytes are not strips {sizes} of {rows} rows out of {height}")
        wanted, columns = window or (slice(0, height), slice(0, width))
        # Empty: every strip under the window fills its rows, or raises.
        shape = (*leading, wanted.stop - wanted.start, columns.stop - columns.start)
        values = np.empty(shape, self.dtype) if out is None else out
        place = 0
        for start, size in zip(range(0, height, rows), sizes):
            first, last = max(start, wanted.start), min(start + rows, height, wanted.stop)
            if first < last:
                strip = EncodedArray(self._payload[place : place + size], _CODERS_OF_STRIPS)
                if (strip.shape, strip.dtype) != ((*leading, min(rows, height - start), width), self.dtype):
                    raise CodecError(f"a strip of {self.dtype} {self.shape} holds {strip.dtype} {strip.shape}")
                whole = shape[-1] == width and (first, last) == (start, start + strip.shape[-2])
                part = None if whole else (slice(first - start, last - start), columns)
                strip.array(part, values[..., first - wanted.start : last - wanted.start, :])
            place += size
        return values


def _parsed(
    data: bytes | memoryview, coders: tuple[str, ...]
) -> tuple[tuple[int, ...], np.dtype[Any], list[Step], dict[str, Any] | None, memoryview]:
    if len(data) < _PREFIX.size:
        raise CodecError(f"{len(data)} bytes are too few for a member")
    magic, checksum, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CodecError(f"member starts with {magic!r}, not {_MAGIC!r}")
    view = memoryview(data)
    if deflate_crc32(view[_CHECKED_FROM:]) != checksum:  # type: ignore[arg-type]  # any buffer will do
        raise CodecError("checksum does not match: the bytes are damaged")
    start = _PREFIX.size + length
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]))
        shape = tuple(int(size) for size in header["shape"])
        dtype = np.dtype(str(header["dtype"]))
        steps, coder = list(header["transforms"]), header["coder"]
        known = all(step["id"] in transforms.KNOWN for step in steps)
        known &= coder is None or coder["id"] in coders
    # NumPy parses the dtype as Python where it does not know it: hence SyntaxError.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SyntaxError) as error:
        raise CodecError(f"header cannot be read: {error!r}") from error
    if not known:
        raise CodecError(f"header names unknown steps: {steps}, {coder}")
    if dtype.kind not in _KINDS or len(shape) > _MAX_DIMENSIONS or any(not 0 <= size <= MAX_BYTES for size in shape):
        raise CodecError(f"header declares an impossible array: {dtype} of shape {shape}")
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise CodecError(f"header declares an array above {MAX_BYTES} bytes: {dtype} of shape {shape}")
    return shape, dtype.newbyteorder("="), steps, coder, view[start:]


def _coder_fits(coder: dict[str, Any], values: np.ndarray) -> bool:
    return coder["id"] != "pcodec" or (
        values.dtype.name in _PCODEC_DTYPES and ("multiple" not in coder or values.dtype.kind == "f")
    )


def _compressed(coder: dict[str, Any], values: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """The coder as the header lists it, and the payload."""
    if coder["id"] == "zstd":
        parameters = zstandard.ZstdCompressionParameters.from_level(
            coder["level"], **(_FOR_NOISE if coder.get("noisy") else {})
        )
        return coder, zstandard.ZstdCompressor(compression_params=parameters).compress(values.reshape(-1).data)
    multiple = coder.get("multiple")
    # Classic: on real height models the automatic mode took twice the time for 4 % more bytes.
    mode = ModeSpec.classic() if multiple is None else ModeSpec.try_float_mult(multiple)
    parts = []
    for part in _parts(values):
        config = ChunkConfig(compression_level=coder["level"], mode_spec=mode, delta_spec=_delta(coder["delta"], part))
        parts.append(standalone.simple_compress(np.ascontiguousarray(part).reshape(-1), config))
    return {**coder, "parts": [len(part) for part in parts]}, b"".join(parts)


def _parts(values: np.ndarray) -> list[np.ndarray]:
    """Views of what pcodec compresses one by one: the bands, if there are not too many.

    Integers are signed there: most are differences.
    """
    if values.dtype.kind == "u":
        values = values.view(np.dtype(f"i{values.dtype.itemsize}"))
    if values.ndim < 3 or values.shape[-3] > _MOST_PARTS:
        return [values.reshape(1, -1)]
    return [values[..., band, :, :] for band in range(values.shape[-3])]


def _delta(kind: str, part: np.ndarray) -> DeltaSpec:
    """How pcodec takes differences; trying all orders would cost it a quarter of its time."""
    if kind == "auto":
        return DeltaSpec.auto()
    if kind == "none":
        return DeltaSpec.no_op()
    rows = part[:: max(1, len(part) // 16)]
    # Bits of floats of one sign and exponent are as far apart as the values.
    differences = np.diff(rows.view(np.dtype(f"i{rows.dtype.itemsize}")).astype(np.float64))
    return DeltaSpec.try_consecutive(1 if np.abs(differences).sum() <= np.abs(np.diff(differences)).sum() else 2)


def _decompress(coder: dict[str, Any], payload: memoryview, values: np.ndarray, last: int | None) -> None:
    """Fills ``values``, rows from ``last`` on only where that costs nothing.

    Raises:
        RuntimeError, ValueError, ZstdError: a payload of another size or a damaged one.
    """
    if coder["id"] == "zstd":
        size = zstandard.frame_content_size(payload)  # before anything is decompressed
        if size != values.nbytes:
            raise ValueError(f"it holds {size} bytes where the header declares {values.nbytes}")
        # Any buffers will do.
        zstd_decode(payload, out=values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        return
    parts, sizes = _parts(values), coder.get("parts")
    if not isinstance(sizes, list) or len(sizes) != len(parts) or sum(sizes) != len(payload) or min(sizes) < 0:
        raise ValueError(f"its {len(payload)} bytes are not the {len(parts)} parts {sizes}")
    start = 0
    for band, size in zip(parts, sizes):
        part, count = band, band.size
        if last is not None and part.ndim == 2 and part[:last].size % _PCODEC_BATCH == 0:
            part = part[:last]
        whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
        progress = standalone.simple_decompress_into(bytes(payload[start : start + size]), whole.reshape(-1))
        if progress.n_processed != part.size or progress.finished != (part.size == count):
            raise ValueError(f"it does not hold {count} values")
        if whole is not part:
            part[:] = whole
        start += size
