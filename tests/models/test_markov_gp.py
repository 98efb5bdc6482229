"""MarkovGP against the dense Gaussian process: every kernel, rule and likelihood, and times as they come."""

from __future__ import annotations

import copy
import itertools
import math

import gpytorch
import pytest
import torch
from gpytorch import kernels
from torch import Tensor
from torch.testing import assert_close

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models import sde_kernels
from bayesgn.models.markov_gp import _steps, times_of

from .dense import Exactly

D = torch.float64


def tensor(x) -> Tensor:
    return torch.tensor(x, dtype=D)


def made(kernel, **values):
    kernel = kernel.double()
    for name, value in values.items():
        setattr(kernel, name, tensor(value))
    return kernel


def matern(nu: float = 1.5, lengthscale: float = 1.1, scale: float = 0.8):
    return made(kernels.ScaleKernel(made(kernels.MaternKernel(nu=nu), lengthscale=lengthscale)), outputscale=scale)


def periodic():
    return made(kernels.PeriodicKernel(), lengthscale=9.0, period_length=1.7)


APPROXIMATED = ("RBF", "Periodic", "quasi-periodic")
KERNELS = {
    "Matern12": matern(0.5),
    "Matern32": matern(1.5),
    "Matern52": matern(2.5),
    "Matern72": made(sde_kernels.Matern72Kernel(), lengthscale=1.4),
    "RBF": made(kernels.RBFKernel(), lengthscale=0.9),
    "Periodic": periodic(),
    "Cosine": made(kernels.CosineKernel(), period_length=1.6),
    "Constant": made(kernels.ConstantKernel(), constant=0.6),
    "Linear": made(kernels.LinearKernel(), variance=0.2),
    "Polynomial": made(kernels.ScaleKernel(made(kernels.PolynomialKernel(2), offset=0.5)), outputscale=0.05),
    "Additive": matern(0.5) + made(kernels.LinearKernel(), variance=0.1),
    "quasi-periodic": matern(0.5, 4.0) * periodic(),
    "Linear × Matern": made(kernels.LinearKernel(), variance=0.2) * made(kernels.MaternKernel(nu=1.5), lengthscale=2.0),
}
LIKELIHOODS = {
    "Gaussian": lambda: likelihoods.Gaussian(0.1),
    "Poisson": lambda: likelihoods.Poisson(),
    "Bernoulli": lambda: likelihoods.Bernoulli(),
    "StudentT": lambda: likelihoods.StudentT(4.0, 0.3),
    "HeteroscedasticGaussian": lambda: likelihoods.HeteroscedasticGaussian(),
}
RULES = [
    rules.Laplace(),
    rules.Variational(),
    rules.PowerEP(0.5),
    rules.PosteriorLinearization(),
    rules.PosteriorLinearization2(),
    rules.Taylor(),
    rules.Variational(rules.Exact()),
    rules.Laplace(rules.QuasiNewton()),
]
T = tensor([1.9, 0.3, -0.7, 0.3, 2.6, 1.95, -1.5, 0.9, 0.3])  # unsorted, three times the same
NEW = tensor([0.5, 3.4, -2.2, 0.3, 1.2, 1.9])  # between, outside, at data
NOISE = tensor([0.3, -0.4, 0.6, 0.1, -0.2, 0.5, -0.6, 0.2, -0.1])


def data(likelihood: str) -> tuple[Tensor, Tensor]:
    y = T.sin() + NOISE
    y = {"Poisson": (2 * y.abs()).round(), "Bernoulli": (y > 0).double()}.get(likelihood, y).clone()
    y[4] = math.nan
    return T, y


def pair(name: str, several: bool = False, mean=None):
    """MarkovGP and the dense model of the same kernel."""
    chosen = copy.deepcopy([KERNELS[name], matern(0.5, 2.0, 0.5)] if several else [KERNELS[name]])
    return models.MarkovGP(chosen, mean), models.GP([Exactly(k, approximated=name in APPROXIMATED) for k in chosen], mean)


