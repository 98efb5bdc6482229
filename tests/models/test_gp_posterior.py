"""What the posterior of any Gaussian process promises: one list of models, every promise for each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import gpytorch
import pytest
import torch
from gpytorch import kernels
from torch.testing import assert_close

import bayesgn as bgn
from bayesgn import likelihoods, metrics, models, rules
from bayesgn.rules import Sites

D = torch.float64


def kernel(lengthscale=0.9, scale=1.2):
    k = kernels.ScaleKernel(kernels.MaternKernel(nu=1.5)).double()
    k.outputscale, k.base_kernel.lengthscale = torch.tensor(scale, dtype=D), torch.tensor(lengthscale, dtype=D)
    return k


def two():
    return [kernel(), kernel(1.7, 0.5)]


def constant(value):
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(value)
    return mean


@dataclass
class Case:
    """A model that is exact here, and its inputs [n d]."""

    name: str
    make: Callable
    columns: int

    def x(self, n: int = 14, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        t = 4 * torch.rand(n, self.columns, dtype=D, generator=generator)
        if self.name == "SpatioTemporalGP":
            t[:, 1] = torch.tensor([0.0, 0.4, 1.1], dtype=D).repeat(n)[:n]
        return t.to(dtype)


def spatial(k):
    return [kernels.RBFKernel().double() for _ in k] if isinstance(k, list) else kernels.RBFKernel().double()


def seen(dtype=D):
    return CASES[0].x(dtype=D)


CASES = [
    Case("GP", lambda k, mean=None: models.GP(k, mean), 1),
    Case("GP-2d", lambda k, mean=None: models.GP(k, mean), 2),
    Case("SparseGP", lambda k, mean=None: models.SparseGP(k, seen(), mean), 1),
    Case("MarkovGP", lambda k, mean=None: models.MarkovGP(k, mean), 1),
    Case("SparseMarkovGP", lambda k, mean=None: models.SparseMarkovGP(k, seen(), mean), 1),
    Case("SpatioTemporalGP", lambda k, mean=None: models.SpatioTemporalGP(k, spatial(k), mean), 2),
]
every_model = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def targets(x):
    """Real values and counts; the third is missing."""
    f = x[:, 0].double().sin() + (0.3 * x[:, 1].double() if x.shape[1] > 1 else 0)
    y, counts = f + 0.2 * torch.cos(9 * torch.arange(len(x), dtype=D)), (2 * f.exp()).round()
    y[2], counts[2] = torch.nan, torch.nan
    return y, counts


def infer(case, likelihood=None, c=1, rule=None, mean=None, dtype=D, **options):
    x = case.x(dtype=dtype)
    likelihood = likelihoods.Poisson() if likelihood is None else likelihood
    y = targets(x)[1 if isinstance(likelihood, likelihoods.Poisson) else 0].to(dtype)
    model = case.make(two()[:c] if c > 1 else kernel(), mean)
    options = {"rule": rules.Variational() if rule is None else rule, "steps": 4, "progress": False, **options}
    return bgn.bayes_newton(model, likelihood, (x, y), **options)


# -- shapes, dtypes ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("c, likelihood", [(1, likelihoods.Poisson()), (2, likelihoods.HeteroscedasticGaussian())], ids=["one latent", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_shapes_and_dtypes(case, c, likelihood, dtype, generator):
    p = infer(case, copy.deepcopy(likelihood), c, dtype=dtype)
    new = case.x(5, seed=1, dtype=dtype)
    f = p(new)
    event = (5,) if c == 1 else (5, 2)
    assert isinstance(f, gpytorch.distributions.MultivariateNormal if c == 1 else gpytorch.distributions.MultitaskMultivariateNormal)
    assert f.mean.shape == f.variance.shape == f.stddev.shape == f.rsample().shape == event
    assert f.covariance_matrix.shape == (5 * c, 5 * c)
    assert f.rsample(torch.Size([3, 2])).shape == (3, 2, *event)
    assert p.sample_outputs(new, 7, generator).shape == p.sample_functions(7, generator)(new).shape == (7, 5, c)
    answers = (f.mean, f.variance, f.covariance_matrix, f.rsample(), p.sample_outputs(new), p.sample_functions()(new), p.likelihood(f).mean)
    assert {t.dtype for t in answers} == {dtype}
    q = p.marginals()
    assert q.mean.shape == (14, c) and q.cov.shape == (14, c, c) and q.mean.dtype == p.log_evidence().dtype == D
    assert p.num_data == 14 and p.log_evidence().shape == ()
    if case.columns == 1:
        assert_close(p(new[:, 0]).mean, f.mean)
    assert p(new[:0]).mean.shape == (0, *event[1:])


@every_model
def test_float32_data_give_what_float64_does(case):
    a, b = (infer(case, dtype=dtype) for dtype in (torch.float32, D))
    new = case.x(5, seed=1)
    assert_close(a(new.float()).mean, b(new).mean.float(), rtol=1e-4, atol=1e-5)
    assert_close(a.log_evidence(), b.log_evidence(), rtol=1e-5, atol=1e-5)


@every_model
def test_integer_inputs_and_targets_are_taken(case):
    if case.name in ("SparseGP", "SparseMarkovGP"):
        x = seen().mul(3).round().long()
    else:
        x = case.x().mul(3).round().long()
    y = (targets(x.to(D))[1].nan_to_num(1.0)).long()
    p, q = (bgn.bayes_newton(case.make(kernel()), likelihoods.Poisson(), (x.to(t), y.to(t)), steps=3) for t in (torch.int64, D))
    assert p.dtype == torch.get_default_dtype()
    assert_close(p.log_evidence(), q.log_evidence(), rtol=1e-13, atol=0)


# -- one function, many ways to ask -----------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("c, likelihood", [(1, likelihoods.Poisson()), (2, likelihoods.HeteroscedasticGaussian())], ids=["one latent", "two"])
def test_answers_agree_with_one_another(case, c, likelihood):
    p = infer(case, copy.deepcopy(likelihood), c, mean=constant(0.4) if c == 1 else [constant(0.4), None])
    new = case.x(5, seed=1)
    f = p(new)
    joint = f.covariance_matrix
    assert_close(joint, joint.mT)
    assert_close(f.variance.reshape(-1), joint.diagonal(), rtol=1e-9, atol=1e-10)
    mean, cov = f.marginals()
    assert mean.shape == (5, c) and cov.shape == (5, c, c)
    for i in range(5):
        assert_close(cov[i], joint[i * c : i * c + c, i * c : i * c + c], rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # kept factors and sums in place of a graph
        g = p(new)
        assert_close(g.mean, f.mean, rtol=1e-10, atol=1e-11)
        assert_close(g.covariance_matrix, joint, rtol=1e-9, atol=1e-10)
        assert not g.covariance_matrix.requires_grad
    at_data = p(case.x()).marginals()
    assert_close(at_data[0], p.marginals().mean, rtol=1e-7, atol=1e-8)
    assert_close(at_data[1], p.marginals().cov, rtol=1e-6, atol=1e-8)
    value = f.mean + 0.1
    plain = torch.distributions.MultivariateNormal(f.mean.reshape(-1), joint)
    assert_close(f.log_prob(value), plain.log_prob(value.reshape(-1)), rtol=1e-8, atol=1e-8)
    index = torch.tensor([3, 0])
    assert_close(p.marginals(index).mean, p.marginals().mean[index])
    # the base samples decide, through the root of the joint covariance
    base = torch.arange(5.0 * c, dtype=D).reshape(f.mean.shape)
    assert_close(f.rsample(base_samples=base), f.mean + (torch.linalg.cholesky(joint) @ base.reshape(-1)).reshape(f.mean.shape), rtol=1e-8, atol=1e-8)


@every_model
def test_it_equals_the_dense_model(case):
    p = infer(case)
    if case.name == "SpatioTemporalGP":
        time = kernels.ScaleKernel(kernels.MaternKernel(nu=1.5, active_dims=[0])).double()
        time.load_state_dict(kernel().state_dict(), strict=False)
        dense = models.GP(time * kernels.RBFKernel(active_dims=[1]).double())
    else:
        dense = models.GP(kernel())
    q = bgn.bayes_newton(dense, likelihoods.Poisson(), (case.x(), targets(case.x())[1]), rule=rules.Variational(), steps=4, progress=False)
    new = case.x(5, seed=1)
    # gpytorch's matrices lose digits between near inputs
    assert_close(p.log_evidence(), q.log_evidence(), rtol=1e-6, atol=1e-6)
    assert_close(p(new).covariance_matrix, q(new).covariance_matrix, rtol=1e-5, atol=1e-6)


@every_model
def test_parts_of_an_answer(case):
    f = infer(case)(case.x(5, seed=1))
    for index in (slice(1, 4), torch.tensor([4, 1])):
        assert_close(f[index].mean, f.mean[index])
        assert_close(f[index].variance, f.variance[index])
        assert_close(f[index].covariance_matrix, f.covariance_matrix[index][:, index], rtol=1e-9, atol=1e-10)
    assert_close(f[..., :2].covariance_matrix, f.covariance_matrix[:2, :2])
    assert_close((f + 1.0).mean, f.mean + 1)
    assert_close((f * 2.0).covariance_matrix, 4 * f.covariance_matrix)
    assert_close(f.unsqueeze(0).mean, f.mean[None])
    lower, upper = f.confidence_region()
    assert_close(upper - lower, 4 * f.stddev)
    with pytest.raises(ValueError, match=r"base_samples have shape \(3, 4\); expected \[..., 5\]"):
        f.rsample(base_samples=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"value has shape \(4,\)"):
        f.log_prob(torch.zeros(4))


# -- draws -----------------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("c, likelihood", [(1, likelihoods.Poisson()), (2, likelihoods.HeteroscedasticGaussian())], ids=["one latent", "two"])
def test_draws_have_the_joint_moments_and_follow_the_generator(case, c, likelihood, generator):
    p = infer(case, copy.deepcopy(likelihood), c)
    new = case.x(3, seed=1)
    f = p(new)
    draws = p.sample_outputs(new, 20_000, generator).flatten(1)
    assert_close(draws.mean(0), f.mean.reshape(-1).detach(), rtol=0, atol=0.05)
    assert_close(torch.cov(draws.mT), f.covariance_matrix.detach(), rtol=0, atol=0.06)
    a, b, other = (p.sample_outputs(new, 2, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, other)


@every_model
@pytest.mark.parametrize("c, likelihood", [(1, likelihoods.Poisson()), (2, likelihoods.HeteroscedasticGaussian())], ids=["one latent", "two"])
def test_function_draws_are_one_draw_at_all_calls(case, c, likelihood, generator):
    p = infer(case, copy.deepcopy(likelihood), c)
    first, second = case.x(4, seed=1), case.x(3, seed=2)
    g = p.sample_functions(6, generator)
    a, b = g(first), g(second)
    assert torch.equal(g(torch.cat([second, first])), torch.cat([b, a], 1))
    assert torch.equal(g(first[[2, 2, 0]]), a[:, [2, 2, 0]])
    # values are mean + L ε with L Lᵀ the joint covariance of all that was asked for
    with torch.no_grad():
        f = p(torch.cat([first, second]))
        joint, mean = f.covariance_matrix, f.mean.reshape(1, -1)
    assert_close(g._L @ g._L.mT, joint, rtol=1e-7, atol=1e-9)
    assert_close(torch.cat([a, b], 1).flatten(1), mean + g._ε @ g._L.mT, rtol=1e-7, atol=1e-8)
    assert g._ε.shape == (6, 7 * c) and g._ε.std().sub(1).abs() < 0.4
    again = p.sample_functions(6, torch.Generator().manual_seed(0))  # the fixture's seed
    assert torch.equal(again(first), a)
    # where a value was drawn next to a new input, the function goes on from there
    close = g(first + 1e-7)
    assert_close(close, a, rtol=0, atol=1e-3)


# -- slopes ------------------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("c, likelihood", [(1, likelihoods.Poisson()), (2, likelihoods.HeteroscedasticGaussian())], ids=["one latent", "two"])
@pytest.mark.parametrize("frozen", [False, True], ids=["hyper-parameters too", "inputs alone"])
def test_slopes_in_new_inputs(case, c, likelihood, frozen, generator):
    """Of mean, variance, joint covariance and a draw with given base samples: what acquisition functions climb along."""
    p = infer(case, copy.deepcopy(likelihood), c, mean=constant(0.4) if c == 1 else [constant(0.4), None])
    p.model.requires_grad_(not frozen)
    new = case.x(3, seed=1)
    weights = [torch.randn(s, dtype=D, generator=generator) for s in ((3, c), (3, c), (3 * c, 3 * c), (3, c))]
    base = torch.randn(*((3,) if c == 1 else (3, c)), dtype=D, generator=generator)

    def value(x):
        f = p(x)
        parts = (f.mean.reshape(3, c), f.variance.reshape(3, c), f.covariance_matrix, f.rsample(base_samples=base).reshape(3, c))
        return torch.stack([(w * t).sum() for w, t in zip(weights, parts, strict=True)])

    x = new.clone().requires_grad_()
    found = torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in value(x)])
    for i in range(3):
        for j in range(case.columns):
            step = torch.zeros_like(new)
            step[i, j] = 1e-5
            assert_close(found[:, i, j], (value(new + step) - value(new - step)) / 2e-5, rtol=1e-4, atol=1e-5)


@every_model
def test_slopes_of_the_predictive_in_hyper_parameters(case):
    p = infer(case, likelihoods.Gaussian(0.1))
    new = case.x(4, seed=1)
    target = targets(new)[0].nan_to_num(0.1)[:, None]
    parameter = p.model.kernels[0].base_kernel.raw_lengthscale
    (slope,) = torch.autograd.grad(metrics.nll(p.likelihood(p(new)), target), parameter)

    def value(step):
        with torch.no_grad():
            parameter.add_(step)
            out = metrics.nll(p.likelihood(p(new)), target)
            parameter.sub_(step)
        return out

    assert_close(slope.reshape(()), (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)


# -- predictives ---------------------------------------------------------------------------------------------------------------------


@every_model
def test_likelihood_and_metrics_of_an_answer(case):
    p = infer(case, likelihoods.Gaussian(torch.tensor(0.1, dtype=D)))
    new = case.x(6, seed=1)
    f, y = p(new), p.likelihood(p(new))
    assert_close(y.variance.flatten(), f.variance + 0.1)
    target = targets(new)[0].nan_to_num(0.3)
    normal = torch.distributions.Normal(f.mean, (f.variance + 0.1).sqrt())
    assert_close(metrics.nll(y, target[:, None]), -normal.log_prob(target).mean())
    assert_close(metrics.rmse(y, target[:, None]), (f.mean - target).square().mean().sqrt())
    assert_close(metrics.coverage(y, target[:, None]), ((target - f.mean).abs() < 1.959964 * normal.stddev).double().mean())
    samples = p.likelihood(p.sample_outputs(new, 4000, torch.Generator().manual_seed(0)))
    assert_close(samples.mean.flatten(), f.mean.detach(), rtol=0, atol=0.08)
    q = infer(case, likelihoods.HeteroscedasticGaussian(), 2)
    y, f = q.likelihood(q(new)), q(new)
    assert_close(y.mean.flatten(), f.mean[:, 0])
    # E[exp f₂] of a log-normal, and the spread of the mean
    assert_close(y.variance.flatten(), f.variance[:, 0] + (f.mean[:, 1] + 0.5 * f.variance[:, 1]).exp(), rtol=1e-6, atol=1e-8)


# -- what is left alone -----------------------------------------------------------------------------------------------------------------


@every_model
def test_the_users_objects_stay_as_they_are(case):
    x = case.x()
    y = targets(x)[1]
    model, likelihood = case.make(kernel(), constant(0.2)), likelihoods.NegativeBinomial(torch.tensor(2.0, dtype=D))
    before = copy.deepcopy([model.state_dict(), likelihood.state_dict(), x, y])
    p = bgn.bayes_newton(model, likelihood, (x, y), rule=rules.PowerEP(0.5), steps=3, progress=False)
    evidence = p.log_evidence()
    bgn.maximize_evidence(p, steps=2, progress=False)
    assert p.log_evidence() > evidence
    after = [model.state_dict(), likelihood.state_dict(), x, y]
    assert all(torch.equal(a, b) for m, n in zip(before[:2], after[:2]) for a, b in zip(m.values(), n.values(), strict=True))
    assert torch.equal(x, before[2]) and torch.equal(y.nan_to_num(-1), before[3].nan_to_num(-1))
    assert all(q.grad is None for q in [*model.parameters(), *p.model.parameters()]) and model.power == 0
    # and goes on from a posterior without moving it
    sites, lengthscale = p.sites, p.model.kernels[0].base_kernel.lengthscale.item()
    q = bgn.bayes_newton(p, steps=3, progress=False)
    bgn.maximize_evidence(q, steps=1, progress=False)
    assert p.sites is sites and p.model.kernels[0].base_kernel.lengthscale.item() == lengthscale


@every_model
def test_hyper_parameters_that_change_are_seen(case):
    """By gpytorch's setters, which write past version counters, too."""
    p = infer(case)
    new = case.x(4, seed=1)
    with torch.no_grad():
        first, f, q = p.log_evidence(), p(new), p.marginals()
        p.model.kernels[0].outputscale = 3.0
        other = infer(case)
        other.model.load_state_dict(p.model.state_dict())
        fresh = other.with_sites(p.sites)
        for a, b in [(p.log_evidence(), fresh.log_evidence()), (p(new).mean, fresh(new).mean), (p.marginals().cov, fresh.marginals().cov)]:
            assert torch.equal(a, b)
        assert not torch.equal(p.log_evidence(), first) and not torch.equal(p.marginals().mean, q.mean)
        with pytest.raises(RuntimeError, match="hyper-parameters changed between"):
            _ = f.covariance_matrix


