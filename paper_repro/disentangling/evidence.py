"""The evidence beside held-out data: for the prior precision, for the architecture, and as what tunes a training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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
    turned = lambda table: np.array(table).T
    return Architectures({k: turned(v) for k, v in evidence.items()}, {k: turned(v) for k, v in glm.items()}, turned(own), weights)


# -- training tuned by the evidence --------------------------------------------------------------------------------------


METHODS = ("fixed decay", "validation", "evidence: MAP", "evidence: GLM")


def trainings(name: str, seeds: Sequence[int], rows: int, width: int, steps: int, epochs: int) -> dict[str, np.ndarray]:
    """Test NLL, RMSE (in standard deviations of y) and CPU seconds [splits, 3] of each method."""
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
            model, likelihoods.Gaussian(0.1), splits[b].train, epochs, lr=0.01, every=10, burn_in=epochs // 5, batch_size=128,
            scheduler=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs),
            generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        seconds, own = time.process_time() - began, score(b, net, float(posterior.likelihood.noise))
        out["evidence: MAP"].append([*own, seconds])
        out["evidence: GLM"].append([nll_glm(posterior, splits[b].test), own[1], seconds])
    return {m: np.array(v) for m, v in out.items()}
