"""Read shards, local or remote, as batches in a deterministic order."""
