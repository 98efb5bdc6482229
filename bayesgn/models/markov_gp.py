"""The Gaussian process over time in state-space form: exact, linear in the number of data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn import _kalman
from bayesgn._psd import psd_root
from bayesgn.models.gaussian_process import GaussianProcess, Solution
from bayesgn.models.sde_kernels import StateSpace, state_space
from bayesgn.rules import Marginals

log = logging.getLogger("bayesgn.models")

COLUMNS = 2**23  # numbers in a block of columns of a joint covariance
DRAWN = 2**20  # numbers in a block of draws


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


class Markovian(GaussianProcess):
    """What follows from the chain of states at data and new times, exactly."""

    def chain(self, times: Times, latents: list[int] | None = None) -> _kalman.Chain:
        """The joint chain of all latents, or of some: block-diagonal transitions, f = H x."""
        kernels = self.kernels if latents is None else [self.kernels[a] for a in latents]
        return markov_chain([state_space(k) for k in kernels], times)

    def _smooth(self, times: Times, nat1: Tensor, nat2: Tensor) -> Solution:
        """log Z and marginals for sorted sites."""
        parts = [_kalman.smooth(self.chain(times, a), nat1[:, a], nat2[:, a][:, :, a]) for a in groups(nat2)]
        log_Z, means, covs = zip(*parts)
        return Solution(sum(log_Z), Marginals(torch.cat(means, -1), beside(covs)))  # type: ignore[arg-type]

    def _with(self, inputs: Times, nat1: Tensor, nat2: Tensor, x: Tensor) -> tuple[Times, Tensor, Tensor]:
        """Data and new points as one series; the new ones have sites that say nothing."""
        both = times_of(torch.cat([inputs.x, x])[:, 0])
        nat1 = torch.cat([nat1, nat1.new_zeros(len(x), *nat1.shape[1:])])[both.order]
        nat2 = torch.cat([nat2, nat2.new_zeros(len(x), *nat2.shape[1:])])[both.order]
        return both, nat1, nat2

    def _predict(self, inputs, nat1, nat2, x):
        both, nat1, nat2 = self._with(inputs, nat1, nat2, x)
        return self._smooth(both, nat1, nat2).marginals.rows(both.back[len(inputs.x) :])

    def _joint(self, inputs, nat1, nat2, x):
        both, _, nat2 = self._with(inputs, nat1, nat2, x)
        where, parts = both.back[len(inputs.x) :], []
        for latents in groups(nat2):
            # mean = Σ nat1 with Σ the joint covariance: a column of Σ is the mean for a unit nat1.
            c, chain, own = len(latents), self.chain(both, latents), nat2[:, latents][:, :, latents]
            rows = []
            for some in where.split(max(1, COLUMNS // max(1, c * c * len(both.t)))):
                unit = own.new_zeros(len(some), c, len(both.t), c)
                for a in range(c):
                    unit[torch.arange(len(some)), a, some, a] = 1
                means = _kalman.means(chain, unit.flatten(0, 1), own)
                rows.append(means[:, where].unflatten(0, (-1, c)).transpose(1, 2))
            parts.append(torch.cat(rows))  # [m m c c]
        Σ = beside(parts).transpose(1, 2).reshape(len(where) * self.latents, len(where) * self.latents)
        return 0.5 * (Σ + Σ.mT)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        both, nat1, nat2 = self._with(inputs, nat1, nat2, x)
        where, draws = both.back[len(inputs.x) :], []
        for latents in groups(nat2):
            chain, sites = self.chain(both, latents), (nat1[:, latents], nat2[:, latents][:, :, latents])
            some = []
            for count in blocks(n, both.t.numel() * len(chain.P0)):
                paths = _kalman.draw(chain, count, generator) @ chain.H.detach().mT
                some.append(corrected(chain, paths, *sites, generator)[:, where])
            draws.append(torch.cat(some))
        return torch.cat(draws, -1)


class MarkovGP(Markovian):
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
        return times_of(one_time(x, "MarkovGP"))

    def _solve(self, inputs, nat1, nat2):
        log_Z, q = self._smooth(inputs, nat1[inputs.order], nat2[inputs.order])
        return Solution(log_Z, q.rows(inputs.back))


def blocks(n: int, size: int) -> list[int]:
    """n draws of ``size`` numbers in blocks that are worked out together: as many as memory that is at hand takes."""
    each = max(8, DRAWN // max(1, size))
    return [each] * (n // each) + [n % each] * (n % each > 0 or n == 0)


def corrected(chain: _kalman.Chain, paths: Tensor, nat1: Tensor, nat2: Tensor, generator: torch.Generator | None) -> Tensor:
    """Prior draws [s n c] made posterior ones by Matheron's rule: what the sites make of the difference between them and what was seen is added."""
    device = nat1.device if generator is None else generator.device
    ε = torch.randn(paths.shape, dtype=nat1.dtype, device=device, generator=generator).to(nat1.device)
    if nat2.shape[-1] == 1:
        seen = nat2[:, 0] * paths + psd_root(nat2)[:, 0] * ε
    else:
        seen = torch.einsum("nab,snb->sna", nat2, paths) + torch.einsum("nab,snb->sna", psd_root(nat2), ε)
    return paths + _kalman.means(chain, nat1 - seen, nat2)


