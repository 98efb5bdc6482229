"""The evidence beside held-out data: for the prior precision, for the architecture, and as what tunes a training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, metrics, models

STRUCTURES: dict[str, Any] = {"Full": ggn.Full, "Kron": ggn.Kron, "Diag": ggn.Diag}
COLORS = {"Full": "k", "Kron": "C0", "Diag": "C1", "validation": "C2"}
REGRESSION = ("concrete", "energy", "kin8nm", "power_plant", "wine_quality_red", "yacht")


@dataclass
class Split:
    """One split of a set: for a choice (fit, validation), and for what is chosen (train = both of these, test)."""

    name: str
    train: tuple[Tensor, Tensor]
    fit: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int

    @property
    def classes(self) -> bool:
        return not self.train[1].is_floating_point()

    @staticmethod
    def of(name: str, seed: int, rows: int | None = None, test: float = 0.3) -> Split:
        """The seed's split: a share to test on, at most ``rows`` of the others to train on, a fifth of these for validation."""
        make = datasets.uci_regression if name in REGRESSION else datasets.uci_classification
        data = make(name, seed, test)
        order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))[:rows]
        x, y = data.x_train[order], data.y_train[order]
        held = len(x) // 5
        c = 1 if y.is_floating_point() else int(data.y_train.max()) + 1
        return Split(name, (x, y), (x[held:], y[held:]), (x[:held], y[:held]), (data.x_test[:1000], data.y_test[:1000]), c)


class Stack:
    """B nets of one shape, each on data of its own, trained side by side: every tensor has B in front."""

    def __init__(self, data: Sequence[tuple[Tensor, Tensor]], hidden: Sequence[int], outputs: int, seeds: Sequence[int]) -> None:
        self.x, self.y = (torch.stack([d[i] for d in data]) for i in (0, 1))
        self.sizes = [self.x.shape[-1], *hidden, outputs]
        nets = [self.net(seed) for seed in seeds]
        self.weights = [torch.stack([p.detach() for p in same]).requires_grad_() for same in zip(*(n.parameters() for n in nets), strict=True)]
        self.log_noise = torch.full((len(nets),), math.log(0.1))  # of targets with variance 1

    def net(self, seed: int) -> nn.Sequential:
        """An untrained net in torch's own initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [layer for i, o in zip(self.sizes, self.sizes[1:]) for layer in (nn.Linear(i, o), nn.Tanh())]
            return nn.Sequential(*layers[:-1]).eval()

    def member(self, b: int) -> nn.Sequential:
        """The b-th net."""
        net = self.net(0)
        for p, stacked in zip(net.parameters(), self.weights, strict=True):
            p.data.copy_(stacked[b].detach())
        return net

    def likelihood(self, b: int) -> likelihoods.Likelihood:
        return likelihoods.Gaussian(float(self.log_noise[b].exp())) if self.y.is_floating_point() else likelihoods.Categorical()

    def _loss(self, precision: Tensor, log_noise: Tensor) -> Tensor:
        """−log p(y|θ) − log p(θ) per datum, summed over nets."""
        h = self.x
        for i in range(0, len(self.weights), 2):
            h = torch.baddbmm(self.weights[i + 1][:, None], h if i == 0 else h.tanh(), self.weights[i].mT)
        if self.y.is_floating_point():
            fit = 0.5 * ((h - self.y).square().sum((1, 2)) / log_noise.exp() + self.y.shape[1] * log_noise)
        else:
            fit = nn.functional.cross_entropy(h.movedim(-1, 1), self.y, reduction="none").sum(1)
        squares = torch.stack([w.flatten(1).square().sum(1) for w in self.weights], 1).unflatten(1, (-1, 2)).sum(2)
        return ((fit + 0.5 * (precision * squares).sum(1)) / self.y.shape[1]).sum()

    def train(self, precision: Tensor, steps: int, lr: float = 0.02, learn_noise: bool = False) -> None:
        """Full-batch Adam, its learning rate along a cosine to zero; precision [B layers], the noise learned by likelihood or as it is."""
        log_noise = self.log_noise.clone().requires_grad_(learn_noise)
        opt = torch.optim.Adam([*self.weights, log_noise] if learn_noise else self.weights, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        for _ in range(steps):
            opt.zero_grad(set_to_none=True)
            self._loss(precision, log_noise).backward()
            opt.step()
            schedule.step()
        self.log_noise = log_noise.detach()

    def laplace(self, b: int, structure: Any, precision: Tensor) -> models.NetworkPosterior:
        """Laplace at the b-th net; where there are fewer outputs than weights, Full is worked out in its dual, which is the same."""
        net, data = self.member(b), (self.x[b], self.y[b])
        if structure is ggn.Full and len(data[0]) * self.sizes[-1] < sum(p.numel() for p in net.parameters()):
            structure = ggn.Gram
        prior = models.WeightPrior.per_layer(net, precision) if precision.dim() else models.WeightPrior(precision)
        return bgn.laplace(models.Network(net, prior, structure), self.likelihood(b), data, progress=False)


def nll_map(net: nn.Module, likelihood: Any, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(metrics.nll(likelihood.conditional(net(data[0])), data[1]))


def nll_glm(posterior: models.NetworkPosterior, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(metrics.nll(posterior.likelihood(posterior(data[0])), data[1]))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (no ties among real numbers)."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


# -- prior precision ---------------------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Over a grid of precisions, each array [splits, grid]; evidences are per datum, of training and validation data together."""

    precision: np.ndarray
    evidence: dict[str, np.ndarray] = field(default_factory=dict)
    glm: dict[str, np.ndarray] = field(default_factory=dict)  # test NLL of the linearised predictive, by structure
    map: np.ndarray = field(default_factory=lambda: np.zeros(0))  # test NLL of the net itself
    validation: np.ndarray = field(default_factory=lambda: np.zeros(0))  # NLL of the validation data under nets that did not see them


