"""The sparse Gaussian process: data are seen through the function's values at a few inducing points, O(n M²)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._psd import safe_cholesky
from bayesgn.models.averaging import Averaged, averaged, opened
from bayesgn.models.belief import Belief
from bayesgn.models.gaussian_process import GaussianProcess, Solution
from bayesgn.models.gp import Placed, check_columns, covariance, draws, latents_inside, variance
from bayesgn.models.inputs import columns
from bayesgn.models.markov_gp import groups
from bayesgn.models.rows import by_rows
from bayesgn.rules import Marginals

# u = f(Z) = L v with L Lᵀ = K_zz and v ~ N(0, I), for each latent. A datum has f_n | v ~ N(W_n v, S_n), W_n = k_nz L⁻ᵀ, S_n = k_nn − W_n W_nᵀ.
# A site on f_n acts on φ_n = W_n v through s_n (averaging.py), so sites add up: q(v) ∝ N(v; 0, I) Π s_n(W_n v) has the natural parameters
# h = Σ W_nᵀ nat1_n and I + Λ with Λ = Σ W_nᵀ nat2_n W_n. log Z = log ∫ N(v; 0, I) Π s_n dv, the scales of s_n included.
#
# For α → 0, E_q log s_n(φ_n) = E_q log t_n(f_n), so that −KL(q(v) ‖ p(v)) = log Z − Σ E_q log t_n, and log Z + Σ (L_n[p] − L_n[t_n]) with L_n = E_q
# is the stochastic variational bound. For power EP the same sum is its sparse energy: the cavity of φ_n, spread by S_n, is q(f_n) / t_n(f_n)^α.

KEPT = 2**24  # numbers in W of all data, up to which it is kept from the sum to the marginals, and for a backward pass


class Sums(NamedTuple):
    """Natural parameters on v: h [c M], Λ [c c M M], Σ log_scale; ``coupled`` where blocks of Λ between latents are not zero."""

    h: Tensor
    Λ: Tensor
    log_scale: Tensor
    coupled: bool

    def plus(self, other: Sums) -> Sums:
        return Sums(self.h + other.h, self.Λ + other.Λ, self.log_scale + other.log_scale, self.coupled or other.coupled)


class Settled(NamedTuple):
    """q(v): the mean [c M], and Γ with Γᵀ Γ its covariance: [c M M] for latents each on its own, [1 cM cM] for all together."""

    mean: Tensor
    Γ: Tensor
    log_Z: Tensor


class SparseGP(GaussianProcess):
    """p(f) of a Gaussian process through its values u = f(Z) at M inducing points: O(n M²) for n data, O(B M²) for a batch of B.

    Sites belong to data and act on f_n | u ~ N(k_nz K_zz⁻¹ u, S_n); the belief about u is N(0, K_zz) times their sum,

        precision of u = K_zz⁻¹ + Σ A_nᵀ nat2_n A_n,   A_n = k_nz K_zz⁻¹,   q(f_n) = N(A_n m, A_n S_u A_nᵀ + k_nn − A_n k_zn).

    With variational inference the evidence is a lower bound of the exact model's (with a Gaussian likelihood, Titsias' bound), and grows with
    every inducing point that is added; where Z holds all inputs it is :class:`GP`. How sites are averaged over S_n follows the rule: see
    :mod:`bayesgn.models.averaging` (with ``rules.PowerEP(1)`` the model is FITC, and the evidence no bound).

    With ``bayes_newton(..., batch_size=B)`` a step replaces the sites of a batch and what they add to the sum: O(B M² + M³), whatever n. All
    data are walked through at the start and once an epoch, for the log evidence.

    Args:
        kernel: a gpytorch kernel, or one for each latent function; inducing points are shared.
        inducing_points [M d] or [M]: such as ``models.inducing_points(kernel, x, 100)``; all different.
        mean: a gpytorch mean (or one for each latent); zero unless given.
        learn_inducing: whether ``maximize_evidence`` moves them; they are an ``nn.Parameter``, ``model.inducing_points``, and may be frozen later.

    Raises:
        ValueError, TypeError: for inducing points that are no finite tensor, or come twice.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.rand(2000, 2, generator=generator, dtype=torch.float64) * 6
        >>> y = torch.bernoulli(torch.sigmoid(4 * torch.sin(x[:, 0]) * torch.cos(x[:, 1])), generator=generator)
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        >>> model = bgn.models.SparseGP(kernel, bgn.models.inducing_points(kernel, x, 50))
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Bernoulli(), (x, y), rule=bgn.rules.Variational(), batch_size=500, steps=12,
        ...                              generator=generator)
        >>> posterior(x[:5]).mean.shape
        torch.Size([5])

    Source: Titsias (2009), "Variational learning of inducing variables in sparse Gaussian processes"; Hensman, Matthews and Ghahramani
    (2015), "Scalable variational Gaussian process classification"; sites for each datum, Adam, Chang, Khan and Solin (2021), "Dual
    parameterization of sparse variational Gaussian processes".
    """

    def __init__(self, kernel, inducing_points: Tensor, mean=None, learn_inducing: bool = False) -> None:
        super().__init__(kernel, mean)
        if not isinstance(inducing_points, Tensor):
            raise TypeError(
                f"inducing_points is {_data.describe(inducing_points)}; expected a tensor [M d], e.g. models.inducing_points(kernel, x, 100)."
            )
        z = columns(inducing_points).detach().clone()
        if not len(z):
            raise ValueError("there are 0 inducing points; pass at least one.")
        twice = len(z) - len(z.unique(dim=0))
        if twice:
            raise ValueError(f"{twice} of {len(z)} inducing points come twice; pass inducing_points.unique(dim=0).")
        self.inducing_points = nn.Parameter(z, requires_grad=learn_inducing)

    def place(self, x: Tensor) -> Placed:
        d = self.inducing_points.shape[-1]
        if x.shape[-1] != d:
            M = len(self.inducing_points)
            raise ValueError(f"inputs have shape {tuple(x.shape)} but the inducing points ({M}, {d}); both need the same columns.")
        check_columns(self.kernels, x)
        return Placed(x)

    def belief(self, inputs, sites):
        return SummedBelief(self, inputs, sites)

    # -- whitened inducing variables ----------------------------------------------------------------------------------------

    def roots(self) -> Tensor:
        """L [c M M] with L Lᵀ = K_zz."""
        z = self.inducing_points
        return safe_cholesky(torch.stack([covariance(k, z, z) for k in self.kernels]))

    def whitened(self, L: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Wᵀ [c M n] and S [n c] of inputs x."""
        z = self.inducing_points
        V = torch.linalg.solve_triangular(L, torch.stack([covariance(k, z.to(x), x) for k in self.kernels]), upper=False)
        prior = torch.stack([variance(k, x) for k in self.kernels], -1)
        return V, (prior - V.square().sum(1).mT).clamp_min(0)

    def sums(self, L: Tensor, x: Tensor, nat1: Tensor, nat2: Tensor) -> Sums:
        """What sites at x say about v."""
        c, M = self.latents, len(self.inducing_points)
        coupled = len(groups(nat2)) < c

        def some(x: Tensor, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, ...]:
            V, S = self.whitened(L, x)
            h, Λ, log_scale, _ = summed(V, averaged(nat1, nat2, torch.diag_embed(S), self.power), coupled)
            return h[None], Λ[None], log_scale[None]

        h, Λ, log_scale = by_rows(some, x, nat1, nat2, width=c * M)
        return Sums(h.sum(0), Λ.sum(0), log_scale.sum(), coupled)

    def read(self, L: Tensor, q: Settled, x: Tensor, nat1: Tensor, nat2: Tensor) -> Marginals:
        """q(f_n) at data x [n d] with sites of their own there."""

        def some(x: Tensor, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, ...]:
            return self.read_whitened(q, *self.whitened(L, x), nat1, nat2)

        return Marginals(*by_rows(some, x, nat1, nat2, width=self.latents * len(self.inducing_points)))

    def read_whitened(self, q: Settled, V: Tensor, S: Tensor, nat1: Tensor, nat2: Tensor) -> Marginals:
        S = torch.diag_embed(S)
        return opened(projected(q, V), averaged(nat1, nat2, S, self.power), S, self.power)

    # -- the four of a model --------------------------------------------------------------------------------------------------

    def solve_from(self, L: Tensor, x: Tensor, nat1: Tensor, nat2: Tensor) -> tuple[Sums, Settled, Marginals]:
        """The sum of all sites, what it makes of v, and the marginals at the data."""
        if len(x) * self.latents * len(self.inducing_points) > KEPT:
            sums = self.sums(L, x, nat1, nat2)
            q = settled(sums)
            return sums, q, self.read(L, q, x, nat1, nat2)
        V, S = self.whitened(L, x)
        sums = summed(V, averaged(nat1, nat2, torch.diag_embed(S), self.power), len(groups(nat2)) < self.latents)
        q = settled(sums)
        return sums, q, self.read_whitened(q, V, S, nat1, nat2)

    def _solve(self, inputs, nat1, nat2):
        _, q, marginals = self.solve_from(self.roots(), inputs.x, nat1, nat2)
        return Solution(q.log_Z, marginals)

    def _predict(self, inputs, nat1, nat2, x):
        L = self.roots()
        return self.predict_from(L, settled(self.sums(L, inputs.x, nat1, nat2)), x)

    def predict_from(self, L: Tensor, q: Settled, x: Tensor) -> Marginals:
        """At x [m d], where there are no sites."""
        nothing = x.new_zeros(len(x), self.latents)
        return self.read(L, q, x, nothing, torch.diag_embed(nothing))

    def joint_from(self, L: Tensor, q: Settled, x: Tensor) -> Tensor:
        V, _ = self.whitened(L, x)
        open = [covariance(k, x, x) - v.mT @ v for k, v in zip(self.kernels, V, strict=True)]
        Y = spread(q, V)
        if len(q.Γ) == self.latents:
            return latents_inside([s + y.mT @ y for s, y in zip(open, Y, strict=True)])
        Y = Y.permute(1, 2, 0).reshape(Y.shape[1], -1)  # [cM, m c]
        return latents_inside(open) + Y.mT @ Y

    def _joint(self, inputs, nat1, nat2, x):
        L = self.roots()
        return self.joint_from(L, settled(self.sums(L, inputs.x, nat1, nat2)), x)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        L = self.roots()
        q = settled(self.sums(L, inputs.x, nat1, nat2))
        return draws(self.predict_from(L, q, x).mean, self.joint_from(L, q, x), n, generator)

    def __repr__(self) -> str:
        return super().__repr__().removesuffix(")") + f", {len(self.inducing_points)} inducing points)"


