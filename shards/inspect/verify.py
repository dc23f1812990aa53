"""Whether a folder of shards is sound: every file's hash, every tar's headers, and arrays of some or all samples."""

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
from bocage.shards.format.manifest import DATASET_FILE, TABLE_FILE, Manifest, OtherVersionError, schema
from bocage.shards.format.running_stats import merge_stats
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.inspect.verify_shard import Findings, Problem, ShardCheck, check_shard, close
from bocage.shards.pool import results

Progress = Callable[[int, int, int], None]
"""Called with bytes of shards checked, bytes in all, and problems found so far."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        samples, shards, bytes: in the dataset's description.
        decoded: samples whose arrays were checked.
        problems: what is broken; of one file, the first few.
        more: problems that are not listed.
        warnings: files of the folder that do not belong there; readers leave them alone.
    """

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    more: int = 0
    warnings: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    @property
    def broken(self) -> list[str]:
        """Names of the files that are broken, each once."""
        return list(dict.fromkeys(problem.file for problem in self.problems))

    def add(self, findings: Findings) -> None:
        """The problems of one more file."""
        self.problems += findings.problems
        self.more += findings.more

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"sound": self.sound, "broken": self.broken, **asdict(self)}


def verify(
    path: str | Path, *, decode: int | None = 8, workers: int = 1, progress: Progress | None = None
) -> Verification:
    """Checks the shards in ``path``. What is broken is reported, and the rest checked all the same.

    Hash and size of every file; each tar from header to header, against the manifest; the JSON of each sample; index
    against table; and of the decoded samples dtype, shape, dates, class values, histograms and statistics. When all
    are decoded, mean and standard deviation of the dataset too. Memory does not depend on the number of samples.

    Args:
        path: the folder.
        decode: samples of each shard to decode, spread evenly; None for all.
        workers: processes; 1 works in this one.
        progress: see ``Progress``.

    Raises:
        InputError: there are no shards, or they are of another version; or a worker was killed.
    """
    path = Path(path)
    found = Verification()
    try:
        manifest = Manifest.described(path)
    except OtherVersionError:
        raise
    except InputError as error:
        if not (path / DATASET_FILE).is_file():
            raise
        found.problems.append(Problem(DATASET_FILE, "", _without_path(error, path, DATASET_FILE)))
        return found
    found.samples, found.shards = len(manifest), manifest.shard_count
    found.bytes = sum(shard.bytes for shard in manifest.shards)
    found.warnings = _strangers(manifest)
    rows = _check_manifest(manifest, found)
    moments = {}
    done = 0

    def tick(_: int, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, found.bytes, len(found.problems) + found.more)

    pages = Findings(TABLE_FILE)
    for job, report in results(check_shard, _jobs(manifest, rows, decode, pages), workers, tick):
        found.add(report.findings)
        found.decoded += report.decoded
        moments[job.shard.name] = report.moments
    found.add(pages)
    if decode is None and rows and found.sound:
        found.add(_check_statistics(manifest, [moments[shard.name] for shard in manifest.shards]))
    # In the order of the shards, not of the processes.
    place = {shard.name: index for index, shard in enumerate(manifest.shards)}
    found.problems.sort(key=lambda problem: place.get(problem.file, -1))
    return found


def _without_path(error: Exception, path: Path, name: str) -> str:
    """The message of an error about ``path / name``, which is named beside it."""
    text = str(error)
    for prefix in (f"{path / name}: ", f"{path}: "):
        text = text.removeprefix(prefix)
    return text


def _strangers(manifest: Manifest) -> list[Problem]:
    """Tars that no row points to, and what a run that was broken off left behind."""
    known = {shard.name for shard in manifest.shards}
    findings = Findings("")
    for entry in sorted(manifest.path.iterdir()):
        if entry.name.endswith(TEMPORARY_SUFFIX):
            what = "left over from a run that was broken off; it may be deleted"
        elif entry.name == PARTS_FOLDER:
            what = "left over from sharding; the next `bocage shard` of the same tree removes it"
        elif entry.name.endswith(".tar") and entry.name not in known:
            what = "not in the manifest; readers leave it alone, but `*.tar` given to other readers would include it"
        else:
            continue
        findings.problems.append(Problem(entry.name, "", what))
    return findings.problems


