"""Local: what an expansion knows of each datum, for a curvature to work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Local(ABC):
    """What an expansion knows of each datum: the slope of L_n and where its quadratic touches; curvatures on request.

    Args:
        place [n c]: m, the mean of the Gaussian that L_n is a function of: the belief's, or a cavity's.
        cov [n c c]: of the belief.
        gradient [n c]: ∂L_n/∂m, the true one.
        at [n c]: where the quadratic has that slope; ``place`` unless given.
        valid [n]: False where the expansion itself failed (an improper cavity).
        again: the same at another ``place``, everything else held.
        value: L_n as a function of m [n c] -> [n], everything else held; None where no step in the mean can be judged by it.
        signed: whether ``fisher`` and ``outer`` may be indefinite, as sums with negative weights are.
    """

    def __init__(
        self,
        place: Tensor,
        cov: Tensor,
        gradient: Tensor,
        again: Callable[[Tensor], Local],
        value: Callable[[Tensor], Tensor] | None = None,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        signed: bool = False,
    ) -> None:
        self.place, self.cov, self.gradient = place, cov, gradient
        self.at = place if at is None else at
        self.valid = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device) if valid is None else valid
        self.shifted, self.value, self.signed = again, value, signed

    @abstractmethod
    def fisher(self) -> Tensor:
        """The Gauss-Newton curvature [n c c], PSD."""

    @abstractmethod
    def hessian(self) -> Tensor:
        """−∂²L_n/∂m² as the precision of a site [n c c], possibly indefinite."""

    @abstractmethod
    def outer(self) -> Tensor:
        """The mean outer product of gradients [n c c], PSD."""

    def rise(self, mean: Tensor) -> Tensor | None:
        """L_n at other means less L_n here [n], everything else held; None where a step cannot be judged by it."""
        return None if self.value is None else self.value(mean) - self.value(self.place)


class Diagonal(Local):
    """The same, seen by one latent at a time: curvatures without their cross terms."""

    def __init__(self, full: Local) -> None:
        again = lambda place: Diagonal(full.shifted(place))
        super().__init__(full.place, full.cov, full.gradient, again, full.value, full.at, full.valid, full.signed)
        self.full = full

    def fisher(self) -> Tensor:
        return diagonal(self.full.fisher())

    def hessian(self) -> Tensor:
        return diagonal(self.full.hessian())

    def outer(self) -> Tensor:
        return diagonal(self.full.outer())


def diagonal(blocks: Tensor) -> Tensor:
    """Blocks [n c c] without what is off their diagonals."""
    return torch.diag_embed(blocks.diagonal(dim1=-2, dim2=-1))


def outer(g: Tensor) -> Tensor:
    """g gᵀ [... c c]."""
    return g.unsqueeze(-1) * g.unsqueeze(-2)
