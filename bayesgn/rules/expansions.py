"""Expansions: around what is the loss at a datum bent into a quadratic? With a curvature, an expansion is a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature, cubature_for
from bayesgn.rules.curvatures import Curvature, GaussNewton
from bayesgn.rules.integrals import log_integral, pieces, spread
from bayesgn.rules.local import Local, outer
from bayesgn.rules.sites import Marginals, Sites, Turn


class Expansion(ABC):
    """A rule: from the belief q(f_n) at each datum and y_n to the site that stands for p(y_n | f_n).

    Every method is one update with a functional L_n of its own:

        gradient g = ∂L_n/∂m,   Λ ≈ −∂²L_n/∂m²,   nat ← (1 − lr) nat + lr (g + Λ m, Λ),
        log evidence ≈ log Z_sites + Σ_n ( L_n[p(y_n|·)] − L_n[t_n] ).

    The gradient is always the true one; the curvature is an argument. At a fixed point the prior's pull balances that gradient, whatever Λ:
    under :class:`Laplace` the mean is the exact mode for every curvature, under the others as exact as the covariance that Λ leaves.

    Args:
        curvature: which Λ; :class:`GaussNewton` unless told otherwise.

    Source: Wilkinson, Särkkä and Solin (2023), "Bayes-Newton methods for approximate Bayesian inference with PSD guarantees", sec. 3.
    """

    power = 0.0  # α by which a sparse model averages a site over what its inducing variables leave open; 0: the expectation of its logarithm
    bound = False  # whether log Z_sites + Σ term is a lower bound of the log evidence, whatever the sites

    def __init__(self, curvature: Curvature | None = None) -> None:
        self.curvature = GaussNewton() if curvature is None else curvature
        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"curvature={curvature!r}; expected an instance such as rules.GaussNewton().")

    @abstractmethod
    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        """What the expansion knows of these data: where the quadratic touches, the slope there, curvatures on request."""

    @abstractmethod
    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        """L_n[p(y_n|·)] − L_n[t_n] of each datum [n]; differentiable in q and in the likelihood's parameters."""

    def climbs(self, turn: Turn) -> bool:
        """Whether the turn went along the natural gradient of the energy, so that a step that is short enough cannot lower it."""
        return self.bound and self.curvature.exact and turn.indefinite == 0

    @torch.no_grad()
    def __call__(
        self, likelihood, q: Marginals, y: Tensor, sites: Sites, lr: float = 1.0, generator: torch.Generator | None = None
    ) -> Turn:
        """New sites for the data of q, without a graph. A datum whose new site would not be finite keeps its old one."""
        return self.renew(likelihood, q, y, sites, lr, generator)

    def renew(
        self, likelihood, q: Marginals, y: Tensor, sites: Sites, lr: float = 1.0, generator: torch.Generator | None = None
    ) -> Turn:
        """What a call gives, differentiable in q, the sites and the likelihood's parameters."""
        local = self.local(likelihood, q, y, sites)
        bent = self.curvature.bend(local, sites.memory, generator)
        nat2 = self.curvature.blend(sites.nat2, bent.matrix, lr)
        target = local.gradient + (bent.matrix @ local.at.unsqueeze(-1)).squeeze(-1)
        nat1 = (1 - lr) * sites.nat1 + lr * target
        # What a curvature adds beyond the mixture bends around the mean: no slope comes in.
        extra = nat2 - ((1 - lr) * sites.nat2 + lr * bent.matrix)
        nat1 = nat1 + (extra @ q.mean.unsqueeze(-1)).squeeze(-1)
        good = local.valid & nat1.isfinite().all(-1) & nat2.isfinite().flatten(1).all(-1)
        memory = bent.memory
        skipped = int((~good).sum())
        if skipped:
            nat1 = torch.where(good[:, None], nat1, sites.nat1)
            nat2 = torch.where(good[:, None, None], nat2, sites.nat2)
            old = sites.memory or tuple(torch.zeros_like(t) for t in memory)
            memory = tuple(torch.where(good.reshape(-1, *[1] * (new.dim() - 1)), new, t) for new, t in zip(memory, old, strict=True))
        return Turn(Sites(nat1, nat2, memory), bent.indefinite, skipped, local, good)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v is not None)
        return f"{type(self).__name__}({shown})"


class Integral(Expansion):
    """An expansion that takes expectations, by a cubature rule.

    Args:
        cubature: :class:`GaussHermite`, :class:`Unscented`, :class:`MonteCarloCubature`; by the number of latents unless given.
    """

    def __init__(self, curvature: Curvature | None = None, cubature: Cubature | None = None) -> None:
        super().__init__(curvature)
        if cubature is not None and not isinstance(cubature, Cubature):
            raise TypeError(f"cubature={cubature!r}; expected an instance such as rules.GaussHermite(20).")
        self.cubature = cubature

    def rule_for(self, q: Marginals) -> Cubature:
        return cubature_for(q.mean.shape[-1]) if self.cubature is None else self.cubature


