"""The quadratic that stands for the loss around the weights, as dampings, line searches and momenta see it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Quadratic(ABC):
    """The loss around the present weights, and the steps that it proposes.

        m(δ) = gᵀδ + ½ δᵀHδ ≈ loss(θ + δ) − loss(θ)

    A damping λ joins it as λ/2 ‖δ‖²_D with a diagonal scaling D > 0 (the identity unless a scaling is chosen): the precision of a Gaussian
    prior around the present weights.

    Attributes:
        gradient: g [p].
        scaling: diag(D) [p], or None for the identity.
    """

    gradient: Tensor
    scaling: Tensor | None

    @abstractmethod
    def solve(self, damping: float) -> Tensor:
        """−(H + damping · D)⁻¹ g [p]."""

    @abstractmethod
    def curvature(self, δ: Tensor) -> float:
        """δᵀHδ for any direction δ [p]."""

    @abstractmethod
    def smallest_eigenvalue(self) -> float:
        """λ_min of H on the span of the data's Jacobian: of the Gram matrix J̃J̃ᵀ where there are more weights than data."""

    def solved(self, δ: Tensor, damping: float) -> float:
        """δᵀHδ for δ = solve(damping), without a product: (H + λD) δ = −g."""
        return -float(self.gradient @ δ) - damping * self.size(δ) ** 2

    def size(self, δ: Tensor) -> float:
        """‖δ‖_D = √(δᵀDδ)."""
        return float((δ.square() if self.scaling is None else self.scaling * δ.square()).sum().sqrt())

    def steepest(self) -> Tensor:
        """−D⁻¹g: the direction of steepest descent where length is ‖·‖_D."""
        return -self.gradient if self.scaling is None else -self.gradient / self.scaling

    def decrease(self, δ: Tensor, bend: float) -> float:
        """−m(δ), for a direction with δᵀHδ = ``bend``."""
        return -float(self.gradient @ δ) - 0.5 * bend
