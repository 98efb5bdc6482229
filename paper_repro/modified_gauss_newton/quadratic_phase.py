"""The paper's theory on two problems: how much of the quadratic phase lies above the noise level, and what the subgradient method needs meanwhile."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from bayesgn.optim.prox_linear import prox_linear, subgradient
from bayesgn.optim.prox_solvers import SVRG, DualNewton
from bayesgn.optim.prox_subproblem import JacobianProducts

F64 = torch.float64


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def laplace(seed: int, *shape: int) -> Tensor:
    """Standard Laplace noise, by the inverse of its distribution function."""
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


# -- more weights than residuals ---------------------------------------------------------------------------------------


def net(w: dict[str, Tensor], X: Tensor) -> Tensor:
    return torch.tanh(X @ w["W"].mT) @ w["V"].mT / w["V"].shape[1] ** 0.5


def overparameterised(scales: list[float], figures: Path) -> dict[str, float]:
    """y = φ(x; w*) + σ ξ with d > nk. The exact method goes to F = 0 for every σ; below F(w*) it only learns the noise."""
    n, k, d, width = 20, 2, 5, 60
    true = {"W": draws(0, width, d), "V": draws(1, k, width)}
    X, held_out = draws(2, n, d), draws(3, 2000, d)
    start = {"W": true["W"] + draws(4, width, d), "V": true["V"] + draws(5, k, width)}
    found, curves = {}, {}
    print(f"\nOver-parameterised: {n} × {k} residuals, {width * (d + k)} weights, exact prox-linear steps")
    print(f"{'σ':>8} {'noise level':>12} {'iterations to it':>17} {'quadratic above':>16} {'quadratic below':>16} {'test at level':>14} {'test at end':>12}")
    for σ in scales:
        Y = net(true, X) + σ * laplace(6, n, k)
        level = float((net(true, X) - Y).norm(dim=1).mean())
        values = [float((net(start, X) - Y).norm(dim=1).mean())]
        tests = [float((net(start, held_out) - net(true, held_out)).norm(dim=1).mean())]
        seen = lambda w, step, values=values, tests=tests: (
            values.append(step.value),
            tests.append(float((net(w, held_out) - net(true, held_out)).norm(dim=1).mean())),
        )
        prox_linear(lambda w, X, Y: net(w, X) - Y, start, batch=(X, Y), gamma=10.0, callback=seen)
        # Losses from which a step was quadratic: order of convergence, from three in a row, above 1.5. Rounding ends what can be told.
        quadratic = [b for a, b, c in zip(values, values[1:], values[2:]) if c > 1e-14 and math.log(c / b) / math.log(b / a) > 1.5]
        reached = next((i for i, v in enumerate(values) if v <= level), len(values))
        above, below = sum(b > level for b in quadratic), sum(b <= level for b in quadratic)
        at = min(reached, len(tests) - 1)
        print(f"{σ:8.0e} {level:12.2e} {reached:17d} {above:16d} {below:16d} {tests[at]:14.3e} {tests[-1]:12.3e}")
        found |= {f"over_quadratic_above_{σ:g}": above, f"over_quadratic_below_{σ:g}": below, f"over_final_loss_{σ:g}": values[-1]}
        found[f"over_test_ratio_{σ:g}"] = tests[-1] / tests[at]
        curves[σ] = (values, level)
    _plot_losses(curves, figures / "overparameterised.png")
    return found


# -- robust phase retrieval ----------------------------------------------------------------------------------------------


def phase(w: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (A @ w).square() - b


def phase_retrieval(scales: list[float], n: int, d: int, epochs: int, rates: list[float], figures: Path) -> dict[str, float]:
    """|(aᵀw)² − b| with b = (aᵀw*)² + σ ξ, n > d: distance to w* against passes over the data, three methods.

    A pass is n values or products Jv, Jᵀu (a gradient counts as one). The target is twice the distance of the minimiser ŵ from w*, the noise
    level of the estimate, and 1e-6 without noise. The subgradient method is given the step size and decay that reach it first.
    """
    A, true = draws(10, n, d), draws(11, d)
    true /= true.norm()
    direction = draws(12, d)
    start = true + 0.3 * direction / direction.norm()
    far = lambda w: float((w - true).norm())
    found, curves = {}, {}
    print(f"\nRobust phase retrieval: {n} measurements, {d} unknowns; passes (seconds) to twice the statistical error")
    print(f"{'σ':>8} {'‖ŵ − w*‖':>10} {'target':>9} {'prox-linear':>18} {'incremental':>18} {'subgradient':>18}  best step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prox_linear(phase, start, batch=(A, (A @ true).square()), max_iterations=1)  # what torch loads at first use is not timed
    for σ in scales:
        batch = (A, (A @ true).square() + σ * laplace(13, n))
        began = time.perf_counter()
        exact: list[tuple[float, float, float]] = [(0.0, 0.0, far(start))]
        seen = lambda w, step, course=exact, began=began: course.append((step.visits, time.perf_counter() - began, far(w)))
        fit = prox_linear(phase, start, batch=batch, inner=DualNewton(), gamma=1.0, callback=seen)
        error = far(fit.x)
        target = 2 * error if σ > 0 else 1e-6

        incremental = None
        for gamma in (0.3, 3.0):
            course = [(0.0, 0.0, far(start))]
            began = time.perf_counter()
            seen = lambda w, step, course=course, began=began: course.append((step.visits, time.perf_counter() - began, far(w)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its tolerance may stay open
                prox_linear(phase, start, batch=batch, inner=SVRG(0.1, epochs=10, batch_size=10), jacobian=JacobianProducts, gamma=gamma, grow=1.0,
                            max_iterations=epochs // 8, generator=torch.Generator().manual_seed(0), callback=seen)  # fmt: skip
            if incremental is None or _reached(course, target) < _reached(incremental, target):
                incremental = course
        assert incremental is not None

        best, which = None, (math.nan, math.nan)
        for lr, decay in [(lr, decay) for lr in rates for decay in (0.0, 0.5, 1.0)]:
            course = [(0.0, 0.0, far(start))]
            began = time.perf_counter()
            seen = lambda w, epoch, course=course, began=began: course.append((float(epoch), time.perf_counter() - began, far(w)))
            subgradient(phase, start, batch=batch, lr=lr, decay=decay, epochs=epochs, batch_size=10,
                        generator=torch.Generator().manual_seed(0), callback=seen)  # fmt: skip
            if not math.isfinite(course[-1][2]):
                continue
            better = best is None or (_reached(course, target), course[-1][2]) < (_reached(best, target), best[-1][2])
            if better:
                best, which = course, (lr, decay)
        assert best is not None

        print(f"{σ:8g} {error:10.2e} {target:9.1e} {_words(exact, target):>18} {_words(incremental, target):>18} {_words(best, target):>18}  {which}")
        for name, course in (("prox_linear", exact), ("incremental", incremental), ("subgradient", best)):
            found |= {f"phase_{name}_passes_{σ:g}": _reached(course, target), f"phase_{name}_final_{σ:g}": course[-1][2]}
            found[f"phase_{name}_seconds_{σ:g}"] = next((s for _, s, e in course if e <= target), math.inf)
        for name, course in (("prox_linear", exact), ("incremental", incremental)):
            if math.isfinite(_reached(course, target)):
                found[f"phase_subgradient_over_{name}_{σ:g}"] = _reached(best, target) / max(_reached(course, target), 1.0)
        found[f"phase_iterations_{σ:g}"] = len(exact) - 1
        curves[σ] = (exact, incremental, best, target)
    _plot_distances(curves, figures / "phase_retrieval.png")
    return found


def _reached(course: list[tuple[float, float, float]], target: float) -> float:
    """Passes until the error is at the target, infinite where it never is."""
    return next((passes for passes, _, error in course if error <= target), math.inf)


def _words(course: list[tuple[float, float, float]], target: float) -> str:
    hit = next(((p, s) for p, s, e in course if e <= target), None)
    return f"never ({course[-1][2]:.0e})" if hit is None else f"{hit[0]:.0f} ({hit[1]:.2f} s)"


def _plot_losses(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for i, (σ, (values, level)) in enumerate(curves.items()):
        colour = plt.get_cmap("viridis")(0.85 * i / max(len(curves) - 1, 1))
        ax.semilogy([max(v, 1e-17) for v in values], "o-", ms=3.5, lw=1.4, color=colour)
        ax.axhline(level, color=colour, lw=0.9, ls=":")
        ax.text(0.995, level * 1.25, f"noise level, σ = {σ:.0e}", color=colour, ha="right", fontsize=8, transform=ax.get_yaxis_transform())
    ax.set_ylim(1e-17, None)
    ax.set_xlabel("prox-linear iteration")
    ax.set_ylabel("training loss F")
    ax.set_title("Above its dotted noise level a curve learns, below it fits noise", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def _plot_distances(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.4), layout="constrained", squeeze=False)
    for ax, (σ, (exact, incremental, best, target)) in zip(axes[0], curves.items(), strict=True):
        for name, course, colour in (("prox-linear, exact", exact, "C0"), ("incremental", incremental, "C2"), ("subgradient", best, "C1")):
            x, y = [max(p, 0.6) for p, _, _ in course], [max(e, 1e-16) for _, _, e in course]
            ax.loglog(x, y, color=colour, lw=1.4, marker="o" if len(x) < 20 else None, ms=3)
            if ax is axes[0][0]:
                place = {"C0": (x[-2], y[-2], "right", -6), "C2": (x[2], y[2], "center", 7), "C1": (x[-1], y[-1], "left", 0)}[colour]
                ax.annotate(name, place[:2], xytext=(place[3] if place[2] == "right" else 3, 0 if place[2] == "right" else place[3]),
                            textcoords="offset points", color=colour, ha=place[2], va="center", fontsize=8)  # fmt: skip
        ax.axhline(target, color="0.5", lw=0.9, ls=":")
        ax.annotate("target", (0.6, target), xytext=(0, -8), textcoords="offset points", color="0.5", fontsize=8, va="center")
        ax.set_title(f"σ = {σ:g}", fontsize=10)
        ax.set_xlabel("passes over the data")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("‖w − w*‖")
    fig.savefig(path, dpi=90)
    plt.close(fig)
