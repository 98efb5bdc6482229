"""Every cubature rule against the moments of a Gaussian, and where nodes stand for a narrow density."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayesgn import likelihoods, rules
from bayesgn.likelihoods.cubature import cubature_for
from bayesgn.rules import Marginals, Sites
from bayesgn.rules.placing import place

D = torch.float64
RULES = [  # rule, total degree, latents
    (rules.GaussHermite(4), 7, (1, 2, 3)),
    (rules.GaussHermite(20), 7, (1, 2)),
    (rules.Unscented(3), 3, tuple(range(1, 11))),
    (rules.Unscented(5), 5, tuple(range(1, 13))),
    (rules.MonteCarloCubature(64), 3, (1, 2, 3, 7)),
]


def double_factorial_moment(powers) -> float:
    """E Π z_i^{k_i} of a standard Gaussian."""
    return float(np.prod([0.0 if k % 2 else math.prod(range(k - 1, 0, -2)) for k in powers]))


@pytest.mark.parametrize("rule, degree, latents", RULES, ids=repr)
def test_moments_up_to_the_degree(rule, degree, latents):
    for c in latents:
        z, w = rule.standard(c)
        assert z.shape == (len(w), c) and (w >= 0).all()
        for total in range(degree + 1):
            for which in itertools.combinations_with_replacement(range(c), total):
                powers = np.bincount(np.array(which, dtype=int), minlength=c)
                found = (w * np.prod(z[:, list(which)], axis=1)).sum()
                assert found == pytest.approx(double_factorial_moment(powers), abs=1e-11 * 10 ** (total / 2)), (c, which)


def test_a_degree_further_is_not_exact():
    for rule, degree in ((rules.GaussHermite(3), 6), (rules.Unscented(3), 4), (rules.Unscented(5), 6)):
        z, w = rule.standard(2)
        assert abs(w @ z[:, 0] ** degree - double_factorial_moment([degree])) > 0.1


def test_nodes_of_any_covariance():
    """Mean and covariance of the nodes are those asked for, also where the covariance is singular."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(5, 3, 3, dtype=D, generator=g)
    A[0, :, 2] = 0  # rank two
    A[1] = 0
    mean, cov = torch.randn(5, 3, dtype=D, generator=g), A @ A.mT
    for rule in (rules.GaussHermite(3), rules.Unscented(3), rules.Unscented(5), rules.MonteCarloCubature(32)):
        f, w = rule(mean, cov)
        δ = f - mean
        torch.testing.assert_close(torch.einsum("q,qni->ni", w, f), mean)
        torch.testing.assert_close(torch.einsum("q,qni,qnj->nij", w, δ, δ), cov)


def test_few_nodes_and_the_same_at_every_call():
    assert [len(rules.Unscented(5).standard(c)[1]) for c in (1, 4, 5, 6, 10, 16)] == [3, 33, 42, 44, 276, 544]
    rule = rules.MonteCarloCubature(16, seed=3)
    assert (rule.standard(2)[0] == rule.standard(2)[0]).all()
    assert (rule.standard(2)[0] != rules.MonteCarloCubature(16, seed=4).standard(2)[0]).any()
    assert [type(cubature_for(c)).__name__ for c in (1, 3, 4, 16, 17)] == [
        "GaussHermite", "GaussHermite", "Unscented", "Unscented", "MonteCarloCubature"]  # fmt: skip


def test_bad_arguments():
    with pytest.raises(ValueError, match="points must be at least 1 but is 0"):
        rules.GaussHermite(0)
    with pytest.raises(ValueError, match=r"20\^6 nodes for 6 latents; use Unscented"):
        rules.GaussHermite(20).standard(6)
    with pytest.raises(ValueError, match="order must be 3 or 5 but is 4"):
        rules.Unscented(4)
    with pytest.raises(ValueError, match="up to 32 latents, here are 40; use MonteCarloCubature"):
        rules.Unscented(5).standard(40)
    with pytest.raises(ValueError, match="expected an even number"):
        rules.MonteCarloCubature(7)
    with pytest.raises(TypeError, match=r"expected an instance such as rules.GaussHermite\(20\)"):
        rules.Variational(cubature=rules.GaussHermite)


