import contextlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bocage.shards.codec import CHAINS, MAX_BYTES, CodecError, decode, encode
from bocage.shards.modality import FLAIR_HUB

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"

any_dtype = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?"),
    arrays.complex_number_dtypes(endianness="?"),
)
any_array = any_dtype.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
)


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def member(header: dict[str, object], payload: bytes) -> bytes:
    """A member with a valid checksum, whatever it says."""
    return sealed(json.dumps(header).encode(), payload)


def sealed(text: bytes, payload: bytes) -> bytes:
    """The same around any header."""
    rest = struct.pack("<H", len(text)) + text + payload
    return b"BCG1" + struct.pack("<I", zlib.crc32(rest)) + rest


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a member, as the module's docstring lays them out."""
    (length,) = struct.unpack_from("<H", data, 8)
    return json.loads(data[10 : 10 + length]), data[10 + length :]


@given(any_array, st.sampled_from(sorted(CHAINS)), st.booleans())
@settings(max_examples=400, deadline=None)
def test_every_array_comes_back_bit_for_bit(array: np.ndarray, codec: str, transposed: bool) -> None:
    array = array.T if transposed else array
    decoded = decode(encode(array, codec))
    assert same_bits(decoded, np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C"))
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    assert decoded.dtype.isnative


@given(st.sampled_from(sorted(FLAIR_HUB)), st.integers(0, 3), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_random_bits_of_every_modality_come_back(name: str, dates: int, size: int, random) -> None:
    modality = FLAIR_HUB[name]
    shape = (
        (dates, len(modality.bands), size, size + 1) if modality.has_dates else (len(modality.bands), size, size + 1)
    )
    dtype = np.dtype(modality.dtype)
    # Random bits of a float hold every kind of NaN, infinity and denormal.
    array = np.frombuffer(random.randbytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    assert same_bits(decode(encode(array, modality.codec)), array)


@pytest.mark.parametrize(
    ("array", "codec", "transforms", "coder"),
    [
        (np.ones((4, 8, 8), np.uint8), "colour", ["colour", "delta"], "zstd"),
        (np.ones((3, 8, 8), np.uint8), "colour", ["delta"], "zstd"),
        (np.ones((4, 8, 8), np.uint16), "colour", ["delta"], "zstd"),
        (np.ones((4, 8, 8), np.float32), "colour", [], "zstd"),
        (np.ones((2, 8, 8), np.float32), "float", [], "pcodec"),
        (np.ones((2, 8, 8), np.uint8), "float", [], "zstd"),
        (np.ones((2, 3, 8, 8), np.uint16), "spectral", ["delta"], "bitshuffle-zstd"),
        (np.ones((8, 8), np.uint16), "spectral", [], "bitshuffle-zstd"),
        (np.zeros((0, 10, 10, 10), np.uint16), "spectral", [], None),
    ],
)
def test_header_says_which_steps_were_applied(
    array: np.ndarray, codec: str, transforms: list[str], coder: str | None
) -> None:
    header, _ = split(encode(array, codec))
    assert [step["id"] for step in header["transforms"]] == transforms
    assert (header["coder"] or {}).get("id") == coder
    assert (tuple(header["shape"]), header["dtype"]) == (array.shape, array.dtype.str)


def test_real_patches_shrink_against_lzw() -> None:
    for path in REAL.glob("*/*/*.tif"):
        name = "AERIAL_RGBI" if "RGBI" in path.name else "AERIAL_LABEL-COSIA"
        with rasterio.open(path) as file:
            array = file.read()
        data = encode(array, FLAIR_HUB[name].codec)
        assert same_bits(decode(data), array)
        assert len(data) < 0.62 * path.stat().st_size


@pytest.mark.parametrize("codec", sorted(CHAINS))
def test_any_flipped_or_missing_byte_is_an_error(codec: str) -> None:
    data = encode(np.arange(4 * 6 * 6, dtype=np.uint8).reshape(4, 6, 6), codec)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        with pytest.raises(CodecError):
            decode(bytes(flipped))
        with pytest.raises(CodecError):
            decode(data[:position])
    with pytest.raises(CodecError):
        decode(data + b"\0")


PAYLOADS = {codec: split(encode(np.arange(64, dtype=np.uint16), codec)) for codec in ("plain", "reflectance", "float")}


@pytest.mark.parametrize("codec", PAYLOADS)
@pytest.mark.parametrize("shape", [(63,), (65,), (128,), (1,), (64, 64)])
def test_declared_shape_must_be_that_of_the_payload(codec: str, shape: tuple[int, ...]) -> None:
    header, payload = PAYLOADS[codec]
    assert np.array_equal(decode(member(header, payload)), np.arange(64))
    with pytest.raises(CodecError, match="payload"):
        decode(member({**header, "shape": shape}, payload))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 40]},
        {"shape": [-1, 4]},
        {"shape": [10**30, 0]},
        {"shape": [0, 1 << 40]},
        {"shape": [float("inf")]},
        {"shape": [float("nan")]},
        {"shape": {}, "dtype": "(1,"},
        {"dtype": "complex64", "coder": {"id": "pcodec", "level": 8}},
        {"dtype": "uint8", "coder": {"id": "pcodec", "level": 8}},
        {"shape": [0, 4], "transforms": [{"id": "delta", "axis": -1}]},
        {"coder": []},
        {"transforms": ["delta"]},
        {"shape": [1] * 40},
        {"shape": "4"},
        {"dtype": "O"},
        {"dtype": "S4"},
        {"dtype": "no such"},
        {"coder": {"id": "pickle"}},
        {"coder": {"id": "zstd"}, "transforms": [{"id": "eval"}]},
        {"transforms": [{"id": "delta", "axis": 7}]},
        {"transforms": [{"id": "delta"}]},
        {"transforms": [{"id": "colour"}]},
        {"transforms": None},
        {"coder": None},
    ],
)
def test_hostile_headers_are_refused(change: dict[str, object]) -> None:
    header, payload = PAYLOADS["plain"]
    with pytest.raises(CodecError):
        decode(member({**header, **change}, payload))


@pytest.mark.parametrize("text", [b"[" * 60_000, b'{"shape":' * 7_000, b"\xff", b"1" * 6_000, b"null", b""])
def test_headers_that_are_no_header_are_refused(text: bytes) -> None:
    with pytest.raises(CodecError):
        decode(sealed(text, b""))


@pytest.mark.parametrize("size", [0, 15, 17, 1 << 20, (1 << 32) - 1])
def test_blosc_must_not_read_beyond_its_payload(size: int) -> None:
    header, payload = PAYLOADS["reflectance"]
    with pytest.raises(CodecError, match="declare"):
        decode(member(header, payload[:12] + struct.pack("<I", size) + payload[16:]))
    with pytest.raises(CodecError, match="declare"):
        decode(member(header, payload[: min(size, len(payload) - 1)]))


@given(st.sampled_from(sorted(PAYLOADS)), st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_payloads_are_an_error_or_an_array(codec: str, data: st.DataObject) -> None:
    header, payload = PAYLOADS[codec]
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        assert decode(member(header, bytes(damaged))).shape == (64,)


def test_wrong_use_is_named() -> None:
    with pytest.raises(CodecError, match=r"unknown codec 'jpeg'.*colour"):
        encode(np.zeros(3), "jpeg")
    with pytest.raises(CodecError, match="object"):
        encode(np.array([None]), "plain")
    with pytest.raises(CodecError, match="bytes"):
        encode(np.broadcast_to(np.uint8(0), (MAX_BYTES + 1,)), "plain")
