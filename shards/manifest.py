"""The manifest of a folder of shards: one row a sample, and what the dataset is as a whole.

``manifest.parquet`` has the columns of ``schema``: where each member's bytes are, ground position, splits, dates, class
histograms and value statistics. ``dataset.json`` holds the registry, channel statistics and the list of shards with
their hashes; it is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality, Registry
from bocage.shards.normalize import InputSpec

SCHEMA_VERSION = 1
TABLE_FILE = "manifest.parquet"
DATASET_FILE = "dataset.json"

EVERY_SAMPLE = "all"
"""Name of the split that every sample belongs to, whatever its value; the only one of a tree without split files."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def dated(modality: Modality) -> bool:
    """Whether the manifest holds dates of the modality: one for an image, one for each step of a series."""
    return modality.has_dates or modality.dates_table is not None


def schema(registry: Registry, splits: list[str]) -> pa.Schema:
    """The columns of ``manifest.parquet``.

    ``offset.M`` and ``length.M`` locate the bytes of modality M in its shard (length 0: absent); ``dates.M`` are days
    since 1970-01-01; ``histogram.M.BAND`` counts pixels by class; ``minimum.M``, ``maximum.M`` and ``mean.M`` are by
    channel of the representation (``normalize.represent``), holes left out, NaN where nothing is left.
    """
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("roi", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("crs", pa.string(), nullable=False),
        pa.field("left", pa.float64(), nullable=False),
        pa.field("top", pa.float64(), nullable=False),
        *(pa.field(name, pa.string()) for name in splits),
    ]
    for modality in registry.values():
        name = modality.name
        fields.append(pa.field(f"offset.{name}", pa.int64(), nullable=False))
        fields.append(pa.field(f"length.{name}", pa.int32(), nullable=False))
        if dated(modality):
            fields.append(pa.field(f"dates.{name}", pa.list_(pa.int32())))
        if modality.role == "label":
            fields += [pa.field(f"histogram.{name}.{band.name}", pa.list_(pa.int32())) for band in modality.bands]
        if modality.is_input:
            fields += [pa.field(f"{what}.{name}", pa.list_(pa.float32())) for what in ("minimum", "maximum", "mean")]
    return pa.schema(fields)


