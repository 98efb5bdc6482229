"""UCI classification: the trained net, its Bayesian versions, and the predictives that go with them, over a grid of prior precisions δ.

For every set and split a net is trained to a mode under each δ. From there:

    MAP         p(y | f(x; θ*))
    BNN         Monte Carlo: the net itself at draws of the weights from N(θ*, (H + δ)⁻¹)
    GLM         the linearised net under the same Gaussian: E p(y | f(x; θ*) + J (θ − θ*))
    subset      the linearised net as a Gaussian process on half of the data
    refined     GLM after inference went on in the linearised model: its mode (Laplace), its variational Gaussian
    VI          variational inference over the net's own weights (diagonal), read both ways
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesgn as bgn
from bayesgn import ggn, models, rules
from bayesgn.datasets import DatasetUnavailable
from bayesgn.inference.refine import refine
from paper_repro.disentangling import common
from paper_repro.disentangling.common import Split, mean_se

SETS = ("australian", "breast_cancer", "glass", "ionosphere", "vehicle", "waveform", "digits", "satellite")
QUICK = ("wdbc", "wine")  # these come with scikit-learn
GRID = (0.1, 1.0, 10.0, 100.0)
STRUCTURES = {"full": ggn.Full, "Kron": ggn.Kron, "diag": ggn.Diag}
MOST = 500  # training data; the paper has all of them
DRAWS = 300
METRICS = {"nll": "NLL", "acc": "accuracy", "ece": "ECE"}


class Record(NamedTuple):
    """One method on one split under one δ."""

    dataset: str
    seed: int
    δ: float
    method: str
    validation: dict[str, float]
    test: dict[str, float]


def units(name: str) -> int:
    """Of the hidden layer: 50, or 20 where 50 would make more than 2,000 weights."""
    return 20 if name in ("digits", "satellite") else 50


class Study:
    """One split: nets, posteriors and records."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split, self.seed = split, seed
        self.likelihood = common.likelihood_of(split.outputs)
        self.records: list[Record] = []
        self.gain: list[float] = []  # of the bound, by refinement
        self.drop = 0.0  # its largest fall from step to step

    def net(self, δ: float) -> torch.nn.Module:
        x, y = self.split.train
        return common.train(common.mlp(x.shape[1], units(self.split.name), self.split.outputs, seed=self.seed), self.likelihood, x, y, δ)

    def laplace(self, net: torch.nn.Module, δ: float, structure: Any) -> Any:
        # One precision for each layer, all of them δ: the evidence is not tuned here, and a Cholesky factor is then cheaper than eigenvalues.
        model = models.Network(net, models.WeightPrior.per_layer(net, δ), structure)
        return bgn.laplace(model, self.likelihood, self.split.train, progress=False)

    def note(self, δ: float, method: str, predict: Callable[[Tensor], Distribution]) -> None:
        with torch.no_grad():
            parts = [common.scores(predict(x), y) for x, y in (self.split.validation, self.split.test)]
        self.records.append(Record(self.split.name, self.seed, δ, method, *parts))

    def note_glm(self, δ: float, method: str, posterior: Any) -> None:
        self.note(δ, method, lambda x: posterior.likelihood(posterior(x)))

    def note_bnn(self, δ: float, method: str, posterior: Any) -> None:
        g = torch.Generator().manual_seed(1000 + self.seed)
        self.note(δ, method, lambda x: posterior.likelihood(posterior.sample_outputs(x, DRAWS, generator=g)))

    def at(self, δ: float) -> dict[str, Any]:
        """MAP, BNN and GLM under one δ."""
        net, found = self.net(δ), {}
        self.note(δ, "MAP", lambda x: self.likelihood.conditional(net(x)))
        for name, structure in STRUCTURES.items():
            found[name] = self.laplace(net, δ, structure)
            self.note_bnn(δ, f"BNN {name}", found[name])
            self.note_glm(δ, f"GLM {name}", found[name])
        return found

    def further(self, δ: float, posteriors: dict[str, Any], steps: int, vi_steps: int) -> None:
        """Function space, refinement, variational inference of the net."""
        x, y = self.split.train
        net = posteriors["full"].net
        self.note_glm(δ, "GP subset", self.laplace(net, δ, ggn.Gram(subset=len(x) // 2, seed=self.seed)))
        for name in ("full", "diag"):
            self.note_glm(δ, f"Laplace-refined {name}", self.refine(posteriors[name], rules.Laplace(), steps))
            nodes = rules.GaussHermite(6) if self.split.outputs == 3 else None
            refined = self.refine(posteriors[name], rules.Variational(cubature=nodes), steps)
            self.gain.append(refined.trace.energy[-1] - refined.trace.energy[0])
            self.drop = max([self.drop, *(a - b for a, b in zip(refined.trace.energy, refined.trace.energy[1:]))])
            self.note_glm(δ, f"VI-refined {name}", refined)
        g = torch.Generator().manual_seed(2000 + self.seed)
        model = models.Network(net, models.WeightPrior.per_layer(net, δ), ggn.Diag)
        with common.quietly():
            vi = bgn.variational(model, self.likelihood, (x, y), epochs=-(-64 * vi_steps // len(x)), batch_size=64, generator=g, progress=False)
        self.note_bnn(δ, "VI diag, BNN", vi)
        self.note_glm(δ, "VI diag, GLM", vi)

    def refine(self, posterior: Any, rule: rules.Expansion, steps: int) -> Any:
        with common.quietly():
            return refine(posterior, self.split.train, rule, steps=steps, tol=0.02, progress=False)


def function_space(name: str = "wine", δ: float = 1.0) -> float:
    """Largest difference, in units of the largest entry, of mean, covariance and class probabilities between Gram (data × data) and Full."""
    study = Study(common.load(name, 0, MOST), 0)
    net, x = study.net(δ), study.split.test[0]
    with torch.no_grad():
        pairs = []
        for structure in (ggn.Full, ggn.Gram):
            posterior = study.laplace(net, δ, structure)
            f = posterior(x)
            pairs.append((f.mean, f.covariance_matrix, posterior.likelihood(posterior(x)).probs, posterior.log_evidence()))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*pairs))


# -- many splits -------------------------------------------------------------------------------------------------------


def study(names: Iterable[str], seeds: Iterable[int], grid: Iterable[float], steps: int, vi_steps: int) -> tuple[list[Record], dict[str, float]]:
    """All records, and what refinement did to the bound."""
    records: list[Record] = []
    gain, drop = [], 0.0
    for name in names:
        began = time.perf_counter()
        for seed in seeds:
            try:
                one = Study(common.load(name, seed, MOST), seed)
            except DatasetUnavailable as error:
                print(f"{name} left out: {error}")
                break
            for δ in grid:
                posteriors = one.at(δ)
                if δ == 1.0:
                    one.further(δ, posteriors, steps, vi_steps)
            records += one.records
            gain += one.gain
            drop = max(drop, one.drop)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return records, {"refinement_least_gain": min(gain), "refinement_largest_fall": drop}


def chosen(records: list[Record], metric: str = "nll") -> dict[str, dict[str, list[float]]]:
    """{method: {set: test score of each split}} with δ of the least validation NLL, for each method by itself."""
    best: dict[tuple[str, str, int], Record] = {}
    for r in records:
        key = (r.method, r.dataset, r.seed)
        if key not in best or r.validation["nll"] < best[key].validation["nll"]:
            best[key] = r
    return by_method(best.values(), metric)


def by_method(records: Iterable[Record], metric: str = "nll") -> dict[str, dict[str, list[float]]]:
    out: dict[str, dict[str, list[float]]] = {}
    for r in records:
        out.setdefault(r.method, {}).setdefault(r.dataset, []).append(r.test[metric])
    return out


def wins(found: dict[str, dict[str, list[float]]], method: str, other: str) -> int:
    """Sets on which the first has the lower mean over splits."""
    return sum(bool(np.mean(v) < np.mean(found[other][name])) for name, v in found[method].items())


def beats(found: dict[str, dict[str, list[float]]], method: str, other: str) -> int:
    """Sets on which it is lower by more than two standard errors of the paired difference."""
    pairs = [mean_se([a - b for a, b in zip(v, found[other][name])]) for name, v in found[method].items()]
    return sum(mean + 2 * se < 0 for mean, se in pairs)


def show(found: dict[str, dict[str, list[float]]], methods: Iterable[str], digits: int = 3) -> str:
    names = list(found["MAP"])
    cells = {m: {n: mean_se(v) for n, v in found[m].items()} for m in methods if m in found}
    rows = {}
    for m, of in cells.items():
        rows[m] = [f"{of[n][0]:.{digits}f} ± {of[n][1]:.{digits}f}" if n in of else "" for n in names]
    return common.table(rows, [n.replace("_", " ") for n in names])


def draw_sets(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Test NLL of each set, one dot a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(found["MAP"])
    widest = int(np.argmax([np.mean(found["BNN full"][n]) for n in names]))  # where the labels have room
    shown = {"MAP": "MAP", "BNN": "BNN full", "GLM": "GLM full", "VI-refined": "VI-refined full"}
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for offset, (label, method) in zip((0.24, 0.08, -0.08, -0.24), shown.items()):
        stats = np.array([mean_se(found[method][n]) for n in names])
        at = np.arange(len(names))[::-1] + offset
        ax.errorbar(stats[:, 0], at, xerr=stats[:, 1], fmt="o", ms=4, lw=1, color=common.COLORS[label])
        word = {"VI-refined": "GLM, refined by VI"}.get(label, label)
        ax.annotate(word, (stats[widest].sum(), at[widest]), (5, 0), textcoords="offset points", va="center", fontsize=7, color=common.COLORS[label])
    ax.set_yticks(np.arange(len(names))[::-1], [n.replace("_", " ") for n in names])
    ax.set(xlabel="test NLL in nats, prior precision 1: mean and standard error over splits", xlim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    fig.savefig(path, dpi=80)
    plt.close(fig)


def draw_grid(records: list[Record], names: Iterable[str], path: Path) -> None:
    """Test NLL against δ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(names)
    fig, axes = plt.subplots(1, len(names), figsize=(2.7 * len(names), 2.7), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names):
        for label, method in {"MAP": "MAP", "BNN": "BNN full", "GLM": "GLM full"}.items():
            mine = [r for r in records if r.dataset == name and r.method == method]
            grid = sorted({r.δ for r in mine})
            stats = np.array([mean_se([r.test["nll"] for r in mine if r.δ == δ]) for δ in grid])
            ax.fill_between(grid, stats[:, 0] - stats[:, 1], stats[:, 0] + stats[:, 1], color=common.COLORS[label], alpha=0.2, lw=0)
            ax.plot(grid, stats[:, 0], color=common.COLORS[label])
            if name == names[-1]:
                ax.text(grid[0], stats[0, 0], f" {label}", color=common.COLORS[label], fontsize=8, va="bottom")
        ax.set(xscale="log", title=name.replace("_", " "), xlabel="prior precision δ", ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test NLL / nats")
    fig.savefig(path, dpi=75)
    plt.close(fig)


def run(quick: bool, figures: Path) -> dict[str, float]:
    """Tables of NLL, accuracy and calibration error, and on how many sets one method beats another."""
    if quick:
        records, bound = study(QUICK, (0,), (0.1, 1.0, 10.0), steps=5, vi_steps=100)
    else:
        records, bound = study(SETS, range(5), GRID, steps=6, vi_steps=200)
    numbers = {f"classification_{k}": v for k, v in bound.items()}
    numbers["classification_function_space_difference"] = function_space()
    at_one = [r for r in records if r.δ == 1.0]
    for metric, word in METRICS.items():
        best = chosen([r for r in records if r.method.split()[0] in ("MAP", "BNN", "GLM")], metric)
        print(f"\nTest {word}, prior precision chosen on validation data for each method\n\n{show(best, best)}")
        fixed = by_method(at_one, metric)
        print(f"\nTest {word}, prior precision 1\n\n{show(fixed, fixed)}", flush=True)
    best = chosen([r for r in records if r.method.split()[0] in ("MAP", "BNN", "GLM")])
    fixed = by_method(at_one)
    numbers["classification_sets"] = len(best["MAP"])
    for structure in STRUCTURES:
        for label, found in (("chosen", best), ("fixed", fixed)):
            for other in (f"BNN {structure}", "MAP"):
                key = f"classification_{label}_glm_{structure.lower()}_beats_{other.split()[0].lower()}"
                numbers[key], numbers[f"{key}_by_2se"] = wins(found, f"GLM {structure}", other), beats(found, f"GLM {structure}", other)
    pairs = [(f"VI-refined {s}", other) for s in ("full", "diag") for other in (f"GLM {s}", "MAP")]
    pairs += [("VI diag, BNN", other) for other in ("BNN diag", "MAP", "VI diag, GLM")]
    for method, other in pairs:
        key = f"classification_fixed_{method}_beats_{other}".lower().replace(", ", "_").replace(" ", "_").replace("-", "_")
        numbers[key], numbers[f"{key}_by_2se"] = wins(fixed, method, other), beats(fixed, method, other)
    differences = [abs(a - b) for n, v in fixed["Laplace-refined full"].items() for a, b in zip(v, fixed["GLM full"][n])]
    numbers["classification_laplace_refinement_largest_change"] = max(differences)
    print()
    for key, value in numbers.items():
        print(f"{key}: {value:.3g}")
    draw_sets(fixed, figures / "uci.png")
    shown = [n for n in ("australian", "glass", "vehicle", "digits") if n in fixed["MAP"]]
    draw_grid(records, shown or list(fixed["MAP"]), figures / "uci_prior.png")
    return numbers
