"""What lies between inducing times of a Markov process: f(t) given the whole states at the two inducing times around."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayesgn.models.sde_kernels import StateSpace

CHUNK = 4096  # places worked on together: their matrices stay in a processor's cache, 3–4 times as fast as all at once
LARGE = 1e-6  # noise of an interval, relative to the prior, beside which the digits that P − A P Aᵀ loses do not matter


class Pieces(NamedTuple):
    """Points put into the intervals between inducing times, in p pieces of l places, so that all algebra is batched.

    Attributes:
        x [n 1]: the points as they came.
        t [p l]: their times; an end of the interval where a place is empty.
        segment [p]: the interval of a piece: 0 before the first inducing time, i between the i-th and the next, M after the last.
        pair [p]: the two neighbouring inducing states that its points are read from.
        place [n]: of each point in the flat [p l].
        kept: what was worked out for these points, by state of the hyper-parameters.
    """

    x: Tensor
    t: Tensor
    segment: Tensor
    pair: Tensor
    place: Tensor
    kept: dict[str, Any]

    def spread(self, values: Tensor) -> Tensor:
        """Values of each point [n …] at their places [p l …], zero elsewhere."""
        p, l = self.t.shape
        return values.new_zeros(p * l, *values.shape[1:]).index_copy(0, self.place, values).reshape(p, l, *values.shape[1:])

    def gather(self, values: Tensor) -> Tensor:
        """Values at places [p l …], or of whole pieces [p], for each point [n …]."""
        values = values.unsqueeze(-1).expand(self.t.shape) if values.dim() == 1 else values
        return values.flatten(0, 1)[self.place]


def pieces_of(t: Tensor, z: Tensor) -> Pieces:
    """Times t [n] between sorted inducing times z [M]."""
    segment = torch.searchsorted(z, t.detach().contiguous(), right=True)
    count = torch.bincount(segment, minlength=len(z) + 1)
    l = max(1, min(256, round(len(t) / max(1, int((count > 0).sum())))))
    pieces = (count + l - 1) // l
    order = torch.argsort(segment, stable=True)
    rank = torch.arange(len(t), device=t.device) - (torch.cumsum(count, 0) - count)[segment[order]]
    first = torch.cumsum(pieces, 0) - pieces
    place = torch.empty_like(segment)
    place[order] = (first[segment[order]] + rank // l) * l + rank % l
    of = torch.repeat_interleave(torch.arange(len(count), device=t.device), pieces)
    empty = z[(of - 1).clamp_min(0)].unsqueeze(-1).expand(-1, l)
    places = empty.flatten().index_copy(0, place, t).reshape(-1, l)
    return Pieces(t.unsqueeze(-1), places, of, (of - 1).clamp(0, len(z) - 2), place, {})


class Bridge(NamedTuple):
    """One latent function given the inducing states around: f(t) | u ~ N(left · u_i + right · u_{i+1}, open), at places [p l].

    ``ahead``, ``seen`` and ``gain`` give the covariance of what is left open between two points s ≤ t of one interval:
    ahead_s A(t − s)ᵀHᵀ − seen_s · gain_t.
    """

    left: Tensor  # [p l d]
    right: Tensor  # [p l d]
    open: Tensor  # [p l]
    ahead: Tensor  # [p l d]
    seen: Tensor  # [p l d]
    gain: Tensor  # [p l d]


def bridge(space: StateSpace, z: Tensor, pieces: Pieces) -> Bridge:
    """f at all points given the states at inducing times z [M]; a graph's inner nodes are worked out a second time rather than kept.

    With (A₁, Q₁) the step from z_i to t, (A₂, ·) that from t to z_{i+1} and (A, Q) the whole:

        f = H (A₁ u_i + Q₁A₂ᵀ Q⁻¹ (u_{i+1} − A u_i)) + what is left
    """
    p, l = pieces.t.shape
    before, after = int((pieces.segment == 0).sum()), int((pieces.segment == len(z)).sum())
    rows = max(1, CHUNK // l)
    kinds = [(_backward, 0, before), (_between, before, p - after), (_forward, p - after, p)]
    parts = []
    for kind, start, end in kinds:
        for a in range(start, end, rows):
            some = slice(a, min(a + rows, end))
            work = space, z, pieces.t[some], pieces.segment[some] - 1
            if torch.is_grad_enabled() and p > rows:
                parts.append(checkpoint(kind, *work, use_reentrant=False))
            else:
                parts.append(kind(*work))
    if not parts:
        nothing = z.new_zeros(0, l, space.d)
        return Bridge(nothing, nothing, nothing[..., 0], nothing, nothing, nothing)
    left, right, open, ahead, seen, gain = (torch.cat(t) for t in zip(*parts))
    return Bridge(left, right, open.clamp_min(0), ahead, seen, gain)


def _rows(H: Tensor, M: Tensor, l: int) -> Tensor:
    """H M at every place [p l d]."""
    return (H @ M).unflatten(0, (-1, l))


def _backward(space: StateSpace, z: Tensor, t: Tensor, i: Tensor) -> Bridge:
    """Before the first state u, backwards in time: Cov(f(t), u) = H P(t) Aᵀ."""
    H, l = space.H.to(z), t.shape[-1]
    A = space.transition((z[0] - t).flatten())
    ahead = _rows(H, space.covariance(t.flatten()), l)
    seen = _times(A, ahead)
    gain = seen @ inverse(space.covariance(z[:1]))
    return Bridge(gain, torch.zeros_like(gain), ahead @ H - (seen * gain).sum(-1), ahead, seen, gain)


def _between(space: StateSpace, z: Tensor, t: Tensor, i: Tensor) -> Bridge:
    H, l = space.H.to(z), t.shape[-1]
    start, end = int(i.min()), int(i.max()) + 1
    z, i = z[start : end + 1], i - start
    left, right = z[i].unsqueeze(-1), z[i + 1].unsqueeze(-1)
    A1 = space.transition((t - left).flatten())
    HA, Q, P = _rows(H, A1, l), space.noise(z[:-1], z[1:] - z[:-1]), space.covariance(z)
    if bool((Q.diagonal(dim1=-2, dim2=-1) > LARGE * P[1:].diagonal(dim1=-2, dim2=-1)).all()):
        here = P[:1] if space.stationary else space.covariance(t.flatten())
        ahead = _rows(H, here, l if not space.stationary else 1) - _times(A1, HA @ P[i])  # H (P − A₁ P A₁ᵀ)
    else:
        ahead = _rows(H, space.noise(left.expand_as(t).flatten(), (t - left).flatten()), l)
    seen = _times(space.transition((right - t).flatten()), ahead)
    gain = seen @ inverse(Q)[i]
    whole = space.transition(z[1:] - z[:-1])
    return Bridge(HA - gain @ whole[i], gain, ahead @ H - (seen * gain).sum(-1), ahead, seen, gain)


def _forward(space: StateSpace, z: Tensor, t: Tensor, i: Tensor) -> Bridge:
    """After the last state."""
    H, l = space.H.to(z), t.shape[-1]
    dt = (t - z[-1]).flatten()
    right = _rows(H, space.transition(dt), l)
    ahead = _rows(H, space.noise(z[-1:].expand(len(dt)), dt), l)
    nothing = torch.zeros_like(right)
    return Bridge(nothing, right, ahead @ H, ahead, nothing, nothing)


def _times(A: Tensor, rows: Tensor) -> Tensor:
    """A x for each of the rows x [p l d], with A [p·l d d]."""
    return (A @ rows.flatten(0, 1).unsqueeze(-1)).reshape(rows.shape)


def inverse(Q: Tensor) -> Tensor:
    """The inverse of covariances [k d d] of any rank, on their range.

    A state that is fixed by the one before (a constant, a period) has Q = 0, and no covariance with what lies between. Smooth processes over
    short steps have entries of very different size: they are balanced first.
    """
    q = Q.diagonal(dim1=-2, dim2=-1)
    s = torch.where(q > 0, torch.where(q > 0, q, 1.0).rsqrt(), 0.0)
    balanced = s.unsqueeze(-1) * Q * s.unsqueeze(-2)
    return s.unsqueeze(-1) * torch.linalg.pinv(balanced, hermitian=True, rtol=100 * torch.finfo(Q.dtype).eps) * s.unsqueeze(-2)


def left_open(space: StateSpace, b: Bridge, pieces: Pieces) -> Tensor:
    """Covariance of f between all points [m m], given the inducing states: zero between different intervals."""
    t, segment = pieces.x[:, 0], pieces.gather(pieces.segment)
    s, u = torch.nonzero((segment[:, None] == segment) & (t[:, None] <= t), as_tuple=True)  # pairs s ≤ u of one interval
    ahead, seen, gain = (pieces.gather(v) for v in (b.ahead, b.seen, b.gain))
    reach = space.H.to(t) @ space.transition(t[u] - t[s])
    cov = (ahead[s] * reach).sum(-1) - (seen[s] * gain[u]).sum(-1)
    R = t.new_zeros(len(t), len(t)).index_put((s, u), cov)
    return torch.where(t[:, None] <= t, R, R.mT)


def stacked(bridges: list[Bridge]) -> Tensor:
    """B [p l c D] for several latents: states of the left end of all, then of the right end of all."""
    d = sum(b.left.shape[-1] for b in bridges)
    rows, at = [], 0
    for b in bridges:
        k = b.left.shape[-1]
        rows.append(torch.cat([torch.nn.functional.pad(side, (at, d - at - k)) for side in (b.left, b.right)], -1))
        at += k
    return torch.stack(rows, -2)
