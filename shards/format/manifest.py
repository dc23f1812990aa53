"""Read the manifest of a folder of shards: one table row per sample, and a description of the dataset.

``manifest.parquet`` has the columns of ``manifest_schema``: byte offsets of each member, ground position, splits,
dates, class histograms and value statistics. ``index.arrow`` repeats the columns that DataLoader workers need, in a
memory-mapped file (``index.py``). ``dataset.json`` holds the modality registry, the channel statistics, and the size
and SHA-256 of both files and of every shard. It is written last: a folder with a ``dataset.json`` is complete.
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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bocage.shards.dataset_info import FLAIR_HUB_INFO, DatasetInfo
from bocage.shards.errors import InputError, counted
from bocage.shards.format.index import INDEX_FILE, MAX_SERIES_LENGTH, Index
from bocage.shards.format.shard_files import LocalShards, ShardFiles
from bocage.shards.modality import Modality, Registry
from bocage.shards.preprocess.normalize import InputSpec

__all__ = [
    "DATASET_FILE",
    "EVERY_SAMPLE",
    "SCHEMA_VERSION",
    "TABLE_FILE",
    "Manifest",
    "SchemaVersionError",
    "Shard",
    "has_acquisition_dates",
    "manifest_schema",
]


SCHEMA_VERSION = 3
_READABLE_VERSIONS = (2, SCHEMA_VERSION)
"""Version 2 knows FLAIR-HUB only: it lacks the dataset and the column ``side``."""

TABLE_FILE = "manifest.parquet"
DATASET_FILE = "dataset.json"

EVERY_SAMPLE = "all"
"""Name of the split that holds every sample. A tree without split files has no other split."""

_BATCH_ROWS = 1 << 12  # table rows read at a time
_MAX_MEAN_LIST_LENGTH = 1 << 11  # values per list, averaged over a row group; a usual series has ninety dates

_STATISTICS = ("minimum", "maximum", "mean")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def has_acquisition_dates(modality: Modality) -> bool:
    """Whether the manifest holds acquisition dates of the modality: one per image, or one per step of a series."""
    return modality.has_time_axis or modality.dates_table is not None


def manifest_schema(registry: Registry, splits: list[str], version: int = SCHEMA_VERSION) -> pa.Schema:
    """Columns of ``manifest.parquet`` in a version of the format.

    ``left`` and ``top`` are the upper-left corner and ``side`` is the side of the patch, all in units of ``crs``.
    ``offset.M`` and ``length.M`` locate the bytes of modality M in its shard; length 0 means absent. ``dates.M`` are
    days since 1970-01-01. ``histogram.M.BAND`` counts pixels by class. ``minimum.M``, ``maximum.M`` and ``mean.M`` have
    one value per channel of the representation (``normalize.represent``). They ignore nodata, and are NaN for a channel
    without valid values.
    """
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("roi", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("crs", pa.string(), nullable=False),
        pa.field("left", pa.float64(), nullable=False),
        pa.field("top", pa.float64(), nullable=False),
        *([pa.field("side", pa.float64(), nullable=False)] if version > 2 else []),
        *(pa.field(name, pa.string()) for name in splits),
    ]
    for modality in registry.values():
        name = modality.name
        fields.append(pa.field(f"offset.{name}", pa.int64(), nullable=False))
        fields.append(pa.field(f"length.{name}", pa.int32(), nullable=False))
        if has_acquisition_dates(modality):
            fields.append(pa.field(f"dates.{name}", pa.list_(pa.int32())))
        if modality.role == "label":
            fields += [pa.field(f"histogram.{name}.{band.name}", pa.list_(pa.int32())) for band in modality.bands]
        if modality.is_input:
            fields += [pa.field(f"{statistic}.{name}", pa.list_(pa.float32())) for statistic in _STATISTICS]
    return pa.schema(fields)


@dataclass(frozen=True)
class Shard:
    """One tar file of samples.

    Attributes:
        name: file name, in the folder of the manifest.
        samples: number of samples.
        bytes: size of the tar.
        sha256: SHA-256 of the tar, in hexadecimal.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