class SummedBelief(Belief):
    """The belief of :class:`SparseGP`: the sum of all sites is kept, and follows when those of a batch are replaced."""

    _L: Any = None
    _μ: Any = None
    _sums: Any = None
    _q: Any = None
    _batch: tuple[Tensor, Tensor, Tensor] | None = None  # the index last asked for, and V and S there
    _answer: Marginals | None = None  # there

    @torch.no_grad()
    def _begin(self) -> None:
        """All data are walked through once."""
        if self._sums is None:
            x = self.inputs.x
            self._L, self._μ = self.model.roots(), self.model.mean_at(x)
            self._sums = self.model.sums(self._L, x, self.model.shifted(self.sites, self._μ), self.sites.nat2)

    @torch.no_grad()
    def _settled(self) -> Settled:
        self._begin()
        if self._q is None:
            self._q = settled(self._sums)
        return self._q

    def _solve(self) -> Solution:
        # The sum anew, too: what many batches added and took away has left its rounding.
        x = self.inputs.x
        if self._L is None:
            self._L, self._μ = self.model.roots(), self.model.mean_at(x)
        self._sums, self._q, found = self.model.solve_from(self._L, x, self.model.shifted(self.sites, self._μ), self.sites.nat2)
        return Solution(self._q.log_Z + self.sites.log_at(self._μ).sum(), Marginals(found.mean + self._μ, found.cov))

    @torch.no_grad()
    def marginals(self, index):
        if self._solution is not None:
            return self._solution.marginals.rows(index)
        q, (V, S) = self._settled(), self._at(index)
        if self._answer is None:
            sites, μ = self.sites.rows(index), self._μ[index]
            found = self.model.read_whitened(q, V, S, self.model.shifted(sites, μ), sites.nat2)
            self._answer = Marginals(found.mean + μ, found.cov)
        return self._answer

    def _at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if self._batch is None or self._batch[0] is not index:
            self._begin()
            self._batch, self._answer = (index, *self.model.whitened(self._L, self.inputs.x[index])), None
        return self._batch[1:]

    @torch.no_grad()
    def renewed(self, index, sites):
        self._begin()
        new, (V, S) = SummedBelief(self.model, self.inputs, sites), self._at(index)
        new._L, new._μ, new._batch = self._L, self._μ, self._batch
        S = torch.diag_embed(S)
        was, becomes = (
            averaged(self.model.shifted(some, self._μ[index]), some.nat2, S, self.model.power) for some in (self.sites.rows(index), sites.rows(index))
        )
        change = Averaged(*(b - a for a, b in zip(was, becomes, strict=True)))
        new._sums = self._sums.plus(summed(V, change, len(groups(change.nat2)) < self.model.latents))
        return new

    def predict(self, x):
        q = self.model.predict_from(self._root(), self._settled(), x)
        return Marginals(q.mean + self.model.mean_at(x), q.cov)

    def joint(self, x):
        return self.model.joint_from(self._root(), self._settled(), x)

    def _root(self) -> Tensor:
        self._begin()
        return self._L


