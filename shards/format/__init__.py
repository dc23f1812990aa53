"""The shard format: codecs, tars, index, manifest and statistics."""
