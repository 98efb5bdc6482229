"""log_integral against plain automatic differentiation of the weighted sum over nodes."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td

from bayesgn import likelihoods
from bayesgn.likelihoods.cubature import GaussHermite, MonteCarloCubature, Unscented, cubature_for
from bayesgn.rules import Marginals, integrals
from tests.likelihoods.families import FAMILIES

D = torch.float64


def belief(c: int, n: int = 7, seed: int = 3) -> Marginals:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, c, c, dtype=D, generator=g) / (2 * c) + 0.3 * torch.eye(c, dtype=D)
    return Marginals(torch.randn(n, c, dtype=D, generator=g) / 2, root @ root.mT)


def plain(likelihood, q, y, cubature, power):
    """Written out: every node by itself, in the graph."""
    f, w = cubature(q.mean, q.cov)
    log_p = torch.stack([likelihood.log_prob(node, y) for node in f])
    return w @ log_p if power == 0 else (w @ (power * log_p).exp()).log() / power


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_value_and_gradient_are_those_of_plain_autograd(family, power, monkeypatch):
    monkeypatch.setattr(integrals, "PIECE", 3 * 20 * family.c)  # several pieces
    likelihood, cubature = family.build(), GaussHermite(5) if family.c <= 3 else Unscented(3)
    _, y = family.data(7)
    y = y.clone()
    y[2] = family.missing
    found, wanted = [], []
    for function, out in ((integrals.log_integral, found), (plain, wanted)):
        q = Marginals(*(t.requires_grad_() for t in belief(family.c)))
        value = function(likelihood, q, y, cubature, power)
        leaves = [*q, *(p for p in likelihood.parameters() if p.requires_grad)]
        weight = torch.linspace(0.5, 2, len(value), dtype=D)
        out += [value, *torch.autograd.grad(value, leaves, weight, allow_unused=True, materialize_grads=True)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_second_derivatives():
    likelihood, q = likelihoods.StudentT(torch.tensor(5.0, dtype=D), torch.tensor(0.6, dtype=D)), belief(1)
    y = torch.linspace(-1, 1, 7, dtype=D)
    rule = cubature_for(1)
    dof = likelihood.log_dof

    def hessian(function):
        leaves = [t.clone().requires_grad_() for t in q]
        value = function(likelihood, Marginals(*leaves), y, rule, 0.0).sum()
        first = torch.autograd.grad(value, [*leaves, dof], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*leaves, dof])

    for a, b in zip(hessian(integrals.log_integral), hessian(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_that_only_a_closure_knows_has_its_gradient():
    scale = torch.tensor(0.3, dtype=D, requires_grad=True)
    likelihood = likelihoods.FromDistribution(lambda f: td.Normal(f, scale.exp()))
    q, y = belief(1), torch.zeros(7, 1, dtype=D)
    (found,) = torch.autograd.grad(integrals.log_integral(likelihood, q, y, GaussHermite(5)).sum(), scale)
    # E[log N(0; f, s)] = −log s − ½ (m² + v) / s² + …
    second = q.mean.square().sum() + q.cov.sum()
    torch.testing.assert_close(found, -7 + second * (-2 * scale).exp().detach())


@pytest.mark.parametrize("cubature", [GaussHermite(4), Unscented(3), MonteCarloCubature(8)], ids=repr)
def test_no_data_and_no_graph(cubature):
    likelihood = likelihoods.HeteroscedasticGaussian()
    empty = Marginals(torch.zeros(0, 2, dtype=D), torch.zeros(0, 2, 2, dtype=D))
    assert integrals.log_integral(likelihood, empty, torch.zeros(0, dtype=D), cubature).shape == (0,)
    q, y = belief(2), torch.zeros(7, dtype=D)
    with torch.no_grad():
        value = integrals.log_integral(likelihood, q, y, cubature)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(likelihood, q, y, cubature, 0.0))
