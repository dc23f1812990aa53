"""Simulate patches in the format of FLAIR-HUB, for tests, demos and benchmarks."""
