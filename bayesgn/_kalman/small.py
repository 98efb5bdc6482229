"""Many small matrices [n d k] at once: products and solves that do not pay a library call for each.

A product of two 3 × 3 matrices is 27 multiplications, less than what a call of BLAS costs. Where there are many of them, they are kept with
n innermost in memory ("planes") and a product is three vector operations over all n. Shapes are [n d k] all the same, only the strides differ.
Few or larger matrices go the ordinary way.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS = 6  # up to which planes pay
ENTRIES = 3000  # n d² from which they do, as measured


def _many(n: int, d: int) -> bool:
    return d <= ROWS and n * d * d > ENTRIES


def laid_out(X: Tensor) -> Tensor:
    """X [n d k] in the layout that suits it."""
    if _many(X.shape[0], X.shape[1]):
        return X.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return X.contiguous()


def mul(A: Tensor, B: Tensor, plus: Tensor | None = None) -> Tensor:
    """A B (+ plus) for A [n d k] and B [n k l]; n may be 1 in one of them."""
    if not _many(max(A.shape[0], B.shape[0]), A.shape[-1]):
        if plus is None:
            return A @ B
        return torch.baddbmm(plus, A, B) if A.shape[0] == B.shape[0] else plus + A @ B
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        AB: Tensor = _Product.apply(A, B)  # type: ignore[assignment]
        return AB if plus is None else AB + plus
    return _product(A, B, plus)


def _product(A: Tensor, B: Tensor, plus: Tensor | None = None) -> Tensor:
    rows, columns = A.unsqueeze(-1).unbind(-2), B.unsqueeze(-3).unbind(-2)
    out = rows[0] * columns[0] if plus is None else torch.addcmul(plus, rows[0], columns[0])
    for a, b in zip(rows[1:], columns[1:]):
        out.addcmul_(a, b)
    return out


class _Product(torch.autograd.Function):
    """The product with its derivative as products: autograd through the planes would sum what it had spread out."""

    @staticmethod
    def forward(ctx, A, B):
        ctx.save_for_backward(A, B)
        return _product(A, B)

    @staticmethod
    def backward(ctx, G):  # type: ignore[override]
        A, B = ctx.saved_tensors
        dA = mul(G, B.mT).sum_to_size(A.shape) if ctx.needs_input_grad[0] else None
        dB = mul(A.mT, G).sum_to_size(B.shape) if ctx.needs_input_grad[1] else None
        return dA, dB


def beside(*parts: Tensor) -> Tensor:
    """[n d k], [n d l] … side by side."""
    if _many(parts[0].shape[0], parts[0].shape[1]):
        return torch.cat([p.permute(1, 2, 0) for p in parts], 1).permute(2, 0, 1)
    return torch.cat(parts, -1)


def below(*parts: Tensor) -> Tensor:
    """[n d k], [m d k] … one batch after the other."""
    if _many(sum(p.shape[0] for p in parts), parts[0].shape[1]):
        return torch.cat([p.permute(1, 2, 0) for p in parts], -1).permute(2, 0, 1)
    return torch.cat(parts)


def interleaved(a: Tensor, b: Tensor) -> Tensor:
    """a₀, b₀, a₁, b₁ … of two batches [n d k]."""
    if _many(2 * a.shape[0], a.shape[1]):
        return torch.stack([a.permute(1, 2, 0), b.permute(1, 2, 0)], -1).flatten(-2).permute(2, 0, 1)
    return torch.stack([a, b], 1).flatten(0, 1)


@functools.lru_cache(maxsize=64)
def eye(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity; shared, so never changed in place."""
    return torch.eye(d, dtype=dtype, device=device)


def one_plus(X: Tensor) -> Tensor:
    """I + X for X [n d d]."""
    return X + eye(X.shape[-1], X.dtype, X.device)


def solve(M: Tensor, B: Tensor) -> Tensor:
    """M⁻¹ B for M = I + (a product of two PSD matrices) [n d d]: its eigenvalues are 1 or more, so Cramer's rule never divides by little."""
    d = M.shape[-1]
    if d == 1:
        return B / M
    if d > 3 or not _many(M.shape[0], d):
        return torch.linalg.solve_ex(M, B)[0]
    if torch.is_grad_enabled() and (M.requires_grad or B.requires_grad):
        return _Solution.apply(M, B)  # type: ignore[return-value]
    return _solution(M, B)


def _solution(M: Tensor, B: Tensor) -> Tensor:
    adjugate, det = cramer(M)
    return mul(adjugate, B) / det[:, None, None]


class _Solution(torch.autograd.Function):
    """X = M⁻¹B with dB = M⁻ᵀ dX and dM = −dB Xᵀ."""

    @staticmethod
    def forward(ctx, M, B):
        X = _solution(M, B)
        ctx.save_for_backward(M, X)
        return X

    @staticmethod
    def backward(ctx, G):  # type: ignore[override]
        M, X = ctx.saved_tensors
        dB = solve(M.mT, G)
        return -mul(dB, X.mT), dB


def logdet(M: Tensor) -> Tensor:
    """log |M| [n]; NaN where the determinant is not positive."""
    if M.shape[-1] <= 3:
        return cramer(M)[1].log()
    sign, size = torch.linalg.slogdet(M)
    return torch.where(sign > 0, size, torch.nan)


def cramer(M: Tensor) -> tuple[Tensor, Tensor]:
    """The adjugate [n d d] and the determinant [n] of M [n d d] with d ≤ 3."""
    d = M.shape[-1]
    if d == 1:
        return torch.ones_like(M), M[:, 0, 0]
    if d == 2:
        a, b, c, e = M.flatten(1).unbind(-1)
        return torch.stack([e, -b, -c, a]).reshape(2, 2, -1).permute(2, 0, 1), a * e - b * c
    T = M.permute(2, 1, 0)  # transposed, n last
    T = torch.cat([T, T[:2]])
    T = torch.cat([T, T[:, :2]], 1)  # rows and columns count modulo 3, which gives minors their signs
    minors = T[1:4, 1:4] * T[2:5, 2:5] - T[1:4, 2:5] * T[2:5, 1:4]
    return minors.permute(2, 0, 1), (T[:3, 0] * minors[:, 0]).sum(0)
