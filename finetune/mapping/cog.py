"""Merge tiles into one cloud-optimised GeoTIFF with the colours and names of its classes."""

from __future__ import annotations

import html
from pathlib import Path

import rasterio.shutil

from bocage.finetune.mapping.map_grid import MapGrid
from bocage.shards.classes import ClassScheme
from bocage.shards.files import atomic_write
from bocage.shards.inspect.composites import palette

NODATA = 255


def write_cog(path: Path, tiles: Path, grid: MapGrid, scheme: ClassScheme, kind: str) -> None:
    """Merge the tiles ``ROW_COLUMN.tif`` of a folder into one cloud-optimised GeoTIFF.

    A class map has one band with a colour table and ``CLASS_N`` tags. A probability map has one band per class, with
    the name of the class and the scale that converts its values to probabilities.

    Args:
        path: output file.
        tiles: folder that contains all tiles of the grid.
        grid: grid of the map.
        scheme: classes of the map.
        kind: content of the map, ``classes`` or ``probabilities``.
    """
    mosaic = tiles / "mosaic.vrt"
    mosaic.write_text(_mosaic_vrt(tiles, grid, scheme, kind), encoding="utf-8")
    resampling = "mode" if kind == "classes" else "average"
    with atomic_write(path) as temporary:
        rasterio.shutil.copy(
            mosaic,
            temporary,
            driver="COG",
            compress="deflate",
            predictor="no",
            overview_resampling=resampling,
            bigtiff="if_safer",
        )


def _mosaic_vrt(tiles: Path, grid: MapGrid, scheme: ClassScheme, kind: str) -> str:
    """Return the XML of a GDAL virtual raster (VRT) that mosaics the tiles."""
    extent = grid.raster.extent
    lines = [f'<VRTDataset rasterXSize="{grid.width}" rasterYSize="{grid.height}">']
    if extent.crs is not None:
        lines.append(f"<SRS>{html.escape(extent.crs.to_wkt())}</SRS>")
    corner = f"{extent.left!r}, {grid.pixel!r}, 0.0, {extent.top!r}, 0.0, {-grid.pixel!r}"
    lines.append(f"<GeoTransform>{corner}</GeoTransform>")
    bands = ["classes"] if kind == "classes" else list(scheme.classes)
    for band, name in enumerate(bands, start=1):
        lines.append(f'<VRTRasterBand dataType="Byte" band="{band}">')
        lines.append(f"<Description>{html.escape(scheme.name if kind == 'classes' else name)}</Description>")
        if kind == "classes":
            tags = "".join(
                f'<MDI key="CLASS_{value}">{html.escape(text)}</MDI>' for value, text in enumerate(scheme.classes)
            )
            entries = "".join(
                f'<Entry c1="{red}" c2="{green}" c3="{blue}" c4="255"/>' for red, green, blue in palette(scheme)
            )
            lines.append(f"<Metadata>{tags}</Metadata><ColorInterp>Palette</ColorInterp>")
            lines.append(f"<ColorTable>{entries}</ColorTable>")
        else:
            lines.append(f"<Scale>{1 / (NODATA - 1)!r}</Scale><Offset>0</Offset>")
        lines.append(f"<NoDataValue>{NODATA}</NoDataValue>")
        for row, column in grid.tiles():
            left, top = column * grid.tile_size, row * grid.tile_size
            width, height = min(grid.tile_size, grid.width - left), min(grid.tile_size, grid.height - top)
            size = f'xSize="{width}" ySize="{height}"'
            file = html.escape(str((tiles / f"{row}_{column}.tif").resolve()))
            lines.append(
                f'<SimpleSource><SourceFilename relativeToVRT="0">{file}</SourceFilename>'
                f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" {size}/>'
                f'<DstRect xOff="{left}" yOff="{top}" {size}/></SimpleSource>'
            )
        lines.append("</VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"])
