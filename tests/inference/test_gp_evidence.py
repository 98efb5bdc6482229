"""Hyper-parameters of Gaussian processes by the evidence: against closed forms, dense Laplace by scipy, gpytorch and finite differences."""

from __future__ import annotations

import copy
import math
import warnings

import gpytorch
import numpy as np
import pytest
import scipy.optimize
import torch

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.inference import fixed_point, gp_evidence
from bayesgn.inference.batch_evidence import HeldBelief
from bayesgn.inference.fixed_point import gmres, settle
from bayesgn.inference.gp_evidence import Search
from bayesgn.inference.hyperparameters import Hyperparameters, log_prior

D = torch.float64


def matern(nu: float = 1.5, scale: float = 1.0, lengthscale: float = 1.0):
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=nu)).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = scale, lengthscale
    return kernel


def series(n: int = 40, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 10, n, dtype=D)[torch.randperm(n, generator=g)]
    return x, torch.sin(x) + 0.3 * torch.randn(n, dtype=D, generator=g), g


def regression():
    x, y, _ = series()
    return likelihoods.Gaussian(torch.tensor(1.0, dtype=D)), (x, y)


def counts():
    x, _, g = series()
    return likelihoods.Poisson(), (x, torch.poisson((1 + torch.sin(x)).exp(), generator=g))


def labels():
    x, _, g = series()
    return likelihoods.Bernoulli(), (x, (torch.rand(len(x), dtype=D, generator=g) < torch.sigmoid(3 * torch.sin(x))).to(D))


def outliers():
    x, y, g = series()
    y[::7] += 3 * torch.randn(len(y[::7]), dtype=D, generator=g)
    return likelihoods.StudentT(torch.tensor(4.0, dtype=D), torch.tensor(0.5, dtype=D)), (x, y)


def two_latents():
    x, y, g = series(30)
    return likelihoods.HeteroscedasticGaussian(), (x, y)


PROBLEMS = {f.__name__: f for f in (regression, counts, labels, outliers, two_latents)}
RULES = {
    "laplace": rules.Laplace(),
    "laplace, exact": rules.Laplace(rules.Exact()),
    "variational": rules.Variational(),
    "variational, exact": rules.Variational(rules.Exact()),
    "ep": rules.PowerEP(1.0, rules.Exact()),
    "power ep": rules.PowerEP(0.5),
}
OTHERS = {
    "linearisation": rules.PosteriorLinearization(),
    "second linearisation": rules.PosteriorLinearization2(),
    "taylor": rules.Taylor(),
    "empirical fisher": rules.Variational(rules.EmpiricalFisher()),
    "mean field": rules.Variational(rules.MeanField()),
}


def model_for(problem: str, kind=models.GP, mean=None):
    return kind([matern(), matern()]) if problem == "two_latents" else kind(matern(), mean)


def settled_search(posterior, tol: float = 1e-9) -> Search:
    """The objective, with sites that are always settled."""
    modules = {"": posterior.model, "likelihood": posterior.likelihood}
    free = Hyperparameters(modules)
    search = Search(posterior, modules, free)
    search.settle = lambda z: settle(search._begin(), tol, 400)
    return search


# -- the gradient ---------------------------------------------------------------------------------------------------------


def check_gradient(posterior) -> None:
    """Against finite differences of the evidence at sites that are settled anew for each value."""
    search = settled_search(posterior)
    z = search.free.read()
    _, gradient, _ = search(z)
    step, numeric = 1e-4, []
    for e in np.eye(len(z)):
        numeric.append((search(z + step * e)[0] - search(z - step * e)[0]) / (2 * step))
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_gradient_is_that_of_the_settled_evidence(problem, rule, monkeypatch):
    monkeypatch.setattr(fixed_point, "SHARE", 1e-6)
    if problem == "two_latents" and rule in ("ep", "laplace, exact", "variational, exact"):
        pytest.skip("an indefinite Hessian made PSD has no smooth fixed point")
    likelihood, data = PROBLEMS[problem]()
    check_gradient(model_for(problem).start(likelihood, data, RULES[rule]))


