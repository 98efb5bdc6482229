"""Stationary processes with a rational spectral density: the squared exponential kernel, as near as wanted."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn.models.sde_kernels.space import StateSpace, accumulated, identity


class Rational(StateSpace):
    """Spectral density ∝ |Π_z (iω ℓ + z) / Π_p (iω ℓ + p)|², one state a pole; P = I and f is a multiple of the first state.

    The poles are a cascade of all-pass sections (Kautz functions), whose states are uncorrelated; then they are turned so that one of them is f. The
    transition is a sum over poles with constant matrices, A(dt) = Σ_p e^{−p dt / ℓ} R_p.

    Args:
        poles: p of positive real part, all different; of a conjugate pair the one with positive imaginary part.
        zeros: z, fewer than poles, likewise.
        lengthscale: ℓ, a positive scalar, in the unit of the times.
        variance: k(0).

    Raises:
        ValueError: for poles that are not stable or coincide, or too many zeros.

    Source: Ninness and Gustafsson (1997), "A unifying construction of orthonormal bases for system identification" (the states).
    """

    def __init__(self, poles: tuple[complex, ...], zeros: tuple[complex, ...], lengthscale: Tensor, variance: float = 1.0) -> None:
        self.lengthscale = lengthscale.reshape(())
        r = _realised(tuple(map(complex, poles)), tuple(map(complex, zeros)))
        self.decay, self.turn, self.matrices, self.columns = (torch.tensor(a).to(self.lengthscale) for a in r)
        self.limit = 16 / float(np.abs(r.decay + 1j * r.turn).max())
        H = torch.zeros(self.matrices.shape[-1], dtype=self.lengthscale.dtype, device=self.lengthscale.device)
        H[0] = math.sqrt(variance)
        super().__init__(H)

    def transition(self, dt):
        return self._transition(dt / self.lengthscale)

    def covariance(self, t):
        return identity(self.d, t)

    def noise(self, t, dt):
        return accumulated(self._column, self._transition, dt / self.lengthscale, self.limit, 3)

    def _waves(self, z: Tensor) -> Tensor:
        """Real and imaginary parts of e^{−p z} for each pole, [u 2k]."""
        z = z.unsqueeze(-1)
        size, angle = (-self.decay * z).exp(), self.turn * z
        return torch.cat([size * angle.cos(), size * angle.sin()], -1)

    def _transition(self, z: Tensor) -> Tensor:
        return (self._waves(z) @ self.matrices.flatten(1)).unflatten(-1, (self.d, self.d))

    def _column(self, z: Tensor) -> Tensor:
        return self._waves(z) @ self.columns


class RBF(Rational):
    """exp(−τ² / 2ℓ²), approximated by a rational spectral density that is fitted to the kernel itself; k(0) = 1 exactly.

    =====  ===  ===  ===  ===  ===  ===  ===
    order    4    5    6    7    8    9   10
    error  4e-4 6e-5 9e-6 2e-6 4e-7 9e-8 2e-8
    =====  ===  ===  ===  ===  ===  ===  ===

    The error is max_τ |k̂(τ) − k(τ)|, measured; the spectral Taylor expansion of order 6 (:class:`SpectralTaylor`) has 3e-3. Paths are order − 2 times
    differentiable less one.

    Args:
        lengthscale: ℓ, a positive scalar, in the unit of the times.
        order: states, 4 to 10.

    Example:
        >>> import gpytorch
        >>> from bayesgn.models import sde_kernels
        >>> class Smooth(gpytorch.kernels.RBFKernel):
        ...     "The same kernel, to be approximated more closely."
        >>> @sde_kernels.state_space.register
        ... def _(kernel: Smooth):
        ...     return sde_kernels.RBF(kernel.lengthscale.double(), order=10)
        >>> sde_kernels.state_space(Smooth()).d
        10
    """

    def __init__(self, lengthscale: Tensor, order: int = 6) -> None:
        if order not in FITTED:
            raise ValueError(f"RBF: order={order}; expected {min(FITTED)} to {max(FITTED)} states.")
        poles, zero = FITTED[order]
        super().__init__(poles, (zero,), lengthscale)


class SpectralTaylor(Rational):
    """exp(−τ² / 2ℓ²), approximated by Taylor expansion of the inverse spectral density, 1 / S(ω) ∝ Σ_{k ≤ N} (ω² ℓ² / 2)^k / k!

    max_τ |k̂(τ) − k(τ)| is 2e-2 for N = 4, 3e-3 for 6 and 6e-4 for 8, and k̂(0) is too large by as much: :class:`RBF` is nearer with the
    same states.

    Args:
        lengthscale: ℓ, a positive scalar, in the unit of the times.
        order: N = d states, 2 to 8.

    Source: Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression models", sec. 4.2.
    """

    def __init__(self, lengthscale: Tensor, order: int = 6) -> None:
        if order not in range(2, 9):
            raise ValueError(f"SpectralTaylor: order={order}; expected 2 to 8 states (for more precision sde_kernels.RBF).")
        poles, variance = _taylor(order)
        super().__init__(poles, (), lengthscale, variance)


# max_τ |k̂ − k| made as small as it would go by reweighted least squares, with one pair of zeros: poles, zero.
FITTED: dict[int, tuple[tuple[complex, ...], complex]] = {
    4: ((1.5664102712 + 0.6324877609j, 1.4796383497 + 2.0153709809j), 4.8624720558j),
    5: ((1.7511040849, 1.7244268115 + 1.1462909385j, 1.6358620120 + 2.4427900838j), 4.9210023175j),
    6: ((1.8878008075 + 0.5143321730j, 1.8470490083 + 1.5804780380j, 1.7547233551 + 2.8030817088j), 5.0915272305j),
    7: ((1.9796945522, 1.9632905405 + 0.9554961597j, 1.9107809103 + 1.9647732541j, 1.8069558196 + 3.1326281606j), 5.3437762282j),
    8: (
        (2.0612767522 + 0.4441940507j, 2.0333903541 + 1.3502847913j, 1.9728464244 + 2.3192432086j, 1.8636521746 + 3.4493869934j),
        0.3431198873 + 5.4822906366j,
    ),
    9: (
        (2.1306337864, 2.1186890697 + 0.8403388383j, 2.0813982390 + 1.7084352962j, 2.0131485549 + 2.6449848133j, 1.8969770493 + 3.7442068112j),
        0.3992571689 + 5.6839539299j,
    ),
    10: (
        (
            2.1887021176 + 0.3967644070j, 2.1672591970 + 1.2005172365j, 2.1221239796 + 2.0382821638j, 2.0470827726 + 2.9480386158j,
            1.9243238149 + 4.0211221726j,
        ),
        0.4333409347 + 5.8882460833j,
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=16)
def _taylor(order: int) -> tuple[tuple[complex, ...], float]:
    """The poles at unit lengthscale, and k̂(0)."""
    x = np.roots([1 / math.factorial(k) for k in range(order, -1, -1)])  # of Σ x^k / k!, x = ω²/2
    p = np.sqrt(-2 * x)  # s = iω = −p
    p = np.where(np.real(p) < 0, -p, p)
    # k̂(0) = 1/2π ∫ S dω with S = √(2π) / Σ: the residues at ω = i p, where dΣ/dω = ω Σ'(x)
    slope = np.polyval([1 / math.factorial(k) for k in range(order - 1, -1, -1)], -(p**2) / 2)
    variance = float(np.real(math.sqrt(2 * math.pi) * np.sum(1 / (p * slope))))
    return (*p[np.imag(p) >= 1e-8].tolist(), *np.real(p[np.abs(np.imag(p)) < 1e-8]).tolist()), variance


class _Realisation(NamedTuple):
    decay: np.ndarray  # [k] real part of each pole
    turn: np.ndarray  # [k] imaginary part
    matrices: np.ndarray  # [2k d d] that belong to e^{−z decay} cos(z turn) and sin
    columns: np.ndarray  # [2k d] those times the column L through which noise comes in, F + Fᵀ + L Lᵀ = 0


@functools.lru_cache(maxsize=64)
def _realised(poles: tuple[complex, ...], zeros: tuple[complex, ...]) -> _Realisation:
    """The process at unit lengthscale with P = I, and f the first state (up to a factor)."""
    d = sum(1 if p.imag == 0 else 2 for p in poles)
    if any(p.real <= 0 or p.imag < 0 for p in poles) or len(set(poles)) < len(poles):
        raise ValueError(f"poles {poles} should differ, with a positive real part and no negative imaginary part (of conjugate pairs give one).")
    if sum(1 if z.imag == 0 else 2 for z in zeros) >= d:
        raise ValueError(f"{len(zeros)} zero(s) for {d} states (of conjugate pairs give one); expected fewer zeros than states.")
    # Each section is all-pass with input column L_i: F_ii + F_iiᵀ = −L_i L_iᵀ; its output y = u − L_iᵀ x_i is the next one's input: F_ji = −L_j L_iᵀ.
    L, own, at = np.zeros(d), np.zeros((d, d)), 0
    below = np.zeros((d, d), dtype=bool)
    for p in poles:
        k = 1 if p.imag == 0 else 2
        L[at] = math.sqrt(2 * k * p.real)
        own[at : at + k, at : at + k] = [[-p.real]] if k == 1 else [[-2 * p.real, abs(p)], [-abs(p), 0.0]]
        below[at + k :, at : at + k] = True
        at += k
    F = np.where(below, -np.outer(L, L), own)
    # h of f = h x: h (iω − F)⁻¹ L is the transfer function; its states are orthonormal over ω, so this least-squares problem is well conditioned.
    ω = np.linspace(0, 3 * max(abs(p) for p in poles), 8 * d)
    s = 1j * ω
    goal = np.ones_like(s)
    for z in zeros:
        goal = goal * (s + z) * (1 if z.imag == 0 else s + z.conjugate())
    for p in poles:
        goal = goal / ((s + p) * (1 if p.imag == 0 else s + p.conjugate()))
    states = np.linalg.solve(s[:, None, None] * np.eye(d) - F, np.broadcast_to(L[:, None], (len(s), d, 1)))[..., 0]
    h = np.linalg.lstsq(np.concatenate([np.real(states), np.imag(states)]), np.concatenate([np.real(goal), np.imag(goal)]), rcond=None)[0]
    # A reflection U that takes h to the first axis.
    v = h / np.linalg.norm(h)
    v[0] += math.copysign(1.0, v[0])
    U = np.eye(d) - 2 * np.outer(v, v) / (v @ v)
    F, L = U @ F @ U, U @ L
    λ, V = np.linalg.eig(F)
    W = np.linalg.inv(V)
    W = W @ (2 * np.eye(d) - V @ W)  # what the inverse of close eigenvectors lost, by one step of Newton's
    keep = np.imag(λ) >= 0
    λ, V, W = λ[keep], V[:, keep], W[keep]
    R = np.einsum("ik,kj->kij", V, W) * np.where(np.imag(λ) > 0, 2.0, 1.0)[:, None, None]
    matrices = np.concatenate([np.real(R), -np.imag(R)])  # Re e^{λz} R = e^{Re λ z} (cos(Im λ z) Re R − sin(Im λ z) Im R)
    return _Realisation(-np.real(λ), np.imag(λ), matrices, matrices @ L)
