"""Metrics, the run log and trackers, provenance, profiles."""
