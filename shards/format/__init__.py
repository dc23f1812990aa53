"""Define what a folder of shards holds: codecs, tars, index, manifest, statistics."""
