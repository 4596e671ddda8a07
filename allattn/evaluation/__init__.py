"""Scoring a trained network, and sampling from it."""
