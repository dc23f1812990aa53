"""Open the catalogue of a described dataset by its kind."""

from __future__ import annotations

from pathlib import Path

from bocage.shards.source.described.catalogue import DescribedCatalogue
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.mosaics import RasterCatalogue
from bocage.shards.source.described.pixel_series import TableCatalogue
from bocage.shards.source.described.tiles import TileCatalogue


def open_described(root: Path, description: DatasetDescription, folder: Path) -> DescribedCatalogue:
    """Open the catalogue of a described dataset.

    Args:
        root: folder of the dataset.
        description: its description.
        folder: folder that paths of the description are relative to.

    Raises:
        InputError: the folder and the description do not match.
    """
    if description.kind == "table":
        return TableCatalogue.open(root, description, folder)
    if description.kind == "rasters":
        return RasterCatalogue.open(root, description, folder)
    return TileCatalogue.open(root, description, folder)
