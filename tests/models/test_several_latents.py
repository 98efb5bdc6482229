"""MarkovGP with several latent functions: coupled by the sites, or each on its own, against the dense GP."""

from __future__ import annotations

import logging
import math

import gpytorch
import pytest
import torch
from torch import Tensor

import bayesgn as bgn
from bayesgn import _kalman, likelihoods, models, rules
from bayesgn.models.markov_gp import groups
from bayesgn.rules import Sites


def matern(nu: float, lengthscale: float = 1.0, scale: float = 1.0):
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=nu)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, scale
    return kernel


def equal(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def kernels(c: int) -> list:
    return [matern(1.5, 1.2, 0.8), matern(0.5, 3.0, 1.4), matern(2.5, 0.9, 1.1)][:c]


def means(c: int) -> list:
    out = []
    for a in range(c):
        mean = gpytorch.means.ConstantMean().double()
        mean.initialize(constant=0.4 - 0.3 * a)
        out.append(mean)
    return out


def times(n: int, generator) -> Tensor:
    t = 8 * torch.rand(n, dtype=torch.float64, generator=generator)
    t[3] = t[5]  # one instant twice
    return t


def heteroscedastic(generator):
    t = times(25, generator)
    y = torch.sin(2 * t) + (0.1 + 0.4 * torch.sigmoid(t - 4)) * torch.randn(25, dtype=torch.float64, generator=generator)
    y[7] = float("nan")
    return likelihoods.HeteroscedasticGaussian(), (t, y), 2


def categorical(generator):
    t = times(25, generator)
    return likelihoods.Categorical(), (t, torch.bucketize(torch.sin(t), torch.tensor([-0.4, 0.4], dtype=torch.float64))), 3


PROBLEMS = {"heteroscedastic": heteroscedastic, "categorical": categorical}
RULES = [rules.Laplace(), rules.Variational(), rules.PowerEP(0.5), rules.Variational(rules.Exact())]
NEW = torch.tensor([-1.0, 0.3, 4.0, 4.0, 7.7, 9.5], dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_coupled_latents_against_the_dense_gp(problem, rule, generator):
    likelihood, data, c = PROBLEMS[problem](generator)
    a, b = (
        bgn.bayes_newton(kind(kernels(c), means(c)), likelihood, data, rule, steps=5, lr=0.5, progress=False) for kind in (models.MarkovGP, models.GP)
    )
    # The Fisher information of mean and scale has no cross term, the Hessian has.
    assert len(groups(a.sites.nat2)) == (2 if problem == "heteroscedastic" and isinstance(rule.curvature, rules.GaussNewton) else 1)
    # The Fisher information of mean and scale has no cross term, the Hessian has.
    assert len(groups(a.sites.nat2)) == (2 if problem == "heteroscedastic" and isinstance(rule.curvature, rules.GaussNewton) else 1)
    equal(torch.tensor(a.trace.energy), torch.tensor(b.trace.energy))
    equal(a.marginals().mean, b.marginals().mean)
    equal(a.marginals().cov, b.marginals().cov)
    equal(a(NEW).mean, b(NEW).mean)
    equal(a(NEW).marginals()[1], b(NEW).marginals()[1])
    equal(a(NEW).covariance_matrix, b(NEW).covariance_matrix)  # [m c, m c], between all times and latents
    gradients = [torch.autograd.grad(p.log_evidence(), list(p.model.parameters())) for p in (a, b)]
    for g, h in zip(*gradients):
        equal(g, h, 1e-8)


@pytest.mark.parametrize("coupled", [True, False])
def test_draws_have_the_joint_moments(coupled, generator):
    likelihood, data, c = heteroscedastic(generator)
    posterior = bgn.bayes_newton(models.MarkovGP(kernels(c), means(c)), likelihood, data, rules.Variational(), steps=3, progress=False)
    if not coupled:
        posterior = posterior.with_sites(diagonal(posterior.sites))
    S = 20_000
    draws = posterior.sample_outputs(NEW, S, generator).reshape(S, -1)
    f = posterior(NEW)
    s = f.variance.reshape(-1).sqrt()
    assert ((draws.mean(0) - f.mean.reshape(-1)).abs() / s).max() < 5 / math.sqrt(S)
    assert ((torch.cov(draws.mT) - f.covariance_matrix).abs() / (s[:, None] * s)).max() < 7 / math.sqrt(S)


def diagonal(sites: Sites) -> Sites:
    return Sites(sites.nat1, torch.diag_embed(sites.nat2.diagonal(dim1=-2, dim2=-1)))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_uncoupled_latents_are_worked_out_one_by_one(problem, generator, caplog):
    """The same numbers as from the joint chain, its gradients, and the dense GP's."""
    likelihood, data, c = PROBLEMS[problem](generator)
    posterior = bgn.bayes_newton(models.MarkovGP(kernels(c), means(c)), likelihood, data, rules.Variational(), steps=3, progress=False)
    posterior = posterior.with_sites(diagonal(posterior.sites))
    model, inputs, sites = posterior.model, posterior.inputs, posterior.sites
    with caplog.at_level(logging.DEBUG, "bayesgn.models"):
        log_Z, q = model._solve(inputs, sites.nat1, sites.nat2)
    assert f"no site couples the {c} latent functions" in caplog.text
    order = inputs.order
    joint, mean, cov = _kalman.smooth(model.chain(inputs), sites.nat1[order], sites.nat2[order])
    equal(log_Z, joint, 1e-12)
    equal(q.mean, mean[inputs.back], 1e-12)
    equal(q.cov, cov[inputs.back], 1e-12)

    parameters = [p for k in model.kernels for p in k.parameters()]
    w = torch.linspace(-1, 1, len(mean), dtype=torch.float64)[:, None]
    scalar = [Z + (w * m).sum() + (w[:, :, None] * C).sum() for Z, m, C in ((log_Z, q.mean[order], q.cov[order]), (joint, mean, cov))]
    for g, h in zip(*(torch.autograd.grad(s, parameters) for s in scalar)):
        equal(g, h, 1e-10)

    dense = models.GP(model.kernels, list(model.means)).start(likelihood, data, sites=sites)
    equal(posterior.log_evidence(), bgn_evidence(dense, posterior.rule))
    equal(posterior(NEW).covariance_matrix, dense(NEW).covariance_matrix)


def bgn_evidence(posterior, rule) -> Tensor:
    log_Z, q = posterior.model.solve(posterior.inputs, posterior.sites)
    return log_Z + rule.term(posterior.likelihood, q, posterior.y, posterior.sites).sum()


def test_a_slope_in_the_coupling_needs_all_latents(generator):
    """d log Z / d nat2 at a coupling of zero is −½ E[f_a f_b], not zero."""
    likelihood, data, c = heteroscedastic(generator)
    model = models.MarkovGP(kernels(c))
    inputs = model.place(data[0][:, None])
    nat1 = torch.randn(25, c, dtype=torch.float64, generator=generator)
    nat2 = torch.eye(c, dtype=torch.float64).repeat(25, 1, 1).requires_grad_()
    log_Z, q = model._solve(inputs, nat1, nat2)
    (slope,) = torch.autograd.grad(log_Z, nat2)
    equal(slope, -0.5 * (q.cov + q.mean[:, :, None] * q.mean[:, None, :]))


def test_groups():
    nat2 = torch.eye(3).repeat(4, 1, 1)
    assert groups(nat2) == [[0], [1], [2]]
    nat2[2, 0, 1] = nat2[2, 1, 0] = 1e-30  # however small: identical numbers are promised
    assert groups(nat2) == [[0, 1, 2]]
    assert groups(torch.ones(4, 1, 1)) == [[0]]
