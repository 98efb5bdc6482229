"""Chains of all kinds and the dense Gaussian they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._kalman import Chain

DOUBLE = torch.float64


class Problem(NamedTuple):
    """A chain and a site at each point."""

    chain: Chain
    nat1: Tensor
    nat2: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that can be differentiated in: A, Q, P0, H, nat1, nat2."""
        c = self.chain
        return c.A, c.Q, c.P0, c.H, self.nat1, self.nat2

    def at(self, A, Q, P0, H, nat1, nat2) -> Problem:
        return Problem(Chain(A, Q, self.chain.step, P0, H), nat1, nat2)

    def to(self, *args) -> Problem:
        step = self.chain.step.to(self.nat1.new_zeros(0).to(*args).device)
        chain = Chain(*(t.to(*args) for t in self.chain[:2]), step, *(t.to(*args) for t in self.chain[3:]))
        return Problem(chain, self.nat1.to(*args), self.nat2.to(*args))


def first_row(d: int) -> Tensor:
    return torch.eye(d, dtype=DOUBLE)[:1]


def psd(g: torch.Generator, *shape: int, rank: int | None = None) -> Tensor:
    R = torch.randn(*shape, shape[-1] if rank is None else rank, generator=g, dtype=DOUBLE)
    return 0.5 * R @ R.mT


def make(n: int, d: int = 3, c: int = 1, kinds: int | None = None, H: Tensor | None = None, seed: int = 0, size: float = 0.5) -> Problem:
    """Random stable dynamics and proper sites; ``kinds`` different steps (all different unless given)."""
    g = torch.Generator().manual_seed(seed)
    u = max(n - 1, 1) if kinds is None else kinds
    A = torch.randn(u, d, d, generator=g, dtype=DOUBLE)
    A = size * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    Q, P0 = psd(g, u, d), psd(g, d)
    H = torch.randn(c, d, generator=g, dtype=DOUBLE) if H is None else H
    step = torch.arange(n) - 1 if kinds is None else torch.randint(u, (n,), generator=g)
    if n:
        step[0] = -1
    return Problem(Chain(A, Q, step, P0, H), torch.randn(n, c, generator=g, dtype=DOUBLE), psd(g, n, c))


def coincident() -> Problem:
    p = make(9, H=first_row(3))
    p.chain.step[torch.tensor([3, 4, 8])] = -1
    return p


def missing() -> Problem:
    p = make(8, H=first_row(3))
    for k in (0, 3, 4, 7):
        p.nat1[k], p.nat2[k] = 0, 0
    return p


def flat() -> Problem:
    p = make(4, H=first_row(3))
    return p._replace(nat1=torch.zeros_like(p.nat1), nat2=torch.zeros_like(p.nat2))


def singular(rank: int) -> Problem:
    p = make(6, H=first_row(3))
    return p._replace(chain=p.chain._replace(P0=psd(torch.Generator().manual_seed(1), 3, rank=rank)))


def without_noise() -> Problem:
    p = make(6, H=first_row(3))
    return p._replace(chain=p.chain._replace(Q=torch.zeros_like(p.chain.Q)))


def per_datum() -> Problem:
    p = make(7, 4, 2)
    return p._replace(chain=p.chain._replace(H=torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)))


def rank_one_sites() -> Problem:
    p = make(6, 4, 2)
    return p._replace(nat2=psd(torch.Generator().manual_seed(3), 6, 2, rank=1))


def two_kernels() -> Problem:
    """Two latents, each the sum of two processes: block-diagonal transitions, H of zeros and ones."""
    p = make(7, 6, 2, kinds=2)
    mask = torch.block_diag(*[torch.ones(k, k, dtype=DOUBLE) for k in (2, 1, 2, 1)])
    H = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]], dtype=DOUBLE)
    return p._replace(chain=p.chain._replace(A=p.chain.A * mask, Q=p.chain.Q * mask, P0=p.chain.P0 * mask, H=H))


CHAINS: dict[str, Callable[[], Problem]] = {
    "one state": lambda: make(8, 1, 1),
    "irregular": lambda: make(10, H=first_row(3)),
    "regular": lambda: make(9, kinds=1, H=first_row(3)),
    "three steps": lambda: make(7, kinds=3, H=first_row(3)),
    "any H": lambda: make(7),
    "coincident": coincident,
    "missing": missing,
    "all missing": flat,
    "one point": lambda: make(1, H=first_row(3)),
    "two points": lambda: make(2, H=first_row(3)),
    "P0 of rank 1": lambda: singular(1),
    "P0 = 0": lambda: singular(0),
    "Q = 0": without_noise,
    "growing": lambda: make(7, H=first_row(3), size=1.3),
    "two latents": lambda: make(6, 4, 2),
    "H per datum": per_datum,
    "sites of rank 1": rank_one_sites,
    "two kernels": two_kernels,
    "four latents": lambda: make(5, 5, 4),
}


def joint(chain: Chain) -> Tensor:
    """The covariance [n d, n d] of all states."""
    n, d = len(chain.step), chain.P0.shape[-1]
    eye, nothing = torch.eye(d, dtype=DOUBLE), torch.zeros(d, d, dtype=DOUBLE)
    rows: list[list[Tensor]] = []
    for k in range(n):
        moves = k > 0 and chain.step[k] >= 0
        A = chain.A[chain.step[k]] if moves else eye
        Q = chain.Q[chain.step[k]] if moves else nothing
        cross = [A @ block for block in rows[-1]] if k else []
        rows.append([*cross, A @ rows[-1][-1] @ A.mT + Q if k else chain.P0])
    full = [[rows[i][j] if j <= i else rows[j][i].mT for j in range(n)] for i in range(n)]
    return torch.cat([torch.cat(r, 1) for r in full])


def dense(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log Z, mean [n c], cov [n c c] of f, and mean [n d], cov [n d d] of the states, by dense algebra."""
    (n, c), d = p.nat1.shape, p.chain.P0.shape[-1]
    K = joint(p.chain)
    H = p.chain.H if p.chain.H.dim() == 3 else p.chain.H.expand(n, c, d)
    H = torch.block_diag(*H)
    Λ, h = H.mT @ torch.block_diag(*p.nat2) @ H, H.mT @ p.nat1.reshape(-1)
    S = torch.eye(n * d, dtype=DOUBLE) + Λ @ K
    Σ = torch.linalg.solve(S.mT, K.mT).mT  # K (I + Λ K)⁻¹
    m = Σ @ h
    log_Z = 0.5 * h @ m - 0.5 * torch.linalg.slogdet(S).logabsdet
    V, μ = H @ Σ @ H.mT, H @ m
    blocks = lambda M, k: torch.stack([M[i * k : i * k + k, i * k : i * k + k] for i in range(n)])
    return log_Z, μ.reshape(n, c), blocks(V, c), m.reshape(n, d), blocks(Σ, d)


def gradients(function, problem: Problem, weights=None):
    """Gradients of log Z, or of a combination of log Z, means and covariances, in A, Q, P0, H, nat1, nat2.

    In a symmetric matrix only the symmetric part of a gradient means something.
    """
    leaves = [t.clone().requires_grad_() for t in problem.tensors]
    out = function(problem.at(*leaves))
    value = out[0] if weights is None else sum((w * t).sum() for w, t in zip(weights, out))
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves)]
    return [0.5 * (g + g.mT) if i in (1, 2, 5) else g for i, g in enumerate(found)]
