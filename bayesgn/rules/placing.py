"""Where nodes stand for a density that may be much narrower than the Gaussian it is integrated over."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature, root
from bayesgn.rules.integrals import log_density, log_sum
from bayesgn.rules.sites import Marginals

NARROW, FAR = 0.6, 0.5  # of a variance, and of a mean in standard deviations, that nodes may be off
PASSES = 8


class Placed(Cubature):
    """Another rule with its nodes moved, f_q = mean + L (a + R z_q) with L Lᵀ = cov, and log N(0, I) − log N(a, R Rᵀ) there for ``shift``.

    Args:
        rule: gives z_q and w_q.
        a [n c], R [n c c]: where N(mean, cov) times a likelihood has its mass, in coordinates in which N(mean, cov) is N(0, I).
    """

    shift: Tensor

    def __init__(self, rule: Cubature, a: Tensor, R: Tensor) -> None:
        self.rule, self.a, self.R = rule, a, R
        self.log_p: Tensor | None = None  # log p at the nodes [q n], where it is known
        z, _ = rule.unit(a)
        log_det = R[:, 0, 0].abs().log() if a.shape[-1] == 1 else torch.linalg.slogdet(R).logabsdet
        self.shift = (0.5 * z.square().sum(-1))[:, None] - 0.5 * self._moved(z).square().sum(-1) + log_det

    def standard(self, c):
        return self.rule.standard(c)

    def _moved(self, z: Tensor) -> Tensor:
        return self.a + torch.einsum("qj,nij->qni", z, self.R)

    def __call__(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        z, w = self.unit(mean)
        return mean + torch.einsum("qnj,nij->qni", self._moved(z), root(cov)), w

    def rows(self, index) -> Placed:
        return Placed(self.rule, self.a[index], self.R[index])


@torch.no_grad()
def place(likelihood, q: Marginals, y: Tensor, rule: Cubature, power: float, nat1: Tensor, nat2: Tensor) -> Placed:
    """Nodes for the density q(f) p(y_n | f)^power.

    They begin under q times the site that stands for p^power (nat1, nat2): at a fixed point the density is there. Then they move to its mean
    and covariance as found with them, until these hardly differ.

    Source: Naylor and Smith (1982), "Applications of a method for the efficient computation of posterior distributions".
    """
    L = root(q.cov)
    z, w = rule.unit(q.mean)
    slope = nat1 - (nat2 @ q.mean.unsqueeze(-1)).squeeze(-1)
    a, R = _below_site((L.mT @ slope.unsqueeze(-1)).squeeze(-1), L.mT @ nat2 @ L)
    rows, nodes = torch.arange(len(a), device=a.device), Placed(rule, a, R)  # rows that may still move
    for turn in range(PASSES):
        log_p = log_density(likelihood, nodes(q.mean[rows], q.cov[rows])[0], y[rows])
        _, tilted = log_sum(power * log_p + nodes.shift, w)
        mean = tilted.mT @ z
        cov = torch.einsum("qn,qc,qd->ncd", tilted, z, z) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        known = mean.isfinite().all(-1) & cov.isfinite().flatten(1).all(-1)
        λ, V = _eigh(torch.where(known[:, None, None], cov, 1.0))
        off = known & ((λ[:, 0] < NARROW) | (λ[:, -1] > 1 / NARROW) | (mean.abs().amax(-1) > FAR))
        rows, mean, λ, V = rows[off], mean[off], λ[off], V[off]
        if not len(rows):
            if turn == 0:
                nodes.log_p = log_p
                return nodes
            break
        old = R[rows]
        a[rows] += (old @ mean.unsqueeze(-1)).squeeze(-1)
        # One pass sees no finer than its own nodes stand.
        R[rows] = old @ (V * λ.clamp(0.1, 4.0).sqrt().unsqueeze(-2)) @ V.mT
        nodes = Placed(rule, a[rows], R[rows])
    return Placed(rule, a, R)


def _below_site(h: Tensor, Λ: Tensor) -> tuple[Tensor, Tensor]:
    """a, R with N(a, R Rᵀ) ∝ N(u; 0, I) exp(hᵀu − ½ uᵀΛu); 0 and I where that is no Gaussian."""
    if h.shape[-1] == 1:
        P = 1 + Λ
        proper = (P > 0) & P.isfinite() & h.unsqueeze(-1).isfinite()
        R = torch.where(proper, P, 1.0).rsqrt()
        return torch.where(proper[..., 0], R[..., 0].square() * h, 0.0), R
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    G, info = torch.linalg.cholesky_ex(eye + Λ)
    R = torch.linalg.solve_triangular(G, eye, upper=False).mT
    a = (R @ (R.mT @ h.unsqueeze(-1))).squeeze(-1)
    proper = (info == 0) & a.isfinite().all(-1) & R.isfinite().flatten(1).all(-1)
    return torch.where(proper[:, None], a, 0.0), torch.where(proper[:, None, None], R, eye)


def _eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    if cov.shape[-1] == 1:
        return cov[..., 0], torch.ones_like(cov)
    λ, V = torch.linalg.eigh(cov)
    return λ, V
