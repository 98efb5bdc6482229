"""Ordered levels cut from one latent."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .base import Likelihood, _as_parameter, _like
from .links import logistic_normal

__all__ = ["Ordinal"]


class Ordinal(Likelihood):
    """y ∈ {0 … K−1}, ordered, with p(y ≤ k | f) = σ(b_k − f): proportional odds with learned cutpoints b_0 < … < b_{K−2}.

    With u = b_y − f and l = b_{y−1} − f (±∞ at the ends), σ(u) − σ(l) = σ(u) σ(−l) (1 − e^{l−u}), so
    log p = log σ(u) + log σ(−l) + log(1 − e^{l−u}),   ∂ = σ(l) − σ(−u),   −∂² = σ(u) σ(−u) + σ(l) σ(−l),   Fisher = Σ_k p_k (−∂²)_k.

    Args:
        cutpoints: increasing, [K−1]; learned through the first one and the logarithms of the gaps. Or an integer K: spread evenly.
        ignore_index: the label of a missing row.
    Shapes: f [... 1], y [...] (or [... 1]) of any integer dtype. `moments` are those of the number y, [...].
    The predictive is a torch Categorical over the K levels, integrated to rounding.

    >>> likelihood = Ordinal([-1.0, 1.0])
    >>> likelihood.conditional(torch.zeros(1, 1)).probs.detach()
    tensor([[0.2689, 0.4621, 0.2689]])

    Source: McCullagh (1980), "Regression models for ordinal data", section 2; as GP likelihood, Chu & Ghahramani (2005).
    """

    def __init__(self, cutpoints: int | Tensor | list[float] = 3, ignore_index: int = -100):
        super().__init__()
        if isinstance(cutpoints, int):
            if cutpoints < 2:
                raise ValueError(f"Ordinal: {cutpoints} levels leave nothing to learn; give at least 2, or the cutpoints themselves")
            cutpoints = torch.logit(torch.arange(1, cutpoints, dtype=torch.float64) / cutpoints)
        cutpoints = _as_parameter(cutpoints)
        if cutpoints.ndim != 1 or len(cutpoints) < 1 or not bool((cutpoints.diff() > 0).all()) or not bool(cutpoints.isfinite().all()):
            raise ValueError(f"Ordinal: cutpoints must increase strictly, one less than there are levels, but are {cutpoints.tolist()}")
        self.first = nn.Parameter(cutpoints[0].clone())
        self.log_gaps = nn.Parameter(cutpoints.diff().log())
        self.ignore_index = int(ignore_index)

    @property
    def cutpoints(self) -> Tensor:
        """b [K−1]."""
        return torch.cat([self.first[None], self.first + self.log_gaps.exp().cumsum(0)])

    def _check_width(self, f):
        if f.shape[-1] != 1:
            raise ValueError(f"Ordinal: f has shape {list(f.shape)} but levels are cut from one latent, [... 1]; "
                             "give the net one output (a Gaussian process one kernel), or use Categorical() for unordered classes")

    def target_shape(self, f):
        self._check_width(f)
        return f.shape[:-1]

    def _validate_targets(self, f, y):
        if y.is_floating_point():
            raise TypeError(f"Ordinal: y has dtype {y.dtype} but levels are integers; use y.long()")
        K, y = len(self.log_gaps) + 2, y.long()
        self._refuse(y, ((y < 0) | (y >= K)) & (y != self.ignore_index), f"there are {K} levels, 0 to {K - 1}",
                     f"count levels from 0, give more cutpoints, or mark rows to leave out by ignore_index={self.ignore_index}")

    def _observed(self, f, y):
        y = self.targets(f, y).long()
        observed = y != self.ignore_index
        return observed, torch.where(observed, y, 0)

    def _levels(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p [... K], ∂ [... K] and −∂² [... K] of every level."""
        self._check_width(f)
        b = _like(self.cutpoints, f) - f                                              # [... K−1]
        below, above = logsigmoid(b), logsigmoid(-b)                                  # log σ(u), log σ(−l)
        zero = torch.zeros_like(f)
        gap = torch.log(-torch.expm1(-_like(self.log_gaps.exp(), f))).expand(*f.shape[:-1], -1)
        log_p = torch.cat([below, zero], -1) + torch.cat([zero, above], -1) + torch.cat([zero, gap, zero], -1)
        gradient = torch.cat([zero, b.sigmoid()], -1) - torch.cat([(-b).sigmoid(), zero], -1)
        bend = b.sigmoid() * (-b).sigmoid()
        return log_p, gradient, torch.cat([bend, zero], -1) + torch.cat([zero, bend], -1)

    def _of(self, values: Tensor, f: Tensor, y: Tensor) -> Tensor:
        observed, y = self._observed(f, y)
        return torch.where(observed, values.gather(-1, y.unsqueeze(-1)).squeeze(-1), 0.0)

    def conditional(self, f):
        return td.Categorical(logits=self._levels(f)[0])

    def log_prob(self, f, y):
        return self._of(self._levels(f)[0], f, y)

    def gradient(self, f, y):
        return self._of(self._levels(f)[1], f, y).unsqueeze(-1)

    def neg_hessian(self, f, y):
        return self._of(self._levels(f)[2], f, y)[..., None, None]

    def ggn(self, f, y=None):
        log_p, _, bend = self._levels(f)
        fisher = (log_p.exp() * bend).sum(-1)
        fisher = fisher if y is None else torch.where(self._observed(f, y)[0], fisher, 0.0)
        return fisher[..., None, None]

    def ggn_root(self, f, y=None):
        return self.ggn(f, y).sqrt()

    def sample(self, f, generator=None):
        log_p = self._levels(f)[0].detach()
        p = log_p.exp().reshape(-1, log_p.shape[-1])
        return torch.multinomial(p if generator is None else p.to(generator.device), 1, generator=generator).reshape(f.shape[:-1]).to(f.device)

    def moments(self, f):
        p = self._levels(f)[0].exp()
        k = torch.arange(p.shape[-1], dtype=f.dtype, device=f.device)
        mean = p @ k
        return mean, (p * (k - mean.unsqueeze(-1)).square()).sum(-1)

    def latents_for(self, d):
        return 1

    def observed(self, f, y):
        return self._observed(f, y)[0]

    def response(self, f, y):
        """The level as a number [... 1], NaN where it is missing."""
        observed, y = self._observed(f, y)
        return torch.where(observed, y.to(f.dtype), torch.nan).unsqueeze(-1)

    def conditional_moments(self, f):
        mean, variance = self.moments(f)
        return mean.unsqueeze(-1), variance[..., None, None]

    def predict(self, mean, cov):
        self._check_width(mean)
        b = _like(self.cutpoints, mean) - mean
        variance = cov[..., 0].expand(b.shape)
        below, above = logistic_normal(b, variance), logistic_normal(-b, variance)     # p(y ≤ k), p(y > k), each to its own rounding
        # The middle levels as the difference of the smaller tails.
        middle = torch.where(b[..., 1:] + b[..., :-1] < 0, below[..., 1:] - below[..., :-1], above[..., :-1] - above[..., 1:]).clamp_min(0)
        return td.Categorical(probs=torch.cat([below[..., :1], middle, above[..., -1:]], -1))

    def predict_from_samples(self, samples):
        return td.Categorical(probs=self._levels(samples)[0].exp().mean(0))

    def arguments(self):
        return {"cutpoints": self.cutpoints.detach(), "ignore_index": self.ignore_index}
