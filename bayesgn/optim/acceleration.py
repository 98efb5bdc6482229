"""Geodesic acceleration: the second-order part of a Levenberg-Marquardt step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn.optim.residual_quadratic import ResidualQuadratic


class Geodesic:
    """Bend a step δ along the curve that the residuals take, and refuse it where they bend too much.

        δ₂ = −½ (J̃ᵀJ̃ + λD)⁻¹ J̃ᵀ r_δδ,   r_δδ ≈ 2/h [ (r(θ + hδ) − r(θ))/h − Jδ ],   taken if 2 ‖δ₂‖_D ≤ ratio · ‖δ‖_D

    One more evaluation and one more triangular solve for each step, with no second derivatives; along the long curved valleys that make
    curve fits hard it saves most of the iterations, and refusing sharp turns keeps steps from leaping onto plateaus.

    Args:
        ratio: of the two lengths.
        h: relative length of the trial step.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> Geodesic()
        Geodesic(ratio=0.75, h=0.1)

    Source: Transtrum and Sethna (2012), "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization", sec. 2.
    """

    def __init__(self, ratio: float = 0.75, h: float = 0.1) -> None:
        if not (ratio > 0 and 0 < h <= 1):
            raise ValueError(f"Geodesic: ratio={ratio}, h={h}; expected a positive ratio and 0 < h ≤ 1.")
        self.ratio, self.h = float(ratio), float(h)

    def __call__(self, quadratic: ResidualQuadratic, δ: Tensor, Jδ: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor | None:
        """δ₂ [p], or None where the residuals bend too much for a step of this length; Jδ [m] in the residuals' unit."""
        bent = 2 / self.h * ((value(quadratic.lin.θ + self.h * δ) - quadratic.lin.value) / self.h - Jδ)
        if not bool(bent.isfinite().all()):
            return None
        δ2 = 0.5 * quadratic.correction(bent)
        if not bool(δ2.isfinite().all()) or 2 * quadratic.size(δ2) > self.ratio * quadratic.size(δ):
            return None
        return δ2

    def __repr__(self) -> str:
        return f"Geodesic(ratio={self.ratio:g}, h={self.h:g})"


class Straight(Geodesic):
    """No acceleration: steps as they were solved for.

    Example:
        >>> Straight()
        Straight()
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, quadratic: ResidualQuadratic, δ: Tensor, Jδ: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor | None:
        return torch.zeros_like(δ)

    def __repr__(self) -> str:
        return "Straight()"
