"""Mini-batches: by how much was a digit turned? A regression on images, as the paper's on bone age."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesgn import datasets, ggn, likelihoods, optim

LARGEST = 60.0  # degrees, either way
SCALE = LARGEST / math.sqrt(3)  # standard deviation of the angles: targets are angles in this unit


@dataclass
class Training:
    """Root mean squared errors in degrees after each epoch, and the seconds of the processor spent on training until then."""

    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def turned(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST digits turned by angles drawn evenly from ±60°, at 14 × 14 pixels: x, y, x_test, y_test."""
    d = datasets.mnist(5000)
    return *_turn(d.x_train[:n], 1), *_turn(d.x_test, 2)


def _turn(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    z = (torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) * 2 - 1) * math.sqrt(3)
    angle = z * math.radians(SCALE)
    cos, sin, zero = angle.cos(), angle.sin(), 0 * angle
    A = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    x = nn.functional.grid_sample(x, nn.functional.affine_grid(A, list(x.shape), align_corners=False), align_corners=False)
    return nn.functional.avg_pool2d(x, 2), z[:, None]


def cnn(seed: int) -> nn.Sequential:
    """26,401 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip


def train(method: str, data: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, epochs: int, lr: float, batch: int = 128) -> Training:
    """Mini-batches of 128, the learning rate along a cosine to zero."""
    x, y, x_test, y_test = data
    net, g, out = cnn(seed), torch.Generator().manual_seed(seed), Training()
    opt: torch.optim.Optimizer
    if method == "GGN":
        opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), structure=ggn.Gram, damping=optim.Constant(0.01), lr=lr)
    elif method == "Adam":
        opt = torch.optim.Adam(net.parameters(), lr=lr)
    else:
        opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    spent = 0.0
    for _ in range(epochs):
        began = time.process_time()
        for rows in torch.randperm(len(x), generator=g).split(batch):
            if isinstance(opt, optim.GaussNewton):
                opt.step(x[rows], y[rows])
            else:
                opt.zero_grad()
                (0.5 * (net(x[rows]) - y[rows]).square().mean()).backward()
                opt.step()
            schedule.step()
        spent += time.process_time() - began
        out.seconds.append(spent)
        with torch.no_grad():
            out.train.append(SCALE * float((net(x) - y).square().mean().sqrt()))
            out.test.append(SCALE * float((net(x_test) - y_test).square().mean().sqrt()))
    return out