@pytest.mark.parametrize("rule", OTHERS)
def test_the_gradient_under_every_other_rule(rule, monkeypatch):
    monkeypatch.setattr(fixed_point, "SHARE", 1e-6)
    likelihood, data = outliers()
    check_gradient(model_for("outliers").start(likelihood, data, OTHERS[rule]))


TIMES = torch.linspace(0, 10, 6, dtype=D)
MODELS = {
    "MarkovGP": lambda: models.MarkovGP(matern()),
    "SparseGP": lambda: models.SparseGP(matern(), TIMES, learn_inducing=True),
    "SparseMarkovGP": lambda: models.SparseMarkovGP(matern(), TIMES),
    "two kernels": lambda: models.GP(matern(0.5, 0.3) + matern() * gpytorch.kernels.PeriodicKernel().double()),
}


@pytest.mark.parametrize("rule", ["laplace", "variational", "ep"])
@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_of_every_model(model, rule, monkeypatch):
    monkeypatch.setattr(fixed_point, "SHARE", 1e-6)
    likelihood, (x, y) = counts()
    check_gradient(MODELS[model]().start(likelihood, (x[:25], y[:25]), RULES[rule]))


def test_inducing_inputs_are_moved():
    likelihood, data = counts()
    fits = {}
    for learn in (False, True):
        model = models.SparseGP(matern(), TIMES, learn_inducing=learn)
        fits[learn] = bgn.bayes_newton(model, likelihood, data, rules.Variational())
        trace = bgn.maximize_evidence(fits[learn])
        assert ("inducing_points" in trace.hyperparameters) == learn
    assert fits[True].log_evidence() > fits[False].log_evidence() + 0.1
    full = bgn.bayes_newton(models.GP(matern()), likelihood, data, rules.Variational())
    assert fits[True].log_evidence().item() < bgn.maximize_evidence(full).evidence[-1], "no lower bound any more"


def test_gmres_solves():
    g = torch.Generator().manual_seed(0)
    A = torch.eye(12, dtype=D) + torch.randn(12, 12, dtype=D, generator=g) / 6
    b = torch.randn(12, dtype=D, generator=g)
    x, products = gmres(lambda v: A @ v, b, 1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(A, b))
    assert products <= 12


@pytest.mark.parametrize("rule", ["laplace", "variational", "ep"])
def test_settled_sites_are_those_of_bayes_newton(rule):
    likelihood, data = labels()
    model = models.GP(matern(scale=20.0, lengthscale=0.8))  # where whole steps of VI overshoot
    wanted = bgn.bayes_newton(model, likelihood, data, RULES[rule], steps=300, lr=0.5, tol=1e-10)
    found = settle(model.start(likelihood, data, RULES[rule]), 1e-10, 100)
    assert found.turns < 60 and found.change <= 1e-10
    torch.testing.assert_close(found.posterior.marginals(), wanted.marginals())
    torch.testing.assert_close(found.posterior.log_evidence(), wanted.log_evidence())


# -- the optimum ----------------------------------------------------------------------------------------------------------


def numpy_matern(x, scale, lengthscale):
    r = math.sqrt(3) * np.abs(x[:, None] - x[None]) / lengthscale
    return scale * (1 + r) * np.exp(-r)


def exact_optimum(x, y):
    """Log outputscale, lengthscale and noise by scipy on the closed form."""

    def loss(z):
        K = numpy_matern(x, np.exp(z[0]), np.exp(z[1])) + np.exp(z[2]) * np.eye(len(x))
        return 0.5 * (y @ np.linalg.solve(K, y) + np.linalg.slogdet(K)[1] + len(y) * np.log(2 * np.pi))

    return scipy.optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}, jac="3-point")


