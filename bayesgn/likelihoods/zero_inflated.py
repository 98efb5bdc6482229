"""Counts with more zeros than their mean explains."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from .base import Positive, _like, _rand
from .counts import Counts, draw_negative_binomial

__all__ = ["ZeroInflatedNegativeBinomial"]


class ZeroInflatedNegativeBinomial(Counts):
    """Counts lost with probability ψ, otherwise negative binomial with mean μ = e^f and variance μ + μ² / concentration; outputs by themselves.

    The chance of a loss falls with the mean (Michaelis-Menten): ψ = K / (K + μ) = σ(−κ), κ = f − log K, K = half_saturation. With NB's density,
    gradient b, negative Hessian h and Fisher t = r σ(z) (see `NegativeBinomial`), p₀ = ψ + (1 − ψ) NB(0), w = ψ/p₀, b₀ = −t, h₀ = t σ(−z):
    y > 0:   log p = log(1 − ψ) + log NB(y),   ∂ = σ(−κ) + b,   −∂² = σ(κ) σ(−κ) + h;
    y = 0:   log p = log p₀,   ∂ = s₀ = (1 − w) (σ(−κ) + b₀) − w σ(κ),   −∂² = σ(κ) σ(−κ) + (1 − w) h₀ − w (1 − w) (1 + b₀)²;
    Fisher = p₀ s₀² + (1 − ψ) [σ(−κ)² (1 − NB(0)) + t (1 + 2 NB(0) σ(−κ) − NB(0) t)].

    Args:
        concentration: r > 0, a scalar or [c], learned.
        half_saturation: K > 0, the mean at which half of the counts are lost, a scalar or [c], learned; K → 0 is `NegativeBinomial`.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> ZeroInflatedNegativeBinomial(2.0, half_saturation=1.0).moments(torch.zeros(1, 1))[0].detach()  # 1 · ½
    tensor([[0.5000]])

    Source: BinTayyash et al. (2021), "Non-parametric modelling of temporal and spatial counts data from RNA-seq experiments", section 2.3.
    """

    concentration: Positive = Positive()
    half_saturation: Positive = Positive()
    log_half_saturation: Tensor

    def __init__(self, concentration: float | Tensor = 1.0, half_saturation: float | Tensor = 1.0):
        super().__init__()
        self.concentration = concentration  # type: ignore[assignment]
        self.half_saturation = half_saturation  # type: ignore[assignment]

    def _terms(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """κ, z and r."""
        r = _like(self.concentration, f)
        return f - _like(self.log_half_saturation, f), f - r.log(), r

    def _zero(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p₀, log NB(0), w and 1 − w."""
        kappa, z, r = self._terms(f)
        log_nb = r * logsigmoid(-z)
        lost, counted = logsigmoid(-kappa), logsigmoid(kappa) + log_nb
        log_p0 = torch.logaddexp(lost, counted)
        return log_p0, log_nb, (lost - log_p0).exp(), (counted - log_p0).exp()

    def _log_prob(self, f, y):
        kappa, z, r = self._terms(f)
        log_binomial = torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1)
        counted = logsigmoid(kappa) + log_binomial + r * logsigmoid(-z) + y * logsigmoid(z)
        return torch.where(y > 0, counted, self._zero(f)[0])

    def _gradient(self, f, y):
        kappa, z, r = self._terms(f)
        return torch.where(y > 0, (-kappa).sigmoid() + y * (-z).sigmoid() - r * z.sigmoid(), self._slope_at_zero(f))

    def _slope_at_zero(self, f: Tensor) -> Tensor:
        kappa, z, r = self._terms(f)
        _, _, w, rest = self._zero(f)
        return rest * ((-kappa).sigmoid() - r * z.sigmoid()) - w * kappa.sigmoid()

    def _neg_hessian(self, f, y):
        kappa, z, r = self._terms(f)
        _, _, w, rest = self._zero(f)
        both = z.sigmoid() * (-z).sigmoid()
        of_zero = rest * r * both - w * rest * (1 - r * z.sigmoid()).square()
        return kappa.sigmoid() * (-kappa).sigmoid() + torch.where(y > 0, (y + r) * both, of_zero)

    def _fisher(self, f):
        kappa, z, r = self._terms(f)
        log_p0, log_nb, _, _ = self._zero(f)
        t, lost, nb = r * z.sigmoid(), (-kappa).sigmoid(), log_nb.exp()
        counted = lost.square() * -torch.expm1(log_nb) + t * (1 + 2 * nb * lost - nb * t)
        return log_p0.exp() * self._slope_at_zero(f).square() + kappa.sigmoid() * counted

    def _family(self, f):
        full = {"f": f, "concentration": _like(self.concentration, f), "log_half_saturation": _like(self.log_half_saturation, f)}
        return _ZeroInflated, {name: value.expand_as(f) for name, value in full.items()}

    def sample(self, f, generator=None):
        kappa, z, r = self._terms(f)
        counts = draw_negative_binomial(r.expand_as(f), z.exp(), generator)
        return torch.where(_rand(f, generator).log() < logsigmoid(kappa), counts, 0.0)

    def moments(self, f):
        kappa, _, r = self._terms(f)
        mean = f.exp() * kappa.sigmoid()
        return mean, mean * (1 + f.exp() * ((-kappa).sigmoid() + 1 / r))

    def arguments(self):
        return {"concentration": self.concentration.detach(), "half_saturation": self.half_saturation.detach()}


class _ZeroInflated(td.Distribution):
    """The distribution of each output, as torch would have it."""

    arg_constraints: dict = {}
    support = constraints.nonnegative_integer  # type: ignore[assignment]

    def __init__(self, f: Tensor, concentration: Tensor, log_half_saturation: Tensor, validate_args=None):
        self.f, self.concentration, self.log_half_saturation = f, concentration, log_half_saturation
        super().__init__(f.shape, validate_args=False)

    @property
    def _kept(self) -> Tensor:
        return (self.f - self.log_half_saturation).sigmoid()

    @property
    def mean(self) -> Tensor:
        return self.f.exp() * self._kept

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.f.exp() * (1 - self._kept + 1 / self.concentration))

    def log_prob(self, value: Tensor) -> Tensor:
        kappa, logits = self.f - self.log_half_saturation, self.f - self.concentration.log()
        counted = logsigmoid(kappa) + td.NegativeBinomial(self.concentration, logits=logits, validate_args=False).log_prob(value.to(self.f))
        return torch.where(value == 0, torch.logaddexp(logsigmoid(-kappa), counted), counted)

    def sample(self, sample_shape=torch.Size()):
        with torch.no_grad():
            logits = self.f - self.concentration.log()
            counts = td.NegativeBinomial(self.concentration, logits=logits, validate_args=False).sample(sample_shape)
            return counts * torch.bernoulli(self._kept.expand(counts.shape))

    def expand(self, batch_shape, _instance=None):
        return _ZeroInflated(*(value.expand(batch_shape) for value in (self.f, self.concentration, self.log_half_saturation)))
