"""Check one shard against its rows of the manifest: hash, tar headers, JSON, and arrays of some or all samples."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bocage.shards.errors import counted
from bocage.shards.format.codec import CodecError, EncodedArray
from bocage.shards.format.index import MAX_SERIES_LENGTH
from bocage.shards.format.manifest import Shard, has_acquisition_dates
from bocage.shards.format.running_stats import RunningStats, compute_stats
from bocage.shards.format.shard_files import member_name
from bocage.shards.format.tar import BLOCK, TarError, TarReader, printable
from bocage.shards.modality import Modality, Registry
from bocage.shards.pool import ProgressCallback

_MAX_LISTED = 20  # listed problems per file; further ones are only counted
_CHUNK = 4 << 20
_MAX_JSON_BYTES = 8 << 20  # four series with the most dates take 2 MB
_DESCRIPTION_FIELDS = ("key", "roi", "domain", "crs", "left", "top")


@dataclass(frozen=True)
class Problem:
    """One problem of a file.

    Attributes:
        file: name of the file in the folder.
        member: member or sample with the problem; empty if unknown.
        message: description of the problem.
    """

    file: str
    member: str
    message: str


@dataclass
class Findings:
    """Problems of one file.

    Attributes:
        file: name of the file in the folder.
        problems: the first problems.
        unlisted: number of further problems.
    """

    file: str
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0

    def add(self, message: str, member: str = "") -> None:
        """Add a problem."""
        if len(self.problems) < _MAX_LISTED:
            self.problems.append(Problem(self.file, printable(member), message))
        else:
            self.unlisted += 1


@dataclass(frozen=True)
class ShardCheck:
    """Task of checking one shard.

    Attributes:
        path: path of the tar.
        shard: entry of the shard in the dataset's description.
        registry: modalities of the shard.
        rows: rows of the shard in the manifest's table; None if they cannot be read, then only the hash is checked.
        decode: number of samples to decode, spread evenly; None decodes all. A shard with a wrong hash is decoded
            completely.
    """

    path: Path
    shard: Shard
    registry: Registry
    rows: pa.Table | None
    decode: int | None


@dataclass
class ShardReport:
    """Result of checking one shard.

    Attributes:
        findings: problems of the shard.
        decoded: number of samples whose arrays were checked.
        statistics: statistics of the decoded samples, merged in the order of the tar, by input modality.
    """

    findings: Findings
    decoded: int = 0
    statistics: dict[str, RunningStats] = field(default_factory=dict)


def check_shard(job: ShardCheck, on_progress: ProgressCallback) -> ShardReport:
    """Check one shard; problems are reported, not raised.

    Args:
        job: shard to check.
        on_progress: callback that receives 0 and the number of bytes checked since the last call. The bytes add up to
            the size of the shard in its description.
    """
    report = ShardReport(Findings(job.shard.name))
    remaining = job.shard.bytes

    def on_bytes(size: int) -> None:
        nonlocal remaining
        size = min(size, remaining)
        remaining -= size
        on_progress(0, size)

    _check_file(job, report, on_bytes)
    on_progress(0, remaining)
    return report


def _check_file(job: ShardCheck, report: ShardReport, on_bytes: Callable[[int], None]) -> None:
    try:
        # O_NONBLOCK, because opening a pipe would otherwise wait for a writer.
        descriptor = os.open(job.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        report.findings.add("missing")
        return
    except OSError as error:
        report.findings.add(f"cannot be opened: {error.strerror}")
        return
    try:
        _check_open_file(job, descriptor, report, on_bytes)
    except OSError as error:
        report.findings.add(f"cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)


def _check_open_file(job: ShardCheck, descriptor: int, report: ShardReport, on_bytes: Callable[[int], None]) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        report.findings.add("not a regular file")
        return
    if status.st_size != job.shard.bytes:
        report.findings.add(f"{status.st_size} bytes, but the dataset's description says {job.shard.bytes}")
    elif _sha256(descriptor, on_bytes) != job.shard.sha256:
        report.findings.add("damaged: its SHA-256 is not the one in the dataset's description")
    if job.rows is not None:
        count = len(job.rows)
        # In a damaged shard, decode every sample: the checksums of members locate the damage.
        limit = None if report.findings.problems else job.decode
        rows = range(count) if limit is None else np.unique(np.linspace(0, count - 1, min(limit, count), dtype=int))
        tar = TarReader(descriptor, status.st_size)
        _TarCheck(tar, job.registry, job.rows, report, on_bytes).run(set(map(int, rows)))


def _sha256(descriptor: int, on_bytes: Callable[[int], None]) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
        on_bytes(0)  # progress counts the bytes of the tar check, which takes longer than hashing
    return digest.hexdigest()


class _TarCheck:
    """Check a tar from its first header to its end against the rows of the manifest."""

    def __init__(
        self,
        tar: TarReader,
        registry: Registry,
        rows: pa.Table,
        report: ShardReport,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._tar, self._registry, self._rows, self._on_bytes = tar, registry, rows, on_bytes
        self._report, self._findings = report, report.findings
        self._next_offset: int | None = 0  # offset of the next header; None after a header that cannot be trusted
        columns = [
            *_DESCRIPTION_FIELDS,
            *(f"dates.{item.name}" for item in registry.values() if has_acquisition_dates(item)),
        ]
        self._descriptions = rows.select(columns)
        self._offset = {name: rows[f"offset.{name}"].to_numpy() for name in registry}
        self._length = {name: rows[f"length.{name}"].to_numpy() for name in registry}

    def run(self, decoded_rows: set[int]) -> None:
        for row in range(len(self._rows)):
            description = self._descriptions.slice(row, 1).to_pylist()[0]
            key = description["key"]
            members = sorted(
                (int(self._offset[name][row]), int(self._length[name][row]), name)
                for name in self._registry
                if self._length[name][row] != 0
            )
            record = self._rows.slice(row, 1).to_pylist()[0] if row in decoded_rows else None
            for offset, length, name in members:
                member = member_name(key, name)
                if offset > self._tar.size - length:
                    self._add_truncated(member, len(self._rows) - row - 1)
                    return
                self._check_offset(offset, member)
                self._next_offset = _next_header(offset, length)
                try:
                    self._tar.check_member(offset - BLOCK, member, length)
                    if record is not None:
                        self._check_array(self._registry[name], offset, length, record, member)
                except (TarError, CodecError) as error:
                    self._findings.add(str(error), member)
            self._report.decoded += row in decoded_rows
            try:
                self._check_json(description, [name for _, _, name in members])
            except TarError as error:
                self._findings.add(str(error), f"{key}.json")
                self._next_offset = None
            self._on_bytes(sum(length + BLOCK for _, length, _ in members))
        if self._next_offset is not None:
            try:
                self._tar.check_end(self._next_offset, lambda: self._on_bytes(0))
            except TarError as error:
                self._findings.add(str(error))

    def _add_truncated(self, member: str, samples_after: int) -> None:
        lost = f"; {counted(samples_after, 'sample')} after it lost too" if samples_after else ""
        self._findings.add(
            f"cut off: the shard ends at byte {self._tar.size}, before the end of this member{lost}", member
        )

    def _check_offset(self, offset: int, member: str) -> None:
        """Check that the header of a member follows the previous member without gap or overlap."""
        expected = self._next_offset
        if expected is None or expected == offset - BLOCK:
            return
        if expected > offset - BLOCK:
            self._findings.add(f"its offset in the manifest, {offset}, lies inside the previous member", member)
            return
        try:
            header = self._tar.read_header(expected)
            content = "an empty block" if header is None else header.describe()
        except TarError as error:
            content = str(error)
        self._findings.add(f"{content} before it, at byte {expected}: not in the manifest", member)

    def _check_json(self, row: dict[str, Any], present: list[str]) -> None:
        """Check the JSON member that ends a sample against its row."""
        member = f"{row['key']}.json"
        if self._next_offset is None:
            return
        size = self._tar.check_member(self._next_offset, member, None)
        if size > _MAX_JSON_BYTES:
            raise TarError(f"{size} bytes, too many for a description")
        data = self._tar.read(self._next_offset + BLOCK, size)
        self._next_offset = _next_header(self._next_offset + BLOCK, size)
        try:
            stored = json.loads(data)
            fields = {name: stored[name] for name in _DESCRIPTION_FIELDS}
            dates, members = dict(stored["dates"]), dict(stored["members"])
            shapes = {name: (item["modality"], item["dtype"], item["shape"]) for name, item in members.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._findings.add(f"not the description of a sample: {printable(repr(error))}", member)
            return
        wrong = [name for name in _DESCRIPTION_FIELDS if fields[name] != row[name]]
        wrong += ["dates"] * (dates != _expected_dates(row, self._registry, present))
        wrong += ["members"] * (not self._members_match(shapes, row, present))
        if wrong:
            self._findings.add(f"{', '.join(wrong)} differ from the manifest", member)

    def _members_match(self, shapes: dict[str, tuple[Any, ...]], row: dict[str, Any], present: list[str]) -> bool:
        if set(shapes) != {member_name(row["key"], name) for name in present}:
            return False
        for name in present:
            modality = self._registry[name]
            stored_name, dtype, shape = shapes[member_name(row["key"], name)]
            days = row.get(f"dates.{name}")
            # Without dates in the manifest, take the number of dates from the stored shape.
            steps = len(days) if days is not None else shape[0] if isinstance(shape, list) and shape else 0
            if (stored_name, dtype, shape) != (name, modality.dtype, list(modality.shape(steps))):
                return False
        return True

    def _check_array(self, modality: Modality, offset: int, length: int, row: dict[str, Any], member: str) -> None:
        days = row.get(f"dates.{modality.name}") if modality.has_time_axis else None
        max_values = math.prod(modality.shape(MAX_SERIES_LENGTH if days is None else len(days)))
        if length > 2 * max_values * np.dtype(modality.dtype).itemsize + 4096:
            raise CodecError(f"{length} bytes for an array of at most {max_values} values")
        encoded = EncodedArray(self._tar.read(offset, length))
        steps = len(days) if days is not None else encoded.shape[0] if encoded.shape else 0
        expected = modality.shape(min(steps, MAX_SERIES_LENGTH))
        if (encoded.dtype, encoded.shape) != (np.dtype(modality.dtype), expected):
            shape = " x ".join(map(str, encoded.shape))
            raise CodecError(f"{encoded.dtype} of {shape}, but {modality.name} is {modality.dtype} of {expected}")
        array = encoded.decode()
        if modality.is_input:
            statistics = compute_stats(array, modality)
            previous = self._report.statistics.get(modality.name)
            self._report.statistics[modality.name] = statistics if previous is None else previous.merge(statistics)
            problems = _statistics_problems(statistics, modality.name, row)
        else:
            problems = _label_problems(array, modality, row)
        for problem in problems:
            self._findings.add(problem, member)


def _statistics_problems(statistics: RunningStats, name: str, row: dict[str, Any]) -> Iterator[str]:
    for statistic in ("minimum", "maximum", "mean"):
        stored, actual = row[f"{statistic}.{name}"], getattr(statistics, statistic)
        if stored is None or not statistics_match(np.array(stored, np.float64), actual):
            yield f"its {statistic} is {np.round(actual, 4).tolist()}, but the manifest says {stored}"


def _label_problems(array: np.ndarray, modality: Modality, row: dict[str, Any]) -> Iterator[str]:
    for band, values in zip(modality.bands, array):
        if band.scheme is None:
            continue
        largest = int(values.max(initial=0))
        if largest >= len(band.scheme):
            yield f"value {largest} in band {band.name}, but {band.scheme.name} has classes 0 to {len(band.scheme) - 1}"
        elif (
            np.bincount(values.reshape(-1), minlength=len(band.scheme)).tolist()
            != row[f"histogram.{modality.name}.{band.name}"]
        ):
            yield f"the histogram of {band.name} differs from the manifest"


def statistics_match(stored: np.ndarray, actual: np.ndarray) -> bool:
    """Whether statistics have the same shape and agree within a tolerance.

    Another processor may compute other last bits, and float32 has few bits for heights.
    """
    return stored.shape == actual.shape and np.allclose(stored, actual, rtol=1e-4, atol=1e-3, equal_nan=True)


def _next_header(offset: int, length: int) -> int:
    return offset + length + -length % BLOCK


def _expected_dates(row: dict[str, Any], registry: Registry, present: list[str]) -> dict[str, list[str]]:
    dates = {}
    for name in present:
        days = row.get(f"dates.{name}") if has_acquisition_dates(registry[name]) else None
        if days is not None:
            dates[name] = _iso(tuple(days))
    return dates


@lru_cache(maxsize=64)  # patches of a ROI share their dates
def _iso(days: tuple[int, ...]) -> list[str]:
    return np.array(days, "datetime64[D]").astype(str).tolist()
