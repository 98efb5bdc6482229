"""The six matrices M of a network's mean loss, dense and by torch.func alone: what the optimizer's steps are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

DTYPE = torch.float64
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """A likelihood of one datum: −log p(y|f) up to a constant, and labels [m …] with their probabilities [m] at f [c]."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    labels: Draw
    c: int

    def fisher(self, f: Tensor) -> Tensor:
        """Σ_y p(y|f) g gᵀ."""
        y, p = self.labels(f)
        g = torch.func.vmap(torch.func.grad(self.loss), (None, 0))(f, y)
        return g.mT @ (p[:, None] * g)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """A label for each row of f [n c]."""
        y, p = torch.func.vmap(self.labels)(f)
        chosen = torch.multinomial(p, 1, generator=generator)[:, 0]
        return y[torch.arange(len(f)), chosen]


def _normal_grid(f: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-8, 8, 65, dtype=DTYPE)  # the trapezoidal rule is exact to rounding for a normal
    p = (-z.square() / 2).exp()
    return f + z[:, None], p / p.sum()


def _heteroscedastic_grid(f: Tensor) -> tuple[Tensor, Tensor]:
    y, p = _normal_grid(torch.zeros_like(f[:1]))
    return f[:1] + (f[1:] / 2).exp() * y, p


def _student_grid(f: Tensor) -> tuple[Tensor, Tensor]:
    u = (torch.arange(64, dtype=DTYPE) + 0.5) * (math.pi / 64) - math.pi / 2  # y = f + s √ν tan u has the density cos⁴ u for ν = 5
    return f + 0.5 * 5**0.5 * u.tan()[:, None], u.cos() ** 4 / (u.cos() ** 4).sum()


def _bernoulli_grid(f: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.0], [1.0]], dtype=DTYPE), torch.cat([torch.sigmoid(-f), torch.sigmoid(f)])


FAMILIES = {
    family.name: family
    for family in (
        Family("Gaussian", lambda f, y: 0.5 * (f - y).square().sum(), _normal_grid, 1),
        Family("Bernoulli", lambda f, y: F.binary_cross_entropy_with_logits(f, y), _bernoulli_grid, 1),
        Family("softmax", lambda f, y: F.cross_entropy(f, y), lambda f: (torch.arange(3), f.softmax(-1)), 3),
        Family("Student-t", lambda f, y: -td.StudentT(5.0, f, 0.5, validate_args=False).log_prob(y).sum(), _student_grid, 1),
        Family("heteroscedastic", lambda f, y: -td.Normal(f[:1], (f[1:] / 2).exp(), validate_args=False).log_prob(y).sum(), _heteroscedastic_grid, 2),
    )
}


class Dense:
    """Everything at a net's present weights θ [p] and data."""

    def __init__(self, family: Family, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.family, self.net, self.x, self.y = family, net, x, y
        self.θ = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        self.J = torch.func.jacrev(self.f)(self.θ)
        self.gradient = torch.func.grad(self.loss)(self.θ)

    def f(self, θ: Tensor) -> Tensor:
        own = dict(self.net.named_parameters())
        parts = θ.split([p.numel() for p in own.values()])
        return torch.func.functional_call(self.net, {n: t.reshape(p.shape) for (n, p), t in zip(own.items(), parts)}, (self.x,))

    def loss(self, θ: Tensor) -> Tensor:
        return torch.func.vmap(self.family.loss)(self.f(θ), self.y).mean()

    def mean(self, Λ: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """1/N Σ JᵀΛJ."""
        matrices = torch.stack([Λ(f, y) for f, y in zip(self.f(self.θ).detach(), self.y)])
        return (self.J.mT @ matrices @ self.J).mean(0)

    def bent(self, f: Tensor, y: Tensor) -> Tensor:
        """∂²(−log p)/∂f², negative eigenvalues set to zero."""
        return eig(lambda λ: λ.clamp_min(0), torch.func.hessian(self.family.loss)(f, y))

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(self.family.loss)(f, y)

    def matrix(self, method: str) -> Tensor:
        """M [p p]."""
        match method:
            case "gradient descent":
                return torch.eye(len(self.θ), dtype=DTYPE)
            case "classical Gauss-Newton":
                return self.mean(lambda f, y: torch.eye(len(f), dtype=DTYPE))
            case "generalised Gauss-Newton":
                return self.mean(self.bent)
            case "natural gradient":
                return self.mean(lambda f, y: self.family.fisher(f))
            case "gradient covariance":
                return self.mean(lambda f, y: self.slope(f, y)[:, None] * self.slope(f, y))
            case "Newton":  # |∂²loss|; where the loss is not convex in f, of its convex part
                indefinite = self.mean(lambda f, y: self.bent(f, y) - torch.func.hessian(self.family.loss)(f, y))
                return eig(torch.abs, torch.func.hessian(self.loss)(self.θ) + indefinite)
        raise ValueError(f"{method!r} is none of the six methods.")

    def step(self, method: str, damping: float) -> Tensor:
        """−(M + damping)⁻¹ ∂loss."""
        M = self.matrix(method)
        return -torch.linalg.solve(M + damping * torch.eye(len(M), dtype=DTYPE), self.gradient)


def eig(f: Callable[[Tensor], Tensor], H: Tensor) -> Tensor:
    """V f(λ) Vᵀ."""
    λ, V = torch.linalg.eigh(H)
    return V @ torch.diag(f(λ)) @ V.mT
