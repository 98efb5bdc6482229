"""Small problems, each trained on all its data at once: the noisy sine of the paper, two tables, and the digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesgn import datasets, ggn, likelihoods
from bayesgn.ggn import Structure
from bayesgn.likelihoods import Likelihood

NOISE = 0.0033  # variance of the sine's noise: the floor of its squared error


@dataclass
class Problem:
    """A net to be trained to a loss.

    Attributes:
        name: for tables.
        x, y: all training data.
        net: seed ↦ a new net.
        target: the mean loss to reach: mean squared error, or cross-entropy in nats.
        structure: of H for Levenberg-Marquardt.
        sgd, adam: learning rates, the best of a grid on seed 0.
        test: held-out data.
    """

    name: str
    x: Tensor
    y: Tensor
    net: Callable[[int], nn.Module]
    target: float
    structure: type[Structure] | Structure = ggn.Full
    sgd: float = 0.1
    adam: float = 0.01
    test: tuple[Tensor, Tensor] | None = None

    @property
    def classes(self) -> bool:
        """Whether y are classes."""
        return not self.y.is_floating_point()

    def likelihood(self) -> Likelihood:
        """Cross-entropy, or half the squared error."""
        return likelihoods.Categorical() if self.classes else likelihoods.Gaussian(1.0)

    def loss(self, net: nn.Module) -> Tensor:
        """The mean loss as torch writes it."""
        f = net(self.x)
        return nn.functional.cross_entropy(f, self.y) if self.classes else nn.functional.mse_loss(f, self.y)

    def of(self, mean: float) -> float:
        """The same from the mean of −log p: (f − y)²/2 + ½ log 2π is half the squared error."""
        return mean if self.classes else 2 * (mean - 0.5 * math.log(2 * math.pi))

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of right classes among the held-out data."""
        if self.test is None or not self.classes:
            return math.nan
        return float((net(self.test[0]).argmax(-1) == self.test[1]).float().mean())


def mlp(seed: int, *sizes: int) -> nn.Sequential:
    """Linear layers with tanh between, as torch draws them from ``seed``."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(seed: int) -> nn.Sequential:
    """666 weights on 8 × 8 digits."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def sine(n: int = 200) -> Problem:
    """y = sin(2πx) + noise on [−1, 1] by 1-10-1: 31 weights. The target is the noise floor, to 10 %."""
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, n)[:, None]
    y = torch.sin(2 * math.pi * x) + math.sqrt(NOISE) * torch.randn(n, 1, generator=g)
    return Problem("sine", x, y, lambda seed: mlp(seed, 1, 10, 1), 1.1 * NOISE, sgd=0.3, adam=0.03)


def table(name: str, target: float, sgd: float, adam: float = 0.1) -> Problem:
    """A UCI regression by d-10-1, standardised: the target is a share of the variance of y."""
    d = datasets.uci_regression(name)
    return Problem(name, *d.train, lambda seed: mlp(seed, d.x_train.shape[1], 10, 1), target, sgd=sgd, adam=adam, test=d.test)


def classes(name: str, target: float, sgd: float = 1.0, adam: float = 0.1) -> Problem:
    """A UCI classification by d-10-c."""
    d = datasets.uci_classification(name, split_seed=0)
    c = int(d.y_train.max()) + 1
    return Problem(name, *d.train, lambda seed: mlp(seed, d.x_train.shape[1], 10, c), target, sgd=sgd, adam=adam, test=d.test)


def digits(net: str, n: int | None = None) -> Problem:
    """The 8 × 8 digits by 64-16-10 (1,210 weights), or by a CNN of 666 weights."""
    d = datasets.digits(test_fraction=0.2)
    x, y = d.x_train[:n], d.y_train[:n]
    if net == "CNN":
        return Problem("digits CNN", x, y, cnn, 1e-3, ggn.Layerwise, sgd=1.0, adam=0.1, test=d.test)
    return Problem("digits MLP", x, y, lambda seed: mlp(seed, 64, 16, 10), 1e-3, sgd=1.0, adam=0.1, test=d.test)
