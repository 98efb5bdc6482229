"""SpatioTemporalGP against the dense Gaussian process with the product kernel: any set of times and places, new ones, several latents."""

from __future__ import annotations

import copy
import math

import gpytorch
import pytest
import torch
from gpytorch import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models.averaging import averaged

from .dense import Exactly, Separable
from .test_markov_gp import alike, close_in_law, infer, made, matern, tensor

D = torch.float64

TEMPORAL = {
    "Matern32": matern(1.5),
    "Matern12 + Linear": matern(0.5) + made(kernels.LinearKernel(), variance=0.1),
    "RBF": made(kernels.RBFKernel(), lengthscale=0.9),
    "Linear × Matern": made(kernels.LinearKernel(), variance=0.2) * made(kernels.MaternKernel(nu=0.5), lengthscale=2.0),
}


def spatial():
    return made(kernels.ScaleKernel(made(kernels.MaternKernel(nu=1.5, ard_num_dims=2), lengthscale=[[0.8, 1.6]])), outputscale=1.2)


def dense(temporal, space, mean=None):
    """The same model in dense algebra, with kernels that keep all digits."""
    pairs = zip(temporal, space) if isinstance(temporal, list) else [(temporal, space)]
    return models.GP([Separable(Exactly(t, approximated=isinstance(t, kernels.RBFKernel)), Exactly(s)) for t, s in pairs], mean)


def same(name: str) -> str:
    """Our name of a hyper-parameter of the dense model."""
    if ".spatial." in name:
        return name.replace("kernels", "spatial_kernels", 1).replace("spatial.kernel.", "", 1)
    return name.replace("temporal.kernel.", "", 1)


def pair(temporal, space, mean=None):
    return models.SpatioTemporalGP(temporal, space, mean), dense(temporal, space, mean)


PLACES = tensor([[0.0, 0.0], [0.7, -0.3], [-0.5, 0.4], [1.5, 1.5]])
# (time, place) pairs as they come: unsorted, places unevenly seen, one pair twice
PAIRS = [(1.9, 0), (0.3, 1), (-0.7, 2), (0.3, 0), (2.6, 1), (1.9, 1), (0.3, 2), (0.9, 3), (0.3, 0), (2.6, 0), (1.2, 0)]
X = torch.stack([torch.cat([tensor([t]), PLACES[i]]) for t, i in PAIRS])
Y = (X[:, 0].sin() + X[:, 1]) + 0.3 * torch.cos(7 * torch.arange(len(X), dtype=D))
# seen and unseen times at seen and unseen places
NEW = tensor([[0.3, 0.0, 0.0], [0.5, 0.7, -0.3], [1.9, 0.2, 0.9], [4.0, 0.2, 0.9], [-2.0, -1.0, 0.1], [0.5, 0.2, 0.9], [0.3, 1.5, 1.5]])
LIKELIHOODS = {
    "Gaussian": (lambda: likelihoods.Gaussian(0.1), Y),
    "Poisson": (lambda: likelihoods.Poisson(), (2 * Y.abs()).round()),
    "StudentT": (lambda: likelihoods.StudentT(4.0, 0.3), Y),
}
RULES = [rules.Laplace(), rules.Variational(), rules.PowerEP(0.5), rules.PosteriorLinearization()]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("temporal", TEMPORAL)
def test_equals_the_dense_model(temporal, rule, likelihood):
    made_likelihood, y = LIKELIHOODS[likelihood]
    y = y.clone()
    y[4] = math.nan
    ours, theirs = (infer(m, made_likelihood(), (X, y), rule) for m in pair(copy.deepcopy(TEMPORAL[temporal]), spatial()))
    alike(ours, theirs, NEW, same=same)


@pytest.mark.parametrize("rule", [*RULES[:3], rules.Variational(rules.Exact())], ids=repr)
def test_several_latents(rule):
    """Each with kernels of its own; with mean functions of time and place. The exact curvature couples the latents, Gauss-Newton does not."""
    x, y = (X, Y) if rule in RULES else (X[X[:, 1:].sum(-1) < 0.1], Y[X[:, 1:].sum(-1) < 0.1])
    line = gpytorch.means.LinearMean(3).double()
    line.initialize(weights=tensor([[0.2], [-0.1], [0.3]]), bias=tensor([0.1]))
    temporal = [matern(1.5), matern(0.5, 2.0, 0.5)]
    space = [spatial(), made(kernels.RBFKernel(), lengthscale=0.7)]
    ours, theirs = (infer(m, likelihoods.HeteroscedasticGaussian(), (x, y), rule) for m in pair(temporal, space, [line, None]))
    assert ours(NEW).mean.shape == (len(NEW), 2) and (rule in RULES) == (float(ours.sites.nat2[:, 0, 1].abs().max()) == 0)
    alike(ours, theirs, NEW, same=same)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), times=st.integers(1, 5), places=st.integers(1, 4))
