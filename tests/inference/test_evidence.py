"""Evidence: gradients and optimum against a dense oracle, finite differences and scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from bayesgn.inference import ascent
from bayesgn.inference.evidence import AutogradObjective, in_double, read, spectral_objective, tunable

from .problems import assert_same, classification, fit, regression, snapshot

PRIORS = {
    "scalar": lambda net: models.WeightPrior(0.7),
    "per_layer": lambda net: models.WeightPrior.per_layer(net, torch.tensor([0.5, 2.0])),
    "per_weight": lambda net: models.WeightPrior.per_weight(net, 0.9),
}
# structure, prior, whether the fast form is expected
CASES = [
    ("Full", "scalar", True),
    ("Full", "per_layer", False),
    ("Full", "per_weight", False),
    ("Layerwise", "scalar", True),
    ("Layerwise", "per_layer", True),
    ("Kron", "scalar", True),
    ("Kron", "per_layer", True),
    ("EigenKron", "per_layer", True),
    ("Diag", "scalar", True),
    ("Diag", "per_layer", True),
    ("Diag", "per_weight", True),
    ("Gram", "scalar", True),
    ("Gram", "per_layer", False),
    ("LowRank", "scalar", True),
]
CASES = [c for c in CASES if hasattr(ggn, c[0])]


def dense_log_evidence(net, x, y, precision, noise):
    """Written out with the dense Jacobian and slogdet, for Gaussian noise and Full."""
    names, θ = zip(*[(k, p.detach()) for k, p in net.named_parameters()], strict=True)
    J = torch.autograd.functional.jacobian(
        lambda *t: torch.func.functional_call(net, dict(zip(names, t, strict=True)), x), tuple(θ), vectorize=True
    )
    J = torch.cat([j.flatten(2) for j in J], -1).flatten(0, 1).numpy()  # [n c, p]
    θ = torch.cat([t.reshape(-1) for t in θ]).numpy()
    r = (y - net(x).detach()).numpy().reshape(-1)
    P = np.broadcast_to(precision, θ.shape)
    log_lik = -0.5 * (len(r) * math.log(2 * math.pi * noise) + r @ r / noise)
    return log_lik - 0.5 * (P * θ * θ).sum() + 0.5 * np.log(P).sum() - 0.5 * np.linalg.slogdet(J.T @ J / noise + np.diag(P))[1]


@pytest.mark.parametrize("structure, prior, fast", CASES)
@pytest.mark.parametrize("problem", [regression, classification])
def test_gradient_and_hessian_by_finite_differences(structure, prior, fast, problem):
    net, x, y = problem()
    posterior = fit(net, x, y, getattr(ggn, structure), PRIORS[prior](net))
    parameters = tunable(posterior)
    z, expected = read(parameters), posterior.log_evidence().item()
    slow = AutogradObjective(posterior, parameters)
    objective = spectral_objective(posterior, parameters)
    assert (objective is not None) == fast
    functions = [slow] if objective is None else [slow, objective]
    for g in functions:
        value, gradient, hessian = g(z)
        assert value == pytest.approx(expected, abs=1e-9)
        step = 1e-5
        up, down = zip(*[(g(z + step * e), g(z - step * e)) for e in np.eye(len(z))], strict=True)
        numeric = np.array([(a[0] - b[0]) / (2 * step) for a, b in zip(up, down, strict=True)])
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-5)
        if hessian is not None:
            D, B, C = hessian
            dense = np.block([[np.diag(D), B], [B.T, C]])
            numeric = np.array([(a[1] - b[1]) / (2 * step) for a, b in zip(up, down, strict=True)])
            np.testing.assert_allclose(dense, numeric, rtol=1e-5, atol=1e-5)
    slow(z)
    if objective is not None:  # away from the start, too
        for shift in (-2.0, 1.5):
            a, b = objective(z + shift), slow(z + shift)
            assert a[0] == pytest.approx(b[0], rel=1e-10)
            np.testing.assert_allclose(a[1], b[1], rtol=1e-8, atol=1e-8)


def test_value_and_optimum_against_the_dense_oracle():
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Full)
    assert posterior.log_evidence().item() == pytest.approx(dense_log_evidence(net, x, y, 1.0, 0.2), abs=1e-8)
    trace = bgn.maximize_evidence(posterior, progress=False)
    best = scipy.optimize.minimize(
        lambda z: -dense_log_evidence(net, x, y, math.exp(z[0]), math.exp(z[1])), [0.0, math.log(0.2)], method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 2000},
    )  # fmt: skip
    assert trace.converged and trace.evidence[-1] == pytest.approx(-best.fun, abs=1e-8)
    assert math.log(posterior.prior.precision.item()) == pytest.approx(best.x[0], abs=1e-6)
    assert math.log(posterior.likelihood.noise.item()) == pytest.approx(best.x[1], abs=1e-6)


@pytest.mark.parametrize("structure, prior, fast", CASES)
@pytest.mark.parametrize("problem", [regression, classification])
def test_optimum_equals_scipys(structure, prior, fast, problem):
    net, x, y = problem()
    posterior = fit(net, x, y, getattr(ggn, structure), PRIORS[prior](net))
    parameters = tunable(posterior)
    start = posterior.log_evidence().item()
    z0 = read(parameters)
    with in_double(parameters):
        g = AutogradObjective(posterior, parameters)
        n_prior = posterior.prior.log_precision.numel()
        limits = [(math.log(1e-4), math.log(1e6))] * n_prior + [(-20, 20)] * (len(z0) - n_prior)
        best = scipy.optimize.minimize(
            lambda z: (-g(z)[0], -g(z)[1]), z0, jac=True, method="L-BFGS-B", bounds=limits,
            options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-8, "maxcor": 50},
        )  # fmt: skip
        g(z0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some weights want an infinite precision: a bound
        trace = bgn.maximize_evidence(posterior, steps=500, bounds=(1e-4, 1e6), progress=False)
    assert all(b >= a - 1e-9 for a, b in zip(trace.evidence, trace.evidence[1:], strict=False))
    assert posterior.log_evidence().item() >= start and trace.converged
    assert posterior.log_evidence().item() == pytest.approx(-best.fun, abs=1e-6)
    if prior != "per_weight":
        np.testing.assert_allclose(read(parameters), best.x, atol=2e-5)


@pytest.mark.parametrize("structure", ["Full", "Kron", "Diag"])
def test_fixed_point_of_mackay(structure):
    net, x, y = classification()
    posterior = fit(net, x, y, getattr(ggn, structure))
    bgn.maximize_evidence(posterior, progress=False)
    γ = len(posterior.mean) - posterior.prior.precision.detach() * posterior.weight_variance().sum()  # well-determined directions
    torch.testing.assert_close(posterior.prior.precision.detach(), γ / posterior.deviation.square().sum(), rtol=1e-7, atol=0)


def test_per_layer_fixed_point():
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Full, models.WeightPrior.per_layer(net))
    bgn.maximize_evidence(posterior, progress=False)
    for P, b in zip(posterior.prior.precision.detach(), posterior.curvature.blocks, strict=True):
        γ = b.numel - P * posterior.weight_variance()[b.where].sum()
        torch.testing.assert_close(P, γ / posterior.deviation[b.where].square().sum(), rtol=1e-4, atol=0)


def test_starts_far_away_reach_the_same_optimum():
    ends = []
    for precision, noise in ((1e-5, 1e3), (1e5, 1e-4), (1.0, 1.0), (1e7, 1e7)):
        net, x, y = regression()
        posterior = fit(net, x, y, ggn.Kron, models.WeightPrior(precision), likelihoods.Gaussian(torch.tensor(noise).double()))
        trace = bgn.maximize_evidence(posterior, progress=False)
        assert trace.converged and trace.steps < 40
        ends.append([posterior.prior.precision.item(), posterior.likelihood.noise.item(), trace.evidence[-1]])
    np.testing.assert_allclose(ends, [ends[0]] * 4, rtol=1e-6)


# -- what is tuned, what stays -----------------------------------------------------------------------------------------------


def test_frozen_and_deselected_hyperparameters_stay():
    net, x, y = regression()
    for freeze in (lambda p: p.prior.requires_grad_(False), lambda p: p.likelihood.requires_grad_(False)):
        posterior = fit(net, x, y, ggn.Kron)
        freeze(posterior)
        moved = ~torch.tensor([posterior.prior.log_precision.requires_grad, posterior.likelihood.raw_noise.requires_grad])
        before = posterior.prior.precision.item(), posterior.likelihood.noise.item()
        bgn.maximize_evidence(posterior, progress=False)
        after = posterior.prior.precision.item(), posterior.likelihood.noise.item()
        assert [a == b for a, b in zip(before, after, strict=True)] == moved.tolist()
    posterior = fit(net, x, y, ggn.Kron)
    bgn.maximize_evidence(posterior, noise=False, progress=False)
    assert posterior.likelihood.noise.item() == pytest.approx(0.2, abs=1e-15)
    bgn.maximize_evidence(posterior, prior=False, progress=False)
    assert posterior.likelihood.noise.item() != pytest.approx(0.2, abs=1e-3)
    posterior.prior.requires_grad_(False)
    posterior.likelihood.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to tune: the prior is frozen .* Gaussian has no free parameter"):
        bgn.maximize_evidence(posterior)


def test_the_users_objects_and_net_are_untouched():
    net, x, y = regression()
    prior, likelihood, before = models.WeightPrior(1.0), likelihoods.Gaussian(torch.tensor(0.2)), snapshot(net)
    posterior = fit(net, x, y, ggn.Kron, prior, likelihood)
    bgn.maximize_evidence(posterior, progress=False)
    assert prior.precision.item() == 1.0 and likelihood.noise.item() == pytest.approx(0.2)
    assert posterior.likelihood.raw_noise.dtype == torch.float32  # searched in float64, kept as it was
    assert_same(before, snapshot(net))


def test_a_bound_is_said_and_bad_arguments_are_refused():
    net, x, y = regression()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    posterior = fit(net, x, y, ggn.Kron, models.WeightPrior.per_layer(net))
    with pytest.warns(UserWarning, match="precision of '0' ended at a bound .*no optimum inside"):
        trace = bgn.maximize_evidence(posterior, progress=False)
    assert trace.at_bounds == ["precision of '0'"] and posterior.prior.precision[0].item() == pytest.approx(1e8)
    for options, message in (
        ({"bounds": (0, 1)}, r"bounds=\(0, 1\); expected \(low, high\)"),
        ({"noise_bounds": (2, 1)}, "noise_bounds"),
        ({"steps": -1}, "steps=-1; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            bgn.maximize_evidence(posterior, **options)
    posterior.deviation = posterior.deviation * math.nan
    with pytest.raises(ValueError, match="log evidence is nan at the start"):
        bgn.maximize_evidence(posterior)


def test_steps_limit_trace_and_interrupt(monkeypatch):
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Kron)
    trace = bgn.maximize_evidence(posterior, steps=2, progress=False)
    assert trace.steps == 2 and not trace.converged and trace.reason == "all 2 steps were taken"
    assert len(trace.precision) == len(trace.noise) == len(trace.evidence) == 3
    assert trace.precision[-1] == posterior.prior.precision.item() and "2 steps, log evidence" in repr(trace)
    bgn.plots.evidence_trace(trace.evidence)
    # an interrupt leaves the best so far, and float32 parameters float32
    posterior = fit(net, x, y, ggn.Kron, likelihood=likelihoods.Gaussian(torch.tensor(0.2)))
    update = ascent.Bar.update
    monkeypatch.setattr(ascent.Bar, "update", lambda self: (_ for _ in ()).throw(KeyboardInterrupt) if self.done == 2 else update(self))
    start = posterior.log_evidence().item()
    with pytest.raises(KeyboardInterrupt):
        bgn.maximize_evidence(posterior)
    assert posterior.log_evidence().item() > start and posterior.likelihood.raw_noise.dtype == torch.float32


# -- with data: what H does not scale with -----------------------------------------------------------------------------------


def test_without_data_other_noise_stays_and_a_warning_says_so():
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Kron, likelihood=likelihoods.Gaussian(torch.tensor([0.2, 0.2]).double()))
    with pytest.warns(UserWarning, match="leaves noise of Gaussian as given.*data=train_loader") as seen:
        bgn.maximize_evidence(posterior, progress=False)
    assert [w.filename for w in seen] == [__file__], "it points at the caller"
    assert posterior.likelihood.noise.tolist() == pytest.approx([0.2, 0.2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said where nothing was asked for, or where all can be tuned
        bgn.maximize_evidence(posterior, noise=False, progress=False)
        bgn.maximize_evidence(posterior, data=(x, y), progress=False)
        bgn.maximize_evidence(fit(net, x, y, ggn.Kron), progress=False)


def test_a_curvature_that_noise_does_not_scale_is_named():
    net, x, y = regression()
    rule = bgn.rules.Laplace(curvature=bgn.rules.EmpiricalFisher())
    posterior = bgn.laplace(models.Network(net), likelihoods.Gaussian(0.2), (x, y), rule=rule, progress=False)
    with pytest.warns(UserWarning, match=r"leaves noise .* by EmpiricalFisher\(\)"):
        bgn.maximize_evidence(posterior, progress=False)


@pytest.mark.parametrize("full", [False, True])
def test_noise_of_each_output_ends_where_the_evidence_is_stationary(full):
    net, x, y = regression(n=60)
    y = y + torch.stack([torch.zeros(60), 0.6 * torch.randn(60, generator=torch.Generator().manual_seed(1))], -1)
    noise = torch.tensor([0.2, 0.2]).double()
    likelihood = likelihoods.Gaussian(torch.diag(noise) if full else noise)
    posterior = fit(net, x, y, ggn.Full, likelihood=likelihood)
    trace = bgn.maximize_evidence(posterior, data=(x, y), progress=False)
    assert trace.converged and all(b >= a - 1e-9 for a, b in zip(trace.evidence, trace.evidence[1:], strict=False))
    found = posterior.likelihood.noise.detach()

    def value(R, precision):  # refitted from scratch
        other = fit(net, x, y, ggn.Full, models.WeightPrior(precision), likelihoods.Gaussian(R))
        return other.log_evidence().item()

    best = value(found, posterior.prior.precision.item())
    assert best == pytest.approx(posterior.log_evidence().item(), abs=1e-9)
    for i in range(2):
        for factor in (1.03, 1 / 1.03):
            R = found.clone()
            R[(i, i) if full else i] *= factor
            assert value(R, posterior.prior.precision.item()) < best
    # R = Σ (r rᵀ + J Σ Jᵀ) / n
    mean, cov = posterior(x).marginals()
    r = y - mean
    R = ((r.unsqueeze(-1) * r.unsqueeze(-2)) + cov).mean(0)
    torch.testing.assert_close(found, R if full else R.diagonal(), rtol=1e-3, atol=1e-4)


def test_student_t_is_tuned_with_data():
    net, x, y = regression(n=60)
    posterior = fit(net, x, y, ggn.Full, likelihood=likelihoods.StudentT(4.0, 2.0))
    start, before = posterior.log_evidence().item(), {k: v.clone() for k, v in posterior.likelihood.state_dict().items()}
    trace = bgn.maximize_evidence(posterior, data=(x, y), progress=False)
    assert trace.evidence[0] == pytest.approx(start) and posterior.log_evidence().item() > start + 10
    assert any(not torch.equal(v, before[k]) for k, v in posterior.likelihood.state_dict().items())


def test_data_that_is_not_the_training_data_is_refused():
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Full, likelihood=likelihoods.Gaussian(torch.tensor([0.2, 0.2])))
    with pytest.raises(ValueError, match="data= holds 10 data but the posterior saw 40"):
        bgn.maximize_evidence(posterior, data=(x[:10], y[:10]))
    with pytest.raises(ValueError, match="data= is an iterator, which can be walked once"):
        bgn.maximize_evidence(posterior, data=iter([(x, y)]))
