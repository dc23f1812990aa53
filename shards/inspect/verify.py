"""Verify a folder of shards: hash of every file, headers of every tar, and arrays of some or all samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.errors import InputError
from bocage.shards.files import TEMPORARY_SUFFIX
from bocage.shards.format.index import INDEX_FILE
from bocage.shards.format.manifest import DATASET_FILE, TABLE_FILE, Manifest, SchemaVersionError
from bocage.shards.format.running_stats import merge_stats
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.inspect.verify_shard import Findings, Problem, ShardCheck, check_shard, statistics_match
from bocage.shards.pool import run_in_pool

Progress = Callable[[int, int, int], None]
"""Callback with the bytes checked, the bytes of all shards, and the number of problems so far."""


@dataclass
class Verification:
    """Result of verifying a folder of shards.

    Attributes:
        samples: number of samples in the dataset's description.
        shards: number of shards in the description.
        bytes: size of all shards in the description.
        decoded: number of samples whose arrays were checked.
        problems: problems, up to 20 per file.
        unlisted: number of further problems.
        warnings: unexpected files in the folder, which readers ignore.
    """

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0
    warnings: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def broken(self) -> list[str]:
        """Names of the files with problems, each once."""
        return list(dict.fromkeys(problem.file for problem in self.problems))

    def add(self, findings: Findings) -> None:
        """Add the problems of one file."""
        self.problems += findings.problems
        self.unlisted += findings.unlisted

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON-serialisable dictionary."""
        return {"sound": self.sound, "broken": self.broken, **asdict(self)}


def verify(
    path: str | Path, *, decode: int | None = 8, workers: int = 1, progress: Progress | None = None
) -> Verification:
    """Verify the shards in ``path``. Problems are reported, and do not stop the checks of other files.

    The checks cover the hash and size of every file, all headers of each tar against the manifest, the JSON of each
    sample, and the index against the table. For decoded samples they also cover dtype, shape, dates, class values,
    histograms and statistics. If all samples are decoded, mean and standard deviation of the dataset are checked too.
    Memory does not grow with the number of samples.

    Args:
        path: folder of the shards.
        decode: number of samples of each shard to decode, spread evenly; None decodes all.
        workers: number of processes; 1 runs the checks in this process.
        progress: progress callback.

    Raises:
        InputError: there are no shards, they have another version, or a worker was killed.
    """
    path = Path(path)
    result = Verification()
    try:
        manifest = Manifest.open_lazy(path)
    except SchemaVersionError:
        raise
    except InputError as error:
        if not (path / DATASET_FILE).is_file():
            raise
        result.problems.append(Problem(DATASET_FILE, "", _without_path(error, path, DATASET_FILE)))
        return result
    result.samples, result.shards = len(manifest), manifest.shard_count
    result.bytes = sum(shard.bytes for shard in manifest.shards)
    result.warnings = _unexpected_files(manifest)
    has_rows = _check_index_and_table(manifest, result)
    statistics = {}
    done = 0

    def on_progress(_: int, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, result.bytes, len(result.problems) + result.unlisted)

    table_findings = Findings(TABLE_FILE)
    jobs = _jobs(manifest, has_rows, decode, table_findings)
    for job, report in run_in_pool(check_shard, jobs, workers, on_progress):
        result.add(report.findings)
        result.decoded += report.decoded
        statistics[job.shard.name] = report.statistics
    result.add(table_findings)
    if decode is None and has_rows and result.sound:
        result.add(_check_statistics(manifest, [statistics[shard.name] for shard in manifest.shards]))
    # Processes finish in any order; report in the order of the shards.
    order = {shard.name: index for index, shard in enumerate(manifest.shards)}
    result.problems.sort(key=lambda problem: order.get(problem.file, -1))
    return result


def _without_path(error: Exception, path: Path, name: str) -> str:
    """Message of an error without the path of the file, which the problem names separately."""
    text = str(error)
    for prefix in (f"{path / name}: ", f"{path}: "):
        text = text.removeprefix(prefix)
    return text


def _unexpected_files(manifest: Manifest) -> list[Problem]:
    """Tars that are not in the manifest, and leftovers of interrupted runs."""
    known = {shard.name for shard in manifest.shards}
    findings = Findings("")
    for entry in sorted(manifest.path.iterdir()):
        if entry.name.endswith(TEMPORARY_SUFFIX):
            message = "left over from an interrupted run; it may be deleted"
        elif entry.name == PARTS_FOLDER:
            message = "left over from sharding; the next `bocage shard` of the same tree removes it"
        elif entry.name.endswith(".tar") and entry.name not in known:
            message = "not in the manifest; bocage ignores it, but other readers given `*.tar` would read it"
        else:
            continue
        findings.problems.append(Problem(entry.name, "", message))
    return findings.problems


