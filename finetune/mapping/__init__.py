"""Tiled inference: class maps of areas of any size from rasters."""
