"""Measurements behind docs/benchmarks.md; each script writes JSON under benchmarks/results/."""
