"""Evaluate encoders: probes, scores, reconstruction pictures and attention over dates."""