@pytest.mark.parametrize("kind", ["GP", "MarkovGP"])
@pytest.mark.parametrize("rule", ["laplace", "variational", "ep", "power ep"])
def test_gaussian_noise_has_the_exact_optimum(kind, rule):
    likelihood, (x, y) = regression()
    posterior = bgn.bayes_newton(getattr(models, kind)(matern()), likelihood, (x, y), RULES[rule])
    trace = bgn.maximize_evidence(posterior)
    wanted = exact_optimum(x.numpy(), y.numpy())
    kernel = posterior.model.kernels[0]
    found = [kernel.outputscale.item(), kernel.base_kernel.lengthscale.item(), posterior.likelihood.noise.item()]
    np.testing.assert_allclose(np.log(found), wanted.x, atol=1e-4)
    assert trace.converged and trace.evidence[-1] == pytest.approx(-wanted.fun, abs=1e-6)
    assert posterior.log_evidence().item() == trace.evidence[-1]
    assert [v[-1] for v in trace.hyperparameters.values()] == pytest.approx(found, rel=1e-6)
    assert all(len(v) == len(trace.evidence) for v in trace.hyperparameters.values())


def laplace_optimum(x, y):
    """Log outputscale and lengthscale of Poisson counts by scipy, on the Laplace evidence with a mode found by Newton's method anew each time."""

    def loss(z):
        K = numpy_matern(x, np.exp(z[0]), np.exp(z[1]))
        f = np.zeros(len(x))
        for _ in range(100):
            W = np.exp(f)
            B = np.eye(len(x)) + np.sqrt(W)[:, None] * K * np.sqrt(W)
            b = W * f + y - W
            a = b - np.sqrt(W) * np.linalg.solve(B, np.sqrt(W) * (K @ b))
            f, old = K @ a, f
            if np.abs(f - old).max() < 1e-12:
                break
        log_p = y @ f - np.exp(f).sum() - sum(math.lgamma(k + 1) for k in y)
        B = np.eye(len(x)) + np.sqrt(np.exp(f))[:, None] * K * np.sqrt(np.exp(f))
        return -(log_p - 0.5 * a @ f - 0.5 * np.linalg.slogdet(B)[1])

    return scipy.optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-6}, jac="3-point")


def test_laplace_has_the_optimum_of_the_laplace_evidence():
    likelihood, (x, y) = counts()
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, (x, y), rules.Laplace())
    trace = bgn.maximize_evidence(posterior)
    wanted = laplace_optimum(x.numpy(), y.numpy())
    kernel = posterior.model.kernels[0]
    np.testing.assert_allclose(np.log([kernel.outputscale.item(), kernel.base_kernel.lengthscale.item()]), wanted.x, atol=1e-4)
    assert trace.evidence[-1] == pytest.approx(-wanted.fun, abs=1e-7)


@pytest.mark.parametrize("rule", ["laplace", "variational", "power ep"])
@pytest.mark.parametrize("problem", ["labels", "outliers"])
def test_nothing_near_the_optimum_is_better(problem, rule):
    likelihood, data = PROBLEMS[problem]()
    model = model_for(problem, mean=gpytorch.means.ConstantMean().double())
    posterior = bgn.bayes_newton(model, likelihood, data, RULES[rule])
    trace = bgn.maximize_evidence(posterior)
    assert trace.converged and all(b >= a - 1e-7 for a, b in zip(trace.evidence, trace.evidence[1:]))
    search = settled_search(posterior, 1e-7)
    z = search.free.read()
    value, gradient, _ = search(z)
    assert np.abs(gradient).max() < 1e-3
    assert value == pytest.approx(trace.evidence[-1], abs=1e-7)
    for e in np.eye(len(z)):
        assert max(search(z + s * e)[0] for s in (-0.1, 0.1)) < value


def test_order_of_the_data_and_engine_do_not_matter():
    likelihood, (x, y) = counts()
    found = []
    for kind, order in ((models.GP, slice(None)), (models.GP, torch.argsort(x)), (models.MarkovGP, slice(None))):
        posterior = bgn.bayes_newton(kind(matern()), likelihood, (x[order], y[order]), rules.Variational())
        found.append(bgn.maximize_evidence(posterior))
    for trace in found[1:]:
        assert trace.evidence[-1] == pytest.approx(found[0].evidence[-1], abs=1e-7)
        for name, values in trace.hyperparameters.items():
            assert math.log(values[-1]) == pytest.approx(math.log(found[0].hyperparameters[name][-1]), abs=1e-4)


