"""The index of a folder of shards: where the bytes of every sample are, memory-mapped and shared by all who read.

``index.arrow`` is an uncompressed Arrow IPC file of one record batch. Its columns are NumPy views of the mapped file,
so a reading process holds none of it, however many samples there are; pickled, an index is its path.
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

_KEY = "[A-Za-z0-9_-]{1,200}"
_ROI = "[A-Za-z0-9_/-]{1,200}"
LONGEST_SERIES = 1 << 15  # dates of a series: ninety a year are usual
_DATES = pa.dictionary(pa.int32(), pa.list_(pa.int32()))


def index_schema(registry: Registry) -> pa.Schema:
    """The columns of ``index.arrow``; none holds a null.

    ``offset.M`` and ``length.M`` locate the bytes of modality M in the tar number ``shard`` (length 0: absent).
    ``dates.M``, for series, are days since 1970-01-01, each list of dates stored once; without metadata it is empty.
    """
    fields = [("key", pa.string()), ("roi", pa.dictionary(pa.int32(), pa.string())), ("shard", pa.int32())]
    for modality in registry.values():
        fields += [(f"offset.{modality.name}", pa.int64()), (f"length.{modality.name}", pa.int32())]
        if modality.role == "series":
            fields.append((f"dates.{modality.name}", _DATES))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


class Index:
    """An open index of N samples.

    Attributes:
        path: the file.
        shard: (N,) int32, the shard of each sample.
        offset, length: by modality, (N,) int64 and (N,) int32, bytes; length 0 where a sample lacks it.

    Raises:
        InputError: the file is not an index of the modalities of ``registry``.
    """

    def __init__(self, path: Path, registry: Registry) -> None:
        self.path, self._registry = path, registry
        try:
            # The batch holds the map, and the map outlives its file object.
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                if not reader.schema.equals(index_schema(registry)):
                    raise InputError(f"{path}: its columns are not those of the modalities; shard the tree again")
                if reader.num_record_batches != 1:
                    raise InputError(f"{path}: {reader.num_record_batches} record batches, not one")
                self._batch: pa.RecordBatch = reader.get_batch(0)
                whole = file.read_buffer(file.size())
            if not _inside(whole, self._batch):
                raise InputError(f"{path}: compressed, which an index is not; shard the tree again")
            if any(column.null_count for column in self._batch.columns):
                raise InputError(f"{path}: a sample has no place in a shard; shard the tree again")
            self.shard = self._numbers("shard")
            self.offset = {name: self._numbers(f"offset.{name}") for name in registry}
            self.length = {name: self._numbers(f"length.{name}") for name in registry}
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

    def _numbers(self, name: str) -> np.ndarray:
        return self._batch[name].to_numpy(zero_copy_only=True)

    @property
    def keys(self) -> pa.StringArray:
        """Of all samples."""
        return self._keys

    def key(self, row: int) -> str:
        """The key of one sample."""
        return self._keys[row].as_py()

    def roi(self, row: int) -> str:
        """The domain-year and region of interest of one sample."""
        return self._rois[row].as_py()

    def dates(self, series: str, row: int) -> np.ndarray:
        """Acquisition dates of one sample, (T,) int32 days since 1970-01-01; a view."""
        return self._dates[series][row].value.values.to_numpy(zero_copy_only=True)

    def validate(self, samples: Sequence[int], sizes: Sequence[int]) -> None:
        """Check that nothing that stands here leads a reader outside a shard, a list or the file.

        Args:
            samples, sizes: number of samples and bytes of each shard.

        Raises:
            InputError: it does, or keys are not plain and distinct, or samples not those of the shards.
        """
        try:
            self._batch.validate(full=True)
            for dates in self._dates.values():
                # Arrow's validation of a dictionary stops at its codes.
                dates.dictionary.validate(full=True)
                lengths = pc.list_value_length(dates.dictionary)
                if dates.dictionary.null_count or dates.dictionary.flatten().null_count:
                    raise InputError(f"{self.path}: a date is missing; shard the tree again")
                if (pc.max(lengths).as_py() or 0) > LONGEST_SERIES:
                    raise InputError(f"{self.path}: a series of more than {LONGEST_SERIES} dates; shard the tree again")
            self._rois.dictionary.validate(full=True)
        except pa.ArrowException as error:
            raise InputError(f"{self.path}: damaged: {error}; shard the tree again") from error
        if self._rois.dictionary.null_count or not _all_match(self._rois.dictionary, _ROI):
            raise InputError(f"{self.path}: a region of interest that is not a plain name; shard the tree again")
        if not _all_match(self._keys, _KEY):
            raise InputError(f"{self.path}: a key that is not a plain name; shard the tree again")
        if pc.count_distinct(self._keys).as_py() != len(self):
            raise InputError(f"{self.path}: a key stands there twice; shard the tree again")
        shard, counts = self.shard, np.array(samples, np.int64)
        within = len(shard) == counts.sum() and (len(shard) == 0 or 0 <= shard.min() <= shard.max() < len(counts))
        if not within or (np.bincount(shard, minlength=len(counts)) != counts).any():
            raise InputError(f"{self.path}: its samples are not those of the shards in the dataset's description")
        ends = np.array(sizes, np.int64)[shard]
        for name, offset in self.offset.items():
            # Subtracted, not added: an offset near 2^63 must not wrap around.
            if (offset < 0).any() or (self.length[name] < 0).any() or (offset > ends - self.length[name]).any():
                raise InputError(f"{self.path}: a member of {name} lies outside its shard")
        # What the checks took, some 170 bytes a sample, is not to be kept and inherited by every reading process.
        pa.default_memory_pool().release_unused()


def _inside(whole: pa.Buffer, batch: pa.RecordBatch) -> bool:
    """Whether the batch is a view of the mapped file: nothing of it was decompressed into memory."""
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    buffers += [
        buffer
        for column in batch.columns
        if pa.types.is_dictionary(column.type)
        for buffer in column.dictionary.buffers()
        if buffer is not None
    ]
    last = whole.address + whole.size
    return all(whole.address <= item.address and item.address + item.size <= last for item in buffers if item.size)


def _all_match(texts: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(texts, rf"\A{pattern}\z"), min_count=0).as_py())


class IndexBuilder:
    """Collects the columns of an index part by part; each list of dates and each ROI is kept once.

    Args:
        registry: what the shards hold.
        count: samples there will be.
    """

    def __init__(self, registry: Registry, count: int) -> None:
        self._schema = index_schema(registry)
        self._filled = 0
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
        """The rows of a part, in the columns of the manifest's table."""
        place = slice(self._filled, self._filled + table.num_rows)
        self._filled = place.stop
        self._keys.append(table["key"].combine_chunks())
        for name, numbers in self._numbers.items():
            codes = self._codes.get(name)
            if codes is None:
                numbers[place] = table[name].to_numpy()
            else:
                values = _date_bytes(table[name]) if name.startswith("dates.") else table[name].to_pylist()
                numbers[place] = [codes.setdefault(value, len(codes)) for value in values]

    def write(self, path: Path) -> None:
        """The file, when all parts are in."""
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
    """The int32 of each list of dates as bytes, which hash fast; none for a null."""
    lists = column.combine_chunks()
    days = lists.flatten().to_numpy()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy()).tolist()
    return [days[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends)]


def _date_lists(values: list[bytes]) -> pa.ListArray:
    ends = np.cumsum([0, *(len(value) // 4 for value in values)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.frombuffer(b"".join(values), np.int32)))
