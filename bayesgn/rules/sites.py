"""Sites: the quadratics that stand in for the likelihood, one a datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesgn.rules.local import Local


class Marginals(NamedTuple):
    """A Gaussian over the latents of each datum: mean [n c], cov [n c c]."""

    mean: Tensor
    cov: Tensor

    def rows(self, index) -> Marginals:
        return Marginals(self.mean[index], self.cov[index])


class Sites(NamedTuple):
    """t_n(f) = exp(nat1ᵀ f − ½ fᵀ nat2 f), unnormalised Gaussians in the latents of each datum.

    Attributes:
        nat1 [n c], nat2 [n c c]: natural parameters; nat2 is a precision, zero for a missing datum.
        memory: what a curvature with a history (:class:`QuasiNewton`) keeps from turn to turn, tensors with data first.
    """

    nat1: Tensor
    nat2: Tensor
    memory: tuple[Tensor, ...] = ()

    @classmethod
    def flat(cls, n: int, c: int, like: Tensor, precision: float = 0.0) -> Sites:
        """Sites that say nothing (or, with a precision, that f is near zero)."""
        eye = torch.eye(c, dtype=like.dtype, device=like.device)
        return cls(like.new_zeros(n, c), (precision * eye).expand(n, c, c).clone())

    def rows(self, index) -> Sites:
        """The sites of some data."""
        return Sites(self.nat1[index], self.nat2[index], tuple(t[index] for t in self.memory))

    def replace(self, index, new: Sites) -> Sites:
        """A copy in which some data have new sites."""
        memory = self.memory or tuple(t.new_zeros(len(self.nat1), *t.shape[1:]) for t in new.memory)
        out = [t.clone() for t in (self.nat1, self.nat2, *memory)]
        for t, value in zip(out, (new.nat1, new.nat2, *new.memory), strict=True):
            t[index] = value
        return Sites(out[0], out[1], tuple(out[2:]))

    def log_at(self, f: Tensor) -> Tensor:
        """log t_n(f_n) [n]."""
        return (self.nat1 * f).sum(-1) - 0.5 * (f * (self.nat2 @ f.unsqueeze(-1)).squeeze(-1)).sum(-1)

    def slope_at(self, f: Tensor) -> Tensor:
        """∂ log t_n / ∂f at f_n [n c]."""
        return self.nat1 - (self.nat2 @ f.unsqueeze(-1)).squeeze(-1)

    def expected_log(self, q: Marginals) -> Tensor:
        """E_q[log t_n] [n]."""
        return self.log_at(q.mean) - 0.5 * (self.nat2 * q.cov).sum((-1, -2))


class Turn(NamedTuple):
    """What one application of a rule gives.

    Attributes:
        sites: the new ones.
        indefinite: data whose curvature block was indefinite before it was made PSD.
        skipped: data whose site was left as it was (an improper cavity, a value that is not finite).
        local: what the expansion knew of the data.
        taken [n]: True where the new site was taken.
    """

    sites: Sites
    indefinite: int
    skipped: int
    local: Local
    taken: Tensor


def gaussian_log_integral(q: Marginals, nat1: Tensor, nat2: Tensor) -> Tensor:
    """log ∫ N(f; mean, cov) exp(nat1ᵀf − ½ fᵀ nat2 f) df [n], for nat2 of any rank."""
    m, V = q.mean.unsqueeze(-1), q.cov
    Lam, h = nat2, nat1.unsqueeze(-1)
    S = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device) + Lam @ V
    g = h - Lam @ m
    inner = ((h + g) * m).sum((-1, -2)) + (g * (V @ torch.linalg.solve(S, g))).sum((-1, -2))
    return 0.5 * inner - 0.5 * torch.linalg.slogdet(S).logabsdet
