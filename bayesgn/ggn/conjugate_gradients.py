"""Conjugate gradients on H + P, with a structure that keeps less of H for preconditioner."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("bayesgn.ggn")

TOLERANCE, ENOUGH, ITERATIONS = 1e-11, 1e-6, 200


def conjugate_gradients(
    A: Callable[[Tensor], Tensor], b: Tensor, solve: Callable[[Tensor], Tensor], start: Tensor | None = None
) -> Tensor:
    """A⁻¹ b [p] for positive definite A, preconditioned by ``solve`` ≈ A⁻¹; one iteration where that is exact.

    Residuals are measured by rᵀ solve(r) ≈ |x − A⁻¹b|²_A: how far x is off in units of its own standard deviations, when A is the precision
    of x. It stops at 1e-11 of what it began with from zero, or after 200 iterations; a warning in the log says where it is off by more than
    1e-6 then. Where b is not finite, neither is the answer. The step is Polak and Ribière's, so that a preconditioner which is itself
    iterative (``ggn.MatrixFree``) does no harm.
    """
    x = torch.zeros_like(b) if start is None else start
    whole = max(float(b @ solve(b)), 0.0) ** 0.5
    r = b.clone() if start is None else b - A(x)
    z = solve(r)
    d, ρ = z, r @ z
    for iteration in range(ITERATIONS + 1):
        off = max(float(ρ), 0.0) ** 0.5
        if off <= TOLERANCE * (1 + whole):
            logger.debug("mean of the weights: %d conjugate-gradient iterations", iteration)
            return x
        if not math.isfinite(off):
            return torch.full_like(b, math.nan)  # the loop takes such a step back, or raises
        if iteration == ITERATIONS:
            break
        Ad = A(d)
        step = ρ / (d @ Ad)
        x = x + step * d
        new = r - step * Ad
        z = solve(new)
        ρ_new = new @ z
        d, r, ρ = z + (ρ_new - r @ z) / ρ * d, new, ρ_new
    logger.log(
        logging.WARNING if off > ENOUGH else logging.DEBUG,
        "the mean of the weights is off by about %.1e of its standard deviations after %d conjugate-gradient iterations: the structure is a poor "
        "preconditioner; take a richer one (ggn.Kron, ggn.LowRank, ggn.Full) or a larger prior precision", off, ITERATIONS,
    )  # fmt: skip
    return x
