"""Scaled, added and multiplied processes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn.models.sde_kernels.space import StateSpace


class Scaled(StateSpace):
    """A process times √scale: P is scaled, so that H and A stay."""

    def __init__(self, inner: StateSpace, scale: Tensor) -> None:
        super().__init__(inner.H)
        self.inner, self.scale = inner, scale.reshape(())
        self.stationary, self.homogeneous = inner.stationary, inner.homogeneous

    def transition(self, dt):
        return self.inner.transition(dt)

    def covariance(self, t):
        return self.scale * self.inner.covariance(t)

    def noise(self, t, dt):
        return self.scale * self.inner.noise(t, dt)


class Sum(StateSpace):
    """Independent processes added: their states side by side."""

    def __init__(self, parts: list[StateSpace]) -> None:
        super().__init__(torch.cat([p.H for p in parts]))
        self.parts = parts
        self.stationary, self.homogeneous = all(p.stationary for p in parts), all(p.homogeneous for p in parts)

    def transition(self, dt):
        return self._each(lambda p: p.transition(dt))

    def covariance(self, t):
        return self._each(lambda p: p.covariance(t))

    def noise(self, t, dt):
        return self._each(lambda p: p.noise(t, dt))

    def _each(self, matrix: Callable[[StateSpace], Tensor]) -> Tensor:
        rows, at = [], 0
        for p in self.parts:
            rows.append(torch.nn.functional.pad(matrix(p), (at, self.d - at - p.d)))
            at += p.d
        return torch.cat(rows, -2)


class Product(StateSpace):
    """Kernels multiplied: the states are all products of one state of each, d = Π d_i. Of two processes, with P' = P(t + dt):

        H = H₁ ⊗ H₂,   A = A₁ ⊗ A₂,   P = P₁ ⊗ P₂,   Q = P₁' ⊗ Q₂ + Q₁ ⊗ A₂ P₂ A₂ᵀ

    The kernel is that of the product of independent processes, which is not Gaussian, but has a Gaussian twin with the same covariance.
    """

    def __init__(self, parts: list[StateSpace]) -> None:
        super().__init__(functools.reduce(torch.kron, [p.H for p in parts]))
        self.parts = parts
        self.stationary = all(p.stationary for p in parts)
        self.homogeneous = self.stationary and all(p.homogeneous for p in parts)

    def transition(self, dt):
        return functools.reduce(_kron, [p.transition(dt) for p in self.parts])

    def covariance(self, t):
        return functools.reduce(_kron, [p.covariance(t) for p in self.parts])

    def noise(self, t, dt):
        ahead, Q = self.parts[0].covariance(t + dt), self.parts[0].noise(t, dt)
        for p in self.parts[1:]:
            A, Q2 = p.transition(dt), p.noise(t, dt)
            Q = _kron(ahead, Q2) + _kron(Q, A @ p.covariance(t) @ A.mT)
            ahead = _kron(ahead, p.covariance(t + dt))
        return 0.5 * (Q + Q.mT)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker products of batches [u a a], [u b b]."""
    return torch.einsum("uij,ukl->uikjl", a, b).reshape(len(a), a.shape[1] * b.shape[1], -1)
