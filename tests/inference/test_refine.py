"""Refinement: the bound never falls, the conjugate case is exact, and what a bound is a bound of; beside dense algebra, quadrature and scipy."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.inference.refine import AT_REST, refine
from tests.inference.problems import assert_same, classification, snapshot
from tests.models.problems import Problem, close, inputs, of
from tests.oracles import dense

D = torch.float64
EXACT = {"Full": ggn.Full(), "Gram": ggn.Gram(), "Layerwise": ggn.Layerwise()}  # Layerwise: of a net with one layer
STRUCTURES = {
    "Full": ggn.Full(), "Gram": ggn.Gram(), "Layerwise": ggn.Layerwise(), "Kron": ggn.Kron(), "EigenKron": ggn.EigenKron(),
    "Diag": ggn.Diag(), "LowRank": ggn.LowRank(rank=4), "inducing": ggn.Gram(inducing=4), "subset": ggn.Gram(subset=6),
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplace(problem: Problem, structure=None, prior: float | models.WeightPrior = 1.0):
    prior = prior if isinstance(prior, models.WeightPrior) else models.WeightPrior(prior)
    model = models.Network(problem.net, prior, ggn.Full() if structure is None else structure)
    return bgn.laplace(model, problem.likelihood, (problem.x, problem.y), progress=False)


def refined(posterior, problem: Problem, **options):
    return refine(posterior, (problem.x, problem.y), progress=False, **options)


def linear_net(d: int, c: int = 1, seed: int = 0, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d, c, bias=bias)).double().eval()


def logistic(n: int = 20, d: int = 1, seed: int = 0) -> Problem:
    """Logistic regression with d weights and a bias, the net anywhere."""
    net, x = linear_net(d, seed=seed), 2 * inputs(n, d, seed=seed + 1)
    y = (x.sum(-1) + torch.randn(n, dtype=D, generator=seeded(seed)) > 0.3).double()
    return Problem(net, x, y, likelihoods.Bernoulli())


def bound_of(problem: Problem, mean, cov, prior: float, cubature=None) -> float:
    """E_q[Σ log p(y | f_lin)] − KL(q ‖ prior) of q = N(mean, cov), by dense J, torch's KL and the given cubature."""
    J = dense.jacobian(problem.net, problem.x, rows=problem.likelihood.rows)
    f = problem.likelihood.rows(problem.net(problem.x)).detach() + J @ (mean - dense.vector(problem.net).detach())
    cubature = rules.Variational().rule_for(rules.Marginals(f, J @ cov @ J.mT)) if cubature is None else cubature
    nodes, w = cubature(f, J @ cov @ J.mT)
    log_p = problem.likelihood.log_prob(nodes, problem.y.expand(len(nodes), *problem.y.shape))
    N = torch.distributions.MultivariateNormal
    eye = torch.eye(len(mean), dtype=D)
    return float((torch.einsum("q,qn->", w, log_p) - torch.distributions.kl_divergence(N(mean, cov), N(0 * mean, eye / prior))).detach())


def covariance_of(posterior) -> torch.Tensor:
    Σ = posterior.precision().solve(torch.eye(len(posterior.mean), dtype=D)).detach()
    return 0.5 * (Σ + Σ.mT)


