"""Write, verify and read checkpoints."""
