"""Numerics' one home: jitter, Cholesky retries and eigenvalue floors, each with the case that needed it.

Everything is batched ([..., c, c]), exact to float64, and differentiable also where eigenvalues coincide.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

__all__ = ["eigabs", "eigclip", "psd_root", "safe_cholesky"]

log = logging.getLogger("bayesgn")


class NotPositiveDefiniteError(ValueError):
    """A matrix that has no Cholesky factor: indefinite beyond rounding, or not finite."""


def safe_cholesky(matrix: Tensor, max_jitter: float = 1e-4) -> Tensor:
    """Lower Cholesky factor L of matrix (or of matrix + jitter·I where rounding made it slightly indefinite, with a warning in the log).

    L Lᵀ = matrix + jitter · mean|diag| · I. The jitter is zero wherever the plain factorisation succeeds; it grows by ten from the
    dtype's epsilon, for the failing members of the batch alone (case: a GGN of identical data, rank one up to rounding).

    Args:
        matrix: symmetric, [..., d, d].
        max_jitter: the largest relative jitter that may be tried.
    Raises:
        ValueError: the matrix has NaN or inf, or is indefinite beyond max_jitter.

    >>> safe_cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    tensor([[2., 0.],
            [1., 2.]])
    """
    L, info = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type == "meta" or not bool(info.any()):
        return L
    if not bool(matrix.isfinite().all()):
        bad = int((~matrix.isfinite()).sum())
        raise NotPositiveDefiniteError(f"a matrix of shape {tuple(matrix.shape)} to be factored has {bad} NaN or infinite entries; "
                         "look for NaN or overflow in the data or in the net's output")
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp_min(torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    jitter = 10 * torch.finfo(matrix.dtype).eps
    while jitter <= max_jitter:
        amount = torch.where(info > 0, jitter * scale, torch.zeros_like(scale)).detach()
        L, still = torch.linalg.cholesky_ex(matrix + amount[..., None, None] * eye)
        if not bool(still.any()):
            log.warning("safe_cholesky: %d of %d matrices of size %d needed a relative jitter of %.1e",
                        int((info > 0).sum()), info.numel(), matrix.shape[-1], jitter)
            return L
        jitter *= 10
    smallest = float(torch.linalg.eigvalsh(matrix.detach())[..., 0].min())
    raise NotPositiveDefiniteError(
        f"a matrix of shape {tuple(matrix.shape)} is not positive definite (smallest eigenvalue {smallest:.3e}, jitter up to {max_jitter:.0e} "
        "did not help); use eigclip for an indefinite matrix, a larger prior precision or float64")


def eigclip(matrix: Tensor) -> Tensor:
    """The nearest PSD matrix in Frobenius norm, V max(λ, 0) Vᵀ for matrix = V diag(λ) Vᵀ.

    >>> eigclip(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
    tensor([[3., 0.],
            [0., 0.]])
    """
    return _spectral(matrix, "clip")


def eigabs(matrix: Tensor) -> Tensor:
    """The PSD matrix V |λ| Vᵀ for matrix = V diag(λ) Vᵀ ("saddle-free" curvature).

    >>> eigabs(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
    tensor([[3., 0.],
            [0., 1.]])
    """
    return _spectral(matrix, "abs")


def psd_root(matrix: Tensor) -> Tensor:
    """The symmetric root S with S Sᵀ = matrix, for PSD matrices of any rank (a Cholesky factor needs full rank).

    Eigenvalues that rounding made negative count as zero.

    Raises:
        ValueError: an eigenvalue is negative beyond rounding, so that no real root exists.

    >>> psd_root(torch.tensor([[9.0, 0.0], [0.0, 0.0]]))
    tensor([[3., 0.],
            [0., 0.]])
    """
    return _spectral(matrix, "sqrt")


def _spectral(matrix: Tensor, name: str) -> Tensor:
    if matrix.shape[-1] == 1:                                        # the common scalar output: no eigenvalues to look for
        if name == "sqrt":
            _check_psd(matrix[..., 0])
            positive = matrix > 0                                    # √ has no slope at 0: the gradient there is 0, not NaN
            return torch.where(positive, torch.where(positive, matrix, 1.0).sqrt(), 0.0)
        return matrix.clamp_min(0) if name == "clip" else matrix.abs()
    wide = matrix.to(torch.float32) if matrix.dtype in (torch.float16, torch.bfloat16) else matrix   # no eigh in half precision
    return _Spectral.apply(wide, name)[0].to(matrix.dtype)


def _check_psd(eigenvalues: Tensor) -> None:
    if eigenvalues.device.type == "meta" or eigenvalues.numel() == 0:
        return
    smallest, largest = eigenvalues.amin(-1), eigenvalues.abs().amax(-1)
    tolerance = 100 * eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps
    if bool((smallest < -tolerance * largest).any()):
        raise ValueError(f"psd_root needs a PSD matrix but an eigenvalue is {float(smallest.min()):.3e}; pass it through eigclip or eigabs first")


class _Spectral(torch.autograd.Function):
    """F(A) = V f(λ) Vᵀ with the Daleckii-Krein derivative, finite also where eigenvalues coincide (autograd through eigh is not).

    dF = V (K ∘ VᵀdA V) Vᵀ,   K_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j)   (Higham, Functions of Matrices, theorem 3.11).
    """

    @staticmethod
    def forward(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        values, V = torch.linalg.eigh((matrix + matrix.mT) / 2)
        if name == "sqrt":
            _check_psd(values)
        f = {"clip": values.clamp_min(0), "abs": values.abs(), "sqrt": values.clamp_min(0).sqrt()}[name]
        return (V * f.unsqueeze(-2)) @ V.mT, values, V

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[1]
        ctx.save_for_backward(output[1], output[2])
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        values, V = ctx.saved_tensors
        a, b = values.unsqueeze(-1), values.unsqueeze(-2)
        # Each divided difference in a form without cancellation; where it is 0/0 the slope from below is taken (0 for √ at 0).
        if ctx.name == "sqrt":
            denominator = a.clamp_min(0).sqrt() + b.clamp_min(0).sqrt()
            tiny = denominator <= torch.finfo(values.dtype).eps ** 0.5 * values.abs().amax(-1)[..., None, None].sqrt()
            K = torch.where(tiny, 0.0, 1 / torch.where(tiny, 1.0, denominator))
        else:
            a_p, b_p = a.clamp_min(0), b.clamp_min(0)
            same = (a > 0) == (b > 0)                                # both kept or both clipped: the slope is constant
            mixed = (a_p - b_p) / torch.where(same, 1.0, a - b)
            K = torch.where(same, (a > 0).to(a.dtype), mixed)        # clip; |λ| = 2 max(λ, 0) − λ gives the other
            K = 2 * K - 1 if ctx.name == "abs" else K
        G = V.mT @ ((grad + grad.mT) / 2) @ V
        return V @ (K * G) @ V.mT, None
