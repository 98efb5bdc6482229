"""What the classification tables and the toys share: data, MAP training, scores, tables, colours."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesgn import datasets, likelihoods, metrics

DTYPE = torch.float64
COLORS = {"MAP": "0.55", "BNN": "C3", "GLM": "C0", "VI-refined": "C2"}


class Split(NamedTuple):
    """A table in three parts; labels [n] from 0, or [n 1] in {0., 1.} where there are two classes (one logit)."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int


def load(name: str, seed: int, most: int) -> Split:
    """70 : 15 : 15, the share of each class kept, inputs standardised by the training part; at most ``most`` data in each part."""
    data = datasets.uci_classification(name, seed, 0.15, dtype=DTYPE)
    x, y, x_val, y_val = datasets.split(data.x_train, data.y_train, 0.15 / 0.85, seed, stratify=True)
    c = int(y.max()) + 1
    parts = [(x[:most], y[:most]) for x, y in ((x, y), (x_val, y_val), data.test)]
    if c == 2:
        parts = [(x, y.to(DTYPE)[:, None]) for x, y in parts]
    return Split(name, *parts, outputs=1 if c == 2 else c)


def likelihood_of(outputs: int) -> likelihoods.Likelihood:
    """Bernoulli for one logit (E[σ(f)] by quadrature), else a softmax whose expectation under a Gaussian is taken over 256 quasi-random points."""
    return likelihoods.Bernoulli() if outputs == 1 else likelihoods.Categorical(predictive=likelihoods.MonteCarlo(256))


def mlp(*sizes: int, seed: int) -> nn.Sequential:
    """tanh between the layers, weights N(0, 1 / inputs), biases 0; drawn from the seed alone."""
    g = torch.Generator().manual_seed(seed)
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o, dtype=DTYPE), nn.Tanh())][:-1]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=DTYPE) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.zeros_like(p))
    return net


def train(net: nn.Module, likelihood: likelihoods.Likelihood, x: Tensor, y: Tensor, δ: float, iterations: int = 300) -> nn.Module:
    """The net at a mode of Σ log p(y|f) − δ/2 |θ|², by L-BFGS on all data; it comes back in eval mode."""
    weights = list(net.parameters())
    opt = torch.optim.LBFGS(weights, max_iter=iterations, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = 0.5 * δ * sum(p.square().sum() for p in weights) - likelihood.log_prob(net(x), y).sum()
        loss.backward()
        return loss

    opt.step(closure)
    opt.zero_grad()
    return net.eval()


def scores(y: Distribution, target: Tensor) -> dict[str, float]:
    """NLL in nats a datum, accuracy, and the calibration error with ten bins."""
    return {
        "nll": float(metrics.nll(y, target)),
        "acc": float(metrics.accuracy(y, target)),
        "ece": float(metrics.ece(y, target, bins=10)),
    }


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    v = np.asarray(values)
    return float(v.mean()), float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(['', *head])} |", f"|{'---|' * (len(head) + 1)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the words on unsettled refinements and on conjugate gradients: what they did is in the numbers."""
    log = logging.getLogger("bayesgn")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.setLevel(level)
