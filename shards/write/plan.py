"""Plan which patch goes into which shard, and record the plan so that every run writes the same shards."""

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
from bocage.shards.files import TEMPORARY_SUFFIX, fsync
from bocage.shards.format.manifest import SCHEMA_VERSION
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.sample_seed import sample_seed
from bocage.shards.source.catalogue import Catalogue

WriteOrder = Literal["shuffled", "stratified", "roi"]
ORDERS: tuple[str, ...] = get_args(WriteOrder)

_PLAN_FILE = "plan.json"
# A small dataset gets at least _MIN_SHARDS shards, unless they would hold fewer than _MIN_SAMPLES samples.
_MIN_SAMPLES, _MIN_SHARDS = 16, 8
_LIBRARIES = ("imagecodecs", "pcodec", "rasterio", "zstandard")  # their versions may change the bytes of a shard


@dataclass(frozen=True)
class ShardPlan:
    """The assignment of patches to shards.

    Attributes:
        settings: JSON-serialisable settings that decide the bytes, without the shard size and the library versions.
        samples_per_shard: samples in a shard. With the order ``roi`` it is the maximum; otherwise only the last shard
            may hold fewer.
        rows: catalogue indices in the order of writing, (patches,) int64.
        bounds: shard k holds ``rows[bounds[k]:bounds[k + 1]]``, (shards + 1,) int64.
    """

    settings: dict[str, Any]
    samples_per_shard: int
    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def count_patches(self, shards: range) -> int:
        """Number of patches in a range of shards."""
        return int(self.bounds[shards.stop] - self.bounds[shards.start])