class SchemaVersionError(InputError):
    """The shards have another version of the format."""


@dataclass(frozen=True)
class _File:
    """Size and SHA-256 of a file in the folder of ``dataset.json``."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _is_size(self.bytes) or not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self} is not a size and a hash")


class Manifest:
    """An open manifest. The index is memory-mapped; table columns are read on request.

    Args:
        path: folder of the shards.
        description: content of ``dataset.json``.

    Attributes:
        path: folder of the shards.
        registry: modalities that the shards hold.
        dataset: name, licence and origin of the dataset.
        splits: names of the split columns.
        shards: the tars, by shard index.
        counts: ``samples``, ``skipped``, ``source_bytes`` and, by modality, ``present``.
        skipped: reason why a patch of the tree is not in the shards, by key.
        files: byte access to the shards. Local by default; ``open_shards`` replaces it for remote shards.

    Raises:
        SchemaVersionError: the shards have another schema version.
        InputError: the description is not one of shards, or contradicts itself.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        source = path / DATASET_FILE
        try:
            version = description["schema_version"]
            if version not in _READABLE_VERSIONS:
                raise SchemaVersionError(
                    f"{source}: schema version {version}, but this bocage reads {_READABLE_VERSIONS[0]} to "
                    f"{_READABLE_VERSIONS[-1]}; shard the tree again or use the bocage that wrote it"
                )
            self._version: int = version
            self.dataset = DatasetInfo.from_json(description["dataset"]) if version > 2 else FLAIR_HUB_INFO
            self.registry = Registry(tuple(Modality.from_json(item) for item in description["registry"]))
            for item in self.registry.values():
                np.dtype(item.dtype)  # raises TypeError for an unknown dtype
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
        self._row_group: tuple[int, pa.Table] | None = None  # first row and content of the row group read last
        self._check_shards()
        self.files: ShardFiles = LocalShards([path / shard.name for shard in self.shards])

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Open the manifest in the folder ``path``, the value of ``shards`` in a recipe.

        Raises:
            SchemaVersionError: the shards have another schema version.
            InputError: the path is empty, the folder has no manifest, or the manifest contradicts itself.
        """
        manifest = cls.open_lazy(path)
        manifest._check_size(TABLE_FILE)
        _ = manifest.index
        return manifest

    @classmethod
    def open_lazy(cls, path: str | Path) -> Manifest:
        """Open the manifest as ``open`` does, but check index and table only at their first use.

        Raises:
            SchemaVersionError: the shards have another schema version.
            InputError: the path is empty, or the folder has no readable description of shards.
        """
        if not str(path):
            raise InputError(
                "shards= is not set: write shards with `bocage shard SRC OUT` (SRC: FLAIR-HUB as downloaded, or a "
                "sample made by `bocage sample SRC`) and pass shards=OUT"
            )
        path = Path(path)
        if not (path / DATASET_FILE).is_file():
            raise InputError(_explain_missing_manifest(path))
        try:
            description = json.loads((path / DATASET_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: its manifest cannot be read: {error}") from error
        if not isinstance(description, dict):
            raise InputError(f"{path / DATASET_FILE}: not a description of shards; shard the tree again")
        return cls(path, description)

    def _check_shards(self) -> None:
        """Check the list of shards; in particular, no name may lead outside the folder."""
        for shard in self.shards:
            if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
                raise InputError(f"{self.path / DATASET_FILE}: shard name {shard.name!r} is not a plain name of a tar")
            if not _SHA256.fullmatch(str(shard.sha256)) or not (_is_size(shard.bytes) and _is_size(shard.samples)):
                raise InputError(f"{self.path / DATASET_FILE}: the entry of {shard.name} is not valid")
        if not _is_size(sum(shard.samples for shard in self.shards)):
            raise InputError(f"{self.path / DATASET_FILE}: more samples than 63 bits can count")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise InputError(f"{self.path / DATASET_FILE}: a shard is listed twice")

    def _check_size(self, name: str) -> None:
        path, expected = self.path / name, self._files[name].bytes
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; shard the tree again") from error
        if size != expected:
            raise InputError(f"{path}: {size} bytes, but {DATASET_FILE} says {expected}; copy or shard it again")

    def _check_file(self, name: str) -> None:
        self._check_size(name)
        path = self.path / name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; shard the tree again") from error
        if digest != self._files[name].sha256:
            raise InputError(f"{path}: damaged: its SHA-256 is not the one in {DATASET_FILE}; copy or shard it again")

    @cached_property
    def index(self) -> Index:
        """The index of the samples. Raises ``InputError`` if the file is damaged or not the one in ``dataset.json``."""
        self._check_file(INDEX_FILE)
        index = Index(self.path / INDEX_FILE, self.registry)
        index.validate([shard.samples for shard in self.shards], [shard.bytes for shard in self.shards])
        return index

    @cached_property
    def _parquet(self) -> pq.ParquetFile:
        """The open table. Its hash is checked once, at the first use."""
        path = self.path / TABLE_FILE
        self._check_file(TABLE_FILE)
        try:
            file = pq.ParquetFile(path, memory_map=True)
            schema = file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read: {error}; shard the tree again") from error
        expected_schema = self.schema
        columns, expected = (dict(zip(item.names, item.types)) for item in (schema, expected_schema))
        wrong = [name for name in sorted({*columns, *expected}) if columns.get(name) != expected.get(name)]
        if wrong:
            raise InputError(f"{path}: columns {', '.join(wrong)} do not match {DATASET_FILE}; shard the tree again")
        if len(columns) != len(schema):
            raise InputError(f"{path}: a column is listed twice; shard the tree again")
        if file.metadata.num_rows != len(self):
            raise InputError(
                f"{path}: {counted(file.metadata.num_rows, 'row')} for {counted(len(self), 'sample')}; shard the tree "
                "again"
            )
        _check_list_lengths(path, file.metadata)
        return file

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table, see ``manifest_schema``."""
        return manifest_schema(self.registry, self.splits, self._version)

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of ``dataset.json``, which holds the hash of every shard. Copies have the same."""
        return hashlib.sha256((self.path / DATASET_FILE).read_bytes()).hexdigest()

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return len(self.shards)

    @property
    def table(self) -> pa.Table:
        """All columns of all samples, read on each access.

        The table takes some kB a sample: prefer ``column``, ``row`` or ``batches``.
        """
        return self._read(self._parquet.read)

    def _read(self, read: Callable[..., pa.Table], *arguments: object, **options: object) -> pa.Table:
        try:
            return read(*arguments, **options)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path / TABLE_FILE}: damaged: {error}; shard the tree again") from error

    def column(self, name: str) -> pa.ChunkedArray:
        """Read one column of the table.

        Raises:
            InputError: the table has no such column (the message lists its columns), or it is damaged.
        """
        names = self._parquet.schema_arrow.names
        if name not in names:
            raise InputError(f"{self.path}: no column {name!r} in the manifest; columns: {', '.join(names)}")
        return self._read(self._parquet.read, columns=[name])[name]

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the table in order, some thousand rows at a time.

        Args:
            columns: names of the columns to read; all by default.

        Raises:
            InputError: the table is damaged.
        """
        try:
            yield from self._parquet.iter_batches(_BATCH_ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path / TABLE_FILE}: damaged: {error}; shard the tree again") from error

    def split(self, column: str, value: str) -> np.ndarray:
        """Row numbers of the samples whose split ``column`` has ``value``, (N,) int64 ascending; all rows for ``all``.

        Raises:
            InputError: the split column does not exist, or no sample has the value. The message lists the valid ones.
        """
        if column == EVERY_SAMPLE:
            return np.arange(len(self), dtype=np.int64)
        if column not in self.splits:
            if not self.splits:
                raise InputError(
                    f"{self.path}: no split {column!r}, because its source had none; split=all takes every sample"
                )
            raise InputError(
                f"{self.path}: no split {column!r}; set split= to one of: {', '.join(self.splits)}; split=all takes "
                "every sample, also for validation"
            )
        labels = self.column(column)
        rows = np.flatnonzero(pc.fill_null(pc.equal(labels, value), False).to_numpy())
        if len(rows) == 0:
            values = ", ".join(sorted(labels.drop_null().unique().to_pylist())) or "none"
            raise InputError(f"{self.path}: no sample has {column} = {value!r}; values: {values}")
        return rows.astype(np.int64)

    @property
    def statistics(self) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Mean and standard deviation of each channel of the representation, without nodata, by input modality."""
        return dict(self._statistics)

    def input_spec(self, modality: str) -> InputSpec:
        """Input description of an encoder of ``modality``, with the channel statistics of these shards.

        Raises:
            InputError: the shards lack the modality, it is not an encoder input, or a channel has no valid value.
        """
        if modality not in self.registry:
            raise InputError(f"{self.path}: the shards hold no {modality}; they hold {', '.join(self.registry)}")
        if not self.registry[modality].is_input:
            raise InputError(f"{modality} is a {self.registry[modality].role}, not an input of an encoder")
        mean, std = self.statistics[modality]
        if None in mean or None in std:
            raise InputError(f"{self.path}: {modality} has no valid value in any sample")
        return InputSpec.from_modality(self.registry[modality], mean, std)

    def row(self, index: int) -> dict[str, Any]:
        """Read all columns of one sample, as Python values; ``side`` is there in every version of the format.

        Raises:
            IndexError: the row does not exist. Negative indices are not allowed.
            InputError: the table is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._row_group is None or not 0 <= index - self._row_group[0] < len(self._row_group[1]):
            metadata = self._parquet.metadata
            first = number = 0
            while index - first >= (count := metadata.row_group(number).num_rows):
                first, number = first + count, number + 1
            self._row_group = first, self._read(self._parquet.read_row_group, number)
        first, group = self._row_group
        return {"side": self.registry.patch_size, **group.slice(index - first, 1).to_pylist()[0]}

    def shard_path(self, shard: int) -> Path:
        """Path of the tar of shard ``shard``."""
        return self.path / self.shards[shard].name


