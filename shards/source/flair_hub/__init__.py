"""FLAIR-HUB: download its zips, read its tree."""
