"""A catalogue to shards: plan, parallel packing, resume, manifest.

Every shard is one job, planned before anything is written, so bytes do not depend on the number of workers. A job
leaves its tar and then its part of the manifest (``parts/``), each under its final name only when whole. A run that is
broken off therefore leaves finished shards, and the same call goes on from there; ``dataset.json`` comes last.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
import torch

from bocage.shards.assembly import assemble
from bocage.shards.errors import InputError
from bocage.shards.files import TEMPORARY_SUFFIX, written_atomically
from bocage.shards.flairhub import Catalogue
from bocage.shards.manifest import DATASET_FILE, Manifest
from bocage.shards.packing import (
    PARTS_FOLDER,
    Job,
    Part,
    pack,
    part_path,
    read_part,
    shard_path,
    too_many_skipped,
    write_shard,
)
from bocage.shards.seeds import sample_seed
from bocage.shards.sources import RasterError

Order = Literal["shuffled", "roi"]
Progress = Callable[[int, int, int], None]
"""Called with patches done, patches in all, bytes of shards written by this run."""

_PLAN_FILE = "plan.json"
_PROBES = 8  # patches that are encoded to learn how many fit a shard
_SMALLEST, _FEWEST = 16, 8  # samples in a shard, and shards, that a small dataset is cut into
_GDAL = {"GDAL_CACHEMAX": 64, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": 1}
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def write_shards(
    catalogue: Catalogue,
    out: str | Path,
    *,
    shard_bytes: int = 512 << 20,
    samples_per_shard: int | None = None,
    order: Order = "shuffled",
    seed: int = 0,
    workers: int = 1,
    max_bad: float = 0.001,
    progress: Progress | None = None,
) -> Manifest:
    """Writes the patches of ``catalogue`` as WebDataset shards with a manifest into the folder ``out``.

    When ``out`` holds an unfinished run of the same plan, only its missing shards are written, and those that had to
    leave out patches; when it holds a finished one, nothing is.

    Args:
        catalogue: what to write.
        out: a new or empty folder, or one of an earlier run.
        shard_bytes: how large a shard may become, roughly. A small dataset gets several smaller ones all the same, so
            that processes can share the work and readers can shuffle.
        samples_per_shard: exact number instead.
        order: ``shuffled`` spreads the patches over the shards at random; ``roi`` keeps the catalogue's order, and
            with it each ROI together.
        seed: of ``shuffled``.
        workers: processes; 1 works in this one.
        max_bad: share of the patches that may be unreadable; these are left out and listed in ``dataset.json``. One is
            always tolerated unless this is 0.
        progress: see ``Progress``.

    Raises:
        InputError: ``out`` belongs to something else or to another plan, cannot be written to, or too many patches are
            unreadable.
    """
    out = Path(out)
    plan = {
        "catalogue": catalogue.fingerprint(),
        "order": order,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "samples_per_shard": samples_per_shard,
    }
    try:
        if (out / DATASET_FILE).is_file():
            _check_plan(out / DATASET_FILE, plan)
            _remove_parts(out)
            return Manifest.open(out)
        rows = _ordered(catalogue, order, seed)
        size = _prepared(out, plan, catalogue, rows)
        tolerated = max(1, int(max_bad * len(catalogue))) if max_bad > 0 else 0
        jobs = _Jobs(catalogue, out, rows, size, tolerated)
        _write_missing(jobs, workers, progress)
        assemble(
            out,
            [part_path(out, index) for index in range(len(jobs))],
            catalogue.registry,
            list(catalogue.splits),
            plan=plan,
            samples_per_shard=size,
        )
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            raise InputError(
                f"{out}: cannot be written: {error.strerror}; finished shards are kept, the same command resumes"
            ) from error
        raise
    _remove_parts(out)
    return Manifest.open(out)


class _Jobs:
    """The planned shards; patches of a job are looked up only when it is asked for."""

    def __init__(self, catalogue: Catalogue, out: Path, rows: np.ndarray, size: int, tolerated: int) -> None:
        self.catalogue, self.out, self.rows, self.size, self.tolerated = catalogue, out, rows, size, tolerated

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __getitem__(self, index: int) -> Job:
        rows = self._rows(index)
        patches = [self.catalogue.patch(int(row)) for row in rows]
        registry, splits = self.catalogue.registry, list(self.catalogue.splits)
        return Job(index, self.out, registry, splits, patches, self.tolerated)

    def _rows(self, index: int) -> np.ndarray:
        return self.rows[index * self.size : (index + 1) * self.size]

    def patches(self, index: int) -> int:
        """Number of patches of a job."""
        return len(self._rows(index))

    def finished(self, index: int) -> Part | None:
        """The part that an earlier run, or this one, has finished."""
        part, shard = part_path(self.out, index), shard_path(self.out, index)
        if not part.is_file() or not shard.is_file():
            return None
        found = read_part(part)
        return found if found.shard.bytes == shard.stat().st_size else None

    def discard(self, index: int) -> None:
        """Removes a shard, so that the next run writes it again."""
        part_path(self.out, index).unlink(missing_ok=True)
        shard_path(self.out, index).unlink(missing_ok=True)


def _ordered(catalogue: Catalogue, order: Order, seed: int) -> np.ndarray:
    """Catalogue indices in the order of writing."""
    if order == "roi":
        return np.arange(len(catalogue))
    # By a hash of the key: the same on every machine and with every version of every library.
    keys = catalogue.keys()
    return np.argsort(np.array([sample_seed(seed, 0, key) for key in keys]), kind="stable")


def _prepared(out: Path, plan: dict[str, Any], catalogue: Catalogue, rows: np.ndarray) -> int:
    """Makes the folder ready, or checks that it holds the same plan; the number of samples in a shard."""
    plan_path = out / PARTS_FOLDER / _PLAN_FILE
    if plan_path.is_file():
        size = _check_plan(plan_path, plan)
    else:
        if out.exists() and (not out.is_dir() or any(path.name != PARTS_FOLDER for path in out.iterdir())):
            raise InputError(f"{out}: exists and holds no shards of bocage; give a new or empty folder")
        size = plan["samples_per_shard"] or _samples_per_shard(catalogue, rows, plan["shard_bytes"])
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(plan_path) as temporary:
            temporary.write_text(json.dumps({"plan": plan, "samples_per_shard": size}), encoding="utf-8")
    for leftover in (*out.glob(f"*{TEMPORARY_SUFFIX}"), *(out / PARTS_FOLDER).glob(f"*{TEMPORARY_SUFFIX}")):
        leftover.unlink()
    return size


def _check_plan(path: Path, plan: dict[str, Any]) -> int:
    """The samples per shard that ``path`` records; raises ``InputError`` when it records another plan."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in plan.items() if recorded["plan"][key] != value]
        size = int(recorded["samples_per_shard"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}; give another folder") from error
    if differing:
        names = ", ".join("the patches or modalities" if key == "catalogue" else key for key in differing)
        raise InputError(f"{path.parent}: holds shards of another plan (other: {names}); give another folder")
    return size


def _samples_per_shard(catalogue: Catalogue, rows: np.ndarray, shard_bytes: int) -> int:
    """How many patches to put in a shard, from the encoded size of a few."""
    sizes = []
    failure: RasterError | None = None
    for row in rows[:: max(1, len(rows) // _PROBES)][:_PROBES]:
        try:
            members = pack(catalogue.patch(int(row)), catalogue.registry).members
            sizes.append(sum(len(data) + 1024 for data in members.values()))  # with tar header and padding
        except RasterError as error:
            failure = error
    if not sizes:
        assert failure is not None
        raise failure
    fitting = max(1, shard_bytes * len(sizes) // sum(sizes))
    return min(fitting, max(_SMALLEST, math.ceil(len(rows) / _FEWEST)))


def _write_missing(jobs: _Jobs, workers: int, progress: Progress | None) -> None:
    """Runs the jobs that are not finished."""
    missing: list[int] = []
    skipped: dict[str, str] = {}
    done = 0
    for index in range(len(jobs)):
        part = jobs.finished(index)
        # A shard that lacks patches is written again: they may have been repaired since.
        if part is None or part.skipped:
            jobs.discard(index)
            missing.append(index)
        else:
            done += jobs.patches(index)
    report = _Report(progress, done, len(jobs.rows))
    parts = _run_here(jobs, missing, report) if workers == 1 else _run_pool(jobs, missing, workers, report)
    for part in parts:
        skipped |= part.skipped
        if len(skipped) > jobs.tolerated:
            parts.close()
            raise too_many_skipped(skipped, jobs.tolerated)


class _Report:
    """Passes progress on, in patches of the whole dataset."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self._progress, self._done, self._total, self._bytes = progress, done, total, 0
        self.add(0, 0)

    def add(self, patches: int, written: int) -> None:
        """Some more patches are done."""
        self._done += patches
        self._bytes += written
        if self._progress is not None:
            self._progress(self._done, self._total, self._bytes)


def _run_here(jobs: _Jobs, missing: list[int], report: _Report) -> Generator[Part, None, None]:
    with rasterio.Env(**_GDAL):
        for index in missing:
            yield write_shard(jobs[index], report.add)


def _run_pool(jobs: _Jobs, missing: list[int], workers: int, report: _Report) -> Generator[Part, None, None]:
    """Parts as processes finish them, in any order."""
    # Spawned, not forked: GDAL and torch do not survive a fork with their threads.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 3)  # patches done, bytes written, whether to stop
    seen = [0, 0]
    waiting = iter(missing)
    running: set[Future[Part]] = set()
    pool = ProcessPoolExecutor(min(workers, max(1, len(missing))), context, _start_worker, (counters,))
    try:
        while True:
            while len(running) < 2 * workers and (index := next(waiting, None)) is not None:
                job = jobs[index]
                with _interrupts_held():
                    running.add(pool.submit(_work, job))
            if not running:
                return
            finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            now = counters[:2]
            report.add(now[0] - seen[0], now[1] - seen[1])
            seen = now
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise InputError(
            f"{jobs.out}: a worker process was killed, perhaps for want of memory; finished shards are kept, run the "
            "same command with fewer workers"
        ) from error
    finally:
        counters[2] = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches the whole process group, but the main process decides: workers start with the signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counters: Any = None


class _StopError(Exception):
    """The main process asked this worker to stop."""


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job) -> Part:
    with rasterio.Env(**_GDAL):
        return write_shard(job, _count)


def _count(patches: int, written: int) -> None:
    with _counters.get_lock():
        _counters[0] += patches
        _counters[1] += written
        if _counters[2]:
            raise _StopError


def _remove_parts(out: Path) -> None:
    """The manifest has taken over what the parts hold."""
    if (out / PARTS_FOLDER).is_dir():
        shutil.rmtree(out / PARTS_FOLDER)
