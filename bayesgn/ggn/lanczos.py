"""Lanczos: orthonormal bases, and spectral densities of operators that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def orthonormal(W: Tensor, B: Tensor) -> Tensor:
    """An orthonormal basis [p m] for the columns of W outside the span of the orthonormal B; random-like where W adds nothing."""
    for _ in range(4):
        W = torch.linalg.qr(W - B @ (B.mT @ W)).Q
        if (B.mT @ W).abs().amax() <= 1e-13 * len(B) ** 0.5:  # usually the second round
            return W
    return W


def tridiagonal(H: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos from unit vectors z [p s], all at once: diagonals α [s k] and off-diagonals β [s k − 1], k ≤ steps.

    Fully re-orthogonalised; a start whose Krylov space is used up gets β = 0 from there on.
    """
    q, basis, α, β = z, [], [], []
    largest = z.new_zeros(z.shape[1])
    for step in range(min(steps, len(z))):
        basis.append(q)
        w = H(q)
        α.append((q * w).sum(0))
        Q = torch.stack(basis, dim=-1)  # [p s k]
        for _ in range(2):
            w = w - torch.einsum("psk,sk->ps", Q, torch.einsum("psk,ps->sk", Q, w))
        norm = w.norm(dim=0)
        largest = torch.maximum(largest, α[-1].abs() + norm)
        live = norm > 1e-10 * largest
        if step == min(steps, len(z)) - 1 or not bool(live.any()):
            break
        β.append(torch.where(live, norm, 0.0))
        q = torch.where(live, w / torch.where(live, norm, 1.0), 0.0)
    k = len(α)
    return torch.stack(α, dim=1), torch.stack(β[: k - 1], dim=1) if k > 1 else z.new_zeros(z.shape[1], 0)


def quadrature(α: Tensor, β: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights [s k] of the spectral measure of every start: zᵀ f(H) z ≈ Σ_j w_j f(θ_j)."""
    θ, V = torch.linalg.eigh(torch.diag_embed(α) + torch.diag_embed(β, 1) + torch.diag_embed(β, -1))
    return θ, V[:, 0].square()


def density(
    H: Callable[[Tensor], Tensor], U: Tensor, probes: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Nodes θ > 0 and weights w [m] with tr f(ΠHΠ) ≈ Σ_j w_j f(θ_j) for f(0) = 0, Π the projector away from U [p r].

    Stochastic Lanczos quadrature: a mean over random starts in the complement, of dimension p − r.
    """
    p, r = U.shape

    def outside(V: Tensor) -> Tensor:
        return V - U @ (U.mT @ V)

    z = outside(torch.randn(p, probes, generator=generator, dtype=U.dtype).to(U.device))
    θ, w = quadrature(*tridiagonal(lambda V: outside(H(V)), z / z.norm(dim=0), min(steps, p - r)))
    θ, w = θ.reshape(-1), w.reshape(-1) * ((p - r) / probes)
    keep = θ > 1e-10 * θ.max().clamp_min(torch.finfo(θ.dtype).tiny)
    return θ[keep], w[keep]
