"""Detect and diagnose training problems: bad steps, collapse, dead ranks."""
