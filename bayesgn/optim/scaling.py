"""Scalings: in which units of each weight a damping measures the length of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Scaling(ABC):
    """diag(D) of a damping λ/2 δᵀDδ, from the diagonal of H at each step. It holds its own state."""

    @abstractmethod
    def __call__(self, diagonal: Tensor) -> Tensor:
        """diag(D) [p], positive, for diag(H) [p] of this step."""

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most scalings remember nothing)
        """Take up what another of this kind has seen."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in vars(self).items() if isinstance(v, float))})"


class Diagonal(Scaling):
    """D = diag(H): steps do not depend on the units of the weights, but a direction that goes flat loses its damping.

    Args:
        floor: entries stay above this fraction of the largest.

    Raises:
        ValueError: for a floor that is not in (0, 1].

    Example:
        >>> Diagonal()(torch.tensor([4.0, 0.0]))
        tensor([4.0000e+00, 4.0000e-08])

    Source: Marquardt (1963).
    """

    def __init__(self, floor: float = 1e-8) -> None:
        if not 0 < floor <= 1:
            raise ValueError(f"{type(self).__name__}: floor={floor}; expected a fraction of the largest entry, in (0, 1].")
        self.floor = float(floor)

    def __call__(self, diagonal: Tensor) -> Tensor:
        largest = diagonal.max()
        if not bool(largest > 0):
            return torch.ones_like(diagonal)
        return diagonal.clamp_min(self.floor * largest)


class RunningMax(Diagonal):
    """D = the largest diag(H) of all steps so far: as :class:`Diagonal`, and the damping of a weight never falls.

    Example:
        >>> scaling = RunningMax()
        >>> scaling(torch.tensor([4.0, 1.0])), scaling(torch.tensor([2.0, 3.0]))
        (tensor([4., 1.]), tensor([4., 3.]))

    Source: Moré (1978), sec. 6; Pooladzandi and Zhou (2022), "Improving Levenberg-Marquardt algorithm for neural networks".
    """

    def __init__(self, floor: float = 1e-8) -> None:
        super().__init__(floor)
        self._largest: Tensor | None = None

    def __call__(self, diagonal: Tensor) -> Tensor:
        if self._largest is not None and self._largest.shape != diagonal.shape:
            raise ValueError(
                f"this RunningMax has seen {len(self._largest)} weights, now {len(diagonal)} came; give every optimizer one of its own."
            )
        self._largest = diagonal.clone() if self._largest is None else torch.maximum(self._largest.to(diagonal), diagonal)
        return super().__call__(self._largest)

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]
