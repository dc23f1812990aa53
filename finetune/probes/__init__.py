"""Probe frozen encoders with kNN and linear classifiers."""
