"""Power expectation propagation: match the moments of cavity × likelihood^α."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature, root
from bayesgn.rules.curvatures import Curvature
from bayesgn.rules.expansions import Integral, Sums
from bayesgn.rules.integrals import log_density, log_integral, log_sum
from bayesgn.rules.local import Local
from bayesgn.rules.placing import Placed, place
from bayesgn.rules.sites import Marginals, Sites, gaussian_log_integral


class PowerEP(Integral):
    """Power EP, L_n = 1/α log E_cavity[p(y_n | f)^α], the cavity q(f) / t_n(f)^α; EP for α = 1, variational inference as α → 0.

    With g, H the gradient and Hessian of log E_cavity[p^α] in the cavity's mean m, and C its covariance:

        mean of the tilted density μ = m + C g,   Λ = −1/α H (I + C H)⁻¹ (Exact),   nat1 = g/α + Λ μ

    GaussNewton takes the expected Fisher information under the tilted density for Λ. A datum with an improper cavity keeps its site. Where a
    likelihood has no closed form, nodes of the cubature are moved to where cavity · p^α has its mass (see :func:`bayesgn.rules.placing.place`).

    Args:
        power: α in (0, 1].

    Example:
        >>> from bayesgn import rules
        >>> rules.PowerEP(0.5)
        PowerEP(curvature=GaussNewton(), power=0.5)

    Source: Minka (2004), "Power EP"; Wilkinson, Särkkä and Solin (2023), sec. 3.3.
    """

    def __init__(self, power: float = 1.0, curvature: Curvature | None = None, cubature: Cubature | None = None) -> None:
        super().__init__(curvature, cubature)
        if not 0 < power <= 1:
            raise ValueError(f"PowerEP: power={power}; expected a number in (0, 1] (1 is EP; for 0 use rules.Variational()).")
        self.power = float(power)

    def cavity(self, q: Marginals, sites: Sites) -> tuple[Marginals, Tensor]:
        """q / t^α, and where it is a proper Gaussian [n]; the others are given q itself."""
        # With C = L Lᵀ and G = I − α Lᵀ nat2 L the cavity's covariance is L G⁻¹ Lᵀ: no inverse of C, which may be singular.
        L = root(q.cov)
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        G = eye - self.power * L.mT @ sites.nat2 @ L
        proper = (torch.linalg.cholesky_ex(G.detach())[1] == 0) & G.detach().isfinite().flatten(1).all(-1)
        K = torch.linalg.cholesky(torch.where(proper[:, None, None], G, eye))
        V = torch.linalg.solve_triangular(K, L.mT, upper=False)
        C = torch.where(proper[:, None, None], V.mT @ V, q.cov)
        m = q.mean - self.power * (C @ sites.slope_at(q.mean).unsqueeze(-1)).squeeze(-1)
        return Marginals(torch.where(proper[:, None], m, q.mean), C), proper

    def nodes(self, likelihood, cavity: Marginals, y: Tensor, sites: Sites) -> Placed:
        """Nodes for the density cavity · p^α, which may be much narrower than the cavity."""
        return place(likelihood, cavity, y, self.rule_for(cavity), self.power, self.power * sites.nat1, self.power * sites.nat2)

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        cavity, proper = self.cavity(q, sites)
        return self._local(likelihood, q, cavity, proper, y, sites)

    def _local(self, likelihood, q: Marginals, cavity: Marginals, proper: Tensor, y: Tensor, sites: Sites) -> Local:
        again = lambda at: self._local(likelihood, q, Marginals(at, cavity.cov), proper, y, sites)
        summed = lambda: _Tilted(likelihood, q, cavity, proper, y, self.nodes(likelihood, cavity, y, sites), self.power, again)
        closed = likelihood.tilted(cavity.mean, cavity.cov, y, self.power)
        return summed() if closed is None else _KnownTilted(q, cavity, proper, closed, self.power, again, summed)

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        cavity, _ = self.cavity(q, sites)
        closed = likelihood.tilted(cavity.mean, cavity.cov, y, self.power)
        if closed is not None:
            value = closed.value / self.power
        else:
            nodes = self.nodes(likelihood, cavity, y, sites)
            if nodes.log_p is not None and not torch.is_grad_enabled():
                value = log_sum(self.power * nodes.log_p + nodes.shift, nodes.unit(cavity.mean)[1])[0] / self.power
            else:
                value = log_integral(likelihood, cavity, y, nodes, self.power)
        return value - gaussian_log_integral(cavity, self.power * sites.nat1, self.power * sites.nat2) / self.power


class _Tilted(Local):
    """The density cavity · p^α by nodes. Its site is the regression line of the score s = ∂ log p on f: slope −Λ, through the means of both.

    (By parts, α Cov(s, f) = C⁻¹ V − I for its covariance V and the cavity's C, so that −Cov(s, f) V⁻¹ = (V⁻¹ − C⁻¹)/α without a difference.)
    """

    def __init__(self, likelihood, q: Marginals, cavity: Marginals, proper: Tensor, y: Tensor, nodes: Placed, α: float, again) -> None:
        f, w = nodes(cavity.mean, cavity.cov)
        known = None if torch.is_grad_enabled() else nodes.log_p
        log_p = log_density(likelihood, f, y) if known is None else known
        log_Z, tilted = log_sum(α * log_p + nodes.shift, w)
        self.sums = Sums(likelihood, y, f, tilted)
        self.scores = self.sums.scores()
        g = torch.einsum("qn,qnc->nc", tilted, self.scores)
        at = torch.einsum("qn,qnc->nc", tilted, f)
        self.f, self.tilted = f, tilted
        super().__init__(cavity.mean, q.cov, g, again, at=at, valid=proper & log_Z.isfinite(), signed=bool((w < 0).any()))

    def fisher(self) -> Tensor:
        return self.sums.fisher()

    def hessian(self) -> Tensor:
        δ = self.f - self.at
        V = torch.einsum("qn,qni,qnj->nij", self.tilted, δ, δ)
        Λ = regression(torch.einsum("qn,qni,qnj->nij", self.tilted, self.gradient - self.scores, δ), V)
        if Λ.shape[-1] == 1:
            return Λ
        P = informed(self.outer())
        return P.mT @ Λ @ P

    def outer(self) -> Tensor:
        return torch.einsum("qn,qni,qnj->nij", self.tilted, self.scores, self.scores)


def regression(cov: Tensor, V: Tensor) -> Tensor:
    """The symmetric part of cov V⁻¹ [n c c], zero where V is."""
    if V.shape[-1] == 1:
        return torch.where(V > 0, cov / torch.where(V > 0, V, 1.0), 0.0)
    unit = _unit(V)  # latents of different scales
    inverse = torch.linalg.pinv(V / (unit.unsqueeze(-1) * unit.unsqueeze(-2)), hermitian=True, rtol=1e4 * torch.finfo(V.dtype).eps)
    slope = (cov / unit.unsqueeze(-2)) @ inverse / unit.unsqueeze(-2)
    return 0.5 * (slope + slope.mT)


@torch.no_grad()
def informed(outer: Tensor) -> Tensor:
    """P [n c c] with P f = f but for directions in which no score ever points, where P f = 0 (all latents of a softmax moved alike)."""
    unit = _unit(outer)
    λ, V = torch.linalg.eigh(outer / (unit.unsqueeze(-1) * unit.unsqueeze(-2)))
    V = V * (λ > 1e4 * torch.finfo(λ.dtype).eps * λ[:, -1:]).unsqueeze(-2)
    return (V @ V.mT) * unit.unsqueeze(-2) / unit.unsqueeze(-1)


def _unit(C: Tensor) -> Tensor:
    """Square roots of the diagonal [n c], 1 where it is zero."""
    square = C.diagonal(dim1=-2, dim2=-1)
    return torch.where(square > 0, square, 1.0).sqrt()


class _KnownTilted(Local):
    def __init__(self, q: Marginals, cavity: Marginals, proper: Tensor, closed, α: float, again, summed: Callable[[], Local]) -> None:
        g = closed.gradient / α
        super().__init__(cavity.mean, q.cov, g, again, at=cavity.mean + α * (cavity.cov @ g.unsqueeze(-1)).squeeze(-1), valid=proper)
        self.α, self.cavity, self.closed, self.summed = α, cavity, closed, summed

    def fisher(self) -> Tensor:
        return self.closed.fisher

    def hessian(self) -> Tensor:
        return through_cavity(self.closed.neg_hessian / self.α, self.cavity.cov, self.α)

    def outer(self) -> Tensor:
        return self.summed().outer()


def through_cavity(h: Tensor, C: Tensor, α: float) -> Tensor:
    """The site precision h (I − α C h)⁻¹ whose power α turns the cavity's covariance C into C − α C h C."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    P = torch.linalg.solve_ex(eye - α * h @ C, h)[0]
    return 0.5 * (P + P.mT)
