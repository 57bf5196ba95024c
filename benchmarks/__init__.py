"""Measurements; see each file."""
