"""Read the published FLAIR-HUB dataset: find its patches, parse its metadata, read its rasters."""
