"""Measurements: each prints a table and leaves a record under benchmarks/results/."""
