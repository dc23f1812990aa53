"""Encode arrays as members of a shard, and decode them: a JSON header, then compressed values.

A member is ``magic (4) | CRC-32 (4) | header length (2) | header | payload``, with little-endian numbers. The checksum
covers everything after itself. The header holds the dtype, the shape and the applied steps (``transforms``), so a
member can be decoded without the modality registry. The payload of an image of more than 256 rows is a sequence of
strips, each a member of 256 rows: reading a window decodes only the strips that it overlaps.

The codecs were chosen by measurement on real and simulated FLAIR-HUB rasters (``tests/bench/sharding.py``). A step that
is not applicable to an array is skipped, and the header does not list it. All codecs are lossless except
``height-5mm``, which is used only on request (``with_lossy_dem``). The entropy coders are Zstandard (RFC 8878) and
pcodec (Loncaric et al., arXiv 2502.06112).
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
"""Maximum size of an array (1 GiB), when written and when read. Patches are far smaller."""

_MAGIC = b"BCG1"
_PREFIX = struct.Struct("<4sIH")
_CHECKSUM_END = 8  # the checksum covers the bytes from here on
_MAX_DIMENSIONS = 8
_DTYPE_KINDS = "biufc"
_PCODEC_DTYPES = frozenset(
    ("float16", "float32", "float64", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
)
_PCODEC_BATCH = 256  # values; pcodec decompresses either all values or a multiple of this number
_MAX_PCODEC_PARTS = 16
_STRIP_ROWS = 256
_STRIP_CODERS = ("zstd", "pcodec")
_CODERS = (*_STRIP_CODERS, "strips")


class CodecError(ValueError):
    """The bytes are not an intact member, or the array cannot be encoded."""


@dataclass(frozen=True)
class Codec:
    """Transform steps (see ``transforms``), followed by one entropy coder.

    The coder ``zstd`` has a ``level``; ``noisy`` selects search parameters for noisy values. The coder ``pcodec``
    compresses each band separately. It has a ``level`` and a ``delta``: ``auto`` lets pcodec choose, ``none`` is for
    values that are differences already, ``fitted`` takes the order with the smallest differences. ``multiple`` declares
    that floats are multiples of this number.
    """

    transforms: tuple[Step, ...]
    coder: dict[str, Any]


_PLAIN = {"id": "zstd", "level": 3}  # also for arrays that pcodec does not support
_NOISY = {"id": "zstd", "level": 1, "noisy": True}
# Matches in noise are accidental and cost more than literals: search little, and renew Huffman tables every 32 KiB.
# Genuine aerial images take 3 % less space than with the level's default parameters, in half the time.
_NOISE_PARAMETERS = {"min_match": 7, "hash_log": 6, "window_log": 15}
_HEIGHT = {"id": "pcodec", "level": 9, "delta": "fitted"}
# A power of two makes scaling exact. The largest error is half of it, 3.9 mm. Values beyond the limits are no heights.
_HEIGHT_STEP = 2.0**-7
_ROUND = {"id": "round", "step": _HEIGHT_STEP, "lowest": -500.0, "highest": 9000.0}

CODECS = {
    "colour": Codec(({"id": "interpolate"}, {"id": "bands"}), _NOISY),
    "grey": Codec(({"id": "interpolate"},), _NOISY),
    "height": Codec((), _HEIGHT),
    "height-5mm": Codec((_ROUND,), {**_HEIGHT, "multiple": _HEIGHT_STEP}),
    "float": Codec((), {"id": "pcodec", "level": 6, "delta": "auto"}),
    "reflectance": Codec(({"id": "interpolate"}, {"id": "bands"}), {"id": "pcodec", "level": 6, "delta": "none"}),
    "plain": Codec((), _PLAIN),
}
"""Codecs by name; ``Modality.codec`` is one of these names."""


def with_lossy_dem(registry: Registry) -> Registry:
    """Copy of the registry that stores height models rounded, with an error of at most 3.9 mm.

    NaN, infinities and values below -500 m or above 9000 m, including nodata, keep their bits.
    """
    return Registry(
        tuple(
            replace(modality, codec="height-5mm") if modality.codec == "height" else modality
            for modality in registry.values()
        )
    )


def as_stored(array: np.ndarray, codec: str) -> np.ndarray:
    """The array that ``decode(encode(array, codec))`` returns: ``array`` itself unless ``codec`` is lossy."""
    for step in CODECS[codec].transforms:
        if step["id"] == "round" and transforms.is_applicable(step, array):
            array = transforms.round_values(array, step)
    return array


def encode(array: np.ndarray, codec: str) -> bytes:
    """Encode ``array`` as a member.

    Args:
        array: array of at most eight dimensions; bool, integer, float or complex; any byte order and strides.
        codec: name of a codec in ``CODECS``. Steps that are not applicable to the array are skipped.

    Raises:
        CodecError: the codec name is unknown, the dtype is unsupported, or the array exceeds ``MAX_BYTES``.
    """
    if codec not in CODECS:
        raise CodecError(f"unknown codec {codec!r}; known ones: {', '.join(CODECS)}")
    too_large = max(array.nbytes, *array.shape, 0) > MAX_BYTES
    if array.dtype.kind not in _DTYPE_KINDS or array.ndim > _MAX_DIMENSIONS or too_large:
        raise CodecError(f"cannot encode {array.dtype} of shape {array.shape} ({array.nbytes} bytes)")
    # asarray, not ascontiguousarray, which would turn a scalar into an array of one dimension.
    values = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    steps, preferred_coder = CODECS[codec].transforms, CODECS[codec].coder
    applied_steps = []
    coder: dict[str, Any] | None = None
    payload = b""
    # Plain labels have no strips: decoding them whole is faster than parsing a second header.
    if values.ndim == 3 and values.size and values.shape[-2] > _STRIP_ROWS and preferred_coder != _PLAIN:
        starts = range(0, values.shape[-2], _STRIP_ROWS)
        strips = [encode(values[..., start : start + _STRIP_ROWS, :], codec) for start in starts]
        coder = {"id": "strips", "rows": _STRIP_ROWS, "sizes": [len(strip) for strip in strips]}
        payload = b"".join(strips)
    elif values.size:
        for step in steps:
            if transforms.is_applicable(step, values):
                values, applied_step = transforms.apply_step(step, values)
                applied_steps += [applied_step] if applied_step is not None else []
        coder, payload = _compress(preferred_coder if _coder_supports(preferred_coder, values) else _PLAIN, values)
    header = json.dumps(
        {"dtype": array.dtype.newbyteorder("<").str, "shape": array.shape, "transforms": applied_steps, "coder": coder},
        separators=(",", ":"),
    ).encode()
    checksummed = b"".join((struct.pack("<H", len(header)), header, payload))
    # deflate_crc32 is eighteen times as fast as zlib.crc32, which would take a tenth of the decoding time.
    return _MAGIC + struct.pack("<I", deflate_crc32(checksummed)) + checksummed


def decode(data: bytes | memoryview) -> np.ndarray:
    """Decode a member: the array that was encoded, bit-exact if the codec is lossless.

    The array is C-contiguous and writable, in native byte order.

    Raises:
        CodecError: the bytes are not an intact member. Damaged bytes never yield an array.
    """
    return EncodedArray(data).decode()


class EncodedArray:
    """A member whose checksum and header were checked, not decoded yet.

    Args:
        data: bytes of the member.
        coders: names of the allowed entropy coders.

    Attributes:
        shape: shape of the array.
        dtype: dtype of the array, in native byte order.

    Raises:
        CodecError: the bytes are not an intact member.
    """

    def __init__(self, data: bytes | memoryview, coders: tuple[str, ...] = _CODERS) -> None:
        self.shape, self.dtype, self._steps, self._coder, self._payload = _parse_member(data, coders)

    def decode(self, window: tuple[slice, slice] | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Decode the array, or a window of it.

        Args:
            window: rows and columns of the last two axes; all by default. Steps are undone for little more than the
                window.
            out: array of the result's shape and dtype to decode into.

        Returns:
            ``out`` if given, else a writable array. With a window, it may be a view of a larger array.

        Raises:
            CodecError: the payload does not match the header.
        """
        if self._coder is not None and self._coder["id"] == "strips":
            return self._decode_strips(self._coder, window, out)
        if out is not None and window is None and not self._steps and (self._coder or _PLAIN)["id"] == "pcodec":
            values = out  # decompress in place
        else:
            # Zeros instead of empty: values that a hostile payload leaves unwritten must not expose process memory.
            values = np.zeros(self.shape, self.dtype)
        if self._coder is not None:
            if not _coder_supports(self._coder, values):
                raise CodecError(f"coder {self._coder['id']} does not support {self.dtype}")
            # Without steps, no row depends on rows below it.
            stop_row = window[0].stop if window is not None and not self._steps else None
            try:
                _decompress(self._coder, self._payload, values, stop_row)
            except (RuntimeError, ValueError, TypeError, OverflowError, zstandard.ZstdError) as error:
                raise CodecError(f"payload cannot be decompressed: {error}") from error
        elif values.size or self._payload:
            raise CodecError("header names no coder for a payload that needs one")
        for step in self._steps:
            if (
                not values.size
                or not transforms.is_applicable(step, values)
                or (step["id"] == "bands" and "terms" not in step)
            ):
                raise CodecError(f"step {step} is not applicable to {self.dtype} of shape {self.shape}")
        if window is not None:
            values, window = transforms.crop_encoded(self._steps, values, *window)
        for step in reversed(self._steps):
            values = transforms.undo_step(step, values)
        values = values if window is None else values[..., window[0], window[1]]
        if out is None or out is values:
            return values
        out[...] = values
        return out

    def _decode_strips(
        self, coder: dict[str, Any], window: tuple[slice, slice] | None, out: np.ndarray | None
    ) -> np.ndarray:
        """Decode the strips that overlap the window; other strips are not read."""
        if self._steps or len(self.shape) != 3:
            raise CodecError(f"{self.dtype} of shape {self.shape} cannot be stored in strips")
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
            raise CodecError(f"payload of {len(self._payload)} bytes is not strips {sizes} of {rows} rows of {height}")
        window_rows, columns = window or (slice(0, height), slice(0, width))
        # An empty array is safe here: every strip in the window fills its rows, or raises.
        shape = (*leading, window_rows.stop - window_rows.start, columns.stop - columns.start)
        values = np.empty(shape, self.dtype) if out is None else out
        offset = 0
        for start, size in zip(range(0, height, rows), sizes):
            first, stop = max(start, window_rows.start), min(start + rows, height, window_rows.stop)
            if first < stop:
                strip = EncodedArray(self._payload[offset : offset + size], _STRIP_CODERS)
                if (strip.shape, strip.dtype) != ((*leading, min(rows, height - start), width), self.dtype):
                    raise CodecError(f"a strip of {self.dtype} {self.shape} holds {strip.dtype} {strip.shape}")
                is_full_strip = shape[-1] == width and (first, stop) == (start, start + strip.shape[-2])
                strip_window = None if is_full_strip else (slice(first - start, stop - start), columns)
                strip.decode(strip_window, values[..., first - window_rows.start : stop - window_rows.start, :])
            offset += size
        return values


