"""Tiled inference: map areas of any size by blending overlapping windows, tile by tile, in constant memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import rasterio
import torch
from rasterio._err import CPLE_BaseError  # base class of GDAL errors that rasterio.errors does not export
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from bocage.finetune.mapping.cog import NODATA, write_cog
from bocage.finetune.mapping.map_grid import MapGrid
from bocage.finetune.mapping.map_rasters import MapRaster, valid_pixels, window_batch
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.source.raster import WHOLE_PNG
from bocage.ssl.engine.parallel.distributed import rank_and_world, run_lock, run_on_all_ranks

Kind = Literal["classes", "probabilities"]
T = TypeVar("T")
PROBABILITY_LEVELS = NODATA - 1
"""Largest value of a written probability: probabilities are stored as integers from 0 to this."""

_LAYOUT_VERSION = 2  # version of the window layout; tiles of different versions do not fit together
_GDAL_CACHE = 64  # MB


def write_map(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    grid: MapGrid,
    out: Path,
    *,
    kind: Kind = "classes",
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write a map of each label, ``OUT/LABEL.tif`` or ``OUT/LABEL_probabilities.tif``, as cloud-optimised GeoTIFFs.

    Probabilities of overlapping windows are averaged with weights that decrease towards the window borders, so that
    neither windows nor tiles leave seams. Finished tiles are kept in ``OUT/tiles`` until the map is complete. After an
    interruption the same call resumes, on any number of ranks, and produces the same bytes. Pixels where no raster has
    data are nodata. All ranks must call this function.

    Args:
        task: model; it is moved to ``device`` and set to evaluation mode.
        rasters: input rasters by modality, see ``open_rasters``.
        grid: grid of the map, see ``plan_grid``.
        out: output folder, created if missing.
        kind: content of the map: ``classes`` for the most likely class, ``probabilities`` for one band per class with
            its probability times ``PROBABILITY_LEVELS``.
        batch_size: number of windows per batch.
        device: device of the model.
        progress: callback that receives the finished and the total number of tiles of this rank.

    Returns:
        Path of the map of each label.

    Raises:
        InputError: ``out`` has a map of other inputs or settings, another process is writing to it, or writing fails.
    """
    stems = {name: name if kind == "classes" else f"{name}_probabilities" for name in task.targets}
    paths = {name: out / f"{stem}.tif" for name, stem in stems.items()}
    folder, description_file = out / "tiles" / kind, out / f"{kind}.json"
    description = _describe_map(task, rasters, grid, batch_size)
    rank, world = rank_and_world()
    task = task.to(device).eval()

    def tile_files(tile: tuple[int, int]) -> dict[str, Path]:
        return {name: folder / name / f"{tile[0]}_{tile[1]}.tif" for name in task.targets}

    def list_missing_tiles() -> list[tuple[int, int]] | None:
        """Rank 0 creates the folders and returns the missing tiles, or None if the map is complete."""
        if rank:
            return None
        if _is_finished(description_file, description) and all(path.exists() for path in paths.values()):
            return None
        for name in task.targets:
            (folder / name).mkdir(parents=True, exist_ok=True)
        return [tile for tile in grid.tiles() if not all(path.exists() for path in tile_files(tile).values())]

    def write_tiles() -> None:
        tiles = (missing or [])[rank::world]
        for done, tile in enumerate(tiles, start=1):
            predicted = _predict_tile(task, rasters, grid, tile, kind, batch_size, torch.device(device))
            for name, values in predicted.items():
                _write_tile(tile_files(tile)[name], values, grid, tile)
            if progress is not None:
                progress(done, len(tiles))

    def merge_tiles() -> None:
        if rank:
            return
        if missing is not None:
            for name, target in task.targets.items():
                write_cog(paths[name], folder / name, grid, target.scheme, kind)
            _write_description(description_file, description, finished=True)
        shutil.rmtree(folder, ignore_errors=True)  # also removes what an interrupted removal left

    run_on_all_ranks(_with_input_errors(lambda: out.mkdir(parents=True, exist_ok=True), out))
    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE, **WHOLE_PNG), run_lock(out):
        missing = run_on_all_ranks(_with_input_errors(list_missing_tiles, out))[0]
        run_on_all_ranks(_with_input_errors(write_tiles, out))
        run_on_all_ranks(_with_input_errors(merge_tiles, out))
    return paths


