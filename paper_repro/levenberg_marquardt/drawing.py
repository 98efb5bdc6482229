"""The two figures."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from paper_repro.levenberg_marquardt.methods import Trace
from paper_repro.levenberg_marquardt.problems import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = dict[str, list[Trace]]
COLOURS = {
    "SGD": "0.7", "Adam": "0.45", "L-BFGS": "C1", "L-BFGS, strong Wolfe": "C4", "KFAC": "C2", "Hessian-free": "C5", "LM": "C0", "LM, improved": "C3",
}  # fmt: skip


def convergence(problem: Problem, runs: Runs, floor: float, path: Path) -> None:
    """The median seed of every method: loss against iterations and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for name, several in runs.items():
        trace = sorted(several, key=lambda r: (r.time, r.losses[-1]))[len(several) // 2]
        for ax, x in zip(axes, (range(1, len(trace.losses) + 1), [1e3 * s for s in trace.seconds])):
            ax.loglog(x, trace.losses, color=COLOURS[name], lw=1.2, label=name)
    for ax, label in zip(axes, ("losses evaluated", "milliseconds")):
        ax.axhline(floor, color="k", lw=0.6, ls=":")
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean squared error")
    axes[1].text(1, floor * 1.05, "noise", fontsize=7, va="bottom")
    axes[0].set_ylim(0.8 * floor, 2)
    axes[0].set_xlim(left=0.03)  # room for the names
    axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    figure.suptitle(f"{problem.name}, the median of {len(next(iter(runs.values())))} seeds", fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def times(everything: dict[str, Runs], path: Path) -> None:
    """Seconds to the target by problem and method: a dot for every seed, a line at the median."""
    figure, axes = plt.subplots(1, len(everything), figsize=(1.65 * len(everything), 2.8), sharey=True, layout="constrained")
    for ax, (problem, runs) in zip(axes, everything.items()):
        _dots(ax, runs)
        ax.set_title(problem, fontsize=8)
    axes[0].set_yticks(range(len(COLOURS)), list(COLOURS), fontsize=7)
    axes[0].invert_yaxis()
    figure.supxlabel("seconds to the target (failed seeds at the right border)", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dots(ax: Axes, runs: Runs) -> None:
    known = [r.time for several in runs.values() for r in several if math.isfinite(r.time)]
    border = 3 * max(known)
    for row, (name, several) in enumerate(runs.items()):
        x = [min(r.time, border) for r in several]
        ax.plot(x, [row] * len(x), ".", color=COLOURS[name], ms=5, alpha=0.7)
        ax.plot([statistics.median(x)] * 2, [row - 0.3, row + 0.3], color=COLOURS[name], lw=1.5)
    ax.axvline(border, color="0.85", lw=0.6, zorder=0)
    ax.set_xscale("log")
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
