"""Evaluation: held-out questions with intervals, and benchmarks by their owners' protocols."""