def test_any_set_of_times_and_places(seed, n, times, places):
    g = torch.Generator().manual_seed(seed)
    t, s = 4 * torch.rand(times, dtype=D, generator=g), 2 * torch.rand(places, 2, dtype=D, generator=g)
    i, j = (torch.randint(k, (n,), generator=g) for k in (times, places))
    x, y = torch.cat([t[i].unsqueeze(-1), s[j]], -1), torch.randn(n, dtype=D, generator=g)
    ours, theirs = (infer(m, likelihoods.Gaussian(0.2), (x, y), rules.Laplace(), steps=1, lr=1.0) for m in pair(matern(), spatial()))
    alike(ours, theirs, torch.cat([NEW, x[:1]]), same=same)


def test_matrix_of_all_times_and_places_by_gpytorch_alone():
    """gpytorch's own product kernel by its active dimensions, ExactGP and marginal likelihood."""
    t, i = torch.meshgrid(tensor([0.0, 0.4, 1.5, 1.9, 3.0]), torch.arange(4.0, dtype=D), indexing="ij")
    x = torch.cat([t.reshape(-1, 1), PLACES[i.flatten().long()]], -1)
    y = torch.sin(x[:, 0]) * x[:, 1] + x[:, 2]
    time = made(kernels.MaternKernel(nu=2.5, active_dims=(0,)), lengthscale=1.1)
    space = made(kernels.RBFKernel(active_dims=(1, 2)), lengthscale=0.9)
    K = (time * space)(x).to_dense() + 0.3 * torch.eye(len(x), dtype=D)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(x), dtype=D), K).log_prob(y)
    model = models.SpatioTemporalGP(made(kernels.MaternKernel(nu=2.5), lengthscale=1.1), made(kernels.RBFKernel(), lengthscale=0.9))
    posterior = bgn.bayes_newton(model, likelihoods.Gaussian(0.3), (x, y), steps=1, lr=1.0, progress=False)
    assert_close(posterior.log_evidence(), evidence, rtol=1e-8, atol=1e-8)
    mean = (time * space)(NEW, x).to_dense() @ torch.linalg.solve(K, y)
    assert_close(posterior(NEW).mean, mean, rtol=1e-7, atol=1e-7)


