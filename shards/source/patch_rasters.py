"""Read the rasters of one patch, and check that they agree in dates and position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bocage.shards.modality import Modality, Registry
from bocage.shards.source.catalogue import Patch, PatchSource
from bocage.shards.source.raster import Raster, RasterError, corner_distance, may_be_same_crs

_MAX_DISTANCE = 0.5  # pixels between the corners of the rasters of a patch


def read_patch(
    patch: Patch[PatchSource], registry: Registry, modalities: Iterable[Modality]
) -> tuple[dict[str, Raster], Raster]:
    """Read some rasters of one patch, at least one, and check them against each other.

    Args:
        patch: the patch.
        registry: modalities of its dataset.
        modalities: modalities to read, of those that the patch has.

    Returns:
        rasters: raster of each modality.
        reference: the raster whose position is that of the patch.

    Raises:
        RasterError: a file cannot be read, or disagrees with its dates or with the position of the other files. The
            message names the file.
    """
    loaded: dict[str, Raster] = {}
    for modality in modalities:
        source = patch.sources.get(modality.name)
        if source is not None:
            loaded[modality.name] = source.read_raster(modality)
            _check_dates(source, modality, loaded[modality.name].array, patch.dates.get(modality.name))
    # The reference is the first modality present, the aerial image where there is one: other sensors are resampled onto
    # its grid. A picture without a world file takes the position of the first that has one.
    names = [name for name in registry if name in loaded]
    reference_name = next((name for name in names if loaded[name].has_position), names[0])
    for name, raster in loaded.items():
        _check_position(patch, registry[reference_name], loaded[reference_name], registry[name], raster)
    return loaded, loaded[reference_name]


def _check_dates(source: PatchSource, modality: Modality, array: np.ndarray, days: np.ndarray | None) -> None:
    if modality.has_time_axis and days is not None and len(days) != len(array):
        raise RasterError(f"{source}: {len(array)} dates in the file, {len(days)} in the metadata")


def _check_position(
    patch: Patch[PatchSource], reference_modality: Modality, reference: Raster, modality: Modality, raster: Raster
) -> None:
    """Check that a raster has the corners of the reference, to within half a pixel of the coarser of the two."""
    if not raster.has_position:
        return
    source, other = patch.sources[modality.name], patch.sources[reference_modality.name]
    if not may_be_same_crs(raster.crs, reference.crs):
        raise RasterError(f"{source}: coordinates in {raster.crs}, but {other} has {reference.crs}")
    pixel = max(reference.side / reference_modality.size, raster.side / modality.size)
    distance = corner_distance(raster, reference)
    if not distance <= _MAX_DISTANCE * pixel:
        raise RasterError(
            f"{source}: corners lie up to {distance:.4g} from those of {other}, more than half a pixel of {pixel:.4g}: "
            f"upper-left corner at ({raster.left:.2f}, {raster.top:.2f}) and side {raster.side:.2f}, instead of "
            f"({reference.left:.2f}, {reference.top:.2f}) and {reference.side:.2f}"
        )
