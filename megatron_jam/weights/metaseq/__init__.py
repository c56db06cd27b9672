"""Checkpoints of metaseq: safe reading, merging, names."""
