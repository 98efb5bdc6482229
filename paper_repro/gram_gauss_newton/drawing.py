"""The two figures."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from paper_repro.gram_gauss_newton.images import Training


def full_batch(losses: dict[str, list[float]], rounding: float, path: Path) -> None:
    """Loss by step, each curve named at its end."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, values in losses.items():
        last = next((i for i, v in enumerate(values) if v < rounding), len(values) - 1)
        style = {"ls": "--", "color": "0.5"} if "damping" in name else {"color": "k"} if "descent" in name else {}
        (line,) = ax.semilogy(range(last + 1), values[: last + 1], marker="o", ms=3, lw=1.2, **style)
        if not name.endswith("wide"):
            ax.annotate(name, (last, values[last]), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", color=line.get_color())
    wide = [line for line, name in zip(ax.get_lines(), losses) if name.endswith("wide")]
    ax.legend(wide, [name for name in losses if name.endswith("wide")], frameon=False, fontsize=8, loc="center right")
    ax.set_xlabel("step")
    ax.set_ylabel("mean squared error")
    ax.set_xlim(-0.2, 11)
    ax.set_xticks(range(9))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def mini_batches(runs: dict[tuple[str, int], list[Training]], path: Path) -> None:
    """Held-out error by epoch and by time; medians of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    colours = {"GGN": "C3", "SGD": "0.6", "Adam": "C0"}
    for (method, epochs), several in runs.items():
        test, seconds = ([statistics.median(c) for c in zip(*(getattr(r, key) for r in several))] for key in ("test", "seconds"))
        for ax, x in zip(axes, (range(1, epochs + 1), seconds)):
            ax.plot(x, test, color=colours[method], lw=1.2)
            if epochs == max(e for m, e in runs if m == method):
                place = {"GGN": (4, 0), "SGD": (4, 5), "Adam": (4, -4)}[method]
                ax.annotate(method, (x[-1], test[-1]), xytext=place, textcoords="offset points", fontsize=7, va="center", color=colours[method])
    for ax, label in zip(axes, ("epochs", "CPU seconds")):
        ax.set_xlabel(label)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out error / degrees")
    axes[0].set_ylim(11.5, 26)
    figure.savefig(path, dpi=85)
    plt.close(figure)
