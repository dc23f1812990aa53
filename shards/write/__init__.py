"""Write shards from a catalogue of patches, in one process, several, or on a cluster."""
