"""The paper's non-linear equations: the Huber function of the mean of four classification losses, in whole batches and in small ones."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from bayesgn import datasets
from bayesgn.optim import outer
from bayesgn.optim.prox_linear import prox_linear
from bayesgn.optim.prox_solvers import DualNewton
from bayesgn.optim.prox_subproblem import DenseJacobian, Subproblem

HUBER = outer.Huber(1.0)
COST = 5  # passes of a prox-linear step: a value, and four rows of J by a backward pass each


def means(w: Tensor, Z: Tensor) -> Tensor:
    """(1/n) Σ_i φ_i(w) for margins s_i = y_i x_iᵀw, as four terms of one component; Z [n p] holds y_i x_i. Losses of Tran-Dinh et al. (2020)."""
    s = Z @ w
    softplus = torch.nn.functional.softplus
    return torch.stack([(1 - s.tanh()).mean(), (1 - s.sigmoid()).square().mean(), (softplus(-s) - softplus(-s - 1)).mean(), (s - 1).square().log1p().mean()])[:, None]


def value(w: Tensor, Z: Tensor) -> float:
    return float(HUBER(means(w, Z)).mean())


def slope(w: Tensor, Z: Tensor) -> Tensor:
    leaf = w.detach().requires_grad_()
    return torch.autograd.grad(HUBER(means(leaf, Z)).mean(), leaf)[0]


def equations(quick: bool, figures: Path) -> dict[str, float]:
    """F over passes for gradient descent and prox-linear on whole batches, and for SGD and incremental prox-linear on batches of 32."""
    if quick:
        data = datasets.uci_classification("breast_cancer", dtype=torch.float64)
    else:
        try:
            data = datasets.a1a(dtype=torch.float64)
        except datasets.DatasetUnavailable as error:
            print(f"\nNon-linear equations left out: {error}")
            return {}
    X = torch.cat([data.x_train, torch.ones(len(data.x_train), 1, dtype=torch.float64)], 1)
    X = X / X.norm(dim=1, keepdim=True)
    Z = X * (2.0 * data.y_train.reshape(-1, 1).to(X) - 1)
    start = torch.zeros(Z.shape[1], dtype=torch.float64)
    passes, epochs = (50, 5) if quick else (100, 20)
    print(f"\nNon-linear equations: {data.name}, {len(Z)} data, {Z.shape[1]} weights; F(0) = {value(start, Z):.5f}")

    courses = {}
    courses["GD"], lr = _gradient_descent(start, Z, passes)
    courses["prox-linear"], gamma = _prox_linear(start, Z, passes)
    courses["SGD"], sgd = _mini_batches(start, Z, epochs, gauss_newton=False)
    courses["PLI"], pli = _mini_batches(start, Z, epochs, gauss_newton=True)
    print(f"{'method':>12} {'tuned':>9} {'after ' + str(epochs) + ' passes':>16} {'after ' + str(passes):>12}")
    found = {}
    for (name, course), tuned in zip(courses.items(), (lr, gamma, sgd, pli), strict=True):
        early = min(v for p, v in course if p <= epochs)
        found |= {f"equations_{name}_early": early, f"equations_{name}_final": course[-1][1]}
        print(f"{name:>12} {tuned:9g} {early:16.5f} {course[-1][1] if course[-1][0] > epochs else math.nan:12.5f}")
    # Where prox-linear stands after its passes: how many iterations of gradient descent that took, in iterations and in passes.
    found["equations_pl_below_gd"] = found["equations_GD_final"] / found["equations_prox-linear_final"]
    found["equations_pl_below_gd_by_iterations"] = courses["GD"][min(passes // COST, len(courses["GD"]) - 1)][1] / found["equations_prox-linear_final"]
    found["equations_sgd_over_pli"] = found["equations_SGD_final"] / found["equations_PLI_final"]
    _plot(courses, figures / "equations.png")
    return found


Course = list[tuple[float, float]]


def _gradient_descent(start: Tensor, Z: Tensor, passes: int) -> tuple[Course, float]:
    tries = []
    for lr in (3.0, 10.0, 30.0, 100.0):
        w, course = start, [(0.0, value(start, Z))]
        for t in range(1, passes + 1):
            w = w - lr * slope(w, Z)
            course.append((float(t), value(w, Z)))
        tries.append((course[-1][1], lr, course))
    return min(tries)[2], min(tries)[1]


def _prox_linear(start: Tensor, Z: Tensor, passes: int) -> tuple[Course, float]:
    tries = []
    for gamma in (10.0, 100.0, 1000.0):
        course = [(0.0, value(start, Z))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the budget ends it
            prox_linear(means, start, HUBER, (Z,), gamma=gamma, max_iterations=passes // COST,
                        callback=lambda w, step, course=course: course.append((course[-1][0] + COST, step.value)))  # fmt: skip
        tries.append((course[-1][1], gamma, course))
    return min(tries)[2], min(tries)[1]


def _mini_batches(start: Tensor, Z: Tensor, epochs: int, gauss_newton: bool) -> tuple[Course, float]:
    """x ← x − γ ∇ of f at the mean of a batch, or the prox-linear step of it; γ constant and tuned. A step of either counts its data once."""
    tries = []
    for gamma in (1.0, 3.0, 10.0, 30.0):
        w, course = start, [(0.0, value(start, Z))]
        generator = torch.Generator().manual_seed(0)
        solver = DualNewton(1e-6)
        for epoch in range(1, epochs + 1):
            for rows in torch.randperm(len(Z), generator=generator).split(32):
                if gauss_newton:
                    w = w + solver.solve(Subproblem(HUBER, DenseJacobian(means, w, (Z[rows],)), gamma)).step
                else:
                    w = w - gamma * slope(w, Z[rows])
            course.append((float(epoch), value(w, Z)))
        tries.append((course[-1][1], gamma, course))
    return min(tries)[2], min(tries)[1]


def _plot(courses: dict[str, Course], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(6.6, 3.2), layout="constrained", sharey=True)
    for ax, names, title in ((axes[0], ("GD", "prox-linear"), "whole batches"), (axes[1], ("SGD", "PLI"), "batches of 32")):
        for name, colour in zip(names, ("C1", "C0"), strict=True):
            x, y = zip(*courses[name], strict=True)
            ax.plot(x, y, "o-", ms=2.5, lw=1.3, color=colour)
            up = 6 if y[-1] == max(courses[n][-1][1] for n in names) else -9
            ax.annotate(name, (x[-1], y[-1]), xytext=(0, up), textcoords="offset points", ha="right", color=colour, fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("passes over the data")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("F(w)")
    least = min(v for course in courses.values() for _, v in course)
    axes[0].set_ylim(0.93 * least, 2 * least)  # the start lies far above
    fig.savefig(path, dpi=90)
    plt.close(fig)
