"""`make demo` (`python -m bayesgn.demo`): Laplace on a small net for hand-written digits, in seconds.

A net learns to tell the digits 0 to 7 apart; the digits 8 and 9 are kept from it and stand for inputs of another kind. The same trained net is then
judged three times: as it is (MAP), and as a Bayesian net through `bayesgn.laplace` in function space and in weight space.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.utils.data import DataLoader, TensorDataset

import bayesgn as bgn
from bayesgn import datasets, metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOWN = 8  # the digits 0 to 7 are learnt


def build(seed: int) -> nn.Sequential:
    """64 pixels → 64 → 64 → 8 logits, initialised from `seed` without touching torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, KNOWN))


def train(net: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Plain training, as it would be anywhere: Adam on the cross-entropy. Nothing here knows of bayesgn."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.eval()


def data(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(training pair, test pair) of the digits 0 to 7, and the held-out images of 8 and 9."""
    digits = datasets.digits(seed=seed)
    known, known_test = digits.y_train < KNOWN, digits.y_test < KNOWN
    return (
        (digits.x_train[known], digits.y_train[known]),
        (digits.x_test[known_test], digits.y_test[known_test]),
        torch.cat([digits.x_train[~known], digits.x_test[~known_test]]),
    )


def draw(views: dict[str, tuple[Distribution, Distribution]], target: Tensor) -> Figure:
    """Reliability of every view, and the confidence of the first and the second on known and unknown digits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bayesgn import plots

    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    left, *others = figure.subplots(1, 3)
    plots.reliability_diagram({name: known for name, (known, _) in views.items()}, target, ax=left)
    left.set_title("digits 0 to 7")
    for (name, (known, unknown)), ax in zip(views.items(), others):
        plots.confidence_histogram(known, unknown, title=f"{name}: 0 to 7 against unknown 8 and 9", ax=ax)
        ax.set_ylim(0, 1)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train, fit, tune, print and draw."""
    parser = argparse.ArgumentParser(prog="python -m bayesgn.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bayesgn_demo.png"), help="where to save the figure")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of plain training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights, the batches and the samples")
    options = parser.parse_args(arguments)

    (x, y), (x_test, y_test), x_other = data(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, generator=generator)
    print(f"digits 0 to 7: {len(x)} to train, {len(x_test)} to test; {len(x_other)} unknown digits 8 and 9")

    start = time.perf_counter()
    net = build(options.seed)
    train(net, loader, options.epochs)
    print(f"trained a net of {sum(p.numel() for p in net.parameters()):,} weights in {time.perf_counter() - start:.1f} s")

    start = time.perf_counter()
    model = bgn.models.Network(net, prior=bgn.models.WeightPrior(1.0), structure=bgn.ggn.Kron)
    posterior = bgn.laplace(model, bgn.likelihoods.Categorical(), (x, y))
    fitted, before = time.perf_counter(), float(posterior.log_evidence())
    bgn.maximize_evidence(posterior)
    tuned, after = time.perf_counter(), float(posterior.log_evidence())
    print(f"fitted Laplace (Kron) in {fitted - start:.2f} s")
    print(f"tuned the prior in {tuned - fitted:.2f} s: log evidence {before:.1f} -> {after:.1f} nats")

    likelihood = posterior.likelihood
    with torch.no_grad():
        views = {
            "MAP": (Categorical(logits=net(x_test)), Categorical(logits=net(x_other))),
            "Laplace, function space": (likelihood(posterior(x_test)), likelihood(posterior(x_other))),
            "Laplace, weight space": tuple(
                likelihood(posterior.sample_outputs(inputs, 200, generator=generator)) for inputs in (x_test, x_other)
            ),
        }
    print(f"\n{'':24} {'accuracy':>9} {'NLL/nats':>9} {'ECE':>8} {'OOD-AUROC':>10}")
    scores = {name: metrics.summary([(known, y_test)], ood=[unknown]) for name, (known, unknown) in views.items()}
    for name, s in scores.items():
        print(f"{name:24} {s['accuracy']:9.2%} {s['nll']:9.4f} {s['ece']:8.2%} {s['auroc_ood']:10.4f}")
    if scores["Laplace, function space"]["nll"] > scores["MAP"]["nll"]:
        print("On these test data the MAP net has the better NLL: `bayesgn.tune` sets the prior on validation data instead.")

    draw(views, y_test).savefig(options.output)
    print(f"\nfigure: {options.output.resolve()}")


if __name__ == "__main__":
    main()
