"""Power expectation propagation: match the moments of cavity × likelihood^α."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature
from bayesgn.rules.curvatures import Curvature, Local
from bayesgn.rules.expansions import Integral, _Averaged, spread
from bayesgn.rules.sites import Marginals, Sites, gaussian_log_integral


class PowerEP(Integral):
    """Power EP, L_n = 1/α log E_cavity[p(y_n | f)^α], the cavity q(f) / t_n(f)^α; EP for α = 1, variational inference as α → 0.

    With g, H the gradient and Hessian of log E_cavity[p^α] in the cavity's mean m, and C its covariance:

        mean of the tilted density μ = m + C g,   Λ = −1/α H (I + C H)⁻¹ (Exact),   nat1 = g/α + Λ μ

    GaussNewton takes the expected Fisher information under the tilted density for Λ. A datum with an improper cavity keeps its site.

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
        eye = torch.eye(q.cov.shape[-1], dtype=q.cov.dtype, device=q.cov.device)
        S = eye - self.power * q.cov @ sites.nat2
        # C (I − α nat2 C)⁻¹ by a solve from the left: no inverse of C, which may be singular.
        m = q.mean.unsqueeze(-1) - self.power * q.cov @ sites.nat1.unsqueeze(-1)
        both = torch.linalg.solve_ex(S, torch.cat([q.cov, m], -1))[0]
        C, m = both[..., :-1], both[..., -1]
        C = 0.5 * (C + C.mT)
        proper = torch.linalg.cholesky_ex(C.detach())[1] == 0
        proper = proper & C.detach().isfinite().flatten(1).all(-1)
        return Marginals(torch.where(proper[:, None], m, q.mean), torch.where(proper[:, None, None], C, q.cov)), proper

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        cavity, proper = self.cavity(q, sites)
        closed = likelihood.tilted(cavity.mean, cavity.cov, y, self.power)
        return _Tilted(self, likelihood, q, cavity, y, proper) if closed is None else _KnownTilted(self, q, cavity, proper, closed)

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        cavity, proper = self.cavity(q, sites)
        closed = likelihood.tilted(cavity.mean, cavity.cov, y, self.power)
        if closed is not None:
            log_Z = closed.value
        else:
            f, w = self.rule_for(q)(cavity.mean, cavity.cov)
            log_Z = _log_sum(self.power * likelihood.log_prob(f, spread(y, f)), w)[0]
        return (log_Z - gaussian_log_integral(cavity, self.power * sites.nat1, self.power * sites.nat2)) / self.power


def _log_sum(log_p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_q w_q e^{log_p} [n] and the normalised weights of the tilted density [q n]; weights may be negative (NaN where their sum is)."""
    top = log_p.detach().amax(0)
    e = w[:, None] * (log_p - top).exp()
    total = e.sum(0)
    return top + total.log(), e / total


class _Tilted(Local):
    def __init__(self, rule: PowerEP, likelihood, q: Marginals, cavity: Marginals, y: Tensor, proper: Tensor) -> None:
        f, w = rule.rule_for(q)(cavity.mean, cavity.cov)
        self.α, self.cavity = rule.power, cavity
        log_Z, tilted = _log_sum(self.α * likelihood.log_prob(f, spread(y, f)), w)
        self.averages = _Averaged(likelihood, q, y, f, tilted)
        g = self.averages.gradient  # = 1/α ∂ log E[p^α] / ∂m
        at = cavity.mean + self.α * (cavity.cov @ g.unsqueeze(-1)).squeeze(-1)
        super().__init__(q, g, at, proper & log_Z.isfinite())

    def fisher(self) -> Tensor:
        return self.averages.fisher()

    def hessian(self) -> Tensor:
        """−H (I + C H)⁻¹ / α with −H = α E[−∂² log p] − α² Cov[∂ log p] under the tilted density."""
        outer, g = self.averages.outer(), self.gradient
        h = self.averages.hessian() - self.α * (outer - g.unsqueeze(-1) * g.unsqueeze(-2))
        return through_cavity(h, self.cavity.cov, self.α)

    def outer(self) -> Tensor:
        return self.averages.outer()


class _KnownTilted(Local):
    def __init__(self, rule: PowerEP, q: Marginals, cavity: Marginals, proper: Tensor, closed) -> None:
        g = closed.gradient / rule.power
        super().__init__(q, g, cavity.mean + rule.power * (cavity.cov @ g.unsqueeze(-1)).squeeze(-1), proper)
        self.α, self.cavity, self.closed = rule.power, cavity, closed

    def fisher(self) -> Tensor:
        return self.closed.fisher

    def hessian(self) -> Tensor:
        return through_cavity(self.closed.neg_hessian / self.α, self.cavity.cov, self.α)

    def outer(self) -> Tensor:
        return self.gradient.unsqueeze(-1) * self.gradient.unsqueeze(-2)


def through_cavity(h: Tensor, C: Tensor, α: float) -> Tensor:
    """The site precision h (I − α C h)⁻¹ whose power α turns the cavity's covariance C into C − α C h C."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    P = torch.linalg.solve_ex(eye - α * h @ C, h)[0]
    return 0.5 * (P + P.mT)
