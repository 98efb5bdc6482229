"""A log-Gaussian Cox process of coal-mining disasters: counts in 333 bins, Matern-5/2, hyper-parameters by the log evidence, ten folds."""

from __future__ import annotations

import math

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import torch

import bayesgn as bgn
from bayesgn import datasets, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import nlpd_of, table

RULES = {
    "Taylor (EKS)": rules.Taylor,
    "PL": rules.PosteriorLinearization,
    "EP": lambda: rules.PowerEP(1.0),
    "PEP 0.5": lambda: rules.PowerEP(0.5),
    "PEP 0.01": lambda: rules.PowerEP(0.01),
    "VI": rules.Variational,
    "Laplace": rules.Laplace,
}


def series() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Years, counts and the bin's width in years."""
    data = datasets.coal_mining(torch.float64)
    return data.x, data.y, float(data.x.diff().mean())


def fit(rule: rules.Expansion, x: torch.Tensor, y: torch.Tensor, width: float, steps: int) -> models.GaussianProcessPosterior:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.0, 4.0
    mean = gpytorch.means.ConstantMean().double()
    mean.constant = math.log(float(y.mean()) / width)
    likelihood = likelihoods.Poisson(exposure=width)
    posterior = bgn.bayes_newton(models.MarkovGP(kernel, mean), likelihood, (x, y), rule=rule, progress=False)
    bgn.maximize_evidence(posterior, steps=steps, progress=False)
    return posterior


def reproduce(folds: int = 10, steps: int = 50) -> tuple[str, dict[str, float]]:
    x, y, width = series()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(10)[:folds]
    rows, found, shown = {}, {}, {}
    for name, rule in RULES.items():
        energy, nlpd, lengthscale = [], [], []
        for held in parts:
            rest = torch.ones(len(x), dtype=torch.bool)
            rest[held] = False
            posterior = fit(rule(), x[rest], y[rest], width, steps)
            energy.append(-float(posterior.log_evidence().detach()))
            nlpd.append(nlpd_of(x[held], y[held])(posterior))
            lengthscale.append(float(posterior.model.kernels[0].base_kernel.lengthscale))
        rows[name] = [f"{np.mean(energy):.2f}", f"{np.mean(nlpd):.3f} ± {np.std(nlpd):.3f}", f"{np.median(lengthscale):.1f}"]
        found |= {f"{name}: energy": float(np.mean(energy)), f"{name}: NLPD": float(np.mean(nlpd))}
        shown[name] = posterior
    draw(shown["VI"], x, y, width)
    return table(rows, ["−log evidence / nats", "NLPD / nats", "lengthscale / years"]), found


def draw(posterior, x: torch.Tensor, y: torch.Tensor, width: float) -> None:
    f = posterior(x)
    rate = lambda z: (posterior.likelihood.exposure / width * z.exp()).detach()
    mean, wide = f.mean.detach(), 1.96 * f.stddev.detach()
    figure, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    ax.fill_between(x, rate(mean - wide), rate(mean + wide), color="C0", alpha=0.3, lw=0, label="95 %")
    ax.plot(x, rate(mean), "C0", label="rate")
    for year, count in zip(x[y > 0], y[y > 0]):
        ax.plot([year] * int(count), -0.12 - 0.08 * np.arange(int(count)), "k|", ms=4)
    ax.set(xlabel="year", ylabel="disasters / year")
    ax.legend(frameon=False, fontsize=8)
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "coal.png", dpi=150)
    plt.close(figure)
