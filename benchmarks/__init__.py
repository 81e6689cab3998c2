"""Benchmarks run by asv: `time_*` measure speed, `track_*` accuracy and stability."""
