"""Pieces of the variational bound: data a batch at a time, its standard error, and raising it in the likelihood's parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn.optim.expectations import View

logger = logging.getLogger("bayesgn.optim")


def standard_error(totals: Tensor | None, antithetic: bool) -> float:
    """Of the mean of these draws [s], of which every second may be the one before turned round."""
    if totals is None:
        return 0.0
    if antithetic and len(totals) % 2 == 0:
        totals = totals.reshape(-1, 2).mean(-1)
    return float(totals.double().std() / len(totals) ** 0.5) if len(totals) > 1 else math.inf


class Walk:
    """Batches of some data, one at a time and as often as asked; empty ones are left out.

    Attributes:
        count: data of the last whole walk.
    """

    def __init__(self, opt: Any, data: Any) -> None:
        self.opt, self.data, self.count = opt, data if isinstance(data, Walk) else _data.batches(data), 0

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        count = 0
        for x, y in self.data:
            if not _data.len_of(x):
                continue
            _data.check_finite(x, "x")
            if not count:
                self.opt.linearizer.prepare(x, self.opt.likelihood.rows)
            count += _data.len_of(x)
            yield x, y
        if not count:
            raise ValueError("the data are empty (0 rows); there is nothing to learn from.")
        self.count = count


def raise_in(likelihood, free: list[nn.Parameter], views: list[View], steps: int = 20) -> None:
    """Raise Σ E_q log p in the likelihood's parameters, in place."""
    before = [p.detach().clone() for p in free]
    search = torch.optim.LBFGS(free, lr=1.0, max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = -torch.stack([view.value(likelihood) for view in views]).sum() / sum(view.y.shape[0] for view in views)
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)  # type: ignore[arg-type]
    for p, old in zip(free, before, strict=True):
        p.grad = None
        if not bool(p.isfinite().all()):
            logger.warning("the likelihood's parameters left the finite numbers while being tuned; they stay as they were")
            p.data.copy_(old)
