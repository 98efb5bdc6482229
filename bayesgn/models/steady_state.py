"""The Gaussian process over regular times with the gains of the filter's steady state: O(d²) a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesgn import _kalman
from bayesgn.models.gaussian_process import Solution
from bayesgn.models.markov_gp import Markovian, Times, beside, groups, one_time, times_of
from bayesgn.rules import Marginals


class SteadyStateGP(Markovian):
    """p(f) over regular times with the gains that the filter would settle at: no covariance is carried from point to point.

    The covariance P of the predicted state and the information J that later sites have of it solve two discrete Riccati equations,

        P = A (P⁻¹ + HᵀΛ̄H)⁻¹ Aᵀ + Q,   J = Aᵀ ((J + HᵀΛ̄H)⁻¹ + Q)⁻¹ A,

    both by one doubling. What is approximated, in every turn of a rule and in the evidence:

    * Λ̄ is the mean of the site precisions, taken over as many neighbours to each side as the filter remembers points. Where it varies, the
      equations are solved on a grid of multiples of the mean over all, and read off between. A site itself enters with its own precision, so that
      a missing point says nothing, and cavities stay proper.
    * So marginals are exact for equal precisions, away from the ends by a few times the filter's memory; elsewhere they are not (means are off by
      about a tenth of a standard deviation for counts, variances by a few per cent), and the evidence is no bound.

    It pays for many states. On a CPU the exact compiled filter of :class:`MarkovGP` is as fast for up to three states where precisions are equal, and
    up to about ten where they vary; at 18 states it takes 3.7 µs a point and this model 0.6 to 1.

    ``posterior(x)`` and its draws are those of :class:`MarkovGP` under the sites that were found: exact in these, at any time x.

    Args:
        kernel: a gpytorch kernel over time that forgets (no constant, periodic or linear part), or one for each latent function.
        mean: a gpytorch mean (or one for each latent); zero unless given.

    Raises:
        ValueError: for irregular or coincident times (a missing point of a grid is a NaN target), and for a kernel without a steady state.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> t = torch.arange(2000, dtype=torch.float64); y = torch.sin(t / 50)
        >>> kernel = gpytorch.kernels.MaternKernel(nu=2.5).double(); kernel.lengthscale = 40.0
        >>> posterior = bgn.bayes_newton(bgn.models.SteadyStateGP(kernel), bgn.likelihoods.Gaussian(0.1), (t, y))
        >>> posterior(t).mean.shape
        torch.Size([2000])

    Source: Solin, Hensman and Turner (2018), "Infinite-horizon Gaussian processes"; there Λ̄ is each point's own precision.
    """

    def place(self, x: Tensor) -> Times:
        times = times_of(one_time(x, "SteadyStateGP"))
        n, same = len(times.t), int((times.step[1:] < 0).sum())
        if n == 1 or n > 1 and (len(times.dt) != 1 or same):
            found = "one point has no step" if n == 1 else f"{same} steps are zero and the others" if same else "steps"
            if n > 1:
                found += f" go from {float(times.dt.min()):g} to {float(times.dt.max()):g}" if len(times.dt) else " are none"
            raise ValueError(f"SteadyStateGP needs regular times, but {found}; give missing points of a grid as NaN targets, or use models.MarkovGP.")
        return times

    def _solve(self, inputs, nat1, nat2):
        nat1, nat2, log_Z, means, covs = nat1[inputs.order], nat2[inputs.order], [], [], []
        for latents in groups(nat2):
            chain = self.chain(inputs, latents)
            check(chain)
            parts = smooth(chain, nat1[:, latents], nat2[:, latents][:, :, latents])
            for out, part in zip((log_Z, means, covs), parts):
                out.append(part)
        return Solution(sum(log_Z), Marginals(torch.cat(means, -1), beside(covs)).rows(inputs.back))  # type: ignore[arg-type]


def check(chain: _kalman.Chain) -> None:
    """Whether the process forgets where it was."""
    radius = float(torch.linalg.eigvals(chain.A[0].detach()).abs().max())
    if len(chain.A) != 1 or radius > 1 - 1e-9:
        raise ValueError(
            "SteadyStateGP: the kernel has a part that never forgets (constant, periodic, linear: the transition's spectral radius is "
            f"{radius:.12g}), so its filter has no steady state; use models.MarkovGP."
        )


def smooth(chain: _kalman.Chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, mean [n c] and covariance [n c c] of each f as `_kalman.smooth` gives them, with the gains of the steady state."""
    A, H, n = chain.A[0], chain.H, len(nat1)
    equal = bool((nat2 == nat2[:1]).all())
    own = nat2[:1] if equal else nat2
    B, others = gains(A, chain.Q[0], H, own)  # H P, and the covariance of f given all sites but a point's own
    V = B @ H.mT
    eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    # S = I + nat2 V,  W = S⁻¹ nat2,  e = S⁻¹ nat1 − W H m,  m ← A (m + Bᵀ e)
    S = eye + _product(own, V)
    W, s = _solve(S, own), _solve(S.expand(n, -1, -1), nat1.unsqueeze(-1)).squeeze(-1)
    K, b = _product(W, B), (s.unsqueeze(-1) * B).sum(-2) @ A.mT
    m = _kalman.gained(A, H, K, torch.cat([torch.zeros_like(b[:1]), b[:-1]]))
    μ = m @ H.mT
    e, g = s - _times(W, μ), nat1 - _times(own, μ)
    log_Z = 0.5 * (((nat1 + g) * μ).sum() + (g * _times(V, e)).sum() - _logdet(S).sum() * (n if equal else 1))
    # what the sites from a point on say of its state: r ← (I − Kᵀ H)ᵀ Aᵀ r + Hᵀ e
    r = _kalman.gained(A, H, K, e @ H, from_the_end=True)
    C = _solve(eye + _product(others, own), others.expand(own.shape))
    return log_Z, μ + _times(B, r), (0.5 * (C + C.mT)).expand(n, -1, -1)


