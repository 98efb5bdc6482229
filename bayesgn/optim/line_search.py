"""Line searches: how far to go along a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

Loss = Callable[[float], float]  # of the rate α: the loss at θ + αδ (not finite where it is not)


class LineSearch(ABC):
    """Chooses α for θ + αδ by evaluating the loss."""

    @abstractmethod
    def __call__(self, loss: Loss, start: float, slope: float) -> tuple[float, float]:
        """(α, loss at α), with the loss ``start`` and its slope gᵀδ at α = 0; α = 0 where no rate does."""


class Backtracking(LineSearch):
    """Halve the rate until the loss falls by a fraction of what its slope promises (Armijo).

        loss(α) ≤ loss(0) + decrease · α · gᵀδ,   α = 1, shrink, shrink², …

    Args:
        shrink: factor from one rate to the next.
        decrease: the fraction.
        tries: rates at most.

    Raises:
        ValueError: for a factor or fraction outside (0, 1), or no tries.

    Example:
        >>> Backtracking()(lambda α: (1 - 3 * α) ** 2, start=1.0, slope=-6.0)  # α = 1 gives 4, α = ½ gives ¼
        (0.5, 0.25)

    Source: Armijo (1966); Nocedal and Wright (2006), algorithm 3.1.
    """

    def __init__(self, shrink: float = 0.5, decrease: float = 1e-4, tries: int = 10) -> None:
        if not 0 < shrink < 1 or not 0 <= decrease < 1 or tries < 1:
            raise ValueError(
                f"Backtracking: shrink={shrink}, decrease={decrease}, tries={tries}; expected 0 < shrink < 1, 0 ≤ decrease < 1 and tries ≥ 1."
            )
        self.shrink, self.decrease, self.tries = shrink, decrease, tries

    def __call__(self, loss: Loss, start: float, slope: float) -> tuple[float, float]:
        α = 1.0
        for _ in range(self.tries):
            value = loss(α)
            if value < start and value <= start + self.decrease * α * min(slope, 0.0):
                return α, value
            α *= self.shrink
        return 0.0, start

    def __repr__(self) -> str:
        return f"Backtracking(shrink={self.shrink:g}, decrease={self.decrease:g}, tries={self.tries})"


class Grid(LineSearch):
    """The best of a geometric grid of rates, α = 0 among them: dearer, and takes steps longer than the quadratic dares.

        α ∈ {largest, largest · ratio, …, largest · ratio^(count − 1)}

    Args:
        largest: the first rate.
        ratio: from one rate to the next, in (0, 1).
        count: rates.

    Raises:
        ValueError: for numbers outside these ranges.

    Example:
        >>> Grid(largest=2.0, ratio=0.5, count=3)(lambda α: (1 - 2 * α) ** 2, start=1.0, slope=-4.0)  # 2, 1, ½
        (0.5, 0.0)

    Source: Abreu et al. (2025), sec. 3, who search along full Gauss-Newton steps so.
    """

    def __init__(self, largest: float = 2.0, ratio: float = 0.5, count: int = 8) -> None:
        if not largest > 0 or not 0 < ratio < 1 or count < 1:
            raise ValueError(f"Grid: largest={largest}, ratio={ratio}, count={count}; expected largest > 0, 0 < ratio < 1, count ≥ 1.")
        self.largest, self.ratio, self.count = largest, ratio, count

    @property
    def rates(self) -> list[float]:
        """The grid, largest first."""
        return [self.largest * self.ratio**i for i in range(self.count)]

    def __call__(self, loss: Loss, start: float, slope: float) -> tuple[float, float]:
        best = (0.0, start)
        for α in self.rates:
            value = loss(α)
            if math.isfinite(value) and value < best[1]:
                best = (α, value)
        return best

    def __repr__(self) -> str:
        return f"Grid(largest={self.largest:g}, ratio={self.ratio:g}, count={self.count})"