def summed(V: Tensor, sites: Averaged, coupled: bool) -> Sums:
    """What sites [n c] seen through V [c M n] say about v."""
    c, M, _ = V.shape
    h = torch.einsum("cmn,nc->cm", V, sites.nat1)
    rows = []
    for a in range(c):
        blocks = []
        for b in range(c):
            if a != b and not coupled:
                blocks.append(V.new_zeros(M, M))
            elif b < a:
                blocks.append(rows[b][a].mT)
            else:
                blocks.append((V[a] * sites.nat2[:, a, b]) @ V[b].mT)
        rows.append(blocks)
    return Sums(h, torch.stack([torch.stack(blocks) for blocks in rows]), sites.log_scale.sum(), coupled)


def settled(sums: Sums) -> Settled:
    """q(v) ∝ N(v; 0, I) exp(hᵀv − ½ vᵀΛv)."""
    c, M = sums.h.shape
    if not sums.coupled:
        P, h = torch.stack([sums.Λ[a, a] for a in range(c)]), sums.h.unsqueeze(-1)
    else:
        P, h = sums.Λ.transpose(1, 2).reshape(1, c * M, c * M), sums.h.reshape(1, c * M, 1)
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    C = safe_cholesky(0.5 * (P + P.mT) + eye)
    Γ = torch.linalg.solve_triangular(C, eye.expand_as(C), upper=False)
    Γh = Γ @ h
    log_Z = 0.5 * Γh.square().sum() - C.diagonal(dim1=-2, dim2=-1).log().sum()
    return Settled((Γ.mT @ Γh).reshape(c, M), Γ, log_Z + sums.log_scale)


