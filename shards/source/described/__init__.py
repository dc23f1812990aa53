"""Datasets that a description defines: tiles, large rasters, tables of pixel series."""
