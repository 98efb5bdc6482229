"""Targets on an interval: Gamma on (0, ∞) and Beta on (0, 1), both by their mean."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Elementwise, Integrals, Positive, _like

__all__ = ["Beta", "Gamma"]


def _draw_gamma(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    device = concentration.device if generator is None else generator.device
    return torch._standard_gamma(concentration.to(device), generator=generator).to(concentration.device)


class Gamma(Elementwise):
    """y > 0 with mean μ = e^f and variance μ² / concentration, each output by itself.

    With a = concentration:   log p = a log a − a f + (a − 1) log y − a y e^−f − log Γ(a),   ∂ = a (y e^−f − 1),   −∂² = a y e^−f,   Fisher = a.

    Args:
        concentration: a > 0, a scalar or [c], learned; a = 1 is the exponential distribution.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> Gamma(2.0).gradient(torch.zeros(1, 1), torch.tensor([3.0]))
    tensor([[4.]], grad_fn=<WhereBackward0>)

    Source: McCullagh & Nelder (1989), chapter 8, with the log link.
    """

    concentration: Positive = Positive()

    def __init__(self, concentration: float | Tensor = 1.0):
        super().__init__()
        self.concentration = concentration

    def _validate_targets(self, f, y):
        self._refuse(y, ((y <= 0) | y.isinf()) & ~y.isnan(), "targets lie in (0, ∞) (NaN: missing)",
                     "shift or drop zeros, or use Poisson() for counts and Gaussian() for signed targets")

    def _log_prob(self, f, y):
        a = _like(self.concentration, f)
        return a * a.log() - a * f + (a - 1) * y.log() - a * y * (-f).exp() - torch.lgamma(a)

    def _gradient(self, f, y):
        return _like(self.concentration, f) * (y * (-f).exp() - 1)

    def _neg_hessian(self, f, y):
        return _like(self.concentration, f) * y * (-f).exp()

    def _fisher(self, f):
        return _like(self.concentration, f).expand_as(f)

    def _family(self, f):
        a = _like(self.concentration, f)
        return td.Gamma, {"concentration": a.expand_as(f), "rate": a * (-f).exp()}

    def expected(self, mean, cov, y):
        # E[e^−f] = e^{−E f + ½ var f} for each output by itself
        observed, y = self._observed(mean, y)
        a = _like(self.concentration, mean)
        ratio = y * (-mean + 0.5 * cov.diagonal(dim1=-2, dim2=-1)).exp()
        value = a * a.log() - a * mean + (a - 1) * y.log() - a * ratio - torch.lgamma(a)
        keep = lambda values: self._only_observed(values, observed)
        return Integrals(keep(value).sum(-1), keep(a * (ratio - 1)), torch.diag_embed(keep(a * ratio)), torch.diag_embed(keep(a.expand_as(mean))))

    def sample(self, f, generator=None):
        a = _like(self.concentration, f).expand_as(f)
        return _draw_gamma(a, generator) / a * f.exp()

    def moments(self, f):
        mean = f.exp()
        return mean, mean.square() / _like(self.concentration, f)

    def arguments(self):
        return {"concentration": self.concentration.detach()}


class Beta(Elementwise):
    """y ∈ (0, 1) with mean m = σ(f) and variance m (1 − m) / (1 + concentration), each output by itself.

    y ~ Beta(m s, (1 − m) s), s = concentration. With m' = m (1 − m), ψ and ψ₁ the digamma and trigamma functions:
    ∂ = m' s [ψ((1 − m) s) − ψ(m s) + logit y],   Fisher = m'² s² [ψ₁(m s) + ψ₁((1 − m) s)],   −∂² = Fisher − (1 − 2 m) ∂.
    Written with ψ(x) = ψ(x + 1) − 1/x, so that everything stays finite where m underflows.

    Args:
        concentration: s > 0, a scalar or [c], learned.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> Beta(2.0).log_prob(torch.zeros(1, 1), torch.tensor([0.3])).abs() < 1e-6     # Beta(1, 1) is uniform
    tensor([True])

    Source: Ferrari & Cribari-Neto (2004), "Beta regression", equations 4-7.
    """

    concentration: Positive = Positive()
    placeholder = 0.5

    def __init__(self, concentration: float | Tensor = 2.0):
        super().__init__()
        self.concentration = concentration

    def _validate_targets(self, f, y):
        self._refuse(y, ((y <= 0) | (y >= 1)) & ~y.isnan(), "targets lie strictly between 0 and 1 (NaN: missing)",
                     "squeeze exact zeros and ones inwards, (y (n − 1) + 1/2) / n, or use Bernoulli() for 0/1 labels")

    def _log_prob(self, f, y):
        s, m, q = _like(self.concentration, f), f.sigmoid(), (-f).sigmoid()
        log_beta = torch.lgamma(m * s + 1) + torch.lgamma(q * s + 1) - 2 * s.log() - logsigmoid(f) - logsigmoid(-f) - torch.lgamma(s)
        return (m * s - 1) * y.log() + (q * s - 1) * torch.log1p(-y) - log_beta

    def _gradient(self, f, y):
        s, m, q = _like(self.concentration, f), f.sigmoid(), (-f).sigmoid()
        return s * m * q * (torch.digamma(q * s + 1) - torch.digamma(m * s + 1) + torch.logit(y)) + q - m

    def _neg_hessian(self, f, y):
        return self._fisher(f) - torch.tanh(-f / 2) * self._gradient(f, y)           # 1 − 2 m = tanh(−f / 2)

    def _fisher(self, f):
        s, m, q = _like(self.concentration, f), f.sigmoid(), (-f).sigmoid()
        trigamma = torch.polygamma(1, m * s + 1) + torch.polygamma(1, q * s + 1)
        return (s * m * q).square() * trigamma + q.square() + m.square()

    def _family(self, f):
        s = _like(self.concentration, f)
        return td.Beta, {"concentration1": s * f.sigmoid(), "concentration0": s * (-f).sigmoid()}

    def sample(self, f, generator=None):
        s = _like(self.concentration, f)
        a, b = _draw_gamma(s * f.sigmoid(), generator), _draw_gamma(s * (-f).sigmoid(), generator)
        eps = torch.finfo(f.dtype).eps
        return (a / (a + b).clamp_min(torch.finfo(f.dtype).tiny)).clamp(torch.finfo(f.dtype).tiny, 1 - eps)

    def moments(self, f):
        m, q = f.sigmoid(), (-f).sigmoid()
        return m, m * q / (1 + _like(self.concentration, f))

    def arguments(self):
        return {"concentration": self.concentration.detach()}
