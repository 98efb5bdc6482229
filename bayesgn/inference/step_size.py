"""The step size of the Bayes-Newton loop: which steps are taken back, and how long the next one is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesgn.rules import Marginals, Turn

SMALLEST = 2.0**-20
LONG = 0.1  # standard deviations: shorter steps are not judged by what they gain, where rounding and cubature errors would count
ENOUGH = 0.1  # of what the slope promises; a Newton step on a parabola gains a half
TURNING = -0.3  # a move that undoes more than this part of the last one shortens the next
PATIENCE = 40  # steps in which the smallest move has to fall by half: a cycle of several steps is not seen from one step to the next


class StepSize:
    """lr of the next step.

    Args:
        lr: at first, and at every step unless automatic.
        automatic: whether it follows the moves.
    """

    def __init__(self, lr: float, automatic: bool) -> None:
        self.lr, self.automatic = lr, automatic
        self.last: tuple[Tensor, Tensor] | None = None
        self.longest, self.steps, self.smallest, self.then = 1.0, 0, math.inf, math.inf

    def begin(self) -> float:
        return self.lr

    def end(self, lr: float, before: Marginals, after: Marginals, whole: bool) -> None:
        """After a step of size lr; ``whole`` if it took all the data, so that moves can be compared."""
        if not self.automatic:
            return
        if not whole:
            self.lr = min(1.0, 2.0 * lr)
            return
        width = _width(after)
        moves = (after.mean - before.mean) / lr, (width - _width(before)) / lr
        factor = 1.0
        if self.last is not None:
            now, then = (torch.cat([(m / width).flatten() for m in pair]) for pair in (moves, self.last))
            κ = float((now @ then) / (then @ then).clamp_min(1e-300))
            if κ < TURNING:
                factor = max(1 / (1 - κ), 0.25)
            elif κ > 0:
                factor = 4.0 if κ > 0.75 else 1 / (1 - κ)
        self._break_cycles(change_of(before, after) / lr)
        self.lr, self.last = min(self.longest, max(SMALLEST, factor * lr)), moves

    def _break_cycles(self, change: float) -> None:
        """Halve the longest step where whole moves have not become smaller for long."""
        self.steps, self.smallest = self.steps + 1, min(self.smallest, change)
        if self.steps % PATIENCE:
            return
        if self.smallest > 0.5 * self.then:
            self.longest = max(0.5 * self.longest, SMALLEST)
        self.then, self.smallest = self.smallest, math.inf


@torch.no_grad()
def shortened(belief: Any, new: Any, turn: Turn, batch: Tensor | None, energy: float, last: float) -> float:
    """By what factor a long step from one belief to another should be shorter, by what it should have raised; 1 where it may stand."""
    rows = slice(None) if batch is None else batch
    before, after = belief.marginals(batch), new.marginals(batch)
    change = change_of(before, after)
    if change <= LONG:
        return 1.0
    if batch is None and belief.rule.climbs(turn) and energy < last - 1e-9 * (1 + abs(last)):
        return 0.5
    rise = turn.local.rise(after.mean)
    if rise is None:
        return 1.0
    # The step is one of Newton's on Σ L_n + log(prior and the other sites), whose slope here is g − α with α = ∂ log t. That Gaussian is as steep
    # here and there as the sites of the batch say, so it falls by half of (α + α') times the move.
    move = after.mean - before.mean
    α, α_new = belief.sites.rows(rows).slope_at(before.mean), turn.sites.slope_at(after.mean)
    gain = rise - 0.5 * (move * (α + α_new)).sum(-1)
    slope = (move * (turn.local.gradient - α)).sum(-1)
    gain, slope = (float(torch.where(turn.taken, t, 0.0).sum()) for t in (gain, slope))
    if gain >= ENOUGH * slope - 1e-9 * (1 + abs(last)):
        return 1.0
    # The top of the parabola with this slope and gain.
    best = slope / (2 * (slope - gain)) if math.isfinite(gain) else 0.0
    return min(0.5, max(0.1, best))


def change_of(before: Marginals, after: Marginals) -> float:
    """The largest move of a mean, in standard deviations, or of one of these, in parts of itself."""
    if not after.mean.numel():
        return 0.0
    width = _width(after)
    mean, spread = (after.mean - before.mean).abs() / width, (width - _width(before)).abs() / width
    return float(torch.maximum(mean, spread).max())


def _width(q: Marginals) -> Tensor:
    tiny = torch.finfo(q.cov.dtype).tiny ** 0.5
    return q.cov.diagonal(dim1=-2, dim2=-1).clamp_min(tiny).sqrt()