def infer(model, likelihood, xy, rule, steps=3, lr=0.6):
    return bgn.bayes_newton(copy.deepcopy(model), likelihood, xy, rule=rule, steps=steps, lr=lr, tol=0.0, progress=False)


def gradients(posterior, same=lambda name: name) -> dict[str, Tensor]:
    """Of the log evidence, by the name of the hyper-parameter as ``same`` turns it."""
    named = {same(n): p for n, p in posterior.model.named_parameters()} | dict(posterior.likelihood.named_parameters())
    found = torch.autograd.grad(posterior.log_evidence(), list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found))


def alike(ours, theirs, new: Tensor = NEW, tolerance: float = 1e-9, same=lambda name: name.replace(".kernel.", ".", 1)) -> None:
    """Energies on the way, beliefs at data and elsewhere, joint covariance, hyper-gradients (``same``: our name of a parameter of theirs)."""

    def equal(a, b):
        assert_close(a, b, rtol=tolerance, atol=tolerance)

    equal(tensor(ours.trace.energy), tensor(theirs.trace.energy))
    for a, b in zip(ours.marginals(), theirs.marginals()):
        equal(a, b)
    f, g = ours(new), theirs(new)
    equal(f.mean, g.mean)
    equal(f.variance, g.variance)
    equal(f.covariance_matrix, g.covariance_matrix)
    a, b = gradients(ours), gradients(theirs, same)
    assert a.keys() == b.keys()
    for name in a:
        equal(a[name], b[name])


# The three best-known rules meet every kernel and likelihood; the others take turns. Two coupled latents need a filter of their own size each, whose
# compilation takes seconds: the larger ones are slow.
BEST = itertools.product(KERNELS, RULES[:3], LIKELIHOODS)
REST = [(k, r, list(LIKELIHOODS)[(i + j) % len(LIKELIHOODS)]) for i, k in enumerate(KERNELS) for j, r in enumerate(RULES[3:])]


