"""Encoders, one per sensor: build, load and save them without dataset, recipe or trainer."""
