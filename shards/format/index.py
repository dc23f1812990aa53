"""Read and write the index of a folder of shards: the byte range of every member, memory-mapped.

``index.arrow`` is an uncompressed Arrow IPC file with one record batch. Its columns are NumPy views of the mapped file:
all DataLoader workers share its pages, and its size does not count in their memory. A pickled index is only its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.errors import InputError
from bocage.shards.modality import Registry

INDEX_FILE = "index.arrow"

MAX_SERIES_LENGTH = 1 << 15
"""Maximum number of dates of a series; ninety a year are usual."""

_KEY_PATTERN = "[A-Za-z0-9_-]{1,200}"
_ROI_PATTERN = "[A-Za-z0-9_/-]{1,200}"
_DATES_TYPE = pa.dictionary(pa.int32(), pa.list_(pa.int32()))


def index_schema(registry: Registry) -> pa.Schema:
    """Columns of ``index.arrow``; none holds nulls.

    ``offset.M`` and ``length.M`` locate the bytes of modality M in the tar number ``shard``; length 0 means absent.
    ``dates.M`` exists for series, in days since 1970-01-01. Each distinct list of dates is stored once. The list of a
    series without metadata is empty.
    """
    fields = [("key", pa.string()), ("roi", pa.dictionary(pa.int32(), pa.string())), ("shard", pa.int32())]
    for modality in registry.values():
        fields += [(f"offset.{modality.name}", pa.int64()), (f"length.{modality.name}", pa.int32())]
        if modality.role == "series":
            fields.append((f"dates.{modality.name}", _DATES_TYPE))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


class Index:
    """An open index of N samples.

    Args:
        path: path of the index file.
        registry: modalities that the shards hold.

    Attributes:
        path: path of the index file.
        shard: shard number of each sample, (N,) int32.
        offset, length: byte range of each member in its tar, by modality, (N,) int64 and (N,) int32. The length is 0
            if the sample lacks the modality.

    Raises:
        InputError: the file is not an index of the modalities of ``registry``.
    """

    def __init__(self, path: Path, registry: Registry) -> None:
        self.path, self._registry = path, registry
        try:
            # The batch keeps the mapping alive after the file object is closed.
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                if not reader.schema.equals(index_schema(registry)):
                    raise InputError(f"{path}: its columns do not match the modalities; shard the tree again")
                if reader.num_record_batches != 1:
                    raise InputError(f"{path}: {reader.num_record_batches} record batches, not one")
                self._batch: pa.RecordBatch = reader.get_batch(0)
                mapped_file = file.read_buffer(file.size())
            if not _is_view_of(mapped_file, self._batch):
                raise InputError(f"{path}: compressed, so it cannot be memory-mapped; shard the tree again")
            if any(column.null_count for column in self._batch.columns):
                raise InputError(f"{path}: a column holds nulls; shard the tree again")
            self.shard = self._numpy_column("shard")
            self.offset = {name: self._numpy_column(f"offset.{name}") for name in registry}
            self.length = {name: self._numpy_column(f"length.{name}") for name in registry}
        except InputError:
            raise
        except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        self._keys, self._rois = self._batch["key"], self._batch["roi"]
        self._dates = {item.name: self._batch[f"dates.{item.name}"] for item in registry.by_role("series")}

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.path, self._registry)

    def __len__(self) -> int:
        return self._batch.num_rows

    def _numpy_column(self, name: str) -> np.ndarray:
        return self._batch[name].to_numpy(zero_copy_only=True)

    @property
    def keys(self) -> pa.StringArray:
        """Keys of all samples."""
        return self._keys

    def key(self, row: int) -> str:
        """Key of one sample."""
        return self._keys[row].as_py()

    def roi(self, row: int) -> str:
        """Domain-year and region of interest of one sample."""
        return self._rois[row].as_py()

    def dates(self, series: str, row: int) -> np.ndarray:
        """Acquisition dates of one sample, (T,) int32 days since 1970-01-01, as a view of the mapped file."""
        return self._dates[series][row].value.values.to_numpy(zero_copy_only=True)

    def validate(self, samples: Sequence[int], sizes: Sequence[int]) -> None:
        """Check that no entry points outside a shard, a list of dates or the file.

        Args:
            samples: number of samples of each shard.
            sizes: size of each shard, in bytes.

        Raises:
            InputError: an entry points outside, a key is not a plain name or occurs twice, or the samples per shard
                differ from ``samples``.
        """
        try:
            self._batch.validate(full=True)
            for dates in self._dates.values():
                # Arrow's validation of a dictionary column covers its codes, not its values.
                dates.dictionary.validate(full=True)
                lengths = pc.list_value_length(dates.dictionary)
                if dates.dictionary.null_count or dates.dictionary.flatten().null_count:
                    raise InputError(f"{self.path}: a date is missing; shard the tree again")
                if (pc.max(lengths).as_py() or 0) > MAX_SERIES_LENGTH:
                    raise InputError(
                        f"{self.path}: a series of more than {MAX_SERIES_LENGTH} dates; shard the tree again"
                    )
            self._rois.dictionary.validate(full=True)
        except pa.ArrowException as error:
            raise InputError(f"{self.path}: damaged: {error}; shard the tree again") from error
        if self._rois.dictionary.null_count or not _all_match(self._rois.dictionary, _ROI_PATTERN):
            raise InputError(f"{self.path}: a region of interest that is not a plain name; shard the tree again")
        if not _all_match(self._keys, _KEY_PATTERN):
            raise InputError(f"{self.path}: a key that is not a plain name; shard the tree again")
        if pc.count_distinct(self._keys).as_py() != len(self):
            raise InputError(f"{self.path}: a key occurs twice; shard the tree again")
        shard, counts = self.shard, np.array(samples, np.int64)
        within = len(shard) == counts.sum() and (len(shard) == 0 or 0 <= shard.min() <= shard.max() < len(counts))
        if not within or (np.bincount(shard, minlength=len(counts)) != counts).any():
            raise InputError(f"{self.path}: its samples per shard differ from dataset.json; shard the tree again")
        ends = np.array(sizes, np.int64)[shard]
        for name, offset in self.offset.items():
            # Subtract instead of adding: an offset near 2^63 must not overflow.
            if (offset < 0).any() or (self.length[name] < 0).any() or (offset > ends - self.length[name]).any():
                raise InputError(f"{self.path}: a member of {name} lies outside its shard; shard the tree again")
        # Release the memory of the checks, some 170 bytes per sample, so that DataLoader workers do not inherit it.
        pa.default_memory_pool().release_unused()


def _is_view_of(mapped_file: pa.Buffer, batch: pa.RecordBatch) -> bool:
    """Whether the batch is a view of the mapped file, that is, no column was decompressed into memory."""
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    buffers += [
        buffer
        for column in batch.columns
        if pa.types.is_dictionary(column.type)
        for buffer in column.dictionary.buffers()
        if buffer is not None
    ]
    start, end = mapped_file.address, mapped_file.address + mapped_file.size
    return all(start <= item.address and item.address + item.size <= end for item in buffers if item.size)


def _all_match(texts: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(texts, rf"\A{pattern}\z"), min_count=0).as_py())


class IndexBuilder:
    """Collect the columns of an index, part by part. Each distinct list of dates and each ROI is stored once.

    Args:
        registry: modalities that the shards hold.
        count: total number of samples.
    """

    def __init__(self, registry: Registry, count: int) -> None:
        self._schema = index_schema(registry)
        self._row_count = 0
        self._keys: list[pa.Array] = []
        self._numbers: dict[str, np.ndarray] = {}
        self._codes: dict[str, dict[Any, int]] = {}
        for field in self._schema:
            if pa.types.is_dictionary(field.type):
                self._codes[field.name] = {}
                self._numbers[field.name] = np.zeros(count, np.int32)
            elif field.name != "key":
                self._numbers[field.name] = np.zeros(count, field.type.to_pandas_dtype())

    def add(self, table: pa.Table) -> None:
        """Append the rows of a part; ``table`` has the columns of the manifest."""
        rows = slice(self._row_count, self._row_count + table.num_rows)
        self._row_count = rows.stop
        self._keys.append(table["key"].combine_chunks())
        for name, numbers in self._numbers.items():
            codes = self._codes.get(name)
            if codes is None:
                numbers[rows] = table[name].to_numpy()
            else:
                values = _date_bytes(table[name]) if name.startswith("dates.") else table[name].to_pylist()
                numbers[rows] = [codes.setdefault(value, len(codes)) for value in values]

    def write(self, path: Path) -> None:
        """Write the index file, after all parts were added."""
        columns: list[pa.Array] = []
        for field in self._schema:
            if field.name == "key":
                columns.append(pa.chunked_array(self._keys, pa.string()).combine_chunks())
            elif pa.types.is_dictionary(field.type):
                values = list(self._codes[field.name])
                dictionary = _date_lists(values) if field.name.startswith("dates.") else pa.array(values, pa.string())
                columns.append(pa.DictionaryArray.from_arrays(pa.array(self._numbers[field.name]), dictionary))
            else:
                columns.append(pa.array(self._numbers[field.name]))
        batch = pa.record_batch(columns, schema=self._schema)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self._schema) as writer:
            writer.write_batch(batch)


def _date_bytes(column: pa.ChunkedArray) -> list[bytes]:
    """Bytes of each list of int32 dates, which hash fast; empty for a null."""
    lists = column.combine_chunks()
    days = lists.flatten().to_numpy()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy()).tolist()
    return [days[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends)]


def _date_lists(values: list[bytes]) -> pa.ListArray:
    """Inverse of ``_date_bytes``."""
    ends = np.cumsum([0, *(len(value) // 4 for value in values)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.frombuffer(b"".join(values), np.int32)))
