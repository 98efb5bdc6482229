"""Banana classification: 400 points to learn from, 4,900 to judge by; every expansion with the same kernel, tuned by its own log evidence.

    y ~ Bernoulli(σ(f)),   f ~ GP(Matern-5/2 in both inputs)
"""

from __future__ import annotations

import gpytorch
import matplotlib.pyplot as plt
import torch

import bayesgn as bgn
from bayesgn import datasets, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import table

RULES = {
    "Taylor (EKS)": rules.Taylor,
    "PL": rules.PosteriorLinearization,
    "EP": lambda: rules.PowerEP(1.0),
    "PEP 0.5": lambda: rules.PowerEP(0.5),
    "VI": rules.Variational,
    "Laplace": rules.Laplace,
}


def model(points: torch.Tensor | None) -> models.GaussianProcess:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=2)).double()
    return models.GP(kernel) if points is None else models.SparseGP(kernel, points)


def reproduce(folds: int = 1, steps: int = 30) -> tuple[str, dict[str, float]]:
    data = datasets.banana(torch.float64)
    (x, y), (x_test, y_test) = data.train, data.test
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-2.5, 2.5, 8, dtype=torch.float64)] * 2, indexing="ij"), -1).reshape(-1, 2)
    rows, found, shown = {}, {}, {}
    for sparse in (False, True):
        for name, rule in RULES.items():
            if sparse and name not in ("VI", "PEP 0.5"):
                continue
            label = f"{name}, 64 inducing points" if sparse else name
            posterior = bgn.bayes_newton(model(grid if sparse else None), likelihoods.Bernoulli(), (x, y), rule=rule(), progress=False)
            bgn.maximize_evidence(posterior, steps=steps, progress=False)
            with torch.no_grad():
                predictive = posterior.likelihood(posterior(x_test))
                nlpd = -float(predictive.log_prob(y_test.reshape(-1, 1).double()).mean())
                error = float(((predictive.mean.reshape(-1) > 0.5) != (y_test == 1)).double().mean())
            energy = -float(posterior.log_evidence().detach())
            rows[label] = [f"{energy:.2f}", f"{nlpd:.4f}", f"{100 * error:.1f} %"]
            found |= {f"{label}: energy": energy, f"{label}: NLPD": nlpd, f"{label}: error": error}
            shown[label] = posterior
    draw(shown, x, y)
    return table(rows, ["−log evidence / nats", "NLPD / nats", "test error"]), found


def draw(shown: dict, x: torch.Tensor, y: torch.Tensor) -> None:
    names = ["Laplace", "EP", "VI", "VI, 64 inducing points"]
    axis = torch.linspace(-3.2, 3.2, 80, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3), sharey=True, layout="constrained")
    for ax, name in zip(axes, names):
        with torch.no_grad():
            p = shown[name].likelihood(shown[name](points)).mean.reshape(80, 80)
        image = ax.contourf(axis, axis, p, levels=torch.linspace(0, 1, 21).tolist(), cmap="RdBu_r")
        ax.contour(axis, axis, p, levels=[0.5], colors="k", linewidths=1)
        ax.scatter(*x.T, c=y, s=3, cmap="RdBu_r", edgecolors="k", linewidths=0.2)
        ax.set_title(name, fontsize=9)
    figure.colorbar(image, ax=axes, label="p(y = 1)")
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "banana.png", dpi=150)
    plt.close(figure)