@dataclass(frozen=True)
class Shard:
    """One tar: plain file name beside the manifest, number of samples, size in bytes, SHA-256 in hexadecimal."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Manifest:
    """An open manifest; columns are read when asked for.

    Attributes:
        path: the folder.
        registry: the modalities that the shards hold.
        splits: names of the split columns.
        shards: the tars, by shard index.
        counts: ``samples``, ``skipped``, ``source_bytes`` and, by modality, ``present``.
        skipped: by key, why a patch of the tree is not in the shards.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], file: pq.ParquetFile) -> None:
        source = path / DATASET_FILE
        try:
            version = description["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{source}: schema version {version}, but this bocage reads {SCHEMA_VERSION}; shard the tree again "
                    "or use the bocage that wrote it"
                )
            self.registry = Registry(tuple(Modality.from_json(item) for item in description["registry"]))
            self.splits = [str(name) for name in description["splits"]]
            self.shards = [Shard(**item) for item in description["shards"]]
            self.counts: dict[str, Any] = dict(description["counts"])
            self.skipped: dict[str, str] = dict(description["skipped"])
            self._statistics = {
                item.name: _channel_statistics(description["statistics"][item.name], len(item.channels))
                for item in self.registry.inputs
            }
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: not a description of shards: {error!r}; shard the tree again") from error
        self.path = path
        self._file = file
        self._table: pa.Table | None = None
        self._validate()

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """The manifest in the folder ``path``, what the key ``shards`` of a recipe names.

        Raises:
            InputError: the path is empty, there is no manifest, it is of another version, or it contradicts itself.
        """
        if not str(path):
            raise InputError(
                "shards= is not set: write shards with `bocage shard SRC OUT` (SRC: an unzipped FLAIR-HUB, or a sample "
                "made by `bocage sample SRC`) and pass shards=OUT"
            )
        path = Path(path)
        if not (path / DATASET_FILE).is_file():
            raise InputError(_why_none(path))
        try:
            description = json.loads((path / DATASET_FILE).read_text(encoding="utf-8"))
            file = pq.ParquetFile(path / TABLE_FILE, memory_map=True)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: its manifest cannot be read: {error}") from error
        if not isinstance(description, dict):
            raise InputError(f"{path / DATASET_FILE}: not a description of shards; shard the tree again")
        return cls(path, description, file)

    def _validate(self) -> None:
        """Nothing here may lead a reader outside the folder or outside a shard."""
        table = self.path / TABLE_FILE
        for shard in self.shards:
            if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
                raise InputError(f"{self.path / DATASET_FILE}: shard name {shard.name!r} is not a plain name of a tar")
            sizes_valid = all(type(size) is int and 0 <= size < 1 << 63 for size in (shard.bytes, shard.samples))
            if not _SHA256.fullmatch(str(shard.sha256)) or not sizes_valid:
                raise InputError(f"{self.path / DATASET_FILE}: the entry of {shard.name} is not valid")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise InputError(f"{self.path / DATASET_FILE}: a shard is listed twice")
        expected = schema(self.registry, self.splits)
        found = self._file.schema_arrow
        if dict(zip(found.names, found.types)) != dict(zip(expected.names, expected.types)):
            different = {*zip(found.names, map(str, found.types))} ^ {*zip(expected.names, map(str, expected.types))}
            names = sorted({name for name, _ in different})
            raise InputError(
                f"{table}: columns {', '.join(names)} are not as {DATASET_FILE} says; shard the tree again"
            )
        needed = ("shard", *(f"{what}.{name}" for name in self.registry for what in ("offset", "length")))
        if any(self.column(name).null_count for name in needed):
            raise InputError(f"{table}: a sample has no place in a shard; shard the tree again")
        shard = self.column("shard").to_numpy()
        counts = np.array([item.samples for item in self.shards], np.int64)
        within = len(shard) == counts.sum() and (len(shard) == 0 or 0 <= shard.min() <= shard.max() < len(counts))
        if not within or (np.bincount(shard, minlength=len(counts)) != counts).any():
            raise InputError(f"{table}: its samples are not those of the shards in {DATASET_FILE}")
        sizes = np.array([item.bytes for item in self.shards], np.int64)[shard]
        for name in self.registry:
            offset, length = (self.column(f"{what}.{name}").to_numpy() for what in ("offset", "length"))
            # Subtracted, not added: an offset near 2^63 must not wrap around.
            if ((offset < 0) | (length < 0) | (offset > sizes - length)).any():
                raise InputError(f"{table}: a member of {name} lies outside its shard")

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def digest(self) -> str:
        """SHA-256 of the dataset's description, which holds the hash of every shard: the same wherever it lies."""
        return hashlib.sha256((self.path / DATASET_FILE).read_bytes()).hexdigest()

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return len(self.shards)

    @property
    def table(self) -> pa.Table:
        """All columns; prefer ``column`` for a few of them."""
        if self._table is None:
            self._table = self._read(None)
        return self._table

    def _read(self, columns: list[str] | None) -> pa.Table:
        try:
            return self._file.read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path / TABLE_FILE}: damaged: {error}; shard the tree again") from error

    def column(self, name: str) -> pa.ChunkedArray:
        """One column; raises ``InputError`` naming the columns there are."""
        if name not in self._file.schema_arrow.names:
            raise InputError(
                f"{self.path}: no column {name!r} in the manifest; columns: {', '.join(self._file.schema_arrow.names)}"
            )
        return self.table[name] if self._table is not None else self._read([name])[name]

    def split(self, column: str, value: str) -> np.ndarray:
        """Rows whose split ``column`` has ``value``, (N,) int64 ascending; all rows for the column ``all``.

        Raises:
            InputError: no such split column, or no sample has the value; the message names those there are.
        """
        if column == EVERY_SAMPLE:
            return np.arange(len(self), dtype=np.int64)
        if column not in self.splits:
            available = ", ".join(self.splits) or "none (the tree had no split file)"
            raise InputError(f"{self.path}: no split {column!r}; splits: {available}; split=all takes every sample")
        labels = self.column(column)
        rows = np.flatnonzero(pc.fill_null(pc.equal(labels, value), False).to_numpy())
        if len(rows) == 0:
            values = ", ".join(sorted(labels.drop_null().unique().to_pylist())) or "none"
            raise InputError(f"{self.path}: no sample has {column} = {value!r}; values: {values}")
        return rows.astype(np.int64)

    @property
    def statistics(self) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """By input modality, mean and standard deviation of each channel of the representation, holes left out."""
        return dict(self._statistics)

    def input_spec(self, modality: str) -> InputSpec:
        """What an encoder of ``modality`` needs to know, with the statistics of these shards.

        Raises:
            InputError: the shards do not hold the modality, it is not an input, or a channel has no valid value.
        """
        if modality not in self.registry:
            raise InputError(f"{self.path}: the shards hold no {modality}; they hold {', '.join(self.registry)}")
        if not self.registry[modality].is_input:
            raise InputError(f"{modality} is a {self.registry[modality].role}, not an input of an encoder")
        mean, std = self.statistics[modality]
        if None in mean or None in std:
            raise InputError(f"{self.path}: {modality} has no valid value in any sample")
        return InputSpec.of(self.registry[modality], mean, std)

    def row(self, index: int) -> dict[str, Any]:
        """All columns of one sample as Python values."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.table.slice(index, 1).to_pylist()[0]

    def shard_path(self, shard: int) -> Path:
        """The tar of a shard index."""
        return self.path / self.shards[shard].name


def _channel_statistics(description: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, None where a channel has no value; raises ``ValueError``."""
    mean, std = description["mean"], description["std"]
    for values in (mean, std):
        numbers = isinstance(values, list) and all(value is None or _is_number(value) for value in values)
        if not numbers or len(values) != channels:
            raise ValueError(f"statistics {values!r} are not {channels} numbers")
    return tuple(mean), tuple(std)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _why_none(path: Path) -> str:
    """One sentence on why ``path`` holds no manifest."""
    if not path.is_dir():
        return f"{path}: no such folder; make shards with `bocage shard SRC {path}`"
    names = sorted(entry.name for entry in path.iterdir())
    if any(re.match(r"D[0-9A-Z]{3,6}-(\d{4}|195X)_", name) for name in names):
        return f"{path}: a FLAIR-HUB tree, not shards; make shards with `bocage shard {path} OUT`"
    if any(name.endswith(".tar") for name in names) or "parts" in names:
        return f"{path}: sharding has not finished; run the same `bocage shard SRC {path}` again to complete it"
    return f"{path}: no {DATASET_FILE} here; make shards with `bocage shard SRC {path}`"
