"""Simulate patches in FLAIR-HUB's own format, for tests, demos and benchmarks."""
