"""Curvatures with a past, for the loop of ``bayes_newton``: secants of the gradient, and steps along the manifold of precisions."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from bayesgn._psd import eigabs, eigclip
from bayesgn.rules.curvatures import Bent, Curvature, GaussNewton, made_psd
from bayesgn.rules.local import Local, outer

log = logging.getLogger("bayesgn.rules")


class QuasiNewton(Curvature):
    """Damped BFGS at each datum: Λ is learned from how the gradient changes from turn to turn, PSD without any second derivative.

        s = change of the mean,   v = −change of the gradient,   r = θ v + (1 − θ) B s
        B ← B − B s sᵀB / (sᵀB s) + r rᵀ / (sᵀ r),   θ such that sᵀr ≥ damping · sᵀB s

    The old gradient is taken anew under the present covariance (or cavity), so that what the covariance does to the gradient is not taken for
    curvature in the mean. B is kept in ``sites.memory``, for each datum; at its first turn a datum gets B from ``start``. Where the loss is not
    convex, secants in different directions contradict one another: B is kept within a factor of 100 of ``start`` in every direction, and a
    secant over less than a thousandth of a standard deviation waits until the mean has moved on.

    Args:
        damping: Powell's constant in (0, 1]: curvature along a step never falls below this part of what it was. 1 keeps B where the loss bends less.
        start: the curvature of the first turn, and what bounds the later ones; :class:`GaussNewton` unless given.

    Example:
        >>> from bayesgn import rules
        >>> rules.Variational(curvature=rules.QuasiNewton())
        Variational(curvature=QuasiNewton(damping=0.2, start=GaussNewton()))

    Source: Nocedal and Wright (2006), procedure 18.2; Wilkinson, Särkkä and Solin (2023), sec. 4.3, who take secants in mean and covariance together.
    """

    def __init__(self, damping: float = 0.2, start: Curvature | None = None) -> None:
        if not 0 < damping <= 1:
            raise ValueError(f"QuasiNewton: damping={damping}; expected a number in (0, 1], e.g. 0.2.")
        self.damping = float(damping)
        self.start = GaussNewton() if start is None else start
        if not isinstance(self.start, Curvature):
            raise TypeError(f"QuasiNewton: start={start!r}; expected a curvature such as rules.GaussNewton() or rules.Identity(0.1).")

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.start.random

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise TypeError(_needs_turns(self))

    def bend(self, local: Local, memory: tuple[Tensor, ...], generator=None) -> Bent:
        first = self.start.bend(local, (), generator)
        if not memory:
            return Bent(first.matrix, (local.place, first.matrix), first.indefinite)
        place, B = memory
        seen = B.flatten(1).any(-1)  # a datum of another batch has a memory of zeros
        before = local.shifted(torch.where(seen[:, None], place, local.place))
        s, v = local.at - before.at, before.gradient - local.gradient
        width = local.cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        new = damped_bfgs(B, s, v, self.damping)
        good = (s.abs() > SHORTEST * width).any(-1) & new.isfinite().flatten(1).all(-1)
        B, place = torch.where(good[:, None, None], new, B), torch.where((good | ~seen)[:, None], local.place, place)
        B = torch.where(seen[:, None, None], within(B, first.matrix, WIDEST), first.matrix)
        return Bent(B, (place, B), 0 if bool(seen.all()) else first.indefinite)

    def columns(self, r: int) -> int:
        raise TypeError(_needs_turns(self))


SHORTEST = 1e-3  # in standard deviations, of a step that makes a secant
WIDEST = 100.0  # between B and the curvature it started from


def damped_bfgs(B: Tensor, s: Tensor, v: Tensor, damping: float) -> Tensor:
    """B [n c c] PSD after the secants s, v [n c]; NaN where neither B nor v bends along s, beyond rounding."""
    Bs = (B @ s.unsqueeze(-1)).squeeze(-1)
    sBs, sv = (s * Bs).sum(-1), (s * v).sum(-1)
    nothing = 1e-10 * B.diagonal(dim1=-2, dim2=-1).amax(-1) * s.square().sum(-1)
    flat = sBs <= nothing  # B says nothing along s
    θ = torch.where(flat | (sv >= damping * sBs), 1.0, (1 - damping) * sBs / (sBs - sv))
    r = θ[:, None] * v + (1 - θ)[:, None] * Bs
    sr = (s * r).sum(-1)
    sr = torch.where(sr > nothing, sr, torch.nan)
    out = B - torch.where(flat[:, None, None], 0.0, outer(Bs) / sBs[:, None, None]) + outer(r) / sr[:, None, None]
    return 0.5 * (out + out.mT)


def within(B: Tensor, reference: Tensor, factor: float) -> Tensor:
    """B [n c c] with its eigenvalues relative to a PSD reference clipped to [1/factor, factor]; nothing where the reference is zero."""
    if B.shape[-1] == 1:
        return torch.minimum(torch.maximum(B, reference / factor), reference * factor)
    known = (B.isfinite() & reference.isfinite()).flatten(1).all(-1)[:, None, None]
    λ, V = torch.linalg.eigh(torch.where(known, reference, 0.0))
    there = λ > 1e4 * torch.finfo(λ.dtype).eps * λ[:, -1:]
    R = V * torch.where(there, λ, 0.0).sqrt().unsqueeze(-2)  # reference = R Rᵀ
    inverse = V * torch.where(there, λ, 1.0).rsqrt().unsqueeze(-2) * there.unsqueeze(-2)
    μ, U = torch.linalg.eigh(inverse.mT @ torch.where(known, B, 0.0) @ inverse)
    W = R @ U
    return torch.where(known, (W * μ.clamp(1 / factor, factor).unsqueeze(-2)) @ W.mT, reference)


class Riemann(Curvature):
    """The exact Hessian H, indefinite or not, with the step that keeps a site's precision S PSD: Riemannian gradient descent.

        S ← S − lr G + ½ lr² G S⁻¹ G,   G = S − H,   which is  ½ (S + M S⁻¹ M) with M = (1 − lr) S + lr H

    Where H is PSD the fixed point is H. Where it is not, a site's precision settles at lr/(2 − lr) · |λ| for each eigenvalue λ < 0 of H: at |λ| for
    lr = 1, at zero for small steps. A site that says nothing yet, or far less than M (the term in S⁻¹ would then throw it as far again to the
    other side), becomes |M|.

    Example:
        >>> from bayesgn import rules
        >>> rules.Variational(curvature=rules.Riemann())
        Variational(curvature=Riemann())

    Source: Lin, Schmidt and Khan (2020), "Handling the positive-definite constraint in the Bayesian learning rule"; for sites, Wilkinson, Särkkä
    and Solin (2023), sec. 4.4.
    """

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise TypeError(_needs_turns(self))

    def columns(self, r: int) -> int:
        raise TypeError(_needs_turns(self))

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        H = local.hessian()
        return Bent(H, indefinite=made_psd(H, eigclip)[1])

    def blend(self, old: Tensor, new: Tensor, lr: float) -> Tensor:
        M = (1 - lr) * old + lr * new
        known = M.isfinite().flatten(1).all(-1)[:, None, None]
        M = torch.where(known, 0.5 * (M + M.mT), 0.0)
        size = eigabs(M)
        L, info = torch.linalg.cholesky_ex(old)
        V = torch.linalg.solve_triangular(L, M, upper=False)
        step = 0.5 * (old + V.mT @ V)
        trace = lambda A: A.diagonal(dim1=-2, dim2=-1).sum(-1)
        fair = (info == 0) & (trace(step) <= FARTHEST * (trace(old) + trace(size)))
        if not bool(fair.all()):
            log.debug("Riemann: %d of %d sites became |M|, being zero or too small for a step in S⁻¹", int((~fair).sum()), len(fair))
        return torch.where(known, torch.where(fair[:, None, None], step, size), torch.nan)


FARTHEST = 2.0


def _needs_turns(curvature: Curvature) -> str:
    return (
        f"{curvature!r} learns from turn to turn, and bgn.laplace takes one turn; use bgn.bayes_newton(model, likelihood, data, rule=...), or a "
        "curvature such as rules.GaussNewton() or rules.Exact()."
    )
