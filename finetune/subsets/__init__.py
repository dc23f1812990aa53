"""Draw nested subsets of labelled patches, and store them as files."""