# -- the bound never falls -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    family=st.sampled_from(["bernoulli", "categorical", "poisson", "student-t", "heteroscedastic"]),
    structure=st.sampled_from(sorted(STRUCTURES)),
    exponent=st.floats(-2, 2),
    exact=st.booleans(),
)
def test_no_step_lowers_the_bound(seed, family, structure, exponent, exact):
    """From nets that are nowhere near their mode; and the end is no worse than the Gaussian that came in."""
    problem, precision = of(family, n=8, seed=seed), 10**exponent
    curvature = rules.Exact() if exact and not isinstance(STRUCTURES[structure], ggn.LowRank) else rules.GaussNewton()
    before = snapshot(problem.net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the subset and far nets have to say
        posterior = laplace(problem, STRUCTURES[structure], precision)
        θ, Σ = posterior.mean.clone(), covariance_of(posterior)
        found = refined(posterior, problem, rule=rules.Variational(curvature), steps=8)
        energy = found.trace.energy
        assert all(b >= a for a, b in zip(energy, energy[1:])), energy
        assert float(found.log_evidence().detach()) == pytest.approx(energy[-1], rel=1e-9)
    assert len(energy) == found.trace.steps + 1
    assert_same(before, snapshot(problem.net))
    close(posterior.mean, θ, 1e-14)
    if structure not in ("LowRank", "subset") and family != "student-t":  # whose bounds are no bounds, and whose mode is not the only one
        start = bound_of(problem, θ, Σ, precision)
        assert energy[-1] >= start - 1e-6 * (1 + abs(start))
        end = bound_of(problem, found.mean, covariance_of(found), precision)
        assert end == pytest.approx(energy[-1], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("structure", ["Full", "Kron", "Diag"])
def test_the_bound_of_the_given_gaussian(structure):
    """At any mean, with the covariance of the first sites: bgn.laplace's."""
    problem = of("bernoulli")
    posterior = laplace(problem, STRUCTURES[structure], 0.6)
    first = refined(posterior, problem, steps=0)
    close(covariance_of(first), covariance_of(posterior), 1e-9)
    for shift in (torch.zeros_like(posterior.mean), torch.randn(len(posterior.mean), dtype=D, generator=seeded())):
        wanted = bound_of(problem, posterior.mean + shift, covariance_of(posterior), 0.6)
        assert float(first.bound_at(shift)) == pytest.approx(wanted, rel=1e-9)
    assert float(first.bound_at(first.shift())) == pytest.approx(first.trace.energy[0], rel=1e-12)
    with pytest.raises(TypeError, match="has no bound"):
        first.restart(rules.Laplace()).bound_at(shift)


def test_where_no_turn_climbs_the_mean_goes_on(caplog):
    """Kronecker factors of a Poisson net: the search ends with the mean at its best for that covariance, above a plain fixed point."""
    problem = of("poisson", n=15, seed=1)
    with caplog.at_level(logging.INFO, "bayesgn.inference"):
        found = refined(laplace(problem, ggn.Kron(), 1e-2), problem)
    assert found.trace.reason == AT_REST and not found.trace.converged
    assert "the covariance stays, the mean goes on" in caplog.text
    model = models.Network(problem.net, models.WeightPrior(1e-2), ggn.Kron())
    plain = bgn.bayes_newton(model, problem.likelihood, (problem.x, problem.y), rules.Variational(), progress=False)
    assert found.trace.energy[-1] > plain.trace.energy[-1] + 1e-3
    # E exp(f) = exp(m + v/2): the slope of the bound in the mean, by hand.
    J = dense.jacobian(problem.net, problem.x)
    q = found.marginals()
    rate = (q.mean + 0.5 * q.cov[..., 0]).exp()
    slope = torch.einsum("nap,na->p", J, problem.y.reshape(rate.shape) - rate) - 1e-2 * found.mean
    assert (slope @ covariance_of(found) @ slope).sqrt() < 1e-4


def test_a_net_before_its_mode_catches_up_first():
    """With one Newton step of the linearised net far too long, the first turns move the mean until the bound is the given one's again."""
    net, x, y = classification(n=20, steps=0)
    for p in net.parameters():
        p.data.mul_(6.0)
    problem = Problem(net, x, y, likelihoods.Categorical())
    posterior = laplace(problem, ggn.Full(), 1e-2)
    given = bound_of(problem, posterior.mean, covariance_of(posterior), 1e-2)
    with pytest.warns(UserWarning, match="the net was far from its mode"):
        first = refined(posterior, problem, steps=0)
    assert first.trace.energy[0] < given - 1
    found = refined(posterior, problem, steps=10)
    assert found.trace.energy[-1] > given and found.trace.energy == sorted(found.trace.energy)


@pytest.mark.parametrize("curvature", [rules.Riemann(), rules.QuasiNewton(), rules.MonteCarloFisher(samples=2)], ids=lambda c: type(c).__name__)
def test_curvatures_that_blend_or_draw(curvature):
    """The direction may be any; the bound does not fall, and the same generator gives the same."""
    problem = of("student-t")
    fit = lambda: refined(laplace(problem, ggn.Full()), problem, rule=rules.Variational(curvature), steps=6, generator=seeded(3))
    found = fit()
    assert found.trace.energy == sorted(found.trace.energy) and found.trace.energy[-1] > found.trace.energy[0] + 1e-3
    close(fit().mean, found.mean, 1e-14)


# -- what is found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", EXACT)
def test_the_conjugate_case_is_exact(structure):
    """Bayesian linear regression, from weights that are nowhere near: posterior, evidence and predictive to 1e-10 in at most two steps."""
    net, x, noise, P = linear_net(3, 2, seed=5), inputs(15, 3), 0.3, 0.8
    y = torch.randn(15, 2, dtype=D, generator=seeded())
    problem = Problem(net, x, y, likelihoods.Gaussian(torch.tensor(noise, dtype=D)))
    found = refined(laplace(problem, EXACT[structure], P), problem, steps=2)
    # One design for both outputs: X = [x 1], of which the columns of the weight and the bias are independent between outputs.
    X = torch.cat([x, torch.ones(15, 1, dtype=D)], 1)
    A = X.mT @ X / noise + P * torch.eye(4, dtype=D)
    W = torch.linalg.solve(A, X.mT @ y / noise)  # [4 2]
    close(found.mean, torch.cat([W[:3].mT.reshape(-1), W[3]]), 1e-10)
    Σ = torch.linalg.inv(A)
    close(found.weight_variance(), torch.cat([Σ.diagonal()[:3].repeat(2), Σ.diagonal()[3:].repeat(2)]), 1e-10)
    K = X @ X.mT / P + noise * torch.eye(15, dtype=D)
    evidence = sum(torch.distributions.MultivariateNormal(torch.zeros(15, dtype=D), K).log_prob(column) for column in y.mT)
    assert float(found.log_evidence().detach()) == pytest.approx(float(evidence), rel=1e-10)
    new = inputs(4, 3, seed=8)
    X_new = torch.cat([new, torch.ones(4, 1, dtype=D)], 1)
    close(found(new).mean, X_new @ W, 1e-10)
    predictive = found.likelihood(found(new))
    close(predictive.mean, X_new @ W, 1e-10)
    close(predictive.variance, ((X_new @ Σ) * X_new).sum(-1, keepdim=True).expand(-1, 2) + noise, 1e-10)


@pytest.mark.parametrize("structure", [ggn.Full, ggn.Diag])
def test_the_largest_bound_by_direct_search(structure):
    """scipy's BFGS over the mean and the factor of the covariance, through autograd, from elsewhere."""
    problem = logistic(20, 2)
    found = refined(laplace(problem, structure(), 0.5), problem, rule=rules.Variational(cubature=rules.GaussHermite(64)), tol=1e-9)
    assert found.trace.converged

    def loss(start: np.ndarray):
        v = torch.tensor(start, requires_grad=True)
        L = torch.diag(v[3:6].exp())
        if structure is ggn.Full:
            L = L.index_put((torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])), v[6:])
        X = torch.cat([problem.x, torch.ones(20, 1, dtype=D)], 1)
        f, width = X @ v[:3], (X @ L).norm(dim=-1)
        z, w = np.polynomial.hermite_e.hermegauss(64)
        nodes = f + width * torch.tensor(z)[:, None]
        expected = torch.tensor(w / w.sum()) @ nn.functional.logsigmoid((2 * problem.y - 1) * nodes)
        kl = 0.5 * (0.5 * (L.square().sum() + v[:3].square().sum()) - 3 - 3 * np.log(0.5)) - L.diagonal().log().sum()
        value = kl - expected.sum()
        return float(value.detach()), torch.autograd.grad(value, v)[0].numpy()

    best = scipy.optimize.minimize(loss, np.zeros(9 if structure is ggn.Full else 6), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert found.trace.energy[-1] == pytest.approx(-best.fun, abs=1e-7)
    close(found.mean, torch.tensor(best.x[:3]), 1e-4)


def evidence_by_quadrature(problem: Problem, P: float, posterior) -> float:
    """log ∫ p(y | θ) N(θ; 0, 1/P) dθ over two weights, by the trapezoidal rule in the coordinates of a Gaussian near the posterior."""
    axis = torch.linspace(-9, 9, 121, dtype=D)
    Σ = covariance_of(posterior)
    θ = posterior.mean + torch.cartesian_prod(axis, axis) @ torch.linalg.cholesky(Σ).mT
    f = problem.x @ θ[:, :1].mT + θ[:, 1]
    log_p = problem.likelihood.log_prob(f.mT[..., None], problem.y.expand(len(θ), -1)).sum(-1)
    log_prior = torch.distributions.Normal(0.0, P**-0.5).log_prob(θ).sum(-1)
    return float(torch.logsumexp(log_p + log_prior, 0) + 2 * (axis[1] - axis[0]).log() + 0.5 * torch.linalg.slogdet(Σ).logabsdet)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), exponent=st.floats(-1, 2), n=st.integers(3, 30))
