"""Restarts of a least-squares fit: other dampings, other scalings, other starts, the best one kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bayesgn.optim.damping import Damping
from bayesgn.optim.scaling import Scaling


class Restarts:
    """Which further runs are tried; the one with the lowest cost is kept.

    From x0 every damping with every scaling; then, with the first of each, from ``perturbed`` starts x0 · exp(spread · ε), ε standard normal
    (x0 + spread · ε where an entry of x0 is 0), which keeps signs and looks over orders of magnitude.

    Args:
        perturbed: number of further starts.
        spread: of their logarithms.
        dampings, scalings: in place of the fit's own where given.

    Raises:
        ValueError: for negative numbers.

    Example:
        >>> Restarts(perturbed=5, spread=1.0)
        Restarts(perturbed=5, spread=1)
    """

    def __init__(
        self, perturbed: int = 4, spread: float = 0.5, dampings: Sequence[Damping] = (), scalings: Sequence[Scaling] = ()
    ) -> None:
        if perturbed < 0 or not spread >= 0:
            raise ValueError(f"Restarts: perturbed={perturbed}, spread={spread}; expected non-negative numbers.")
        self.perturbed, self.spread = perturbed, float(spread)
        self.dampings, self.scalings = tuple(dampings), tuple(scalings)

    def runs(
        self, start: Tensor, damping: Damping, scaling: Scaling, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Damping, Scaling]]:
        """(start, damping, scaling) of each run."""
        dampings, scalings = self.dampings or (damping,), self.scalings or (scaling,)
        for d in dampings:
            for s in scalings:
                yield start, d, s
        device = start.device if generator is None else generator.device
        for _ in range(self.perturbed):
            ε = self.spread * torch.randn(len(start), generator=generator, dtype=start.dtype, device=device).to(start.device)
            yield torch.where(start == 0, ε, start * ε.exp()), dampings[0], scalings[0]

    def __repr__(self) -> str:
        more = "".join(f", {name}={list(found)}" for name, found in (("dampings", self.dampings), ("scalings", self.scalings)) if found)
        return f"Restarts(perturbed={self.perturbed}, spread={self.spread:g}{more})"
