"""Many inputs a few at a time, so that memory does not grow with what is in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NUMBERS = 2**22  # in one intermediate matrix


def by_rows(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """What ``function(*rows)`` gives, tensors with the same rows, from pieces of ``NUMBERS / width`` rows put together.

    Where a graph is asked for, the pieces are worked out again in the backward pass instead of being kept.
    """
    size = max(1, NUMBERS // max(1, width))
    if len(rows[0]) <= size:
        return function(*rows)
    pieces = zip(*(t.split(size) for t in rows), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        parts = [function(*piece) for piece in pieces]
    return tuple(torch.cat(together) for together in zip(*parts, strict=True))