def plan_settings(
    catalogue: Catalogue, order: WriteOrder, seed: int, shard_bytes: int, samples_per_shard: int | None
) -> dict[str, Any]:
    """Collect the settings of a plan. Two runs with the same settings write the same shards."""
    return {
        "format": SCHEMA_VERSION,
        "codecs": {modality.name: modality.codec for modality in catalogue.registry.values()},
        "catalogue": catalogue.fingerprint(),
        "order": order,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "samples_per_shard": samples_per_shard,
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that encode the bytes of a shard."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def describe_library_differences(versions: dict[str, str]) -> str:
    """Describe which installed libraries differ from ``versions``; empty when all versions agree."""
    return ", ".join(
        f"{name} {versions.get(name)} (here {installed})"
        for name, installed in library_versions().items()
        if versions.get(name) != installed
    )


def order_rows(catalogue: Catalogue, order: WriteOrder, seed: int) -> np.ndarray:
    """Catalogue indices in the order of writing, (patches,) int64.

    ``shuffled`` sorts by a hash of seed and key. ``stratified`` spreads each domain evenly: the first n patches, for
    any n, hold each domain in proportion to its size, to within one patch; inside a domain the hash decides. ``roi``
    keeps the order of the catalogue: domain by domain, and ROI by ROI inside a domain.
    """
    if order == "roi":
        return np.arange(len(catalogue))
    # A hash of the key gives the same order on every machine and with every library version.
    keys = catalogue.keys()
    hashes = np.array([sample_seed(seed, 0, key) for key in keys], np.int64)
    if order == "shuffled":
        return np.argsort(hashes, kind="stable")
    domains, _ = catalogue.domain_and_roi_ids()
    by_domain = np.lexsort((hashes, domains))
    _, starts, counts = np.unique(domains[by_domain], return_index=True, return_counts=True)
    # Patch k (from 0) of the n patches of a domain goes to position (k + 1/2) / n; the hash breaks ties.
    positions = (np.arange(len(by_domain)) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    return by_domain[np.lexsort((hashes[by_domain], positions))]


def shard_bounds(catalogue: Catalogue, rows: np.ndarray, order: WriteOrder, samples_per_shard: int) -> np.ndarray:
    """Positions in ``rows`` where shards begin and end, (shards + 1,) int64.

    With the order ``roi`` a ROI is split only if it is larger than a shard; it then starts a new shard.

    Args:
        catalogue: source of the patches.
        rows: result of ``order_rows``, (patches,) int64.
        order: order of the patches.
        samples_per_shard: maximal number of samples in a shard.
    """
    if order != "roi":
        return np.append(np.arange(0, len(rows), samples_per_shard), len(rows))
    _, rois = catalogue.domain_and_roi_ids()
    starts = np.append(np.flatnonzero(np.diff(rois[rows], prepend=-1)), len(rows))
    bounds = [0]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        if end - bounds[-1] <= samples_per_shard:
            continue  # the ROI still fits the current shard
        if start > bounds[-1]:
            bounds.append(start)
        while end - bounds[-1] > samples_per_shard:
            bounds.append(bounds[-1] + samples_per_shard)
    if bounds[-1] < len(rows):
        bounds.append(len(rows))
    return np.array(bounds)


def choose_samples_per_shard(patches: int, patch_bytes: float, shard_bytes: int) -> int:
    """Choose how many samples make a shard of about ``shard_bytes``. A small dataset gets several smaller shards."""
    return min(max(1, int(shard_bytes / patch_bytes)), max(_MIN_SAMPLES, math.ceil(patches / _MIN_SHARDS)))


def plan_path(out: Path) -> Path:
    """Path of the recorded plan in the folder of an unfinished run."""
    return out / PARTS_FOLDER / _PLAN_FILE


def check_output_folder(out: Path) -> None:
    """Check that ``out`` is new, empty, or the folder of an unfinished run.

    Raises:
        InputError: ``out`` is anything else.
    """
    if plan_path(out).is_file() or not (out.exists() or out.is_symlink()):
        return
    foreign = not out.is_dir() or any(path.name != PARTS_FOLDER for path in out.iterdir())
    # Check again: another slice may have recorded the plan and started to write since the first check.
    if foreign and not plan_path(out).is_file():
        raise InputError(f"{out}: exists but holds no bocage shards; give a new or empty folder")


def read_recorded_plan(path: Path, settings: dict[str, Any]) -> tuple[int, str]:
    """Read the plan in ``plan.json`` or ``dataset.json`` and compare it with ``settings``.

    Returns:
        samples_per_shard: the recorded number.
        library_differences: libraries whose recorded version is not the installed one, for messages; or empty.

    Raises:
        InputError: the file cannot be read or records other settings.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        plan = recorded["plan"]
        differing = [key for key, value in settings.items() if plan.get(key) != value]
        samples_per_shard = int(recorded["samples_per_shard"])
        library_differences = describe_library_differences(plan.get("libraries", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}; give another folder") from error
    out = path.parent.parent if path.name == _PLAN_FILE else path.parent
    if "format" in differing:
        raise InputError(
            f"{out}: was started in shard format {plan.get('format', 1)}, but this bocage writes format "
            f"{settings['format']}; give another folder, or use the bocage version that started it"
        )
    if differing:
        names = ", ".join(_name_differences(differing, settings["codecs"], plan.get("codecs") or {}))
        raise InputError(
            f"{out}: holds shards of another plan (different: {names}); use the same options, or give another folder"
        )
    return samples_per_shard, library_differences


def _name_differences(differing: list[str], codecs: dict[str, str], recorded: dict[str, str]) -> list[str]:
    """Name the settings that differ, for a message."""
    encoded = [name for name, codec in codecs.items() if recorded.get(name, codec) != codec]
    names = [name for name in differing if name not in ("catalogue", "codecs")]
    # Other codecs also change the fingerprint of the catalogue.
    if encoded:
        return [*names, f"the encoding of {', '.join(encoded)}"]
    return [*names, "the patches or modalities"] if "catalogue" in differing else names


def record_plan(out: Path, settings: dict[str, Any], choose_samples: Callable[[], int]) -> int:
    """Create the folder and record the plan in it, unless another run already has.

    Of several runs that start at once, on any machine, one records the plan and the others read it.

    Args:
        out: folder of the shards.
        settings: settings of the plan.
        choose_samples: function that chooses the samples per shard, called only when no plan is recorded.

    Returns:
        samples_per_shard: the recorded number.

    Raises:
        InputError: the folder holds something else or another plan, or was started with other library versions.
    """
    path = plan_path(out)
    check_output_folder(out)
    if not path.is_file():
        description = {"plan": {**settings, "libraries": library_versions()}, "samples_per_shard": choose_samples()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _create_exclusively(path, json.dumps(description, indent=1))
    samples_per_shard, library_differences = read_recorded_plan(path, settings)
    if library_differences:
        raise InputError(
            f"{out}: was started with {library_differences}, which may encode to other bytes; use the same versions, "
            "or give another folder"
        )
    return samples_per_shard


def _create_exclusively(path: Path, text: str) -> None:
    """Write ``path`` atomically, unless it exists."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        try:
            os.link(temporary, path)  # fails if the path exists, on NFS too
        except FileExistsError:
            return
        except OSError:  # no hard links on this file system; runs that start at the same time write the same text
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)
