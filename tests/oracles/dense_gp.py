"""Approximate inference in a small Gaussian process written out with dense matrices and general-purpose optimisers: no sites, no rules."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

D = torch.float64


def maximize(objective, *starts: Tensor, steps: int = 60) -> tuple[float, list[Tensor]]:
    """L-BFGS to the end of what float64 gives."""
    x = [s.clone().requires_grad_() for s in starts]
    limits = {"max_iter": 200, "tolerance_grad": 1e-13, "tolerance_change": 0.0, "history_size": 100}
    optimizer = torch.optim.LBFGS(x, lr=1.0, line_search_fn="strong_wolfe", **limits)

    def closure():
        optimizer.zero_grad()
        loss = -objective(*x)
        loss.backward()
        return loss

    for _ in range(steps):
        before = float(closure().detach())
        optimizer.step(closure)
        if abs(float(closure().detach()) - before) <= 1e-14 * (1 + abs(before)):
            break
    with torch.no_grad():
        return float(objective(*x)), [t.detach() for t in x]


def mode(K: Tensor, log_likelihood, start: Tensor | None = None) -> tuple[float, Tensor]:
    """max_f log p(y | f) + log N(f; 0, K) and where it is [N]; log_likelihood takes f [N]."""
    L = torch.linalg.cholesky(K)
    constant = -L.diagonal().log().sum() - 0.5 * len(K) * math.log(2 * math.pi)
    objective = lambda v: log_likelihood(L @ v) - 0.5 * v @ v + constant
    value, (v,) = maximize(objective, torch.zeros(len(K), dtype=D) if start is None else torch.linalg.solve(L, start))
    # Newton's steps to the last digits
    for _ in range(5):
        g = torch.autograd.functional.jacobian(objective, v)
        v = v - torch.linalg.solve(torch.autograd.functional.hessian(objective, v), g)
    return float(objective(v)), L @ v


def laplace_evidence(K: Tensor, log_likelihood, f: Tensor) -> float:
    """log p(y | f̂) + log N(f̂; 0, K) + N/2 log 2π − ½ log |K⁻¹ + H|, H the Hessian of −log p(y | f)."""
    H = -torch.autograd.functional.hessian(log_likelihood, f)
    log_det = torch.linalg.slogdet(torch.eye(len(K), dtype=D) + K @ H).logabsdet
    return float(log_likelihood(f) - 0.5 * f @ torch.linalg.solve(K, f) - 0.5 * log_det)


def variational(K: Tensor, expected, parts: list[list[int]] | None = None) -> tuple[float, Tensor, Tensor]:
    """The highest lower bound over Gaussians, their mean and covariance; independent between ``parts`` (lists of indices) if these are given.

    expected: (mean [N], cov [N N]) → Σ E_q log p(y_n | f_n).
    """
    N = len(K)
    mask = torch.ones(N, N, dtype=D)
    if parts is not None:
        mask = torch.zeros(N, N, dtype=D)
        for part in parts:
            mask[np.ix_(part, part)] = 1
    L = torch.linalg.cholesky(K)

    def factors(v, a):
        A = torch.tril(a, -1) * mask + torch.diag_embed(a.diagonal().exp())  # mean L v, cov L A Aᵀ Lᵀ
        return L @ v, L @ A, A

    def bound(v, a):
        mean, root, A = factors(v, a)
        KL = 0.5 * (A.square().sum() + v @ v - N) - a.diagonal().sum()
        return expected(mean, root @ root.T) - KL

    value, (v, a) = maximize(bound, torch.zeros(N, dtype=D), torch.zeros(N, N, dtype=D))
    mean, root, _ = factors(v, a)
    return value, mean, root @ root.T


def expectation_propagation(K: Tensor, log_p, power: float = 1.0, sweeps: int = 200) -> tuple[float, Tensor, Tensor]:
    """Power EP for one latent a datum, one site after another, moments by a grid of 1501 points; log evidence, means and variances.

    log_p(n, f [grid]) → log p(y_n | f).
    """
    n = len(K)
    h, λ = np.zeros(n), np.zeros(n)
    K = K.numpy()

    def belief():
        S = np.linalg.inv(np.eye(n) + K * λ) @ K
        return S @ h, S

    def tilted(i, m, v):
        c = 1 / (1 / v - power * λ[i])  # the cavity
        μ = c * (m / v - power * h[i])
        f = np.linspace(μ - 10 * c**0.5, μ + 10 * c**0.5, 1501)
        log_w = power * log_p(i, torch.as_tensor(f)).numpy() - 0.5 * (f - μ) ** 2 / c
        w = np.exp(log_w - log_w.max())
        log_Z = math.log(w.sum() * (f[1] - f[0]) / math.sqrt(2 * math.pi * c)) + log_w.max()
        mean = (w @ f) / w.sum()
        return μ, c, log_Z, mean, (w @ (f - mean) ** 2) / w.sum()

    for _ in range(sweeps):
        before = np.concatenate([h, λ])
        for i in range(n):
            m, S = belief()
            μ, c, _, mean, v = tilted(i, m[i], S[i, i])
            λ[i] = 0.5 * λ[i] + 0.5 * (1 / v - 1 / c) / power
            h[i] = 0.5 * h[i] + 0.5 * (mean / v - μ / c) / power
        if np.abs(np.concatenate([h, λ]) - before).max() < 1e-8:
            break
    m, S = belief()
    value = 0.5 * h @ m - 0.5 * np.linalg.slogdet(np.eye(n) + K * λ)[1]  # log Z of the sites
    for i in range(n):
        μ, c, log_Z, *_ = tilted(i, m[i], S[i, i])
        # less log E_cavity[t^α]
        P = 1 / c + power * λ[i]
        b = μ / c + power * h[i]
        value += (log_Z - (0.5 * b * b / P - 0.5 * μ * μ / c - 0.5 * math.log(P * c))) / power
    return float(value), torch.as_tensor(m), torch.as_tensor(np.diag(S).copy())
