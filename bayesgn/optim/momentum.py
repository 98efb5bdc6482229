"""Momenta: what a step keeps of the one before."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from bayesgn.optim.damping import Proposal
from bayesgn.optim.quadratic import Quadratic


class Momentum(ABC):
    """Joins the last accepted step to a proposal."""

    @abstractmethod
    def __call__(self, quadratic: Quadratic, proposal: Proposal, last: Tensor) -> Proposal:
        """The step to try, given the last accepted one [p]."""


def _joined(quadratic: Quadratic, proposal: Proposal, a: float, b: float, last: Tensor, bend: float, pull: float) -> Proposal:
    """a δ + b last. With (H + λD) δ = −g, and thus δᵀH last = −gᵀlast − λ δᵀD last, its curvature needs no further product."""
    return Proposal(a * proposal.δ + b * last, a * a * proposal.bend + 2 * a * b * pull + b * b * bend, proposal.damping)


def _across(quadratic: Quadratic, proposal: Proposal, last: Tensor) -> float:
    """δᵀH last."""
    D_last = last if quadratic.scaling is None else quadratic.scaling * last
    return -float(quadratic.gradient @ last) - proposal.damping * float(proposal.δ @ D_last)


class HeavyBall(Momentum):
    """δ + β δ_last.

    Args:
        beta: in [0, 1).

    Raises:
        ValueError: for β outside [0, 1).

    Example:
        >>> HeavyBall(0.9)
        HeavyBall(beta=0.9)

    Source: Polyak (1964).
    """

    def __init__(self, beta: float = 0.9) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"HeavyBall: beta={beta}; expected 0 ≤ beta < 1.")
        self.beta = float(beta)

    def __call__(self, quadratic: Quadratic, proposal: Proposal, last: Tensor) -> Proposal:
        bend, pull = quadratic.curvature(last), _across(quadratic, proposal, last)
        return _joined(quadratic, proposal, 1.0, self.beta, last, bend, pull)

    def __repr__(self) -> str:
        return f"HeavyBall(beta={self.beta:g})"


class Adaptive(Momentum):
    """The step of a given length that is most conjugate to the last one, and still goes downhill by a given amount.

        max δᵀM δ_last  subject to  δᵀMδ = r²  and  gᵀδ = −ξ r √G,     M = H + λD
        G = gᵀM⁻¹g,  F = δ_lastᵀMδ_last,  C = gᵀδ_last
        δ = −(t₁ / 2t₂) M⁻¹g + (1 / 2t₂) δ_last,    t₁ = (C + 2 t₂ ξ r √G) / G,    2t₂ = √((F G − C²) / (r² G (1 − ξ²)))

    The gradient's part carries t₁/(2t₂) whole. The length r is that of the damped Gauss-Newton step unless given.

    Args:
        ξ: share of the steepest possible descent that is kept, in (0, 1); 1 would leave no momentum.
        length: r as a multiple of the damped Gauss-Newton step's √(δᵀMδ).

    Raises:
        ValueError: for numbers outside these ranges.

    Example:
        >>> Adaptive(0.9)
        Adaptive(ξ=0.9, length=1)

    Source: Ampazis and Perantonis (2000), "Levenberg-Marquardt algorithm with adaptive momentum for the efficient training of feedforward
    networks", eqs. 11–17; Pooladzandi and Zhou (2022).
    """

    def __init__(self, ξ: float = 0.9, length: float = 1.0) -> None:
        if not 0 < ξ < 1 or not length > 0:
            raise ValueError(f"Adaptive: ξ={ξ}, length={length}; expected 0 < ξ < 1 and length > 0.")
        self.ξ, self.length = float(ξ), float(length)

    def __call__(self, quadratic: Quadratic, proposal: Proposal, last: Tensor) -> Proposal:
        λ, δ = proposal.damping, proposal.δ
        bend, pull = quadratic.curvature(last), _across(quadratic, proposal, last)
        G = -float(quadratic.gradient @ δ)  # gᵀM⁻¹g
        F, C = bend + λ * quadratic.size(last) ** 2, float(quadratic.gradient @ last)
        gap = F * G - C * C  # ≥ 0 by Cauchy and Schwarz; 0 where the last step is along this one
        if not G > 0 or not gap > 1e-12 * F * G:
            return proposal
        r = self.length * math.sqrt(G)
        two_t2 = math.sqrt(gap / (r * r * G * (1 - self.ξ**2)))
        t1 = (C + two_t2 * self.ξ * r * math.sqrt(G)) / G
        return _joined(quadratic, proposal, t1 / two_t2, 1 / two_t2, last, bend, pull)

    def __repr__(self) -> str:
        return f"Adaptive(ξ={self.ξ:g}, length={self.length:g})"
