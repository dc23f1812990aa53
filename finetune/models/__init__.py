"""Segmentation models: UPerFuse fusion, UPerNet decoders, losses."""
