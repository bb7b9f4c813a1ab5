"""Benchmarks: one file a table."""
