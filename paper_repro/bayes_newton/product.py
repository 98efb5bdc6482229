"""A product of two functions, y = f1 softplus(f2) + noise: amplitude demodulation in small.

    f1 ~ GP(Matern-3/2 (variance 1, lengthscale 500) × cosine of radial frequency 2π 0.2),   f2 ~ GP(Matern-5/2, variance 2, lengthscale 3), noise 0.1
"""

from __future__ import annotations

import gpytorch
import matplotlib.pyplot as plt
from torch.nn.functional import softplus

import bayesgn as bgn
from bayesgn import datasets, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import Run, methods, nlpd_of, run, summary
from paper_repro.bayes_newton.motorcycle import draw_convergence, matern

STEPS, LR = 300, 0.1


def model() -> models.MarkovGP:
    carrier = gpytorch.kernels.CosineKernel().double()
    carrier.period_length = 2.5  # gpytorch's is half of what is usual: cos(π r / 2.5) = cos(2π 0.2 r)
    wave = gpytorch.kernels.ProductKernel(matern(1.5, 500.0), carrier).requires_grad_(False)
    return models.MarkovGP([wave, matern(2.5, 3.0, 2.0)])


def likelihood() -> likelihoods.Likelihood:
    return likelihoods.AmplitudeDemodulation(components=1, noise=0.1)


def fit(rule: rules.Expansion, fold: int, steps: int = STEPS) -> tuple[Run, models.GaussianProcessPosterior]:
    (x, y), (x_test, y_test) = datasets.product().fold(fold)
    belief = model().start(likelihood(), (x, y), rule, rules.Sites.flat(len(x), 2, x, precision=0.01))
    return run(belief, steps, LR, nlpd_of(x_test, y_test))


def reproduce(folds: int = 1, steps: int = STEPS) -> tuple[str, dict[str, float]]:
    runs = {name: [fit(rule, k, steps)[0] for k in range(folds)] for name, rule in methods().items()}
    draw_convergence(runs, "product")
    draw_fit()
    return summary(runs)


def draw_fit() -> None:
    """The two functions found, beside the true ones (their signs are not identified)."""
    data = datasets.product()
    posterior = bgn.bayes_newton(model(), likelihood(), (data.x, data.y), rule=rules.Variational(), steps=STEPS, lr=LR, progress=False)
    f, true = posterior(data.x), data.extra["f_true"]
    figure, axes = plt.subplots(3, 1, figsize=(6.5, 5), sharex=True, layout="constrained")
    axes[0].plot(data.x, data.y, "k.", ms=1.5)
    axes[0].set_ylabel("y")
    for k, (ax, label) in enumerate(zip(axes[1:], ("carrier f1", "modulator softplus(f2)"))):
        link = softplus if k else (lambda z: z)
        mean, wide = f.mean[:, k], 1.96 * f.stddev[:, k]
        ax.fill_between(data.x, link(mean - wide), link(mean + wide), color="C0", alpha=0.3, lw=0)
        ax.plot(data.x, link(mean), "C0", lw=1, label="posterior")
        ax.plot(data.x, link(true[:, k]), "k--", lw=0.8, label="true")
        ax.set_ylabel(label)
        ax.legend(frameon=False, fontsize=7, loc="upper right")
    axes[-1].set_xlabel("x")
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "product_fit.png", dpi=150)
    plt.close(figure)
