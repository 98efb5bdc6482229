"""The Gaussian process over time in state-space form: exact, linear in the number of data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn import _kalman
from bayesgn._psd import psd_root
from bayesgn.models.gaussian_process import GaussianProcess, Solution
from bayesgn.models.sde_kernels import state_space
from bayesgn.rules import Marginals


class Times(NamedTuple):
    """Times made ready: their order, and which steps between them are one and the same.

    Attributes:
        x [n 1]: as they came.
        order [n], back [n]: sorted = x[order], and x = sorted[back].
        t [n]: sorted.
        dt [u]: the different steps.
        step [n]: which of them leads to each point; −1 for none.
    """

    x: Tensor
    order: Tensor
    back: Tensor
    t: Tensor
    dt: Tensor
    step: Tensor


class MarkovGP(GaussianProcess):
    """p(f) of a Gaussian process over time, by its stochastic differential equation: O(n d³) instead of O(n³), and exact.

    Times may come in any order, irregular and coincident. Kernels: see :mod:`bayesgn.models.sde_kernels`.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> t = torch.linspace(0, 100, 5000, dtype=torch.float64); counts = torch.poisson(torch.exp(torch.sin(t)))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> posterior = bgn.bayes_newton(bgn.models.MarkovGP(kernel), bgn.likelihoods.Poisson(), (t, counts), rule=bgn.rules.Variational())
        >>> posterior(t).mean.shape
        torch.Size([5000])

    Source: Särkkä and Solin (2019), "Applied stochastic differential equations", ch. 12.
    """

    def place(self, x: Tensor) -> Times:
        if x.shape[-1] != 1:
            raise ValueError(f"MarkovGP works over time: inputs are [n] or [n 1] but have shape {tuple(x.shape)}; use models.GP or models.SparseGP.")
        t, order = torch.sort(x[:, 0], stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        dt, step = _steps(t)
        return Times(x, order, back, t, dt, step)

    def chain(self, times: Times) -> _kalman.Chain:
        """The joint chain of all latents: block-diagonal transitions, f = H x."""
        spaces = [state_space(k) for k in self.kernels]
        dt, step = times.dt, times.step
        start = times.t[:1]
        if all(s.stationary for s in spaces):
            t = start.expand(len(dt))
        else:  # the noise of a step depends on when it is taken
            moving = step >= 0
            dt, t = (times.t[1:] - times.t[:-1])[moving[1:]], times.t[:-1][moving[1:]]
            step = torch.where(moving, torch.cumsum(moving, 0) - 1, -1)
        A = _block([s.transition(dt) for s in spaces])
        Q = _block([s.noise(t, dt) for s in spaces])
        P0 = _block([s.covariance(start) for s in spaces])[0]
        H = torch.block_diag(*[s.H.unsqueeze(0) for s in spaces])
        return _kalman.Chain(A, Q, step, P0, H)

    def _solve(self, inputs, nat1, nat2):
        log_Z, mean, cov = _kalman.smooth(self.chain(inputs), nat1[inputs.order], nat2[inputs.order])
        return Solution(log_Z, Marginals(mean[inputs.back], cov[inputs.back]))

    def _with(self, inputs: Times, nat1: Tensor, nat2: Tensor, x: Tensor) -> tuple[Times, Tensor, Tensor]:
        """Data and new points as one series; the new ones have sites that say nothing."""
        both = self.place(torch.cat([inputs.x, x]))
        nat1 = torch.cat([nat1, nat1.new_zeros(len(x), *nat1.shape[1:])])[both.order]
        nat2 = torch.cat([nat2, nat2.new_zeros(len(x), *nat2.shape[1:])])[both.order]
        return both, nat1, nat2

    def _predict(self, inputs, nat1, nat2, x):
        n = len(inputs.x)
        both, nat1, nat2 = self._with(inputs, nat1, nat2, x)
        _, mean, cov = _kalman.smooth(self.chain(both), nat1, nat2)
        where = both.back[n:]
        return Marginals(mean[where], cov[where])

    def _joint(self, inputs, nat1, nat2, x):
        # mean = Σ nat1 with Σ the joint covariance: a column of Σ is the mean for a unit nat1.
        n, c = len(inputs.x), self.latents
        both, _, nat2 = self._with(inputs, nat1, nat2, x)
        chain, where, columns = self.chain(both), both.back[n:], []
        for i in where.tolist():
            for a in range(c):
                unit = nat2.new_zeros(len(both.t), c)
                unit[i, a] = 1
                columns.append(_kalman.smooth(chain, unit, nat2)[1][where].reshape(-1))
        Σ = torch.stack(columns, -1) if columns else nat2.new_zeros(0, 0)
        return 0.5 * (Σ + Σ.mT)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        # Matheron's rule: a prior path plus what the sites make of its difference from what was seen.
        where = slice(len(inputs.x), None)
        both, nat1, nat2 = self._with(inputs, nat1, nat2, x)
        chain = self.chain(both)
        paths = torch.einsum("cd,snd->snc", chain.H.detach(), _kalman.draw(chain, n, generator))
        device = nat1.device if generator is None else generator.device
        ε = torch.randn(paths.shape, dtype=nat1.dtype, device=device, generator=generator).to(nat1.device)
        seen = torch.einsum("nab,snb->sna", nat2, paths) + torch.einsum("nab,snb->sna", psd_root(nat2), ε)
        draws = [f + _kalman.smooth(chain, nat1 - h, nat2)[1] for f, h in zip(paths, seen)]
        return torch.stack(draws)[:, both.back[where]] if draws else paths


def _steps(t: Tensor) -> tuple[Tensor, Tensor]:
    """The different steps between sorted times, and which one leads to each point (−1: none, the same instant or the first).

    Steps that differ by less than the rounding of the times themselves are one: a regular grid has one.
    """
    n = len(t)
    step = torch.full((n,), -1, dtype=torch.long, device=t.device)
    if n < 2:
        return t.new_zeros(0), step
    dt = t[1:] - t[:-1]
    moving = dt > 0
    value, order = torch.sort(dt[moving])
    if len(value) == 0:
        return value, step
    tolerance = 4 * torch.finfo(t.dtype).eps * float(t.abs().max())
    new = torch.cat([torch.ones(1, dtype=torch.bool, device=t.device), value[1:] - value[:-1] > tolerance])
    group = torch.cumsum(new, 0) - 1
    size = torch.zeros(int(group[-1]) + 1, dtype=t.dtype, device=t.device).index_add_(0, group, torch.ones_like(value))
    shared = torch.zeros_like(size).index_add_(0, group, value) / size
    which = torch.empty_like(group)
    which[order] = group
    step[1:][moving] = which
    return shared, step


def _block(parts: list[Tensor]) -> Tensor:
    """Matrices [u d d] side by side on the diagonal."""
    if len(parts) == 1:
        return parts[0]
    d = sum(p.shape[-1] for p in parts)
    rows, at = [], 0
    for p in parts:
        k = p.shape[-1]
        rows.append(torch.nn.functional.pad(p, (at, d - at - k)))
        at += k
    return torch.cat(rows, -2)
