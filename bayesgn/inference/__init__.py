"""Inference: repeat until it settles. Laplace, evidence, tuning, comparison, persistence."""