@every_model
def test_missing_targets_count_for_nothing(case):
    x = case.x()
    y = targets(x)[1]
    here = ~y.isnan()
    p, q = (
        bgn.bayes_newton(case.make(kernel()), likelihoods.Poisson(), data, rule=rules.PowerEP(0.5), steps=4, progress=False)
        for data in ((x, y), (x[here], y[here]))
    )
    new = case.x(4, seed=1)
    assert not p.sites.nat2[2].any() and not p.sites.nat1[2].any()
    assert_close(p.log_evidence(), q.log_evidence(), rtol=1e-8, atol=1e-8)
    assert_close(p(new).covariance_matrix, q(new).covariance_matrix, rtol=1e-7, atol=1e-8)


# -- more data, other rules, other devices --------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("rule", [rules.Variational(), rules.PowerEP(0.5)], ids=repr)
def test_more_data_are_taken_in(case, rule):
    x = case.x()
    y = targets(x)[1]
    model = case.make(kernel())
    options = {"rule": rule, "tol": 1e-10, "progress": False, "steps": 300}
    part = bgn.bayes_newton(model, likelihoods.Poisson(), (x[:9], y[:9]), **options)
    grown = part.with_data((x[9:], y[9:]))
    assert part.num_data == 9 and grown.num_data == 14 and grown.sites.nat1[9:].abs().max() == 0
    new = case.x(4, seed=1)
    assert_close(grown(new).mean, part(new).mean, rtol=1e-8, atol=1e-9)  # nothing is said by them yet
    whole = bgn.bayes_newton(model, likelihoods.Poisson(), (x, y), **options)
    warm = bgn.bayes_newton(grown, tol=1e-10, steps=300, progress=False)
    assert_close(warm.log_evidence(), whole.log_evidence(), rtol=1e-8, atol=1e-8)
    assert_close(warm(new).mean, whole(new).mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Poisson: y contains -1"):
        part.with_data((x[9:], -torch.ones(5)))
    with pytest.raises(ValueError, match=f"the data have {case.columns}"):
        part.with_data((torch.zeros(2, 3), torch.zeros(2)))


@every_model
def test_new_data_have_no_memory_yet(case):
    x, y = case.x(), targets(case.x())[1].nan_to_num(1.0)
    rule = rules.Variational(rules.QuasiNewton())
    p = bgn.bayes_newton(case.make(kernel()), likelihoods.Poisson(), (x[:9], y[:9]), rule=rule, steps=4, progress=False).with_data((x[9:], y[9:]))
    assert all(len(t) == 14 and t[:9].any() and not t[9:].any() for t in p.sites.memory)
    # their first turn is as that of data without a past
    fresh = p.with_sites(p.sites._replace(memory=()))
    for a, b in zip(p.turn()[0].sites.memory, fresh.turn()[0].sites.memory, strict=True):
        assert_close(a[9:], b[9:])


@every_model
def test_another_rule_may_go_on(case):
    p = infer(case, rule=rules.Variational(rules.QuasiNewton()), steps=3)
    q = bgn.bayes_newton(p, rule=rules.PowerEP(0.5), tol=1e-10, steps=300, progress=False)
    fresh = infer(case, rule=rules.PowerEP(0.5), tol=1e-10, steps=300)
    assert q.model.power == 0.5 and p.model.power == 0 and repr(p.rule) != repr(q.rule)
    assert_close(q.log_evidence(), fresh.log_evidence(), rtol=1e-9, atol=1e-9)


@every_model
def test_answers_in_another_dtype(case):
    p = infer(case)
    q = p.to(torch.float32)
    new = case.x(4, seed=1)
    assert q(new).mean.dtype == torch.float32 and p(new).mean.dtype == D
    assert_close(q(new).mean, p(new).mean.float())
    assert_close(q.to("cpu", D)(new).mean, p(new).mean)
    assert q.sites.nat1.dtype == D and q.trace is p.trace
    with pytest.raises(TypeError, match="expected a floating one"):
        p.to(torch.int64)


@every_model
@pytest.mark.gpu
def test_on_another_device(case):
    p = infer(case)
    q = p.to("cuda")
    new = case.x(4, seed=1)
    assert_close(q(new.cuda()).covariance_matrix.cpu(), p(new).covariance_matrix, rtol=1e-8, atol=1e-9)
    assert_close(q.turn()[0].log_evidence().cpu(), p.turn()[0].log_evidence(), rtol=1e-9, atol=1e-9)
    x = case.x().cuda()
    r = bgn.bayes_newton(case.make(kernel()), likelihoods.Poisson(), (x, targets(x.cpu())[1].cuda()), rule=rules.Variational(), steps=4)
    assert_close(r.log_evidence().cpu(), p.log_evidence(), rtol=1e-8, atol=1e-8)


def test_a_million_times_need_no_joint():
    p = infer(CASES[3])
    with torch.no_grad():
        f = p(torch.linspace(-1, 5, 1_000_000, dtype=D))
        assert f.variance.shape == (1_000_000,)
        few = p(torch.linspace(-1, 5, 1_000_000, dtype=D)[[0, 499_999, 999_999]])
        assert_close(f.variance[[0, 499_999, 999_999]], few.variance, rtol=1e-8, atol=1e-10)
        y = p.likelihood(f[:10])
    assert y.mean.shape == (10, 1)


# -- what cannot be is refused ----------------------------------------------------------------------------------------------------------


@every_model
def test_data_that_cannot_be(case):
    x = case.x()
    y, counts = targets(x)
    one, double = case.make(kernel()), case.make(two())
    refused = [
        (one, likelihoods.HeteroscedasticGaussian(), (x, y), "2 kernels for a Gaussian process"),
        (double, likelihoods.Poisson(), (x, counts), "needs 1 latent: 1 kernel for a Gaussian process"),
        (one, likelihoods.Gaussian(), (x, torch.stack([y, y], -1)), "needs 2 latents: 2 kernels for a Gaussian process"),
        (one, likelihoods.Categorical(), (x, torch.zeros(14).long()), "one kernel each"),
        (one, likelihoods.Poisson(), (x, y), "counts are integers"),
        (one, likelihoods.Bernoulli(), (x, counts + 1), "labels are 0 or 1"),
        (one, likelihoods.Poisson(), (x, counts[:5]), "x has 14 rows but y has 5"),
        (one, likelihoods.Poisson(), (x.index_fill(0, torch.tensor([1]), torch.nan), counts), "non-finite"),
        (one, likelihoods.Poisson(), (x[:, None], counts), r"expected \[n\] or \[n d\]"),
        (one, likelihoods.Poisson(), (x[:0], counts[:0]), "empty"),
        (one, likelihoods.Gaussian(), (x, y.index_fill(0, torch.tensor([1]), torch.inf)), "finite"),
    ]
    for model, likelihood, data, message in refused:
        with pytest.raises(ValueError, match=message):
            bgn.bayes_newton(model, likelihood, data)
    with pytest.raises(TypeError, match="expected tensors"):
        bgn.bayes_newton(one, likelihoods.Poisson(), (x.numpy(), counts.numpy()))
    with pytest.raises(TypeError, match="pass an instance"):
        bgn.bayes_newton(one, likelihoods.Poisson, (x, counts))
    with pytest.raises(TypeError, match="expected an expansion"):
        bgn.bayes_newton(one, likelihoods.Poisson(), (x, counts), rule=rules.GaussNewton())
    with pytest.raises(ValueError, match=r"expected \[14, 1\] and \[14, 1, 1\]"):
        bgn.bayes_newton(one, likelihoods.Poisson(), (x, counts), sites=Sites.flat(5, 1, x))


@every_model
def test_questions_that_cannot_be(case):
    p = infer(case)
    d = case.columns
    for bad, error, message in [
        (torch.zeros(4, d + 1), ValueError, rf"{d + 1} column\(s\); the data have {d}: pass x as \[m, {d}\]"),
        (torch.zeros(2, 2, 2), ValueError, r"expected \[n\] or \[n d\]"),
        ([0.0, 1.0], TypeError, "expected a tensor"),
        (torch.full((2, d), torch.nan), ValueError, "non-finite"),
    ]:
        for ask in (p, p.sample_outputs, p.sample_functions()):
            with pytest.raises(error, match=message):
                ask(bad)
    with pytest.raises(ValueError, match="at least 1"):
        p.sample_functions(0)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=lambda c: c.name)
