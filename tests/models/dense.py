"""Kernels whose matrices keep all digits, so that ``models.GP`` is a second opinion for models in state space.

gpytorch's matrix form expands squared distances, which for near inputs costs half of the digits (1e-8 for a Matérn kernel with ν = ½).
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesgn.models.sde_kernels import state_space


def by_pairs(kernel, a: Tensor, b: Tensor) -> Tensor:
    """k(a, b) [n] of pairs of inputs [n d]."""
    # Two lists that are equal as a whole would be taken for a diagonal; a last pair far apart keeps them different.
    left, right = torch.cat([a, torch.full_like(a[:1], -50.0)]), torch.cat([b, torch.full_like(b[:1], 90.0)])
    return kernel(left, right, diag=True)[: len(a)] if len(a) else a[:, 0]


def by_state_space(kernel, a: Tensor, b: Tensor) -> Tensor:
    """H A(t − t') P(t') Hᵀ [n] for t ≥ t', of pairs of times [n 1]."""
    space, a, b = state_space(kernel), a[:, 0], b[:, 0]
    late, early = torch.maximum(a, b), torch.minimum(a, b)
    return torch.einsum("a,kab,kbc,c->k", space.H, space.transition(late - early), space.covariance(early), space.H)


def all_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.repeat_interleave(len(b), 0), b.repeat(len(a), 1)


class Exactly(Kernel):
    """A kernel by pairs of inputs.

    Args:
        approximated: whether as its state-space form approximates it.
    """

    def __init__(self, kernel, approximated: bool = False) -> None:
        super().__init__()
        self.kernel, self.value = kernel, by_state_space if approximated else by_pairs

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_) -> Tensor:
        if diag:
            return self.value(self.kernel, x1, x2)
        return self.value(self.kernel, *all_pairs(x1, x2)).reshape(len(x1), len(x2))


class Separable(Kernel):
    """A product of a kernel over the first column and one over the others."""

    def __init__(self, temporal, spatial) -> None:
        super().__init__()
        self.temporal, self.spatial = temporal, spatial

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_) -> Tensor:
        time, space = (self.temporal(x1[:, :1], x2[:, :1], diag=diag), self.spatial(x1[:, 1:], x2[:, 1:], diag=diag))
        return time * space if diag else time.to_dense() * space.to_dense()
