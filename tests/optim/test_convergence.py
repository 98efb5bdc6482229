"""Gauss-Newton trains small nets to where the published experiments say it does, in few steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bayesgn import datasets, ggn, likelihoods, optim

NOISE = 0.0033


def noisy_sine() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 200)[:, None]
    return x, torch.sin(2 * math.pi * x) + math.sqrt(NOISE) * torch.randn(200, 1, generator=g)


def mlp(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def improved() -> dict:
    """The method of Pooladzandi and Zhou by arguments."""
    return {
        "damping": optim.LevenbergMarquardt(1e-2, uphill=1.0),
        "scaling": optim.RunningMax(),
        "momentum": optim.Adaptive(),
        "line_search": optim.Backtracking(),
    }


@pytest.mark.parametrize("seed", range(5))
def test_sine_falls_below_a_tenth_within_fifty_steps(seed):
    x, y = noisy_sine()
    net = mlp(seed, 1, 10, 1)
    opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), **improved())
    assert float((net(x) - y).detach().square().mean()) > 0.4
    first = next((i for i in range(50) if _after(opt, net, x, y) < 0.1), None)
    assert first is not None and first < 25


def _after(opt: optim.GaussNewton, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    opt.step(x, y)
    with torch.no_grad():
        return float((net(x) - y).square().mean())


def test_sine_falls_to_the_noise():
    x, y = noisy_sine()
    grid = torch.linspace(-0.95, 0.95, 333)[:, None]
    for seed in range(3):
        net = mlp(seed, 1, 10, 1)
        opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0))
        error = min(_after(opt, net, x, y) for _ in range(40))
        assert 0.75 * NOISE < error < 1.1 * NOISE  # the floor itself, not an interpolation of the noise
        with torch.no_grad():
            assert float((net(grid) - torch.sin(2 * math.pi * grid)).square().mean()) < NOISE  # what was learnt is the sine


def test_digits_are_learnt_in_twelve_steps():
    data = datasets.digits(test_fraction=0.2)
    x, y = data.x_train[:300], data.y_train[:300]
    net = mlp(0, 64, 16, 10)
    opt = optim.GaussNewton(net, likelihoods.Categorical(), structure=ggn.MatrixFree(tol=0.1, iterations=20), damping=optim.LevenbergMarquardt(1e-2))
    steps = 0
    while nn.functional.cross_entropy(net(x), y) > 1e-3:
        opt.step(x, y)
        steps += 1
        assert steps <= 12, f"cross-entropy {nn.functional.cross_entropy(net(x), y):.2g} after 12 steps"
    assert (net(data.x_test).argmax(-1) == data.y_test).float().mean() > 0.9


def test_the_loss_never_rises_on_accepted_downhill_steps():
    data = datasets.digits(test_fraction=0.2)
    x, y = data.x_train[:150], data.y_train[:150]
    net = mlp(1, 64, 8, 10)
    opt = optim.GaussNewton(net, likelihoods.Categorical(), structure=ggn.Layerwise, damping=optim.LevenbergMarquardt(1e-2))
    losses = [float(opt.step(x, y)) for _ in range(8)]
    assert all(b <= a for a, b in zip(losses, losses[1:]))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("damping, squares", [(1e-10, True), (1e-2, False)])
def test_a_wide_net_squares_its_loss(damping, squares):
    # 200 weights for each of 20 random labels, the output layer fixed: with almost no damping loss_{t+1} ≈ C loss_t² (Cai et al. 2019, theorem 1);
    # with more the rate is linear.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=g, dtype=torch.float64)
    x, y = x / x.norm(dim=1, keepdim=True), torch.randn(20, 1, generator=g, dtype=torch.float64)
    first, last = nn.Linear(5, 800, bias=False).double(), nn.Linear(800, 1, bias=False).double().requires_grad_(False)
    with torch.no_grad():
        first.weight.copy_(torch.randn(800, 5, generator=g, dtype=torch.float64))
        last.weight.copy_((2.0 * torch.randint(0, 2, (1, 800), generator=g) - 1) / math.sqrt(800))
    net = nn.Sequential(first, nn.Softplus(), last)
    opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), structure=ggn.Gram, damping=optim.Constant(damping))

    def loss() -> float:
        with torch.no_grad():
            return float((net(x) - y).square().mean())

    losses = [loss()]
    for _ in range(5):
        opt.step(x, y)
        losses.append(loss())
    a, b, c = [v for v in losses if v > 1e-26][-3:]
    order = math.log(c / b) / math.log(b / a)
    assert order > 1.8 if squares else order < 1.3, losses
    assert (losses[-1] < 1e-18) == squares