def _parse_member(
    data: bytes | memoryview, coders: tuple[str, ...]
) -> tuple[tuple[int, ...], np.dtype[Any], list[Step], dict[str, Any] | None, memoryview]:
    if len(data) < _PREFIX.size:
        raise CodecError(f"{len(data)} bytes are too few for a member")
    magic, checksum, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CodecError(f"member starts with {magic!r}, not {_MAGIC!r}")
    view = memoryview(data)
    if deflate_crc32(view[_CHECKSUM_END:]) != checksum:  # type: ignore[arg-type]  # accepts any buffer
        raise CodecError("checksum does not match: the bytes are damaged")
    start = _PREFIX.size + length
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]))
        shape = tuple(int(size) for size in header["shape"])
        dtype = np.dtype(str(header["dtype"]))
        steps, coder = list(header["transforms"]), header["coder"]
        known = all(step["id"] in transforms.STEP_IDS for step in steps)
        known &= coder is None or coder["id"] in coders
    # SyntaxError: NumPy parses a dtype that it does not know as Python.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SyntaxError) as error:
        raise CodecError(f"header cannot be read: {error!r}") from error
    if not known:
        raise CodecError(f"header names unknown steps: {steps}, {coder}")
    if (
        dtype.kind not in _DTYPE_KINDS
        or len(shape) > _MAX_DIMENSIONS
        or any(not 0 <= size <= MAX_BYTES for size in shape)
    ):
        raise CodecError(f"header declares an impossible array: {dtype} of shape {shape}")
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise CodecError(f"header declares an array above {MAX_BYTES} bytes: {dtype} of shape {shape}")
    return shape, dtype.newbyteorder("="), steps, coder, view[start:]


