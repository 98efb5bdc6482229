"""Six methods from one call of optim.GaussNewton: each step beside a dense one, where the methods coincide and differ, and how they train."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, optim, rules
from bayesgn.datasets import sinusoid, two_moons
from paper_repro.unified_framework.dense import DTYPE, FAMILIES, Dense

TITLE = "Pierrot, Perrin-Gilbert and Sigaud (2021): first-order and second-order variants of the gradient descent in a unified framework"

METHODS: dict[str, dict[str, Any]] = {
    "gradient descent": {"structure": ggn.Identity},
    "classical Gauss-Newton": {"curvature": rules.Identity()},
    "generalised Gauss-Newton": {"curvature": rules.Exact()},
    "natural gradient": {"curvature": rules.GaussNewton()},
    "gradient covariance": {"curvature": rules.EmpiricalFisher()},
    "Newton": {"curvature": rules.Exact(), "structure": ggn.Hessian},
}
LIKELIHOODS: dict[str, Callable[[], likelihoods.Likelihood]] = {
    "Gaussian": lambda: likelihoods.Gaussian(1.0),
    "Bernoulli": likelihoods.Bernoulli,
    "softmax": likelihoods.Categorical,
    "Student-t": lambda: likelihoods.StudentT(5.0, 0.5),
    "heteroscedastic": likelihoods.HeteroscedasticGaussian,
}
DAMPING = 1e-3
COLORS = ("C3", "#b8cde0", "C0", "k", "C1", "C2")


def key_of(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def mlp(*sizes: int, seed: int) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o, dtype=DTYPE), nn.Tanh())][:-1]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=DTYPE) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2.0))
    return net


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def moved(net: nn.Module, by: float, seed: int) -> nn.Module:
    net = copy.deepcopy(net)
    θ = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(θ.detach() + by * normal(len(θ), seed=seed), net.parameters())
    return net


def problem(name: str, n: int = 40, by: float = 0.5, draw: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, inputs, and labels drawn from a net ``by`` away in weight space."""
    family, x = FAMILIES[name], normal(n, 2, seed=1 + 10 * draw)
    net = mlp(2, 3, family.c, seed=0)
    return net, x, family.sample(moved(net, by, seed=2)(x).detach(), torch.Generator().manual_seed(3 + 10 * draw))


def step(name: str, method: str, net: nn.Module, x: Tensor, y: Tensor, damping: float = DAMPING) -> Tensor:
    """The change of the weights in one step of the optimizer, on a copy of the net."""
    net = copy.deepcopy(net)
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    optim.GaussNewton(net, LIKELIHOODS[name](), damping=optim.Constant(damping), **METHODS[method]).step(x, y)
    return nn.utils.parameters_to_vector(net.parameters()).detach() - before


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- checks ------------------------------------------------------------------------------------------------------------


def against_dense() -> float:
    """Every step beside the dense one."""
    print(f"\nRelative difference of a step from −(M + {DAMPING:g})⁻¹ ∂loss with a dense M\n")
    print(f"| | {' | '.join(METHODS)} |\n|{'---|' * (len(METHODS) + 1)}")
    worst = 0.0
    for name in FAMILIES:
        net, x, y = problem(name)
        dense = Dense(FAMILIES[name], net, x, y)
        found = [difference(step(name, method, net, x, y), dense.step(method, DAMPING)) for method in METHODS]
        print(f"| {name} | {' | '.join(f'{d:.1e}' for d in found)} |")
        worst = max(worst, *found)
    return worst


def between(name: str, a: str, b: str, net: nn.Module, x: Tensor, y: Tensor) -> float:
    """How far two methods' steps are apart."""
    return difference(step(name, a, net, x, y), step(name, b, net, x, y))


def linear_model(method: str) -> float:
    """Distance from the least-squares solution after one undamped step."""
    net, x = mlp(3, 1, seed=0), normal(30, 3, seed=1)
    y = normal(30, 1, seed=2)
    θ = nn.utils.parameters_to_vector(net.parameters()).detach() + step("Gaussian", method, net, x, y, damping=0.0)
    return difference(θ, torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=DTYPE)], 1), y).solution[:, 0])


