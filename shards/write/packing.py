"""One shard: patches in, a tar and its part of the manifest out.

Members of a sample are contiguous: inputs, masks, labels, then ``KEY.json`` with key, ROI, domain, CRS, corner, dates
and the list of members. A raster's member is ``KEY.MODALITY.bin`` (see ``codec``). Keys hold no dot, so any WebDataset
reader groups them; the webdataset library itself gives lower-case fields: ``aerial_rgbi.bin``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.format.codec import as_stored, encode
from bocage.shards.format.manifest import Shard, dated, schema
from bocage.shards.format.running_stats import RunningStats, compute_stats
from bocage.shards.format.shard_files import member_name, part_path, shard_path
from bocage.shards.format.tar import TarWriter
from bocage.shards.modality import Modality, Registry
from bocage.shards.source import rasters
from bocage.shards.source.catalogue import Patch
from bocage.shards.source.raster_source import RasterError, RasterSource
from bocage.shards.source.rasters import Raster

_METADATA_KEY = b"bocage"
_EPOCH = datetime.date(1970, 1, 1)


@dataclass(frozen=True)
class ShardTask:
    """The work of one shard.

    Attributes:
        index: of the shard.
        out: the folder of the shards.
        registry: what to pack.
        splits: names of the split columns.
        patches: what the shard holds, in order.
        tolerated: unreadable patches that may be skipped before the job gives up.
    """

    index: int
    out: Path
    registry: Registry
    splits: list[str]
    patches: list[Patch]
    tolerated: int

    @property
    def shard(self) -> Path:
        """The tar."""
        return shard_path(self.out, self.index)


@dataclass(frozen=True)
class ShardPart:
    """What one finished shard adds to the dataset.

    Attributes:
        shard: the tar.
        skipped: by key, why a patch was left out.
        source_bytes: size of the GeoTIFFs that were packed.
        moments: by input modality, statistics of the representation.
    """

    shard: Shard
    skipped: dict[str, str]
    source_bytes: int
    moments: dict[str, RunningStats]


@dataclass
class EncodedPatch:
    """One patch, encoded.

    Attributes:
        members: names and bytes, in the order of the tar.
        row: its row of the manifest but for ``shard`` and ``offset.M``.
        source_bytes: size of its GeoTIFFs.
        moments: by input modality.
    """

    members: dict[str, bytes]
    row: dict[str, Any]
    source_bytes: int
    moments: dict[str, RunningStats]


def encode_patch(patch: Patch, registry: Registry) -> EncodedPatch:
    """The members and the manifest row of one patch.

    Raises:
        RasterError: a file, which is named, is not usable, or does not agree with its dates or with the other files.
    """
    read: dict[str, Raster] = {}
    source_bytes = 0
    for modality in (*registry.inputs, *registry.by_role("mask"), *registry.labels):
        source = patch.sources.get(modality.name)
        if source is not None:
            read[modality.name] = rasters.read(source, modality)
            source_bytes += read[modality.name].stored_bytes
            _check_dates(source, modality, read[modality.name].array, patch.dates.get(modality.name))
    # The aerial image where there is one: it comes first. Other sensors are resampled onto its grid.
    first = next(name for name in registry if name in read)
    reference = read[first]
    for name, raster in read.items():
        _check_place(patch, registry[first], reference, registry[name], raster)
    ground = {"crs": reference.crs, "left": reference.left, "top": reference.top}
    row: dict[str, Any] = {"key": patch.key, "roi": patch.roi, "domain": patch.domain, **ground, **patch.splits}
    members, shapes = {}, {}
    moments = {}
    for name, raster in read.items():
        modality = registry[name]
        array = as_stored(raster.array, modality.codec)
        data = encode(array, modality.codec)
        member = member_name(patch.key, name)
        members[member] = data
        shapes[member] = {"modality": name, "dtype": str(array.dtype), "shape": array.shape}
        row[f"length.{name}"] = len(data)
        if dated(modality) and name in patch.dates:
            row[f"dates.{name}"] = patch.dates[name]
        if modality.role == "label":
            for band, values in zip(modality.bands, array):
                assert band.scheme is not None
                row[f"histogram.{name}.{band.name}"] = _histogram(values, len(band.scheme))
        if modality.is_input:
            moments[name] = compute_stats(array, modality)
            for what in ("minimum", "maximum", "mean"):
                row[f"{what}.{name}"] = getattr(moments[name], what)
    description = {
        **{key: row[key] for key in ("key", "roi", "domain")},
        **ground,
        "dates": {name: _iso(days) for name, days in patch.dates.items() if name in read},
        "members": shapes,
    }
    members[f"{patch.key}.json"] = json.dumps(description).encode()
    return EncodedPatch(members, row, source_bytes, moments)


def write_shard(job: ShardTask, tick: Callable[[int, int], None]) -> ShardPart:
    """Writes the tar of a job, then its part of the manifest; both appear whole or not at all.

    Args:
        job: what to write.
        tick: called after each patch with 1 and the bytes written for it; may raise to stop.

    Raises:
        InputError: more patches were unreadable than the job tolerates.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    moments: dict[str, RunningStats] = {}
    source_bytes = 0
    with written_atomically(job.shard, contested=True) as temporary:
        with temporary.open("wb") as file:
            archive = TarWriter(file)
            for patch in job.patches:
                before = archive.size
                try:
                    packed = encode_patch(patch, job.registry)
                except RasterError as error:
                    skipped[patch.key] = str(error)
                    if len(skipped) > job.tolerated:
                        raise too_many_skipped(skipped, job.tolerated) from error
                else:
                    offsets = {name: archive.add(name, data) for name, data in packed.members.items()}
                    rows.append(_complete(packed.row, patch.key, job, offsets))
                    source_bytes += packed.source_bytes
                    for name, found in packed.moments.items():
                        moments[name] = moments[name].merged(found) if name in moments else found
                tick(1, archive.size - before)
            digest = archive.finish()
        size = archive.size
    part = ShardPart(Shard(job.shard.name, len(rows), size, digest), skipped, source_bytes, moments)
    _write_part(part_path(job.out, job.index), rows, part, schema(job.registry, job.splits))
    return part


