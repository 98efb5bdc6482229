"""Hamiltonian Monte Carlo against closed forms and quadrature, within Monte Carlo error."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.inference.hmc import hmc
from bayesgn.inference.samples import Samples, diagnose

from .problems import classification, snapshot

pytest.importorskip("arviz")
module = importlib.import_module("bayesgn.inference.hmc")  # (a verb may take its module's name)
D = torch.float64


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def line(n: int = 12):
    x = torch.randn(n, 1, dtype=D, generator=seed())
    y = 1.5 * x - 0.5 + 0.5 * torch.randn(n, 1, dtype=D, generator=seed(1))
    net = nn.Linear(1, 1).to(D).eval()
    net.weight.data.fill_(1.0), net.bias.data.zero_()
    return net, x, y


def exact_line(x, y, P: float, noise: float):
    X = torch.cat([x, torch.ones_like(x)], 1)
    Σ = torch.linalg.inv(X.mT @ X / noise + P * torch.eye(2, dtype=D))
    return Σ @ X.mT @ y[:, 0] / noise, Σ


def within(samples: Samples, mean, Σ) -> None:
    """Mean and covariance within five standard errors of what the draws are worth."""
    ess = samples.ess.min()
    L = torch.linalg.cholesky(Σ)
    white = lambda M: torch.linalg.solve_triangular(L, M, upper=False)
    assert (white((samples.mean - mean)[:, None]).abs() < 5 / ess.sqrt()).all()
    assert ((white(white(samples.covariance).mT) - torch.eye(len(mean), dtype=D)).abs() < 5 * (2 / ess).sqrt() * 1.5).all()


@pytest.mark.parametrize("whitened", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_conjugate_regression(whitened):
    net, x, y = line()
    before = snapshot(net)
    network, likelihood = models.Network(net, models.WeightPrior(0.5), ggn.Full), likelihoods.Gaussian(0.25)
    start = bgn.laplace(network, likelihood, (x, y)) if whitened else None
    samples = hmc(network, likelihood, (x, y), samples=250, warmup=80, chains=2, start=start, generator=seed(), progress=False)
    mean, Σ = exact_line(x, y, 0.5, 0.25)
    within(samples, mean, Σ)
    assert samples.ess.min() > 100 and samples.r_hat.max() < 1.05
    # log p(y, θ) of each draw, to which the evidence is log p(y, θ) − log p(θ | y)
    θ = samples.weights.flatten(0, 1)
    X = torch.cat([x, torch.ones_like(x)], 1)
    evidence = MultivariateNormal(torch.zeros(len(x), dtype=D), X @ X.mT / 0.5 + 0.25 * torch.eye(len(x), dtype=D)).log_prob(y[:, 0])
    gap = samples.log_joint.flatten() - MultivariateNormal(mean, Σ).log_prob(θ)
    torch.testing.assert_close(gap, evidence.expand_as(gap), rtol=1e-10, atol=1e-10)
    # functions and predictive
    f = samples(x)
    torch.testing.assert_close(f, θ[:, :1, None] * x + θ[:, 1:, None])
    y_new = samples.likelihood(f)
    torch.testing.assert_close(y_new.mean, f.mean(0))
    torch.testing.assert_close(y_new.variance, 0.25 + f.var(0, unbiased=False))
    assert "2 chains × 250 draws of 2 weights" in repr(samples) and len(samples) == 500
    after = snapshot(net)
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and before[1:] == after[1:]


def test_logistic_regression_by_quadrature():
    net, x, _ = line(10)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=D)
    network = models.Network(net, models.WeightPrior(0.3), ggn.Full)
    start = bgn.laplace(network, likelihoods.Bernoulli(), (x, y))
    samples = hmc(network, likelihoods.Bernoulli(), (x, y), samples=250, warmup=80, chains=2, start=start, generator=seed(), progress=False)
    grid = torch.linspace(-10, 10, 400, dtype=D)
    θ = torch.cartesian_prod(grid, grid)
    f = θ[:, :1] * x[:, 0] + θ[:, 1:]
    log_p = -nn.functional.binary_cross_entropy_with_logits(f, y.expand_as(f), reduction="none").sum(1) - 0.15 * θ.square().sum(1)
    w = log_p.softmax(0)
    mean = w @ θ
    within(samples, mean, (θ - mean).mT @ ((θ - mean) * w[:, None]))


def test_the_linearised_model_is_sampled_as_such():
    """A net bent by its weights: HMC of its linear model against quadrature over the two of them."""
    net, x, y = line()
    bent = nn.Sequential(net, nn.Tanh()).eval()
    likelihood = likelihoods.StudentT(3.0, 0.3)
    network = models.Network(bent, models.WeightPrior(0.7), ggn.Full)
    refined = bgn.bayes_newton(network, likelihood, (x, y), rules.Variational(), steps=10, progress=False)
    samples = hmc(refined, samples=250, warmup=80, chains=2, generator=seed(), progress=False)
    h = torch.tanh(x)  # at weight 1, bias 0
    J = (1 - h.square()) * torch.cat([x, torch.ones_like(x)], 1)
    grid = torch.linspace(-5, 7, 400, dtype=D)
    θ = torch.cartesian_prod(grid, grid)
    f = h[:, 0] + (θ - torch.tensor([1.0, 0.0], dtype=D)) @ J.mT
    log_p = torch.distributions.StudentT(3.0, f, 0.3).log_prob(y[:, 0]).sum(1) - 0.35 * θ.square().sum(1)
    w = log_p.softmax(0)
    mean = w @ θ
    within(samples, mean, (θ - mean).mT @ ((θ - mean) * w[:, None]))
    drawn = samples.weights.flatten(0, 1)
    torch.testing.assert_close(samples(x)[..., 0], h[:, 0] + (drawn - torch.tensor([1.0, 0.0], dtype=D)) @ J.mT)
    with pytest.warns(UserWarning, match="cannot be told from 2 draws"):
        direct = hmc(refined, samples=2, warmup=5, chains=1, generator=seed(), progress=False)
    at = direct.weights[0, -1]
    by_hand = torch.distributions.StudentT(3.0, h[:, 0] + J @ (at - torch.tensor([1.0, 0.0], dtype=D)), 0.3).log_prob(y[:, 0]).sum()
    by_hand = by_hand + torch.distributions.Normal(0.0, torch.tensor(0.7, dtype=D).rsqrt()).log_prob(at).sum()
    torch.testing.assert_close(direct.log_joint[0, -1], by_hand, rtol=1e-10, atol=1e-10)


def quick(net, x, y, likelihood, **options):
    options = {"samples": 8, "warmup": 8, "chains": 2, "progress": False, "max_tree_depth": 3} | options
    with pytest.warns(UserWarning) if options.pop("warns", False) else _silent():
        return hmc(models.Network(net, structure=ggn.Full, parameters=options.pop("parameters", None)), likelihood, **{"data": (x, y)} | options)


class _silent:
    def __enter__(self):
        import warnings

        self.inner = warnings.catch_warnings()
        self.inner.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self.inner.__exit__(*error)


def test_deterministic_and_the_global_generator_is_left_alone():
    net, x, y = line()
    likelihood = likelihoods.Gaussian(0.25)
    state = torch.random.get_rng_state()
    a, b, c = (quick(net, x, y, likelihood, generator=seed(s)) for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.weights, b.weights) and not torch.equal(a.weights, c.weights)
    longer = quick(net, x, y, likelihood, generator=seed(3), chains=1)
    assert torch.equal(longer.weights[0], a.weights[0])  # a chain does not depend on how many there are


def test_a_subset_of_a_classifier():
    net, x, y = classification(n=20, steps=10)
    y = y.clone()
    y[3] = -100
    samples = quick(net, x, y, likelihoods.Categorical(), parameters=["2.weight", "2.bias"], generator=seed())
    assert samples.weights.shape == (2, 8, 21) and samples.names == ("2.weight", "2.bias")
    θ = samples.weights.flatten(0, 1)
    hidden = torch.tanh(net[0](x)).detach()
    expected = torch.stack([hidden @ t[:18].view(3, 6).mT + t[18:] for t in θ])
    torch.testing.assert_close(samples(x), expected)
    assert samples.likelihood(samples(x)).probs.shape == (20, 3)
    data = samples.to_arviz()
    assert data.posterior["2.weight"].shape == (2, 8, 3, 6) and data.sample_stats["diverging"].shape == (2, 8)
    torch.testing.assert_close(torch.tensor(data.log_likelihood["y"].values)[:, :, 3], torch.zeros(2, 8, dtype=D))  # the missing label
    assert samples.thinned(4).weights.shape == (2, 2, 21)
    torch.testing.assert_close(samples.thinned(4).weights, samples.weights[:, [3, 7]])


def test_starts():
    net, x, y = line()
    likelihood = likelihoods.Gaussian(0.25)
    at = torch.tensor([[3.0, 1.0], [-2.0, 0.5]], dtype=D)
    samples = quick(net, x, y, likelihood, start=at, samples=1, warmup=1, generator=seed())
    assert samples.weights.shape == (2, 1, 2)
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        quick(net, x, y, likelihood, start=at[:, :1])
    with pytest.raises(ValueError, match="same net"):
        other = bgn.laplace(models.Network(nn.Linear(1, 2).to(D).eval()), likelihoods.Gaussian(0.1), (x, y.expand(-1, 2)))
        quick(net, x, y, likelihood, start=other)
    with pytest.raises(TypeError, match="expected a posterior"):
        quick(net, x, y, likelihood, start="laplace")


def test_r_hat_and_effective_draws():
    import arviz

    draws = torch.randn(4, 200, 3, dtype=D, generator=seed())
    draws[0, :, 2] += 3  # one chain elsewhere
    found = diagnose(draws)
    assert found.r_hat[:2].max() < 1.03 and found.r_hat[2] > 1.3 and found.ess[:2].min() > 500
    torch.testing.assert_close(found.r_hat[0].item(), float(arviz.rhat(draws[..., 0].numpy())))
    assert diagnose(draws[:1]).r_hat.shape == (3,)
    trend = torch.linspace(0, 5, 200, dtype=D)[None, :, None] + draws[:1]
    assert diagnose(trend).r_hat.min() > 1.3  # a single chain that drifts


def test_warnings_and_interruption(monkeypatch):
    net, x, y = line()
    samples = quick(net, x, y, likelihoods.Gaussian(0.25), generator=seed())
    samples.at_data = samples.diagnose(x)._replace(r_hat=torch.full((3, 1), 1.3))
    assert "NOT CONVERGED" in repr(samples) and not samples.converged
    monkeypatch.setattr(Samples, "diagnose", lambda self, x: samples.at_data)
    with pytest.warns(UserWarning, match="have not converged"):
        module._report(samples)
    samples.diverging[0, 0] = True
    with pytest.warns(UserWarning, match="1 of 16 trajectories diverged"):
        module._report(samples)
    calls, log_joint = [0], module._Trained.log_joint

    def interrupted(self, θ):
        calls[0] += 1
        if calls[0] > 60:
            raise KeyboardInterrupt
        return log_joint(self, θ)

    monkeypatch.setattr(module._Trained, "log_joint", interrupted)
    with pytest.warns(UserWarning, match="interrupted: 1 of 2 chains"):
        part = hmc(models.Network(net), likelihoods.Gaussian(0.25), (x, y), samples=500, warmup=1, chains=2, progress=False, max_tree_depth=1)
    assert part.weights.shape[0] == 1 and 4 <= part.weights.shape[1] < 500 and torch.isfinite(part.weights).all()


def test_bad_input():
    net, x, y = line()
    network, likelihood = models.Network(net), likelihoods.Gaussian(0.25)
    for name in ("samples", "warmup", "chains"):
        for value in (0, -3, 2.5, True):
            with pytest.raises(ValueError, match=f"{name}="):
                hmc(network, likelihood, (x, y), **{name: value})
    with pytest.raises(ValueError, match="target_accept=1.5"):
        hmc(network, likelihood, (x, y), target_accept=1.5)
    with pytest.raises(TypeError, match="wrap the net first"):
        hmc(net, likelihood, (x, y))
    with pytest.raises(TypeError, match="start=posterior"):
        hmc(bgn.laplace(network, likelihood, (x, y)), likelihood, (x, y))
    with pytest.raises(TypeError, match="data"):
        hmc(network, likelihood)
    with pytest.raises(TypeError, match="expected one of bayesgn.likelihoods"):
        hmc(network, None, (x, y))
    with pytest.raises(ValueError, match="empty"):
        hmc(network, likelihood, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="no rows"):
        hmc(network, likelihood, [])
    with pytest.raises(ValueError, match="non-finite"):
        hmc(network, likelihood, (x * float("nan"), y))
    with pytest.raises(ValueError, match="all 12 targets are missing"):
        hmc(network, likelihood, (x, y * float("nan")))
    with pytest.raises(TypeError, match="has its likelihood and data"):
        hmc(network.start(likelihood, (x, y)), likelihood, (x, y))
    with pytest.raises(ValueError, match="step=0"):
        quick(net, x, y, likelihood).thinned(0)
