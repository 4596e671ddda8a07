"""Checkpoints of the papers' own code, imported and exported."""
