"""What every state-space form of a kernel gives."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class StateSpace(ABC):
    """A process x(t) of d states of which f = H x has the kernel's covariance, k(t, t') = H A(t − t') P(t') Hᵀ for t ≥ t'.

    The states of the forms here are chosen such that P is near the identity whatever the lengthscale; all of them keep a graph to the
    hyper-parameters.

    Attributes:
        H [d]: f = H x.
        stationary: whether P(t) is the same for all t.
        homogeneous: whether the noise of a step depends on its length alone.
    """

    stationary = True
    homogeneous = True

    def __init__(self, H: Tensor) -> None:
        self.H = H

    @property
    def d(self) -> int:
        """States."""
        return self.H.shape[-1]

    @abstractmethod
    def transition(self, dt: Tensor) -> Tensor:
        """A [u d d] over steps dt [u] ≥ 0."""

    @abstractmethod
    def covariance(self, t: Tensor) -> Tensor:
        """P(t) [k d d], the prior covariance of x at times t [k]."""

    @abstractmethod
    def noise(self, t: Tensor, dt: Tensor) -> Tensor:
        """Q [u d d] = P(t + dt) − A(dt) P(t) A(dt)ᵀ of steps from t to t + dt, both [u]."""


def difference(space: StateSpace, t: Tensor, dt: Tensor) -> Tensor:
    """Q = P(t + dt) − A P(t) Aᵀ as it stands: the noise of a form of your own that has no better one. Tiny steps lose digits by cancellation."""
    A = space.transition(dt)
    Q = space.covariance(t + dt) - A @ space.covariance(t) @ A.mT
    return 0.5 * (Q + Q.mT)


def identity(d: int, t: Tensor) -> Tensor:
    """I [k d d], one for each of t [k]."""
    return torch.eye(d, dtype=t.dtype, device=t.device).expand(len(t), -1, -1)


def accumulated(column: Callable[[Tensor], Tensor], transition: Callable[[Tensor], Tensor], z: Tensor, limit: float, doublings: int) -> Tensor:
    """Q [u d d] of steps z [u] where P = I: ∫₀^z a(s) a(s)ᵀ ds for short steps, I − A Aᵀ for those beyond ``limit``.

    The integral is a Gauss-Legendre sum of outer products over z / 2^doublings, then Q(2s) = Q(s) + A(s) Q(s) A(s)ᵀ: PSD by construction, without
    cancellation.

    Args:
        column: s [m] -> a(s) = A(s) L [m d], for noise that comes in through one column L.
        transition: s [m] -> A(s) [m d d].
        limit: so far that I − A Aᵀ cancels nothing, and so near that 12 nodes on z / 2^doublings are exact to rounding.
    """
    nodes, weights = (torch.tensor(a).to(z) for a in _legendre())
    s = z.clamp(max=limit) / 2**doublings
    a = column((s.unsqueeze(-1) * nodes).flatten()).unflatten(0, (len(z), len(nodes)))
    Q = s[:, None, None] * ((a * weights.unsqueeze(-1)).mT @ a)
    for _ in range(doublings):
        A = transition(s)
        Q, s = Q + A @ Q @ A.mT, 2 * s
    A = transition(z)
    Q = torch.where((z < limit)[:, None, None], Q, identity(A.shape[-1], z) - A @ A.mT)
    return 0.5 * (Q + Q.mT)


@functools.lru_cache(maxsize=1)
def _legendre(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return 0.5 * (x + 1), 0.5 * w