def read_part(path: Path) -> ShardPart:
    """What ``write_shard`` recorded beside the rows."""
    description = json.loads(pq.read_schema(path).metadata[_METADATA_KEY])
    moments = {name: RunningStats.from_json(item) for name, item in description["moments"].items()}
    return ShardPart(Shard(**description["shard"]), description["skipped"], description["source_bytes"], moments)


def too_many_skipped(skipped: dict[str, str], tolerated: int) -> InputError:
    """The error that ends a run; names the first few files."""
    reasons = "; ".join(list(skipped.values())[:3])
    return InputError(
        f"{len(skipped)} patches cannot be read where {tolerated} are tolerated: {reasons}; repair the files, or "
        "raise the tolerated share (--max-bad)"
    )


def _complete(row: dict[str, Any], key: str, job: ShardTask, offsets: dict[str, int]) -> dict[str, Any]:
    """The manifest row with shard and offsets; absent modalities have offset and length 0."""
    complete = {"shard": job.index, **row}
    for name in job.registry:
        complete[f"offset.{name}"] = offsets.get(member_name(key, name), 0)
        complete.setdefault(f"length.{name}", 0)
    return complete


def _write_part(path: Path, rows: list[dict[str, Any]], part: ShardPart, columns: pa.Schema) -> None:
    description = {**asdict(part), "moments": {name: item.to_json() for name, item in part.moments.items()}}
    table = pa.Table.from_pylist(rows, schema=columns.with_metadata({_METADATA_KEY: json.dumps(description)}))
    with written_atomically(path, contested=True) as temporary:
        pq.write_table(table, temporary)


def _histogram(values: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by class, (classes,) int64, of uint8 values that are all classes."""
    # Neighbours are mostly of one class: runs are counted in a quarter of the time that pixels take.
    flat = values.reshape(-1)
    last = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)
    return np.bincount(flat[last], np.diff(last, prepend=-1), minlength=classes).astype(np.int64)


def _check_dates(source: RasterSource, modality: Modality, array: np.ndarray, days: np.ndarray | None) -> None:
    if modality.has_dates and days is not None and len(days) != len(array):
        raise RasterError(f"{source}: {len(array)} dates in the file, {len(days)} in the metadata")


def _check_place(patch: Patch, first: Modality, reference: Raster, modality: Modality, raster: Raster) -> None:
    """Rasters of a patch share its corner, to a pixel of the coarser one."""
    tolerance = max(first.gsd, modality.gsd)
    if abs(raster.left - reference.left) > tolerance or abs(raster.top - reference.top) > tolerance:
        raise RasterError(
            f"{patch.sources[modality.name]}: upper-left corner at ({raster.left:.2f}, {raster.top:.2f}), but "
            f"{patch.sources[first.name]} has it at ({reference.left:.2f}, {reference.top:.2f})"
        )


def _iso(days: np.ndarray) -> list[str]:
    return [(_EPOCH + datetime.timedelta(days=int(day))).isoformat() for day in days]
