"""Read and write checkpoints of IGN's official FLAIR-HUB code."""
