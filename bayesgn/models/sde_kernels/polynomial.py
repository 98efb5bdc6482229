"""Polynomials in time with random coefficients: constant and linear kernels among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesgn.models.sde_kernels.space import StateSpace


class Polynomial(StateSpace):
    """f(t) = Σ_k a_k t^k with independent a_k ~ N(0, variances_k); the states are the derivatives f^(i)(t) / i!, which no noise disturbs.

        A_ij = C(j, i) dt^{j−i},   P(t) = T(t) diag(variances) T(t)ᵀ,   T_ik = C(k, i) t^{k−i}

    Args:
        variances [m + 1]: of the coefficients, constant first; (v,) is a constant, (0, v) gpytorch's linear kernel v t t'.
    """

    def __init__(self, variances: Tensor) -> None:
        self.variances = variances
        super().__init__(torch.eye(len(variances), dtype=variances.dtype, device=variances.device)[0])
        self.stationary = len(variances) == 1

    def transition(self, dt):
        m = self.d
        power = [torch.ones_like(dt)]
        for _ in range(m - 1):
            power.append(power[-1] * dt)
        zero = torch.zeros_like(dt)
        entries = [math.comb(k, i) * power[k - i] if k >= i else zero for i in range(m) for k in range(m)]
        return torch.stack(entries, -1).unflatten(-1, (m, m))

    def covariance(self, t):
        T = self.transition(t)
        return (T * self.variances) @ T.mT

    def noise(self, t, dt):
        return torch.zeros_like(self.transition(dt))
