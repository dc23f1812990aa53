"""Run and report label-efficiency studies."""