# -- constraints, priors, what is frozen ------------------------------------------------------------------------------------


def test_registered_priors_are_added_as_gpytorch_adds_them():
    likelihood, (x, y) = regression()
    kernel = matern()
    kernel.base_kernel.register_prior("lengthscale_prior", gpytorch.priors.GammaPrior(3.0, 6.0), "lengthscale")
    kernel.register_prior("outputscale_prior", gpytorch.priors.LogNormalPrior(0.0, 0.5), "outputscale")
    posterior = bgn.bayes_newton(models.GP(kernel), likelihood, (x, y))
    trace = bgn.maximize_evidence(posterior)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), copy.deepcopy(posterior.model.kernels[0])
            self.likelihood.noise = posterior.likelihood.noise.detach()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    peer = Exact()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(peer.likelihood, peer)
    objective = mll(peer(x), y) * len(x)
    assert trace.evidence[-1] + trace.log_prior[-1] == pytest.approx(objective.item(), abs=1e-6)
    objective.backward()
    for p in peer.parameters():
        assert p.grad.abs().max() < 1e-3
    free = bgn.bayes_newton(models.GP(matern()), likelihood, (x, y))
    assert bgn.maximize_evidence(free).evidence[-1] > trace.evidence[-1] + 0.01, "the prior moved nothing"
    assert torch.autograd.grad(log_prior({"": posterior.model}), posterior.model.kernels[0].raw_outputscale)[0].abs() > 0


