"""Record metrics, provenance and profiles of a run."""
