"""Sites as a fixed point of their rule: how it is reached, and how the evidence there moves with the hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn.inference.step_size import StepSize, change_of
from bayesgn.rules import Sites

SMALLEST = 2.0**-6  # of a step that ends in NaN
LEAST, SHARE = 1e-8, 1e-3  # of the evidence and of the slope at fixed sites: how well the second term of the slope is worked out


class Settled(NamedTuple):
    """A posterior at (or near) the fixed point, turns taken, and how far the last one moved a marginal, in standard deviations."""

    posterior: Any
    turns: int
    change: float


def settle(posterior: Any, tol: float, most: int) -> Settled:
    """Turns of the rule until no marginal moves by more than ``tol`` standard deviations; at most so many.

    The steps are whole, and follow the moves as in ``bgn.bayes_newton``; nothing else is judged: where hyper-parameters moved a little, sites do.

    Raises:
        FloatingPointError: where even small steps end in NaN.
    """
    size, change, taken = StepSize(1.0, True), math.inf, 0
    before = posterior.marginals()
    while taken < most:
        taken += 1
        lr = size.begin()
        new, _ = posterior.turn(lr, generator=seeded(posterior))
        after = new.marginals()
        change = change_of(before, after)
        if not math.isfinite(change):
            if lr <= SMALLEST:
                raise FloatingPointError(f"a turn of {posterior.rule!r} gives means that are not finite, also with a step size of {lr:g}")
            size = StepSize(0.25 * lr, True)
            continue
        size.end(lr, before, after, whole=True)
        posterior, before = new, after
        if change <= tol * lr:
            break
    return Settled(posterior, taken, change)


def seeded(posterior: Any) -> torch.Generator | None:
    """For a curvature that draws: the same draws at every turn, so that a fixed point exists."""
    if not posterior.rule.curvature.random:
        return None
    return torch.Generator(posterior.sites.nat1.device).manual_seed(0)


class EvidenceGradient(NamedTuple):
    """The evidence, its gradient in each parameter, what the sites' own motion may add to it in nats, and products that it took."""

    value: float
    gradient: list[Tensor]
    beyond: float
    products: int


def evidence_gradient(posterior: Any, parameters: list, size: Callable[[list[Tensor]], float], extra: Tensor | None = None) -> EvidenceGradient:
    """The evidence E(θ, s) at the sites s = F(s, θ) that the rule F gives for hyper-parameters θ, and its total derivative

        dE/dθ = ∂E/∂θ + vᵀ ∂F/∂θ,   (I − ∂F/∂s)ᵀ v = ∂E/∂s

    The second term is nought where the evidence is stationary in the sites, as for VI and EP with the exact curvature. It is not for
    Laplace's method (Λ follows the mode), nor where another curvature stands for the exact one. Its system is solved by GMRES, a
    product with (∂F/∂s)ᵀ each time, and only as well as the first term is large.

    Args:
        posterior: at or near its fixed point.
        parameters: tensors with ``requires_grad``.
        size: of a gradient, in nats a step.
        extra: added to the evidence (a log prior), with a graph to the parameters.

    Source: Rasmussen and Williams (2006), eq. 5.23, for Laplace's method; Christianson (1994), "Reverse accumulation and attractive fixed
    points", for any.
    """
    old = posterior.sites
    leaves = [old.nat1.detach().requires_grad_(), old.nat2.detach().requires_grad_()]
    sites = Sites(leaves[0], leaves[1], old.memory)
    with torch.enable_grad():
        evidence, q = posterior.energy(sites)
        value = float(evidence.detach())
        total = evidence if extra is None else evidence + extra
        wanted = [*parameters, *leaves]
        found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradient, slope = list(found[: len(parameters)]), found[len(parameters) :]
        # In units of the sites themselves, so that all entries are nats.
        unit = torch.cat([t.detach().reshape(-1).abs() for t in leaves])
        unit = unit + 1e-3 * unit.mean()
        b = torch.cat([t.reshape(-1) for t in slope]) * unit
        beyond = float(b.abs().sum())
        enough = LEAST * (1 + abs(value)) + SHARE * size(gradient)
        if not math.isfinite(beyond) or beyond <= enough:
            return EvidenceGradient(value, gradient, beyond, 0)
        turned = posterior.rule.renew(posterior.likelihood, q, posterior.y, sites, 1.0, seeded(posterior)).sites
        out = [(t, i) for i, t in enumerate((turned.nat1, turned.nat2)) if t.requires_grad]
        if not out:
            return EvidenceGradient(value, gradient, beyond, 0)

        def product(v: Tensor, into: list) -> tuple[Tensor, ...]:
            parts = (v / unit).split([t.numel() for t in leaves])
            cotangents = [parts[i].reshape(leaves[i].shape) for _, i in out]
            return torch.autograd.grad([t for t, _ in out], into, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True)

        step = lambda v: v - torch.cat([t.reshape(-1) for t in product(v, leaves)]) * unit
        v, products = gmres(step, b, enough / len(b) ** 0.5)
        gradient = [g + more for g, more in zip(gradient, product(v, parameters), strict=True)]
    return EvidenceGradient(value, gradient, beyond, products + 1)


def gmres(product: Callable[[Tensor], Tensor], b: Tensor, tol: float, most: int = 40) -> tuple[Tensor, int]:
    """x with |b − A x| ≤ tol, given products with A, and how many it took (Saad and Schultz 1986)."""
    size = float(b.norm())
    basis, H = [b / size], np.zeros((most + 1, most))
    y, k = np.zeros(0), 0
    for k in range(1, most + 1):
        w = product(basis[-1])
        for i, u in enumerate(basis):
            H[i, k - 1] = float(u @ w)
            w = w - H[i, k - 1] * u
        H[k, k - 1] = float(w.norm())
        target = np.zeros(k + 1)
        target[0] = size
        y = np.linalg.lstsq(H[: k + 1, :k], target, rcond=None)[0]
        if np.linalg.norm(H[: k + 1, :k] @ y - target) <= tol or H[k, k - 1] <= 1e-14:
            break
        basis.append(w / H[k, k - 1])
    return sum((float(a) * u for a, u in zip(y, basis)), torch.zeros_like(b)), k