CONSTRAINTS = {
    "positive": gpytorch.constraints.Positive(),
    "positive by exp": gpytorch.constraints.Positive(transform=torch.exp, inv_transform=torch.log),
    "greater": gpytorch.constraints.GreaterThan(0.2),
    "less": gpytorch.constraints.LessThan(3.0),
    "interval": gpytorch.constraints.Interval(0.2, 3.0),
    "box": gpytorch.constraints.Interval(0.2, 3.0, transform=None),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_coordinates_of_constrained_parameters(constraint):
    kernel = gpytorch.kernels.RBFKernel(lengthscale_constraint=CONSTRAINTS[constraint]).double()
    kernel.lengthscale = torch.tensor(0.7, dtype=D)
    free = Hyperparameters({"kernel": kernel})
    z = free.read()
    free.write(z)
    assert kernel.lengthscale.item() == pytest.approx(0.7, rel=1e-12)

    def at(z):
        free.write(z)
        return kernel.lengthscale.square().sum()

    gradient = free.chain(z, list(torch.autograd.grad(at(z), kernel.raw_lengthscale)))
    numeric = (at(z + 1e-5) - at(z - 1e-5)).item() / 2e-5
    assert gradient[0] == pytest.approx(numeric, rel=1e-7)
    low, high = free.limits()
    assert (low[0], high[0]) == (pytest.approx((0.2, 3.0)) if constraint == "box" else (-math.inf, math.inf))
    if constraint in ("positive", "positive by exp"):
        assert z[0] == pytest.approx(math.log(0.7), abs=1e-7) and gradient[0] == pytest.approx(2 * 0.49, rel=1e-6)


@pytest.mark.parametrize("constraint", ["interval", "box"])
def test_a_constraint_holds_and_its_bound_is_reported(constraint):
    likelihood, data = regression()
    kernel = matern()
    kernel.base_kernel.register_constraint("raw_lengthscale", CONSTRAINTS[constraint])
    kernel.base_kernel.raw_lengthscale.data = CONSTRAINTS[constraint].inverse_transform(torch.tensor([[1.0]], dtype=D))
    kernel.register_constraint("raw_outputscale", gpytorch.constraints.Interval(5.0, 20.0))  # the optimum lies outside
    kernel.outputscale = 10.0
    posterior = bgn.bayes_newton(models.GP(kernel), likelihood, data)
    with pytest.warns(UserWarning, match="kernels.0.outputscale.* ran away or ended at a bound"):
        trace = bgn.maximize_evidence(posterior)
    assert "kernels.0.outputscale" in trace.at_bounds
    assert trace.hyperparameters["kernels.0.outputscale"][-1] == pytest.approx(5.0, rel=1e-2)
    assert all(0.2 <= v <= 3.0 for v in trace.hyperparameters["kernels.0.base_kernel.lengthscale"])


def test_what_is_frozen_or_left_out_stays():
    likelihood, data = outliers()
    likelihood.log_dof.requires_grad_(False)
    kernel = matern()
    kernel.raw_outputscale.requires_grad_(False)
    model = models.GP(kernel)
    own = copy.deepcopy((model.state_dict(), likelihood.state_dict()))
    expected = {
        (True, True): ["kernels.0.base_kernel.lengthscale", "likelihood.scale"],
        (True, False): ["kernels.0.base_kernel.lengthscale"],
        (False, True): ["likelihood.scale"],
    }
    for (prior, noise), names in expected.items():
        posterior = bgn.bayes_newton(model, likelihood, data, rules.Variational())
        trace = bgn.maximize_evidence(posterior, prior=prior, noise=noise)
        assert list(trace.hyperparameters) == names and trace.evidence[-1] > trace.evidence[0]
        assert posterior.model.kernels[0].outputscale.item() == pytest.approx(1.0)
        assert posterior.likelihood.dof.item() == pytest.approx(4.0)
    for a, b in zip(own, (model.state_dict(), likelihood.state_dict()), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a), "the user's own model or likelihood was changed"
    with pytest.raises(ValueError, match="nothing to tune"):
        bgn.maximize_evidence(bgn.bayes_newton(model, likelihood, data), prior=False, noise=False)


def test_single_precision_stays_single():
    likelihood, (x, y) = counts()
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
    posterior = bgn.bayes_newton(models.GP(kernel), likelihood, (x.float(), y.float()), rules.Variational())
    trace = bgn.maximize_evidence(posterior)
    assert {p.dtype for p in posterior.model.parameters()} == {torch.float32}
    double = bgn.bayes_newton(models.GP(matern(scale=0.6931472, lengthscale=0.6931472)), likelihood, (x, y), rules.Variational())
    wanted = bgn.maximize_evidence(double)
    assert trace.evidence[-1] == pytest.approx(wanted.evidence[-1], rel=1e-6)
    assert posterior.log_evidence().item() == pytest.approx(wanted.evidence[-1], rel=1e-6)


# -- when things go wrong ---------------------------------------------------------------------------------------------------


def test_a_lengthscale_that_runs_away_is_named():
    x = torch.linspace(0, 1, 30, dtype=D)
    likelihood = likelihoods.Gaussian(torch.tensor(0.1, dtype=D)).requires_grad_(False)
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, (x, torch.ones_like(x)))
    with pytest.warns(UserWarning, match="lengthscale ran away"):
        trace = bgn.maximize_evidence(posterior)
    assert "kernels.0.base_kernel.lengthscale" in trace.at_bounds


def test_a_lengthscale_that_the_evidence_cannot_see_is_named():
    likelihood, (x, y) = counts()
    posterior = bgn.bayes_newton(models.GP(matern(lengthscale=1e-3)), likelihood, (x, y), rules.Variational())
    with pytest.warns(UserWarning, match="does not depend on kernels.0.base_kernel.lengthscale"):
        trace = bgn.maximize_evidence(posterior)
    assert trace.hyperparameters["kernels.0.base_kernel.lengthscale"][-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.Adam(p, lr=0.1)], ids=["default", "adam"])
