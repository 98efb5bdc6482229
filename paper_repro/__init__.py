"""Reproductions: one folder a seed paper, each with a README, a run, and expected numbers with tolerances."""