def spread(q: Settled, V: Tensor) -> Tensor:
    """Γ Wᵀ of each latent: [c M n] where each is on its own, [c cM n] where they are together."""
    if len(q.Γ) == len(V):
        return q.Γ @ V
    return torch.stack([G @ v for G, v in zip(q.Γ[0].split(V.shape[1], -1), V, strict=True)])


def projected(q: Settled, V: Tensor) -> Marginals:
    """q(φ_n), φ_n = W_n v, for V = Wᵀ [c M n]."""
    Y = spread(q, V)
    mean = torch.einsum("cmn,cm->nc", V, q.mean)
    alone = len(q.Γ) == len(V)
    return Marginals(mean, torch.diag_embed(Y.square().sum(1).mT) if alone else torch.einsum("amn,bmn->nab", Y, Y))


def inducing_points(kernel, x: Tensor, m: int) -> Tensor:
    """At most m of the inputs x [n] or [n d], chosen greedily: each is the one that the ones before leave most uncertain under the kernel.

    That is a pivoted Cholesky factorisation of the kernel's matrix, O(n m²) in time and n m numbers in memory. It depends on the kernel's
    hyper-parameters as they are; points of which nothing is left open are not taken, so there may be fewer than m.

    Args:
        kernel: a gpytorch kernel.
        x: inputs to choose from, such as the data's, or some thousands of them.
        m: how many.

    Returns:
        [≤ m d], in the order of choice.

    Example:
        >>> import gpytorch
        >>> from bayesgn import models
        >>> models.inducing_points(gpytorch.kernels.RBFKernel(), torch.linspace(0, 1, 101), 3).flatten()
        tensor([0.0000, 1.0000, 0.5000])

    Source: Burt, Rasmussen and van der Wilk (2020), "Convergence of sparse variational inference in Gaussian processes regression", sec. 4.
    """
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ValueError(f"m={m!r}; expected how many inducing points to choose, at least 1.")
    wide = columns(x)
    with torch.no_grad():
        left = variance(kernel, wide).clone()
        least = 1e-10 * float(left.max()) if len(left) else 0.0
        chosen: list[Any] = []
        L = wide.new_zeros(min(m, len(wide)), len(wide))
        for j in range(len(L)):
            i = int(left.argmax())
            if left[i] <= least:
                break
            L[j] = (covariance(kernel, wide[i : i + 1], wide)[0] - L[:j, i] @ L[:j]) / left[i].sqrt()
            left = (left - L[j].square()).index_fill(0, torch.tensor([i], device=left.device), 0.0)
            chosen.append(i)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return wide[chosen].to(dtype)