def test_the_bound_is_below_the_evidence(seed, exponent, n):
    """Two weights, by dense quadrature: mean-field ≤ full ≤ log evidence, and full is near."""
    problem, P = logistic(n, 1, seed), 10**exponent
    rule = rules.Variational(cubature=rules.GaussHermite(60))
    full, diag = (refined(laplace(problem, s, P), problem, rule=rule) for s in (ggn.Full(), ggn.Diag()))
    evidence = evidence_by_quadrature(problem, P, full)
    assert diag.trace.energy[-1] <= full.trace.energy[-1] + 1e-7
    assert full.trace.energy[-1] <= evidence + 1e-6
    assert full.trace.energy[-1] > evidence - 1.0


@pytest.mark.slow
def test_the_bound_is_below_the_evidence_of_a_net():
    """The linearised model of a classifier with 33 weights, by importance sampling from the refined Gaussian, widened."""
    net, x, y = classification(n=30)
    problem = Problem(net, x, y, likelihoods.Categorical())
    J = dense.jacobian(net, x)
    f, θ0 = net(x).detach(), dense.vector(net).detach()
    for structure in (ggn.Full(), ggn.Kron(), ggn.Diag()):
        found = refined(laplace(problem, structure, 1.0), problem)
        if isinstance(structure, ggn.Full):
            proposal = torch.distributions.MultivariateNormal(found.mean, 1.15 * covariance_of(found))
            eps = torch.randn(30_000, len(θ0), dtype=D, generator=seeded())
            θ = found.mean + eps @ proposal.scale_tril.mT
            answers = f + torch.einsum("nap,sp->sna", J, θ - θ0)
            log_w = problem.likelihood.log_prob(answers, y.expand(len(θ), -1)).sum(-1) - proposal.log_prob(θ)
            log_w = log_w + torch.distributions.Normal(0.0, 1.0).log_prob(θ).sum(-1)
            evidence = float(torch.logsumexp(log_w, 0)) - np.log(len(θ))
            w = (log_w - log_w.max()).exp()
            error = float((w.var() / len(w)).sqrt() / w.mean())
            assert error < 0.05
            assert found.trace.energy[-1] > evidence - 1.5
        assert found.trace.energy[-1] < evidence + 4 * error


