"""Encoders and labels to maps: UPerFuse, losses, metrics, prediction."""
