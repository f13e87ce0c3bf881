"""Benchmarks: ratios paired in one run, medians; not part of the test command but smoke-run by it."""