def _check_manifest(manifest: Manifest, found: Verification) -> bool:
    """Checks index and table; whether the table can be used."""
    index = None
    findings = Findings(INDEX_FILE)
    try:
        _ = manifest.index  # checked when first used
        with pa.memory_map(str(manifest.path / INDEX_FILE)) as file:
            index = pa.ipc.open_file(file).get_batch(0)
    except InputError as error:
        findings.add(_without_path(error, manifest.path, INDEX_FILE))
    table = Findings(TABLE_FILE)
    try:
        shards = _Rows(manifest, index, table).check(findings, found)
    except InputError as error:
        table.add(_without_path(error, manifest.path, TABLE_FILE))
        shards = False
    found.add(findings)
    found.add(table)
    return shards


class _Rows:
    """The table, some thousand rows at a time, beside the index."""

    def __init__(self, manifest: Manifest, index: pa.RecordBatch | None, findings: Findings) -> None:
        self._manifest, self._index, self._findings = manifest, index, findings
        self._required = [field.name for field in schema(manifest.registry, []) if not field.nullable]
        series = [f"dates.{item.name}" for item in manifest.registry.by_role("series")]
        self._columns = [*self._required, *series]

    def check(self, of_index: Findings, found: Verification) -> bool:
        """Whether rows can be told apart by shard; differences from the index are its findings."""
        index = {} if self._index is None else dict(zip(self._index.schema.names, self._index.columns))
        place = 0
        differing: dict[str, str] = {}
        present = dict.fromkeys(self._manifest.registry, 0)
        samples = [shard.samples for shard in self._manifest.shards]
        # The column first: only when the table has as many rows as the description counts are these worth an array.
        shard = self._manifest.column("shard").combine_chunks()
        if not np.array_equal(shard, np.repeat(np.arange(len(samples), dtype=np.int32), samples)):
            self._findings.add("its samples are not in the order of the shards")
            return False
        for batch in self._manifest.batches(self._columns):
            if any(batch[name].null_count for name in self._required):
                self._findings.add("a value is missing that every sample has")
                return False
            for name in present:
                present[name] += int(np.count_nonzero(batch[f"length.{name}"]))
            for name, whole in index.items():
                column, other = whole.slice(place, len(batch)), batch[name]
                if name not in differing and not _same(column, other):
                    rows = range(len(batch))
                    first = next(row for row in rows if not _same(column.slice(row, 1), other.slice(row, 1)))
                    differing[name] = batch["key"][first].as_py()
            place += len(batch)
        for name, key in differing.items():
            of_index.add(f"column {name} differs from {TABLE_FILE}, first here", key)
        counts = self._manifest.counts
        if counts.get("samples") != len(self._manifest) or counts.get("present") != present:
            found.problems.append(Problem(DATASET_FILE, "", f"its counts are not those of {TABLE_FILE}"))
        return True


def _same(index: pa.Array, table: pa.Array) -> bool:
    """Whether values agree; the index has an empty list where the table has none."""
    if pa.types.is_dictionary(index.type):
        index = index.dictionary_decode()
    if not pa.types.is_list(index.type):
        return index.equals(table)
    lengths = [pc.fill_null(pc.list_value_length(lists), 0) for lists in (index, table)]
    return lengths[0].equals(lengths[1]) and index.flatten().equals(table.flatten())


def _jobs(manifest: Manifest, rows: bool, decode: int | None, findings: Findings) -> Iterator[ShardCheck]:
    """One job a shard, with its rows; only the rows of a few shards are in memory."""
    batches = manifest.batches() if rows else iter(())
    waiting: list[pa.RecordBatch] = []
    for index, shard in enumerate(manifest.shards):
        own = None
        try:
            while sum(map(len, waiting)) < shard.samples and (batch := next(batches, None)) is not None:
                waiting.append(batch)
        except InputError as error:  # the shards are checked all the same, without rows
            findings.add(_without_path(error, manifest.path, TABLE_FILE))
            waiting, batches = [], iter(())
        if waiting and sum(map(len, waiting)) >= shard.samples:
            together = pa.Table.from_batches(waiting)
            # Taken, not sliced: a slice travels to a process with all that it was cut from.
            own = together.take(np.arange(shard.samples))
            waiting = together.slice(shard.samples).to_batches()
        yield ShardCheck(manifest.shard_path(index), shard, manifest.registry, own, decode)


def _check_statistics(manifest: Manifest, moments: list[dict[str, Any]]) -> Findings:
    """Mean and standard deviation of the whole dataset, from its shards in order."""
    findings = Findings(DATASET_FILE)
    for name, stored in manifest.statistics.items():
        total = merge_stats(part[name] for part in moments if name in part)
        for what, values in zip(("mean", "std"), stored):
            found = np.full(len(values), np.nan) if total is None else getattr(total, what)
            if not close(np.array(values, np.float64), found):
                findings.add(f"the {what} of {name} is {np.round(found, 4).tolist()}, stored is {list(values)}")
    return findings
