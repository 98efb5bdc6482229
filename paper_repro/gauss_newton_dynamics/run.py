"""Contraction of Gauss-Newton, Levenberg-Marquardt and gradient descent on two-layer nets, against the conditioning of their Gram matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, optim

TITLE = "Cayci (2024): Gauss-Newton dynamics for neural networks: a Riemannian optimization perspective"

LR = 0.5  # of Gauss-Newton and Levenberg-Marquardt: steps of a flow
CONSTANT = 1e-3  # the damping that does not adapt, as a fraction of the Gram matrix's largest eigenvalue
GAUSS_NEWTON = -2 * math.log(1 - LR)  # fall of log loss in a step: every residual shrinks by 1 − lr
ADAPTIVE = -2 * math.log(1 - LR / 2)  # the slowest residual: λ_min / (λ_min + λ) = ½
DTYPE = torch.float64


class TwoLayer(nn.Module):
    """f(x) = α/√m Σ_i c_i tanh(w_iᵀx): the w_i are trained, the c_i = ±1 are not.

    With ``paired`` every neuron stands beside one of the same weights and the other sign, so that f = 0 at the start.
    """

    c: Tensor

    def __init__(self, d: int, m: int, α: float, paired: bool, seed: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d, m, bias=False, dtype=DTYPE)
        with torch.no_grad():
            self.hidden.weight.copy_(normal(m // 2, d, seed=seed).repeat(2, 1) if paired else torch.linalg.qr(normal(d, m, seed=seed)).Q.mT)
        c = torch.cat([torch.ones(m // 2), -torch.ones(m - m // 2)]).to(DTYPE)
        self.register_buffer("c", α / m**0.5 * c[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(x)) @ self.c

    def moved(self, by: Tensor) -> TwoLayer:
        """This net, its weights changed."""
        self.hidden.weight.data += by
        return self


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def jacobian(net: TwoLayer, x: Tensor) -> Tensor:
    """J [n p] by torch.func, with which the optimizer's own numbers are compared."""
    weights = {n: p.detach() for n, p in net.named_parameters()}
    found = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x,))[:, 0])(weights)
    return torch.cat([J.flatten(1) for J in found.values()], 1)


@dataclass
class Run:
    """Excess loss before each step.

    Attributes:
        condition: the Gram matrix's condition number, where it is not the row's.
        predicted: the rate to which Gauss-Newton's should fall.
        error: the largest relative difference of the optimizer's damping from that of a dense Jacobian.
    """

    excess: list[float] = field(default_factory=list)
    condition: float | None = None
    predicted: float = math.nan
    error: float = 0.0

    @property
    def rate(self) -> float:
        """−Δ log excess for each step, over the last half of the steps: what the slowest direction leaves."""
        e = self.excess
        middle = len(e) // 2
        return (math.log(e[middle]) - math.log(e[-1])) / (len(e) - 1 - middle)


def train(
    net: TwoLayer, x: Tensor, y: Tensor, steps: int, best: float = 0.0, floor: float = 1e-20, factor: float | None = None, **arguments: Any
) -> Run:
    """½ mean squared error, less its ``best``, along the optimizer's steps, as long as it is above ``floor``."""
    opt, run = optim.GaussNewton(net, likelihoods.Gaussian(1.0), **arguments), Run()
    for _ in range(steps + 1):
        excess = 0.5 * float((net(x).detach() - y).square().mean()) - best
        if excess < floor * (run.excess or [excess])[0] or not math.isfinite(excess):
            break
        run.excess.append(excess)
        expected = math.nan if factor is None else factor * float(torch.linalg.svdvals(jacobian(net, x))[-1].square()) / len(x)
        opt.step(x, y)
        assert opt.last is not None and opt.last.accepted
        if factor is not None:
            run.error = max(run.error, abs(opt.last.damping / expected - 1))
    return run


