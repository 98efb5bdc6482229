"""The Matérn family with half-integer smoothness."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from bayesgn.models.sde_kernels.space import StateSpace, identity

ROUGHEST, SMOOTHEST = 0.5, 5.5
FAR = 300.0  # in z = λ dt: e^{−z} is nothing, and z¹⁰ is still a number


class Matern(StateSpace):
    """Matérn with ν = p + ½: d = p + 1 states, combinations of the function and its derivatives such that P = I; the first is f itself.

    With λ = √(2ν) / lengthscale and N = F + I nilpotent: A(dt) = e^{−λ dt} Σ_{k ≤ p} (λ dt N)^k / k!

    Args:
        nu: ½, 1½, 2½ … up to 5½.
        lengthscale: a positive scalar, in the unit of the times.

    Raises:
        ValueError: for any other ν.

    Example:
        >>> from bayesgn.models.sde_kernels import Matern
        >>> process = Matern(3.5, torch.tensor(2.0, dtype=torch.float64))
        >>> process.transition(torch.tensor([0.0, 0.1], dtype=torch.float64)).shape
        torch.Size([2, 4, 4])

    Source: Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression models".
    """

    def __init__(self, nu: float, lengthscale: Tensor) -> None:
        if nu % 1 != 0.5 or not ROUGHEST <= nu <= SMOOTHEST:
            raise ValueError(f"Matern: nu={nu}; expected 0.5, 1.5, 2.5 … {SMOOTHEST} (for smoother functions take sde_kernels.RBF).")
        p = round(nu - 0.5)
        self.rate = math.sqrt(2 * nu) / lengthscale.reshape(())
        self.powers, self.products = (torch.tensor(a).to(self.rate) for a in _coefficients(p))
        super().__init__(torch.eye(p + 1, dtype=self.rate.dtype, device=self.rate.device)[0])

    def transition(self, dt):
        z = (self.rate * dt).clamp(max=FAR)
        terms = [(-z).exp()]
        for _ in self.powers[1:]:
            terms.append(terms[-1] * z)
        return (torch.stack(terms).mT @ self.powers).unflatten(-1, (self.d, self.d))

    def covariance(self, t):
        return identity(self.d, t)

    def noise(self, t, dt):
        # Q = ∫₀^z a(s) a(s)ᵀ ds with a = A L: the entry of the k-th derivative starts with z^(p − k) and keeps all its digits.
        integrals: Tensor = _Integrals.apply((self.rate * dt).clamp(max=FAR), len(self.products))  # type: ignore[assignment]
        Q = (integrals.mT @ self.products).unflatten(-1, (self.d, self.d))
        return 0.5 * (Q + Q.mT)


class _Integrals(torch.autograd.Function):
    """∫₀^z s^j e^{−2s} ds for j < count, [count u] for z [u]."""

    @staticmethod
    def forward(ctx, z: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(z)
        out, decay, top = z.new_empty(count, len(z)), (-2 * z).exp(), count - 1
        out[top] = math.factorial(top) / 2**count * torch.special.gammainc(torch.full_like(z, count), 2 * z)
        for j in range(top, 0, -1):  # by parts, downwards: only positive numbers are added
            out[j - 1] = (2 / j) * (out[j] + 0.5 * z**j * decay)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (z,) = ctx.saved_tensors
        total = torch.zeros_like(z)
        for g in grad.flip(0):
            total = total * z + g
        return (-2 * z).exp() * total, None


@functools.lru_cache(maxsize=8)
def _coefficients(p: int) -> tuple[np.ndarray, np.ndarray]:
    """N^k / k! [p+1 d²] for A = e^{−z} Σ_k z^k N^k / k!, and M_j [2p+1 d²] for a aᵀ = e^{−2z} Σ_j z^j M_j."""
    N, L = _nilpotent(p)
    powers = [np.linalg.matrix_power(N, k) / math.factorial(k) for k in range(p + 1)]
    products = np.zeros((2 * p + 1, p + 1, p + 1))
    for k, A in enumerate(powers):
        for j, B in enumerate(powers):
            products[k + j] += np.outer(A @ L, B @ L)
    return np.stack(powers).reshape(p + 1, -1), products.reshape(2 * p + 1, -1)


@functools.lru_cache(maxsize=8)
def _nilpotent(p: int) -> tuple[np.ndarray, np.ndarray]:
    """F + I [d d] and the noise's column L [d] at unit rate, in the basis in which the stationary covariance is the identity."""
    d = p + 1
    F = np.diag(np.ones(p), 1)
    F[-1] = [-math.comb(d, k) for k in range(d)]
    # Derivatives j and k have covariance ±E ω^{j+k} under the spectral density ∝ (1 + ω²)^{−d}.
    moments = [1.0]
    for k in range(1, p + 1):
        moments.append(moments[-1] * (2 * k - 1) / (2 * d - 2 * k - 1))
    P = np.zeros((d, d))
    for j in range(d):
        for k in range(d):
            if (j + k) % 2 == 0:
                P[j, k] = (-1) ** ((j - k) // 2) * moments[(j + k) // 2]
    C = np.linalg.cholesky(P)  # lower: the first state stays f itself
    N = np.linalg.solve(C, (F + np.eye(d)) @ C)
    N[np.triu_indices(d, 2)] = 0
    F = N - np.eye(d)
    L = np.zeros(d)
    L[-1] = np.sqrt(-2 * F[-1, -1])  # F + Fᵀ + L Lᵀ = 0
    return N, L