def _channel_statistics(description: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel; None for a channel without valid values. Raises ``ValueError``."""
    mean, std = description["mean"], description["std"]
    for values in (mean, std):
        are_numbers = isinstance(values, list) and all(value is None or _is_number(value) for value in values)
        if not are_numbers or len(values) != channels:
            raise ValueError(f"statistics {values!r} are not {channels} numbers")
    return tuple(mean), tuple(std)


def _check_list_lengths(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse lists of implausible length before reading them: a few bytes of Parquet can expand beyond the memory."""
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        max_values = max(_MAX_MEAN_LIST_LENGTH * group.num_rows, MAX_SERIES_LENGTH)
        if any(group.column(index).num_values > max_values for index in range(group.num_columns)):
            raise InputError(f"{path}: lists of more values than a sample can have; shard the tree again")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _explain_missing_manifest(path: Path) -> str:
    """Explain in one sentence why ``path`` holds no manifest, and what to do."""
    if not path.is_dir():
        return f"{path}: no such folder; make shards with `bocage shard SRC {path}`"
    names = sorted(entry.name for entry in path.iterdir())
    if any(re.match(r"D[0-9A-Z]{3,6}-(\d{4}|195X)_", name) for name in names):
        return f"{path}: a FLAIR-HUB tree, not shards; make shards with `bocage shard {path} OUT`"
    if any(name.endswith(".tar") for name in names) or "parts" in names:
        return f"{path}: sharding has not finished; run the same `bocage shard SRC {path}` again to complete it"
    return f"{path}: no {DATASET_FILE} here; make shards with `bocage shard SRC {path}`"