def settle(stack: Stack, precision: Tensor, steps: int, rounds: int) -> None:
    """Train at the given precisions; in regression the noise is set by the evidence (Full) between rounds of training."""
    for r in range(rounds if stack.y.is_floating_point() else 1):
        stack.train(precision[:, None], steps if r == 0 else steps // 2)
        if stack.y.is_floating_point() and r + 1 < rounds:
            for b in range(len(precision)):
                posterior = stack.laplace(b, ggn.Full, precision[b])
                bgn.maximize_evidence(posterior, prior=False, progress=False)
                stack.log_noise[b] = posterior.likelihood.noise.detach().log().float().reshape(())


def precision_curves(name: str, seeds: Sequence[int], grid: np.ndarray, width: int, steps: int, rows: int | None) -> Curves:
    """MAPs trained at every precision of the grid, their evidence and their NLL on held-out data."""
    splits = [s for s in (Split.of(name, seed, rows) for seed in seeds) for _ in grid]
    starts, shape = [seed for seed in seeds for _ in grid], (len(seeds), len(grid))
    precision = torch.tensor(grid, dtype=torch.float32).repeat(len(seeds))
    c = splits[0].outputs
    out = Curves(grid)

    chosen = Stack([s.fit for s in splits], [width], c, starts)
    settle(chosen, precision, steps, 3)
    out.validation = np.array([nll_map(chosen.member(b), chosen.likelihood(b), s.validation) for b, s in enumerate(splits)]).reshape(shape)

    final = Stack([s.train for s in splits], [width], c, starts)
    settle(final, precision, steps, 3)
    out.map = np.array([nll_map(final.member(b), final.likelihood(b), s.test) for b, s in enumerate(splits)]).reshape(shape)
    for key, structure in STRUCTURES.items():
        pairs = []
        for b, s in enumerate(splits):
            posterior = final.laplace(b, structure, precision[b])
            pairs.append((float(posterior.log_evidence()) / posterior.num_data, nll_glm(posterior, s.test)))
        out.evidence[key], out.glm[key] = (np.array(v).reshape(shape) for v in zip(*pairs))
    return out


# -- architecture ------------------------------------------------------------------------------------------------------


@dataclass
class Architectures:
    """Every array [splits, architectures]."""

    evidence: dict[str, np.ndarray]  # per datum, each structure's own precision and noise tuned
    glm: dict[str, np.ndarray]
    map: np.ndarray
    weights: list[int]
    symmetries: np.ndarray  # log of the number of equal modes Π M! 2^M, per datum [architectures]


def architectures(name: str, seeds: Sequence[int], hiddens: Sequence[Sequence[int]], steps: int, rounds: int, rows: int | None) -> Architectures:
    """For every shape: MAP training with precision and noise tuned by Kron's evidence on the way; then every structure's evidence there."""
    splits = [Split.of(name, seed, rows) for seed in seeds]
    evidence: dict[str, list] = {k: [] for k in STRUCTURES}
    glm: dict[str, list] = {k: [] for k in STRUCTURES}
    own, weights = [], []
    for hidden in hiddens:
        stack = Stack([s.train for s in splits], hidden, splits[0].outputs, seeds)
        precision = torch.ones(len(splits), len(hidden) + 1)
        for r in range(rounds):
            stack.train(precision, steps)
            for b in range(len(splits) if r + 1 < rounds else 0):
                posterior = stack.laplace(b, ggn.Kron, precision[b])
                bgn.maximize_evidence(posterior, progress=False)
                precision[b] = posterior.prior.precision.detach().float()
                if not splits[b].classes:
                    stack.log_noise[b] = posterior.likelihood.noise.detach().log().float().reshape(())
        own.append([nll_map(stack.member(b), stack.likelihood(b), s.test) for b, s in enumerate(splits)])
        weights.append(sum(p.numel() for p in stack.member(0).parameters()))
        for key, structure in STRUCTURES.items():
            pairs = []
            for b, s in enumerate(splits):
                posterior = stack.laplace(b, structure, precision[b])
                bgn.maximize_evidence(posterior, progress=False)
                pairs.append((float(posterior.log_evidence()) / posterior.num_data, nll_glm(posterior, s.test)))
            evidence[key].append([e for e, _ in pairs])
            glm[key].append([v for _, v in pairs])
    # Hidden units may change places, and tanh units their signs: as many modes have the same evidence.
    symmetries = np.array([sum(math.lgamma(w + 1) + w * math.log(2) for w in hidden) for hidden in hiddens]) / len(splits[0].train[0])
    tables = [{k: np.array(v).T for k, v in d.items()} for d in (evidence, glm)]
    return Architectures(tables[0], tables[1], np.array(own).T, weights, symmetries)


# -- training tuned by the evidence --------------------------------------------------------------------------------------


METHODS = ("fixed decay", "validation", "evidence: MAP", "evidence: GLM")


def trainings(name: str, seeds: Sequence[int], rows: int, width: int, steps: int) -> dict[str, np.ndarray]:
    """Test NLL, RMSE (in standard deviations of y) and CPU seconds [splits, 3] of each method; all by as many steps of full-batch Adam."""
    splits = [Split.of(name, seed, rows, test=0.1) for seed in seeds]
    out: dict[str, list] = {m: [] for m in METHODS}

    def score(b: int, net: nn.Module, noise: float) -> list[float]:
        likelihood = likelihoods.Gaussian(noise)
        with torch.no_grad():
            rmse = float(metrics.rmse(likelihood.conditional(net(splits[b].test[0])), splits[b].test[1]))
        return [nll_map(net, likelihood, splits[b].test), rmse]

    # A prior precision of 1; the noise is trained with the weights.
    began = time.process_time()
    stack = Stack([s.train for s in splits], [width], 1, seeds)
    stack.train(torch.ones(len(seeds), 1), steps, learn_noise=True)
    seconds = (time.process_time() - began) / len(seeds)
    out["fixed decay"] = [[*score(b, stack.member(b), float(stack.log_noise[b].exp())), seconds] for b in range(len(seeds))]

    # The precision with the least validation error, the noise that error; trained again with the validation data.
    began = time.process_time()
    grid = torch.logspace(-3, 3, 7)
    stack = Stack([s.fit for s in splits for _ in grid], [width], 1, [seed for seed in seeds for _ in grid])
    stack.train(grid.repeat(len(seeds))[:, None], steps, learn_noise=True)
    errors = torch.tensor([
        float((stack.member(b)(splits[b // len(grid)].validation[0]) - splits[b // len(grid)].validation[1]).square().mean())
        for b in range(len(seeds) * len(grid))
    ]).unflatten(0, (len(seeds), len(grid)))  # fmt: skip
    error, best = errors.min(1)
    stack = Stack([s.train for s in splits], [width], 1, seeds)
    stack.train(grid[best][:, None], steps, learn_noise=True)
    seconds = (time.process_time() - began) / len(seeds)
    out["validation"] = [[*score(b, stack.member(b), float(error[b])), seconds] for b in range(len(seeds))]

    for b, seed in enumerate(seeds):
        began = time.process_time()
        net = stack.net(seed)
        model = models.Network(net, models.WeightPrior.per_layer(net, 1.0), ggn.Kron)
        posterior, _ = bgn.train_with_evidence(
            model, likelihoods.Gaussian(0.1), splits[b].train, epochs=steps, lr=0.02, every=steps // 20, burn_in=steps // 4,
            scheduler=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps), batch_size=rows, progress=False,
        )  # fmt: skip
        seconds, own = time.process_time() - began, score(b, net, float(posterior.likelihood.noise))
        out["evidence: MAP"].append([*own, seconds])
        out["evidence: GLM"].append([nll_glm(posterior, splits[b].test), own[1], seconds])
    return {m: np.array(v) for m, v in out.items()}


# -- tables and figures ------------------------------------------------------------------------------------------------


def _panels(count: int, width: float = 2.2, height: float = 1.9) -> tuple[Any, list[Any]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def draw_precision(found: dict[str, Curves], path: Path) -> None:
    """Minus log evidence per datum beside the test NLL, both in nats; a dot where each is least."""
    figure, axes = _panels(len(found))
    for ax, (name, c) in zip(axes, found.items()):
        lines = {k: -v.mean(0) for k, v in c.evidence.items()} | {"test": c.map.mean(0)}
        for key, values in lines.items():
            (line,) = ax.semilogx(c.precision, values, color=COLORS.get(key, "C3"), lw=2 if key == "test" else 1.2)
            ax.plot(c.precision[values.argmin()], values.min(), "o", ms=4, color=line.get_color())
        top, bottom = lines["Full"].max(), min(v.min() for v in lines.values())
        ax.set_ylim(bottom - 0.08 * (top - bottom), top + 0.25 * (top - bottom))
        ax.set_title(name.replace("_", " "), fontsize=8)
    labels = ["-log evidence / N, Full", "Kron", "Diag", "test NLL of MAP"]
    figure.legend(axes[0].get_lines()[::2], labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.supxlabel("prior precision", fontsize=8)
    figure.supylabel("nats per datum", fontsize=8)
    figure.savefig(path, dpi=66)
    plt.close(figure)


def draw_architecture(found: dict[str, Architectures], path: Path) -> None:
    """A point for each shape: its evidence and its test NLL."""
    figure, axes = _panels(len(found), 2.6)
    for ax, (name, a) in zip(axes, found.items()):
        for key, values in a.evidence.items():
            ax.scatter(values.mean(0), a.map.mean(0), s=10 + 6 * np.log(a.weights), color=COLORS[key], alpha=0.7, lw=0)
        ax.set_title(name.replace("_", " "), fontsize=8)
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlim(left=min(a.evidence["Kron"].mean(0).min(), a.evidence["Full"].mean(0).min()) - 0.3)
    handles = [ax.scatter([], [], color=COLORS[k], label=k) for k in STRUCTURES]
    figure.legend(handles, list(STRUCTURES), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.supxlabel("log evidence / N", fontsize=8)
    figure.supylabel("test NLL of MAP", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_training(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Test NLL of every method, less that of the validation-tuned net; every split and the mean."""
    figure, ax = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    shown = [m for m in METHODS if m != "validation"]
    for j, (method, color) in enumerate(zip(shown, ("0.6", "C1", "C0"))):
        for i, rows in enumerate(found.values()):
            gap = rows[method][:, 0] - rows["validation"][:, 0]
            ax.plot([i + 0.2 * (j - 1)] * len(gap), gap, ".", color=color, ms=4, alpha=0.6)
            ax.plot(i + 0.2 * (j - 1), gap.mean(), "_", color=color, ms=12, mew=2.5, label=method if i == 0 else None)
    ax.axhline(0, color="C2", lw=1)
    ax.set_yscale("symlog", linthresh=0.3, linscale=1.5)
    ax.set_yticks([-1, -0.3, 0, 0.3, 1, 3, 10], ["-1", "-0.3", "0", "0.3", "1", "3", "10"], fontsize=8)
    ax.set_xlim(-0.5, len(found) + 0.1)
    ax.text(len(found) + 0.1, 0, "validation", color="C2", fontsize=7, va="bottom", ha="right")
    ax.set_xticks(range(len(found)), [n.replace("_", " ") for n in found], fontsize=7)
    ax.set_ylabel("test NLL less validation's / nats", fontsize=8)
    ax.legend(frameon=False, fontsize=7, loc="lower left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float]], mean: bool = True) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        print(f"| {name.replace('_', ' ')} | {' | '.join(f'{v:.2f}' for v in values)} |")
    if mean and len(rows) > 1:
        print(f"| mean | {' | '.join(f'{v:.2f}' for v in np.mean(list(rows.values()), 0))} |", flush=True)


def ranks(evidence: np.ndarray, nll: np.ndarray) -> float:
    """Mean over splits of the rank correlation between evidence and test log likelihood."""
    return float(np.mean([spearman(e, -v) for e, v in zip(evidence, nll, strict=True)]))


def regret(choice: np.ndarray, nll: np.ndarray) -> float:
    """Test NLL at the choice (the largest entry of each row), less the best of the row: mean over splits."""
    return float(np.mean(nll[np.arange(len(nll)), choice.argmax(1)] - nll.min(1)))


def report_precision(found: dict[str, Curves]) -> dict[str, float]:
    numbers = {}
    rank = {n: [ranks(c.evidence[k], v) for v in (c.map, None) for k in STRUCTURES for v in [c.glm[k] if v is None else v]] for n, c in found.items()}
    _table("Prior precision: rank correlation of evidence and test log likelihood over the grid",
           [*(f"{k}, MAP" for k in STRUCTURES), *(f"{k}, its GLM" for k in STRUCTURES)], rank)  # fmt: skip
    lost = {n: [*(regret(c.evidence[k], c.map) for k in STRUCTURES), regret(-c.validation, c.map)] for n, c in found.items()}
    _table("Prior precision: test NLL of MAP lost by the choice, nats per datum", [*STRUCTURES, "validation"], lost)
    glm = {n: [*(float(np.mean(c.glm[k][range(len(c.map)), c.evidence[k].argmax(1)])) for k in STRUCTURES),
               float(np.mean(c.map[range(len(c.map)), c.evidence["Full"].argmax(1)])),
               float(np.mean(c.map[range(len(c.map)), c.validation.argmin(1)]))] for n, c in found.items()}  # fmt: skip
    _table("Prior precision: test NLL at the choice", [*(f"{k}: GLM" for k in STRUCTURES), "Full: MAP", "validation: MAP"], glm)
    chosen = {n: [*(float(np.exp(np.log(c.precision[c.evidence[k].argmax(1)]).mean())) for k in STRUCTURES),
                  float(np.exp(np.log(c.precision[c.validation.argmin(1)]).mean())),
                  float(np.exp(np.log(c.precision[c.map.argmin(1)]).mean()))] for n, c in found.items()}  # fmt: skip
    _table("Prior precision that is chosen (geometric mean), and the best by test data", [*STRUCTURES, "validation", "test"], chosen, mean=False)
    for i, key in enumerate((*STRUCTURES, "validation")):
        numbers[f"evidence_precision_regret_{key.lower()}"] = float(np.mean([v[i] for v in lost.values()]))
        numbers[f"evidence_precision_worst_regret_{key.lower()}"] = float(np.max([v[i] for v in lost.values()]))
    for i, key in enumerate(STRUCTURES):
        numbers[f"evidence_precision_rank_{key.lower()}"] = float(np.mean([v[i] for v in rank.values()]))
    numbers["evidence_precision_full_beats_validation"] = float(sum(v[0] < v[3] + 1e-9 for v in lost.values()))
    return numbers


def report_architecture(found: dict[str, Architectures]) -> dict[str, float]:
    rank = {n: [*(ranks(a.evidence[k], a.map) for k in STRUCTURES), *(ranks(a.evidence[k], a.glm[k]) for k in STRUCTURES),
                ranks(a.evidence["Full"] + a.symmetries, a.map)] for n, a in found.items()}  # fmt: skip
    columns = [*(f"{k}, MAP" for k in STRUCTURES), *(f"{k}, its GLM" for k in STRUCTURES), "Full × M! 2^M, MAP"]
    _table("Architecture: rank correlation of evidence and test log likelihood over shapes", columns, rank)
    lost = {n: [*(regret(a.evidence[k], a.map) for k in STRUCTURES), regret(a.evidence["Full"] + a.symmetries, a.map),
                float((a.map.mean(1) - a.map.min(1)).mean())] for n, a in found.items()}  # fmt: skip
    _table("Architecture: test NLL of MAP lost by the choice", [*STRUCTURES, "Full × M! 2^M", "any shape"], lost)
    numbers = {f"evidence_architecture_rank_{k.lower()}": float(np.mean([v[i] for v in rank.values()])) for i, k in enumerate(STRUCTURES)}
    glm = {f"evidence_architecture_rank_{k.lower()}_glm": float(np.mean([v[3 + i] for v in rank.values()])) for i, k in enumerate(STRUCTURES)}
    regrets = {f"evidence_architecture_regret_{k.lower()}": float(np.mean([v[i] for v in lost.values()])) for i, k in enumerate(STRUCTURES)}
    regrets["evidence_architecture_regret_any"] = float(np.mean([v[4] for v in lost.values()]))
    # A probability of labels is at most 1: above that, the modes have been counted more than once.
    regrets["evidence_architecture_symmetric_max"] = max(
        [float((a.evidence["Full"] + a.symmetries).max()) for n, a in found.items() if n not in REGRESSION], default=math.nan
    )
    return numbers | glm | regrets


def report_training(found: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    for i, title in enumerate(("NLL", "RMSE / standard deviations of y", "CPU seconds a split")):
        _table(f"Training: test {title}" if i < 2 else f"Training: {title}", METHODS, {n: [float(r[m][:, i].mean()) for m in METHODS] for n, r in found.items()})
    mean = {m: np.array([r[m].mean(0) for r in found.values()]) for m in METHODS}
    return {
        "evidence_training_glm_beats_fixed": float((mean["evidence: GLM"][:, 0] < mean["fixed decay"][:, 0]).sum()),
        "evidence_training_glm_beats_validation": float((mean["evidence: GLM"][:, 0] < mean["validation"][:, 0]).sum()),
        "evidence_training_glm_beats_own_map": float((mean["evidence: GLM"][:, 0] < mean["evidence: MAP"][:, 0]).sum()),
        **{f"evidence_training_{k}_nll": float(mean[m][:, 0].mean()) for k, m in
           (("fixed", METHODS[0]), ("validation", METHODS[1]), ("map", METHODS[2]), ("glm", METHODS[3]))},
        "evidence_training_rmse_ratio_to_validation": float(np.exp(np.log(mean["evidence: MAP"][:, 1] / mean["validation"][:, 1]).mean())),
    }  # fmt: skip


def precision(quick: bool, figures: Path) -> dict[str, float]:
    names = ("glass", "yacht") if quick else ("glass", "ionosphere", "vehicle", "australian", "yacht", "concrete", "wine_quality_red")
    grid = np.logspace(-3, 3, 5 if quick else 9)
    found = {n: precision_curves(n, range(1 if quick else 3), grid, 20, 400 if quick else 1000, 600) for n in names}
    draw_precision(found, figures / "evidence_precision.png")
    return report_precision(found)


def architecture(quick: bool, figures: Path) -> dict[str, float]:
    names = ("glass",) if quick else ("glass", "ionosphere", "yacht", "concrete")
    hiddens: list[tuple[int, ...]] = [(), (3,), (10,), (30,), (3, 3), (10, 10), (30, 30), (10, 10, 10)]
    steps, rounds = (150, 3) if quick else (300, 4)
    found = {n: architectures(n, range(1 if quick else 3), hiddens[:4] if quick else hiddens, steps, rounds, 400) for n in names}
    draw_architecture(found, figures / "evidence_architecture.png")
    return report_architecture(found)


def training(quick: bool, figures: Path) -> dict[str, float]:
    seeds, steps = range(1 if quick else 3), 300 if quick else 1200
    found = {n: trainings(n, seeds, 800, 50, steps) for n in (("yacht",) if quick else REGRESSION)}
    draw_training(found, figures / "evidence_training.png")
    return report_training(found)


def run(quick: bool, figures: Path) -> dict[str, float]:
    """All three; with ``quick`` one or two small sets and one split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return precision(quick, figures) | architecture(quick, figures) | training(quick, figures)
    finally:
        torch.set_num_threads(threads)
