"""Which patch goes into which shard: decided before anything is written, and recorded so that every run agrees."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.files import TEMPORARY_SUFFIX, flush
from bocage.shards.format.manifest import SCHEMA_VERSION
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.sample_seed import sample_seed
from bocage.shards.source.catalogue import Catalogue

WriteOrder = Literal["shuffled", "stratified", "roi"]
ORDERS: tuple[str, ...] = get_args(WriteOrder)

_PLAN_FILE = "plan.json"
_SMALLEST, _FEWEST = 16, 8  # samples in a shard, and shards, that a small dataset is cut into
_LIBRARIES = ("imagecodecs", "pcodec", "rasterio", "zstandard")  # another version of one may give other bytes


@dataclass(frozen=True)
class ShardPlan:
    """The shards to write.

    Attributes:
        settings: all that decides the bytes but the size of a shard and the libraries, JSON-serialisable.
        samples_per_shard: samples in a shard; with the order ``roi`` at most, otherwise the last one may hold fewer.
        rows: (patches,) int64, indices of the catalogue in the order of writing.
        bounds: (shards + 1,) int64; shard k holds ``rows[bounds[k]:bounds[k + 1]]``.
    """

    settings: dict[str, Any]
    samples_per_shard: int
    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def patches(self, shards: range) -> int:
        """Number of patches of neighbouring shards."""
        return int(self.bounds[shards.stop] - self.bounds[shards.start])


def settings_of(
    catalogue: Catalogue, order: WriteOrder, seed: int, shard_bytes: int, samples_per_shard: int | None
) -> dict[str, Any]:
    """What a plan is made from; two runs with the same settings write the same shards."""
    return {
        "format": SCHEMA_VERSION,
        "codecs": {modality.name: modality.codec for modality in catalogue.registry.values()},
        "catalogue": catalogue.fingerprint(),
        "order": order,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "samples_per_shard": samples_per_shard,
    }


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of a shard."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def differing_libraries(versions: dict[str, str]) -> str:
    """Where the libraries here are not of ``versions``, for messages; empty when they are."""
    here = libraries().items()
    return ", ".join(f"{name} {versions.get(name)} (here {own})" for name, own in here if versions.get(name) != own)


def order_rows(catalogue: Catalogue, order: WriteOrder, seed: int) -> np.ndarray:
    """Catalogue indices in the order of writing, (patches,) int64.

    ``shuffled`` goes by a hash of seed and key. ``stratified`` spreads each domain evenly: the first n patches, for any
    n, hold every domain in its share, to within one patch; within a domain the hash decides. ``roi`` is the catalogue's
    own order: domain by domain, and in it ROI by ROI.
    """
    if order == "roi":
        return np.arange(len(catalogue))
    # By a hash of the key: the same on every machine and with every version of every library.
    keys = catalogue.keys()
    hashes = np.array([sample_seed(seed, 0, key) for key in keys], np.int64)
    if order == "shuffled":
        return np.argsort(hashes, kind="stable")
    domains, _ = catalogue.places()
    within = np.lexsort((hashes, domains))
    _, starts, counts = np.unique(domains[within], return_index=True, return_counts=True)
    # The k-th (from 0) of a domain's n patches belongs (k + 1/2) / n of the way; equal places go by the hash.
    places = (np.arange(len(within)) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    return within[np.lexsort((hashes[within], places))]


def cut(catalogue: Catalogue, rows: np.ndarray, order: WriteOrder, samples_per_shard: int) -> np.ndarray:
    """Where shards begin and end in ``rows``, (patches,) int64 of ``order_rows``: (shards + 1,) int64.

    With the order ``roi`` a ROI is never split unless it is larger than a shard: it then begins with one.
    """
    if order != "roi":
        return np.append(np.arange(0, len(rows), samples_per_shard), len(rows))
    _, rois = catalogue.places()
    starts = np.append(np.flatnonzero(np.diff(rois[rows], prepend=-1)), len(rows))
    bounds = [0]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        if end - bounds[-1] <= samples_per_shard:
            continue  # still fits the shard that is being filled
        if start > bounds[-1]:
            bounds.append(start)
        while end - bounds[-1] > samples_per_shard:
            bounds.append(bounds[-1] + samples_per_shard)
    if bounds[-1] < len(rows):
        bounds.append(len(rows))
    return np.array(bounds)


def fitting_samples(patches: int, patch_bytes: float, shard_bytes: int) -> int:
    """Samples to put in a shard of about ``shard_bytes``; a small dataset gets several smaller shards all the same."""
    return min(max(1, int(shard_bytes / patch_bytes)), max(_SMALLEST, math.ceil(patches / _FEWEST)))


def plan_path(out: Path) -> Path:
    """The record of the plan in the folder of an unfinished run."""
    return out / PARTS_FOLDER / _PLAN_FILE


def check_folder(out: Path) -> None:
    """Check that ``out`` is new, empty, or a folder of shards that are being written.

    Raises:
        InputError: it is something else.
    """
    if plan_path(out).is_file() or not (out.exists() or out.is_symlink()):
        return
    strangers = not out.is_dir() or any(path.name != PARTS_FOLDER for path in out.iterdir())
    # Asked again: another slice may have recorded the plan, and begun to write, in between.
    if strangers and not plan_path(out).is_file():
        raise InputError(f"{out}: exists and holds no shards of bocage; give a new or empty folder")


def recorded_size(path: Path, settings: dict[str, Any]) -> tuple[int, str]:
    """What ``plan.json`` or ``dataset.json`` records: the samples in a shard, and which libraries were others.

    Raises:
        InputError: the file cannot be read or records other settings.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        plan = recorded["plan"]
        differing = [key for key, value in settings.items() if plan.get(key) != value]
        size = int(recorded["samples_per_shard"])
        others = differing_libraries(plan.get("libraries", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}; give another folder") from error
    out = path.parent.parent if path.name == _PLAN_FILE else path.parent
    if "format" in differing:
        raise InputError(
            f"{out}: was begun in format {plan.get('format', 1)} of shards, but this bocage writes "
            f"{settings['format']}; give another folder, or use the bocage that began it"
        )
    if differing:
        names = ", ".join(_differences(differing, settings["codecs"], plan.get("codecs") or {}))
        raise InputError(f"{out}: holds shards of another plan (other: {names}); give another folder")
    return size, others


def _differences(differing: list[str], codecs: dict[str, str], recorded: dict[str, str]) -> list[str]:
    """Settings that differ, in the user's words."""
    encoded = [name for name, codec in codecs.items() if recorded.get(name, codec) != codec]
    names = [name for name in differing if name not in ("catalogue", "codecs")]
    # The catalogue's fingerprint covers the codecs, too.
    if encoded:
        return [*names, f"the encoding of {', '.join(encoded)}"]
    return [*names, "the patches or modalities"] if "catalogue" in differing else names


def record(out: Path, settings: dict[str, Any], size_of: Callable[[], int]) -> int:
    """Makes the folder ready and records the plan there unless another run has; the samples in a shard.

    Of several runs that start at once, on any machine, one records it, and all others read that.

    Args:
        out: the folder of the shards.
        settings: of the plan.
        size_of: finds the samples in a shard; called only when there is no record.

    Raises:
        InputError: the folder belongs to something else or to another plan, or was begun with other libraries.
    """
    path = plan_path(out)
    check_folder(out)
    if not path.is_file():
        description = {"plan": {**settings, "libraries": libraries()}, "samples_per_shard": size_of()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(path, json.dumps(description, indent=1))
    size, others = recorded_size(path, settings)
    if others:
        raise InputError(
            f"{out}: was begun with {others}, which may encode to other bytes; use the same versions, or give another "
            "folder"
        )
    return size


def _create(path: Path, text: str) -> None:
    """Writes ``path``, whole, unless it exists."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        try:
            os.link(temporary, path)  # fails when there is one, on NFS too
        except FileExistsError:
            return
        except OSError:  # no hard links here; runs that start in the same instant have the same text to write
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)