def case(kernel: str, rule, likelihood: str):
    slow = likelihood.startswith("Hetero") and kernel not in ("Matern12", "Matern32", "Linear")
    return pytest.param(kernel, rule, likelihood, id=f"{kernel}-{rule}-{likelihood}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.filterwarnings("ignore:.*kept their sites")
@pytest.mark.parametrize("kernel, rule, likelihood", list(itertools.starmap(case, [*BEST, *REST])))
def test_equals_the_dense_model(kernel, rule, likelihood):
    several = likelihood.startswith("Hetero")
    ours, theirs = (infer(m, LIKELIHOODS[likelihood](), data(likelihood), rule) for m in pair(kernel, several))
    alike(ours, theirs)


# -- a Gaussian likelihood is exact in one step ----------------------------------------------------------------------------------


class Exact(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, mean, kernel) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def means() -> dict:
    constant = gpytorch.means.ConstantMean().double()
    constant.initialize(constant=0.7)
    line = gpytorch.means.LinearMean(1).double()
    line.initialize(weights=tensor([[0.3]]), bias=tensor([-0.2]))
    return {"zero": gpytorch.means.ZeroMean(), "constant": constant, "linear": line}


@pytest.mark.parametrize("mean", means())
@pytest.mark.parametrize("name", ["Matern52", "RBF", "Additive", "quasi-periodic", "Linear × Matern"])
def test_gaussian_likelihood_equals_gpytorch(name, mean):
    mean, kernel = means()[mean], copy.deepcopy(KERNELS[name])
    x, y = T.unsqueeze(-1), T.sin() + NOISE
    noise = gpytorch.likelihoods.GaussianLikelihood().double()
    noise.noise = tensor(0.2)
    exact = Exact(x, y, noise, copy.deepcopy(mean), Exactly(copy.deepcopy(kernel), name in APPROXIMATED)).double()
    posterior = bgn.bayes_newton(models.MarkovGP(kernel, mean), likelihoods.Gaussian(tensor(0.2)), (T, y), steps=1, lr=1.0, progress=False)
    with gpytorch.settings.cholesky_jitter(double_value=1e-15), gpytorch.settings.fast_computations(False, False, False):
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(noise, exact)(exact(x), y) * len(y)
        assert_close(posterior.log_evidence(), evidence, rtol=1e-10, atol=1e-9)
        gradient = torch.autograd.grad(evidence, [p for p in exact.parameters() if p.requires_grad])
        by_name = dict(zip([n for n, _ in exact.named_parameters()], gradient))
        posterior.log_evidence().backward()
        for n, p in posterior.model.kernels[0].named_parameters():
            assert_close(p.grad, by_name[f"covar_module.kernel.{n}"], rtol=1e-8, atol=1e-8)
        for n, p in posterior.model.means[0].named_parameters():
            assert_close(p.grad, by_name[f"mean_module.{n}"], rtol=1e-8, atol=1e-8)
        exact.eval()
        f, g = posterior(NEW), exact(NEW.unsqueeze(-1))
        assert_close(f.mean, g.mean, rtol=1e-9, atol=1e-9)
        assert_close(f.covariance_matrix, g.covariance_matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES[:6], ids=repr)
def test_every_rule_is_exact_for_a_gaussian(rule):
    exact, other = (infer(pair("Matern32")[0], likelihoods.Gaussian(0.3), data("Gaussian"), r, steps=1, lr=1.0) for r in (rules.Laplace(), rule))
    assert_close(other.log_evidence(), exact.log_evidence(), rtol=1e-10, atol=1e-10)
    assert_close(other(NEW).covariance_matrix, exact(NEW).covariance_matrix, rtol=1e-9, atol=1e-10)


def test_mean_functions_of_several_latents():
    kernel, mean = [matern(), matern(0.5, 2.0, 0.5)], [means()["linear"], means()["constant"]]
    xy, rule = data("HeteroscedasticGaussian"), rules.Variational()
    ours = infer(models.MarkovGP(copy.deepcopy(kernel), mean), likelihoods.HeteroscedasticGaussian(), xy, rule)
    theirs = infer(models.GP([Exactly(k) for k in copy.deepcopy(kernel)], mean), likelihoods.HeteroscedasticGaussian(), xy, rule)
    alike(ours, theirs)


# -- data as they come ------------------------------------------------------------------------------------------------------------


def gaussian(t: Tensor, y: Tensor, kernel=None):
    return infer(models.MarkovGP(matern() if kernel is None else kernel), likelihoods.Gaussian(0.1), (t, y), rules.Laplace(), steps=1, lr=1.0)


def test_order_does_not_matter():
    y = T.sin() + NOISE
    order = torch.randperm(len(T), generator=torch.Generator().manual_seed(0))
    one, other = gaussian(T, y), gaussian(T[order], y[order])
    assert_close(one.log_evidence(), other.log_evidence(), rtol=1e-12, atol=1e-12)
    assert_close(one.marginals().mean[order], other.marginals().mean, rtol=1e-12, atol=1e-12)
    assert_close(one(NEW).covariance_matrix, other(NEW.flip(0)).covariance_matrix.flip(0, 1), rtol=1e-12, atol=1e-12)


def test_missing_data_count_for_nothing():
    y = T.sin() + NOISE
    y[2] = y[7] = math.nan
    seen = ~y.isnan()
    some, all_ = gaussian(T[seen], y[seen]), gaussian(T, y)
    assert_close(all_.log_evidence(), some.log_evidence(), rtol=1e-12, atol=1e-12)
    assert_close(all_(NEW).mean, some(NEW).mean, rtol=1e-12, atol=1e-12)
    assert_close(all_.marginals().mean[~seen, 0], some(T[~seen]).mean, rtol=1e-12, atol=1e-12)


def test_nothing_but_missing_data_is_the_prior():
    model = models.MarkovGP(matern())
    posterior = bgn.bayes_newton(model, likelihoods.Gaussian(0.1), (T, torch.full_like(T, math.nan)), progress=False)
    assert float(posterior.log_evidence().detach()) == pytest.approx(0, abs=1e-12)
    assert_close(posterior(NEW).covariance_matrix, model.prior(NEW).covariance_matrix, rtol=1e-12, atol=1e-12)


def test_one_datum():
    posterior = gaussian(tensor([0.4]), tensor([1.2]), matern(2.5))
    k = float(posterior.model.kernels[0].outputscale.detach())
    assert float(posterior.log_evidence().detach()) == pytest.approx(-0.5 * 1.2**2 / (k + 0.1) - 0.5 * math.log(2 * math.pi * (k + 0.1)), rel=1e-12)
    cross = Exactly(matern(2.5))(NEW.unsqueeze(-1), tensor([[0.4]])).to_dense()[:, 0]
    assert_close(posterior(NEW).mean, cross * 1.2 / (k + 0.1), rtol=1e-12, atol=1e-12)
    assert_close(posterior(NEW).variance, k - cross**2 / (k + 0.1), rtol=1e-12, atol=1e-12)


def test_nowhere_to_predict():
    for posterior in (gaussian(T, T.sin()), infer(pair("Matern32", True)[0], likelihoods.HeteroscedasticGaussian(), data(""), rules.Laplace())):
        c = posterior.model.latents
        f = posterior(T[:0])
        assert f.mean.numel() == 0 and f.variance.numel() == 0 and f.covariance_matrix.shape == (0, 0)
        assert posterior.sample_outputs(T[:0], 3).shape == (3, 0, c)
        assert posterior.model.sample_prior(T[:0], 2).shape == (2, 0, c)
        assert posterior.model.prior(T[:0]).covariance_matrix.shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_times_of_other_types(dtype):
    t, y = torch.tensor([3, 1, 0, 7, 1], dtype=dtype), tensor([0.1, -0.4, 0.3, 0.8, -0.2])
    posterior, same = gaussian(t, y), gaussian(t.double(), y)
    assert_close(posterior.log_evidence(), same.log_evidence(), rtol=0, atol=0)
    assert posterior(t).mean.dtype == torch.float32 and same(t).mean.dtype == D
    assert_close(posterior(t).mean, same(t).mean.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", [0.25, 0.1])
def test_seconds_since_1970(spacing):
    """As much as the times themselves can tell: they are multiples of 2e-7 there."""
    grid = spacing * torch.arange(60, dtype=D)
    grid = grid[torch.rand(60, generator=torch.Generator().manual_seed(1)) > 0.2]
    late, y = 1.7e9 + grid, torch.sin(grid) + 0.1 * torch.cos(40 * grid)
    near, far = gaussian(late - 1.7e9, y, matern(1.5, 1.5)), gaussian(late, y, matern(1.5, 1.5))
    tolerance = 1e-12 if spacing == 0.25 else 1e-5
    assert_close(far.log_evidence(), near.log_evidence(), rtol=tolerance, atol=tolerance)
    assert_close(far(late + 0.0625).mean, near(late - 1.7e9 + 0.0625).mean, rtol=tolerance, atol=tolerance)


def test_times_that_cannot_be():
    model = models.MarkovGP(matern())
    with pytest.raises(ValueError, match=r"the inputs x .*(NaN|nan)"):
        bgn.bayes_newton(model, likelihoods.Gaussian(0.1), (tensor([0.0, math.nan]), tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match=r"MarkovGP works over time: .*\(4, 2\); use models.GP"):
        bgn.bayes_newton(model, likelihoods.Gaussian(0.1), (torch.zeros(4, 2), torch.zeros(4)))
    with pytest.raises(TypeError, match="RQKernel has no state-space form"):
        bgn.bayes_newton(models.MarkovGP(kernels.RQKernel()), likelihoods.Gaussian(0.1), (T, T))


@pytest.mark.parametrize("name", ["Matern32", "RBF", "Linear × Matern"])
def test_slopes_in_new_times(name):
    """∂ (mean + variance) / ∂ t by differences: between the data, at one, twice the same, on a regular grid."""
    posterior, h = gaussian(T, T.sin() + NOISE, copy.deepcopy(KERNELS[name])), 1e-5
    t = tensor([0.45, 1.31, 1.9, 1.31, 3.0, 3.1, 3.2, -3.0]).requires_grad_()
    f = posterior(t)
    (slope,) = torch.autograd.grad((torch.arange(8) * (f.mean + f.variance)).sum(), t)
    up, down = (posterior(t.detach() + s) for s in (h, -h))
    assert_close(slope, torch.arange(8) * (up.mean + up.variance - down.mean - down.variance) / (2 * h), rtol=1e-5, atol=1e-5)


# -- draws ------------------------------------------------------------------------------------------------------------------------


def close_in_law(draws: Tensor, mean: Tensor, cov: Tensor) -> None:
    """Moments of draws [s m] within five standard errors."""
    s = len(draws)
    error = (cov.diagonal() / s).sqrt()
    assert bool(((draws.mean(0) - mean).abs() < 5 * error + 1e-9).all())
    error = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / s).sqrt()
    assert bool((((draws - mean).mT @ (draws - mean) / s - cov).abs() < 5 * error + 1e-9).all())


@pytest.mark.parametrize("name", ["Matern32", "RBF", "Linear", "Additive"])
def test_posterior_draws(name):
    posterior = gaussian(T, T.sin() + NOISE, copy.deepcopy(KERNELS[name]))
    f = posterior(NEW)
    draws = posterior.sample_outputs(NEW, 4000, generator=torch.Generator().manual_seed(2))
    assert draws.shape == (4000, len(NEW), 1)
    close_in_law(draws[..., 0], f.mean.detach(), f.covariance_matrix.detach())


def test_posterior_draws_of_coupled_latents():
    posterior = infer(pair("Matern32", True)[0], likelihoods.HeteroscedasticGaussian(), data(""), rules.Variational(rules.Exact()))
    assert float(posterior.sites.nat2[:, 0, 1].abs().max()) > 0.1
    f = posterior(NEW[:3])
    draws = posterior.sample_outputs(NEW[:3], 4000, generator=torch.Generator().manual_seed(3))
    close_in_law(draws.flatten(1), f.mean.detach().flatten(), f.covariance_matrix.detach())


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["Matern52", "Linear", "Periodic"])
def test_prior(name, several):
    model, dense = pair(name, several, means()["linear"] if not several else None)  # the same kernels and so the same hyper-parameters
    x = NEW.unsqueeze(-1)
    mean, cov = model.mean_at(x).flatten(), dense.cross(x, x)
    f = model.prior(NEW)
    assert_close(f.mean.flatten(), mean, rtol=1e-12, atol=1e-12)
    assert_close(f.covariance_matrix, cov, rtol=1e-12, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v.sum(), parameters, allow_unused=True, materialize_grads=True) for v in (f.covariance_matrix, cov))
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-10, atol=1e-10)
    close_in_law(model.sample_prior(NEW, 4000, torch.Generator().manual_seed(4)).flatten(1), mean.detach(), cov.detach())
    assert_close(dense.prior(NEW).covariance_matrix, cov, rtol=1e-12, atol=1e-12)