def grid(likelihood, y, mean: float, sd: float, α: float) -> tuple[float, float, float]:
    """log E[p^α], mean and variance of the tilted density by the trapezoidal rule on 200,001 points."""
    z = torch.linspace(-14, 14, 200_001, dtype=D)
    f = mean + sd * z
    log_p = α * likelihood.log_prob(f[:, None], y.expand(len(f), *y.shape[1:])) - 0.5 * z**2
    weight = (log_p - log_p.max()).exp()
    total = weight.sum()
    μ = float(weight @ f / total)
    step = float(z[1] - z[0]) / math.sqrt(2 * math.pi)
    return float(total.log() + log_p.max()) + math.log(step), μ, float(weight @ (f - μ) ** 2 / total)


@pytest.mark.parametrize("likelihood, y", [
    (likelihoods.Poisson(), 3.0), (likelihoods.Poisson(), 200.0), (likelihoods.NegativeBinomial(1.5), 4.0), (likelihoods.Gamma(50.0), 2.0),
    (likelihoods.Beta(100.0), 0.8), (likelihoods.Bernoulli(), 1.0), (likelihoods.StudentT(4.0, 0.5), 0.3),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("sd, lost", [(0.5, 1e-6), (1.0, 1e-4), (3.0, 1e-2)])
def test_ep_meets_the_moments_of_a_density_much_narrower_than_its_cavity(likelihood, y, sd, lost):
    """From a site that says nothing: 20 nodes under N(0.2, sd²) would be one or two that count. (Of a t, a Gaussian rule leaves out some tail.)"""
    lost = 20 * lost if isinstance(likelihood, likelihoods.StudentT) else lost
    likelihood, y = likelihood.double().requires_grad_(False), torch.tensor([[y]], dtype=D)
    q = Marginals(torch.full((1, 1), 0.2, dtype=D), torch.full((1, 1, 1), sd**2, dtype=D))
    for α in (1.0, 0.5):
        rule, flat = rules.PowerEP(α, rules.Exact()), Sites.flat(1, 1, q.mean)
        log_Z, mean, variance = grid(likelihood, y, 0.2, sd, α)
        assert α * float(rule.term(likelihood, q, y, flat)) == pytest.approx(log_Z, abs=lost)
        site = rule(likelihood, q, y, flat).sites
        found = 1 / (1 / sd**2 + α * float(site.nat2))  # of cavity · t^α
        assert found == pytest.approx(variance, rel=lost)
        assert found * (0.2 / sd**2 + α * float(site.nat1)) == pytest.approx(mean, abs=lost * variance**0.5)


def test_placed_nodes_integrate_the_same_gaussian():
    """Σ w e^shift h(f) = E h(f), wherever the nodes stand."""
    g = torch.Generator().manual_seed(1)
    A = torch.randn(4, 2, 2, dtype=D, generator=g)
    q = Marginals(torch.randn(4, 2, dtype=D, generator=g), A @ A.mT + 0.1 * torch.eye(2, dtype=D))
    y = torch.randn(4, 1, dtype=D, generator=g)
    nodes = place(likelihoods.HeteroscedasticGaussian(), q, y, rules.GaussHermite(20), 0.3, torch.zeros(4, 2, dtype=D), torch.zeros(4, 2, 2, dtype=D))
    f, w = nodes(*q)
    weight = w[:, None] * nodes.shift.exp()
    torch.testing.assert_close(weight.sum(0), torch.ones(4, dtype=D), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.einsum("qn,qni->ni", weight, f), q.mean, rtol=2e-3, atol=2e-3)
    part = nodes.rows(torch.tensor([2, 0]))
    torch.testing.assert_close(part(q.mean[[2, 0]], q.cov[[2, 0]])[0], f[:, [2, 0]])
    torch.testing.assert_close(part.shift, nodes.shift[:, [2, 0]])
