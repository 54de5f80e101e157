"""Benchmarks: one module per area, names and targets fixed in docs/benchmarks.md, one shape of report."""
