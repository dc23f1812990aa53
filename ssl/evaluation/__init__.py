"""Evaluate encoders during and after pretraining: probes, scores, reconstructions, attention."""
