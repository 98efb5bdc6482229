"""Digits and clothes: what a posterior tuned by the evidence does in distribution and out of it, beside MAP with a temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, metrics, models
from bayesgn.inference.temperature import fit_temperature

OUTSIDE = ("turned by 90°", "shuffled patches", "noise", "the other set")
SCORES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
Rows = dict[str, dict[str, float]]


@dataclass
class Images:
    """Training, validation (for temperature and precision) and test images, and images from elsewhere."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outside: dict[str, Tensor]


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image's 16 patches of 7 × 7 in another order."""
    patches = nn.functional.unfold(x, 7, stride=7)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in x])
    return nn.functional.fold(patches.gather(2, order[:, None].expand_as(patches)), 28, 7, stride=7)


def load(name: str, n: int, seed: int) -> Images:
    """n training images of which an eighth is kept for validation; up to 1,000 to test on."""
    sets: dict[str, Callable[[], datasets.Dataset]] = {
        "MNIST": lambda: datasets.mnist(5000, seed=seed), "Fashion-MNIST": lambda: datasets.fashion_mnist(5000),
    }  # fmt: skip
    data, g = sets[name](), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.x_train), generator=g)[:n]
    x, y, held = data.x_train[order], data.y_train[order], n // 8
    x_test, y_test = data.x_test[:1000][: n // 4], data.y_test[:1000][: n // 4]
    x_out = x_test[:500]
    outside = {"turned by 90°": x_out.rot90(1, (2, 3)), "shuffled patches": shuffled(x_out, g), "noise": torch.rand(x_out.shape, generator=g)}
    try:
        other = sets["Fashion-MNIST" if name == "MNIST" else "MNIST"]()
        outside["the other set"] = other.x_test[: len(x_out)]
    except datasets.DatasetUnavailable:
        pass
    return Images(name, (x[held:], y[held:]), (x[:held], y[:held]), (x_test, y_test), outside)


def cnn(seed: int) -> nn.Sequential:
    """20,522 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        ).eval()  # fmt: skip


def train_map(net: nn.Module, data: tuple[Tensor, Tensor], precision: float, epochs: int, seed: int) -> None:
    """Adam on the mean loss with the fixed prior precision: a weight decay of precision/N."""
    x, y = data
    opt, g = torch.optim.Adam(net.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(64):
            opt.zero_grad()
            decay = sum(p.square().sum() for p in net.parameters())
            (nn.functional.cross_entropy(net(x[rows]), y[rows]) + 0.5 * precision / len(x) * decay).backward()
            opt.step()
    net.eval()


def moments(posterior: models.NetworkPosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n c] and covariance [n c c] of the functions, in batches."""
    with torch.no_grad():
        parts = [posterior(part).marginals() for part in x.split(250)]
    return torch.cat([m for m, _ in parts]), torch.cat([c for _, c in parts])


def rows_of(title: str, posterior: models.NetworkPosterior, images: Images, with_map: bool) -> Rows:
    """Scores of the net (with and without temperature) and of the posterior: in distribution, and AUROC of telling other images."""
    likelihood = posterior.likelihood
    inside, y = moments(posterior, images.test[0]), images.test[1]
    outside = {name: moments(posterior, x) for name, x in images.outside.items()}
    tempered = fit_temperature(likelihood, moments(posterior, images.validation[0])[0], images.validation[1])
    views = {f"{title}: MAP": lambda m, c: likelihood.conditional(m), f"{title}: MAP + temperature": lambda m, c: tempered.conditional(m)}
    views = views if with_map else {}
    views[f"{title}: GLM" if with_map else title] = lambda m, c: likelihood.predict(m, c)
    out = {}
    for name, view in views.items():
        p = view(*inside)
        row = {"accuracy": float(metrics.accuracy(p, y)), "nll": float(metrics.nll(p, y)), "ece": float(metrics.ece(p, y))}
        for where, f in outside.items():
            row[f"entropy: {where}"] = float(metrics.auroc_ood(metrics.entropy(p), metrics.entropy(view(*f))))
            if not name.endswith(("MAP", "temperature")):
                row[f"variance: {where}"] = float(metrics.auroc_ood(trace(inside[1]), trace(f[1])))
        out[name] = row
    return out


def trace(cov: Tensor) -> Tensor:
    return cov.diagonal(dim1=1, dim2=2).sum(1)


def compare(images: Images, seed: int, epochs: int) -> Rows:
    """A net with a fixed weight decay and one trained with evidence, and their posteriors."""
    likelihood = likelihoods.Categorical()
    fixed = cnn(seed)
    train_map(fixed, images.train, 1.0, epochs, seed)
    posterior = bgn.laplace(models.Network(fixed, models.WeightPrior(1.0), ggn.Kron), likelihood, images.train, progress=False)
    bgn.maximize_evidence(posterior, progress=False)
    rows = rows_of("fixed decay", posterior, images, True)
    bgn.tune(posterior, images.validation, points=7, progress=False)
    rows |= rows_of("fixed decay: GLM by validation", posterior, images, False)

    net = cnn(seed)
    model = models.Network(net, models.WeightPrior.per_layer(net, 1.0), ggn.Kron)
    g = torch.Generator().manual_seed(seed)
    trained, _ = bgn.train_with_evidence(
        model, likelihood, images.train, epochs=epochs, every=5, burn_in=epochs // 4, generator=g, progress=False
    )
    rows |= rows_of("evidence", trained, images, True)
    bgn.tune(trained, images.validation, points=7, progress=False)
    rows |= rows_of("evidence: GLM by validation", trained, images, False)
    return rows


# -- tables and figures ------------------------------------------------------------------------------------------------


def mean_of(runs: list[Rows]) -> Rows:
    return {name: {key: float(np.mean([r[name][key] for r in runs])) for key in row} for name, row in runs[0].items()}


def table(title: str, rows: Rows) -> None:
    where = [w for w in OUTSIDE if f"entropy: {w}" in next(iter(rows.values()))]
    print(f"\n{title}: AUROC by the predictive's entropy / the functions' variance\n")
    print(f"| | {' | '.join([*SCORES.values(), *where])} |\n|{'---|' * (4 + len(where))}")
    for name, row in rows.items():
        auroc = [f"{row[f'entropy: {w}']:.3f}" + (f" / {row[f'variance: {w}']:.3f}" if f"variance: {w}" in row else "") for w in where]
        print(f"| {name} | {row['accuracy']:.3f} | {row['nll']:.3f} | {row['ece']:.3f} | {' | '.join(auroc)} |", flush=True)


def draw(found: dict[str, list[Rows]], path: Path) -> None:
    """A point for each seed and the mean: NLL, ECE and the AUROC by entropy (mean over the other images); one row of panels a set."""
    figure, axes = plt.subplots(len(found), 3, figsize=(8, 0.4 + 2.1 * len(found)), sharey=True, layout="constrained", squeeze=False)
    for line, (title, runs) in zip(axes, found.items()):
        names = list(runs[0])
        for ax, key, label in zip(line, ("nll", "ece", "entropy"), ("NLL", "ECE", "AUROC by entropy")):
            for i, name in enumerate(reversed(names)):
                values = [np.mean([v for k, v in r[name].items() if k.startswith(key)]) for r in runs]
                color = "0.5" if "MAP" in name else "C2" if "validation" in name else "C0"
                ax.plot(values, [i] * len(values), ".", color=color, ms=4, alpha=0.6)
                ax.plot(np.mean(values), i, "|", color=color, ms=11, mew=2.5)
            ax.set_xlabel(label, fontsize=8)
            ax.set_yticks(range(len(names)), names[::-1], fontsize=7)
            ax.tick_params(axis="x", labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", lw=0.3)
        line[0].set_title(title, fontsize=8, loc="left")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def numbers_of(prefix: str, rows: Rows) -> dict[str, float]:
    short = {"fixed decay: MAP": "map", "fixed decay: MAP + temperature": "map_temperature", "fixed decay: GLM": "glm", "fixed decay: GLM by validation":
             "glm_validation", "evidence: MAP": "trained_map", "evidence: MAP + temperature": "trained_map_temperature", "evidence: GLM": "trained_glm",
             "evidence: GLM by validation": "trained_glm_validation"}  # fmt: skip
    out = {}
    for name, key in short.items():
        out |= {f"images_{prefix}_{score}_{key}": rows[name][score] for score in SCORES}
        # (Always the same three kinds of other images: the other set is not everywhere.)
        for by in ("entropy", "variance"):
            values = [rows[name][f"{by}: {w}"] for w in OUTSIDE[:3] if f"{by}: {w}" in rows[name]]
            out |= {f"images_{prefix}_auroc_{by}_{key}": float(np.mean(values))} if values else {}
            if f"{by}: {OUTSIDE[3]}" in rows[name]:
                out[f"images_{prefix}_auroc_{by}_other_set_{key}"] = rows[name][f"{by}: {OUTSIDE[3]}"]
    return out


def run(quick: bool, figures: Path) -> dict[str, float]:
    """MNIST, and Fashion-MNIST where it is to be had."""
    threads, numbers, found = torch.get_num_threads(), {}, {}
    torch.set_num_threads(1)
    try:
        for name, seeds in {"MNIST": 1 if quick else 3, "Fashion-MNIST": 0 if quick else 2}.items():
            try:
                runs = [compare(load(name, 600 if quick else 4000, seed), seed, 8 if quick else 20) for seed in range(seeds)]
            except datasets.DatasetUnavailable as error:
                print(f"{name} is left out: {error}")
                continue
            if runs:
                found[name] = runs
                table(name, mean_of(runs))
                numbers |= numbers_of("mnist" if name == "MNIST" else "fashion", mean_of(runs))
    finally:
        torch.set_num_threads(threads)
    draw(found, figures / "images_scores.png")
    return numbers
