"""A sinusoid with a gap, and the banana: the same Gaussian over weights read through the net (BNN) and through its linearisation (GLM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, metrics, models
from bayesgn.datasets import DatasetUnavailable
from paper_repro.disentangling.common import COLORS, DTYPE, mlp, table, train

DRAWS = 300
NOISE = 0.09


class Toy:
    """A net of two hidden layers of 50 at its mode, and the exact GGN posterior there (in its data × data form)."""

    def __init__(self, likelihood: likelihoods.Likelihood, x: Tensor, y: Tensor, δ: float = 1.0, iterations: int = 400) -> None:
        self.likelihood = likelihood
        self.net = train(mlp(x.shape[1], 50, 50, 1, seed=0), likelihood, x, y, δ, iterations)
        self.posterior: Any = bgn.laplace(models.Network(self.net, models.WeightPrior(δ), ggn.Gram), likelihood, (x, y), progress=False)

    def predict(self, x: Tensor) -> dict[str, Distribution]:
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return {
                "MAP": self.likelihood.conditional(self.net(x)),
                "BNN": self.likelihood(self.posterior.sample_outputs(x, DRAWS, generator=g)),
                "GLM": self.likelihood(self.posterior(x)),
            }


def regression(figures: Path) -> dict[str, float]:
    data, new = datasets.sinusoid(noise=NOISE, dtype=DTYPE), datasets.sinusoid(n=1000, seed=1, noise=NOISE, dtype=DTYPE)
    toy = Toy(likelihoods.Gaussian(NOISE), *data.train)
    numbers: dict[str, float] = {}
    for part, (x, y) in {"train": data.train, "test": new.train}.items():
        for name, predictive in toy.predict(x).items():
            numbers[f"toys_regression_{part}_nll_{name.lower()}"] = float(metrics.nll(predictive, y))
    where = {"data": data.x_train, "gap": torch.linspace(-0.7, 0.7, 50, dtype=DTYPE)[:, None]}
    for place, x in where.items():
        found = toy.predict(x)
        for name in ("BNN", "GLM"):
            numbers[f"toys_regression_sd_{place}_{name.lower()}"] = float((found[name].variance - NOISE).clamp_min(0).sqrt().mean())
    draw_regression(toy, data, figures / "regression.png")
    return numbers


def banana(figures: Path) -> dict[str, float]:
    data = datasets.banana(DTYPE)
    parts = {"train": data.train, "test": data.test}
    toy = Toy(likelihoods.Bernoulli(), data.x_train, data.y_train.to(DTYPE)[:, None])
    numbers: dict[str, float] = {}
    for part, (x, y) in parts.items():
        for name, predictive in toy.predict(x).items():
            target = y.to(DTYPE)[:, None]
            numbers[f"toys_banana_{part}_nll_{name.lower()}"] = float(metrics.nll(predictive, target))
            numbers[f"toys_banana_{part}_accuracy_{name.lower()}"] = float(metrics.accuracy(predictive, target))
    draw_banana(toy, data, figures / "banana.png")
    return numbers


def draw_regression(toy: Toy, data: Any, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = data.x_test
    found = toy.predict(grid)
    at = grid[:, 0]
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    for ax, name, title in zip(axes, ("BNN", "GLM"), ("BNN: the net at draws of its weights", "GLM: the linearised net, the same Gaussian")):
        mean, sd = found[name].mean.reshape(-1), found[name].variance.reshape(-1).sqrt()
        ax.fill_between(at, mean - 2 * sd, mean + 2 * sd, color=COLORS[name], alpha=0.2, lw=0)
        ax.plot(at, mean, color=COLORS[name])
        ax.plot(at, toy.net(grid).detach()[:, 0], "k--", lw=0.8)
        ax.scatter(data.x_train[:, 0], data.y_train[:, 0], s=4, color="k", alpha=0.5, lw=0)
        if float(sd.min()) > 3:
            ax.text(3.9, -5.6, f"the band: ± {2 * float(sd.median()):.0f}", fontsize=8, ha="right")
        ax.set(title=title, xlabel="x", ylim=(-6, 6), xlim=(-4, 4))
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean ± 2 sd of y")
    axes[0].text(-3.9, -5.6, "dashed: MAP", fontsize=8)
    fig.savefig(path, dpi=75)
    plt.close(fig)


def draw_banana(toy: Toy, data: Any, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-3.5, 3.5, 60, dtype=DTYPE)
    found = toy.predict(torch.cartesian_prod(axis, axis))
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, layout="constrained")
    for ax, (name, predictive) in zip(axes, found.items()):
        p = metrics.probabilities(predictive)[..., 0, 1].reshape(60, 60).T
        image = ax.pcolormesh(axis, axis, p, cmap="RdBu_r", vmin=0, vmax=1, rasterized=True)
        ax.contour(axis, axis, p, levels=[0.5], colors="k", linewidths=1)
        ax.scatter(*data.x_train.T, c=data.y_train, s=3, cmap="RdBu_r", edgecolors="k", linewidths=0.2)
        ax.set_title(name, fontsize=9)
        ax.set_aspect("equal")
    fig.colorbar(image, ax=axes, label="p(y = 1)")
    fig.savefig(path, dpi=55)
    plt.close(fig)


def run(quick: bool, figures: Path) -> dict[str, float]:
    """The fit of each predictive to training and test data; the toys are small enough for both runs."""
    numbers = regression(figures)
    try:
        numbers |= banana(figures)
    except DatasetUnavailable as error:
        print(f"banana left out: {error}")
    rows = {}
    for toy in ("regression", "banana"):
        for part in ("train", "test"):
            if f"toys_{toy}_{part}_nll_map" in numbers:
                rows[f"{toy}, {part} NLL"] = [f"{numbers[f'toys_{toy}_{part}_nll_{m}']:.3f}" for m in ("map", "bnn", "glm")]
    print(table(rows, ["MAP", "BNN", "GLM"]))
    for key, value in numbers.items():
        if "_sd_" in key or "accuracy" in key:
            print(f"{key}: {value:.3f}")
    return numbers
