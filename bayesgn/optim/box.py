"""Bounds on parameters: which may move, and the minimiser of a quadratic among steps that stay inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import Tree

ROUNDS = 50  # of the primal-dual active set before it is taken for cycling


class Box:
    """lower ≤ θ ≤ upper, entry by entry; infinite where there is no bound.

    Args:
        lower, upper: [p].

    Raises:
        ValueError: a lower bound above the upper one, or a bound that is NaN.
    """

    def __init__(self, lower: Tensor, upper: Tensor, tree: Tree) -> None:
        wrong = ~(lower <= upper)
        if bool(wrong.any()):
            j = int(wrong.nonzero()[0])
            raise ValueError(f"bounds of {tree.name(j)} are {float(lower[j]):g} and {float(upper[j]):g}; expected lower ≤ upper.")
        self.lower, self.upper, self.tree = lower, upper, tree

    @staticmethod
    def of(bounds: tuple[Any, Any] | None, tree: Tree, like: Tensor) -> Box | None:
        """From a pair (lower, upper), each a number, None, or shaped as the parameters."""
        if bounds is None:
            return None
        if not (isinstance(bounds, tuple) and len(bounds) == 2):
            raise ValueError(f"bounds is a {type(bounds).__name__}; expected a pair (lower, upper), each a number, None or shaped as x0.")

        def end(bound: Any, none: float) -> Tensor:
            if bound is None or isinstance(bound, (int, float)):
                return torch.full_like(like, none if bound is None else float(bound))
            return tree.flatten(bound).to(like)

        return Box(end(bounds[0], -torch.inf), end(bounds[1], torch.inf), tree)

    def check(self, θ: Tensor) -> None:
        """Raise ValueError for a start that is outside."""
        outside = (θ < self.lower) | (θ > self.upper)
        if bool(outside.any()):
            j = int(outside.nonzero()[0])
            raise ValueError(
                f"x0 lies outside the bounds: {self.tree.name(j)} = {float(θ[j]):g} is not in [{float(self.lower[j]):g}, "
                f"{float(self.upper[j]):g}]; start inside (on a bound is allowed)."
            )

    def clip(self, θ: Tensor) -> Tensor:
        """The nearest point inside."""
        return torch.minimum(torch.maximum(θ, self.lower), self.upper)

    def held(self, θ: Tensor, gradient: Tensor) -> Tensor:
        """Entries that stand at a bound and are pushed against it [p]."""
        return ((θ <= self.lower) & (gradient > 0)) | ((θ >= self.upper) & (gradient < 0)) | (self.lower == self.upper)

    def side(self, θ: Tensor) -> Tensor:
        """−1, 0 or 1 for entries at the lower bound, at none, at the upper bound [p]."""
        return (θ >= self.upper).to(torch.int8) - ((θ <= self.lower) & (self.lower < self.upper)).to(torch.int8)


def boxed(
    solve: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    held: Tensor,
) -> tuple[Tensor, Tensor]:
    """The step in [low, high] (0 inside) that minimises a strictly convex quadratic, and which of its entries are free.

    A guess of the entries that end on a bound is solved for and corrected by the signs of its multipliers, many entries at a time: a few
    solves as a rule. Where that cycles, one entry at a time, with a lower quadratic at each change, which ends.

    Args:
        solve: (free [p], fixed step [p]) -> the minimiser over the free entries with the others as they are.
        slope: the quadratic's gradient at a step.
        held: the first guess, entries whose bound is at 0.

    Source: Hintermüller, Ito and Kunisch (2003), "The primal-dual active set strategy as a semismooth Newton method"; Nocedal and Wright
    (2006), Numerical Optimization, alg. 16.3, one entry at a time.
    """
    at_low = held & (low == 0)
    at_high = held & (high == 0) & ~at_low
    seen: set[bytes] = set()
    # What is below rounding, of a step beside the box or of a multiplier beside the others, must not set entries going to and fro.
    eps = torch.finfo(low.dtype).eps
    ends = torch.cat([low, high]).abs()
    least = eps * float(torch.where(ends.isfinite(), ends, 0.0).max())
    while len(seen) <= ROUNDS:
        δ = torch.where(at_low, low, torch.where(at_high, high, 0.0))
        fixed = at_low | at_high
        δ = torch.where(fixed, δ, solve(~fixed, δ))
        below, above = ~fixed & (δ < low - least), ~fixed & (δ > high + least)
        g = slope(δ)
        push = 100 * eps * g.abs().max()
        loose = ((at_low & (g < -push)) | (at_high & (g > push))) & (low < high)
        if not bool((below | above | loose).any()) or not bool(δ.isfinite().all()):
            return δ, ~fixed
        state = bytes((at_low.to(torch.uint8) + 2 * at_high.to(torch.uint8)).tolist())
        if state in seen:
            break
        seen.add(state)
        at_low, at_high = (at_low | below) & ~loose, (at_high | above) & ~loose
    return _one_at_a_time(solve, slope, low, high, held)


def _one_at_a_time(
    solve: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    held: Tensor,
) -> tuple[Tensor, Tensor]:
    δ, fixed = torch.zeros_like(low), held.clone()
    for _ in range(3 * len(low) + 10):
        way = torch.where(fixed, 0.0, solve(~fixed, torch.where(fixed, δ, 0.0)) - δ)
        # As far as the first bound on the way.
        room = torch.where(way > 0, high - δ, low - δ) / torch.where(way == 0, 1.0, way)
        room = torch.where(way == 0, torch.inf, room)
        α = float(room.min())
        if α < 1:
            j = int(room.argmin())
            δ = δ + max(α, 0.0) * way
            δ[j] = high[j] if float(way[j]) > 0 else low[j]
            fixed[j] = True
            continue
        δ = δ + way
        g = slope(δ)
        wrong = torch.where(fixed & (low < high), torch.where(δ <= low, -g, g), 0.0)  # pushed off its bound
        if not float(wrong.max()) > 1e-14 * float(g.abs().max()):
            break
        fixed[int(wrong.argmax())] = False
    return δ, ~fixed