def test_kernels_that_cannot_be(case):
    make = case.make
    for bad, error, message in [
        ("rbf", TypeError, "expected a gpytorch kernel"),
        (kernels.RBFKernel(batch_shape=torch.Size([2])), ValueError, "pass a list of kernels"),
        ([], ValueError, "0 kernels"),
        ([kernel(), torch.nn.Linear(1, 1)], TypeError, "expected a gpytorch kernel"),
    ]:
        with pytest.raises(error, match=message):
            make(bad)
    with pytest.raises(ValueError, match=r"1 mean function\(s\) for 2"):
        make(two(), constant(0.0))
    with pytest.raises(TypeError, match="expected a gpytorch mean"):
        make(kernel(), 3.0)


@pytest.mark.parametrize("bad", [kernels.RBFKernel(ard_num_dims=3), kernels.MaternKernel(active_dims=[2])], ids=["ard", "active"])
@pytest.mark.parametrize("sparse", [False, True])
def test_kernels_for_other_columns(bad, sparse):
    x = torch.rand(6, 2)
    with pytest.raises(ValueError, match=r"cannot be evaluated at inputs with 2 column\(s\)"):
        bgn.bayes_newton(models.SparseGP(bad, x[:3]) if sparse else models.GP(bad), likelihoods.Gaussian(), (x, x[:, 0]))


@every_model
def test_it_says_what_it_is(case):
    p = infer(case)
    assert repr(p).startswith(f"GaussianProcessPosterior({case.name.split('-')[0]}(")
    assert "Poisson(exposure=1)" in repr(p) and "Variational(curvature=GaussNewton())" in repr(p) and "14 data" in repr(p)
