"""Write shards from a catalogue of patches, in one process, in several, or on a cluster."""
