"""Expansions: around what is the loss at a datum bent into a quadratic? With a curvature, an expansion is a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn.rules.curvatures import Curvature, GaussNewton


class Laplace:
    """Expand log p(y|f) at the belief's mean: Laplace's method, and Newton's.

    Args:
        curvature: which Λ stands for the loss there, :class:`GaussNewton` unless told otherwise.

    Example:
        >>> from bayesgn import rules
        >>> rules.Laplace(curvature=rules.MonteCarloFisher(samples=4))
        Laplace(curvature=MonteCarloFisher(samples=4))
    """

    def __init__(self, curvature: Curvature | None = None) -> None:
        self.curvature = GaussNewton() if curvature is None else curvature
        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"curvature={curvature!r}; expected an instance such as rules.GaussNewton().")

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S [n r k] with Λ = SSᵀ at f [n *positions c]."""
        return self.curvature.root(likelihood, f, y, generator)

    def __repr__(self) -> str:
        return f"Laplace(curvature={self.curvature})"
