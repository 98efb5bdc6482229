"""Posteriors as pyro distributions against dense Gaussians, and the Gauss-Newton guide against Pyro's own."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import nn
from torch.distributions import MultivariateNormal

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from bayesgn.integrations.pyro import AutoGGN, as_distribution
from bayesgn.models.pyro_model import PyroModel

D = torch.float64


@pytest.fixture(autouse=True)
def own_randomness():
    """Pyro draws from torch's global generator and keeps parameters in a global store."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pyro.clear_param_store()
        yield
        pyro.clear_param_store()


def net_and_data(n: int = 12):
    x = torch.randn(n, 2, dtype=D)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(n, 1, dtype=D)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(D).eval(), x, y


def linear(n: int = 15):
    x = torch.randn(n, 2, dtype=D)
    y = x @ torch.tensor([[1.0], [-0.5]], dtype=D) + 0.3 + 0.5 * torch.randn(n, 1, dtype=D)
    return nn.Linear(2, 1).to(D), x, y, torch.cat([x, torch.ones(n, 1, dtype=D)], 1)


STRUCTURES = [
    ggn.Full, ggn.Layerwise, ggn.Kron, ggn.EigenKron, ggn.Diag, ggn.Gram, ggn.MatrixFree, ggn.LowRank(rank=4), ggn.LowRankPlusDiagonal(rank=3),
]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_distribution_equals_a_dense_gaussian(structure, per_layer):
    net, x, y = net_and_data()
    prior = models.WeightPrior.per_layer(net, torch.tensor([1.0, 3.0])) if per_layer else models.WeightPrior(1.0)
    posterior = bgn.laplace(models.Network(net, prior, structure), likelihoods.Gaussian(0.2), (x, y))
    q, p = as_distribution(posterior), 13
    dense = MultivariateNormal(posterior.mean, q.covariance_matrix)
    assert q.event_shape == (p,) and q.batch_shape == () and q.has_rsample
    torch.testing.assert_close(q.mean, dense.mean)
    exact = not isinstance(structure, type) or structure is not ggn.MatrixFree
    torch.testing.assert_close(q.variance, dense.variance, rtol=1e-10 if exact else 1e-5, atol=0)
    θ = (posterior.mean + 0.3 * torch.randn(4, 5, p, dtype=D)).requires_grad_()
    value, expected = q.log_prob(θ), dense.log_prob(θ.detach())
    torch.testing.assert_close(value, expected, rtol=1e-10 if exact else 1e-5, atol=1e-10 if exact else 1e-5)
    (slope,) = torch.autograd.grad(value.sum(), θ)
    by_hand = -torch.linalg.solve(q.covariance_matrix, (θ.detach() - posterior.mean).mT).mT
    torch.testing.assert_close(slope, by_hand, rtol=1e-8 if exact else 1e-4, atol=1e-8 if exact else 1e-4)
    draws = q.rsample((4000,))
    assert q.rsample().shape == (p,) and q.expand((2, 3)).sample((4,)).shape == (4, 2, 3, p)
    assert q.expand((2,)).log_prob(draws[0]).shape == (2,)
    z = torch.linalg.solve_triangular(dense.scale_tril, (draws - q.mean).mT, upper=False)
    assert (z.mean(1).abs() < 5 / 4000**0.5).all()
    assert ((z @ z.mT / 4000 - torch.eye(p, dtype=D)).abs() < 6 * (2 / 4000) ** 0.5).all()


def test_it_is_the_posterior_as_it_stood():
    net, x, y = net_and_data()
    posterior = bgn.laplace(models.Network(net), likelihoods.Gaussian(0.2), (x, y))
    q, θ = as_distribution(posterior), torch.randn(13, dtype=D)
    before = q.log_prob(θ)
    posterior.prior.precision = 7.0
    assert torch.equal(q.log_prob(θ), before) and as_distribution(posterior).log_prob(θ) != before


def test_other_posteriors_of_weights():
    net, x, y = net_and_data()
    refined = bgn.bayes_newton(models.Network(net, structure=ggn.Full), likelihoods.StudentT(4.0, 0.3), (x, y), bgn.rules.Variational(), steps=5)
    q = as_distribution(refined)
    torch.testing.assert_close(q.mean, refined.mean)
    torch.testing.assert_close(q.variance, refined.weight_variance())


def test_importance_weights_are_constant_where_the_posterior_is_exact():
    """log p(y, θ) − log q(θ) is then the log evidence at every θ."""
    net, x, y, X = linear()
    network, likelihood = models.Network(net, structure=ggn.Full), likelihoods.Gaussian(0.5)
    net.weight.data, net.bias.data = ridge(X, y)
    q = as_distribution(bgn.laplace(network, likelihood, (x, y)))
    exact = MultivariateNormal(torch.zeros(len(y), dtype=D), X @ X.mT + 0.5 * torch.eye(len(y), dtype=D)).log_prob(y[:, 0])
    model = PyroModel(models.Network(net, structure=ggn.Full), likelihood)
    run = Importance(model, lambda x, y=None: pyro.sample("weights", q), num_samples=8).run(x, y)
    torch.testing.assert_close(torch.stack([w.detach() for w in run.log_weights]), exact.expand(8), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.mean[:2], torch.linalg.solve(X.mT @ X + 0.5 * torch.eye(3, dtype=D), X.mT @ y)[:2, 0])
    loss = Trace_ELBO(2).loss(model, lambda x, y=None: pyro.sample("weights", q), x, y)
    assert math.isclose(-loss, exact.item(), rel_tol=1e-9)


