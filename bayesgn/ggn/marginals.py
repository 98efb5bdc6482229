"""A Gaussian over weights seen at the outputs of one batch: f + J shift, and J Σ Jᵀ within each row."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn.ggn.linearization import Linearization
from bayesgn.ggn.structure import Precision, working


def moved(lin: Linearization, shift: Tensor) -> Tensor:
    """f + J shift [n *positions c]."""
    Jv = sum(f.to(shift.dtype).matvec(shift[b.where, None]) for f, b in zip(lin.factors(), lin.blocks, strict=True))
    return (lin.output.to(shift) + Jv.reshape(lin.output.shape)).to(working(lin.output.dtype))  # type: ignore[union-attr]


def row_blocks(precision: Precision, lin: Linearization) -> Tensor:
    """J Σ Jᵀ within each row [N c c]."""
    c = lin.output.shape[-1]
    if lin.r == c:
        return _symmetric(precision.covariance(lin.factors()))
    out = []  # one position at a time: columns of the others would be thrown away
    eye = torch.eye(lin.r, dtype=lin.output.dtype, device=lin.output.device)
    for start in range(0, lin.r, c):
        out.append(_symmetric(precision.covariance(lin.factors(eye[:, start : start + c].expand(lin.n, -1, -1)))))
    return torch.stack(out, dim=1).flatten(0, 1)


def _symmetric(M: Tensor) -> Tensor:
    return 0.5 * (M + M.mT)
