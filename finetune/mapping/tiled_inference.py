"""Maps of zones of any size: windows of a model blended where they overlap, tile by tile, in constant memory."""

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
from rasterio._err import CPLE_BaseError  # what GDAL's own errors are, and rasterio.errors does not have
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from bocage.finetune.mapping.cog import NODATA, write_cog
from bocage.finetune.mapping.grid import MapGrid
from bocage.finetune.mapping.rasters import MapRaster, covered, window_batch
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.modality import PATCH_SIZE
from bocage.ssl.engine.checkpoint.resume import run_lock
from bocage.ssl.engine.parallel.distributed import rank_and_world, run_on_all_ranks

Kind = Literal["classes", "probabilities"]
Value = TypeVar("Value")
LEVELS = NODATA - 1
"""Probabilities are written as whole numbers from 0 to this."""

_WINDOWS = 2  # of what version the places of windows are: tiles of another do not fit
_CACHE = 64  # MB that GDAL may keep


def write_map(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    plan: MapGrid,
    out: Path,
    *,
    kind: Kind = "classes",
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write a map of each label, ``OUT/LABEL.tif`` or ``OUT/LABEL_probabilities.tif``: cloud-optimised GeoTIFFs.

    Windows are blended by weights that fall off towards their borders, so that no border of a window or of a tile
    shows. Finished tiles lie in ``OUT/tiles`` until the map is whole: the same call goes on with them, on any number
    of ranks, to the same bytes. Where no raster has data, maps have none. All ranks call it.

    Args:
        task: the model; put into evaluation mode.
        rasters: see ``open_rasters``.
        plan: see ``plan_map``.
        out: folder, made when missing.
        kind: the likeliest class, or a band a class with its probability times ``LEVELS``.
        batch_size: windows at a time.
        device: where the model runs.
        progress: called with the tiles that this rank has done and has to do.

    Returns:
        By label, the path of its map.

    Raises:
        InputError: ``out`` holds a map of something else, another process writes there, or it cannot be written.
    """
    names = {name: name if kind == "classes" else f"{name}_probabilities" for name in task.targets}
    paths = {name: out / f"{stem}.tif" for name, stem in names.items()}
    folder, facts = out / "tiles" / kind, out / f"{kind}.json"
    description = _description(task, rasters, plan, batch_size)
    rank, world = rank_and_world()
    task = task.to(device).eval()

    def files(tile: tuple[int, int]) -> dict[str, Path]:
        return {name: folder / name / f"{tile[0]}_{tile[1]}.tif" for name in task.targets}

    def begin() -> list[tuple[int, int]] | None:
        """The tiles that are missing, for all ranks; None where the map is whole."""
        if rank or (_claim(facts, description) and all(path.exists() for path in paths.values())):
            return None
        for name in task.targets:
            (folder / name).mkdir(parents=True, exist_ok=True)
        return [tile for tile in plan.tiles() if not all(path.exists() for path in files(tile).values())]

    def work() -> None:
        own = (missing or [])[rank::world]
        for number, tile in enumerate(own, start=1):
            for name, values in _tile(task, rasters, plan, tile, kind, batch_size, torch.device(device)).items():
                _write_tile(files(tile)[name], values, plan, tile)
            if progress is not None:
                progress(number, len(own))

    def end() -> None:
        if rank:
            return
        if missing is not None:
            for name, target in task.targets.items():
                write_cog(paths[name], folder / name, plan, target.scheme, kind)
            _describe(facts, description, finished=True)
        shutil.rmtree(folder, ignore_errors=True)  # or what is left of a folder whose removal was broken off

    run_on_all_ranks(_told(lambda: out.mkdir(parents=True, exist_ok=True), out))
    with rasterio.Env(GDAL_CACHEMAX=_CACHE), run_lock(out):
        missing = run_on_all_ranks(_told(begin, out))[0]
        run_on_all_ranks(_told(work, out))
        run_on_all_ranks(_told(end, out))
    return paths


def _told(action: Callable[[], Value], out: Path) -> Callable[[], Value]:
    """``action``, in which what disk or GDAL refuse becomes one sentence: other ranks must hear of it."""

    def guarded() -> Value:
        try:
            return action()
        except (OSError, RasterioError, CPLE_BaseError) as error:
            what = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise InputError(f"{out} cannot be written: {what}") from error

    return guarded


def _tile(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    plan: MapGrid,
    tile: tuple[int, int],
    kind: Kind,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """By label the pixels of a tile, (bands, H, W) uint8.

    Sums of probabilities of one row of windows are held at a time: rows of pixels are done when the next one begins.
    """
    top, left = tile[0] * plan.tile, tile[1] * plan.tile
    height, width = min(plan.tile, plan.height - top), min(plan.tile, plan.width - left)
    columns = plan.windows(left, left + width, plan.width)
    weights = torch.from_numpy(_weights(plan.size, plan.step))
    sums = {
        name: torch.zeros(len(target.scheme) + 1, plan.size, width)  # the last channel sums the weights
        for name, target in task.targets.items()
    }
    seen = np.zeros((plan.size, width), bool)
    bands = {name: len(target.scheme) if kind == "probabilities" else 1 for name, target in task.targets.items()}
    made = {name: np.full((count, height, width), NODATA, np.uint8) for name, count in bands.items()}
    rows_of_windows = plan.windows(top, top + height, plan.height)
    for row in rows_of_windows:
        for column, logits, data in _windows(task, rasters, plan, row, columns, batch_size, device):
            at = plan.begin(column, plan.width) - left
            inside = slice(max(0, at), min(width, at + plan.size))
            part = slice(inside.start - at, inside.stop - at)
            seen[:, inside] |= data[:, part]
            for name, scores in logits.items():
                weighted = torch.cat([scores.softmax(dim=0) * weights, weights[None]])
                sums[name][:, :, inside] += weighted[:, :, part]
        # The window below adds to the rest only, but for the last, which has nothing below.
        begin = plan.begin(row, plan.height) - top
        step = plan.begin(row + 1, plan.height) - top - begin if row + 1 in rows_of_windows else plan.size
        rows = plan.size if begin + plan.size >= height else step
        shown = slice(max(0, begin), min(height, begin + rows))
        taken = slice(shown.start - begin, shown.stop - begin)
        if shown.stop > shown.start:
            for name, total in sums.items():
                values = _values(total[:, taken], kind)
                made[name][:, shown] = np.where(seen[taken], values, NODATA)
        # What the next row of windows adds to comes first.
        rest = plan.size - step
        seen[:rest], seen[rest:] = seen[step:].copy(), False
        for total in sums.values():
            total[:, :rest] = total[:, step:].clone()
            total[:, rest:] = 0.0
    return made


def _windows(
    task: Segmentation,
    rasters: Mapping[str, MapRaster],
    plan: MapGrid,
    row: int,
    columns: range,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, torch.Tensor], np.ndarray]]:
    """Of a row of windows those with data: column, by label logits (classes, size, size), and where there are data."""
    inputs = [name for name in rasters if name in task.modalities]
    for first in range(columns.start, columns.stop, batch_size):
        chosen = range(first, min(first + batch_size, columns.stop))
        top = plan.begin(row, plan.height)
        corners = [plan.corner(top, plan.begin(column, plan.width)) for column in chosen]
        batch, some = window_batch(rasters, corners, PATCH_SIZE)
        rows = np.flatnonzero(some)
        if not len(rows):
            continue
        batch = batch.subset(rows.tolist())
        for name in inputs:
            rasters[name].doubt_units(batch.values[name].numpy(), task.model.encoder(name).spec)
        data = covered(batch, inputs, plan.size)
        with torch.no_grad():
            logits = {name: values.float().cpu() for name, values in task.logits(batch.to(device)).items()}
        for place, index in enumerate(rows):
            yield chosen[index], {name: values[place] for name, values in logits.items()}, data[place]


def _weights(size: int, step: int) -> np.ndarray:
    """(size, size) float32: 1 inside, falling linearly to the border over the overlap."""
    overlap = size - step
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    along = np.minimum(1.0, distance / overlap) if overlap else np.ones(size)
    return np.outer(along, along).astype(np.float32)


def _values(sums: torch.Tensor, kind: Kind) -> np.ndarray:
    """Weighted sums of probabilities (classes + 1, H, W) as what is written, (bands, H, W) uint8."""
    if kind == "classes":
        return sums[:-1].argmax(dim=0, keepdim=True).to(torch.uint8).numpy()
    shares = sums[:-1] / sums[-1:].clamp_min(torch.finfo(torch.float32).tiny)
    return (LEVELS * shares).round().clamp(0, LEVELS).to(torch.uint8).numpy()


def _write_tile(path: Path, values: np.ndarray, plan: MapGrid, tile: tuple[int, int]) -> None:
    profile: dict[str, Any] = {"driver": "GTiff", "dtype": "uint8", "compress": "deflate", "tiled": True}
    profile |= {"blockxsize": 256, "blockysize": 256, "interleave": "band"}
    left, top = plan.corner(tile[0] * plan.tile, tile[1] * plan.tile)
    profile |= {"crs": plan.raster.extent.crs, "transform": Affine(plan.gsd, 0.0, left, 0.0, -plan.gsd, top)}
    count, height, width = values.shape
    with (
        written_atomically(path) as temporary,
        rasterio.open(temporary, "w", count=count, height=height, width=width, **profile) as file,
    ):
        file.write(values)


def _claim(path: Path, description: dict[str, Any]) -> bool:
    """Whether a map of this description is finished; writes the description where there is none.

    Raises:
        InputError: there is one of another map.
    """
    if not path.exists():
        _describe(path, description, finished=False)
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a description of a map: choose another folder") from error
    if differing := [key for key in description if found.get(key) != description[key]]:
        raise InputError(f"{path.parent} holds a map made otherwise ({', '.join(differing)}): choose another folder")
    return bool(found.get("finished"))


def _describe(path: Path, description: dict[str, Any], *, finished: bool) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps({**description, "finished": finished}, indent=1) + "\n", encoding="utf-8")


def _description(
    task: Segmentation, rasters: Mapping[str, MapRaster], plan: MapGrid, batch_size: int
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(task.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(task.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    grid = {key: getattr(plan, key) for key in ("gsd", "width", "height", "size", "step", "across")}
    described = {
        "model": digest.hexdigest(),
        "rasters": {name: raster.describe() for name, raster in rasters.items()},
        "grid": grid,
        "windows": _WINDOWS,
        "batch_size": batch_size,  # sums of another batch differ in their last digits
    }
    return json.loads(json.dumps(described))
