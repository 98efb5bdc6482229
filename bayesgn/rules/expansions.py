"""Expansions: around what is the loss at a datum bent into a quadratic? With a curvature, an expansion is a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature, cubature_for
from bayesgn.rules.curvatures import Curvature, GaussNewton, Local
from bayesgn.rules.sites import Marginals, Sites, Turn


class Expansion(ABC):
    """A rule: from the belief q(f_n) at each datum and y_n to the site that stands for p(y_n | f_n).

    Every method is one update with a functional L_n of its own:

        gradient g = ∂L_n/∂m,   Λ ≈ −∂²L_n/∂m²,   nat ← (1 − lr) nat + lr (g + Λ m, Λ),
        log evidence ≈ log Z_sites + Σ_n ( L_n[p(y_n|·)] − L_n[t_n] ).

    The gradient is always the true one; the curvature is an argument. So fixed points do not depend on the curvature.

    Args:
        curvature: which Λ; :class:`GaussNewton` unless told otherwise.

    Source: Wilkinson, Särkkä and Solin (2023), "Bayes-Newton methods for approximate Bayesian inference with PSD guarantees", sec. 3.
    """

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

    @torch.no_grad()
    def __call__(
        self, likelihood, q: Marginals, y: Tensor, sites: Sites, lr: float = 1.0, generator: torch.Generator | None = None
    ) -> Turn:
        """New sites for the data of q. A datum whose new site would not be finite keeps its old one."""
        local = self.local(likelihood, q, y, sites)
        bent = self.curvature.bend(local, sites.memory, generator)
        nat2 = self.curvature.blend(sites.nat2, bent.matrix, q.cov, lr)
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
            if sites.memory:
                memory = tuple(
                    torch.where(good.reshape(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(memory, sites.memory, strict=True)
                )
        return Turn(Sites(nat1, nat2, memory), bent.indefinite, skipped)

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
        super().__init__(q, likelihood.gradient(q.mean, y))
        self.likelihood, self.y = likelihood, y

    def fisher(self) -> Tensor:
        return self.likelihood.ggn(self.at, self.y)

    def hessian(self) -> Tensor:
        return self.likelihood.neg_hessian(self.at, self.y)

    def outer(self) -> Tensor:
        return self.gradient.unsqueeze(-1) * self.gradient.unsqueeze(-2)


class Variational(Integral):
    """The variational bound, L_n = E_q[log p(y_n | f)]: natural-gradient variational inference.

        g = E_q[∂ log p],   Λ = E_q[−∂² log p] (Exact) or E_q[Fisher] (GaussNewton)

    Example:
        >>> from bayesgn import rules
        >>> rules.Variational(curvature=rules.Exact(), cubature=rules.GaussHermite(10))
        Variational(curvature=Exact(psd=eigclip), cubature=GaussHermite(points=10))

    Source: Khan and Lin (2017), "Conjugate-computation variational inference"; Opper and Archambeau (2009).
    """

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        closed = likelihood.expected(q.mean, q.cov, y)
        return _Known(q, closed) if closed is not None else _Averaged(likelihood, q, y, *self.rule_for(q)(q.mean, q.cov))

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        closed = likelihood.expected(q.mean, q.cov, y)
        if closed is not None:
            return closed.value - sites.expected_log(q)
        f, w = self.rule_for(q)(q.mean, q.cov)
        return torch.einsum("q,q...->...", w, likelihood.log_prob(f, spread(y, f))) - sites.expected_log(q)


class _Known(Local):
    """In closed form, as the likelihood gives it."""

    def __init__(self, q: Marginals, closed: Any) -> None:
        super().__init__(q, closed.gradient)
        self.closed = closed

    def fisher(self) -> Tensor:
        return self.closed.fisher

    def hessian(self) -> Tensor:
        return self.closed.neg_hessian

    def outer(self) -> Tensor:
        return self.closed.gradient.unsqueeze(-1) * self.closed.gradient.unsqueeze(-2)


class _Averaged(Local):
    """Expectations over nodes f [q n c] with weights [q], or [q n] where they differ from datum to datum."""

    def __init__(self, likelihood, q: Marginals, y: Tensor, f: Tensor, w: Tensor) -> None:
        self.likelihood, self.y, self.f, self.w = likelihood, spread(y, f), f, w
        self.gradients = likelihood.gradient(f, self.y)
        super().__init__(q, self.average(self.gradients))

    def average(self, h: Tensor) -> Tensor:
        return torch.einsum("q,qn...->n..." if self.w.dim() == 1 else "qn,qn...->n...", self.w, h)

    def fisher(self) -> Tensor:
        return self.average(self.likelihood.ggn(self.f, self.y))

    def hessian(self) -> Tensor:
        return self.average(self.likelihood.neg_hessian(self.f, self.y))

    def outer(self) -> Tensor:
        return self.average(self.gradients.unsqueeze(-1) * self.gradients.unsqueeze(-2))


def spread(y: Tensor, f: Tensor) -> Tensor:
    """y for each of the nodes f [q n c]."""
    return y.expand(f.shape[0], *y.shape)
