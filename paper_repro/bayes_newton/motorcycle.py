"""Heteroscedastic regression on the motorcycle data: every method on four folds.

    y ~ N(f1, softplus(f2)²),   f1, f2 ~ GP(Matern-3/2, variance 1, lengthscale 1), inputs and outputs standardised, hyper-parameters fixed
"""

from __future__ import annotations

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import torch

import bayesgn as bgn
from bayesgn import datasets, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import Run, methods, nlpd_of, run, summary

STEPS, LR = 500, 0.3


def matern(nu: float, lengthscale: float, variance: float = 1.0) -> gpytorch.kernels.Kernel:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=nu)).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = variance, lengthscale
    return kernel.requires_grad_(False)


def likelihood() -> likelihoods.Likelihood:
    return likelihoods.HeteroscedasticGaussian(link=likelihoods.Softplus())


def fit(rule: rules.Expansion, fold: int, steps: int = STEPS) -> tuple[Run, models.GaussianProcessPosterior]:
    (x, y), (x_test, y_test) = datasets.motorcycle_folds().fold(fold)
    model = models.MarkovGP([matern(1.5, 1.0), matern(1.5, 1.0)])
    belief = model.start(likelihood(), (x, y), rule, rules.Sites.flat(len(x), 2, x, precision=0.01))
    return run(belief, steps, LR, nlpd_of(x_test, y_test))


def reproduce(folds: int = 4, steps: int = STEPS) -> tuple[str, dict[str, float]]:
    """The table, and the numbers that expected.json speaks about; figures go to figures/."""
    runs = {name: [fit(rule, k, steps)[0] for k in range(folds)] for name, rule in methods().items()}
    draw_convergence(runs, "motorcycle")
    draw_fit()
    return summary(runs)


def draw_convergence(runs: dict[str, list[Run]], name: str) -> None:
    """Energy and NLPD against steps, one panel a row of the table, one line a curvature, mean over folds."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for method, several in runs.items():
        expansion, _, curvature = method.partition(", ")
        groups.setdefault(expansion if curvature else "others", {})[curvature or expansion] = several
    figure, axes = plt.subplots(2, len(groups), figsize=(2.6 * len(groups), 4.6), sharex=True, sharey="row", layout="constrained", squeeze=False)
    for column, (expansion, lines) in enumerate(groups.items()):
        for label, several in lines.items():
            good = [r for r in several if not r.note]
            if not good:
                continue
            for row, key in enumerate(("energy", "nlpd")):
                axes[row, column].plot(good[0].steps, np.mean([getattr(r, key) for r in good], 0), label=label, lw=1.2)
        axes[0, column].set_title(expansion, fontsize=9)
        axes[0, column].legend(fontsize=6, frameon=False)
        axes[1, column].set_xlabel("steps")
    low, high = [np.array([f(r.energy[len(r.energy) // 4 :]) for s in runs.values() for r in s if not r.note]) for f in (np.min, np.max)]
    axes[0, 0].set_ylim(low.min() - 2, np.quantile(high, 0.9) + 2)
    last = np.array([r.nlpd[-1] for s in runs.values() for r in s if not r.note])
    axes[1, 0].set_ylim(np.quantile(last, 0.02) - 0.05, np.quantile(last, 0.95) + 0.2)
    axes[0, 0].set_ylabel("−log evidence / nats")
    axes[1, 0].set_ylabel("NLPD / nats")
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / f"{name}_convergence.png", dpi=150)
    plt.close(figure)


def draw_fit() -> None:
    """Posterior mean and 95 % bands of f1 and of y under variational Gauss-Newton, on all data."""
    data = datasets.motorcycle_folds()
    model = models.MarkovGP([matern(1.5, 1.0), matern(1.5, 1.0)])
    posterior = bgn.bayes_newton(model, likelihood(), (data.x, data.y), rule=rules.Variational(), steps=300, lr=LR, progress=False)
    x = torch.linspace(float(data.x.min()) - 0.3, float(data.x.max()) + 0.3, 400, dtype=torch.float64)
    f = posterior(x)
    y = posterior.likelihood(f)
    mean, wide = f.mean[:, 0], 1.96 * f.stddev[:, 0]
    spread = 1.96 * y.variance.reshape(-1).sqrt()
    figure, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    ax.fill_between(x, mean - spread, mean + spread, color="C0", alpha=0.15, lw=0, label="95 % of y")
    ax.fill_between(x, mean - wide, mean + wide, color="C0", alpha=0.35, lw=0, label="95 % of f1")
    ax.plot(x, mean, color="C0")
    ax.plot(data.x, data.y, "k.", ms=3)
    ax.set(xlabel="time (standardised)", ylabel="acceleration (standardised)")
    ax.legend(frameon=False, fontsize=8)
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "motorcycle_fit.png", dpi=150)
    plt.close(figure)
