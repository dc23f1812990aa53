"""Map whole zones by tiled inference."""