def predicted(best: TwoLayer, x: Tensor, y: Tensor) -> float:
    """Rate of Gauss-Newton near a minimum: −2 log(1 − lr μ), with μ the smallest eigenvalue of (JᵀJ)⁻¹ n ∂²loss."""
    loss = lambda w: 0.5 * (torch.func.functional_call(best, {"hidden.weight": w}, (x,)) - y).square().sum()
    w = best.hidden.weight.detach()
    H, R = torch.func.hessian(loss)(w).reshape(w.numel(), w.numel()), torch.linalg.qr(jacobian(best, x)).R
    left = torch.linalg.solve_triangular(R.mT, H, upper=False)  # R⁻ᵀ H R⁻¹
    μ = float(torch.linalg.eigvalsh(torch.linalg.solve_triangular(R, left, upper=True, left=False))[0])
    return -2 * math.log(1 - LR * μ)


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Slope of log rate against log condition number."""
    return float(np.polyfit(np.log([row["condition"] for row in rows]), np.log([row[name].rate for row in rows]), 1)[0])


def rates(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name].rate for row in rows]


def spread(found: Sequence[float]) -> float:
    """Largest over smallest."""
    return max(found) / min(found)


# -- fewer weights than data -------------------------------------------------------------------------------------------


def underparameterised(flatness: Sequence[float], seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """16 weights, 60 data in four dimensions whose scales fall from 1 to ``flatness``; answers of a net nearby.

    Without noise nets start with weights of one size, so that flat inputs also change what the net can say. With noise it is the units of the
    inputs that change: weights are scaled up as inputs are scaled down. The noise is across the tangent space of the best net, which stays the best.

    Gradient descent starts beside the best net in its flattest direction, where it is slowest: elsewhere its late rate would be one of how long we
    wait.
    """
    rows = []
    for seed in seeds:
        z = normal(60, 4, seed=10 * seed)
        noise = 0.1 * normal(60, 1, seed=10 * seed + 3)
        for ε in flatness:
            scales, row = torch.logspace(0, math.log10(ε), 4, dtype=DTYPE), {}
            for name, α, units in (("Gauss-Newton", 2.0, 1.0), ("noise, α = 2", 2.0, scales), ("noise, α = 8", 8.0, scales)):
                x, start = z * scales, TwoLayer(4, 4, α, paired=False, seed=10 * seed + 1)
                best = copy.deepcopy(start).moved(0.2 * normal(4, 4, seed=10 * seed + 2))
                for net in (start, best):
                    net.hidden.weight.data /= units
                U, σ, Vh = torch.linalg.svd(jacobian(best, x), full_matrices=False)
                y, noisy = best(x).detach(), "noise" in name
                if noisy:
                    y = y + noise - U @ (U.mT @ noise)
                loss = 0.5 * float((best(x).detach() - y).square().mean())
                row[name] = train(start, x, y, 60, loss, 1e-10 if noisy else 1e-20, damping=optim.Constant(0.0), lr=LR)
                row[name].condition, row[name].predicted = float((σ[0] / σ[-1]) ** 2), predicted(best, x, y)
                if not noisy:
                    row["condition"] = float((σ[0] / σ[-1]) ** 2)
                    best.moved(1e-3 * Vh[-1].reshape(4, 4))
                    descent: dict[str, Any] = {"structure": ggn.Identity, "damping": optim.Constant(0.0), "lr": len(x) / float(σ[0]) ** 2}
                    row["gradient descent"] = train(best, x, y, steps, **descent)
            rows.append(row)
    return rows


# -- more weights than data --------------------------------------------------------------------------------------------


def close_pairs(distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ten pairs of points, and answers that no neighbour foretells: within a pair they differ by ``distance`` times a normal draw."""
    a, y = normal(10, 4, seed=10 * seed), normal(10, 1, seed=10 * seed + 2)
    b = a + distance * nn.functional.normalize(normal(10, 4, seed=10 * seed + 3), dim=1)
    return torch.cat([a, b]), torch.cat([y, y + distance * normal(10, 1, seed=10 * seed + 4)])


