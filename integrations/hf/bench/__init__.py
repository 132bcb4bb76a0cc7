"""Benchmarks: engines timed side by side on real requests."""