def test_an_interrupt_keeps_the_best_so_far(monkeypatch, optimizer):
    likelihood, data = counts()
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, data, rules.Variational())
    seen, original = [], gp_evidence.evidence_gradient

    def interrupted(*args):
        if len(seen) == 5:
            raise KeyboardInterrupt
        found = original(*args)
        seen.append(found.value)
        return found

    monkeypatch.setattr(gp_evidence, "evidence_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bgn.maximize_evidence(posterior, optimizer=optimizer)
    assert posterior.log_evidence().item() == pytest.approx(max(seen), abs=1e-3)
    assert max(seen) > seen[0]


@pytest.mark.parametrize("trouble", ["value", "error"])
def test_where_the_evidence_is_not_finite_the_step_is_taken_back(monkeypatch, trouble):
    likelihood, data = counts()
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, data, rules.Variational())
    wanted = bgn.maximize_evidence(copy.deepcopy(posterior))
    original, bad = models.GP.solve, []

    def troubled(self, inputs, sites):
        solution = original(self, inputs, sites)
        if self.kernels[0].outputscale > 1.1 and len(bad) < 2:  # twice on the way
            bad.append(1)
            if trouble == "error":
                raise ValueError("not positive definite")
            return solution._replace(log_Z=solution.log_Z * math.nan)
        return solution

    monkeypatch.setattr(models.GP, "solve", troubled)
    trace = bgn.maximize_evidence(posterior)
    assert len(bad) == 2 and trace.evidence[-1] == pytest.approx(wanted.evidence[-1], abs=1e-6)


def test_trouble_at_the_start_is_raised(monkeypatch):
    likelihood, data = counts()
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, data, rules.Variational())
    original = models.GP.solve
    monkeypatch.setattr(models.GP, "solve", lambda *a: (lambda s: s._replace(log_Z=s.log_Z * math.nan))(original(*a)))
    with pytest.raises(FloatingPointError, match="nan at the start"):
        bgn.maximize_evidence(posterior)


def test_steps_are_bounded_and_arguments_checked():
    likelihood, data = counts()
    posterior = bgn.bayes_newton(models.GP(matern()), likelihood, data, rules.Variational())
    trace = bgn.maximize_evidence(posterior, steps=2)
    assert trace.steps == 2 and not trace.converged and trace.reason == "all 2 steps were taken"
    assert repr(trace).startswith("HyperparameterTrace(2 steps, log evidence")
    assert bgn.maximize_evidence(posterior, steps=0).steps == 0
    with pytest.raises(ValueError, match="data=, bounds= and noise_bounds= are for networks"):
        bgn.maximize_evidence(posterior, data=data)
    with pytest.raises(ValueError, match="steps=-1"):
        bgn.maximize_evidence(posterior, steps=-1)
    with pytest.raises(TypeError, match="optimizer= gave list"):
        bgn.maximize_evidence(posterior, optimizer=lambda p: list(p))
    net = torch.nn.Linear(1, 1).eval()
    network = bgn.laplace(models.Network(net), likelihoods.Gaussian(1.0), (torch.zeros(3, 1), torch.ones(3, 1)))
    with pytest.raises(ValueError, match="optimizer= and batch_size= are for Gaussian processes"):
        bgn.maximize_evidence(network, optimizer=torch.optim.Adam)


# -- other optimizers ---------------------------------------------------------------------------------------------------------


def cooled(parameters):
    optimizer = torch.optim.Adam(parameters, lr=0.2)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=5)


@pytest.mark.parametrize("optimizer, steps", [(cooled, 150), (lbfgs, 25)], ids=["adam, cooled", "lbfgs"])
@pytest.mark.parametrize("rule", ["laplace", "variational"])
def test_a_torch_optimizer_comes_to_the_same_optimum(optimizer, steps, rule):
    likelihood, data = counts()
    make = lambda: bgn.bayes_newton(models.GP(matern()), likelihood, data, RULES[rule])
    wanted = bgn.maximize_evidence(make())
    posterior = make()
    trace = bgn.maximize_evidence(posterior, steps=steps, optimizer=optimizer)
    assert posterior.log_evidence().item() == pytest.approx(wanted.evidence[-1], abs=1e-3)
    for name, values in wanted.hyperparameters.items():
        assert math.log(trace.hyperparameters[name][-1]) == pytest.approx(math.log(values[-1]), abs=0.03)


# -- batches ------------------------------------------------------------------------------------------------------------------


