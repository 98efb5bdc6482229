"""Toys, drawn from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesgn.datasets.lookup import Dataset


def sinusoid(
    n: int = 150, seed: int = 0, noise: float = 0.09, n_test: int = 300, dtype: torch.dtype = torch.float32
) -> Dataset:
    """A noisy sinusoid with a gap, in the manner of Snelson's set: y = sin(2x) + x/4 + ε with x in [−3, −1] ∪ [1, 3], ε ~ N(0, noise).

    `noise` is a variance. The test inputs are an even grid over [−4, 4] with noiseless targets, so the gap and the outside can be judged.

    Example:
        >>> data = sinusoid(n=50, seed=0)
        >>> data.x_train.shape, data.y_train.shape, bool((data.x_train.abs() < 1).any())
        (torch.Size([50, 1]), torch.Size([50, 1]), False)
    """
    g = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.rand(n, 1, generator=g, dtype=torch.float64)
    x = torch.where(torch.rand(n, 1, generator=g) < 0.5, -x, x)
    f = lambda x: torch.sin(2 * x) + x / 4
    y = f(x) + math.sqrt(noise) * torch.randn(n, 1, generator=g, dtype=torch.float64)
    grid = torch.linspace(-4, 4, n_test, dtype=torch.float64).unsqueeze(1)
    return Dataset(x.to(dtype), y.to(dtype), grid.to(dtype), f(grid).to(dtype), "sinusoid", "generated")


def two_moons(
    seed: int = 0, n: int = 200, noise: float = 0.01, n_test: int = 500, dtype: torch.dtype = torch.float32
) -> Dataset:
    """Two interleaved half circles with Gaussian noise of variance `noise`: x [n 2], y [n] int64 in {0, 1}.

    Example:
        >>> two_moons(seed=0, n=10).y_train.bincount().tolist()
        [5, 5]
    """
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = (torch.arange(n) % 2)[torch.randperm(n, generator=g)]
        angle = math.pi * torch.rand(n, generator=g, dtype=torch.float64)
        upper = torch.stack([angle.cos(), angle.sin()], -1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        x = torch.where(y.unsqueeze(1) == 0, upper, lower)
        return (x + math.sqrt(noise) * torch.randn(n, 2, generator=g, dtype=torch.float64)).to(dtype), y

    return Dataset(*draw(n), *draw(n_test), "two_moons", "generated")
