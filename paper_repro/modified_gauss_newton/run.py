"""Runs the three experiments: quadratic phase and noise, multi-output regression, non-linear equations."""

from __future__ import annotations

from pathlib import Path

from paper_repro.modified_gauss_newton.equations import equations
from paper_repro.modified_gauss_newton.quadratic_phase import overparameterised, phase_retrieval
from paper_repro.modified_gauss_newton.regression import Sizes, regression

TITLE = "Pillutla, Roulet, Kakade and Harchaoui (2023), Modified Gauss-Newton algorithms under noise: prox-linear against stochastic subgradient"


def run(quick: bool, figures: Path) -> dict[str, float]:
    """All figures by name; ``quick`` takes smaller sizes and fewer noise levels."""
    found = overparameterised([1e-8, 1e-2, 1.0] if quick else [1e-8, 1e-4, 1e-2, 0.1, 1.0], figures)
    if quick:
        found |= phase_retrieval([0.0, 0.1], n=100, d=10, epochs=20, rates=[1e-2, 3e-3], figures=figures)
        found |= regression([1.0, 1e4], Sizes(students=(16,), n=64, passes=40), [0.3, 0.1], [0.0], [10.0, 100.0], figures)
    else:
        found |= phase_retrieval([0.0, 1e-3, 1e-2, 0.1], n=200, d=20, epochs=60, rates=[0.1, 0.03, 0.01, 3e-3, 1e-3], figures=figures)
        found |= regression([1.0, 1e2, 1e4], Sizes(), [1.0, 0.3, 0.1, 0.03], [0.0, 0.5], [10.0, 100.0], figures)
    return found | equations(quick, figures)
