"""Student's t noise: a Gaussian that forgives outliers."""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

from .base import Elementwise, Positive, _like, _randn

__all__ = ["StudentT"]


class StudentT(Elementwise):
    """y = f + scale · t, t ~ Student's t with dof degrees of freedom, each output by itself.

    With e = y − f, ν = dof, s = scale:   ∂ = (ν + 1) e / (ν s² + e²),   −∂² = (ν + 1)(ν s² − e²) / (ν s² + e²)²  (negative for outliers),
    Fisher = (ν + 1) / ((ν + 3) s²).

    Args:
        dof: ν > 0, a scalar or [c], learned.
        scale: s > 0 in units of y, a scalar or [c], learned; the variance is s² ν / (ν − 2) for ν > 2.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> StudentT(dof=3.0, scale=1.0).ggn(torch.zeros(1, 1))
    tensor([[[0.6667]]], grad_fn=<DiagEmbedBackward0>)

    Source: Lange, Little & Taylor (1989); Rasmussen & Williams (2006), equation 9.5.
    """

    dof: Positive = Positive()
    scale: Positive = Positive()

    def __init__(self, dof: float | Tensor = 4.0, scale: float | Tensor = 1.0):
        super().__init__()
        self.dof = dof
        self.scale = scale

    def _validate_targets(self, f, y):
        self._refuse(y, y.isinf(), "targets must be finite (NaN marks a missing one)", "clean the data or mark such targets as NaN")

    def _parameters_like(self, f):
        return _like(self.dof, f), _like(self.scale, f).square()

    def _log_prob(self, f, y):
        nu, s2 = self._parameters_like(f)
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi * s2).log()
        return constant - (nu + 1) / 2 * torch.log1p((y - f).square() / (nu * s2))

    def _gradient(self, f, y):
        nu, s2 = self._parameters_like(f)
        e = y - f
        return (nu + 1) * e / (nu * s2 + e.square())

    def _neg_hessian(self, f, y):
        nu, s2 = self._parameters_like(f)
        e2 = (y - f).square()
        return (nu + 1) * (nu * s2 - e2) / (nu * s2 + e2).square()

    def _fisher(self, f):
        nu, s2 = self._parameters_like(f)
        return ((nu + 1) / ((nu + 3) * s2)).expand_as(f)

    def _family(self, f):
        return td.StudentT, {"df": _like(self.dof, f).expand_as(f), "loc": f, "scale": _like(self.scale, f).expand_as(f)}

    def sample(self, f, generator=None):
        half = (_like(self.dof, f) / 2).expand_as(f)
        gamma = torch._standard_gamma(half.to(generator.device if generator else f.device), generator=generator).to(f.device)
        return f + _like(self.scale, f) * _randn(f, generator) * (half / gamma).sqrt()

    def moments(self, f):
        return f, self.conditional(f).variance

    def arguments(self):
        return {"dof": self.dof.detach(), "scale": self.scale.detach()}
