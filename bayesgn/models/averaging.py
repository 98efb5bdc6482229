"""Sites on f seen from inducing variables u: what p(f_n | u) = N(B_n u, S_n) leaves open is averaged over.

A site t_n(f_n) acts on u through

    s_n(φ) = E[t_n(f_n)^α | φ]^(1/α),   φ = B_n u,   f_n | φ ~ N(φ, S_n),

with the α of the rule: α → 0 (variational, Laplace, posterior linearisation) gives log s_n(φ) = log t_n(φ) − ½ tr(nat2 S_n), and with it the
variational free energy of Titsias; α = 1 (EP) gives the model of Snelson and Ghahramani (FITC); between them lies sparse power EP.

Source: Bui, Yan and Turner (2017), "A unifying framework for Gaussian process pseudo-point approximations using power expectation propagation".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn.rules import Marginals


class Averaged(NamedTuple):
    """s_n(φ) = scale · exp(nat1ᵀφ − ½ φᵀ nat2 φ): nat1 [n c], nat2 [n c c], log_scale [n]."""

    nat1: Tensor
    nat2: Tensor
    log_scale: Tensor


def averaged(nat1: Tensor, nat2: Tensor, S: Tensor, power: float) -> Averaged:
    """The sites as functions of φ. nat1 [n c], nat2 [n c c], S [n c c], power ≥ 0."""
    if power == 0:
        return Averaged(nat1, nat2, -0.5 * (nat2 * S).sum((-1, -2)))
    # (I + α Λ S)⁻¹ [h, Λ]; E[t^α]^(1/α) at φ = 0 has log −log|I + α Λ S| / 2α + α hᵀ S (I + α Λ S)⁻¹ h / 2
    R = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + power * nat2 @ S
    both = torch.cat([nat2, nat1.unsqueeze(-1)], -1)
    if S.shape[-1] == 1:
        both, logdet = both / R, R[:, 0, 0].log()
    else:
        both, logdet = torch.linalg.solve(R, both), torch.linalg.slogdet(R).logabsdet
    Λ, h = 0.5 * (both[..., :-1] + both[..., :-1].mT), both[..., -1]
    log_scale = -0.5 / power * logdet + 0.5 * power * (nat1 * (S @ h.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return Averaged(h, Λ, log_scale)


def opened(φ: Marginals, sites: Averaged, S: Tensor, power: float) -> Marginals:
    """q(f_n) from q(φ_n), in which t_n^α acts on f_n itself: dividing by t_n(f_n)^α leaves the cavity of u, spread by S_n."""
    if power == 0:
        return Marginals(φ.mean, φ.cov + S)
    # f | φ ~ N(φ + α S (h − Λ φ), S − α S Λ S)
    G = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - power * S @ sites.nat2
    mean = (G @ φ.mean.unsqueeze(-1) + power * S @ sites.nat1.unsqueeze(-1)).squeeze(-1)
    return Marginals(mean, G @ φ.cov @ G.mT + S - power * S @ sites.nat2 @ S)
