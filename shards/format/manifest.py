"""The manifest of a folder of shards: one row a sample, and what the dataset is as a whole.

``manifest.parquet`` has the columns of ``schema``: where each member's bytes are, ground position, splits, dates, class
histograms and value statistics. ``index.arrow`` repeats what readers need of it in a form that is mapped, not loaded
(``index.py``). ``dataset.json`` holds the registry, channel statistics, and hash and size of both files and of every
shard; it is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bocage.shards.errors import InputError
from bocage.shards.format.index import INDEX_FILE, LONGEST_SERIES, Index
from bocage.shards.format.local_shards import LocalShards, ShardFiles
from bocage.shards.modality import Modality, Registry

if TYPE_CHECKING:
    from bocage.shards.preprocess.normalize import InputSpec

SCHEMA_VERSION = 2
TABLE_FILE = "manifest.parquet"
DATASET_FILE = "dataset.json"

EVERY_SAMPLE = "all"
"""Name of the split that every sample belongs to, whatever its value; the only one of a tree without split files."""

_ROWS = 1 << 12  # of the table, read at a time
_VALUES = 1 << 11  # of a list, on the average of a group of rows: ninety dates are usual

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


class OtherVersionError(InputError):
    """The shards are of another version of the format."""


@dataclass(frozen=True)
class _File:
    """Size and SHA-256 of one of the files beside ``dataset.json``."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _is_size(self.bytes) or not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self} is not a size and a hash")