def many(latents: int):
    g = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(600, 1, dtype=D, generator=g)
    means = [gpytorch.means.ConstantMean().double() for _ in range(latents)]
    model = models.SparseGP([matern() for _ in range(latents)], torch.linspace(0, 10, 12, dtype=D), means, learn_inducing=True)
    if latents == 1:
        return model, likelihoods.Poisson(), (x, torch.poisson((1 + torch.sin(x[:, 0])).exp(), generator=g))
    noise = torch.randn(len(x), dtype=D, generator=g) * (0.2 + x[:, 0] / 10)
    return model, likelihoods.HeteroscedasticGaussian(), (x, torch.sin(x[:, 0]) + noise)


@pytest.mark.parametrize("latents", [1, 2])
def test_the_bound_of_a_held_belief_is_the_settled_evidence(latents):
    model, likelihood, data = many(latents)
    # Where the belief is optimal, which it is where the curvature is exact: for counts Gauss-Newton is.
    rule = rules.Variational() if latents == 1 else rules.Variational(rules.Exact())
    posterior = bgn.bayes_newton(model, likelihood, data, rule, steps=500, tol=1e-11)
    held, everything = HeldBelief(posterior), torch.arange(posterior.num_data)
    bound, batch = held.bound(everything)
    evidence = posterior.log_evidence()
    assert bound.item() == pytest.approx(evidence.item(), abs=1e-8)
    if latents == 1:  # with two, blocks that were made PSD leave a slope in the sites
        parameters = [p for p in posterior.model.parameters() if p.requires_grad]
        for a, b in zip(*(torch.autograd.grad(value, parameters, retain_graph=True) for value in (bound, evidence)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # Halves of the data: their mean is the whole, and a whole step of the belief leaves it where it is.
    halves = [held.bound(part)[0].item() for part in everything.split(len(everything) // 2)]
    assert sum(halves) / 2 == pytest.approx(bound.item(), abs=1e-8)
    before = held.sums
    held.renew(batch, 1.0)
    for a, b in zip(before[:2], held.sums[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_batches_come_close_to_the_optimum_of_all_data():
    model, likelihood, data = many(1)
    model.inducing_points.requires_grad_(False)
    whole, parts = (bgn.bayes_newton(model, likelihood, data, rules.Variational()) for _ in range(2))
    wanted = bgn.maximize_evidence(whole)
    trace = bgn.maximize_evidence(parts, steps=200, batch_size=100, generator=torch.Generator().manual_seed(0))
    assert trace.steps == 199 and trace.reason == "all 200 steps were taken"
    assert wanted.evidence[0] + 0.9 * (wanted.evidence[-1] - wanted.evidence[0]) < parts.log_evidence().item() < wanted.evidence[-1]
    # The sites are settled: another turn changes nothing.
    torch.testing.assert_close(parts.turn()[0].log_evidence(), parts.log_evidence(), rtol=0, atol=1e-6)
    again = bgn.bayes_newton(model, likelihood, data, rules.Variational())
    bgn.maximize_evidence(again, steps=200, batch_size=100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.model.kernels[0].raw_outputscale, parts.model.kernels[0].raw_outputscale)


@pytest.mark.parametrize("model, rule", [(models.GP(matern()), rules.Variational()), (models.SparseGP(matern(), TIMES), rules.PowerEP(0.5))])
def test_batches_are_refused_where_there_are_none(model, rule):
    likelihood, data = counts()
    posterior = bgn.bayes_newton(model, likelihood, data, rule, steps=2)
    with pytest.raises(ValueError, match="batch_size=10 is for models.SparseGP under rules.Variational"):
        bgn.maximize_evidence(posterior, batch_size=10)
    with pytest.raises(ValueError, match="batch_size=0"):
        bgn.maximize_evidence(posterior, batch_size=0)


def test_random_curvatures_draw_the_same_at_every_turn():
    likelihood, data = two_latents()
    rule = rules.Variational(rules.MonteCarloFisher(samples=4))
    posterior = bgn.bayes_newton(models.GP([matern(), matern()]), likelihood, data, rule, steps=5, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = bgn.maximize_evidence(posterior, steps=10)
    assert all(b >= a - 1e-6 for a, b in zip(trace.evidence, trace.evidence[1:])) and trace.evidence[-1] > trace.evidence[0] + 1
