"""Full batch: a wide net with two layers in the scaling of the neural tangent kernel, square loss, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, optim

DATA, INPUTS = 50, 10
ROUNDING = 1e-26  # losses below say nothing of a rate


class TwoLayers(nn.Module):
    """f(x) = 1/√m Σ_r a_r softplus(w_rᵀx): w_r ~ N(0, I) are trained, a_r = ±1 are not."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, INPUTS, generator=generator, dtype=torch.float64))
        self.a: Tensor
        self.register_buffer("a", 2.0 * torch.randint(0, 2, (width, 1), generator=generator) - 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x @ self.W.mT) @ self.a.double() / math.sqrt(len(self.a))


@dataclass
class Descent:
    """Mean squared errors after each step (the first: before any), and how far the weights went, ‖W − W₀‖ / ‖W₀‖."""

    losses: list[float]
    moved: float

    def order(self) -> float:
        """q of loss_{t+1} ∝ loss_t^q, by the last three losses above rounding."""
        a, b, c = [loss for loss in self.losses if loss > ROUNDING][-3:]
        return math.log(c / b) / math.log(b / a)

    def constant(self) -> float:
        """C = max loss_{t+1} / loss_t² over the steps that end above rounding."""
        return max(b / a**2 for a, b in zip(self.losses, self.losses[1:]) if b > ROUNDING)


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Random labels on the unit sphere: nothing to generalise, all to fit."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(DATA, INPUTS, generator=g, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True), torch.randn(DATA, 1, generator=g, dtype=torch.float64)


def gram_gauss_newton(width: int, seed: int, steps: int = 8, damping: float = 1e-10) -> Descent:
    """δ = −Jᵀ (JJᵀ + N λ)⁻¹ (f − y), 50 unknowns whatever the width; λ is about as small as rounding allows."""
    x, y = data(seed)
    net = TwoLayers(width, torch.Generator().manual_seed(1000 + seed))
    start = net.W.detach().clone()
    opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), structure=ggn.Gram, damping=optim.Constant(damping))
    losses = [_loss(net, x, y)]
    for _ in range(steps):
        opt.step(x, y)
        losses.append(_loss(net, x, y))
    return Descent(losses, float((net.W.detach() - start).norm() / start.norm()))


def gradient_descent(width: int, seed: int, steps: int) -> Descent:
    """Steps of 1/λ_max of the kernel: the longest safe ones."""
    x, y = data(seed)
    net = TwoLayers(width, torch.Generator().manual_seed(1000 + seed))
    start = net.W.detach().clone()
    opt = torch.optim.SGD(net.parameters(), lr=1 / _largest(net, x))
    losses = [_loss(net, x, y)]
    for _ in range(steps):
        opt.zero_grad()
        (0.5 * (net(x) - y).square().mean()).backward()
        opt.step()
        losses.append(_loss(net, x, y))
    return Descent(losses, float((net.W.detach() - start).norm() / start.norm()))


@torch.no_grad()
def _loss(net: TwoLayers, x: Tensor, y: Tensor) -> float:
    return float((net(x) - y).square().mean())


@torch.no_grad()
def _largest(net: TwoLayers, x: Tensor) -> float:
    # ∂f/∂w_r = a_r σ'(w_rᵀx) x / √m, thus JJᵀ = (xxᵀ) ∘ (σ'σ'ᵀ)/m.
    slope = torch.sigmoid(x @ net.W.mT)
    return float(torch.linalg.eigvalsh((x @ x.mT) * (slope @ slope.mT) / len(net.a) / len(x))[-1])
