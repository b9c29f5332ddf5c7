"""Evaluation: held-out questions, with intervals."""
