"""Publish encoders with a model card."""
