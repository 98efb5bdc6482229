"""What all figures share: axes of their own, colours, tensors as arrays. matplotlib is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008): distinct for every kind of colour vision, and in grey.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)


def axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.5)) -> Axes:
    """``ax``, or axes in a figure that pyplot does not know, so that nothing is left open."""
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure.subplots()


def array(t: Tensor | Sequence[float]) -> Any:
    """For matplotlib: a detached float64 array on the CPU."""
    return torch.as_tensor(t).detach().to("cpu", torch.float64).numpy()


def finish(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    """Labels, a legend where there is something to name, and no box around it all."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(framealpha=0.8, edgecolor="none", fontsize="small")
    return ax