def test_order_does_not_matter():
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    model = models.SpatioTemporalGP(matern(), spatial())
    one, other = (infer(model, likelihoods.Gaussian(0.1), (X[o], Y[o]), rules.Laplace(), 1, 1.0) for o in (torch.arange(len(X)), order))
    assert_close(one.log_evidence(), other.log_evidence(), rtol=1e-12, atol=1e-12)
    assert_close(one.marginals().mean[order], other.marginals().mean, rtol=1e-11, atol=1e-11)
    assert_close(one(NEW).covariance_matrix, other(NEW).covariance_matrix, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("several", [False, True])
def test_prior(several):
    temporal, space = ([matern(1.5), matern(0.5)], [spatial(), spatial()]) if several else (matern(), spatial())
    ours, theirs = pair(temporal, space)
    assert_close(ours.prior(NEW).covariance_matrix, theirs.cross(NEW, NEW), rtol=1e-12, atol=1e-12)
    assert_close(ours.prior(NEW).variance, theirs.prior(NEW).variance, rtol=1e-12, atol=1e-12)
    draws = ours.sample_prior(NEW, 4000, torch.Generator().manual_seed(1))
    close_in_law(draws.flatten(1), torch.zeros(len(NEW) * ours.latents, dtype=D), theirs.cross(NEW, NEW).detach())


@pytest.mark.parametrize("several", [False, True])
def test_posterior_draws(several):
    if several:
        model = models.SpatioTemporalGP([matern(1.5), matern(0.5)], [spatial(), spatial()])
        seen = X[:, 1:].sum(-1) < 0.1
        posterior = infer(model, likelihoods.HeteroscedasticGaussian(), (X[seen], Y[seen]), rules.Variational(rules.Exact()))
    else:
        posterior = infer(models.SpatioTemporalGP(matern(), spatial()), likelihoods.Gaussian(0.1), (X, Y), rules.Laplace(), 1, 1.0)
    f = posterior(NEW)
    draws = posterior.sample_outputs(NEW, 4000, generator=torch.Generator().manual_seed(2))
    close_in_law(draws.flatten(1), f.mean.detach().flatten(), f.covariance_matrix.detach())


def test_slopes_in_new_inputs():
    posterior, h = infer(models.SpatioTemporalGP(matern(2.5), spatial()), likelihoods.Gaussian(0.1), (X, Y), rules.Laplace(), 1, 1.0), 1e-6
    x = tensor([[0.45, 0.1, 0.3], [0.45, 0.1, 0.3], [3.0, 1.0, -0.5]]).requires_grad_()
    f = posterior(x)
    (slope,) = torch.autograd.grad(f.mean.sum() + f.variance.sum(), x)
    for i in range(3):
        for j in range(3):
            step = torch.zeros_like(x)
            step[i, j] = h
            up, down = (posterior((x + s).detach()) for s in (step, -step))
            change = (up.mean - down.mean + up.variance - down.variance).sum() / (2 * h)
            assert_close(slope[i, j], change, rtol=1e-6, atol=1e-7)


def test_nowhere_and_one_datum():
    model = models.SpatioTemporalGP(matern(), spatial())
    posterior = infer(model, likelihoods.Gaussian(0.1), (X[:1], Y[:1]), rules.Laplace(), 1, 1.0)
    K = dense(matern(), spatial()).cross(torch.cat([NEW, X[:1]]), torch.cat([NEW, X[:1]])).detach()
    assert_close(posterior(NEW).mean, K[:-1, -1] / (K[-1, -1] + 0.1) * Y[0], rtol=1e-12, atol=1e-12)
    assert posterior(X[:0]).mean.shape == (0,) and posterior(X[:0]).covariance_matrix.shape == (0, 0)
    assert posterior.sample_outputs(X[:0], 2).shape == (2, 0, 1)
    assert model.prior(X[:0]).covariance_matrix.shape == (0, 0) and model.sample_prior(X[:0], 2).shape == (2, 0, 1)


# -- inducing places ----------------------------------------------------------------------------------------------------------------


def sparse(places: Tensor = PLACES[:2]):
    return models.SpatioTemporalGP(matern(), spatial(), places=places)


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_inducing_places_where_the_data_are(rule):
    xy = X, LIKELIHOODS["Poisson"][1]
    ours, all_ = (infer(m, likelihoods.Poisson(), xy, rule) for m in (sparse(PLACES.flip(0)), models.SpatioTemporalGP(matern(), spatial())))
    alike(ours, all_, NEW, same=lambda name: name)


def by_hand(x: Tensor):
    """K_zz between inducing places at all times of the data, B with f = B u + e, and what is left open, by dense matrices."""
    times = torch.unique(x[:, 0])
    z = torch.cat([times.repeat_interleave(2).unsqueeze(-1), PLACES[:2].repeat(len(times), 1)], -1)
    gp = dense(matern(), spatial())
    K_zz, K_xz = gp.cross(z, z).detach(), gp.cross(x, z).detach()
    B = torch.linalg.solve(K_zz, K_xz.mT).mT
    return K_zz, B, gp.cross(x, x).detach() - B @ K_xz.mT


def test_variational_bound_of_inducing_places():
    """Titsias' collapsed bound, log N(y; 0, B K Bᵀ + σ²) − tr(open) / 2σ²."""
    posterior = infer(sparse(), likelihoods.Gaussian(0.1), (X, Y), rules.Variational(), 1, 1.0)
    K_zz, B, open = by_hand(X)
    cov = B @ K_zz @ B.mT + 0.1 * torch.eye(len(X), dtype=D)
    bound = torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=D), cov).log_prob(Y) - 0.5 * open.diagonal().sum() / 0.1
    assert_close(posterior.log_evidence(), bound, rtol=1e-10, atol=1e-10)
    exact = infer(models.SpatioTemporalGP(matern(), spatial()), likelihoods.Gaussian(0.1), (X, Y), rules.Variational(), 1, 1.0)
    more = infer(sparse(PLACES[:3]), likelihoods.Gaussian(0.1), (X, Y), rules.Variational(), 1, 1.0)
    assert float(bound) < float(more.log_evidence().detach()) < float(exact.log_evidence().detach())


