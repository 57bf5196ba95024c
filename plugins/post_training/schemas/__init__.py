"""Typed requests, jobs and settings: standard library and pydantic only."""
