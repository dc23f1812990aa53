"""Encode patches and write one shard: a tar, and the manifest rows of its patches.

The members of a patch are contiguous in the tar: inputs, masks, labels, then ``KEY.json``. The JSON member holds the
key, ROI, domain, CRS, upper-left corner, side, dates and the list of members. A raster is stored as
``KEY.MODALITY.bin`` (see ``codec``). Keys contain no dot, so any WebDataset reader groups the members into samples; the
webdataset library turns field names to lower case: ``aerial_rgbi.bin``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.errors import InputError, counted
from bocage.shards.files import atomic_write
from bocage.shards.format.codec import as_stored, encode
from bocage.shards.format.manifest import Shard, has_acquisition_dates, manifest_schema
from bocage.shards.format.running_stats import RunningStats, compute_stats
from bocage.shards.format.shard_files import member_name, part_path, shard_path
from bocage.shards.format.tar import TarWriter
from bocage.shards.modality import Registry
from bocage.shards.pool import ProgressCallback
from bocage.shards.source.catalogue import Patch, PatchSource
from bocage.shards.source.patch_rasters import read_patch
from bocage.shards.source.raster import RasterError

_METADATA_KEY = b"bocage"
_EPOCH = datetime.date(1970, 1, 1)


@dataclass(frozen=True)
class ShardTask:
    """The work of writing one shard.

    Attributes:
        index: index of the shard.
        out: folder of the shards.
        registry: modalities to encode.
        splits: names of the split columns.
        patches: patches of the shard, in order.
        max_skipped: number of unreadable patches that may be skipped before the task fails.
    """

    index: int
    out: Path
    registry: Registry
    splits: list[str]
    patches: Sequence[Patch[PatchSource]]
    max_skipped: int

    @property
    def shard_path(self) -> Path:
        """Path of the tar."""
        return shard_path(self.out, self.index)


@dataclass(frozen=True)
class ManifestPart:
    """The contribution of one finished shard to the manifest, without its rows.

    Attributes:
        shard: name, size and hash of the tar.
        skipped: reason why a patch was skipped, by key.
        source_bytes: total size of the GeoTIFFs that were encoded.
        stats: statistics of the representation, by input modality.
    """

    shard: Shard
    skipped: dict[str, str]
    source_bytes: int
    stats: dict[str, RunningStats]


@dataclass
class EncodedPatch:
    """One encoded patch.

    Attributes:
        members: bytes of the tar members by name, in the order of the tar.
        row: row of the manifest without ``shard`` and ``offset.MODALITY``.
        source_bytes: total size of the GeoTIFFs.
        stats: statistics of the representation, by input modality.
    """

    members: dict[str, bytes]
    row: dict[str, Any]
    source_bytes: int
    stats: dict[str, RunningStats]


def encode_patch(patch: Patch[PatchSource], registry: Registry) -> EncodedPatch:
    """Read the rasters of one patch and encode them.

    Raises:
        RasterError: a file cannot be read, or disagrees with its dates or with the position of the other files. The
            message names the file.
    """
    modalities = (*registry.inputs, *registry.by_role("mask"), *registry.labels)
    loaded, reference = read_patch(patch, registry, modalities)
    source_bytes = sum(raster.stored_bytes for raster in loaded.values())
    ground = {"crs": reference.crs, "left": reference.left, "top": reference.top, "side": reference.side}
    row: dict[str, Any] = {"key": patch.key, "roi": patch.roi, "domain": patch.domain, **ground, **patch.splits}
    members, member_info = {}, {}
    stats = {}
    for name, raster in loaded.items():
        modality = registry[name]
        array = as_stored(raster.array, modality.codec)
        data = encode(array, modality.codec)
        member = member_name(patch.key, name)
        members[member] = data
        member_info[member] = {"modality": name, "dtype": str(array.dtype), "shape": array.shape}
        row[f"length.{name}"] = len(data)
        if has_acquisition_dates(modality) and name in patch.dates:
            row[f"dates.{name}"] = patch.dates[name]
        if modality.role == "label":
            for band, values in zip(modality.bands, array):
                assert band.scheme is not None
                row[f"histogram.{name}.{band.name}"] = _class_histogram(values, len(band.scheme))
        if modality.is_input:
            stats[name] = compute_stats(array, modality)
            for statistic in ("minimum", "maximum", "mean"):
                row[f"{statistic}.{name}"] = getattr(stats[name], statistic)
    # Most projections have metres: a side that says nothing new would only change the bytes of existing shards.
    stored_ground = {key: value for key, value in ground.items() if (key, value) != ("side", registry.patch_size)}
    description = {
        **{key: row[key] for key in ("key", "roi", "domain")},
        **stored_ground,
        "dates": {name: _to_iso(days) for name, days in patch.dates.items() if name in loaded},
        "members": member_info,
    }
    members[f"{patch.key}.json"] = json.dumps(description).encode()
    return EncodedPatch(members, row, source_bytes, stats)


def write_shard(task: ShardTask, on_progress: ProgressCallback) -> ManifestPart:
    """Write the tar of a task, then its manifest part. Each file appears under its final name only when complete.

    Args:
        task: shard to write.
        on_progress: callback after each patch, with 1 and the bytes written for it; it may raise to stop.

    Raises:
        InputError: more patches are unreadable than the task allows.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    stats: dict[str, RunningStats] = {}
    source_bytes = 0
    with atomic_write(task.shard_path, concurrent=True) as temporary:
        with temporary.open("wb") as file:
            archive = TarWriter(file)
            for patch in task.patches:
                size_before = archive.size
                try:
                    encoded = encode_patch(patch, task.registry)
                except RasterError as error:
                    skipped[patch.key] = str(error)
                    if len(skipped) > task.max_skipped:
                        raise too_many_skipped(skipped, task.max_skipped) from error
                else:
                    offsets = {name: archive.add(name, data) for name, data in encoded.members.items()}
                    rows.append(_manifest_row(encoded.row, patch.key, task, offsets))
                    source_bytes += encoded.source_bytes
                    for name, patch_stats in encoded.stats.items():
                        stats[name] = stats[name].merge(patch_stats) if name in stats else patch_stats
                on_progress(1, archive.size - size_before)
            digest = archive.finish()
        size = archive.size
    part = ManifestPart(Shard(task.shard_path.name, len(rows), size, digest), skipped, source_bytes, stats)
    _write_part(part_path(task.out, task.index), rows, part, manifest_schema(task.registry, task.splits))
    return part


