"""Variational Gauss-Newton with a network in place of the Gaussian process: heteroscedastic regression on the motorcycle data.

    y ~ N(f1, e^f2),   (f1, f2) = net(x), 30 tanh units, trained to the MAP, linearised there once and refined by each rule

Priors N(0, 1/0.1) over the first layer's weights and N(0, 1/P) over the second's. Four folds, those of the Gaussian-process experiment. Printed for each P:
the energy of each rule at Laplace's Gaussian, where it starts, and where it settles, and the test NLPD of the MAP, of Laplace and of each rule.

    python -m paper_repro.bayes_newton.network_motorcycle
"""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, models, rules
from paper_repro.bayes_newton import common
from paper_repro.bayes_newton.common import nlpd_of, table

FIRST = 0.1  # prior precision of the first layer
RULES = {
    "VI, Gauss-Newton": lambda: rules.Variational(rules.GaussNewton()),
    "VI, heuristic PSD": lambda: rules.Variational(rules.Exact()),
    "PEP 0.5, Gauss-Newton": lambda: rules.PowerEP(0.5),
    "Newton, Gauss-Newton": rules.Laplace,
}


def trained(x: Tensor, y: Tensor, precision: float, units: int = 30, seed: int = 0) -> nn.Module:
    """A net at its MAP, by L-BFGS, its steps spread over the inputs at first."""
    likelihood = likelihoods.HeteroscedasticGaussian()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(1, units), nn.Tanh(), nn.Linear(units, 2)).double()
        with torch.no_grad():
            net.get_parameter("0.weight").mul_(3.0)
            net.get_parameter("0.bias").uniform_(-4.0, 4.0)
    weights = [(FIRST, net[0]), (precision, net[2])]

    def objective(θ: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(θ), net.parameters())
        prior = sum(0.5 * P * p.square().sum() for P, layer in weights for p in layer.parameters())
        loss = prior - likelihood.log_prob(net(x), y).sum()
        return loss.item(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))]).numpy()

    start = parameters_to_vector(net.parameters()).detach().numpy().copy()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxfun": 1500, "ftol": 1e-13, "gtol": 1e-6, "maxcor": 50})
    vector_to_parameters(torch.from_numpy(found.x), net.parameters())
    return net.eval()


def fit(fold: int, precision: float, steps: int = 100) -> dict:
    """All answers on one fold: the net, posteriors by name, and (x, y), (x_test, y_test)."""
    train, test = [(x[:, None], y.reshape(-1, 1)) for x, y in datasets.motorcycle_folds().fold(fold)]
    likelihood = likelihoods.HeteroscedasticGaussian()
    net = trained(*train, precision)
    model = models.Network(net, models.WeightPrior.per_layer(net, torch.tensor([FIRST, precision])), ggn.Full)
    posteriors = {"Laplace": bgn.laplace(model, likelihood, train, progress=False)}
    for name, rule in RULES.items():
        posteriors[name] = bgn.bayes_newton(model, likelihood, train, rule(), steps=steps, progress=False)
    return {"net": net, "posteriors": posteriors, "train": train, "test": test}


def run(folds: int = 4, precisions: tuple[float, ...] = (0.5, 1.0, 2.0), steps: int = 100) -> dict[str, float]:
    """Means over folds: ``"P 1: VI, Gauss-Newton: energy"`` (minus the log evidence), ``… at Laplace``, ``… NLPD``."""
    found: dict[str, list[float]] = {}
    for precision in precisions:
        for fold in range(folds):
            fitted = fit(fold, precision, steps)
            x, y = fitted["test"]
            with torch.no_grad():
                f = fitted["net"](x)
                values = {"MAP: NLPD": -float(likelihoods.HeteroscedasticGaussian().conditional(f).log_prob(y).mean())}
                for name, posterior in fitted["posteriors"].items():
                    values[f"{name}: NLPD"] = nlpd_of(x, y)(posterior)
                    values[f"{name}: energy"] = -float(posterior.log_evidence())
                    if name in RULES:
                        values[f"{name}: energy at Laplace"] = -posterior.trace.energy[0]
            for key, value in values.items():
                found.setdefault(f"P {precision:g}: {key}", []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def report(found: dict[str, float]) -> str:
    """A table for each prior."""
    out = []
    for P in dict.fromkeys(key.partition(": ")[0] for key in found):
        rows = {}
        for name in ("MAP", "Laplace", *RULES):
            cells = [found.get(f"{P}: {name}: {what}") for what in ("energy at Laplace", "energy", "NLPD")]
            rows[name] = ["" if value is None else f"{value:.3f}" for value in cells]
        out.append(f"### {P}\n\n{table(rows, ['−log evidence at Laplace / nats', '−log evidence / nats', 'NLPD / nats'])}")
    return "\n\n".join(out)


def draw(precision: float = 1.0) -> None:
    """The first fold: 95 % of the predictive under the MAP, Laplace and variational Gauss-Newton, and each rule's log evidence step by step."""
    fitted = fit(0, precision)
    posteriors, net = fitted["posteriors"], fitted["net"]
    (x, y), (x_test, y_test) = fitted["train"], fitted["test"]
    grid = torch.linspace(float(x.min()) - 0.5, float(x.max()) + 0.5, 300, dtype=x.dtype)[:, None]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained", gridspec_kw={"width_ratios": [1, 1, 1, 0.8]})
    with torch.no_grad():
        f = net(grid)
        bands = {"MAP": (f[:, 0], (f[:, 1] / 2).exp())}
        for name in ("Laplace", "VI, Gauss-Newton"):
            predictive = posteriors[name].likelihood(posteriors[name](grid))
            bands[name] = predictive.mean[:, 0], predictive.variance[:, 0].sqrt()
    for ax, (name, (mean, width)) in zip(axes, bands.items()):
        ax.fill_between(grid[:, 0], mean - 1.96 * width, mean + 1.96 * width, color="C0", alpha=0.3, lw=0)
        ax.plot(grid, mean, "C0")
        ax.plot(x, y, "k.", ms=3)
        ax.plot(x_test, y_test, "C3x", ms=4)
        ax.set(title=name, ylim=(-4.5, 4.5), xlabel="time (standardised)")
    for name in RULES:
        axes[3].plot(posteriors[name].trace.energy, label=name, lw=1.2)
    axes[3].set(xlabel="step", ylabel="log evidence / nats", xlim=(0, 40))
    axes[3].legend(fontsize=6, frameon=False)
    common.FIGURES.mkdir(exist_ok=True)
    figure.savefig(common.FIGURES / "network_motorcycle.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    began = time.perf_counter()
    print(report(run()))
    draw()
    print(f"\n{time.perf_counter() - began:.0f} s")
