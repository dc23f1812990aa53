"""Data layer: modalities, sharding of FLAIR-HUB, and reading of shards as typed batches. Sharding needs no torch."""
