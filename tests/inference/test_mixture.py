"""Mixtures of Laplace against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal

import bayesgn as bgn
from bayesgn import ggn, likelihoods, metrics
from bayesgn.inference.mixture import MixtureOf

from .problems import classification, fit, regression


def ensemble(problem, **options):
    nets = [problem(seed=s)[0] for s in range(3)]
    _, x, y = problem()
    return [fit(net, x, y, ggn.Kron, **options) for net in nets], x, y


def test_classes_average_probabilities():
    posteriors, x, y = ensemble(classification)
    mixed = bgn.mixture(posteriors, weights=[1, 2, 1])
    expected = sum(w * p.likelihood(p(x)).probs for w, p in zip((0.25, 0.5, 0.25), posteriors, strict=True))
    assert isinstance(mixed(x), Categorical)
    torch.testing.assert_close(mixed(x).probs, expected)
    torch.testing.assert_close(bgn.mixture(posteriors)(x).probs, sum(p.likelihood(p(x)).probs for p in posteriors) / 3)
    assert metrics.nll(mixed(x), y).isfinite()


def test_regression_is_a_mixture_of_gaussians():
    posteriors, x, y = ensemble(regression)
    mixed = bgn.mixture(posteriors, weights=torch.tensor([0.2, 0.5, 0.3]))(x)
    assert isinstance(mixed, MixtureSameFamily) and isinstance(mixed.component_distribution, MultivariateNormal)
    parts = [p.likelihood(p(x)) for p in posteriors]
    log_prob = torch.stack([q.log_prob(y) + torch.tensor(w).log() for q, w in zip(parts, (0.2, 0.5, 0.3), strict=True)]).logsumexp(0)
    torch.testing.assert_close(mixed.log_prob(y), log_prob, rtol=1e-6, atol=1e-6)
    for score in (metrics.nll, metrics.rmse, metrics.crps):
        assert score(mixed, y).isfinite()


def test_bernoulli_and_counts():
    posteriors, x, y = ensemble(regression, likelihood=likelihoods.Gaussian(0.1))
    for likelihood, target in ((likelihoods.Bernoulli(), (y > 0).double()), (likelihoods.Poisson(), y.abs().round())):
        for p in posteriors:
            p.likelihood = likelihood
        parts = [likelihood(p(x)) for p in posteriors]
        mixed = bgn.mixture(posteriors)(x)
        if isinstance(likelihood, likelihoods.Bernoulli):
            assert isinstance(mixed, Independent)
            torch.testing.assert_close(mixed.probs, sum(q.probs for q in parts) / 3)
            continue
        assert isinstance(mixed, MixtureOf)
        torch.testing.assert_close(mixed.log_prob(target), torch.stack([q.log_prob(target) for q in parts]).logsumexp(0) - torch.tensor(3.0).log())
        torch.testing.assert_close(mixed.mean, sum(q.mean for q in parts) / 3)
        second = sum(q.variance + q.mean.square() for q in parts) / 3
        torch.testing.assert_close(mixed.variance, second - mixed.mean.square())
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            draws = mixed.sample((4000,))
        assert draws.shape == (4000, *target.shape)
        error = (mixed.variance / 4000).sqrt()
        assert ((draws.mean(0) - mixed.mean).abs() < 5 * error).all()
        assert metrics.nll(mixed, target).isfinite() and mixed.support is not None


def test_weights_by_evidence():
    posteriors, x, _ = ensemble(classification)
    mixed = bgn.mixture(posteriors, by_evidence=True)
    evidence = torch.stack([p.log_evidence().detach() for p in posteriors])
    torch.testing.assert_close(mixed.weights, evidence.softmax(0))
    torch.testing.assert_close(mixed.log_evidence().detach(), evidence.exp().mean().log())
    assert "3 posteriors" in repr(mixed)


def test_samples_come_from_every_component():
    posteriors, x, _ = ensemble(regression)
    mixed = bgn.mixture(posteriors, weights=[0.0, 1.0, 0.0])
    draws = mixed.sample_outputs(x, 5, torch.Generator().manual_seed(0))
    assert draws.shape == (5, 40, 2)
    generator = torch.Generator().manual_seed(0)
    torch.multinomial(mixed.weights, 5, replacement=True, generator=generator)
    torch.testing.assert_close(draws, posteriors[1].sample_outputs(x, 5, generator))
    assert bgn.mixture(posteriors).sample_outputs(x, 7).shape == (7, 40, 2)


def test_refusals():
    posteriors, x, y = ensemble(regression)
    other = ensemble(classification)[0][0]
    smaller = fit(regression()[0], x[:10], y[:10], ggn.Kron)
    narrow = fit(*regression(c=1), ggn.Kron)
    for arguments, error, message in (
        (([],), ValueError, "posteriors is empty"),
        (([1],), TypeError, r"posteriors\[0\] is a int; expected posteriors"),
        (([posteriors[0], other],), ValueError, r"likelihoods \['Categorical', 'Gaussian'\]"),
        ((posteriors, [1, 2]), ValueError, r"weights \[1.0, 2.0\]; expected 3 nonnegative"),
        ((posteriors, [0, 0, 0]), ValueError, "not all zero"),
        ((posteriors, [1, 1, -1]), ValueError, "nonnegative"),
        ((posteriors, [1, 1, 1], True), ValueError, "two ways to weigh"),
        (([posteriors[0], smaller], None, True), ValueError, r"saw \[10, 40\] data"),
    ):
        with pytest.raises(error, match=message):
            bgn.mixture(*arguments)
    with pytest.raises(ValueError, match="must answer the same rows and outputs"):
        bgn.mixture([posteriors[0], narrow])(x)
