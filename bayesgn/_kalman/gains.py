"""A filter's mean, or the backward pass that mirrors it, under gains that are given."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn._kalman import compiled, scan
from bayesgn._kalman.chain import Chain, served


def gained(A: Tensor, H: Tensor, K: Tensor, b: Tensor, from_the_end: bool = False) -> Tensor:
    """With F_k = A (I − K_kᵀ H):  x_0 = b_0, x_k = F_{k−1} x_{k−1} + b_k;  or, from the end, x_{n−1} = b_{n−1}, x_k = F_kᵀ x_{k+1} + b_k.

    A [d d], H [c d], K [n c d] or one for all [1 c d], b [n d] -> x [n d]. Each is the other's adjoint; differentiable in all four.
    """
    return _Gained.apply(A, H, K, b, from_the_end)  # type: ignore[return-value]


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, H, K, b, from_the_end):
        x = _run(A, H, K, b, from_the_end)
        ctx.save_for_backward(A, H, K, x)
        ctx.from_the_end = from_the_end
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        A, H, K, x = ctx.saved_tensors
        λ = _run(A, H, K, g, not ctx.from_the_end)
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, λ, None
        # dF_k = u vᵀ with u at k + 1 and v at k
        u, v = (x[1:], λ[:-1]) if ctx.from_the_end else (λ[1:], x[:-1])
        K, Hv, Au = K if len(K) == 1 else K[:-1], v @ H.mT, u @ A
        if len(K) == 1:
            dA, KAu = u.mT @ (v - Hv @ K[0]), Au @ K[0].mT
            dK = -(Hv.mT @ Au).unsqueeze(0)
        else:
            dA, KAu = u.mT @ (v - (K * Hv.unsqueeze(-1)).sum(-2)), (K * Au.unsqueeze(-2)).sum(-1)
            dK = torch.cat([-Hv.unsqueeze(-1) * Au.unsqueeze(-2), torch.zeros_like(K[:1])])
        return dA, -(KAu.mT @ v), dK, λ, None


def _run(A: Tensor, H: Tensor, K: Tensor, b: Tensor, from_the_end: bool) -> Tensor:
    A, H, K, b = (t.detach() for t in (A, H, K, b))
    k = torch.arange(len(b), device=b.device)
    if served(Chain(A[None], A[None], k, A, H)):
        return compiled.gained(A, H, K, b, from_the_end)
    F = A - A @ K.mT @ H
    step = torch.zeros_like(k) if len(K) == 1 else k.flip(0) if from_the_end else k - 1
    F, b = (F.mT, b.flip(0)) if from_the_end else (F, b)
    x = scan.propagate(Chain(F, F, step, A, H), b.unsqueeze(0))[0]
    return x.flip(0) if from_the_end else x
