"""The Gaussian process over space and time: a kernel between places, a stochastic differential equation along time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import gpytorch
import torch
from torch import Tensor, nn

from bayesgn import _data, _kalman
from bayesgn._psd import eigclip, psd_root, safe_cholesky
from bayesgn.models.averaging import Averaged, averaged, opened
from bayesgn.models.gaussian_process import GaussianProcess, Solution, describe
from bayesgn.models.gp import covariance, variance
from bayesgn.models.inputs import columns
from bayesgn.models.markov_gp import COLUMNS, Times, beside, corrected, groups, markov_chain, times_of
from bayesgn.models.rows import by_rows
from bayesgn.models.sde_kernels import StateSpace, state_space
from bayesgn.rules import Marginals


class Located(NamedTuple):
    """Inputs by time and place: x [n 1+e] as they came, times t [n], the different places [P e], and which one each has, at [n]."""

    x: Tensor
    t: Tensor
    places: Tensor
    at: Tensor


class Reach(NamedTuple):
    """f(t_n, s_n) = rows_n · g(t_n) + what g leaves open, for one latent: rows [n S], variance open [n]."""

    rows: Tensor
    open: Tensor


class Part(NamedTuple):
    """A group of latents that sites couple: their chain over all times, its sites, and the belief about g [T k S], latents first."""

    latents: list[int]
    chain: _kalman.Chain
    nat1: Tensor
    nat2: Tensor
    mean: Tensor
    cov: Tensor


class Trajectory(NamedTuple):
    """What the sites say of g, and what is needed to read f from it; ``index`` are data, then new points, in the series of times."""

    log_Z: Tensor
    parts: list[Part]
    times: Times
    index: Tensor
    sites: Averaged
    open: Tensor


class SpatioTemporalGP(GaussianProcess):
    """p(f) over time and place with a separable kernel k((t, s), (t', s')) = k_t(t, t') k_s(s, s'); inputs are [n 1+e], time first.

    With L Lᵀ the spatial kernel's matrix between S places, f(t, s_i) = Σ_j L_ij g_j(t) with independent processes g_j over time, each in state space:
    S d states, O(T (S d)³) for T different times, where dense algebra takes O(n³) for up to n = T S data. The data are any set of pairs of
    time and place; several at one time are one step. A new place sees

        f(t, s) = k_s(s, ·) K_ss⁻¹ f(t, ·) + e(t, s),   Cov e = k_t(t, t') (k_s(s, s') − k_s(s, ·) K_ss⁻¹ k_s(·, s'))

    with e independent of all else: also that is exact, correlations in time included. With ``places`` given these stand in for the places of the
    data (inducing places), which then are read from them the same way; how sites are averaged over what is left open follows the rule, see
    :mod:`bayesgn.models.averaging`.

    Args:
        temporal_kernel: a gpytorch kernel over time (:func:`bayesgn.models.sde_kernels.state_space`), or one for each latent function.
        spatial_kernel: a gpytorch kernel over the other columns, or one for each latent; it counts them from 0.
        mean: a gpytorch mean over all columns (or one for each latent); zero unless given.
        places [S e]: inducing places; those of the data unless given.

    Raises:
        ValueError: for inputs without a column beyond time, or inducing places with another number of columns.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> t, s = torch.meshgrid(torch.arange(100.0, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64), indexing="ij")
        >>> x = torch.stack([t.flatten(), s.flatten()], -1); y = torch.sin(x[:, 0] / 5) * x[:, 1]
        >>> time = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> model = bgn.models.SpatioTemporalGP(time, gpytorch.kernels.RBFKernel())
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Gaussian(0.01), (x, y))
        >>> posterior(torch.tensor([[50.5, 0.3], [99.0, 0.25]], dtype=torch.float64)).mean.shape
        torch.Size([2])

    Source: Särkkä, Solin and Hartikainen (2013), "Spatiotemporal learning via infinite-dimensional Bayesian filtering and smoothing"; Hamelijnck,
    Wilkinson, Loppi, Solin and Damoulas (2021), "Spatio-temporal variational Gaussian processes".
    """

    places: Tensor | None

    def __init__(self, temporal_kernel, spatial_kernel, mean=None, places: Tensor | None = None) -> None:
        super().__init__(temporal_kernel, mean)
        several = list(spatial_kernel) if isinstance(spatial_kernel, (Sequence, nn.ModuleList)) else [spatial_kernel]
        for k in several:
            if not isinstance(k, gpytorch.kernels.Kernel):
                raise TypeError(f"spatial_kernel is {_data.describe(k)}; expected a gpytorch kernel such as RBFKernel(), or a list.")
            if k.batch_shape.numel() != 1:
                raise ValueError(f"a spatial kernel has batch shape {list(k.batch_shape)}; pass a list, one for each latent function.")
        if len(several) != self.latents:
            raise ValueError(f"{self.latents} temporal kernel(s) but {len(several)} spatial one(s); pass one of each for each latent function.")
        self.spatial_kernels = nn.ModuleList(several)
        self.register_buffer("places", None if places is None else columns(places))

    def place(self, x: Tensor) -> Located:
        if x.shape[-1] < 2 or (self.places is not None and x.shape[-1] != 1 + self.places.shape[-1]):
            wanted = "[n 1+e], time first, then the place" if self.places is None else f"[n {1 + self.places.shape[-1]}] with these inducing places"
            raise ValueError(f"SpatioTemporalGP: inputs have shape {tuple(x.shape)}; expected {wanted}. Over time alone use models.MarkovGP.")
        if x.requires_grad:  # the different ones would lose the graph
            return Located(x, x[:, 0], x[:, 1:], torch.arange(len(x), device=x.device))
        places, at = torch.unique(x[:, 1:], dim=0, return_inverse=True)
        return Located(x, x[:, 0], places, at)

    # -- f from g -----------------------------------------------------------------------------------------------------------

    def _base(self, inputs: Located) -> Tensor:
        """The places [S e] that g stands for."""
        return inputs.places if self.places is None else self.places.to(inputs.x)

    def _spaces(self) -> list[StateSpace]:
        return [state_space(k) for k in self.kernels]

    def _roots(self, base: Tensor) -> list[Tensor]:
        """L [S S] of each latent."""
        return [safe_cholesky(covariance(k, base, base)) for k in self.spatial_kernels]

    def _weights(self, base: Tensor, places: Tensor) -> list[Tensor]:
        """k_s(s, ·) L⁻ᵀ [P S] of each latent."""
        pairs = zip(self.spatial_kernels, self._roots(base))
        return [torch.linalg.solve_triangular(L, covariance(k, base, places), upper=False).mT for k, L in pairs]

    def _reaches(self, base: Tensor, points: Located) -> list[Reach]:
        out = []
        for space, kernel, W in zip(self._spaces(), self.spatial_kernels, self._weights(base, points.places)):
            open = (variance(kernel, points.places) - W.square().sum(-1)).clamp_min(0)
            out.append(Reach(W[points.at], open[points.at] * _variance(space, points.t)))
        return out

    def _reaches_of_data(self, inputs: Located) -> list[Reach]:
        if self.places is not None:
            return self._reaches(self._base(inputs), inputs)
        return [Reach(L[inputs.at], torch.zeros_like(inputs.t)) for L in self._roots(inputs.places)]  # g stands for their own places

    def _chain(self, latents: list[int], S: int, times: Times) -> _kalman.Chain:
        """g_j of each of some latents: A = I ⊗ A_t, g = (I ⊗ H_t) x."""
        spaces = self._spaces()
        chain = markov_chain([Copies(spaces[a], S) for a in latents], times)
        eye = torch.eye(S, dtype=chain.A.dtype, device=chain.A.device)
        return chain._replace(H=torch.block_diag(*[torch.kron(eye, spaces[a].H.unsqueeze(0)) for a in latents]))

    def _trajectory(self, inputs: Located, nat1: Tensor, nat2: Tensor, new: Tensor | None = None) -> Trajectory:
        """g at the times of the data and at new times [m]."""
        times, index = _series(inputs.t, inputs.t[:0] if new is None else new)
        reaches = self._reaches_of_data(inputs)
        open = torch.diag_embed(torch.stack([r.open for r in reaches], -1))
        sites = averaged(nat1, nat2, open, self.power)
        S, T = len(self._base(inputs)), len(times.t)
        log_Z, parts, pieces = sites.log_scale.sum(), [], Pieces.sorted_by(index[: len(nat1)], T)
        for latents in groups(nat2) if S and T else []:
            B = _beside([reaches[a].rows for a in latents])
            h, Λ = pieces.summed(B, sites.nat1[:, latents], sites.nat2[:, latents][:, :, latents], T)
            chain = self._chain(latents, S, times)
            part, mean, cov = _kalman.smooth(chain, h, Λ)
            log_Z = log_Z + part
            parts.append(Part(latents, chain, h, Λ, mean, cov))
        return Trajectory(log_Z, parts, times, index, sites, open)

    def _read(self, path: Trajectory, index: Tensor, reaches: list[Reach]) -> Marginals:
        """rows · g at points of the series [m]."""
        if not path.parts:
            mean = index.new_zeros(len(index), self.latents, dtype=path.open.dtype)
            return Marginals(mean, torch.diag_embed(mean))
        pieces, means, covs = Pieces.sorted_by(index, len(path.times.t)), [], []
        for p in path.parts:
            mean, cov = pieces.read(_beside([reaches[a].rows for a in p.latents]), p.mean, p.cov)
            means.append(mean)
            covs.append(cov)
        return Marginals(torch.cat(means, -1), beside(covs))

    # -- the four of a model -------------------------------------------------------------------------------------------------

    def _solve(self, inputs, nat1, nat2):
        path = self._trajectory(inputs, nat1, nat2)
        φ = self._read(path, path.index, self._reaches_of_data(inputs))
        return Solution(path.log_Z, opened(φ, path.sites, path.open, self.power))

    def _predict(self, inputs, nat1, nat2, x):
        points = self.place(x)
        path = self._trajectory(inputs, nat1, nat2, points.t)
        reaches = self._reaches(self._base(inputs), points)
        φ = self._read(path, path.index[len(inputs.x) :], reaches)
        return Marginals(φ.mean, φ.cov + torch.diag_embed(torch.stack([r.open for r in reaches], -1)))

    def _joint(self, inputs, nat1, nat2, x):
        points, base = self.place(x), self._base(inputs)
        path = self._trajectory(inputs, nat1, nat2, points.t)
        index, reaches = path.index[len(inputs.x) :], self._reaches(base, points)
        Σ = x.new_zeros(len(x), len(x), self.latents, self.latents)
        if path.parts:
            parts = []
            for p in path.parts:
                # Cov f = B Cov g Bᵀ; a column of Cov g Bᵀ is the mean for nat1 = a row of B.
                B, k = _beside([reaches[a].rows for a in p.latents]), len(p.latents)
                rows = []
                for some in torch.arange(len(x), device=x.device).split(max(1, COLUMNS // (k * p.mean.numel()))):
                    at = torch.arange(len(some) * k, device=x.device), index[some].repeat_interleave(k)
                    unit = B.new_zeros(len(some) * k, *p.mean.shape).index_put(at, B[some].flatten(0, 1))
                    means = _kalman.means(p.chain, unit, p.nat2)[:, index]
                    rows.append(torch.einsum("umS,mbS->umb", means, B).unflatten(0, (-1, k)).transpose(1, 2))
                parts.append(torch.cat(rows) if rows else Σ[..., :k, :k])  # [m m k k]
            Σ = beside(parts)
        Σ = Σ + torch.diag_embed(torch.stack([self._open(a, base, points) for a in range(self.latents)], -1))
        Σ = Σ.transpose(1, 2).reshape(len(x) * self.latents, len(x) * self.latents)
        return 0.5 * (Σ + Σ.mT)

    def _open(self, latent: int, base: Tensor, points: Located) -> Tensor:
        """Covariance [m m] of what g leaves open."""
        R, space, (t, when) = self._left(latent, base, points), state_space(self.kernels[latent]), _different(points.t)
        K = by_rows(lambda s: (_gram(space, s, t),), t, width=max(1, len(t)) * space.d**2)[0]
        return R[points.at][:, points.at] * K[when][:, when]

    def _left(self, latent: int, base: Tensor, points: Located) -> Tensor:
        """k_s(s, s') − k_s(s, ·) K_ss⁻¹ k_s(·, s') [P P] between the different places of points."""
        W = self._weights(base, points.places)[latent]
        return covariance(self.spatial_kernels[latent], points.places, points.places) - W @ W.mT

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        points, base, spaces = self.place(x), self._base(inputs), self._spaces()
        path = self._trajectory(inputs, nat1, nat2, points.t)
        index, reaches, S = path.index[len(inputs.x) :], self._reaches(base, points), len(base)
        f = [x.new_zeros(n, len(x)) for _ in spaces]
        for p in path.parts:
            paths = torch.cat([_paths(spaces[a], path.times, n, S, generator) for a in p.latents], -1)
            g = corrected(p.chain, paths, p.nat1, p.nat2, generator)[:, index].unflatten(-1, (-1, S))
            for j, a in enumerate(p.latents):
                f[a] = torch.einsum("nmS,mS->nm", g[:, :, j], reaches[a].rows)
        t, when = _different(points.t)
        for a, space in enumerate(spaces if len(x) else []):
            e = _paths(space, times_of(t), n, len(points.places), generator) @ psd_root(eigclip(self._left(a, base, points)))
            f[a] = f[a] + e[:, when, points.at]
        return torch.stack(f, -1)

    def __repr__(self) -> str:
        kernels = ", ".join(f"{describe(t)} over time × {describe(s)} over space" for t, s in zip(self.kernels, self.spatial_kernels))
        return f"SpatioTemporalGP({kernels}{'' if self.places is None else f', {len(self.places)} inducing places'})"


class Copies(StateSpace):
    """S independent processes of one kind side by side; H adds them up."""

    def __init__(self, one: StateSpace, S: int) -> None:
        super().__init__(one.H.repeat(S))
        self.one, self.eye = one, torch.eye(S, dtype=one.H.dtype, device=one.H.device).unsqueeze(0)
        self.stationary, self.homogeneous = one.stationary, one.homogeneous

    def transition(self, dt):
        return torch.kron(self.eye, self.one.transition(dt))

    def covariance(self, t):
        return torch.kron(self.eye, self.one.covariance(t))

    def noise(self, t, dt):
        return torch.kron(self.eye, self.one.noise(t, dt))


class Pieces(NamedTuple):
    """Points sorted by their index into p pieces of l slots, none of which mixes two indices, so that sums over points are batched products.

    Attributes:
        of [p]: the index of a piece.
        slot [n]: of each point in the flat [p l].
        l: slots.
    """

    of: Tensor
    slot: Tensor
    l: int

    @classmethod
    def sorted_by(cls, index: Tensor, T: int) -> Pieces:
        count = torch.bincount(index, minlength=T)
        l = max(1, min(256, round(len(index) / max(1, int((count > 0).sum())))))
        pieces = (count + l - 1) // l
        order = torch.argsort(index, stable=True)
        rank = torch.arange(len(index), device=index.device) - (torch.cumsum(count, 0) - count)[index[order]]
        first = torch.cumsum(pieces, 0) - pieces
        slot = torch.empty_like(index)
        slot[order] = (first[index[order]] + rank // l) * l + rank % l
        return cls(torch.repeat_interleave(torch.arange(len(count), device=index.device), pieces), slot, l)

    def spread(self, values: Tensor) -> Tensor:
        """[n …] as [p l …], zero where there is no point."""
        p = len(self.of)
        return values.new_zeros(p * self.l, *values.shape[1:]).index_copy(0, self.slot, values).unflatten(0, (p, self.l))

    def summed(self, B: Tensor, nat1: Tensor, nat2: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Σ_n B_nᵀ nat1_n [T D] and Σ_n B_nᵀ nat2_n B_n [T D D] at each index, for B [n k D], nat1 [n k], nat2 [n k k]."""
        rows, weighted = self.spread(B).flatten(1, 2), self.spread(nat2 @ B).flatten(1, 2)
        h = (rows.mT @ self.spread(nat1).flatten(1).unsqueeze(-1)).squeeze(-1)
        D = B.shape[-1]
        Λ = B.new_zeros(T, D, D).index_add(0, self.of, rows.mT @ weighted)
        return B.new_zeros(T, D).index_add(0, self.of, h), 0.5 * (Λ + Λ.mT)

    def read(self, B: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """B_n mean [n k] and B_n cov B_nᵀ [n k k] at each point, for mean [T D], cov [T D D]."""
        rows = self.spread(B)  # [p l k D]
        BP = (rows.flatten(1, 2) @ cov[self.of]).view_as(rows)
        means = (rows @ mean[self.of][:, None, :, None]).squeeze(-1)
        covs = (BP * rows).sum(-1, keepdim=True) if B.shape[1] == 1 else BP @ rows.mT
        return means.flatten(0, 1)[self.slot], covs.flatten(0, 1)[self.slot]


def _series(t: Tensor, new: Tensor) -> tuple[Times, Tensor]:
    """The different ones of times t [n] and new [m] in order, and where each is among them [n + m]."""
    if not new.requires_grad:
        values, index = torch.unique(torch.cat([t, new]), return_inverse=True)
        return times_of(values), index
    values, index = torch.unique(t, return_inverse=True)  # the new ones one by one: each has its own graph
    times = times_of(torch.cat([values, new]))
    return times, times.back[torch.cat([index, len(values) + torch.arange(len(new), device=t.device)])]


def _different(t: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones of times [m], and which each is; all of them where there is a graph."""
    return (t, torch.arange(len(t), device=t.device)) if t.requires_grad else torch.unique(t, return_inverse=True)


def _beside(rows: list[Tensor]) -> Tensor:
    """Rows [n S] of k latents as [n k, k S], each in its own S columns."""
    k, S = len(rows), rows[0].shape[-1]
    return torch.stack([torch.nn.functional.pad(r, (a * S, (k - 1 - a) * S)) for a, r in enumerate(rows)], 1)


def _variance(space: StateSpace, t: Tensor) -> Tensor:
    """k_t(t, t) [n]."""
    return (space.covariance(t) @ space.H) @ space.H


def _gram(space: StateSpace, a: Tensor, b: Tensor) -> Tensor:
    """k_t(a, b) [m m']."""
    a, b = torch.broadcast_tensors(a.unsqueeze(-1), b)
    low, high = torch.minimum(a, b).flatten(), torch.maximum(a, b).flatten()
    later = space.covariance(low) @ space.H
    return ((space.transition(high - low) @ later.unsqueeze(-1)).squeeze(-1) @ space.H).view(a.shape)


def _paths(space: StateSpace, times: Times, n: int, S: int, generator: torch.Generator | None) -> Tensor:
    """n draws of S independent processes [n T S] at the sorted times."""
    x = _kalman.draw(markov_chain([space], times), n * S, generator) @ space.H.detach()
    return x.unflatten(0, (n, S)).transpose(1, 2)