def one_time(x: Tensor, who: str) -> Tensor:
    """Times [n] of inputs [n 1]."""
    if x.shape[-1] != 1:
        raise ValueError(f"{who} works over time: inputs are [n] or [n 1] but have shape {tuple(x.shape)}; use models.GP or models.SparseGP.")
    return x[:, 0]


def times_of(x: Tensor) -> Times:
    """Times [n] put in order."""
    t, order = torch.sort(x, stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Times(x.unsqueeze(-1), order, back, t, *_steps(t))


def markov_chain(spaces: list[StateSpace], times: Times) -> _kalman.Chain:
    """Independent processes side by side at the given times: block-diagonal transitions, f = H x."""
    dt, step = times.dt, times.step
    start = times.t[:1] if len(times.t) else times.t.new_zeros(1)
    if all(s.homogeneous for s in spaces):
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


def groups(nat2: Tensor) -> list[list[int]]:
    """Latents that have to be worked out together: each on its own where no site [n c c] couples them, else all.

    A priori the latents are independent; c chains of d states cost c d³, one of them all (c d)³.
    """
    c = nat2.shape[-1]
    # At fixed sites alone: the slope in a coupling that is zero needs them all.
    if c == 1 or nat2.requires_grad or bool((nat2 - torch.diag_embed(nat2.diagonal(dim1=-2, dim2=-1))).any()):
        return [list(range(c))]
    log.debug("no site couples the %d latent functions: each is worked out on its own", c)
    return [[a] for a in range(c)]


def beside(blocks: Sequence[Tensor]) -> Tensor:
    """Covariances [… k k] of groups of latents as one, block-diagonal: one group of all, or one of each latent."""
    return blocks[0] if len(blocks) == 1 else torch.diag_embed(torch.cat([b[..., 0] for b in blocks], -1))


def _steps(t: Tensor) -> tuple[Tensor, Tensor]:
    """The different steps between sorted times, and which one leads to each point (−1: none, the same instant or the first).

    Steps that differ by less than the rounding of the times themselves are one: a regular grid has one. Where so many lie so close that they would
    make a chain of neighbours longer than that (irregular times far from zero), only equal ones are.
    """
    n = len(t)
    step = torch.full((n,), -1, dtype=torch.long, device=t.device)
    if n < 2:
        return t.new_zeros(0), step
    dt = t[1:] - t[:-1]
    if t.requires_grad:  # each has a slope of its own, also one of no length
        step[1:] = torch.arange(n - 1, device=t.device)
        return dt, step
    moving = dt > 0
    value, order = torch.sort(dt[moving])
    if len(value) == 0:
        return value, step
    tolerance = 4 * torch.finfo(t.dtype).eps * float(t.detach().abs().max())
    gap, first = value[1:] - value[:-1], torch.ones(1, dtype=torch.bool, device=t.device)
    new = torch.cat([first, gap > tolerance])
    group, last = torch.cumsum(new, 0) - 1, torch.cat([new[1:], first])
    wide = value[last] - value[new] > 2 * tolerance
    new = new | torch.cat([first, wide[group[1:]] & (gap > 0)])
    group = torch.cumsum(new, 0) - 1
    size = torch.zeros(int(group[-1]) + 1, dtype=t.dtype, device=t.device).index_add_(0, group, torch.ones_like(value))
    shared = value[new]  # the mean, without the rounding of a long sum: n steps together shall keep their phase
    shared = shared + torch.zeros_like(size).index_add_(0, group, value - shared[group]) / size
    which = torch.empty_like(group)
    which[order] = group
    # Numbered as they come in time, so that a chain walks along memory and not about it.
    at = torch.arange(len(which), device=t.device)
    first = torch.full_like(shared, n, dtype=torch.long).scatter_reduce_(0, which, at, "amin")
    earliest = torch.argsort(first)
    number = torch.empty_like(earliest)
    number[earliest] = torch.arange(len(earliest), device=t.device)
    step[1:][moving] = number[which]
    return shared[earliest], step


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
