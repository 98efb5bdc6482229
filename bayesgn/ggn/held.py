"""J of one batch held in memory: the factors of JᵀS for any S follow from those of J, without another backward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bayesgn.ggn.factors import Dense, Embedding, Factors, Linear, Masked
from bayesgn.ggn.linearization import Linearization


def held(lin: Linearization, factors: list[Factors]) -> Linearization:
    """A linearization that answers any number of times, from its ``factors`` of J itself."""

    @torch.no_grad()
    def pull(S: Tensor) -> list[Factors]:
        out = [times(f, S) for f in factors]
        # [n]: some position's target is missing, and S = 0 for all of its outputs.
        missing = (S == 0).all(-1).unflatten(1, (-1, lin.output.shape[-1])).all(-1).any(-1)
        return [f.without_missing(missing) for f in out] if bool(missing.any()) else out

    return Linearization(lin.output.detach(), lin.blocks, pull)


def times(f: Factors, S: Tensor) -> Factors:
    """The factors of JᵀS from those of J, for S [n r k].

    Example:
        >>> f = Linear(a=torch.tensor([[[[1.0, 2.0]]]]), δ=torch.tensor([[[[[1.0], [3.0]]]]]))  # one datum, two outputs
        >>> f.jacobian()
        tensor([[[1., 2.],
                 [3., 6.]]])
        >>> times(f, torch.tensor([[[1.0], [1.0]]])).jacobian()
        tensor([[[4., 8.]]])
    """
    ST = S.to(f.dtype).mT
    if isinstance(f, Linear):
        return replace(f, δ=ST[:, None, None] @ f.δ)
    if isinstance(f, Embedding):
        return replace(f, δ=ST[:, None] @ f.δ)
    if isinstance(f, Masked):
        return Masked(times(f.inner, S), f.index)
    return Dense(ST @ f.jacobian())


def columns(f: Factors, part: slice) -> Factors:
    """The factors of some of the columns of JᵀS.

    Example:
        >>> f = Linear(a=torch.tensor([[[[1.0, 2.0]]]]), δ=torch.tensor([[[[[1.0], [3.0]]]]]))  # one datum, two columns
        >>> columns(f, slice(1, 2)).jacobian()
        tensor([[[3., 6.]]])
    """
    if isinstance(f, (Linear, Embedding)):
        return replace(f, δ=f.δ[..., part, :])
    if isinstance(f, Masked):
        return Masked(columns(f.inner, part), f.index)
    return Dense(f.jacobian()[:, part])


def bytes_held(f: Factors) -> int:
    """Memory of these factors as they are."""
    if isinstance(f, Masked):
        return bytes_held(f.inner)
    return sum(t.numel() * t.element_size() for t in vars(f).values() if isinstance(t, Tensor))