def _check_index_and_table(manifest: Manifest, result: Verification) -> bool:
    """Check index and table; returns whether the table can be used."""
    index = None
    index_findings = Findings(INDEX_FILE)
    try:
        _ = manifest.index  # checked at its first use
        with pa.memory_map(str(manifest.path / INDEX_FILE)) as file:
            index = pa.ipc.open_file(file).get_batch(0)
    except InputError as error:
        index_findings.add(_without_path(error, manifest.path, INDEX_FILE))
    table_findings = Findings(TABLE_FILE)
    try:
        is_usable = _TableCheck(manifest, index, table_findings).run(index_findings, result)
    except InputError as error:
        table_findings.add(_without_path(error, manifest.path, TABLE_FILE))
        is_usable = False
    result.add(index_findings)
    result.add(table_findings)
    return is_usable


class _TableCheck:
    """Check the table against the index, some thousand rows at a time."""

    def __init__(self, manifest: Manifest, index: pa.RecordBatch | None, findings: Findings) -> None:
        self._manifest, self._index, self._findings = manifest, index, findings
        self._required = [field.name for field in manifest.schema if not field.nullable]
        series = [f"dates.{item.name}" for item in manifest.registry.by_role("series")]
        self._columns = [*self._required, *series]

    def run(self, index_findings: Findings, result: Verification) -> bool:
        """Check the table; returns whether its rows can be split by shard. Differences count against the index."""
        index = {} if self._index is None else dict(zip(self._index.schema.names, self._index.columns))
        start = 0
        first_difference: dict[str, str] = {}  # key of the first sample that differs, by column
        present = dict.fromkeys(self._manifest.registry, 0)
        samples = [shard.samples for shard in self._manifest.shards]
        # Reading the column first checks that the table has as many rows as the description says. Only then may the
        # counts of the description size an array.
        shard = self._manifest.column("shard").combine_chunks()
        if not np.array_equal(shard, np.repeat(np.arange(len(samples), dtype=np.int32), samples)):
            self._findings.add("its samples are not in the order of the shards")
            return False
        for batch in self._manifest.batches(self._columns):
            if any(batch[name].null_count for name in self._required):
                self._findings.add("a required value is missing")
                return False
            for name in present:
                present[name] += int(np.count_nonzero(batch[f"length.{name}"]))
            for name, column in index.items():
                indexed, stored = column.slice(start, len(batch)), batch[name]
                if name not in first_difference and not _equal(indexed, stored):
                    rows = range(len(batch))
                    first = next(row for row in rows if not _equal(indexed.slice(row, 1), stored.slice(row, 1)))
                    first_difference[name] = batch["key"][first].as_py()
            start += len(batch)
        for name, key in first_difference.items():
            index_findings.add(f"column {name} differs from {TABLE_FILE}, first at this sample", key)
        counts = self._manifest.counts
        if counts.get("samples") != len(self._manifest) or counts.get("present") != present:
            result.problems.append(Problem(DATASET_FILE, "", f"its counts are not those of {TABLE_FILE}"))
        return True


def _equal(index: pa.Array, table: pa.Array) -> bool:
    """Whether values are equal; an empty list of the index equals a null of the table."""
    if pa.types.is_dictionary(index.type):
        index = index.dictionary_decode()
    if not pa.types.is_list(index.type):
        return index.equals(table)
    lengths = [pc.fill_null(pc.list_value_length(lists), 0) for lists in (index, table)]
    return lengths[0].equals(lengths[1]) and index.flatten().equals(table.flatten())


def _jobs(manifest: Manifest, has_rows: bool, decode: int | None, findings: Findings) -> Iterator[ShardCheck]:
    """One job per shard with its rows; memory holds only the rows of a few shards."""
    batches = manifest.batches() if has_rows else iter(())
    pending: list[pa.RecordBatch] = []
    for index, shard in enumerate(manifest.shards):
        rows = None
        try:
            while sum(map(len, pending)) < shard.samples and (batch := next(batches, None)) is not None:
                pending.append(batch)
        except InputError as error:  # the remaining shards are still checked, without rows
            findings.add(_without_path(error, manifest.path, TABLE_FILE))
            pending, batches = [], iter(())
        if pending and sum(map(len, pending)) >= shard.samples:
            table = pa.Table.from_batches(pending)
            # Use take, not slice: pickling a slice for another process includes the whole table.
            rows = table.take(np.arange(shard.samples))
            pending = table.slice(shard.samples).to_batches()
        yield ShardCheck(manifest.shard_path(index), shard, manifest.registry, rows, decode)


def _check_statistics(manifest: Manifest, statistics: list[dict[str, Any]]) -> Findings:
    """Check mean and standard deviation of the dataset, merged from its shards in order."""
    findings = Findings(DATASET_FILE)
    for name, stored in manifest.statistics.items():
        total = merge_stats(part[name] for part in statistics if name in part)
        for statistic, values in zip(("mean", "std"), stored):
            actual = np.full(len(values), np.nan) if total is None else getattr(total, statistic)
            if not statistics_match(np.array(values, np.float64), actual):
                findings.add(
                    f"the {statistic} of {name} is {np.round(actual, 4).tolist()}, but the stored one is {list(values)}"
                )
    return findings
