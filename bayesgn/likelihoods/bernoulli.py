"""Binary outcomes, one or several labels for each datum."""

from __future__ import annotations

import warnings

import torch
import torch.distributions as td

from .base import Elementwise, Integrals, _rand
from .links import BinaryLink, Logit, NormCDF
from .predictives import PerRow

__all__ = ["Bernoulli"]


class Bernoulli(Elementwise):
    """y ∈ {0, 1} with p(y = 1 | f) = g(f), each output by itself (multi-label for c > 1).

    With z = (2 y − 1) f:   log p = log g(z),   ∂ = (2 y − 1) g'(z) / g(z),   Fisher = g'² / (g (1 − g)).

    Args:
        link: `Logit()` (default) or `NormCDF()` (probit regression).
    Shapes: f [... c], y [... c] (or [...] for c = 1), bool, integer or float 0/1; NaN is a missing label.
    The predictive is independent Bernoullis with event [c] (`.probs` [... c]): E[g(f)] exactly for each output, in closed form for NormCDF
    and by quadrature to rounding for Logit; from samples, the averaged probability. Correlation between labels is left out.

    >>> likelihood = Bernoulli()
    >>> likelihood.gradient(torch.tensor([[0.0]]), torch.tensor([1]))
    tensor([[0.5000]])
    >>> likelihood(torch.distributions.MultivariateNormal(torch.zeros(1, 1), torch.eye(1))).probs
    tensor([[0.5000]])

    Source: Rasmussen & Williams (2006), section 3.3.
    """

    def __init__(self, link: BinaryLink | None = None):
        super().__init__()
        self.link = Logit() if link is None else link
        if not isinstance(self.link, BinaryLink):
            raise TypeError(f"Bernoulli: link is {link!r} but should be Logit() or NormCDF(), the latter for probit regression")

    def _validate_targets(self, f, y):
        self._refuse(y, (y != 0) & (y != 1) & ~y.isnan(), "labels are 0 or 1 (NaN: missing)",
                     "encode labels as 0/1, or use Categorical() for several exclusive classes")

    def _suspect(self, f):
        if f.numel() >= 16 and bool(((f >= 0) & (f <= 1)).all()) and bool((f != 0).any()):  # (all 0: a net that starts at zero)
            warnings.warn(f"Bernoulli: all {f.numel()} latent values lie in [0, 1] (first {[round(v, 4) for v in f.flatten()[:4].tolist()]}), so "
                          "the net's output seems to have passed a sigmoid already; logits are expected: take the sigmoid out of the net, "
                          "pass its logit, or use FromDistribution(lambda f: torch.distributions.Bernoulli(probs=f))", stacklevel=3)

    def _log_prob(self, f, y):
        return self.link.log((2 * y - 1) * f)

    def _gradient(self, f, y):
        return (2 * y - 1) * self.link.slope((2 * y - 1) * f)

    def _neg_hessian(self, f, y):
        return self.link.bend((2 * y - 1) * f)

    def _fisher(self, f):
        return self.link.fisher(f)

    def _family(self, f):
        return td.Bernoulli, {"logits": self.link.log(f) - self.link.log(-f)}

    def sample(self, f, generator=None):
        return (_rand(f, generator).log() < self.link.log(f)).to(f.dtype)

    def moments(self, f):
        p, q = self.link.log(f).exp(), self.link.log(-f).exp()
        return p, p * q

    def tilted(self, mean, cov, y, power):
        # E[Φ(s f)] = Φ(s m / √(1 + v)), s = ±1: in closed form for one label and α = 1.
        if mean.shape[-1] > 1 or power != 1 or not isinstance(self.link, NormCDF):
            return None
        observed, y = self._observed(mean, y)
        v = cov[..., 0]
        s, width = 2 * y - 1, (1 + v).sqrt()
        z = s * mean / width
        keep = lambda values: self._only_observed(values, observed)
        gradient, bend = keep(s * self.link.slope(z) / width), keep(self.link.bend(z) / width.square())
        return Integrals(keep(self.link.log(z)).sum(-1), gradient, bend.unsqueeze(-1), keep(self.link.tilted_fisher(s * mean, v)).unsqueeze(-1))

    def predict(self, mean, cov):
        variance = cov.diagonal(dim1=-2, dim2=-1)
        # Both tails by themselves: 1 − p would lose a small probability of the other label.
        return _from_tails(self.link.expected(mean, variance), self.link.expected(-mean, variance))

    def predict_from_samples(self, samples):
        return _from_tails(self.link.log(samples).exp().mean(0), self.link.log(-samples).exp().mean(0))

    def arguments(self):
        return {"link": self.link}


def _from_tails(p, q):
    tiny = torch.finfo(p.dtype).tiny
    return PerRow(td.Bernoulli(logits=p.clamp_min(tiny).log() - q.clamp_min(tiny).log(), validate_args=False))
