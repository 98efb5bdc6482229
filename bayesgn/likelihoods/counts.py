"""Counts: Poisson and negative binomial with an exponential link."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor

from .base import Elementwise, Integrals, Positive, _constant, _like

__all__ = ["Counts", "NegativeBinomial", "Poisson", "draw_negative_binomial"]


class Counts(Elementwise):
    """What families of counts share: the targets."""

    def _validate_targets(self, f, y):
        bad = ~y.isnan() & ((y < 0) | (y != y.round()) | y.isinf())
        self._refuse(y, bad, "counts are integers from 0 on (NaN: missing)",
                     "use Gaussian() or Gamma() for continuous targets, and Poisson(exposure=…) rather than dividing counts")


class Poisson(Counts):
    """y ∈ {0, 1, 2 …} with rate exposure · e^f, each output by itself.

    With η = f + log exposure:   log p = y η − e^η − log y!,   ∂ = y − e^η,   Λ = e^η for the Hessian and the GGN alike.

    Args:
        exposure: time, area or population that all rows share, a scalar or [c] (an offset of its logarithm in f).
    Shapes: f [... c], y [... c] (or [...] for c = 1). e^f overflows above f = 709 in float64 (88 in float32).
    The predictive is a mixture of Poissons over the marginal of each output, event [c].

    >>> Poisson().gradient(torch.tensor([[0.0]]), torch.tensor([3]))
    tensor([[2.]])

    Source: McCullagh & Nelder (1989), chapter 6.
    """

    exposure: Tensor

    def __init__(self, exposure: float | Tensor = 1.0):
        super().__init__()
        exposure = _constant(exposure)
        if not bool(((exposure > 0) & exposure.isfinite()).all()):
            raise ValueError(f"Poisson: exposure must be positive and finite but is {exposure.tolist()}")
        self.register_buffer("exposure", exposure)

    def _eta(self, f):
        return f + _like(self.exposure, f).log()

    def _log_prob(self, f, y):
        eta = self._eta(f)
        return y * eta - eta.exp() - torch.lgamma(y + 1)

    def _gradient(self, f, y):
        return y - self._eta(f).exp()

    def _neg_hessian(self, f, y):
        return self._eta(f).exp().expand_as(f)

    def _fisher(self, f):
        return self._eta(f).exp()

    def _family(self, f):
        return td.Poisson, {"rate": self._eta(f).exp()}

    def expected(self, mean, cov, y):
        # E[e^η] = e^{E η + ½ var η} for each output by itself
        observed, y = self._observed(mean, y)
        eta = self._eta(mean)
        rate = (eta + 0.5 * cov.diagonal(dim1=-2, dim2=-1)).exp()
        value = self._only_observed(y * eta - rate - torch.lgamma(y + 1), observed).sum(-1)
        bend = torch.diag_embed(self._only_observed(rate, observed))
        return Integrals(value, self._only_observed(y - rate, observed), bend, bend)

    def sample(self, f, generator=None):
        rate = self._eta(f).exp()
        return torch.poisson(rate if generator is None else rate.to(generator.device), generator=generator).to(f.device)

    def moments(self, f):
        rate = self._eta(f).exp()
        return rate, rate

    def arguments(self):
        return {"exposure": self.exposure}


class NegativeBinomial(Counts):
    """Counts with mean μ = e^f and variance μ + μ² / concentration: Poisson with a Gamma-distributed rate, each output by itself.

    With z = f − log r, r = concentration, σ the logistic function:
    log p = log Γ(y + r) − log Γ(r) − log y! + r log σ(−z) + y log σ(z),   ∂ = y σ(−z) − r σ(z),
    −∂² = (y + r) σ(z) σ(−z),   Fisher = r σ(z). Finite for every f.

    Args:
        concentration: r > 0, a scalar or [c], learned; r → ∞ is Poisson.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> NegativeBinomial(2.0).moments(torch.tensor([[0.0]]))[1]
    tensor([[1.5000]], grad_fn=<AddBackward0>)

    Source: Hilbe (2011), "Negative Binomial Regression", NB2.
    """

    concentration: Positive = Positive()
    log_concentration: Tensor

    def __init__(self, concentration: float | Tensor = 1.0):
        super().__init__()
        self.concentration = concentration

    def _z(self, f):
        return f - _like(self.log_concentration, f)

    def _log_prob(self, f, y):
        r, z = _like(self.concentration, f), self._z(f)
        log_binomial = torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1)
        return log_binomial + r * torch.nn.functional.logsigmoid(-z) + y * torch.nn.functional.logsigmoid(z)

    def _gradient(self, f, y):
        z = self._z(f)
        return y * (-z).sigmoid() - _like(self.concentration, f) * z.sigmoid()

    def _neg_hessian(self, f, y):
        z = self._z(f)
        return (y + _like(self.concentration, f)) * z.sigmoid() * (-z).sigmoid()

    def _fisher(self, f):
        return _like(self.concentration, f) * self._z(f).sigmoid()

    def _family(self, f):
        return td.NegativeBinomial, {"total_count": _like(self.concentration, f).expand_as(f), "logits": self._z(f)}

    def sample(self, f, generator=None):
        return draw_negative_binomial(_like(self.concentration, f).expand_as(f), self._z(f).exp(), generator)

    def moments(self, f):
        mean = f.exp()
        return mean, mean + mean.square() / _like(self.concentration, f)

    def arguments(self):
        return {"concentration": self.concentration.detach()}


def draw_negative_binomial(r: Tensor, odds: Tensor, generator: torch.Generator | None) -> Tensor:
    """Counts with mean r · odds: Poisson with a Gamma(r)-distributed rate."""
    rate = torch._standard_gamma(r.to(generator.device if generator else r.device), generator=generator).to(r.device) * odds
    return torch.poisson(rate if generator is None else rate.to(generator.device), generator=generator).to(r.device)
