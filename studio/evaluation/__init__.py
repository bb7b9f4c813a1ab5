"""Metrics, the judge and benchmarks."""