def gains(A: Tensor, Q: Tensor, H: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """H P [n c d] and H (P⁻¹ + J)⁻¹ Hᵀ [n c c] at the local mean of precisions nat2 [n c c]; one for all where they are equal."""
    Λ = nat2.mean(0)
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)

    def at(level: Tensor) -> tuple[Tensor, Tensor]:
        P, J = riccati(A, Q, level[:, None, None] * (H.mT @ Λ @ H))
        return H @ P, H @ torch.linalg.solve(eye + P @ J, P) @ H.mT

    B, others = at(nat2.new_ones(1))
    if len(nat2) == 1:
        return B, others
    with torch.no_grad():
        closed = A - A @ B[0].mT @ torch.linalg.solve(torch.eye(len(H), dtype=A.dtype, device=A.device) + Λ @ B[0] @ H.mT, Λ @ H)
        radius = float(torch.linalg.eigvals(closed).abs().max())
    level = local_mean(nat2.diagonal(dim1=-2, dim2=-1).sum(-1), round(-1 / math.log(radius)) if radius > 0 else 0) / Λ.trace()
    log_level = level.clamp_min(1e-4).log()
    low, high = (float(v) for v in log_level.detach().aminmax())
    count = 2 + int((high - low) / 0.1)
    grid = torch.linspace(low, high, count, dtype=A.dtype, device=A.device)
    B, others = at(grid.exp())
    where = (log_level - low) * ((count - 1) / max(high - low, 1e-300))
    i = where.detach().floor().long().clamp(0, count - 2)
    w = (where - i)[:, None, None]
    return torch.lerp(B[i], B[i + 1], w), torch.lerp(others[i], others[i + 1], w)


def local_mean(v: Tensor, reach: int) -> Tensor:
    """Mean of v [n] over up to ``reach`` neighbours to each side."""
    n = len(v)
    total = torch.cat([v.new_zeros(1), torch.cumsum(v, 0)])
    k = torch.arange(n, device=v.device)
    end, start = (k + reach + 1).clamp_max(n), (k - reach).clamp_min(0)
    return ((total[end] - total[start]) / (end - start)).clamp_min(0)


def riccati(A: Tensor, Q: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """P = A (P⁻¹ + G)⁻¹ Aᵀ + Q and J = Aᵀ ((J + G)⁻¹ + Q)⁻¹ A for stable A [d d], Q [d d] and each of the PSD G [k d d], of any rank.

    By doubling: after j rounds they are those of 2^j points.

    Source: Anderson (1978), "Second-order convergent algorithms for the steady-state Riccati equation".
    """
    d, eye, own = len(A), torch.eye(len(A), dtype=A.dtype, device=A.device), G
    A, P = A.expand(G.shape), Q.expand(G.shape)
    for _ in range(64):
        X = torch.linalg.solve(eye + P @ G, torch.cat([A, P], -1))
        more, J = A @ X[..., d:] @ A.mT, A.mT @ G @ X[..., :d]
        A, P, G = A @ X[..., :d], P + 0.5 * (more + more.mT), G + 0.5 * (J + J.mT)
        if bool(more.detach().abs().amax() <= torch.finfo(A.dtype).eps * P.detach().abs().amax()):
            return P, G - own
    raise FloatingPointError("the Riccati equations of the steady state did not converge in 64 doublings; use models.MarkovGP.")


def _times(M: Tensor, v: Tensor) -> Tensor:
    """M v for each v [n k]; one M [1 j k] or n of them."""
    return v @ M[0].mT if len(M) == 1 else (M * v.unsqueeze(-2)).sum(-1)


def _product(M: Tensor, N: Tensor) -> Tensor:
    return M * N if M.shape[-1] == M.shape[-2] == 1 else M @ N


def _solve(S: Tensor, R: Tensor) -> Tensor:
    return R / S if S.shape[-1] == 1 else torch.linalg.solve(S, R)


def _logdet(S: Tensor) -> Tensor:
    return S[:, 0, 0].log() if S.shape[-1] == 1 else torch.linalg.slogdet(S).logabsdet