# -- steps that differ by rounding only ---------------------------------------------------------------------------------------------


def replayed(t: Tensor) -> tuple[int, Tensor]:
    """How many different steps there are, and the times they lead to, summed up without rounding."""
    dt, step = _steps(t)
    assert bool(((t[1:] == t[:-1]) == (step[1:] < 0)).all()) and int(step[0]) == -1
    counts = torch.nn.functional.one_hot(step[1:] + 1, len(dt) + 1)[:, 1:].cumsum(0).double()
    return len(dt), torch.cat([t[:1], t[0] + counts @ dt])


@pytest.mark.parametrize(
    "t, error",
    [
        (torch.linspace(0, 1e4, 100_001, dtype=D), 1e-11),
        (torch.linspace(1e6, 1e6 + 1e4, 100_000, dtype=D), 1e-9),
        (1.7e9 + 0.1 * torch.arange(100_000, dtype=D), 1e-6),
        (-0.3 * torch.arange(100_000, dtype=D).flip(0), 3e-11),
        (torch.cumsum(torch.full((100_000,), 0.1, dtype=D), 0), 2e-8),  # rounded the same way 40,000 times
    ],
    ids=["from zero", "offset", "seconds since 1970", "negative", "summed up"],
)
def test_a_regular_grid_is_one_step(t, error):
    steps, times = replayed(t)
    assert steps == 1
    assert float((times - t).abs().max()) < error


