"""One encoder for each sensor: build, load and save it without dataset, recipe or trainer."""