def residuals(size: float) -> float:
    """Newton against generalised Gauss-Newton where the residuals are ``size``."""
    net, x = mlp(2, 3, 1, seed=0), normal(40, 2, seed=1)
    return between("Gaussian", "Newton", "generalised Gauss-Newton", net, x, net(x).detach() + size * normal(40, 1, seed=2))


def covariance(n: int, by: float, draws: int = 1) -> float:
    """Gradient covariance against natural gradient with n labels, drawn from the net itself or from one ``by`` away; the mean over draws."""
    found = [between("softmax", "gradient covariance", "natural gradient", *problem("softmax", n, by, draw)) for draw in range(draws)]
    return sum(found) / draws


def in_other_units(method: str) -> float:
    """How far the change of f is another where the first input comes in a unit ten times smaller and its weights make up for it; undamped."""
    net, x, y = problem("Bernoulli", n=200)
    scaled, x2 = copy.deepcopy(net), x * torch.tensor([10.0, 1.0], dtype=DTYPE)
    scaled[0].weight.data[:, 0] /= 10  # type: ignore[index]

    def change(net: nn.Module, x: Tensor) -> Tensor:
        after = copy.deepcopy(net)
        θ = nn.utils.parameters_to_vector(net.parameters()).detach()
        nn.utils.vector_to_parameters(θ + step("Bernoulli", method, net, x, y, damping=0.0), after.parameters())
        return (after(x) - net(x)).detach()

    return difference(change(scaled, x2), change(net, x))


def checks(quick: bool) -> tuple[list[tuple[str, str, float]], dict[str, float]]:
    """(statement, where, measured) for the table; named numbers."""
    rows, numbers = [], {}

    def note(key: str, statement: str, where: str, value: float) -> None:
        rows.append((statement, where, value))
        numbers[key] = value

    for name in FAMILIES:
        same = name in ("Gaussian", "Bernoulli", "softmax")
        note(f"natural_vs_generalised_{key_of(name)}", f"natural gradient {'=' if same else '≠'} generalised Gauss-Newton", name,
             between(name, "natural gradient", "generalised Gauss-Newton", *problem(name)))  # fmt: skip
    for name in ("Gaussian", "Bernoulli", "softmax"):
        sign = "=" if name == "Gaussian" else "≠"
        note(f"classical_vs_generalised_{name.lower()}", f"classical {sign} generalised Gauss-Newton", name,
             between(name, "classical Gauss-Newton", "generalised Gauss-Newton", *problem(name)))  # fmt: skip
    for method in ("classical Gauss-Newton", "generalised Gauss-Newton", "natural gradient", "Newton"):
        note(f"linear_model_{method.split()[0].lower()}", f"one step of {method} solves least squares", "linear model", linear_model(method))
    sizes = (1.0, 1e-2, 1e-4)
    apart = [residuals(size) for size in sizes]
    for size, value in zip(sizes, apart):
        sign = "≠" if size == 1 else "→"
        note(f"newton_vs_generalised_residual_{size:g}", f"Newton {sign} generalised Gauss-Newton", f"residuals of {size:g}", value)
    numbers["newton_vs_generalised_exponent"] = float(np.polyfit(np.log(sizes[1:]), np.log(apart[1:]), 1)[0])
    counts = (100, 1000, 10_000) if quick else (100, 1000, 10_000, 100_000)
    well = [covariance(n, 0.0, draws=5) for n in counts]
    for n, value in zip(counts, well):
        note(f"covariance_vs_natural_{n}", "gradient covariance → natural gradient", f"softmax, {n} labels of the model", value)
    numbers["covariance_vs_natural_exponent"] = float(np.polyfit(np.log(counts), np.log(well), 1)[0])
    note("covariance_vs_natural_misspecified", "gradient covariance ≠ natural gradient", f"softmax, {counts[-1]} labels of another model",
         covariance(counts[-1], 0.5))  # fmt: skip
    for method in METHODS:
        verb = "depends" if method in ("gradient descent", "Newton") else "does not depend"
        note(f"units_{key_of(method)}", f"{method} {verb} on the units of x", "Bernoulli", in_other_units(method))
    return rows, numbers


