"""One shard against its rows of the manifest: hash, tar, JSON, and arrays of some or all samples."""

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

from bocage.shards.format.codec import CodecError, EncodedArray
from bocage.shards.format.index import LONGEST_SERIES
from bocage.shards.format.manifest import Shard, dated
from bocage.shards.format.running_stats import RunningStats, compute_stats
from bocage.shards.format.shard_files import member_name
from bocage.shards.format.tar import BLOCK, TarError, TarReader, printable
from bocage.shards.modality import Modality, Registry
from bocage.shards.pool import Tick

_KEPT = 20  # problems of one file that are listed; the rest is counted
_CHUNK = 4 << 20
_LONGEST_JSON = 8 << 20  # four series of the most dates take 2 MB
_TEXTS = ("key", "roi", "domain", "crs", "left", "top")


@dataclass(frozen=True)
class Problem:
    """What is broken: a file of the folder, where it can be told a member or sample of it, and how."""

    file: str
    member: str
    what: str


@dataclass
class Findings:
    """Problems of one file: the first few, and how many more."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    more: int = 0

    def add(self, what: str, member: str = "") -> None:
        """One more."""
        if len(self.problems) < _KEPT:
            self.problems.append(Problem(self.file, printable(member), what))
        else:
            self.more += 1


@dataclass(frozen=True)
class ShardCheck:
    """What to check.

    Attributes:
        path: the tar.
        shard: its entry in the dataset's description.
        registry: what it holds.
        rows: its rows of the manifest's table; None when they are not to be had, and only the hash is checked.
        decode: samples to decode, spread evenly; None for all. Those of a shard with a wrong hash are all decoded.
    """

    path: Path
    shard: Shard
    registry: Registry
    rows: pa.Table | None
    decode: int | None


@dataclass
class ShardReport:
    """What was found.

    Attributes:
        findings: broken members.
        decoded: samples whose arrays were checked.
        moments: by input modality, statistics of the decoded samples, in the order of the tar.
    """

    findings: Findings
    decoded: int = 0
    moments: dict[str, RunningStats] = field(default_factory=dict)


def check_shard(job: ShardCheck, tick: Tick) -> ShardReport:
    """Checks one shard; whatever is wrong with it is in the report, not raised.

    Args:
        job: the shard.
        tick: called with 0 and bytes that were checked; they sum up to the size of the shard in its description.
    """
    report = ShardReport(Findings(job.shard.name))
    left = job.shard.bytes

    def checked(size: int) -> None:
        nonlocal left
        size = min(size, left)
        left -= size
        tick(0, size)

    _check(job, report, checked)
    tick(0, left)
    return report


def _check(job: ShardCheck, report: ShardReport, checked: Callable[[int], None]) -> None:
    try:
        # Without waiting: opening a pipe would wait for a writer.
        descriptor = os.open(job.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        report.findings.add("missing")
        return
    except OSError as error:
        report.findings.add(f"cannot be opened: {error.strerror}")
        return
    try:
        _check_open(job, descriptor, report, checked)
    except OSError as error:
        report.findings.add(f"cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)


def _check_open(job: ShardCheck, descriptor: int, report: ShardReport, checked: Callable[[int], None]) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        report.findings.add("not a regular file")
        return
    if found.st_size != job.shard.bytes:
        report.findings.add(f"{found.st_size} bytes where the dataset's description says {job.shard.bytes}")
    elif _digest(descriptor, checked) != job.shard.sha256:
        report.findings.add("damaged: its SHA-256 is not the one in the dataset's description")
    if job.rows is not None:
        count = len(job.rows)
        # Damaged: the checksum of every member tells where.
        some = None if report.findings.problems else job.decode
        chosen = range(count) if some is None else np.unique(np.linspace(0, count - 1, min(some, count), dtype=int))
        _Walk(TarReader(descriptor, found.st_size), job.registry, job.rows, report, checked).run(set(map(int, chosen)))


def _digest(descriptor: int, checked: Callable[[int], None]) -> str:
    digest, place = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, place):
        digest.update(chunk)
        place += len(chunk)
        checked(0)  # hashing is the smaller part of the work
    return digest.hexdigest()


class _Walk:
    """From the first header of a tar to its end, with the rows of the manifest beside it."""

    def __init__(
        self,
        tar: TarReader,
        registry: Registry,
        rows: pa.Table,
        report: ShardReport,
        checked: Callable[[int], None],
    ) -> None:
        self._tar, self._registry, self._rows, self._checked = tar, registry, rows, checked
        self._report, self._findings = report, report.findings
        self._place: int | None = 0  # where the next header must be; None after one that says nothing to rely on
        texts = [*_TEXTS, *(f"dates.{item.name}" for item in registry.values() if dated(item))]
        self._texts = rows.select(texts)
        self._offset = {name: rows[f"offset.{name}"].to_numpy() for name in registry}
        self._length = {name: rows[f"length.{name}"].to_numpy() for name in registry}

    def run(self, decoded: set[int]) -> None:
        for row in range(len(self._rows)):
            texts = self._texts.slice(row, 1).to_pylist()[0]
            key = texts["key"]
            members = sorted(
                (int(self._offset[name][row]), int(self._length[name][row]), name)
                for name in self._registry
                if self._length[name][row] != 0
            )
            full = self._rows.slice(row, 1).to_pylist()[0] if row in decoded else None
            for offset, length, name in members:
                member = member_name(key, name)
                if offset > self._tar.size - length:
                    self._cut_off(member, len(self._rows) - row - 1)
                    return
                self._check_place(offset, member)
                self._place = _next_header(offset, length)
                try:
                    self._tar.check_member(offset - BLOCK, member, length)
                    if full is not None:
                        self._check_array(self._registry[name], offset, length, full, member)
                except (TarError, CodecError) as error:
                    self._findings.add(str(error), member)
            self._report.decoded += row in decoded
            try:
                self._check_json(texts, [name for _, _, name in members])
            except TarError as error:
                self._findings.add(str(error), f"{key}.json")
                self._place = None
            self._checked(sum(length + BLOCK for _, length, _ in members))
        if self._place is not None:
            try:
                self._tar.check_end(self._place, lambda: self._checked(0))
            except TarError as error:
                self._findings.add(str(error))

    def _cut_off(self, member: str, after: int) -> None:
        more = f", and with it the {after} samples after it" if after else ""
        self._findings.add(f"cut off: the shard ends at byte {self._tar.size}, before its end{more}", member)

    def _check_place(self, offset: int, member: str) -> None:
        """The header must stand where the member before it ends: nothing between them, nothing in common."""
        place = self._place
        if place is None or place == offset - BLOCK:
            return
        if place > offset - BLOCK:
            self._findings.add(f"recorded at byte {offset}, inside what stands before it", member)
            return
        try:
            header = self._tar.header(place)
            what = "an empty block" if header is None else header.described()
        except TarError as error:
            what = str(error)
        self._findings.add(f"{what} before it, at byte {place}: not in the manifest", member)

    def _check_json(self, row: dict[str, Any], present: list[str]) -> None:
        """The description that closes a sample, against its row."""
        member = f"{row['key']}.json"
        if self._place is None:
            return
        size = self._tar.check_member(self._place, member, None)
        if size > _LONGEST_JSON:
            raise TarError(f"{size} bytes, more than a description can have")
        data = self._tar.data(self._place + BLOCK, size)
        self._place = _next_header(self._place + BLOCK, size)
        try:
            found = json.loads(data)
            stated = {name: found[name] for name in _TEXTS}
            dates, members = dict(found["dates"]), dict(found["members"])
            shapes = {name: (item["modality"], item["dtype"], item["shape"]) for name, item in members.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._findings.add(f"not the description of a sample: {printable(repr(error))}", member)
            return
        wrong = [name for name in _TEXTS if stated[name] != row[name]]
        wrong += ["dates"] * (dates != _expected_dates(row, self._registry, present))
        wrong += ["members"] * (not self._same_members(shapes, row, present))
        if wrong:
            self._findings.add(f"{', '.join(wrong)} differ from the manifest", member)

    def _same_members(self, shapes: dict[str, tuple[Any, ...]], row: dict[str, Any], present: list[str]) -> bool:
        if set(shapes) != {member_name(row["key"], name) for name in present}:
            return False
        for name in present:
            modality = self._registry[name]
            stated, dtype, shape = shapes[member_name(row["key"], name)]
            days = row.get(f"dates.{name}")
            # Without dates in the manifest, the number of steps is the array's own.
            steps = len(days) if days is not None else shape[0] if isinstance(shape, list) and shape else 0
            if (stated, dtype, shape) != (name, modality.dtype, list(modality.shape(steps))):
                return False
        return True

    def _check_array(self, modality: Modality, offset: int, length: int, row: dict[str, Any], member: str) -> None:
        days = row.get(f"dates.{modality.name}") if modality.has_dates else None
        most = math.prod(modality.shape(LONGEST_SERIES if days is None else len(days)))
        if length > 2 * most * np.dtype(modality.dtype).itemsize + 4096:
            raise CodecError(f"{length} bytes for an array of at most {most} values")
        found = EncodedArray(self._tar.data(offset, length))
        steps = len(days) if days is not None else found.shape[0] if found.shape else 0
        expected = modality.shape(min(steps, LONGEST_SERIES))
        if (found.dtype, found.shape) != (np.dtype(modality.dtype), expected):
            shape = " x ".join(map(str, found.shape))
            raise CodecError(f"{found.dtype} of {shape} where {modality.name} is {modality.dtype} of {expected}")
        array = found.array()
        if modality.is_input:
            moments = compute_stats(array, modality)
            before = self._report.moments.get(modality.name)
            self._report.moments[modality.name] = moments if before is None else before.merged(moments)
            problems = _statistics_problems(moments, modality.name, row)
        else:
            problems = _label_problems(array, modality, row)
        for problem in problems:
            self._findings.add(problem, member)


def _statistics_problems(moments: RunningStats, name: str, row: dict[str, Any]) -> Iterator[str]:
    for what in ("minimum", "maximum", "mean"):
        stored, found = row[f"{what}.{name}"], getattr(moments, what)
        if stored is None or not close(np.array(stored, np.float64), found):
            yield f"its {what} is {np.round(found, 4).tolist()}, the manifest says {stored}"


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


def close(stored: np.ndarray, found: np.ndarray) -> bool:
    """Whether statistics have the same shape and agree.

    Another processor may differ in the last bits, and float32 has few for heights.
    """
    return stored.shape == found.shape and np.allclose(stored, found, rtol=1e-4, atol=1e-3, equal_nan=True)


def _next_header(offset: int, length: int) -> int:
    return offset + length + -length % BLOCK


def _expected_dates(row: dict[str, Any], registry: Registry, present: list[str]) -> dict[str, list[str]]:
    dates = {}
    for name in present:
        days = row.get(f"dates.{name}") if dated(registry[name]) else None
        if days is not None:
            dates[name] = _iso(tuple(days))
    return dates


@lru_cache(maxsize=64)  # patches of a ROI share their dates
def _iso(days: tuple[int, ...]) -> list[str]:
    return np.array(days, "datetime64[D]").astype(str).tolist()
