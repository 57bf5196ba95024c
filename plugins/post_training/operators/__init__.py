"""Operators, sensor, trigger, hooks and links."""
