"""Sites on a dense Gaussian: what they make of a covariance matrix, and the adjoint of that in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky


class Conditioned(torch.autograd.Function):
    """log Z, mean [n c] and covariance blocks [n c c] of N(0, K) Π exp(nat1ᵀf − ½ fᵀ nat2 f), for K [n c, n c], data first, then latents.

    With Λ = R Rᵀ block-diagonal, B = I + RᵀKR, G = R B⁻¹, Q = G Rᵀ and A = (I + ΛK)⁻¹ = G R⁻¹:

        log Z = ½ hᵀm − ½ log |B|,   m = K a,   a = A h,   Σ = K A

    and, as dΣ = Aᵀ dK A − Σ dΛ Σ, the adjoint of K is A S Aᵀ for an S that falls on Σ. All of it needs one Cholesky factorisation and one matrix
    product in place of the chain through triangular solves. Where Λ is zero (a missing datum, or a direction in which a datum says nothing) a column
    of R has a length whose square is nothing beside 1/K: B is the same to the last bit, and R⁻¹ exists. The columns of G scale with those of R, so
    that nothing is lost by it; those of Q do not where a datum has weak and strong directions.

    Source: Rasmussen and Williams (2006), sec. 3.4.3 for B.
    """

    @staticmethod
    def forward(ctx, K: Tensor, nat1: Tensor, nat2: Tensor):
        R, Rinv = roots(nat2, K)
        B = between(R.mT, K)
        B.diagonal().add_(1)
        L = safe_cholesky(B)
        del B  # each of these matrices is large
        h = nat1.reshape(-1)
        a = weights(R, Rinv, L, h)
        mean = K @ a
        log_Z = 0.5 * h @ mean - L.diagonal().log().sum()
        G = torch.cholesky_inverse(L)
        # RᵀΣR = I − B⁻¹ between strong directions of a datum, = RᵀK G in columns of weak ones: neither cancels in its place.
        strong = -diagonal_blocks(G, R)
        strong.diagonal(dim1=-2, dim2=-1).add_(1)
        G = (R @ G.view(*R.shape[:2], -1)).view_as(G)
        weak = R.mT @ diagonal_blocks_of_product(K, G, R)
        little = strong.diagonal(dim1=-2, dim2=-1) <= 0.5
        inner = torch.where(little.unsqueeze(-2), weak, torch.where(little.unsqueeze(-1), weak.mT, strong))
        cov = Rinv.mT @ inner @ Rinv
        ctx.save_for_backward(K, G, R, Rinv, h, mean, a)
        return log_Z, mean.view_as(nat1), 0.5 * (cov + cov.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_Z: Tensor, of_mean: Tensor, of_cov: Tensor):
        K, G, R, Rinv, h, mean, a = ctx.saved_tensors
        S = 0.5 * (of_cov + of_cov.mT)
        along = G @ blockwise(Rinv, of_mean.reshape(-1))  # A · (what falls on the mean)
        moved = K @ along  # Σ · the same
        of_K = of_h = of_Λ = None
        if ctx.needs_input_grad[0]:
            # ½ a aᵀ − ½ Q from log Z, A S Aᵀ from the covariance
            of_K = symmetric_product(right(G, Rinv @ S @ Rinv.mT), G.mT).add_(right(G, R.mT), alpha=-0.5 * float(of_Z))
            u = along + 0.5 * of_Z * a
            of_K.addr_(a, u, alpha=0.5).addr_(u, a, alpha=0.5)
        if ctx.needs_input_grad[1]:
            of_h = (of_Z * mean + moved).view_as(of_mean)
        if ctx.needs_input_grad[2]:
            if not hasattr(ctx, "Σ"):
                ctx.Σ = right(K @ G, Rinv)
            Σ, m, w = ctx.Σ, mean.view_as(of_mean), moved.view_as(of_mean)
            mw = m.unsqueeze(-1) * (w + 0.5 * of_Z * m).unsqueeze(-2)
            of_Λ = -mw - 0.5 * of_Z * diagonal_blocks(Σ, R) - diagonal_blocks_of_product(right(Σ, S), Σ.mT, R)
            of_Λ = 0.5 * (of_Λ + of_Λ.mT)
        return of_K, of_h, of_Λ


def roots(nat2: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """R [n c c] with R Rᵀ = nat2, its columns along the eigenvectors, and R⁻¹; zero eigenvalues raised to what K does not feel.

    Raises:
        ValueError: an eigenvalue is negative beyond rounding.
    """
    if nat2.shape[-1] == 1:
        λ, V = nat2[..., 0], None
    else:
        λ, V = torch.linalg.eigh(nat2)
    eps = torch.finfo(λ.dtype).eps
    if bool((λ[..., 0] < -1e3 * eps * λ.abs().amax(-1)).any()):
        raise ValueError(f"a site has a precision with the eigenvalue {float(λ.min()):.3e}; expected positive semi-definite ones.")
    s = λ.maximum(eps**1.5 / K.diagonal().abs().amax().clamp_min(eps**4)).sqrt() if len(λ) else λ
    if V is None:
        return s.unsqueeze(-1), 1 / s.unsqueeze(-1)
    return V * s.unsqueeze(-2), V.mT / s.unsqueeze(-1)


def weights(R: Tensor, Rinv: Tensor, L: Tensor, h: Tensor) -> Tensor:
    """a = (I + ΛK)⁻¹ h = R B⁻¹ R⁻¹ h [n c]; in this form nothing cancels, however strong the sites."""
    return blockwise(R, torch.cholesky_solve(blockwise(Rinv, h).unsqueeze(-1), L).squeeze(-1))


# -- products with block-diagonal matrices: D [n c c] stands for one [n c, n c] ---------------------------------------------


def right(M: Tensor, D: Tensor) -> Tensor:
    """M D."""
    n, c = D.shape[:2]
    return M * D.reshape(-1) if c == 1 else torch.einsum("anc,ncd->and", M.view(len(M), n, c), D).reshape(len(M), n * c)


def between(D: Tensor, M: Tensor) -> Tensor:
    """D M Dᵀ."""
    n, c = D.shape[:2]
    out = right(M, D.mT)
    return out.mul_(D.reshape(-1, 1)) if c == 1 else (D @ out.view(n, c, -1)).view(n * c, -1)


def blockwise(D: Tensor, v: Tensor) -> Tensor:
    """D v."""
    return (D @ v.view(*D.shape[:2], 1)).reshape(-1)


def symmetric_product(M: Tensor, N: Tensor) -> Tensor:
    """M N where it is symmetric: the lower half of it, mirrored."""
    out, step = torch.empty_like(N), max(128, len(N) // 16)
    for i in range(0, len(N), step):
        rows, before = slice(i, i + step), slice(0, i + step)
        out[rows, before] = M[rows] @ N[:, before]
        out[:i, rows] = out[rows, :i].mT
    return out


def diagonal_blocks(M: Tensor, like: Tensor) -> Tensor:
    """[n c c] of M [n c, n c]."""
    n, c = like.shape[:2]
    return M.view(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def diagonal_blocks_of_product(M: Tensor, N: Tensor, like: Tensor) -> Tensor:
    """[n c c] of M N, all [n c, n c]."""
    n, c = like.shape[:2]
    return M.reshape(n, c, n * c) @ N.mT.reshape(n, c, n * c).mT
