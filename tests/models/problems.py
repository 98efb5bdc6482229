"""One small net for every likelihood, with data drawn from it, and the dense answer beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from tests.likelihoods.families import BY_NAME
from tests.oracles import dense

EXACT = {"Full": ggn.Full, "Gram": ggn.Gram}  # structures that keep all of H


class Problem(NamedTuple):
    net: nn.Module
    x: Any
    y: Tensor
    likelihood: likelihoods.Likelihood


def mlp(c: int, inputs: int = 2, hidden: int = 4, seed: int = 0) -> nn.Module:
    """A tanh MLP in float64 and eval mode, weights of size one half."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, c)).double().eval()
        with torch.no_grad():
            for p in net.parameters():
                p.normal_(0.0, 0.5)
    return net


def inputs(n: int, d: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of(family: str, n: int = 12, seed: int = 0) -> Problem:
    """The family's likelihood on an MLP, y drawn from the net's own answer."""
    known = BY_NAME[family]
    likelihood, net, x = known.build(), mlp(known.c, seed=seed), inputs(n)
    with torch.no_grad():
        y = likelihood.sample(net(x), generator=torch.Generator().manual_seed(2))
    return Problem(net, x, y, likelihood)


def fit(problem: Problem, structure=ggn.Full, prior=None, parameters=None, **options):
    """Its Laplace posterior."""
    model = models.Network(problem.net, prior=prior, structure=structure, parameters=parameters)
    return bgn.laplace(model, problem.likelihood, (problem.x, problem.y), progress=False, **options)


def dense_ggn(problem: Problem, mask: Tensor | None = None) -> Tensor:
    """H [p p] = Σ JᵀΛJ by brute force."""
    J = dense.jacobian(problem.net, problem.x, mask=mask, rows=problem.likelihood.rows)
    with torch.no_grad():
        f = problem.likelihood.rows(dense.call(problem.net, problem.x))
        Lam = dense.position_blocks(problem.likelihood.ggn(f, problem.y))
    return dense.ggn(J, Lam)


def log_lik(problem: Problem) -> Tensor:
    with torch.no_grad():
        f = problem.likelihood.rows(dense.call(problem.net, problem.x))
        return problem.likelihood.log_prob(f, problem.y).sum()


def close(found: Tensor, wanted: Tensor, tol: float = 1e-8) -> None:
    """Equal to ``tol``, relative to the size of what is wanted, and of one float64."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{found.dtype} instead of {wanted.dtype}"
    size = wanted.detach().abs().max().clamp_min(1e-8).item()
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=tol, atol=tol * size)


def assert_moments(draws: Tensor, mean: Tensor, cov: Tensor, sigmas: float = 5.5) -> None:
    """Draws [s d] have this mean and covariance, to so many standard errors of each entry."""
    s = len(draws)
    variance = cov.diagonal()
    z = (draws.mean(0) - mean) / (variance / s).sqrt()
    assert z.abs().max() < sigmas, f"mean off by {z.abs().max():.1f} standard errors"
    d = draws - mean
    error = d.mT @ d / s - cov
    se = ((variance[:, None] * variance + cov.square()) / s).sqrt()
    assert (error / se).abs().max() < sigmas, f"covariance off by {(error / se).abs().max():.1f} standard errors"