def ridge(X, y):
    θ = torch.linalg.solve(X.mT @ X + 0.5 * torch.eye(X.shape[1], dtype=D), X.mT @ y)[:, 0]
    return θ[None, :-1].clone(), θ[-1:].clone()


def mode(guide, model, x, y, steps: int = 60):
    """θ* by SVI, then Newton's steps on the loss that SVI minimises."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    opt = torch.optim.LBFGS([guide.loc], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = Trace_ELBO().differentiable_loss(model, guide, x, y)
        loss.backward()
        return loss

    opt.step(closure)
    return guide


@pytest.mark.parametrize("case", ["linear", "logistic", "softmax"])
def test_guide_equals_the_hessian_where_that_is_the_gauss_newton_matrix(case):
    net, x, y, _ = linear()
    likelihood = likelihoods.Gaussian(0.5)
    if case == "logistic":
        y, likelihood = (y > 0).to(D), likelihoods.Bernoulli()
    if case == "softmax":
        net, y, likelihood = nn.Linear(2, 3).to(D), torch.arange(len(x)) % 3, likelihoods.Categorical()
    model = PyroModel(models.Network(net, models.WeightPrior(0.5), ggn.Full), likelihood)
    ours = mode(AutoGGN(model), model, x, y)
    theirs = AutoLaplaceApproximation(model)
    theirs(x, y)
    theirs.loc.data = ours.loc.detach().clone()
    q, p = ours.laplace_approximation(x, y).get_posterior(), theirs.laplace_approximation(x, y).get_posterior()
    torch.testing.assert_close(q.mean, p.mean)
    torch.testing.assert_close(q.covariance_matrix, p.covariance_matrix, rtol=1e-6, atol=1e-6)


def test_guide_on_a_net_whose_hessian_is_indefinite():
    net, x, y = net_and_data(30)
    network, likelihood = models.Network(net, models.WeightPrior(0.01), ggn.Full), likelihoods.Gaussian(0.01)
    ours, model = AutoGGN(network, likelihood), PyroModel(network, likelihood)
    svi = SVI(model, ours, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(30)]
    assert losses[-1] < losses[0]
    loss = lambda θ: -(model.log_prior(θ) + model.log_likelihood(x, y, θ).sum())
    H = torch.autograd.functional.hessian(loss, ours.loc.detach())
    assert torch.linalg.eigvalsh(H)[0] < -1  # the premise
    theirs = AutoLaplaceApproximation(model)
    theirs(x, y)
    theirs.loc.data = ours.loc.detach().clone()
    with pytest.raises(torch.linalg.LinAlgError):
        theirs.laplace_approximation(x, y)
    guide = ours.laplace_approximation(x, y)
    Σ = guide.get_posterior().covariance_matrix
    J = torch.autograd.functional.jacobian(lambda θ: model.outputs(x, θ)[:, 0], ours.loc.detach())
    torch.testing.assert_close(Σ, torch.linalg.inv(J.mT @ J / 0.01 + 0.01 * torch.eye(13, dtype=D)))
    assert Predictive(model, guide=guide, num_samples=5)(x)["y"].shape == (5, 30, 1)
    torch.testing.assert_close(ours.posterior(x, y).mean, ours.loc.detach())
    assert SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(20)).evaluate_loss(x, y) < float("inf")


def test_bad_input():
    net, x, y = net_and_data()
    with pytest.raises(TypeError, match="needs a likelihood"):
        AutoGGN(models.Network(net))
    with pytest.raises(TypeError, match="expected a PyroModel"):
        AutoGGN(lambda x: None)
    model = PyroModel(models.Network(net), likelihoods.Gaussian(0.1))
    with pytest.raises(TypeError, match="has its likelihood"):
        AutoGGN(model, likelihoods.Gaussian(0.1))
    with pytest.raises(RuntimeError, match="no weights yet"):
        AutoGGN(model).laplace_approximation(x, y)
    with pytest.raises(TypeError, match="expected a Gaussian over a net's weights"):
        as_distribution(net)
    posterior = bgn.laplace(models.Network(net), likelihoods.Gaussian(0.1), (x, y))
    with pytest.raises(ValueError, match="expected"):
        as_distribution(posterior).log_prob(torch.zeros(3, dtype=D))
    with torch.no_grad():
        net[0].weight.add_(1.0)
    with pytest.raises(models.StalePosteriorError):
        as_distribution(posterior)