class Laplace(Expansion):
    """Expand log p(y|f) at the belief's mean, L_n = log p(y_n | m_n): Laplace's method, and Newton's.

    Example:
        >>> from bayesgn import rules
        >>> rules.Laplace(curvature=rules.MonteCarloFisher(samples=4))
        Laplace(curvature=MonteCarloFisher(samples=4))
    """

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S [n r k] with Λ = SSᵀ at f [n *positions c]."""
        return self.curvature.root(likelihood, f, y, generator)

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        return _AtMean(likelihood, q, y)

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        return likelihood.log_prob(q.mean, y) - sites.log_at(q.mean)


class _AtMean(Local):
    def __init__(self, likelihood, q: Marginals, y: Tensor) -> None:
        again = lambda place: _AtMean(likelihood, Marginals(place, q.cov), y)
        super().__init__(q.mean, q.cov, likelihood.gradient(q.mean, y), again, value=lambda m: likelihood.log_prob(m, y))
        self.likelihood, self.y = likelihood, y

    def fisher(self) -> Tensor:
        return self.likelihood.ggn(self.at, self.y)

    def hessian(self) -> Tensor:
        return self.likelihood.neg_hessian(self.at, self.y)

    def outer(self) -> Tensor:
        return outer(self.gradient)


class Variational(Integral):
    """The variational bound, L_n = E_q[log p(y_n | f)]: natural-gradient variational inference.

        g = E_q[∂ log p],   Λ = E_q[−∂² log p] (Exact) or E_q[Fisher] (GaussNewton)

    Example:
        >>> from bayesgn import rules
        >>> rules.Variational(curvature=rules.Exact(), cubature=rules.GaussHermite(10))
        Variational(curvature=Exact(psd=eigclip), cubature=GaussHermite(points=10))

    Source: Khan and Lin (2017), "Conjugate-computation variational inference"; Opper and Archambeau (2009).
    """

    bound = True

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        again = lambda place: self.local(likelihood, Marginals(place, q.cov), y, sites)
        value = lambda place: self.value(likelihood, Marginals(place, q.cov), y)
        closed = likelihood.expected(q.mean, q.cov, y)
        if closed is None:
            return _Averaged(likelihood, q, y, self.rule_for(q), again, value)
        return _Known(q, closed, again, value, lambda: _Averaged(likelihood, q, y, self.rule_for(q), again, value))

    def value(self, likelihood, q: Marginals, y: Tensor) -> Tensor:
        """E_q[log p(y_n | f)] [n]."""
        closed = likelihood.expected(q.mean, q.cov, y)
        return log_integral(likelihood, q, y, self.rule_for(q)) if closed is None else closed.value

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        return self.value(likelihood, q, y) - sites.expected_log(q)


class _Known(Local):
    """In closed form, as the likelihood gives it."""

    def __init__(self, q: Marginals, closed: Any, again, value, averaged: Callable[[], Local]) -> None:
        super().__init__(q.mean, q.cov, closed.gradient, again, value)
        self.closed, self.averaged = closed, averaged

    def fisher(self) -> Tensor:
        return self.closed.fisher

    def hessian(self) -> Tensor:
        return self.closed.neg_hessian

    def outer(self) -> Tensor:
        return self.averaged().outer()  # E g gᵀ is not (E g)(E g)ᵀ


class _Averaged(Local):
    """By a sum over nodes."""

    def __init__(self, likelihood, q: Marginals, y: Tensor, cubature: Cubature, again, value) -> None:
        f, w = cubature(q.mean, q.cov)
        self.sums = Sums(likelihood, y, f, w)
        super().__init__(q.mean, q.cov, self.sums.gradient(), again, value, signed=bool((w < 0).any()))

    def fisher(self) -> Tensor:
        return self.sums.fisher()

    def hessian(self) -> Tensor:
        return self.sums.hessian()

    def outer(self) -> Tensor:
        return self.sums.outer()


class Sums:
    """Weighted sums over nodes f [q n c] with weights w [q], or [q n] where they differ from datum to datum."""

    def __init__(self, likelihood, y: Tensor, f: Tensor, w: Tensor) -> None:
        self.likelihood = likelihood
        self.parts = [(f[:, rows], w if w.dim() == 1 else w[:, rows], spread(y[rows], f)) for rows in pieces(f)]
        self._sum = "q,qn...->n..." if w.dim() == 1 else "qn,qn...->n..."

    def average(self, h: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ_q w_q h(f_q, y) [n …]."""
        return torch.cat([torch.einsum(self._sum, w, h(f, y)) for f, w, y in self.parts])

    def gradient(self) -> Tensor:
        return self.average(self.likelihood.gradient)

    def scores(self) -> Tensor:
        """∂ log p at every node [q n c]."""
        return torch.cat([self.likelihood.gradient(f, y) for f, _, y in self.parts], 1)

    def fisher(self) -> Tensor:
        return self.average(self.likelihood.ggn)

    def hessian(self) -> Tensor:
        return self.average(self.likelihood.neg_hessian)

    def outer(self) -> Tensor:
        return self.average(lambda f, y: outer(self.likelihood.gradient(f, y)))
