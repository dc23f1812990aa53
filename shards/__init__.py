"""Bytes and ground: modalities, the FLAIR-HUB catalogue, shards and the typed batches read from them."""
