"""The doubly sparse Gaussian process over time: a Markov chain of states at few inducing times, and data that meet the two nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn import _data, _kalman
from bayesgn.models.averaging import averaged, opened
from bayesgn.models.belief import same_state, state_of
from bayesgn.models.bridges import Bridge, Pieces, bridge, left_open, pieces_of, stacked
from bayesgn.models.gaussian_process import GaussianProcess, Solution
from bayesgn.models.inputs import columns
from bayesgn.models.markov_gp import COLUMNS, beside, blocks, corrected, groups, markov_chain, one_time, times_of
from bayesgn.models.sde_kernels import state_space
from bayesgn.rules import Marginals


class SparseMarkovGP(GaussianProcess):
    """p(f) over time by the states u_i = x(z_i) at M inducing times: O(n) for n data and O(M d³) for the chain.

    The whole state of the kernel's differential equation is kept at each inducing time, so that f(t) depends on the two neighbouring ones alone,

        f(t_n) | u ~ N(B_n [u_i; u_{i+1}], S_n),   z_i ≤ t_n < z_{i+1}

    and sites on f_n add up to sites on pairs of states, Σ B_nᵀ nat1_n and Σ B_nᵀ nat2_n B_n: a chain of M points remains, whatever n. Outside the
    inducing times f is read from the end state. With variational inference the evidence is a lower bound of the exact model's, and grows with every
    inducing time that is added; where all data sit at inducing times it is :class:`MarkovGP`. How sites are averaged over what S_n leaves open
    follows the rule: see :mod:`bayesgn.models.averaging` (with ``rules.PowerEP(1)`` the model is FITC, and the evidence no bound).

    It saves time where :class:`MarkovGP` has as many different steps as data (irregular times) and turns are many, for B_n and S_n are worked out
    once for each state of the hyper-parameters. On a regular grid the exact model is as fast.

    Args:
        kernel: a gpytorch kernel over time, or one for each latent function.
        inducing_times [M]: at least two, all different; spaced by a fraction of the lengthscale.
        mean: a gpytorch mean (or one for each latent); zero unless given.

    Raises:
        ValueError: for fewer than two, equal or non-finite inducing times.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> t = 100 * torch.rand(20_000, dtype=torch.float64); counts = torch.poisson(torch.exp(torch.sin(t)))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> model = bgn.models.SparseMarkovGP(kernel, inducing_times=torch.linspace(0, 100, 200))
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Poisson(), (t, counts), rule=bgn.rules.Variational(), batch_size=5_000, steps=20)
        >>> posterior(t[:5]).mean.shape
        torch.Size([5])

    Source: Adam, Eleftheriadis, Durrande, Artemev and Hensman (2020), "Doubly sparse variational Gaussian processes"; Wilkinson, Solin and
    Adam (2021), "Sparse algorithms for Markovian Gaussian processes".
    """

    inducing_times: Tensor

    def __init__(self, kernel, inducing_times: Tensor, mean=None) -> None:
        super().__init__(kernel, mean)
        if not isinstance(inducing_times, Tensor):
            raise TypeError(f"inducing_times is {_data.describe(inducing_times)}; expected a tensor [M], e.g. torch.linspace(0, 100, 200).")
        z = torch.sort(one_time(columns(inducing_times), "SparseMarkovGP"))[0]
        if len(z) < 2:
            raise ValueError(f"{len(z)} inducing time(s); expected at least two, of which each interval needs both ends.")
        twice = z[1:][z[1:] == z[:-1]]
        if len(twice):
            raise ValueError(f"{len(twice)} inducing time(s) come twice, the first {float(twice[0]):g}; pass inducing_times.unique().")
        self.register_buffer("inducing_times", z)

    # -- points between inducing times -----------------------------------------------------------------------------------

    def place(self, x: Tensor) -> Pieces:
        t = one_time(x, "SparseMarkovGP")
        return pieces_of(t, self.inducing_times.to(t))

    def bridges(self, pieces: Pieces) -> list[Bridge]:
        """f given the inducing states, for each latent; worked out once for each state of the hyper-parameters where no graph is asked for."""
        z = self.inducing_times.to(pieces.t)
        if torch.is_grad_enabled() and (pieces.t.requires_grad or any(p.requires_grad for p in self.parameters())):
            return [bridge(state_space(k), z, pieces) for k in self.kernels]
        state = state_of(self)
        if "state" not in pieces.kept or not same_state(pieces.kept["state"], state):
            with torch.no_grad():
                pieces.kept.update(state=state, bridges=[bridge(state_space(k), z, pieces) for k in self.kernels])
        return pieces.kept["bridges"]

    def _chain(self, latents: list[int], like: Tensor) -> _kalman.Chain:
        """The chain of pairs [u_i; u_{i+1}] of some latents, sites on the whole pair."""
        times = times_of(self.inducing_times.to(like))
        A, Q, step, P0, _ = markov_chain([state_space(self.kernels[a]) for a in latents], times)
        d = P0.shape[-1]
        eye = torch.eye(2 * d, dtype=A.dtype, device=A.device)
        pair_A = torch.nn.functional.pad(torch.cat([eye[:d, :d].expand(len(A), d, d), A], -2), (d, 0))  # [[0, I], [0, A]]
        pair_Q = torch.nn.functional.pad(Q, (d, 0, d, 0))
        A0, Q0 = A[step[1]], Q[step[1]]
        AP = A0 @ P0
        start = torch.cat([torch.cat([P0, AP.mT], -1), torch.cat([AP, AP @ A0.mT + Q0], -1)])
        step = step[1:].clone()
        step[0] = -1
        return _kalman.Chain(pair_A, pair_Q, step, 0.5 * (start + start.mT), eye)

    def _pairs(self, pieces: Pieces, nat1: Tensor, nat2: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Sites on the pairs of states: Σ Bᵀ nat1 [M−1 2d], Σ Bᵀ nat2 B [M−1 2d 2d]."""
        p, l, c, D = B.shape
        rows = B.reshape(p, l * c, D)
        Λ = pieces.spread(nat2)
        weighted = (Λ * B if c == 1 else Λ @ B).reshape(p, l * c, D)
        h = rows.mT @ pieces.spread(nat1).reshape(p, l * c, 1)
        pairs = len(self.inducing_times) - 1
        nat1 = h.new_zeros(pairs, D).index_add(0, pieces.pair, h.squeeze(-1))
        nat2 = h.new_zeros(pairs, D, D).index_add(0, pieces.pair, rows.mT @ weighted)
        return nat1, 0.5 * (nat2 + nat2.mT)

    # -- the four of a model -----------------------------------------------------------------------------------------------

    def _states(self, inputs: Pieces, nat1: Tensor, nat2: Tensor):
        """log Z, and for each group of latents (its latents, the chain, pairwise sites, mean and covariance of the pairs)."""
        bridges = self.bridges(inputs)
        S = inputs.gather(torch.diag_embed(torch.stack([b.open for b in bridges], -1)))
        sites = averaged(nat1, nat2, S, self.power)
        log_Z, out = sites.log_scale.sum(), []
        for latents in groups(sites.nat2):
            B = stacked([bridges[a] for a in latents])
            chain = self._chain(latents, nat1)
            pair = self._pairs(inputs, sites.nat1[:, latents], sites.nat2[:, latents][:, :, latents], B)
            part, mean, cov = _kalman.smooth(chain, *pair)
            log_Z = log_Z + part
            out.append((latents, chain, pair, mean, cov))
        return log_Z, out, sites, S

    def _solve(self, inputs, nat1, nat2):
        log_Z, states, sites, S = self._states(inputs, nat1, nat2)
        return Solution(log_Z, opened(self._read(inputs, states), sites, S, self.power))

    def _predict(self, inputs, nat1, nat2, x):
        _, states, _, _ = self._states(inputs, nat1, nat2)
        new = self.place(x)
        φ = self._read(new, states)
        return Marginals(φ.mean, φ.cov + new.gather(torch.diag_embed(torch.stack([b.open for b in self.bridges(new)], -1))))

    def _read(self, pieces: Pieces, states) -> Marginals:
        """E[f | u] at points [n c], under the belief about u."""
        bridges, means, covs = self.bridges(pieces), [], []
        for latents, _, _, mean, cov in states:
            B = stacked([bridges[a] for a in latents])
            p, l, k, D = B.shape
            BP = (B.reshape(p, l * k, D) @ cov[pieces.pair]).reshape(B.shape)
            V = (BP * B).sum(-1, keepdim=True) if k == 1 else BP @ B.mT
            means.append(pieces.gather((B.reshape(p, l * k, D) @ mean[pieces.pair].unsqueeze(-1)).reshape(p, l, k)))
            covs.append(pieces.gather(V))
        return Marginals(torch.cat(means, -1), beside(covs))

    def _joint(self, inputs, nat1, nat2, x):
        _, states, _, _ = self._states(inputs, nat1, nat2)
        new, parts = self.place(x), []
        bridges = self.bridges(new)
        pair = new.gather(new.pair)
        for latents, chain, (_, pair2), _, _ in states:
            # Σ_f = B Σ_u Bᵀ + what is left open; a column of Σ_u Bᵀ is the mean for nat1 = a row of B.
            B = new.gather(stacked([bridges[a] for a in latents]))  # [m k D]
            k, D = B.shape[1:]
            rows = []
            for some in torch.arange(len(x)).split(max(1, COLUMNS // (k * D * len(pair2)))):
                at = torch.arange(len(some) * k), pair[some].repeat_interleave(k)
                unit = B.new_zeros(len(some) * k, len(pair2), D).index_put(at, B[some].flatten(0, 1))
                means = _kalman.means(chain, unit, pair2)[:, pair]  # [· k, m, D]
                rows.append(torch.einsum("smd,mbd->smb", means, B).unflatten(0, (-1, k)).transpose(1, 2))
            parts.append(torch.cat(rows))  # [m m k k]
        left = [left_open(state_space(kernel), b, new) for kernel, b in zip(self.kernels, bridges)]
        Σ = beside(parts) + torch.diag_embed(torch.stack(left, -1))
        Σ = Σ.transpose(1, 2).reshape(len(x) * self.latents, -1)
        return 0.5 * (Σ + Σ.mT)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        _, states, _, _ = self._states(inputs, nat1, nat2)
        new, draws = self.place(x), []
        bridges, M = self.bridges(new), len(self.inducing_times)
        times = times_of(torch.cat([self.inducing_times.to(x), x[:, 0]]))
        for latents, chain, pair, _, _ in states:
            # A prior path through inducing times and x; what the sites make of its inducing states moves f by B.
            prior, some = markov_chain([state_space(self.kernels[a]) for a in latents], times), []
            B, which = new.gather(stacked([bridges[a] for a in latents])), new.gather(new.pair)
            for count in blocks(n, len(times.t) * len(chain.P0)):
                paths = _kalman.draw(prior, count, generator)[:, times.back]
                f, u = paths[:, M:] @ prior.H.detach().mT, paths[:, :M]
                u = torch.cat([u[:, :-1], u[:, 1:]], -1)
                moved = corrected(chain, u, pair[0], pair[1], generator) - u
                some.append(f + torch.einsum("mad,smd->sma", B, moved[:, which]))
            draws.append(torch.cat(some))
        return torch.cat(draws, -1)

    def __repr__(self) -> str:
        return super().__repr__().removesuffix(")") + f", {len(self.inducing_times)} inducing times)"