def _with_input_errors(action: Callable[[], T], out: Path) -> Callable[[], T]:
    """Wrap ``action`` so that errors of the disk or GDAL become ``InputError``, which reaches the other ranks."""

    def wrapped() -> T:
        try:
            return action()
        except (OSError, RasterioError, CPLE_BaseError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise InputError(f"{out} cannot be written: {reason}") from error

    return wrapped


def _predict_tile(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    grid: MapGrid,
    tile: tuple[int, int],
    kind: Kind,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Predict the pixels of a tile, (bands, H, W) uint8 by label.

    Weighted sums are kept for one row of windows at a time: pixels above the start of the next row are final.
    """
    top, left = tile[0] * grid.tile_size, tile[1] * grid.tile_size
    height, width = min(grid.tile_size, grid.height - top), min(grid.tile_size, grid.width - left)
    columns = grid.window_range(left, left + width, grid.width)
    weights = torch.from_numpy(_blending_weights(grid.window_size, grid.stride))
    sums = {
        name: torch.zeros(len(target.scheme) + 1, grid.window_size, width)  # the last channel sums the weights
        for name, target in task.targets.items()
    }
    has_data = np.zeros((grid.window_size, width), bool)
    bands = {name: len(target.scheme) if kind == "probabilities" else 1 for name, target in task.targets.items()}
    outputs = {name: np.full((count, height, width), NODATA, np.uint8) for name, count in bands.items()}
    window_rows = grid.window_range(top, top + height, grid.height)
    for row in window_rows:
        for column, logits, valid in _predict_windows(task, rasters, grid, row, columns, batch_size, device):
            start = grid.window_start(column, grid.width) - left
            in_tile = slice(max(0, start), min(width, start + grid.window_size))
            in_window = slice(in_tile.start - start, in_tile.stop - start)
            has_data[:, in_tile] |= valid[:, in_window]
            for name, scores in logits.items():
                weighted = torch.cat([scores.softmax(dim=0) * weights, weights[None]])
                sums[name][:, :, in_tile] += weighted[:, :, in_window]
        # The first ``step`` rows of pixels are final: the next row of windows starts below them.
        start = grid.window_start(row, grid.height) - top
        is_last = row + 1 not in window_rows
        step = grid.window_size if is_last else grid.window_start(row + 1, grid.height) - top - start
        finished = grid.window_size if start + grid.window_size >= height else step
        in_tile = slice(max(0, start), min(height, start + finished))
        in_window = slice(in_tile.start - start, in_tile.stop - start)
        if in_tile.stop > in_tile.start:
            for name, total in sums.items():
                values = _quantize(total[:, in_window], kind)
                outputs[name][:, in_tile] = np.where(has_data[in_window], values, NODATA)
        # Move the remaining rows to the top, where the next row of windows adds to them.
        rest = grid.window_size - step
        has_data[:rest], has_data[rest:] = has_data[step:].copy(), False
        for total in sums.values():
            total[:, :rest] = total[:, step:].clone()
            total[:, rest:] = 0.0
    return outputs


def _predict_windows(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    grid: MapGrid,
    row: int,
    columns: range,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, torch.Tensor], np.ndarray]]:
    """Predict the windows of a row that have data.

    Yields:
        Column of the window, logits (classes, window_size, window_size) by label, and the mask (window_size,
        window_size) of pixels with data.
    """
    inputs = [name for name in rasters if name in task.modalities]
    for first in range(columns.start, columns.stop, batch_size):
        chosen = range(first, min(first + batch_size, columns.stop))
        top = grid.window_start(row, grid.height)
        corners = [grid.corner(top, grid.window_start(column, grid.width)) for column in chosen]
        batch, has_data = window_batch(rasters, corners, task.patch_size)
        rows = np.flatnonzero(has_data)
        if not len(rows):
            continue
        batch = batch.subset(rows.tolist())
        for name in inputs:
            rasters[name].warn_about_units(batch.values[name].numpy(), task.model.encoder(name).spec)
        valid = valid_pixels(batch, inputs, grid.window_size)
        with torch.no_grad():
            logits = {name: values.float().cpu() for name, values in task.logits(batch.to(device)).items()}
        for position, index in enumerate(rows):
            yield chosen[index], {name: values[position] for name, values in logits.items()}, valid[position]


def _blending_weights(size: int, stride: int) -> np.ndarray:
    """Return (size, size) float32 weights: 1 inside, decreasing linearly to the border over the overlap."""
    overlap = size - stride
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    along = np.minimum(1.0, distance / overlap) if overlap else np.ones(size)
    return np.outer(along, along).astype(np.float32)


def _quantize(sums: torch.Tensor, kind: Kind) -> np.ndarray:
    """Convert weighted sums of probabilities, (classes + 1, H, W), to the written values, (bands, H, W) uint8."""
    if kind == "classes":
        return sums[:-1].argmax(dim=0, keepdim=True).to(torch.uint8).numpy()
    probabilities = sums[:-1] / sums[-1:].clamp_min(torch.finfo(torch.float32).tiny)
    return (PROBABILITY_LEVELS * probabilities).round().clamp(0, PROBABILITY_LEVELS).to(torch.uint8).numpy()


def _write_tile(path: Path, values: np.ndarray, grid: MapGrid, tile: tuple[int, int]) -> None:
    profile: dict[str, Any] = {"driver": "GTiff", "dtype": "uint8", "compress": "deflate", "tiled": True}
    profile |= {"blockxsize": 256, "blockysize": 256, "interleave": "band"}
    left, top = grid.corner(tile[0] * grid.tile_size, tile[1] * grid.tile_size)
    profile |= {"crs": grid.raster.extent.crs, "transform": Affine(grid.pixel, 0.0, left, 0.0, -grid.pixel, top)}
    count, height, width = values.shape
    with (
        atomic_write(path) as temporary,
        rasterio.open(temporary, "w", count=count, height=height, width=width, **profile) as file,
    ):
        file.write(values)


def _is_finished(path: Path, description: dict[str, Any]) -> bool:
    """Return whether the map with this description is complete; write the description if the file is missing.

    Raises:
        InputError: the file describes another map, or cannot be parsed.
    """
    if not path.exists():
        _write_description(path, description, finished=False)
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a description of a map: choose another folder") from error
    if differing := [key for key in description if stored.get(key) != description[key]]:
        raise InputError(
            f"{path.parent} has a map with other settings or inputs ({', '.join(differing)}): choose another folder"
        )
    return bool(stored.get("finished"))


def _write_description(path: Path, description: dict[str, Any], *, finished: bool) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**description, "finished": finished}, indent=1) + "\n", encoding="utf-8")


def _describe_map(
    task: Segmentation, rasters: Mapping[str, MapRaster], grid: MapGrid, batch_size: int
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(task.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(task.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    description = {
        "model": digest.hexdigest(),
        "rasters": {name: raster.fingerprint() for name, raster in rasters.items()},
        "grid": {
            "pixel": grid.pixel,
            "width": grid.width,
            "height": grid.height,
            "size": grid.window_size,
            "step": grid.stride,
            "across": grid.windows_per_tile,
        },
        "windows": _LAYOUT_VERSION,
        "batch_size": batch_size,  # the batch size changes the last digits of the sums
    }
    return json.loads(json.dumps(description))  # tuples become lists, as in the stored file