def read_part(path: Path) -> ManifestPart:
    """Read the manifest part that ``write_shard`` stored in the schema metadata of the rows."""
    description = json.loads(pq.read_schema(path).metadata[_METADATA_KEY])
    stats = {name: RunningStats.from_json(values) for name, values in description["moments"].items()}
    return ManifestPart(Shard(**description["shard"]), description["skipped"], description["source_bytes"], stats)


def too_many_skipped(skipped: dict[str, str], max_skipped: int) -> InputError:
    """The error that stops a run with too many unreadable patches; it names the first three files."""
    reasons = "; ".join(list(skipped.values())[:3])
    return InputError(
        f"{counted(len(skipped), 'unreadable patch')}, but --max-bad allows {max_skipped}: {reasons}; repair the "
        "files, or raise --max-bad"
    )


def _manifest_row(row: dict[str, Any], key: str, task: ShardTask, offsets: dict[str, int]) -> dict[str, Any]:
    """Add shard index and offsets to a row. Absent modalities have offset 0 and length 0."""
    complete = {"shard": task.index, **row}
    for name in task.registry:
        complete[f"offset.{name}"] = offsets.get(member_name(key, name), 0)
        complete.setdefault(f"length.{name}", 0)
    return complete


def _write_part(path: Path, rows: list[dict[str, Any]], part: ManifestPart, columns: pa.Schema) -> None:
    description = {
        "shard": asdict(part.shard),
        "skipped": part.skipped,
        "source_bytes": part.source_bytes,
        "moments": {name: stats.to_json() for name, stats in part.stats.items()},
    }
    table = pa.Table.from_pylist(rows, schema=columns.with_metadata({_METADATA_KEY: json.dumps(description)}))
    with atomic_write(path, concurrent=True) as temporary:
        pq.write_table(table, temporary)


def _class_histogram(values: np.ndarray, classes: int) -> np.ndarray:
    """Pixel count of each class, (classes,) int64. ``values`` are uint8 class indices below ``classes``."""
    # Neighbouring pixels mostly share a class: counting runs of equal values takes a quarter of the time of pixels.
    flat = values.reshape(-1)
    run_ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)
    return np.bincount(flat[run_ends], np.diff(run_ends, prepend=-1), minlength=classes).astype(np.int64)


def _to_iso(days: np.ndarray) -> list[str]:
    return [(_EPOCH + datetime.timedelta(days=int(day))).isoformat() for day in days]
