"""Scalings for least squares: a fading maximum of J's columns, the user's units, none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesgn.optim.scaling import Scaling

_FLOOR = {torch.float64: 1e-200, torch.float32: 1e-30}  # of the largest entry: units may differ by any order of magnitude


class FadingMax(Scaling):
    """D = the largest diag(JᵀJ) seen, older ones counting less: D ← max(diag(JᵀJ), fade · D).

    Steps do not depend on the units of the parameters. Between :class:`Diagonal` (fade = 0: a parameter whose column collapses loses its damping
    in one step, and the fit leaps onto a plateau) and :class:`RunningMax` (fade = 1: a column that was large once, far from the answer, brakes
    for ever).

    Args:
        fade: in [0, 1].

    Raises:
        ValueError: for a number outside.

    Example:
        >>> scaling = FadingMax(0.5)
        >>> scaling(torch.tensor([4.0, 1.0])), scaling(torch.tensor([1.0, 3.0]))
        (tensor([4., 1.]), tensor([2., 3.]))
    """

    def __init__(self, fade: float = 0.5) -> None:
        if not 0 <= fade <= 1:
            raise ValueError(f"FadingMax: fade={fade}; expected a number in [0, 1].")
        self.fade = float(fade)
        self._largest: Tensor | None = None

    def __call__(self, diagonal: Tensor) -> Tensor:
        self._largest = diagonal.clone() if self._largest is None else torch.maximum(self.fade * self._largest, diagonal)
        largest = self._largest.max()
        if not bool(largest > 0):
            return torch.ones_like(diagonal)
        return self._largest.clamp_min(_FLOOR.get(diagonal.dtype, 1e-8) * largest)

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]


class Unscaled(Scaling):
    """D = I: lengths in the parameters' own units.

    Example:
        >>> Unscaled()(torch.tensor([4.0, 0.0]))
        tensor([1., 1.])
    """

    def __call__(self, diagonal: Tensor) -> Tensor:
        return torch.ones_like(diagonal)


class Units(Scaling):
    """D = 1 / unit²: a length of 1 is a step of one unit in a parameter, as ``x_scale`` has it in scipy.

    Args:
        unit: typical sizes [p], or shaped as the parameters where these are one tensor.

    Raises:
        ValueError: for units that are not positive and finite.

    Example:
        >>> Units(torch.tensor([1.0, 10.0]))(torch.tensor([4.0, 0.0]))
        tensor([1.0000, 0.0100])
    """

    def __init__(self, unit: Tensor) -> None:
        if not isinstance(unit, Tensor) or not bool((unit > 0).all()) or not bool(unit.isfinite().all()):
            raise ValueError("Units: expected a tensor of positive finite sizes, one for each parameter.")
        self.unit = unit.detach().reshape(-1).clone()

    def __call__(self, diagonal: Tensor) -> Tensor:
        if len(self.unit) != len(diagonal):
            raise ValueError(f"Units has {len(self.unit)} sizes; there are {len(diagonal)} parameters.")
        return self.unit.to(diagonal) ** -2

    def state_dict(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unit = state["unit"]
