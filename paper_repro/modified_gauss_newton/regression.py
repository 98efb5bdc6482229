"""The paper's multi-output regression by a perceptron: stochastic subgradient (SGD) against prox-linear with an incremental inner loop (PLI)."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn.optim.prox_linear import prox_linear, subgradient
from bayesgn.optim.prox_solvers import SVRG
from bayesgn.optim.prox_subproblem import JacobianProducts
from paper_repro.modified_gauss_newton.quadratic_phase import draws, laplace

Weights = dict[str, Tensor]


class Sizes(NamedTuple):
    p: int = 32  # paper: 128
    k: int = 5  # 10
    teacher: int = 64  # 256
    students: tuple[int, int] = (16, 128)  # 64, 512
    n: int = 128
    passes: int = 100


def perceptron(w: Weights, X: Tensor) -> Tensor:
    return torch.tanh(X @ w["W"].mT + w["b"]) @ w["V"].mT


def residual(w: Weights, X: Tensor, Y: Tensor) -> Tensor:
    return perceptron(w, X) - Y


def loss(w: Weights, X: Tensor, Y: Tensor) -> float:
    return float(residual(w, X, Y).norm(dim=1).mean())


def regression(ratios: list[float], sizes: Sizes, rates: list[float], decays: list[float], gammas: list[float], figures: Path) -> dict[str, float]:
    """x ~ N(0, Σ) with variances 1/j², y = φ*(x) + σ ξ with Laplace ξ, SNR = ‖w*‖²/σ²; test loss ‖·‖₂ after tuning on validation data."""
    spectrum = 1 / torch.arange(1, sizes.p + 1, dtype=torch.float64)
    parts = {"train": sizes.n, "validation": 256, "test": 1024}
    X = {name: draws(20 + i, m, sizes.p) * spectrum for i, (name, m) in enumerate(parts.items())}
    true = {"W": draws(30, sizes.teacher, sizes.p), "b": draws(31, sizes.teacher), "V": draws(32, sizes.k, sizes.teacher)}
    square = sum(float(t.square().sum()) for t in true.values())
    found, bars = {}, []
    print(f"\nRegression: {sizes.n} data, {sizes.p} inputs, {sizes.k} outputs, teacher {sizes.teacher} wide; {sizes.passes} passes, tuned on validation data")
    print(f"{'student':>8} {'SNR':>7} {'noise alone':>12} {'SGD test':>9} {'PLI test':>9} {'SGD/PLI':>8} {'SGD train':>10} {'PLI train':>10}  chosen")
    for width in sizes.students:
        start = {"W": draws(40, width, sizes.p), "b": draws(41, width), "V": draws(42, sizes.k, width)}
        for ratio in ratios:
            σ = (square / ratio) ** 0.5
            Y = {name: perceptron(true, X[name]) + σ * laplace(50 + i, m, sizes.k) for i, (name, m) in enumerate(parts.items())}
            began = time.perf_counter()
            sgd = _best_sgd(start, X, Y, sizes, rates, decays)
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            pli = _best_pli(start, X, Y, sizes, rates, gammas)
            print(
                f"{width:8d} {ratio:7.0e} {loss(true, X['test'], Y['test']):12.3f} {sgd.test:9.3f} {pli.test:9.3f} {sgd.test / pli.test:8.3f} "
                f"{sgd.train:10.3f} {pli.train:10.3f}  {sgd.chosen}; {pli.chosen} ({seconds:.0f} s, {time.perf_counter() - began:.0f} s)"
            )
            found[f"regression_sgd_over_pli_{width}_{ratio:g}"] = sgd.test / pli.test
            found |= {f"regression_sgd_test_{width}_{ratio:g}": sgd.test, f"regression_pli_test_{width}_{ratio:g}": pli.test}
            found[f"regression_floor_{width}_{ratio:g}"] = loss(true, X["test"], Y["test"])
            bars.append((width, ratio, sgd.test, pli.test, found[f"regression_floor_{width}_{ratio:g}"]))
    _plot(bars, sizes, figures / "regression.png")
    return found


class Tuned(NamedTuple):
    validation: float
    test: float
    train: float
    chosen: str


class Watch:
    """Keeps the weights of the least validation loss within the budget of passes."""

    def __init__(self, X: dict[str, Tensor], Y: dict[str, Tensor], passes: int) -> None:
        self.X, self.Y, self.passes = X, Y, passes
        self.best: tuple[float, Weights] = (math.inf, {})

    def see(self, w: Weights, passes: float) -> None:
        validation = loss(w, self.X["validation"], self.Y["validation"])
        if passes <= self.passes and validation < self.best[0]:
            self.best = validation, {name: t.clone() for name, t in w.items()}

    def tuned(self, chosen: str) -> Tuned:
        validation, w = self.best
        if not w:
            return Tuned(math.inf, math.inf, math.inf, chosen)
        return Tuned(validation, loss(w, self.X["test"], self.Y["test"]), loss(w, self.X["train"], self.Y["train"]), chosen)


def _best_sgd(start: Weights, X: dict, Y: dict, sizes: Sizes, rates: list[float], decays: list[float]) -> Tuned:
    tries = []
    for lr in rates:
        for decay in decays:
            watch = Watch(X, Y, sizes.passes)
            subgradient(residual, start, batch=(X["train"], Y["train"]), lr=lr, decay=decay, epochs=sizes.passes, batch_size=8,
                        generator=torch.Generator().manual_seed(0), callback=watch.see)  # fmt: skip
            tries.append(watch.tuned(f"lr {lr:g}, decay {decay:g}"))
    return min(tries)


def _best_pli(start: Weights, X: dict, Y: dict, sizes: Sizes, rates: list[float], gammas: list[float]) -> Tuned:
    tries = []
    for gamma in gammas:
        for lr in rates:
            watch = Watch(X, Y, sizes.passes)

            class Spent(Exception):
                pass

            def see(w: Weights, step, watch: Watch = watch, spent: type = Spent) -> None:
                watch.see(w, step.visits)
                if step.visits > sizes.passes:
                    raise spent

            inner = SVRG(tolerance=1e-3, epochs=3, batch_size=8, lr=lr)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # its tolerance stays open
                    prox_linear(residual, start, batch=(X["train"], Y["train"]), inner=inner, jacobian=JacobianProducts, gamma=gamma, grow=1.0,
                                max_iterations=sizes.passes, generator=torch.Generator().manual_seed(0), callback=see)  # fmt: skip
            except Spent:
                pass
            tries.append(watch.tuned(f"γ {gamma:g}, inner lr {lr:g}"))
    return min(tries)


def _plot(bars: list, sizes: Sizes, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(sizes.students), figsize=(3.3 * len(sizes.students), 3.2), layout="constrained", sharey=True, squeeze=False)
    for ax, width in zip(axes[0], sizes.students, strict=True):
        chosen = [b for b in bars if b[0] == width]
        for column, name, colour, marker in ((2, "SGD", "C1", "o"), (3, "PLI", "C0", "s")):
            ratios = [b[column] / b[4] for b in chosen]
            ax.semilogx([b[1] for b in chosen], ratios, marker=marker, ms=4, color=colour, lw=1.3)
            higher = ratios[-1] == max(b[c] / b[4] for b in chosen[-1:] for c in (2, 3))
            ax.annotate(name, (chosen[-1][1], ratios[-1]), xytext=(5, 5 if higher else -5), textcoords="offset points", color=colour, fontsize=8, va="center")
        ax.axhline(1, color="0.5", lw=0.9, ls=":")
        ax.set_title(f"{width} hidden units (teacher {sizes.teacher})", fontsize=10)
        ax.set_xlabel("SNR")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.15)
    axes[0][0].set_ylabel("test loss, true weights = 1")
    fig.savefig(path, dpi=90)
    plt.close(fig)
