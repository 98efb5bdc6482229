"""A Gaussian process regression network: three outputs mixed from two functions by six weights that vary over time, with a full noise covariance.

    y ~ N(W f, Σ),   f_1, f_2 ~ GP(Matern-5/2, 1, lengthscale 10),   W = weights [3 2] + 0.1, each ~ GP(Matern-5/2, 1, lengthscale 70)

Eight latents couple in every datum (8 × 8 curvature blocks); fifth-order unscented cubature (129 nodes).
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch

from bayesgn import datasets, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import methods, run, summary
from paper_repro.bayes_newton.motorcycle import matern

STEPS, LR = 300, 0.3


def start(rule: rules.Expansion) -> models.GaussianProcessPosterior:
    data = datasets.regression_network()
    model = models.MarkovGP([matern(2.5, 10.0) for _ in range(2)] + [matern(2.5, 70.0) for _ in range(6)])
    likelihood = likelihoods.RegressionNetwork(latents=2, outputs=3, noise=data.extra["noise_cov"], offset=0.1)
    return model.start(likelihood, (data.x, data.y), rule, rules.Sites.flat(len(data.x), 8, data.x, precision=0.01))


def nlpd(belief: models.GaussianProcessPosterior) -> float:
    """Minus the mean log density of the held-out entries, one a time, each under a mixture of Gaussians over the cubature nodes."""
    data = datasets.regression_network()
    y = data.extra["y_test"]
    rows = ~y.isnan().all(-1)
    y = y[rows]
    draws = belief.sample_outputs(data.x[rows], 200, generator=torch.Generator().manual_seed(0))
    mean, cov = belief.likelihood.conditional_moments(draws)
    normal = torch.distributions.Normal(mean, cov.diagonal(dim1=-2, dim2=-1).sqrt())
    log_p = normal.log_prob(y.nan_to_num()).logsumexp(0) - torch.tensor(float(len(draws))).log()
    return -float(log_p[~y.isnan()].mean())


def reproduce(folds: int = 1, steps: int = STEPS) -> tuple[str, dict[str, float]]:
    runs, beliefs = {}, {}
    for name, rule in methods(cubature=rules.Unscented(5)).items():
        record, beliefs[name] = run(start(rule), steps, LR, nlpd, every=50)
        runs[name] = [record]
    draw_fit(beliefs["VI, Gauss-Newton"])
    return summary(runs)



def draw_fit(belief) -> None:
    data = datasets.regression_network()
    draws = belief.sample_outputs(data.x, 300, generator=torch.Generator().manual_seed(1))
    y = belief.likelihood.conditional_moments(draws)[0]
    mean, wide = y.mean(0), 1.96 * y.std(0)
    figure, axes = plt.subplots(3, 1, figsize=(6.5, 5), sharex=True, layout="constrained")
    for k, ax in enumerate(axes):
        ax.fill_between(data.x, (mean - wide)[:, k], (mean + wide)[:, k], color="C0", alpha=0.3, lw=0)
        ax.plot(data.x, mean[:, k], "C0", lw=1)
        ax.plot(data.x, data.y[:, k], "k.", ms=2)
        ax.plot(data.x, data.extra["y_test"][:, k], "C3.", ms=2)
        ax.set_ylabel(f"output {k + 1}")
    axes[0].set_title("black: seen, red: held out", fontsize=9)
    axes[-1].set_xlabel("x")
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "regression_network_fit.png", dpi=150)
    plt.close(figure)
