"""Validation tuning and temperature: never worse than MAP, and the right numbers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, metrics, models
from bayesgn.inference import Tempered, fit_temperature
from bayesgn.inference.temperature import golden_section

from .problems import assert_same, classification, fit, regression, snapshot


def held_out(problem, seed=7):
    """New data of the same task."""
    if problem is classification:
        return classification(n=120, seed=seed)[1:]
    net, x, _ = regression()
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 3, dtype=torch.float64, generator=g)
    return x, net(x).detach() + 0.3 * torch.randn(80, 2, dtype=torch.float64, generator=g)


def map_nll(posterior, x, y):
    f = posterior(x).marginals()[0]
    return metrics.nll(posterior.likelihood.conditional(f), y).item()


@pytest.mark.parametrize("problem", [regression, classification])
@pytest.mark.parametrize("structure", ["Full", "Diag", "Kron"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_never_more_than_a_hundredth_above_map(problem, structure, per_layer):
    net, x, y = problem()
    posterior = fit(net, x, y, getattr(ggn, structure), models.WeightPrior.per_layer(net, torch.tensor([1e-3, 1e-2])) if per_layer else None)
    before, (xv, yv) = snapshot(net), held_out(problem)
    record = bgn.tune(posterior, (xv, yv), progress=False)
    value = metrics.nll(posterior.likelihood(posterior(xv)), yv).item()
    assert value == pytest.approx(record.score, abs=1e-12)
    assert record.map_score == pytest.approx(map_nll(posterior, xv, yv), abs=1e-12)
    assert value <= record.map_score + 0.01
    assert value <= min(v for _, _, v in record.tried) + 1e-12
    assert record.precision == posterior.prior.precision.tolist()
    if per_layer:  # the ratio of precisions is kept
        assert record.precision[1] / record.precision[0] == pytest.approx(10)
    assert_same(before, snapshot(net))


def test_it_finds_the_best_precision():
    net, x, y = classification(steps=200)
    posterior, (xv, yv) = fit(net, x, y, ggn.Full), held_out(classification)
    record = bgn.tune(posterior, (xv, yv), progress=False)
    for precision in torch.logspace(-4, 6, 60).double():
        posterior.prior.precision = precision
        assert record.score <= metrics.nll(posterior.likelihood(posterior(xv)), yv).item() + 1e-4


def test_even_where_bounds_exclude_map_it_is_reached():
    net, x, y = classification(steps=5)
    net[2].weight.data *= 3e3  # an enormous variance: a precision of 1e4 is far from MAP
    posterior, (xv, yv) = fit(net, x, y, ggn.Diag, likelihood=likelihoods.Categorical()), held_out(classification)
    record = bgn.tune(posterior, (xv, yv), bounds=(1e-4, 1e-2), progress=False)
    assert record.score <= record.map_score + 0.01


def test_temperature_and_precision_together():
    net, x, y = classification(steps=400)
    posterior, (xv, yv) = fit(net, x, y, ggn.Kron), held_out(classification)
    record = bgn.tune(posterior, (xv, yv), temperature=True, progress=False)
    assert isinstance(record.likelihood, Tempered) and record.temperature == record.likelihood.temperature
    assert metrics.nll(record.likelihood(posterior(xv)), yv).item() == pytest.approx(record.score, abs=1e-9)
    assert record.score <= record.map_score + 0.01 < map_nll(posterior, xv, yv)  # here MAP + temperature beats MAP
    with pytest.raises(ValueError, match="a temperature divides logits, and Gaussian is not over classes"):
        bgn.tune(fit(*regression(), ggn.Kron), held_out(regression), temperature=True)


def test_weight_space_and_other_metrics():
    net, x, y = classification()
    posterior, (xv, yv) = fit(net, x, y, ggn.Kron), held_out(classification)
    record = bgn.tune(posterior, (xv, yv), samples=10, generator=torch.Generator().manual_seed(4), progress=False)
    draws = posterior.sample_outputs(xv, 10, torch.Generator().manual_seed(4))
    assert metrics.nll(posterior.likelihood(draws), yv).item() == pytest.approx(record.score, abs=1e-12)
    batches = [(xv[i], yv[i]) for i in torch.arange(120).split(50)]
    again = bgn.tune(posterior, batches, samples=10, generator=torch.Generator().manual_seed(4), progress=False)
    assert again.score <= record.score + 1e-6
    record = bgn.tune(posterior, batches, metric=metrics.brier, progress=False)
    assert metrics.brier(posterior.likelihood(posterior(xv)), yv).item() == pytest.approx(record.score, abs=1e-12)


def test_ignored_rows_count_for_nothing():
    net, x, y = classification()
    xv, yv = held_out(classification)
    marked = yv.clone()
    marked[60:] = -100
    records = [bgn.tune(fit(net, x, y, ggn.Kron), data, progress=False) for data in ((xv[:60], yv[:60]), (xv, marked))]
    assert records[0].score == pytest.approx(records[1].score, abs=1e-12) and records[0].precision == records[1].precision


def test_errors_leave_the_prior_as_it_was(caplog):
    net, x, y = classification()
    posterior, (xv, yv) = fit(net, x, y, ggn.Kron), held_out(classification)
    with pytest.raises(ValueError, match="bounds=.*points=2; expected 0 < low"):
        bgn.tune(posterior, (xv, yv), points=2)
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        bgn.tune(posterior, (xv, yv + 1))
    with pytest.raises(ValueError, match="score .* is NaN"):
        bgn.tune(posterior, (xv, yv), metric=lambda y, t: torch.tensor(math.nan))
    assert posterior.prior.precision.item() == 1.0
    with caplog.at_level(logging.WARNING, "bayesgn.inference"):
        bgn.tune(posterior, (xv, yv), metric=lambda y, t: -metrics.nll(y, t) * 0 + posterior.prior.precision.detach(), progress=False)
    assert "lies at the lower bound" in caplog.text


# -- temperature ----------------------------------------------------------------------------------------------------------------


def test_temperature_is_stationary_and_by_hand():
    net, x, y = classification(steps=400)
    xv, yv = held_out(classification)
    f = net(xv).detach()
    tempered = fit_temperature(likelihoods.Categorical(), f, yv)
    T = torch.tensor(tempered.temperature, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(f / T, yv)
    (slope,) = torch.autograd.grad(loss, T)
    assert abs(slope.item() * tempered.temperature) < 1e-4 and tempered.temperature > 1.2
    assert metrics.nll(tempered.conditional(f), yv).item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.equal(tempered.conditional(f).probs.argmax(-1), f.argmax(-1))


def test_tempered_divides_gaussians_and_samples():
    net, x, y = classification()
    posterior = fit(net, x, y, ggn.Kron)
    tempered, f = Tempered(posterior.likelihood, 2.0), posterior(x)
    mean, cov = f.marginals()
    torch.testing.assert_close(tempered(f).probs, posterior.likelihood.predict(mean / 2, cov / 4).probs)
    draws = posterior.sample_outputs(x, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(tempered(draws).probs, (draws / 2).softmax(-1).mean(0))
    assert "temperature=2" in repr(tempered)
    with pytest.raises(ValueError, match="temperature=0; expected a positive number"):
        Tempered(posterior.likelihood, 0)


def test_temperature_of_bernoulli():
    y = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]
    tempered = fit_temperature(likelihoods.Bernoulli(), torch.full((4, 1), 4.0), y)
    assert tempered.temperature == pytest.approx(4 / math.log(3), rel=1e-3)


def test_golden_section():
    x, value = golden_section(lambda x: (x - 0.3) ** 2 + 2, -3, 5, 1e-6)
    assert x == pytest.approx(0.3, abs=1e-5) and value == pytest.approx(2)