def test_ep_with_inducing_places_is_fitc():
    """log N(y; 0, B K Bᵀ + diag(open) + σ²): data are independent given the inducing places."""
    posterior = infer(sparse(), likelihoods.Gaussian(0.1), (X, Y), rules.PowerEP(1.0), 1, 1.0)
    K_zz, B, open = by_hand(X)
    cov = B @ K_zz @ B.mT + torch.diag(open.diagonal()) + 0.1 * torch.eye(len(X), dtype=D)
    assert_close(
        posterior.log_evidence(), torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=D), cov).log_prob(Y), rtol=1e-10, atol=1e-10
    )


def test_prediction_and_gradient_with_inducing_places():
    posterior = infer(sparse(), likelihoods.Poisson(), (X, LIKELIHOODS["Poisson"][1]), rules.Variational())
    both = torch.cat([X, NEW])
    K_zz, B, open = by_hand(both)
    n, S = len(X), open.diagonal()[: len(X)].reshape(-1, 1, 1)
    sites = averaged(posterior.sites.nat1, posterior.sites.nat2, S, 0.0)
    Λ = torch.diag(sites.nat2[:, 0, 0])
    cov = torch.linalg.inv(torch.linalg.inv(K_zz) + B[:n].mT @ Λ @ B[:n])
    assert_close(posterior(NEW).mean, B[n:] @ cov @ B[:n].mT @ sites.nat1[:, 0], rtol=1e-8, atol=1e-8)
    assert_close(posterior(NEW).covariance_matrix, B[n:] @ cov @ B[n:].mT + open[n:, n:], rtol=1e-8, atol=1e-8)
    # ∂ evidence / ∂ hyper-parameters at fixed sites by differences
    parameters = list(posterior.model.parameters())
    gradients = torch.autograd.grad(posterior.log_evidence(), parameters)
    for p, g in zip(parameters, gradients):
        for i in range(p.numel()):
            values = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[i] += h
                    values.append(posterior.log_evidence())
                    p.view(-1)[i] -= h
            assert_close(g.view(-1)[i], (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-7)


# -- errors, size ---------------------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be():
    with pytest.raises(ValueError, match=r"inputs have shape \(5, 1\); expected \[n 1\+e\]"):
        infer(models.SpatioTemporalGP(matern(), spatial()), likelihoods.Gaussian(), (torch.rand(5), torch.rand(5)), rules.Laplace())
    with pytest.raises(ValueError, match=r"shape \(11, 2\); expected \[n 3\] with these inducing places"):
        infer(sparse(), likelihoods.Gaussian(), (X[:, :2], Y), rules.Laplace())
    with pytest.raises(TypeError, match="spatial_kernel is"):
        models.SpatioTemporalGP(matern(), 3)
    with pytest.raises(ValueError, match=r"1 temporal kernel\(s\) but 2 spatial"):
        models.SpatioTemporalGP(matern(), [spatial(), spatial()])
    with pytest.raises(ValueError, match=r"batch shape \[2\]"):
        models.SpatioTemporalGP(matern(), kernels.RBFKernel(batch_shape=torch.Size([2])))
    with pytest.raises(TypeError, match="RQKernel has no state-space form"):
        infer(models.SpatioTemporalGP(kernels.RQKernel(), spatial()), likelihoods.Gaussian(), (X, Y), rules.Laplace())
    assert repr(sparse()) == "SpatioTemporalGP(Scale(Matern) over time × Scale(Matern) over space, 2 inducing places)"


def test_work_grows_with_the_number_of_times():
    """A chain of as many points as there are times, whatever the data at each, and one step where these are regular."""
    t, i = torch.meshgrid(0.1 * torch.arange(300, dtype=D), torch.arange(4.0, dtype=D), indexing="ij")
    x = torch.cat([t.reshape(-1, 1), PLACES[i.flatten().long()]], -1)
    model = models.SpatioTemporalGP(matern(), spatial())
    zeros = torch.zeros(len(x), 1, dtype=D)
    (part,) = model._trajectory(model.place(x), zeros, zeros.unsqueeze(-1)).parts
    assert part.chain.step.shape == (300,) and part.chain.A.shape == (1, 8, 8)
