"""Draft the description of a folder."""
