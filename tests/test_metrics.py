"""Scores against scikit-learn, closed forms and brute force."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from bayesgn import metrics


@pytest.fixture
def classified(generator, float64):
    logits = 2 * torch.randn(200, 4, generator=generator, dtype=float64)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return logits.softmax(-1), target


@pytest.fixture
def mixed(generator, float64):
    """A mixture of 5 normals at each of 30 points, as the weight-space view of a regression gives it, and targets."""
    mean, std = torch.randn(30, 5, generator=generator, dtype=float64), 0.3 + torch.rand(30, 5, generator=generator, dtype=float64)
    weight = torch.rand(30, 5, generator=generator, dtype=float64).log_softmax(-1)
    target = torch.randn(30, generator=generator, dtype=float64)
    return MixtureSameFamily(Categorical(logits=weight), Normal(mean, std)), target


def brute_force_ece(p, target, bins):
    sure, chosen = p.max(-1)
    total = 0.0
    for i in range(bins):
        inside = (sure >= i / bins) & ((sure < (i + 1) / bins) | (i == bins - 1))
        if inside.any():
            gap = (chosen[inside] == target[inside]).double().mean() - sure[inside].mean()
            total += inside.double().mean() * gap.abs()
    return total


def test_categorical_scores_equal_scikit_learns(classified):
    p, target = classified
    y = Categorical(probs=p)
    onehot = np.eye(4)[target]
    assert metrics.nll(y, target).item() == pytest.approx(sklearn.metrics.log_loss(target, p.numpy()), rel=1e-12)
    assert metrics.accuracy(y, target).item() == sklearn.metrics.accuracy_score(target, p.argmax(-1))
    assert metrics.brier(y, target).item() == pytest.approx(((p.numpy() - onehot) ** 2).sum(1).mean(), rel=1e-12)
    torch.testing.assert_close(metrics.entropy(y), y.entropy())
    for bins in (1, 5, 15):
        torch.testing.assert_close(metrics.ece(y, target, bins), brute_force_ece(p, target, bins))


def test_bernoulli_scores_equal_scikit_learns(generator, float64):
    p = torch.rand(300, generator=generator, dtype=float64)
    target = torch.bernoulli(p, generator=generator)
    y = Bernoulli(p)
    assert metrics.brier(y, target).item() == pytest.approx(sklearn.metrics.brier_score_loss(target, p), rel=1e-12)
    assert metrics.nll(y, target).item() == pytest.approx(sklearn.metrics.log_loss(target, p), rel=1e-12)
    assert metrics.accuracy(y, target).item() == sklearn.metrics.accuracy_score(target, p > 0.5)
    torch.testing.assert_close(metrics.ece(y, target), brute_force_ece(torch.stack([1 - p, p], -1), target.long(), 15))


def test_two_classes_are_a_bernoulli(generator, float64):
    p = torch.rand(50, generator=generator, dtype=float64)
    target = torch.bernoulli(p, generator=generator)
    two, one = Categorical(torch.stack([1 - p, p], -1)), Bernoulli(p)
    for score, factor in ((metrics.nll, 1), (metrics.accuracy, 1), (metrics.ece, 1), (metrics.brier, 2)):
        torch.testing.assert_close(score(two, target.long()), factor * score(one, target))


def test_probabilities_and_logits_agree_and_nothing_is_floored(float64):
    logits = torch.tensor([[0.0, -300.0], [2.0, 1.0]], dtype=float64)
    target = torch.tensor([1, 0])
    expected = -(logits.log_softmax(-1)[torch.arange(2), target]).mean()
    assert expected > 150
    torch.testing.assert_close(metrics.nll(Categorical(logits=logits), target), expected)
    torch.testing.assert_close(metrics.nll(Categorical(probs=logits.softmax(-1)), target), expected)
    touched = Categorical(logits=logits)
    _ = touched.probs
    torch.testing.assert_close(metrics.nll(touched, target), expected)
    sigmoid = Bernoulli(logits=torch.tensor([-300.0], dtype=float64))
    assert metrics.nll(sigmoid, torch.ones(1)).item() == pytest.approx(300)
    assert metrics.nll(Bernoulli(probs=torch.tensor([1e-30], dtype=float64)), torch.ones(1)).item() == pytest.approx(-math.log(1e-30))


def test_certain_predictions_keep_their_calibration():
    # p = 1 (and 1 + rounding) must neither get a bin of its own nor make torchmetrics squash all confidences by a sigmoid.
    p = torch.tensor([[1.0, 0.0], [0.97, 0.03], [1.0, 0.0], [1.0 + 1e-7, 0.0]])
    y = Categorical(probs=p, validate_args=False)
    y.probs = p
    target = torch.tensor([0, 1, 1, 0])
    assert metrics.ece(y, target, bins=10).item() == pytest.approx(abs(0.5 - 3.97 / 4), abs=1e-6)


@pytest.mark.parametrize("component", ["categorical", "bernoulli", "per_row"])
def test_mixtures_over_classes_are_averaged(component, generator, float64):
    f = torch.randn(7, 5, 3, generator=generator, dtype=float64)  # [n s c]
    weight = torch.rand(7, 5, generator=generator, dtype=float64)
    weight = weight / weight.sum(-1, keepdim=True)
    if component == "categorical":
        y = MixtureSameFamily(Categorical(weight), Categorical(logits=f))
        expected = torch.einsum("ns,nsc->nc", weight, f.softmax(-1))
    elif component == "bernoulli":
        y = MixtureSameFamily(Categorical(weight), Bernoulli(logits=f[..., 0]))
        expected = torch.einsum("ns,ns->n", weight, f[..., 0].sigmoid())
    else:
        y = MixtureSameFamily(Categorical(weight), Independent(Bernoulli(logits=f), 1))
        expected = torch.einsum("ns,nsc->nc", weight, f.sigmoid())
    p = metrics.probabilities(y)
    torch.testing.assert_close(p if component == "categorical" else p[..., 1], expected)
    target = torch.zeros(*y.batch_shape, *y.event_shape)
    same = Categorical(expected) if component == "categorical" else Bernoulli(expected)
    for score in (metrics.nll, metrics.brier, metrics.accuracy, metrics.ece):
        torch.testing.assert_close(score(y, target), score(same, target))


def test_ignored_labels_are_left_out(classified):
    p, target = classified
    marked = target.clone()
    marked[::3] = -100
    keep = marked != -100
    y, y_kept = Categorical(p.unflatten(0, (20, 10))), Categorical(p[keep])  # positions beside the batch
    for score in (metrics.nll, metrics.accuracy, metrics.brier, metrics.ece):
        torch.testing.assert_close(score(y, marked.unflatten(0, (20, 10)), ignore_index=-100), score(y_kept, target[keep]))
    with pytest.raises(ValueError, match="from -100 to 3 and the predictive has 4 classes.*ignore_index"):
        metrics.nll(y, marked.unflatten(0, (20, 10)))


def test_reliability_adds_up_to_the_calibration_error(classified):
    p, target = classified
    bins = metrics.reliability(Categorical(p), target, bins=12)
    gaps = bins.count / bins.count.sum() * (bins.accuracy - bins.confidence).abs()
    assert bins.count.sum() == len(p)
    torch.testing.assert_close(gaps.nansum(), metrics.ece(Categorical(p), target, bins=12))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_auroc_equals_scikit_learns_at_any_scale(scale, generator):
    inside, outside = scale * torch.randn(80, generator=generator), scale * (torch.randn(50, generator=generator) + 1)
    inside[:10] = outside[:10]  # ties count one half
    expected = sklearn.metrics.roc_auc_score([0] * 80 + [1] * 50, torch.cat([inside, outside]))
    assert metrics.auroc_ood(inside, outside).item() == pytest.approx(expected, abs=1e-7)
    assert metrics.auroc_ood(outside, inside).item() == pytest.approx(1 - expected, abs=1e-7)
    assert metrics.auroc_ood(torch.ones(3), torch.ones(4)).item() == 0.5


def test_normal_scores_equal_closed_forms(generator, float64):
    mean, std = torch.randn(40, generator=generator, dtype=float64), 0.5 + torch.rand(40, generator=generator, dtype=float64)
    target = torch.randn(40, generator=generator, dtype=float64)
    y = Normal(mean, std)
    torch.testing.assert_close(metrics.pit(y, target), torch.from_numpy(scipy.stats.norm.cdf(target, mean, std)))
    z = (target - mean) / std
    closed = std * (z * (2 * y.cdf(target) - 1) + 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))
    torch.testing.assert_close(metrics.crps(y, target), closed.mean())
    lower, upper = metrics.interval(y, 0.9)
    torch.testing.assert_close(upper - mean, 1.6448536269514722 * std)
    inside = ((target >= lower) & (target <= upper)).double().mean()
    torch.testing.assert_close(metrics.coverage(y, target, 0.9), inside)


def test_mixture_crps_and_interval_by_quadrature(mixed):
    y, target = mixed
    for i in range(5):
        parts = y.component_distribution.mean[i], y.component_distribution.stddev[i]
        one, at = MixtureSameFamily(Categorical(y.mixture_distribution.probs[i]), Normal(*parts)), float(target[i])

        def squared(z, step, one=one):
            return (float(one.cdf(torch.tensor(z, dtype=torch.float64))) - step) ** 2

        below = scipy.integrate.quad(squared, -12, at, args=(0,), epsabs=1e-11)[0]
        above = scipy.integrate.quad(squared, at, 12, args=(1,), epsabs=1e-11)[0]
        assert metrics.crps(one, target[i]).item() == pytest.approx(below + above, abs=1e-8)
    lower, upper = metrics.interval(y, 0.8)
    torch.testing.assert_close(y.cdf(lower), torch.full_like(lower, 0.1))
    torch.testing.assert_close(y.cdf(upper), torch.full_like(upper, 0.9))


def test_equal_components_are_one_normal(float64):
    mean, target = torch.zeros(3, 4, dtype=float64), torch.tensor([0.1, -2.0, 1.0], dtype=float64)
    y = MixtureSameFamily(Categorical(torch.ones(3, 4, dtype=float64)), Normal(mean, 1 + mean))
    one = Normal(mean[:, 0], 1 + mean[:, 0])
    for score in (metrics.crps, metrics.coverage, metrics.nll, metrics.rmse):
        torch.testing.assert_close(score(y, target), score(one, target))


def test_vector_targets_are_scored_by_their_marginals(generator, float64):
    A = torch.randn(6, 5, 2, 2, generator=generator, dtype=float64)  # [n s c c]
    cov = A @ A.mT + torch.eye(2, dtype=float64)
    mean = torch.randn(6, 5, 2, generator=generator, dtype=float64)
    target = torch.randn(6, 2, generator=generator, dtype=float64)
    weights = Categorical(torch.ones(6, 5, dtype=float64))
    y = MixtureSameFamily(weights, MultivariateNormal(mean, cov))
    std = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    outputs = [(MixtureSameFamily(weights, Normal(mean[..., k], std[..., k])), target[:, k]) for k in range(2)]
    for score in (metrics.crps, metrics.coverage):
        torch.testing.assert_close(score(y, target), torch.stack([score(*output) for output in outputs]).mean())
    torch.testing.assert_close(metrics.pit(y, target)[:, 1], outputs[1][0].cdf(target[:, 1]))
    torch.testing.assert_close(metrics.nll(y, target), -y.log_prob(target).mean())


def test_gpytorch_gaussians_are_scored_datum_by_datum(generator, float64):
    gpytorch = pytest.importorskip("gpytorch")
    A = torch.randn(8, 8, generator=generator, dtype=float64)
    cov = A @ A.mT + torch.eye(8, dtype=float64)
    target = torch.randn(8, generator=generator, dtype=float64)
    joint = gpytorch.distributions.MultivariateNormal(torch.zeros(8, dtype=float64), cov)
    marginals = Normal(torch.zeros(8, dtype=float64), cov.diagonal().sqrt())
    for score in (metrics.nll, metrics.crps, metrics.coverage, metrics.rmse):
        torch.testing.assert_close(score(joint, target), score(marginals, target))
    halves = [(Normal(marginals.mean[i], marginals.stddev[i]), target[i]) for i in (slice(0, 3), slice(3, 8))]
    assert metrics.summary([(joint, target)]) == pytest.approx(metrics.summary(halves))
    multitask = gpytorch.distributions.MultitaskMultivariateNormal(torch.zeros(4, 2, dtype=float64), cov)
    rows = Independent(Normal(torch.zeros(4, 2, dtype=float64), cov.diagonal().sqrt().view(4, 2)), 1)
    assert metrics.summary([(multitask, target.view(4, 2))]) == pytest.approx(metrics.summary([(rows, target.view(4, 2))]))


def test_a_summary_does_not_depend_on_the_batches(classified, generator):
    p, target = classified
    out = torch.softmax(0.3 * torch.randn(60, 4, generator=generator, dtype=p.dtype), -1)
    whole = metrics.summary([(Categorical(p), target)], ood=[Categorical(out)])
    batches = ((Categorical(p[i : i + 37]), target[i : i + 37]) for i in range(0, 200, 37))
    assert metrics.summary(batches, ood=(Categorical(part) for part in out.split(7))) == pytest.approx(whole)
    y = Categorical(p)
    direct = {"n": 200, "nll": metrics.nll(y, target), "accuracy": metrics.accuracy(y, target), "ece": metrics.ece(y, target)}
    direct |= {"brier": metrics.brier(y, target), "auroc_ood": metrics.auroc_ood(y.entropy(), Categorical(out).entropy())}
    assert whole == pytest.approx({name: float(value) for name, value in direct.items()})


def test_a_regression_summary_does_not_depend_on_the_batches(mixed):
    y, target = mixed
    part = lambda i: MixtureSameFamily(
        Categorical(y.mixture_distribution.probs[i]), Normal(y.component_distribution.mean[i], y.component_distribution.stddev[i])
    )
    wide = Normal(torch.zeros(10, dtype=target.dtype), torch.linspace(0.5, 3, 10, dtype=target.dtype))
    whole = metrics.summary([(y, target)], ood=[wide])
    halves = [(part(i), target[i]) for i in (slice(0, 11), slice(11, 30))]
    assert metrics.summary(halves, ood=[wide]) == pytest.approx(whole)
    assert whole["rmse"] == pytest.approx(metrics.rmse(y, target).item())
    assert whole["auroc_ood"] == pytest.approx(metrics.auroc_ood(y.variance, wide.variance).item())
    assert list(whole) == ["n", "nll", "rmse", "crps", "coverage", "auroc_ood"]


def test_counts_have_a_summary_without_intervals():
    scores = metrics.summary([(Poisson(torch.tensor([2.0, 3.0])), torch.tensor([1.0, 3.0]))])
    assert list(scores) == ["n", "nll", "rmse"]
    assert scores["nll"] == pytest.approx(-scipy.stats.poisson.logpmf([1, 3], [2, 3]).mean())
    rate, target = torch.tensor([2.0, 0.5]), torch.tensor([0.3, 3.0])
    torch.testing.assert_close(metrics.pit(Gamma(torch.ones(2), rate), target), 1 - torch.exp(-rate * target))


def test_bad_input_says_what_came_and_what_was_expected():
    y, normal = Categorical(torch.ones(3, 2)), Normal(torch.zeros(3, 1), torch.ones(3, 1))
    bad = torch.tensor([[float("nan"), 0.0]])
    cases = [
        (ValueError, r"shape \[2\] and the predictive distribution has \[3\]", lambda: metrics.nll(y, torch.zeros(2))),
        (ValueError, r"\[3\].*has \[3, 1\]; use target.unsqueeze", lambda: metrics.nll(normal, torch.zeros(3))),
        (ValueError, "1 of 3 targets are NaN", lambda: metrics.crps(normal, torch.tensor([[0.0], [float("nan")], [1.0]]))),
        (ValueError, "from 0 to 2 and the predictive has 2 classes", lambda: metrics.ece(y, torch.tensor([0, 1, 2]))),
        (ValueError, "whole numbers; the targets hold 0.5", lambda: metrics.brier(y, torch.tensor([0, 0.5, 1]))),
        (ValueError, "every target is ignore_index = 1", lambda: metrics.nll(y, torch.ones(3), ignore_index=1)),
        (ValueError, "predicted probabilities are NaN", lambda: metrics.entropy(Categorical(logits=bad, validate_args=False))),
        (ValueError, "there are no targets", lambda: metrics.nll(Categorical(torch.ones(0, 2)), torch.zeros(0))),
        (ValueError, "1 of 2 in-distribution scores are NaN", lambda: metrics.auroc_ood(bad, torch.ones(3))),
        (ValueError, "no out-of-distribution scores", lambda: metrics.auroc_ood(torch.ones(3), torch.ones(0))),
        (ValueError, "level is 95", lambda: metrics.coverage(normal, torch.zeros(3, 1), 95)),
        (ValueError, "no batches", lambda: metrics.summary([])),
        (ValueError, "mix distributions", lambda: metrics.summary([(y, torch.zeros(3)), (normal, torch.zeros(3, 1))])),
        (TypeError, "Normal has no class probabilities", lambda: metrics.accuracy(normal, torch.zeros(3, 1))),
        (TypeError, "Gaussian predictive.*StudentT", lambda: metrics.crps(StudentT(torch.ones(3)), torch.zeros(3))),
        (TypeError, "StudentT no cdf", lambda: metrics.coverage(StudentT(torch.ones(3)), torch.zeros(3))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_torchmetrics_is_imported_on_use():
    code = "import sys, bayesgn.metrics; print({'torchmetrics', 'gpytorch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