# -- training ----------------------------------------------------------------------------------------------------------


def tasks(seed: int) -> dict[str, tuple[likelihoods.Likelihood, Tensor, Tensor, tuple[int, ...]]]:
    wave, moons = sinusoid(n=100, seed=seed, dtype=DTYPE), two_moons(seed=seed, n=100, noise=0.04, dtype=DTYPE)
    u = torch.rand(100, 1, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    heavy = torch.sin(2 * wave.x_train) + wave.x_train / 4 + 0.1 * 2**0.5 * torch.tan(math.pi * (u - 0.5))  # Cauchy noise
    return {
        "regression": (likelihoods.Gaussian(1.0), wave.x_train, wave.y_train / 0.3, (1, 8, 1)),  # in units of the noise
        "classification": (likelihoods.Categorical(), moons.x_train, moons.y_train, (2, 8, 2)),
        "heavy tails": (likelihoods.StudentT(1.0, 0.1 * 2**0.5), wave.x_train, heavy, (1, 8, 1)),
    }


def training(seeds: tuple[int, ...], steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Mean loss before each step [seeds, steps + 1], all six methods under one and the same damping."""
    found: dict[str, dict[str, list]] = {}
    for seed in seeds:
        for task, (likelihood, x, y, sizes) in tasks(seed).items():
            for method, arguments in METHODS.items():
                net = mlp(*sizes, seed=seed)
                opt = optim.GaussNewton(net, likelihood, damping=optim.LevenbergMarquardt(1e-1), weight_decay=1e-3, **arguments)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a rejected step: the curve stays level
                    found.setdefault(task, {}).setdefault(method, []).append([float(opt.step(x, y)) for _ in range(steps + 1)])
    return {task: {method: np.array(curves) for method, curves in part.items()} for task, part in found.items()}


def draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(curves), figsize=(11, 3.4), layout="constrained")
    for ax, (task, part) in zip(axes, curves.items()):
        best = min(c[0].min() for c in part.values())
        for i, (method, c) in enumerate(part.items()):  # those that may coincide lie one upon the other
            width, style = {0: (1.2, "-"), 1: (4.0, "-"), 2: (2.0, "-"), 3: (1.0, "--")}.get(i, (1.2, "-"))
            ax.semilogy(c[0] - best + 1e-5, color=COLORS[i], lw=width, ls=style, label=method)
        ax.set(title=task, xlabel="step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss above the least found, + 1e-5")
    axes[-1].legend(frameon=False, fontsize=7)
    fig.savefig(path, dpi=75)
    plt.close(fig)


def run(quick: bool, figures: Path) -> dict[str, float]:
    """Largest difference from dense steps, differences between methods, and losses after training."""
    numbers = {"largest_difference_from_dense": against_dense()}
    rows, found = checks(quick)
    numbers |= found
    print("\n| statement | where | relative difference |\n|---|---|---|")
    for statement, where, value in rows:
        print(f"| {statement} | {where} | {value:.1e} |")
    curves = training((0,) if quick else (0, 1, 2), 15 if quick else 60)
    draw(curves, figures / "training.png")
    print(f"\nMean penalised loss after {len(next(iter(curves['regression'].values()))[0]) - 1} steps, median over seeds\n")
    print(f"| | {' | '.join(METHODS)} |\n|{'---|' * (len(METHODS) + 1)}")
    for task, part in curves.items():
        last = {method: float(np.median(c[:, -1])) for method, c in part.items()}
        print(f"| {task} | {' | '.join(f'{v:.4f}' for v in last.values())} |")
        numbers |= {f"loss_{key_of(task)}_{key_of(method)}": v for method, v in last.items()}
    return numbers
