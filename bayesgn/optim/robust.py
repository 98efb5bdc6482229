"""Robust losses ρ of residuals: how much an outlier may pull."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 0.1  # of ρ' in the curvature of one residual; below it the quadratic would promise more than the loss can fall


class Bend(NamedTuple):
    """A loss at residuals r [m], as a least-squares problem sees it.

    Attributes:
        slope: ψ(r) = ∂cost/∂r [m], the true gradient.
        curvature: positive [m], zero only where ρ' is; ∂²cost/∂r² where that is not below ``FLOOR`` ρ'.
    """

    slope: Tensor
    curvature: Tensor


class RobustLoss(ABC):
    """ρ of squared residuals, as in scipy: ρ(z) ≈ z for small z, so that small residuals count as ever.

        cost = ½ Σ_i C² ρ(z_i),   z_i = (r_i / C)²
        ∂cost/∂r = ρ' r,   ∂²cost/∂r² = ρ' + 2 z ρ''

    The second derivative is negative for the outliers of a redescending loss. It is kept above 0.1 ρ', so that the Gauss-Newton matrix
    JᵀWJ is positive semi-definite: Triggs' correction where that is sound, reweighting towards where it is not. The gradient is always true.

    Args:
        scale: C, the residual from which on it counts as large, in the residuals' unit.

    Raises:
        ValueError: for a scale that is not positive and finite.

    Source: Triggs, McLauchlan, Hartley and Fitzgibbon (2000), "Bundle adjustment: a modern synthesis", sec. 4.3.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
            raise ValueError(f"{type(self).__name__}: scale={scale!r}; expected a positive number in the unit of the residuals.")
        self.scale = float(scale)

    @abstractmethod
    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ρ, ρ' and ρ'' at z ≥ 0."""

    def cost(self, r: Tensor) -> Tensor:
        """½ Σ C² ρ."""
        return 0.5 * self.scale**2 * self.rho((r / self.scale).square())[0].sum()

    def fall(self, old: Tensor, new: Tensor) -> Tensor:
        """cost(old) − cost(new), summed by residual so that a small fall is not lost in large costs."""
        return 0.5 * self.scale**2 * (self.rho((old / self.scale).square())[0] - self.rho((new / self.scale).square())[0]).sum()

    def bend(self, r: Tensor) -> Bend:
        """Slope and curvature at r."""
        z = (r / self.scale).square()
        _, first, second = self.rho(z)
        return Bend(first * r, torch.maximum(first + 2 * z * second, FLOOR * first))

    def second(self, r: Tensor) -> Tensor:
        """∂²cost/∂r² [m] as it is, of either sign."""
        z = (r / self.scale).square()
        _, first, second = self.rho(z)
        return first + 2 * z * second

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale:g})"


class Squared(RobustLoss):
    """ρ(z) = z: plain least squares.

    Example:
        >>> Squared().cost(torch.tensor([3.0, 4.0]))
        tensor(12.5000)
    """

    def __init__(self) -> None:
        super().__init__(1.0)

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return z, torch.ones_like(z), torch.zeros_like(z)

    def fall(self, old: Tensor, new: Tensor) -> Tensor:
        return 0.5 * ((old - new) @ (old + new))

    def __repr__(self) -> str:
        return "Squared()"


class Huber(RobustLoss):
    """ρ(z) = z up to 1, 2√z − 1 beyond: quadratic, then linear. Convex; an outlier's pull is bounded, not taken away.

    Example:
        >>> Huber(1.0).cost(torch.tensor([0.5, 3.0]))  # ½ · 0.25 and ½ (2 · 3 − 1)
        tensor(2.6250)

    Source: Huber (1964), "Robust estimation of a location parameter".
    """

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        far = z > 1
        root = torch.where(far, z, 1.0).sqrt()
        return (
            torch.where(far, 2 * root - 1, z),
            torch.where(far, 1 / root, 1.0),
            torch.where(far, -0.5 / root**3, 0.0),
        )


class SoftL1(RobustLoss):
    """ρ(z) = 2 (√(1 + z) − 1): a smooth Huber.

    Example:
        >>> SoftL1(1.0).cost(torch.tensor([3.0]))
        tensor(2.1623)
    """

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root = (1 + z).sqrt()
        return 2 * z / (1 + root), 1 / root, -0.5 / root**3  # z/(1 + √(1+z)) = √(1+z) − 1 without cancellation


class Cauchy(RobustLoss):
    """ρ(z) = ln(1 + z): the log density of a Cauchy distribution. Not convex; an outlier's pull falls as 1/r.

    Example:
        >>> Cauchy(1.0).cost(torch.tensor([3.0]))  # ½ ln 10
        tensor(1.1513)
    """

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = 1 / (1 + z)
        return z.log1p(), first, -first.square()


class GemanMcClure(RobustLoss):
    """ρ(z) = z / (1 + z): bounded, so that an outlier in the end costs a constant and pulls no more. Needs a good start.

    Example:
        >>> GemanMcClure(1.0).cost(torch.tensor([3.0, 3000.0]))
        tensor(0.9500)

    Source: Geman and McClure (1987), "Statistical methods for tomographic image reconstruction".
    """

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = (1 + z).reciprocal()
        return z * first, first.square(), -2 * first**3


class Arctan(RobustLoss):
    """ρ(z) = arctan z: bounded as :class:`GemanMcClure`, and falling faster.

    Example:
        >>> Arctan(1.0).cost(torch.tensor([1.0]))  # π / 8
        tensor(0.3927)
    """

    def rho(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = 1 / (1 + z.square())
        return z.atan(), first, -2 * z * first.square()