class Manifest:
    """An open manifest. The index is mapped; columns of the table are read when asked for.

    Attributes:
        path: the folder.
        registry: the modalities that the shards hold.
        splits: names of the split columns.
        shards: the tars, by shard index.
        counts: ``samples``, ``skipped``, ``source_bytes`` and, by modality, ``present``.
        skipped: by key, why a patch of the tree is not in the shards.
        files: the bytes of the shards; another place's may be set.

    Raises:
        OtherVersionError: the description is of shards of another version.
        InputError: it is no description of shards, or contradicts itself.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        source = path / DATASET_FILE
        try:
            version = description["schema_version"]
            if version != SCHEMA_VERSION:
                raise OtherVersionError(
                    f"{source}: schema version {version}, but this bocage reads {SCHEMA_VERSION}; shard the tree again "
                    "or use the bocage that wrote it"
                )
            self.registry = Registry(tuple(Modality.from_json(item) for item in description["registry"]))
            for item in self.registry.values():
                np.dtype(item.dtype)  # a TypeError for what is none
            self.splits = [str(name) for name in description["splits"]]
            self.shards = [Shard(**item) for item in description["shards"]]
            self.counts: dict[str, Any] = dict(description["counts"])
            self.skipped: dict[str, str] = dict(description["skipped"])
            self._files = {name: _File(**description["files"][name]) for name in (TABLE_FILE, INDEX_FILE)}
            self._statistics = {
                item.name: _channel_statistics(description["statistics"][item.name], len(item.channels))
                for item in self.registry.inputs
            }
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: not a description of shards: {error!r}; shard the tree again") from error
        self.path = path
        self._opened: pq.ParquetFile | None = None
        self._group: tuple[int, pa.Table] | None = None  # the row group that a row was last asked from
        self._check_shards()
        self.files: ShardFiles = LocalShards([path / shard.name for shard in self.shards])

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """The manifest in the folder ``path``, what the key ``shards`` of a recipe names.

        Raises:
            InputError: the path is empty, there is no manifest, it is of another version, or it contradicts itself.
        """
        manifest = cls.described(path)
        manifest._check_size(TABLE_FILE)
        _ = manifest.index
        return manifest

    @classmethod
    def described(cls, path: str | Path) -> Manifest:
        """As ``open``, but index and table may be damaged: each is checked when it is first asked for.

        Raises:
            InputError: the path is empty, or holds no description of shards that can be read.
        """
        if not str(path):
            raise InputError(
                "shards= is not set: write shards with `bocage shard SRC OUT` (SRC: FLAIR-HUB as downloaded, or a "
                "sample made by `bocage sample SRC`) and pass shards=OUT"
            )
        path = Path(path)
        if not (path / DATASET_FILE).is_file():
            raise InputError(_why_none(path))
        try:
            description = json.loads((path / DATASET_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: its manifest cannot be read: {error}") from error
        if not isinstance(description, dict):
            raise InputError(f"{path / DATASET_FILE}: not a description of shards; shard the tree again")
        return cls(path, description)

    def _check_shards(self) -> None:
        """No name may lead a reader outside the folder."""
        for shard in self.shards:
            if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
                raise InputError(f"{self.path / DATASET_FILE}: shard name {shard.name!r} is not a plain name of a tar")
            if not _SHA256.fullmatch(str(shard.sha256)) or not (_is_size(shard.bytes) and _is_size(shard.samples)):
                raise InputError(f"{self.path / DATASET_FILE}: the entry of {shard.name} is not valid")
        if not _is_size(sum(shard.samples for shard in self.shards)):
            raise InputError(f"{self.path / DATASET_FILE}: more samples than there can be")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise InputError(f"{self.path / DATASET_FILE}: a shard is listed twice")

    def _check_size(self, name: str) -> None:
        path, wanted = self.path / name, self._files[name].bytes
        try:
            found = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; shard the tree again") from error
        if found != wanted:
            raise InputError(f"{path}: {found} bytes where {DATASET_FILE} says {wanted}; copy or shard it again")

    def _check_file(self, name: str) -> None:
        self._check_size(name)
        path = self.path / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; shard the tree again") from error
        if found != self._files[name].sha256:
            raise InputError(f"{path}: damaged: its SHA-256 is not the one in {DATASET_FILE}; copy or shard it again")

    @cached_property
    def index(self) -> Index:
        """What readers need of each sample; raises ``InputError`` when the file is not the one described."""
        self._check_file(INDEX_FILE)
        index = Index(self.path / INDEX_FILE, self.registry)
        index.validate([shard.samples for shard in self.shards], [shard.bytes for shard in self.shards])
        return index

    @property
    def _parquet(self) -> pq.ParquetFile:
        """The open table; its hash is checked once, when it is first needed."""
        if self._opened is None:
            path = self.path / TABLE_FILE
            self._check_file(TABLE_FILE)
            try:
                file = pq.ParquetFile(path, memory_map=True)
                found = file.schema_arrow
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{path}: cannot be read: {error}; shard the tree again") from error
            columns, expected = (
                dict(zip(item.names, item.types)) for item in (found, schema(self.registry, self.splits))
            )
            wrong = [name for name in sorted({*columns, *expected}) if columns.get(name) != expected.get(name)]
            if wrong or len(columns) != len(found):
                names = ", ".join(wrong) or "twice the same"
                raise InputError(f"{path}: columns {names} are not as {DATASET_FILE} says; shard the tree again")
            if file.metadata.num_rows != len(self):
                raise InputError(f"{path}: {file.metadata.num_rows} rows for {len(self)} samples; shard the tree again")
            _check_lists(path, file.metadata)
            self._opened = file
        return self._opened

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

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
        """All columns of all samples, read anew: some kB a sample; prefer ``column``, ``row`` or ``batches``."""
        return self._read(self._parquet.read)

    def _read(self, read: Callable[..., pa.Table], *arguments: object, **options: object) -> pa.Table:
        try:
            return read(*arguments, **options)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path / TABLE_FILE}: damaged: {error}; shard the tree again") from error

    def column(self, name: str) -> pa.ChunkedArray:
        """One column.

        Raises:
            InputError: there is no such column, and the message names those there are; or the table is damaged.
        """
        names = self._parquet.schema_arrow.names
        if name not in names:
            raise InputError(f"{self.path}: no column {name!r} in the manifest; columns: {', '.join(names)}")
        return self._read(self._parquet.read, columns=[name])[name]

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of the table in order, some thousands at a time; memory holds no more of it.

        Raises:
            InputError: the table is damaged.
        """
        try:
            yield from self._parquet.iter_batches(_ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path / TABLE_FILE}: damaged: {error}; shard the tree again") from error

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
        from bocage.shards.preprocess.normalize import (
            InputSpec,  # brings torch, which whoever writes shards does without
        )

        if modality not in self.registry:
            raise InputError(f"{self.path}: the shards hold no {modality}; they hold {', '.join(self.registry)}")
        if not self.registry[modality].is_input:
            raise InputError(f"{modality} is a {self.registry[modality].role}, not an input of an encoder")
        mean, std = self.statistics[modality]
        if None in mean or None in std:
            raise InputError(f"{self.path}: {modality} has no valid value in any sample")
        return InputSpec.of(self.registry[modality], mean, std)

    def row(self, index: int) -> dict[str, Any]:
        """All columns of one sample as Python values.

        Raises:
            IndexError: there is no such row; negative ones do not count from the end.
            InputError: the table is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._group is None or not 0 <= index - self._group[0] < len(self._group[1]):
            metadata = self._parquet.metadata
            first = number = 0
            while index - first >= (count := metadata.row_group(number).num_rows):
                first, number = first + count, number + 1
            self._group = first, self._read(self._parquet.read_row_group, number)
        first, group = self._group
        return group.slice(index - first, 1).to_pylist()[0]

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


def _check_lists(path: Path, metadata: pq.FileMetaData) -> None:
    """A few bytes of Parquet can stand for lists that no memory holds."""
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        most = max(_VALUES * group.num_rows, LONGEST_SERIES)
        if any(group.column(index).num_values > most for index in range(group.num_columns)):
            raise InputError(f"{path}: lists of more values than a sample can have; shard the tree again")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


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
