"""Links of binary outcomes: a symmetric distribution function g, g(−f) = 1 − g(f), its derivatives and its integral over a Gaussian."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Link", "Logit", "NormCDF", "logistic_normal"]


class Link(ABC):
    """p(y = 1 | f) = g(f) with g(−f) = 1 − g(f), so that z = ±f serves both outcomes."""

    @abstractmethod
    def log(self, z: Tensor) -> Tensor:
        """log g(z)."""

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """(log g)'(z)."""

    @abstractmethod
    def bend(self, z: Tensor) -> Tensor:
        """−(log g)''(z)."""

    @abstractmethod
    def fisher(self, f: Tensor) -> Tensor:
        """g'² / (g (1 − g)), the Fisher information of y in f."""

    @abstractmethod
    def expected(self, mean: Tensor, variance: Tensor) -> Tensor:
        """E[g(f)] for f ~ N(mean, variance)."""

    def arguments(self) -> dict:
        """The constructor's arguments."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Logit(Link):
    """g(f) = 1 / (1 + e^−f); E[g(f)] by quadrature to rounding.

    >>> Logit().log(torch.tensor(0.0)).exp()
    tensor(0.5000)
    """

    def log(self, z):
        return logsigmoid(z)

    def slope(self, z):
        return (-z).sigmoid()

    def bend(self, z):
        return z.sigmoid() * (-z).sigmoid()

    def fisher(self, f):
        return f.sigmoid() * (-f).sigmoid()

    def expected(self, mean, variance):
        return logistic_normal(mean, variance)


class NormCDF(Link):
    """g(f) = Φ(f), the normal distribution function ("probit regression"); E[g(f)] = Φ(mean / √(1 + variance)) is exact.

    Source: Rasmussen & Williams (2006), equations 3.16 and 3.82.
    """

    def log(self, z):
        return torch.special.log_ndtr(z)

    def slope(self, z):
        # φ(z) / Φ(z) by the scaled erfc, without 0/0 in the tail.
        return math.sqrt(2 / math.pi) / torch.special.erfcx(-z / math.sqrt(2))

    def bend(self, z):
        r = self.slope(z)
        return r * (z + r)

    def fisher(self, f):
        return self.slope(f) * self.slope(-f)

    def expected(self, mean, variance):
        return torch.special.ndtr(mean / (1 + variance).sqrt())


@lru_cache(maxsize=1)
def _grids() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = torch.arange(-60, 61, dtype=torch.float64) * 0.15
    t = torch.arange(-80, 81, dtype=torch.float64) * 0.5
    return z, 0.15 * (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi), t, 0.5 * t.sigmoid() * (-t).sigmoid()


def logistic_normal(mean: Tensor, variance: Tensor) -> Tensor:
    """E[σ(f)] for f ~ N(mean, variance), to rounding in float64.

    The trapezoidal rule, exponentially exact for analytic functions: over the Gaussian while its width is below 4, and otherwise with
    the roles changed, E[σ(f)] = P(f > t) for a logistic t = ∫ σ'(t) Φ((mean − t) / width) dt, which is smooth where the Gaussian is wide.
    """
    z, w_z, t, w_t = (g.to(device=mean.device, dtype=mean.dtype) for g in _grids())
    m, s = mean.unsqueeze(-1), variance.clamp_min(0).unsqueeze(-1)
    wide = s > 16.0
    # √ has no slope at 0, so a tiny variance stands for none: the gradient stays finite.
    narrow = (m + torch.where(wide, 1.0, s).clamp_min(torch.finfo(s.dtype).tiny).sqrt() * z).sigmoid() @ w_z
    broad = torch.special.ndtr((m - t) / torch.where(wide, s, 16.0).sqrt()) @ w_t
    return torch.where(wide.squeeze(-1), broad, narrow)