def _coder_supports(coder: dict[str, Any], values: np.ndarray) -> bool:
    return coder["id"] != "pcodec" or (
        values.dtype.name in _PCODEC_DTYPES and ("multiple" not in coder or values.dtype.kind == "f")
    )


def _compress(coder: dict[str, Any], values: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Compress values; returns the coder's entry in the header, and the payload."""
    if coder["id"] == "zstd":
        parameters = zstandard.ZstdCompressionParameters.from_level(
            coder["level"], **(_NOISE_PARAMETERS if coder.get("noisy") else {})
        )
        return coder, zstandard.ZstdCompressor(compression_params=parameters).compress(values.reshape(-1).data)
    multiple = coder.get("multiple")
    # Classic mode: on real height models, the automatic mode took twice the time for 4 % more bytes.
    mode = ModeSpec.classic() if multiple is None else ModeSpec.try_float_mult(multiple)
    parts = []
    for part in _pcodec_parts(values):
        delta = _delta_spec(coder["delta"], part)
        config = ChunkConfig(compression_level=coder["level"], mode_spec=mode, delta_spec=delta)
        parts.append(standalone.simple_compress(np.ascontiguousarray(part).reshape(-1), config))
    return {**coder, "parts": [len(part) for part in parts]}, b"".join(parts)


def _pcodec_parts(values: np.ndarray) -> list[np.ndarray]:
    """Views of the arrays that pcodec compresses separately: one per band, or one in all if there are many bands.

    Unsigned integers are viewed as signed, since most are differences.
    """
    if values.dtype.kind == "u":
        values = values.view(np.dtype(f"i{values.dtype.itemsize}"))
    if values.ndim < 3 or values.shape[-3] > _MAX_PCODEC_PARTS:
        return [values.reshape(1, -1)]
    return [values[..., band, :, :] for band in range(values.shape[-3])]


def _delta_spec(kind: str, part: np.ndarray) -> DeltaSpec:
    """Differencing of pcodec. Choosing the order here saves a quarter of the time that pcodec's own search takes."""
    if kind == "auto":
        return DeltaSpec.auto()
    if kind == "none":
        return DeltaSpec.no_op()
    rows = part[:: max(1, len(part) // 16)]
    # For floats of the same sign and exponent, differences of the bit patterns are proportional to differences.
    differences = np.diff(rows.view(np.dtype(f"i{rows.dtype.itemsize}")).astype(np.float64))
    return DeltaSpec.try_consecutive(1 if np.abs(differences).sum() <= np.abs(np.diff(differences)).sum() else 2)


def _decompress(coder: dict[str, Any], payload: memoryview, values: np.ndarray, stop_row: int | None) -> None:
    """Decompress into ``values``.

    Args:
        stop_row: rows from this one on are not needed; they are skipped where the coder can stop there.

    Raises:
        RuntimeError, ValueError, ZstdError: the payload is damaged or has another size.
    """
    if coder["id"] == "zstd":
        size = zstandard.frame_content_size(payload)  # check the size before decompressing
        if size != values.nbytes:
            raise ValueError(f"it holds {size} bytes, but the header declares {values.nbytes}")
        zstd_decode(payload, out=values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # accepts any buffer
        return
    parts, sizes = _pcodec_parts(values), coder.get("parts")
    if not isinstance(sizes, list) or len(sizes) != len(parts) or sum(sizes) != len(payload) or min(sizes) < 0:
        raise ValueError(f"its {len(payload)} bytes are not the {len(parts)} parts {sizes}")
    start = 0
    for part, size in zip(parts, sizes):
        target = part
        if stop_row is not None and part.ndim == 2 and part[:stop_row].size % _PCODEC_BATCH == 0:
            target = part[:stop_row]
        buffer = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        progress = standalone.simple_decompress_into(bytes(payload[start : start + size]), buffer.reshape(-1))
        if progress.n_processed != target.size or progress.finished != (target.size == part.size):
            raise ValueError(f"it does not hold {part.size} values")
        if buffer is not target:
            target[:] = buffer
        start += size
