"""The torch engine: a parallel scan of logarithmic depth, for any device and dtype, differentiable by autograd.

A run of points is one *link* between the state x before it and the state x' at its end, with all its sites multiplied in:

    exp(ηᵀx − ½ xᵀJx) · N(x'; A x + b, C)   (up to a constant)

Two neighbouring runs make one by integrating out the state between them. With D = (I + C₁J₂)⁻¹, which exists for PSD C₁ and J₂ of any rank
(a missing datum has J = 0, coincident times have C = 0 and A = I):

    A = A₂ D A₁              b = A₂ D (b₁ + C₁η₂) + b₂        C = A₂ D C₁ A₂ᵀ + C₂
    J = A₁ᵀ J₂ D A₁ + J₁     η = A₁ᵀ (η₂ − J₂ D (b₁ + C₁η₂)) + η₁

Runs of 1, 2, 4 … points form a tree. On the way down it gives every point what the sites before it say of the state (a filter: m, P) and what
those after it say (an information filter: η, J): 3 n joinings of runs in 3 log₂ n steps, and memory linear in n.

Source: Särkkä and García-Fernández (2021), "Temporal parallelization of Bayesian smoothers"; the tree is that of Blelloch (1990), "Prefix sums
and their applications", for both directions at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._kalman.small import below, beside, interleaved, laid_out, logdet, mul, one_plus, solve


class Links(NamedTuple):
    """m runs of points, see above."""

    A: Tensor  # [m d d]
    b: Tensor  # [m d 1]
    C: Tensor  # [m d d]
    info: Tensor  # [m d d+1]: J and −η side by side

    def rows(self, which: slice) -> Links:
        return Links(*(t[which] for t in self))


# What is known of a state is [m d d+1] too: "belief" is P and m (the past), "info" is J and −η (the future).


def _meet(C: Tensor, info: Tensor, left: Tensor, mean: Tensor, *right: Tensor) -> Tensor:
    """(I + C J)⁻¹ of [left, mean + C η, right]."""
    G, Gη = mul(C, info).split([C.shape[-1], 1], -1)
    return solve(one_plus(G), beside(left, mean - Gη, *right))


def _back(link: Links, info: Tensor, X: Tensor) -> Tensor:
    """The information before a run from that after it, where X = D [A, b + C η]."""
    d = X.shape[-2]
    Z = mul(info[..., :d], X)
    Z[..., d:] += info[..., d:]
    return mul(link.A.mT, Z, link.info)


def join(first: Links, second: Links) -> Links:
    """Two neighbouring runs as one."""
    d = first.A.shape[-1]
    X = _meet(first.C, second.info, first.A, first.b, first.C)
    A, b, C = mul(second.A, X).split([d, 1, d], -1)
    return Links(A, b + second.b, mul(C, second.A.mT, second.C), _back(first, second.info, X[..., : d + 1]))


def push(belief: Tensor, link: Links) -> Tensor:
    """The belief after a run from that before it."""
    P, m = belief.split([belief.shape[-2], 1], -1)
    P, m = mul(link.A, _meet(P, link.info, P, m)).split([P.shape[-1], 1], -1)
    return beside(mul(P, link.A.mT, link.C), m + link.b)


def pull(link: Links, info: Tensor) -> Tensor:
    """The information before a run from that after it."""
    return _back(link, info, _meet(link.C, info, link.A, link.b))


def both_ways(links: Links, belief: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """The belief before each link and the information after it, from those at the two ends of the chain [1 d d+1]."""
    levels = []
    while len(links.A) > 1:
        pairs = len(links.A) // 2
        first, second = (Links(*(laid_out(t[i : 2 * pairs : 2]) for t in links)) for i in (0, 1))
        odd = links.rows(slice(2 * pairs, None))  # one without a partner, or none
        levels.append((first, second))
        if pairs == 1 and len(odd.A) == 0:
            break
        links = join(first, second)
        if len(odd.A):
            links = Links(*(below(*t) for t in zip(links, odd)))
    for first, second in reversed(levels):
        pairs = len(first.A)
        before, after = belief[:pairs], info[:pairs]
        new = interleaved(before, push(before, first)), interleaved(pull(second, after), after)
        if len(belief) > pairs:
            new = tuple(below(t, old[pairs:]) for t, old in zip(new, (belief, info)))
        belief, info = new
    return belief, info


class Points:
    """A chain's points in the layout for small matrices: each a step x' = A x + q, then a site on H x'."""

    def __init__(self, chain, nat1: Tensor, nat2: Tensor) -> None:
        self.A, self.Q = transitions(chain)
        self.H = chain.H[None] if chain.H.dim() == 2 else laid_out(chain.H)
        self.nat1, self.nat2 = nat1[:, :, None], laid_out(nat2)
        d = chain.P0.shape[-1]
        nothing = chain.P0.new_zeros(1, d, 1)
        start, end = torch.cat([chain.P0[None], nothing], -1), chain.P0.new_zeros(1, d, d + 1)
        belief, self.info = both_ways(self.links(), start, end)
        P, m = mul(self.A, belief).split([d, 1], -1)
        self.P, self.m = mul(P, self.A.mT, self.Q), m  # predicted: before the point's own site

    def links(self) -> Links:
        A, Q, H = self.A, self.Q, self.H
        QH, HA, c = mul(Q, H.mT), mul(H, A), H.shape[-2]
        W, e = solve(one_plus(mul(self.nat2, mul(H, QH))), beside(self.nat2, self.nat1)).split([c, 1], -1)
        K = mul(QH, W)
        return Links(A - mul(K, HA), mul(QH, e), Q - mul(K, QH.mT), mul(HA.mT, beside(mul(W, HA), -e)))

    def log_Z(self) -> Tensor:
        HP, μ = mul(self.H, self.P), mul(self.H, self.m)
        V = mul(HP, self.H.mT)
        S, g = one_plus(mul(self.nat2, V)), self.nat1 - mul(self.nat2, μ)
        return 0.5 * (((self.nat1 + g) * μ).sum() + (g * mul(V, solve(S, g))).sum() - logdet(S).sum())

    def without_site(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """(I + P J)⁻¹ of P ``right``, and the mean: the state given all sites but the point's own."""
        X = _meet(self.P, self.info, mul(self.P, right), self.m)
        return X[..., :-1], X[..., -1:]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [n c] and covariance [n c c] of f."""
        PH, m = self.without_site(self.H.mT)
        V, μ = mul(self.H, PH), mul(self.H, m)
        S = one_plus(mul(V, self.nat2))
        cov, mean = solve(S, beside(V, μ + mul(V, self.nat1))).split([V.shape[-1], 1], -1)
        return mean.squeeze(-1).contiguous(), (0.5 * (cov + cov.mT)).contiguous()

    def states(self) -> tuple[Tensor, Tensor]:
        """Mean [n d] and covariance [n d d] of x."""
        P, m = self.without_site(one_plus(torch.zeros_like(self.P[:1])))
        HP = mul(self.H, P)
        S = one_plus(mul(self.nat2, mul(HP, self.H.mT)))
        e, W = solve(S, beside(self.nat1 - mul(self.nat2, mul(self.H, m)), self.nat2)).split([1, S.shape[-1]], -1)
        P = P - mul(HP.mT, mul(W, HP))
        return (m + mul(HP.mT, e)).squeeze(-1).contiguous(), (0.5 * (P + P.mT)).contiguous()


def transitions(chain) -> tuple[Tensor, Tensor]:
    """A and Q of every point [n d d]; identity and zero where no time has passed."""
    A = torch.cat([chain.A, torch.eye(len(chain.P0), dtype=chain.A.dtype, device=chain.A.device)[None]])
    Q = torch.cat([chain.Q, torch.zeros_like(chain.P0)[None]])
    step = torch.where(chain.step < 0, len(chain.A), chain.step)
    step[:1] = len(chain.A)  # the first point starts the chain
    return laid_out(A.index_select(0, step)), laid_out(Q.index_select(0, step))


def smooth(chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, mean [n c] and covariance [n c c] of every f."""
    if len(nat1) == 0:
        return nat1.sum(), nat1.clone(), nat2.clone()
    points = Points(chain, nat1, nat2)
    return (points.log_Z(), *points.moments())


def states(chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed states [n d], [n d d]."""
    n, d = len(nat1), chain.P0.shape[-1]
    if n == 0:
        return nat1.new_zeros(0, d), nat1.new_zeros(0, d, d)
    return Points(chain, nat1, nat2).states()


def means(chain, nat1: Tensor, nat2: Tensor) -> Tensor:
    """The smoothed mean of f for each nat1 [s n c] over one nat2: [s n c]."""
    if nat1.shape[1] == 0:
        return nat1.clone()
    points = Points(chain, nat1[0], nat2)
    A, H, h = points.A, points.H, nat1.permute(1, 2, 0)  # [n c s]
    HP = mul(H, points.P)
    B = solve(one_plus(mul(mul(HP, H.mT), points.nat2)), HP)  # H P of the filtered P
    K = mul(B.mT, points.nat2)
    # m = A m + Bᵀ (nat1 − nat2 H A m) forward; backward, with f = H m + B r,  r = Aᵀ (r + Hᵀ (nat1 − nat2 f)).
    Φ = A - mul(K, mul(H, A))
    f = H @ cumulated(Φ, B.mT @ h)
    b = A.mT @ (H.mT @ (h - points.nat2 @ f))
    r = cumulated(Φ.mT.flip(0), b.flip(0)).flip(0)  # of the prediction of k, seen from k − 1
    return (f + B @ torch.cat([r[1:], torch.zeros_like(r[:1])])).permute(2, 0, 1).contiguous()


def propagate(chain, noise: Tensor) -> Tensor:
    """x_k = A x_{k−1} + noise_k for each path [s n d]; a point at the same instant as the one before repeats it, whatever its noise."""
    if noise.shape[1] == 0:
        return noise.clone()
    still = chain.step < 0
    still[:1] = False
    noise = noise.masked_fill(still[:, None], 0.0)
    return cumulated(transitions(chain)[0], noise.permute(1, 2, 0)).permute(2, 0, 1).contiguous()


def cumulated(A: Tensor, b: Tensor) -> Tensor:
    """x_k = A_k x_{k−1} + b_k from nothing, for A [n d d] and b [n d s]."""
    last, levels = (A, b), []
    while len(A) > 1:  # x' = A x + b over 1, 2, 4 … points
        pairs = len(A) // 2
        (A1, b1), (A2, b2) = ((A[i : 2 * pairs : 2], b[i : 2 * pairs : 2]) for i in (0, 1))
        levels.append((A1, b1))
        A, b = torch.cat([A2 @ A1, A[2 * pairs :]]), torch.cat([A2 @ b1 + b2, b[2 * pairs :]])
    x = torch.zeros_like(b)  # before each run
    for A1, b1 in reversed(levels):
        before = x[: len(A1)]
        x = torch.cat([torch.stack([before, A1 @ before + b1], 1).flatten(0, 1), x[len(A1) :]])
    A, b = last
    return A @ x + b