def test_grids_with_gaps_and_repeats():
    t = torch.linspace(0, 100, 1001, dtype=D)
    t = torch.sort(torch.cat([t[(torch.arange(1001) % 7 != 0)], t[10:20]]))[0]
    steps, times = replayed(t)
    assert steps == 2  # one step, and two where a point is left out
    assert_close(times, t, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("offset, error", [(0.0, 1e-13), (1.7e9, 2e-6)])
def test_irregular_steps_stay_apart(offset, error):
    """So close to one another that neighbours are within rounding: they must not all become one."""
    t = torch.sort(offset + 100 * torch.rand(100_000, dtype=D, generator=torch.Generator().manual_seed(5)))[0]
    dt, step = _steps(t)
    taken = torch.where(step[1:] >= 0, dt[step[1:].clamp_min(0)], 0.0)
    assert float((taken - (t[1:] - t[:-1])).abs().max()) < error


def test_series_of_nothing_and_of_one_instant():
    for t in (T[:0], T[:1], torch.full((4,), 2.5, dtype=D)):
        times = times_of(t)
        assert len(times.dt) == 0 and times.step.tolist() == [-1] * len(t)


def test_a_trend_and_a_matern_share_the_steps_of_a_grid():
    """The noise of both depends on the length of a step alone, though the trend's variance grows."""
    t = torch.linspace(0, 50, 501, dtype=D)
    model = models.MarkovGP(copy.deepcopy(KERNELS["Additive"]))
    assert len(model.chain(model.place(t.unsqueeze(-1))).A) == 1
    model = models.MarkovGP(copy.deepcopy(KERNELS["Linear × Matern"]))
    assert len(model.chain(model.place(t.unsqueeze(-1))).A) == 500


def test_many_data_equal_few_blocks():
    """1e5 data on a grid: what lies far away does not matter, so that the middle equals the dense model of the middle alone."""
    t = 1.0e6 + 0.01 * torch.arange(100_000, dtype=D)
    y = torch.sin(t) + 0.3 * torch.cos(17 * t)
    kernel = matern(1.5, 0.05)
    posterior = gaussian(t, y, kernel)
    middle = slice(50_000, 50_200)
    few = infer(models.GP(Exactly(matern(1.5, 0.05))), likelihoods.Gaussian(0.1), (t[middle] - 1e6, y[middle]), rules.Laplace(), 1, 1.0)
    ours, theirs = posterior.marginals(), few.marginals()
    assert_close(ours.mean[middle][80:120], theirs.mean[80:120], rtol=1e-7, atol=1e-7)
    assert_close(ours.cov[middle][80:120], theirs.cov[80:120], rtol=1e-7, atol=1e-7)
