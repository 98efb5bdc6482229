"""gpytorch kernels over time as linear stochastic differential equations.

    dx = F x dt + L dβ,   f(t) = H x(t),   k(t, t') = H A(|t' − t|) P(t) Hᵀ

A kernel is turned into a :class:`StateSpace` by :func:`state_space`, a ``functools.singledispatch`` over kernel types: a kernel of your own joins by
``@state_space.register``.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from gpytorch import kernels
from torch import Tensor


class StateSpace(ABC):
    """A process x(t) of d states whose first-row combination H x(t) has the kernel's covariance; balanced: P is near the identity.

    Attributes:
        H [d]: f = H x.
        stationary: whether P(t) is the same for all t.
    """

    stationary = True

    def __init__(self, H: Tensor) -> None:
        self.H = H

    @property
    def d(self) -> int:
        """States."""
        return self.H.shape[-1]

    @abstractmethod
    def transition(self, dt: Tensor) -> Tensor:
        """A [u d d] over steps dt [u] ≥ 0."""

    @abstractmethod
    def covariance(self, t: Tensor) -> Tensor:
        """P(t) [k d d], the prior covariance of x at times t [k]."""

    def noise(self, t: Tensor, dt: Tensor) -> Tensor:
        """Q [u d d] of a step from t to t + dt."""
        A = self.transition(dt)
        Q = self.covariance(t + dt) - A @ self.covariance(t) @ A.mT
        return 0.5 * (Q + Q.mT)


class Matern(StateSpace):
    """Matern with ν = p + ½: d = p + 1 states, the function and its derivatives, scaled so that P = I.

    With λ = √(2ν) / lengthscale and N = F + I nilpotent: A(dt) = e^{−λ dt} Σ_{k ≤ p} (λ dt N)^k / k!

    Source: Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression models".
    """

    def __init__(self, nu: float, lengthscale: Tensor) -> None:
        p = round(nu - 0.5)
        self.rate = math.sqrt(2 * nu) / lengthscale.reshape(())
        N = torch.as_tensor(_nilpotent(p)).to(self.rate)
        self.powers = [torch.matrix_power(N, k) / math.factorial(k) for k in range(p + 1)]
        super().__init__(torch.eye(p + 1, dtype=self.rate.dtype, device=self.rate.device)[0])

    def transition(self, dt):
        z = (self.rate * dt)[:, None, None]
        return (-z).exp() * sum(z**k * N for k, N in enumerate(self.powers))

    def covariance(self, t):
        return torch.eye(self.d, dtype=t.dtype, device=t.device).expand(len(t), -1, -1)


@functools.lru_cache(maxsize=8)
def _nilpotent(p: int) -> np.ndarray:
    """F + I at unit rate in the basis in which the stationary covariance is the identity."""
    d = p + 1
    F = np.diag(np.ones(p), 1)
    F[-1] = [-math.comb(d, k) for k in range(d)]
    L = np.zeros((d, d))
    L[-1, -1] = 1
    eye = np.eye(d)
    P = np.linalg.solve(np.kron(F, eye) + np.kron(eye, F), -L.reshape(-1)).reshape(d, d)  # F P + P Fᵀ + L = 0
    P = P / P[0, 0]
    C = np.linalg.cholesky(0.5 * (P + P.T))  # lower: the first state stays f itself
    return np.linalg.solve(C, (F + eye) @ C)


class Scaled(StateSpace):
    """A process times √scale: P is scaled, so that H and A stay."""

    def __init__(self, inner: StateSpace, scale: Tensor) -> None:
        super().__init__(inner.H)
        self.inner, self.scale, self.stationary = inner, scale.reshape(()), inner.stationary

    def transition(self, dt):
        return self.inner.transition(dt)

    def covariance(self, t):
        return self.scale * self.inner.covariance(t)

    def noise(self, t, dt):
        return self.scale * self.inner.noise(t, dt)


@functools.singledispatch
def state_space(kernel) -> StateSpace:
    """The state-space form of a gpytorch kernel over time, at its present hyper-parameters, with a graph to them.

    Raises:
        TypeError: for a kernel that has none.
    """
    raise TypeError(
        f"{type(kernel).__name__} has no state-space form here; expected Matern, RBF, periodic, cosine, linear or constant kernels, or scaled, "
        "added and multiplied ones. Use models.GP or models.SparseGP for other kernels, or register a form: @sde_kernels.state_space.register."
    )


def _wide(parameter: Tensor) -> Tensor:
    return parameter if parameter.device.type == "mps" else parameter.double()


@state_space.register
def _(kernel: kernels.MaternKernel) -> StateSpace:
    return Matern(kernel.nu, _wide(kernel.lengthscale))


@state_space.register
def _(kernel: kernels.ScaleKernel) -> StateSpace:
    return Scaled(state_space(kernel.base_kernel), _wide(kernel.outputscale))
