"""Command lines: one thin module for each sub-command of ``bocage``."""
