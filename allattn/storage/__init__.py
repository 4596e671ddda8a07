"""Paths that may lie in a bucket, and checkpoints."""