def test_under_laplace_it_is_the_mode_of_the_linearised_model():
    """By scipy's BFGS on the log joint, and no data twice: the given posterior is the start, the evidence Laplace's."""
    problem = of("categorical")
    found = refined(laplace(problem, ggn.Kron(), 0.5), problem, rule=rules.Laplace(), steps=60)
    J, f0, θ0 = dense.jacobian(problem.net, problem.x), problem.net(problem.x).detach(), dense.vector(problem.net).detach()

    def loss(v: np.ndarray):
        θ = torch.tensor(v, requires_grad=True)
        value = 0.25 * θ.square().sum() + nn.functional.cross_entropy(f0 + J @ (θ - θ0), problem.y, reduction="sum")
        return float(value.detach()), torch.autograd.grad(value, θ)[0].numpy()

    mode = scipy.optimize.minimize(loss, θ0.numpy(), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    close(found.mean, torch.tensor(mode), 1e-5)


# -- steps of one size ---------------------------------------------------------------------------------------------------------


def test_steps_that_diverge_are_caught_and_the_best_is_kept():
    problem = of("poisson", n=15, seed=2)
    posterior = laplace(problem, ggn.Full(), 1e-2)
    with pytest.warns(UserWarning, match=r"steps of lr=1 diverge: the variational bound ended at .* which is kept; .*Take lr=\"auto\""):
        found = refined(posterior, problem, lr=1.0, steps=25)
    energy = found.trace.energy
    best = max(e for e in energy if np.isfinite(e))
    assert float(found.log_evidence().detach()) == pytest.approx(best, rel=1e-9) and energy[-1] < best - 0.1
    assert f"kept the best, after {energy.index(best)}" in found.trace.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damped = refined(posterior, problem)
    assert damped.trace.energy[-1] > best


def test_a_bound_that_is_not_finite_ends_the_steps(monkeypatch):
    """The third one is NaN: what the second made is kept."""
    problem = of("bernoulli")
    posterior, counted = laplace(problem), []
    log_evidence = models.LinearizedPosterior.log_evidence

    def failing(self):
        counted.append(self)
        return log_evidence(self) * (float("nan") if len(counted) > 3 else 1.0)

    monkeypatch.setattr(models.LinearizedPosterior, "log_evidence", failing)
    with pytest.warns(UserWarning, match="diverge: the variational bound ended at nan"):
        found = refined(posterior, problem, lr=0.5)
    assert found is counted[2] and found.trace.steps == 3
    counted.clear()
    found = refined(posterior, problem)  # every step from the third on is NaN: none is taken
    assert found is counted[2] and found.trace.steps == 2 and found.trace.energy == sorted(found.trace.energy)
    monkeypatch.setattr(models.LinearizedPosterior, "log_evidence", lambda self: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="finite after no step"):
        refined(posterior, problem)


# -- a1a -----------------------------------------------------------------------------------------------------------------------


def a1a_problem(precision: float) -> Problem:
    """Logistic regression on 119 features and a bias, at its mode."""
    from bayesgn.datasets import DatasetUnavailable

    try:
        data = bgn.datasets.a1a(D)
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    problem = Problem(linear_net(119), data.x_train[:, :119], data.y_train.double(), likelihoods.Bernoulli())
    opt = torch.optim.LBFGS(problem.net.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(problem.net(problem.x)[:, 0], problem.y, reduction="sum")
        loss = loss + 0.5 * precision * sum(p.square().sum() for p in problem.net.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    problem.net.zero_grad(set_to_none=True)
    return problem


def test_a1a_at_the_known_precision():
    """The figures of the literature on this set: evidence by Laplace, variational bound, mean-field bound."""
    problem = a1a_problem(2.8072)
    posterior = laplace(problem, ggn.Full(), 2.8072)
    assert float(posterior.log_evidence().detach()) == pytest.approx(-592.21, abs=0.01)
    assert refined(posterior, problem, steps=4).trace.energy[-1] == pytest.approx(-591.73, abs=0.01)
    assert refined(posterior, problem, structure=ggn.Diag, steps=10).trace.energy[-1] == pytest.approx(-615.07, abs=0.01)


@pytest.mark.slow
def test_a1a_at_a_small_precision_needs_damping():
    """At 0.1 whole steps end in a cycle of two, below what damped ones converge to."""
    problem = a1a_problem(0.1)
    posterior = laplace(problem, ggn.Full(), 0.1)
    with pytest.warns(UserWarning, match="lr=1 diverge"):
        undamped = refined(posterior, problem, lr=1.0, steps=16)
    tail = np.diff(undamped.trace.energy[-8:])
    assert (tail[1:] * tail[:-1] < 0).all() and np.abs(tail).min() > 0.02 and not undamped.trace.converged
    damped, halves = refined(posterior, problem, steps=60), refined(posterior, problem, lr=0.5, steps=60)
    assert damped.trace.converged and halves.trace.converged
    assert damped.trace.energy[-1] == pytest.approx(halves.trace.energy[-1], abs=1e-4)
    assert damped.trace.energy[-1] > max(undamped.trace.energy) + 0.05


# -- from other posteriors; manners --------------------------------------------------------------------------------------------


def test_going_on_and_other_structures():
    problem = of("bernoulli")
    posterior = laplace(problem, ggn.Full(), 0.5)
    once = refined(posterior, problem)
    part = refined(posterior, problem, steps=2)
    on = refine(part, progress=False)
    assert on.trace.energy[0] == pytest.approx(part.trace.energy[-1], rel=1e-12)
    close(on.mean, once.mean, 1e-5)
    assert part.trace.steps == 2
    newton = bgn.bayes_newton(models.Network(problem.net, models.WeightPrior(0.5)), problem.likelihood, (problem.x, problem.y), progress=False)
    for structure in (ggn.Full(), ggn.Diag):
        wanted = refined(posterior, problem, structure=structure)
        found = refine(newton, rule=rules.Variational(), structure=structure, progress=False)
        assert found.trace.energy[-1] == pytest.approx(wanted.trace.energy[-1], abs=1e-7)
    close(refined(posterior, problem, structure=ggn.Gram).mean, once.mean, 1e-6)


def test_hyper_parameters_are_taken_as_tuned():
    problem = of("gaussian")
    posterior = laplace(problem, ggn.Full(), 3.0)
    posterior.prior.precision = 0.4
    found = refined(posterior, problem)
    assert float(found.prior.precision.detach()) == pytest.approx(0.4)
    found.prior.precision = 9.0
    assert float(posterior.prior.precision.detach()) == pytest.approx(0.4)
    posterior.prior.precision = 3.0


def test_data_that_the_posterior_did_not_see():
    problem = of("bernoulli")
    posterior, x, y = laplace(problem), problem.x, problem.y
    with pytest.raises(ValueError, match="the posterior saw 12 data but 11 came"):
        refine(posterior, (x[:-1], y[:-1]))
    with pytest.warns(UserWarning, match="they are as many, but not the same"):
        refine(posterior, (x, 1 - y), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"does not keep its data, and refinement needs them: refine\(posterior, train_loader\)"):
        refine(posterior)
    with pytest.raises(ValueError, match="x holds 1 non-finite"):
        refine(posterior, (torch.where(torch.arange(12)[:, None] == 3, torch.tensor([float("nan"), 0.0]), x), y))
    with pytest.raises(ValueError, match="rows"):
        refine(posterior, (x[:0], y[:0]))
    with pytest.raises(TypeError, match="this posterior has its data"):
        refine(refine(posterior, (x, y), steps=1, progress=False), (x, y))


def test_what_is_refused():
    problem = of("bernoulli")
    posterior, data = laplace(problem), (problem.x, problem.y)
    model = models.Network(problem.net)
    for what in (model, problem.net, None):
        with pytest.raises(TypeError, match=f"posterior is a {type(what).__name__}; expected the posterior of a net"):
            refine(what, data)  # type: ignore[arg-type]
    for options, error, message in [
        ({"rule": rules.Variational}, TypeError, "expected an expansion with a curvature"),
        ({"structure": "kron"}, TypeError, "structure='kron'; expected a structure"),
        ({"steps": -1}, ValueError, "steps=-1"),
        ({"steps": True}, ValueError, "steps=True"),
        ({"lr": 0.0}, ValueError, "lr=0.0"),
        ({"lr": "fast"}, ValueError, "lr='fast'"),
    ]:
        with pytest.raises(error, match=message):
            refine(posterior, data, **options)
    with torch.no_grad():
        next(problem.net.parameters()).add_(1.0)
    with pytest.raises(models.StalePosteriorError):
        refine(posterior, data)


def test_an_interrupted_search_returns_what_it_has(monkeypatch):
    problem = of("bernoulli")
    posterior, calls = laplace(problem), []
    log_evidence = models.LinearizedPosterior.log_evidence

    def interrupting(self):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return log_evidence(self)

    monkeypatch.setattr(models.LinearizedPosterior, "log_evidence", interrupting)
    with pytest.warns(UserWarning, match="interrupted after 2 steps"):
        found = refined(posterior, problem)
    assert found is calls[2] and found.trace.reason == "interrupted"


@pytest.mark.slow
def test_refinement_lowers_the_test_loss_of_a_net():
    """Glass, a net of 50 tanh units at its mode for prior precision 1: variational refinement beats the GLM predictive."""
    from bayesgn.datasets import DatasetUnavailable

    try:
        data = bgn.datasets.uci_classification("glass", split_seed=0, dtype=D)
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 50), nn.Tanh(), nn.Linear(50, 6)).double().eval()
    opt = torch.optim.LBFGS(net.parameters(), max_iter=1000, history_size=50, tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(data.x_train), data.y_train, reduction="sum")
        loss = loss + 0.5 * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    net.zero_grad(set_to_none=True)
    train = data.x_train, data.y_train
    posterior = bgn.laplace(models.Network(net, structure=ggn.Full), likelihoods.Categorical(), train, progress=False)
    nll = lambda p: -float(p.likelihood(p(data.x_test)).log_prob(data.y_test).mean().detach())
    glm = nll(posterior)
    for structure in (ggn.Full, ggn.Kron):
        found = refine(posterior, train, structure=structure, tol=1e-3, progress=False)
        assert nll(found) < glm - 0.02
