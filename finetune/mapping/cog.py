"""Tiles to one cloud-optimised GeoTIFF, with the colours and names of its classes."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import rasterio.shutil

from bocage.shards.classes import ClassScheme
from bocage.shards.files import written_atomically
from bocage.shards.inspect.composites import palette

if TYPE_CHECKING:
    from bocage.finetune.mapping.grid import MapGrid

NODATA = 255


def write_cog(path: Path, tiles: Path, plan: MapGrid, scheme: ClassScheme, kind: str) -> None:
    """Write the map that the tiles ``ROW_COLUMN.tif`` of a folder make up.

    One band of classes has a colour table and ``CLASS_N`` tags; a band a class of probabilities has its name, and a
    scale that makes shares of its numbers.

    Args:
        path: the file.
        tiles: folder of all tiles of the plan.
        plan: the grid.
        scheme: the classes.
        kind: ``classes`` or ``probabilities``.
    """
    mosaic = tiles / "mosaic.vrt"
    mosaic.write_text(_mosaic(tiles, plan, scheme, kind), encoding="utf-8")
    resampling = "mode" if kind == "classes" else "average"
    with written_atomically(path) as temporary:
        rasterio.shutil.copy(
            mosaic,
            temporary,
            driver="COG",
            compress="deflate",
            predictor="no",
            overview_resampling=resampling,
            bigtiff="if_safer",
        )


def _mosaic(tiles: Path, plan: MapGrid, scheme: ClassScheme, kind: str) -> str:
    """A GDAL virtual raster of the tiles."""
    extent = plan.raster.extent
    lines = [f'<VRTDataset rasterXSize="{plan.width}" rasterYSize="{plan.height}">']
    if extent.crs is not None:
        lines.append(f"<SRS>{html.escape(extent.crs.to_wkt())}</SRS>")
    lines.append(f"<GeoTransform>{extent.left!r}, {plan.gsd!r}, 0.0, {extent.top!r}, 0.0, {-plan.gsd!r}</GeoTransform>")
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
        for row, column in plan.tiles():
            left, top = column * plan.tile, row * plan.tile
            width, height = min(plan.tile, plan.width - left), min(plan.tile, plan.height - top)
            size = f'xSize="{width}" ySize="{height}"'
            file = html.escape(str((tiles / f"{row}_{column}.tif").resolve()))
            lines.append(
                f'<SimpleSource><SourceFilename relativeToVRT="0">{file}</SourceFilename>'
                f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" {size}/>'
                f'<DstRect xOff="{left}" yOff="{top}" {size}/></SimpleSource>'
            )
        lines.append("</VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"])
