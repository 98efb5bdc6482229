"""Counts decided in stages: is it zero? if not, is it one? … and a count for the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Likelihood, _rand
from .counts import Counts, Poisson
from .predictives import ByLikelihood

__all__ = ["MultiStage"]


class MultiStage(Likelihood):
    """y = 0 with probability σ(f_0); if not, y = 1 with probability σ(f_1); … after K stages y − K ~ rest(f_K), each with a latent of its own.

    log p(y = k) = log σ(f_k) + Σ_{j<k} log σ(−f_j) for k < K, and Σ_{j<K} log σ(−f_j) + log rest(y − K | f_K) beyond. The stages do not meet in
    log p, so Hessian and Fisher are diagonal; with ρ_k = Π_{j<k} σ(−f_j), the chance that stage k is reached: Fisher_k = ρ_k σ(f_k) σ(−f_k),
    and ρ_K times that of rest.

    Args:
        stages: K ≥ 1; one makes a hurdle model of intermittent demand.
        rest: a likelihood of counts with one latent, `Poisson()` unless given.
    Shapes: f [... K + 1], y [... 1] (or [...]); NaN is missing. The predictive is a mixture over nodes, event [1].

    >>> MultiStage(stages=2).log_prob(torch.zeros(1, 3), torch.tensor([1.0])).exp()  # ½ · ½
    tensor([0.2500])

    Source: Seeger, Salinas & Flunkert (2016), "Bayesian intermittent demand forecasting for large inventories", section 4.
    """

    def __init__(self, stages: int = 2, rest: Counts | None = None):
        super().__init__()
        if stages < 1:
            raise ValueError(f"MultiStage: stages={stages}; expected at least one (for none use the likelihood of counts itself)")
        self.stages = int(stages)
        self.rest = Poisson() if rest is None else rest
        if not isinstance(self.rest, Counts):
            raise TypeError(f"MultiStage: rest is {self.rest!r} but should be a likelihood of counts such as Poisson() or NegativeBinomial()")

    def target_shape(self, f):
        if f.shape[-1] != self.stages + 1:
            self._refuse_latents(f, f"{f.shape[-1]} latents", self.stages + 1, f"one for each of {self.stages} stages and one for the rest")
        return f.shape[:-1] + (1,)

    def latents_for(self, d):
        return self.stages + 1 if d == 1 else None

    def _validate_targets(self, f, y):
        self.rest._validate_targets(f, y)

    def _staged(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which stages decided for y and which were passed [... K] (neither where y is missing), and what is left for the rest [... 1]."""
        y = self.targets(f, y).to(f)
        k = torch.arange(self.stages, dtype=f.dtype, device=f.device)
        return y == k, y > k, torch.where(y >= self.stages, y - self.stages, torch.nan)

    def _split(self, f: Tensor) -> tuple[Tensor, Tensor]:
        self.target_shape(f)
        return f[..., : self.stages], f[..., self.stages :]

    def _reached(self, gates: Tensor) -> Tensor:
        """log ρ_0 … log ρ_K [... K + 1]."""
        passed = logsigmoid(-gates).cumsum(-1)
        return torch.cat([torch.zeros_like(passed[..., :1]), passed], -1)

    def conditional(self, f):
        return ByLikelihood(self, f)

    def log_prob(self, f, y):
        gates, g = self._split(f)
        decided, passed, left = self._staged(f, y)
        of_gates = torch.where(decided, logsigmoid(gates), 0.0) + torch.where(passed, logsigmoid(-gates), 0.0)
        return of_gates.sum(-1) + self.rest.log_prob(g, left)

    def gradient(self, f, y):
        gates, g = self._split(f)
        decided, passed, left = self._staged(f, y)
        of_gates = torch.where(decided, (-gates).sigmoid(), 0.0) - torch.where(passed, gates.sigmoid(), 0.0)
        return torch.cat([of_gates, self.rest.gradient(g, left)], -1)

    def neg_hessian(self, f, y):
        gates, g = self._split(f)
        decided, passed, left = self._staged(f, y)
        of_gates = torch.where(decided | passed, gates.sigmoid() * (-gates).sigmoid(), 0.0)
        return torch.diag_embed(torch.cat([of_gates, self.rest.neg_hessian(g, left)[..., 0]], -1))

    def _fisher(self, f: Tensor, y: Tensor | None) -> Tensor:
        gates, g = self._split(f)
        fisher = self._reached(gates).exp() * torch.cat([gates.sigmoid() * (-gates).sigmoid(), self.rest.ggn(g)[..., 0]], -1)
        return fisher if y is None else torch.where(self.targets(f, y).isnan(), 0.0, fisher)

    def ggn(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y))

    def ggn_root(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y).sqrt())

    def sample(self, f, generator=None):
        gates, g = self._split(f)
        passed = (_rand(gates, generator).log() >= logsigmoid(gates)).cumprod(-1)
        return torch.where(passed[..., -1:] == 1, self.stages + self.rest.sample(g, generator), passed.sum(-1, keepdim=True).to(f.dtype))

    def moments(self, f):
        gates, g = self._split(f)
        log_reached = self._reached(gates)
        p = (log_reached[..., :-1] + logsigmoid(gates)).exp()                                   # of y = 0 … K − 1
        k = torch.arange(self.stages, dtype=f.dtype, device=f.device)
        last = log_reached[..., -1:].exp()
        m, v = self.rest.moments(g)
        mean = (p * k).sum(-1, keepdim=True) + last * (self.stages + m)
        variance = (p * (k - mean).square()).sum(-1, keepdim=True) + last * (v + (self.stages + m - mean).square())
        return mean, variance

    def arguments(self):
        return {"stages": self.stages, "rest": self.rest}
