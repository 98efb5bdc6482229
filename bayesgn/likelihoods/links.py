"""Links from latents to a likelihood's parameters: smooth functions of one latent with their derivatives, and distribution functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["BinaryLink", "Exp", "Link", "LogSoftplus", "Logit", "NormCDF", "PositiveLink", "Softplus", "logistic_normal"]


class Link(ABC):
    """A smooth increasing function g of one latent."""

    @abstractmethod
    def __call__(self, f: Tensor) -> Tensor:
        """g(f)."""

    @abstractmethod
    def slope(self, f: Tensor) -> Tensor:
        """g'(f)."""

    @abstractmethod
    def bend(self, f: Tensor) -> Tensor:
        """g''(f)."""

    def arguments(self) -> dict:
        """The constructor's arguments."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments().items())})"


class PositiveLink(Link):
    """g(f) > 0, with the derivatives of log g too: finite where g itself underflows."""

    exponent: float | None = None                    # k where g(f) = e^{kf}: expectations under a Gaussian are then in closed form

    @abstractmethod
    def log(self, f: Tensor) -> Tensor:
        """log g(f)."""

    @abstractmethod
    def log_slope(self, f: Tensor) -> Tensor:
        """(log g)'(f)."""

    @abstractmethod
    def log_bend(self, f: Tensor) -> Tensor:
        """(log g)''(f)."""


class Exp(PositiveLink):
    """g(f) = e^{rate f}. As the link of a standard deviation, rate = 1/2 makes the latent a log variance, rate = 1 a log standard deviation.

    >>> Exp(0.5)(torch.tensor(2.0))
    tensor(2.7183)
    """

    def __init__(self, rate: float = 1.0):
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"Exp: rate must be positive and finite but is {rate}")
        self.exponent = self.rate = float(rate)

    def __call__(self, f):
        return (self.rate * f).exp()

    def slope(self, f):
        return self.rate * self(f)

    def bend(self, f):
        return self.rate**2 * self(f)

    def log(self, f):
        return self.rate * f

    def log_slope(self, f):
        return torch.full_like(f, self.rate)

    def log_bend(self, f):
        return torch.zeros_like(f)

    def arguments(self):
        return {"rate": self.rate}


class LogSoftplus(Link):
    """g(f) = log log(1 + e^f): before a likelihood with an exponential link, such as `Poisson`, it makes the rate softplus(f).

    >>> LogSoftplus()(torch.tensor(0.0)).exp()  # log 2
    tensor(0.6931)
    """

    # Far below zero softplus(f) underflows and its derivatives cancel: there, with u = e^f, log softplus(f) = f − u/2 + 5u²/24 − u³/8 + O(u⁴).
    def __call__(self, f):
        far, u, near = _apart(f)
        return torch.where(far, f + u * (-1 / 2 + u * (5 / 24 - u / 8)), _softplus(near).log())

    def slope(self, f):
        far, u, near = _apart(f)
        return torch.where(far, 1 + u * (-1 / 2 + u * (5 / 12 - 3 / 8 * u)), near.sigmoid() / _softplus(near))

    def bend(self, f):
        far, u, near = _apart(f)
        r = near.sigmoid() / _softplus(near)
        return torch.where(far, u * (-1 / 2 + u * (5 / 6 - 9 / 8 * u)), r * ((-near).sigmoid() - r))


class Softplus(PositiveLink):
    """g(f) = log(1 + e^f): an exponential below zero, the identity above.

    >>> Softplus()(torch.tensor([-20.0, 0.0, 20.0]))
    tensor([2.0612e-09, 6.9315e-01, 2.0000e+01])
    """

    def __call__(self, f):
        return _softplus(f)

    def slope(self, f):
        return f.sigmoid()

    def bend(self, f):
        return f.sigmoid() * (-f).sigmoid()

    def log(self, f):
        return LogSoftplus()(f)

    def log_slope(self, f):
        return LogSoftplus().slope(f)

    def log_bend(self, f):
        return LogSoftplus().bend(f)


def _apart(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is far below zero, e^f there, and f elsewhere; harmless numbers in the places of the other."""
    far = f < -10
    return far, torch.where(far, f, -10.0).exp(), torch.where(far, -10.0, f)


def _softplus(f: Tensor) -> Tensor:
    return -logsigmoid(-f)                            # torch's softplus turns linear at 20, which costs 2e-9


class BinaryLink(ABC):
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


class Logit(BinaryLink):
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


class NormCDF(BinaryLink):
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

    def tilted_fisher(self, mean: Tensor, variance: Tensor) -> Tensor:
        """E[φ² / (Φ (1 − Φ))] for f under N(mean, variance) Φ(f) / Z, by the trapezoidal rule over that (skew-normal) density."""
        # A variance far below rounding stands for none. Nodes 9 widths around the tilted mean, and within |f| < 12, beyond which fisher < 1e-30.
        m, v = mean.unsqueeze(-1), torch.maximum(variance, 1e3 * torch.finfo(mean.dtype).eps * (1 + mean.square())).unsqueeze(-1)
        z = m / (1 + v).sqrt()
        r = self.slope(z)
        centre, width = m + v * r / (1 + v).sqrt(), (v - v.square() / (1 + v) * self.bend(z)).clamp_min(0).sqrt()
        low, high = (centre - 9 * width).clamp(-12, 12), (centre + 9 * width).clamp(-12, 12)
        f = low + (high - low) * torch.linspace(0, 1, 201, dtype=mean.dtype, device=mean.device)
        log_tilted = self.log(f) - self.log(z) - 0.5 * ((f - m).square() / v + (2 * math.pi * v).log())
        return (log_tilted.exp() * self.fisher(f)).sum(-1) * (high - low).squeeze(-1) / 200


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