def overparameterised(distances: Sequence[float], seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """512 weights, 20 data, interpolated. "slowest": answers along the Gram matrix's last eigenvector, else those of :func:`close_pairs`."""
    rows = []
    for seed in seeds:
        for distance in distances:
            x, y = close_pairs(distance, seed)
            net = TwoLayer(4, 128, 4.0, paired=True, seed=10 * seed + 1)
            U, σ, _ = torch.linalg.svd(jacobian(net, x), full_matrices=False)
            largest, slow = float(σ[0]) ** 2 / len(x), 0.1 * σ[-1] * U[:, -1:]

            def fit(y: Tensor, steps: int, damping: optim.Damping, net: TwoLayer = net, x: Tensor = x, **options: Any) -> Run:
                return train(copy.deepcopy(net), x, y, steps, **({"structure": ggn.Gram, "lr": LR} | options), damping=damping)

            rows.append({
                "condition": float((σ[0] / σ[-1]) ** 2),
                "adaptive": fit(y, 40, optim.SmallestEigenvalue(1.0), factor=1.0),
                "adaptive, slowest": fit(slow, 20, optim.SmallestEigenvalue(1.0), factor=1.0),
                "constant, slowest": fit(slow, steps, optim.Constant(CONSTANT * largest)),
                "gradient descent, slowest": fit(slow, steps, optim.Constant(0.0), structure=ggn.Identity, lr=1 / largest),
            })  # fmt: skip
    return rows


# -- tables, figures ---------------------------------------------------------------------------------------------------


def table(title: str, rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name != "condition"]
    print(f"\n{title}\n\n| condition number | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for row in rows:
        print(f"| {row['condition']:.2g} | {' | '.join(f'{row[name].rate:.3g}' for name in names)} |")


def draw(under: list[dict[str, Any]], over: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    panels = (
        (axes[0], under, "16 weights, 60 data", [
            ("Gauss-Newton", "Gauss-Newton", "C0", "o"), ("noise, α = 2", "with noise, α = 2", "C9", "v"),
            ("noise, α = 8", "with noise, α = 8", "C4", "^"), ("gradient descent", "gradient descent", "C3", "s")], GAUSS_NEWTON),
        (axes[1], over, "512 weights, 20 data", [
            ("adaptive", "Levenberg-Marquardt, λ = λ_min", "C0", "o"), ("constant, slowest", "Levenberg-Marquardt, λ constant", "C1", "D"),
            ("gradient descent, slowest", "gradient descent", "C3", "s")], ADAPTIVE),
    )  # fmt: skip
    for ax, rows, title, lines, theory in panels:
        conditions = [row["condition"] for row in rows]
        grid = np.geomspace(min(conditions) / 1.5, max(conditions) * 1.5, 100)
        ax.plot(grid, np.full(100, theory), "k-", lw=0.6)
        ax.plot(grid, 2 / grid, "k-", lw=0.6)
        if rows is over:
            ax.plot(grid, -2 * np.log(1 - LR / (1 + CONSTANT * grid)), "k-", lw=0.6)
        for name, label, color, marker in lines:
            ax.plot([row[name].condition or row["condition"] for row in rows], rates(rows, name), marker, color=color, ms=4, mfc="none", label=label)
        ax.set(xscale="log", yscale="log", title=title, xlabel="condition number of the Gram matrix")
        ax.legend(frameon=False, fontsize=8, loc="lower left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("fall of log excess loss in a step")
    fig.savefig(path, dpi=80)
    plt.close(fig)


def run(quick: bool, figures: Path) -> dict[str, float]:
    """Rates against conditioning in both regimes; theory is that of the linearised net."""
    seeds = (0,) if quick else (0, 1, 2)
    under = underparameterised((1.0, 0.1, 0.01) if quick else (1.0, 0.3, 0.1, 0.03, 0.01), seeds, 30 if quick else 100)
    over = overparameterised((1.0, 0.1, 0.01) if quick else (1.0, 0.3, 0.1, 0.03, 0.01, 0.003), seeds, 30 if quick else 100)
    table(f"16 weights, 60 data; Gauss-Newton's flow in steps of {LR:g} would fall by {GAUSS_NEWTON:.3f}, gradient descent by 2/κ", under)
    table(f"512 weights, 20 data; λ = λ_min would fall by {ADAPTIVE:.3f}", over)
    draw(under, over, figures / "rates.png")
    decades = lambda rows: math.log10(max(row["condition"] for row in rows) / min(row["condition"] for row in rows))
    noisy = {α: rates(under, f"noise, α = {α}") for α in (2, 8)}
    against = [row[f"noise, α = {α}"].rate / row[f"noise, α = {α}"].predicted for row in under for α in (2, 8)]
    print(f"\nWith noise, rates over those predicted near the best net: {min(against):.3f} to {max(against):.3f}")
    adaptive = rates(over, "adaptive") + rates(over, "adaptive, slowest")
    return {
        "under_decades_of_conditioning": decades(under),
        "under_gauss_newton_slowest_over_theory": min(rates(under, "Gauss-Newton")) / GAUSS_NEWTON,
        "under_gauss_newton_fastest_over_theory": max(rates(under, "Gauss-Newton")) / GAUSS_NEWTON,
        "under_noise_rate_slowest_alpha_2": min(noisy[2]),
        "under_noise_rate_slowest_alpha_8": min(noisy[8]),
        "under_noise_least_over_prediction": min(against),
        "under_noise_change_with_conditioning": max(
            spread(part) for found in noisy.values() for part in np.array(found).reshape(len(seeds), -1).tolist()
        ),
        "under_descent_exponent": exponent(under, "gradient descent"),
        "over_decades_of_conditioning": decades(over),
        "over_adaptive_slowest_over_theory": min(adaptive) / ADAPTIVE,
        "over_adaptive_fastest_over_theory": max(adaptive) / ADAPTIVE,
        "over_constant_exponent": exponent([row for row in over if row["condition"] > 1 / CONSTANT], "constant, slowest"),
        "over_descent_exponent": exponent(over, "gradient descent, slowest"),
        "smallest_eigenvalue_error": max(row[name].error for row in over for name in ("adaptive", "adaptive, slowest")),
    }
