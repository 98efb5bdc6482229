"""A network's posterior beside brute force: function space, weight space, evidence and its gradients, for every likelihood."""

import copy
import math

import pytest
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from tests.inference.problems import assert_same, snapshot
from tests.models.problems import EXACT, Problem, assert_moments, close, dense_ggn, fit, inputs, log_lik, mlp, of
from tests.oracles import dense
from tests.zoo.modules import having, named

D = torch.float64
FAMILIES = [
    "gaussian", "gaussian-2", "gaussian-each", "gaussian-full", "heteroscedastic", "heteroscedastic-2", "categorical",
    "categorical-weights", "categorical-smooth", "bernoulli", "bernoulli-normcdf", "bernoulli-3-labels", "poisson",
    "poisson-exposure", "negative-binomial", "student-t", "student-t-2", "gamma", "beta", "ordinal", "from-normal (KL)",
]  # fmt: skip
APPROXIMATE = {"Kron": ggn.Kron, "Layerwise": ggn.Layerwise, "Diag": ggn.Diag, "EigenKron": ggn.EigenKron}
EVERY = EXACT | APPROXIMATE
structures = pytest.mark.parametrize("structure", EXACT.values(), ids=EXACT.keys())
every_structure = pytest.mark.parametrize("structure", EVERY.values(), ids=EVERY.keys())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- function space ----------------------------------------------------------------------------------------------------------


@structures
@pytest.mark.parametrize("family", FAMILIES)
def test_function_space_and_evidence_are_the_dense_ones(family, structure):
    problem = of(family)
    posterior = fit(problem, structure, models.WeightPrior(0.7))
    H, theta = dense_ggn(problem), dense.vector(problem.net)
    prior = torch.full_like(theta, 0.7)
    x = inputs(5, seed=9)
    J, cov = dense.jacobian(problem.net, x), dense.posterior_cov(H, prior)
    f = posterior(x)
    close(f.mean, dense.outputs(problem.net, x), 1e-12)
    blocks = dense.function_cov(J, cov)
    close(f.variance, blocks.diagonal(dim1=-2, dim2=-1))
    close(f.covariance_matrix, dense.joint_function_cov(J, cov))
    mean, marginal = f.marginals()
    close(mean, f.mean, 1e-12)
    close(marginal, blocks)
    close(posterior.log_evidence(), dense.log_evidence(log_lik(problem), theta, 0.0, prior, H))
    close(posterior.log_likelihood(), log_lik(problem))


def test_gaussian_and_softmax_from_first_principles():
    """The same without a line of our likelihoods: normal densities, softmax, log-sum-exp written out."""
    net, x = mlp(2), inputs(12)
    y, noise = net(x).detach() + 0.3 * torch.randn(12, 2, dtype=D, generator=seeded()), 0.2
    posterior = fit(Problem(net, x, y, likelihoods.Gaussian(torch.tensor(noise, dtype=D))), ggn.Full)
    J, theta, one = dense.jacobian(net, x), dense.vector(net), torch.ones(22, dtype=D)
    H = dense.ggn(J, torch.eye(2, dtype=D).expand(12, 2, 2) / noise)
    fit_term = (-0.5 * (y - net(x).detach()) ** 2 / noise - 0.5 * math.log(2 * math.pi * noise)).sum()
    close(posterior.log_evidence(), dense.log_evidence(fit_term, theta, 0.0, one, H))
    net = mlp(3)
    labels = torch.arange(12) % 3
    posterior = fit(Problem(net, x, labels, likelihoods.Categorical()), ggn.Full)
    f, J = net(x).detach(), dense.jacobian(net, x)
    H, theta = dense.ggn(J, dense.softmax_ggn(f)), dense.vector(net)
    fit_term = (f.gather(1, labels[:, None])[:, 0] - f.logsumexp(1)).sum()
    close(posterior.log_evidence(), dense.log_evidence(fit_term, theta, 0.0, torch.ones_like(theta), H))
    close(posterior(x).covariance_matrix, dense.joint_function_cov(J, dense.posterior_cov(H, torch.ones_like(theta))))


def test_a_linear_net_is_bayesian_linear_regression():
    """At its ridge solution a linear net's Laplace posterior is the conjugate one, evidence included."""
    x, noise, precision = inputs(15, 3), 0.3, 1.7
    y = torch.sin(x).sum(1, keepdim=True) + 0.1 * torch.randn(15, 1, dtype=D, generator=seeded(3))
    features = torch.cat([x, torch.ones(15, 1, dtype=D)], 1)
    exact = dense.linear_regression(features, y[:, 0], noise, precision)
    net = nn.Linear(3, 1).double().eval()
    with torch.no_grad():
        net.weight.copy_(exact.mean[:3])
        net.bias.copy_(exact.mean[3:])
    for structure in EXACT.values():
        posterior = fit(
            Problem(net, x, y, likelihoods.Gaussian(torch.tensor(noise, dtype=D))), structure, models.WeightPrior(precision)
        )
        close(posterior.log_evidence(), exact.log_evidence)
        test = inputs(6, 3, seed=5)
        mean, cov = exact.predict(torch.cat([test, torch.ones(6, 1, dtype=D)], 1))
        close(posterior(test).mean[:, 0], mean)
        close(posterior(test).covariance_matrix, cov)
        close(posterior.precision().solve(torch.eye(4, dtype=D)), exact.cov)


# -- evidence and its gradients ----------------------------------------------------------------------------------------------

PRIORS = {
    "scalar": lambda net, mean: models.WeightPrior(0.7, mean),
    "per layer": lambda net, mean: models.WeightPrior.per_layer(net, torch.tensor([0.5, 2.0]), mean),
    "per weight": lambda net, mean: models.WeightPrior.per_weight(net, torch.linspace(0.3, 2.0, len(dense.vector(net))), mean),
}
MEANS = {
    "zero": lambda net: 0.0,
    "number": lambda net: 0.3,
    "tensors": lambda net: {n: 0.1 * torch.arange(p.numel(), dtype=D).reshape(p.shape) for n, p in net.named_parameters() if "weight" in n},
}


def prior_of_each_weight(kind, log_precision, net):
    if kind == "per layer":
        sizes = [sum(p.numel() for p in m.parameters()) for m in net if list(m.parameters())]
        return log_precision.exp().repeat_interleave(torch.tensor(sizes))
    return log_precision.exp().expand(len(dense.vector(net)))


def mean_of_each_weight(mean, net):
    if isinstance(mean, float):
        return torch.full_like(dense.vector(net), mean)
    return torch.cat([mean.get(n, torch.zeros_like(p)).flatten() for n, p in net.named_parameters()]).detach()


@structures
@pytest.mark.parametrize("mean", MEANS, ids=lambda m: f"mean {m}")
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("family", ["gaussian-2", "categorical"])
def test_evidence_and_its_gradients(family, kind, mean, structure):
    problem = of(family)
    net = problem.net
    mean = MEANS[mean](net)
    posterior = fit(problem, structure, PRIORS[kind](net, mean))
    parameters = [posterior.prior.log_precision]
    u = parameters[0].detach().clone().requires_grad_()
    theta, mu = dense.vector(net), mean_of_each_weight(mean, net)
    if family == "gaussian-2":
        parameters.append(posterior.likelihood.raw_noise)
        raw = parameters[1].detach().clone().requires_grad_()
        J, residual = dense.jacobian(net, problem.x), problem.y - net(problem.x).detach()
        H = dense.ggn(J, torch.eye(2, dtype=D).expand(12, 2, 2)) / raw.exp()
        likelihood = -0.5 * (residual.square() / raw.exp() + raw + math.log(2 * math.pi)).sum()
        free = [u, raw]
    else:
        H, likelihood, free = dense_ggn(problem), log_lik(problem), [u]
    wanted = dense.log_evidence(likelihood, theta, mu, prior_of_each_weight(kind, u, net), H)
    found = posterior.log_evidence()
    close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, free), strict=True
    ):
        close(a, b)
    # the means are of the prior: the posterior stands at the trained weights
    close(posterior(problem.x).mean, net(problem.x).detach(), 1e-12)


@every_structure
def test_gradients_are_the_slopes_for_every_structure(structure):
    """Whatever H a structure keeps, its evidence's gradient in prior precision and noise is the slope of that evidence."""
    posterior = fit(of("gaussian-2"), structure, models.WeightPrior(0.7))
    parameters = [posterior.prior.log_precision, posterior.likelihood.raw_noise]
    gradients = torch.autograd.grad(posterior.log_evidence(), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        start, h, values = p.detach().clone(), 1e-5, []
        for step in (h, -h):
            with torch.no_grad():
                p.copy_(start + step)
            values.append(posterior.log_evidence().item())
        with torch.no_grad():
            p.copy_(start)
        assert gradient.item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-6)


@structures
def test_hyperparameters_are_followed_without_a_refit(structure):
    """Precision and noise set on a fitted posterior give the posterior that a fit with them would have given."""
    problem = of("gaussian-2")
    posterior = fit(problem, structure)
    posterior(problem.x).variance  # noqa: B018 (an answer before the change)
    posterior.prior.precision, posterior.likelihood.noise = 3.0, 0.05
    other = Problem(problem.net, problem.x, problem.y, likelihoods.Gaussian(torch.tensor(0.05, dtype=D)))
    fresh = fit(other, structure, models.WeightPrior(3.0))
    close(posterior(problem.x).covariance_matrix, fresh(problem.x).covariance_matrix)
    close(posterior.log_evidence(), fresh.log_evidence())
    close(posterior.weight_variance(), fresh.weight_variance())


@pytest.mark.parametrize("family, name, value", [("gaussian-each", "noise", torch.tensor([0.1, 0.1])), ("student-t", "scale", 2.0)])
def test_what_h_does_not_scale_with_cannot_move_silently(family, name, value):
    problem = of(family)
    posterior = fit(problem)
    assert all(p is posterior.prior.log_precision for p in posterior.hyperparameters())
    # half a gradient (of the fit, but not of H) is not given out
    for p in posterior.likelihood.parameters():
        assert torch.autograd.grad(posterior.log_evidence(), p, allow_unused=True) == (None,)
    setattr(posterior.likelihood, name, value)
    for use in (lambda: posterior.log_evidence(), lambda: posterior(problem.x), lambda: posterior.sample_weights()):
        with pytest.raises(ValueError, match=r"but H was made at .*maximize_evidence\(posterior, data="):
            use()


def test_limits_of_the_prior():
    """Precision → ∞ is the trained net; few data and a vague prior leave the prior: Σ ≤ 1/precision throughout."""
    problem = of("gaussian-2")
    posterior = fit(problem)
    posterior.prior.precision = 1e14
    assert posterior(problem.x).variance.max() < 1e-10
    posterior.prior.precision = 0.01
    assert (posterior.weight_variance() <= 100 * (1 + 1e-9)).all()


# -- subsets -----------------------------------------------------------------------------------------------------------------


def flat_mask(net, subset):
    parts = []
    for name, p in net.named_parameters():
        mask = subset[name] if name in subset else torch.zeros(p.shape, dtype=torch.bool)
        parts.append((torch.ones(p.shape, dtype=torch.bool) if mask is None else mask).flatten())
    return torch.cat(parts)


def variances(problem):
    return fit(problem, ggn.Diag).weight_variance()


SUBSETS = {
    "all": lambda problem: dict.fromkeys(n for n, _ in problem.net.named_parameters()),
    "last layer": lambda problem: bgn.last_layer(problem.net),
    "names": lambda problem: bgn.named(problem.net, "0.weight", "2.bias"),
    "a prefix": lambda problem: bgn.named(problem.net, "0"),
    "random": lambda problem: bgn.random_subset(problem.net, 7, seeded(3)),
    "magnitude": lambda problem: bgn.magnitude(problem.net, 7),
    "largest variance": lambda problem: bgn.largest_variance(problem.net, variances(problem), 7),
}


@structures
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", ["gaussian-2", "categorical"])
def test_subsets(family, subset, structure):
    problem = of(family)
    chosen = SUBSETS[subset](problem)
    mask = flat_mask(problem.net, chosen)
    posterior = fit(problem, structure, models.WeightPrior(0.7, mean=0.1), chosen)
    H, theta = dense_ggn(problem, mask), dense.vector(problem.net, mask=mask)
    assert len(posterior.mean) == len(theta)
    close(posterior.mean, theta, 1e-12)
    prior, x = torch.full_like(theta, 0.7), inputs(5, seed=9)
    J, cov = dense.jacobian(problem.net, x, mask=mask), dense.posterior_cov(H, prior)
    close(posterior(x).covariance_matrix, dense.joint_function_cov(J, cov))
    close(posterior.log_evidence(), dense.log_evidence(log_lik(problem), theta, 0.1, prior, H))
    close(posterior.precision().solve(torch.eye(len(theta), dtype=D)), cov)
    # draws touch the chosen weights alone
    draw = posterior.linearizer.vector.unflatten(posterior.sample_weights(1, seeded())[0], problem.net)
    for name, p in problem.net.named_parameters():
        kept = torch.ones(p.shape, dtype=torch.bool) if name not in chosen else ~flat_mask_of(chosen[name], p)
        moved = draw.get(name, p.detach())
        assert torch.equal(moved[kept], p.detach()[kept])


def flat_mask_of(mask, p):
    return torch.ones(p.shape, dtype=torch.bool) if mask is None else mask


def test_masks_choose_what_they_say():
    problem = of("gaussian-2")
    net, theta, variance = problem.net, dense.vector(problem.net).abs(), variances(problem)
    large = flat_mask(net, bgn.magnitude(net, 5))
    assert large.sum() == 5 and theta[large].min() >= theta[~large].max()
    wide = flat_mask(net, bgn.largest_variance(net, variance, 5))
    assert wide.sum() == 5 and variance[wide].min() >= variance[~wide].max()
    a, b, c = (flat_mask(net, bgn.random_subset(net, 5, seeded(s))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.sum() == 5
    counts = sum(flat_mask(net, bgn.random_subset(net, 11, seeded(s))).int() for s in range(200))  # p = 22: each half of the time
    assert counts.min() > 60 and counts.max() < 140
    for count in (0, 23, 2.5):
        with pytest.raises(ValueError, match=f"count={count}; expected between 1 and the 22"):
            bgn.magnitude(net, count)


@pytest.mark.parametrize("kind", ["per layer", "per weight"])
def test_a_subset_with_a_prior_of_its_own(kind):
    problem = of("gaussian-2")
    net, chosen = problem.net, bgn.last_layer(problem.net)
    p = 10
    values = torch.linspace(0.4, 3.0, p, dtype=D) if kind == "per weight" else torch.full((p,), 2.0, dtype=D)
    prior = (
        models.WeightPrior.per_weight(net, values, parameters=chosen)
        if kind == "per weight"
        else models.WeightPrior.per_layer(net, torch.tensor([0.5, 2.0]))
    )
    posterior = fit(problem, ggn.Full, prior, chosen)
    H = dense_ggn(problem, flat_mask(net, chosen))
    close(posterior.precision().solve(torch.eye(p, dtype=D)), dense.posterior_cov(H, values))


# -- weight space ------------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("family", ["gaussian-2", "categorical"])
def test_function_space_is_weight_space(family, structure):
    problem = of(family)
    posterior = fit(problem, structure, models.WeightPrior(0.7))
    p = len(posterior.mean)
    cov = posterior.precision().solve(torch.eye(p, dtype=D)).detach()
    x = inputs(5, seed=9)
    J = dense.jacobian(problem.net, x)
    close(posterior(x).covariance_matrix, dense.joint_function_cov(J, cov))
    close(posterior(x).variance, dense.function_cov(J, cov).diagonal(dim1=-2, dim2=-1))
    close(posterior.weight_variance(), cov.diagonal())
    # the same draws in both spaces, exactly
    theta = posterior.sample_weights(3, seeded())
    functions = posterior.sample_functions(3, seeded())
    wanted = dense.outputs(problem.net, x) + torch.einsum("nrp,sp->snr", J, theta - posterior.mean)
    close(functions(x), wanted)
    # and they have that covariance
    assert_moments(posterior.sample_weights(20_000, seeded(1)), posterior.mean, cov)


@every_structure
def test_sampled_functions_are_functions(structure):
    posterior = fit(of("categorical"), structure)
    x = inputs(9, seed=9)
    functions = posterior.sample_functions(4, seeded())
    whole = functions(x)
    assert whole.shape == (4, 9, 4)
    assert torch.equal(functions(x), whole)  # the same functions at every call
    close(torch.cat([functions(x[:2]), functions(x[2:])], 1), whole, 1e-12)  # wherever they are asked
    assert torch.equal(posterior.sample_functions(4, seeded())(x), whole)  # reproducible by the generator
    assert not torch.equal(posterior.sample_functions(4, seeded(1))(x), whole)
    state = torch.get_rng_state()
    posterior.sample_functions(4, seeded())(x), posterior.sample_outputs(x, 2, seeded())
    assert torch.equal(torch.get_rng_state(), state)  # with a generator the global state is not touched


def test_sampled_functions_have_the_joint_covariance():
    posterior = fit(of("gaussian-2"))
    x = inputs(4, seed=9)
    f = posterior(x)
    draws = posterior.sample_functions(20_000, seeded())(x).flatten(1)
    assert_moments(draws, f.mean.flatten(), f.covariance_matrix)


@structures
def test_a_linear_net_answers_the_same_in_both_views(structure):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double().eval()
    x = inputs(10, 3)
    y = net(x).detach() + 0.1
    posterior = fit(Problem(net, x, y, likelihoods.Gaussian(torch.tensor(0.2, dtype=D))), structure)
    close(posterior.sample_outputs(x, 5, seeded()), posterior.sample_functions(5, seeded())(x))
    f = posterior(x[:3])
    draws = posterior.sample_outputs(x[:3], 5_000, seeded()).flatten(1)
    assert_moments(draws, f.mean.flatten(), f.covariance_matrix)


def test_sampled_outputs_are_the_net_at_sampled_weights():
    problem = of("categorical")
    posterior = fit(problem, ggn.Kron)
    draws = posterior.sample_outputs(problem.x, 3, seeded())
    for theta, answer in zip(posterior.sample_weights(3, seeded()), draws, strict=True):
        other = copy.deepcopy(problem.net)
        nn.utils.vector_to_parameters(theta, other.parameters())
        close(answer, other(problem.x).detach(), 1e-12)
    assert posterior.sample_outputs(problem.x).shape == (1, 12, 4)


# -- laws --------------------------------------------------------------------------------------------------------------------


@every_structure
def test_batches_and_order_do_not_matter(structure):
    problem = of("categorical")
    x, y, perm = problem.x, problem.y, torch.randperm(12, generator=seeded())
    whole = fit(problem, structure)
    parts = [(x[perm[:5]], y[perm[:5]]), (x[perm[5:6]], y[perm[5:6]]), (x[perm[6:]], y[perm[6:]])]
    model = models.Network(problem.net, structure=structure)
    split = bgn.laplace(model, problem.likelihood, parts, progress=False)
    close(split(x).covariance_matrix, whole(x).covariance_matrix, 1e-9)
    close(split.log_evidence(), whole.log_evidence(), 1e-10)
    assert split.num_data == whole.num_data == 12


@structures
def test_more_data_equals_all_at_once(structure):
    problem = of("categorical")
    x, y = problem.x, problem.y
    first = fit(Problem(problem.net, x[:7], y[:7], problem.likelihood), structure)
    before = first.log_evidence().item()
    more, whole = first.condition((x[7:], y[7:]), progress=False), fit(problem, structure)
    close(more(x).covariance_matrix, whole(x).covariance_matrix)
    close(more.log_evidence(), whole.log_evidence())
    assert more.num_data == 12 and first.num_data == 7 and first.log_evidence().item() == before


def test_missing_targets_are_not_there():
    """A NaN target of a Gaussian counts for nothing: the same posterior as without its datum."""
    problem = of("gaussian-2")
    y = problem.y.clone()
    y[3], y[8] = float("nan"), float("nan")
    kept = ~y.isnan().any(1)
    missing = fit(problem._replace(y=y))
    without = fit(problem._replace(x=problem.x[kept], y=y[kept]))
    close(missing.log_evidence(), without.log_evidence())
    close(missing(problem.x).covariance_matrix, without(problem.x).covariance_matrix)
    y[5, 1] = float("nan")  # one output of a datum: its other output stays
    partly = fit(problem._replace(y=y))
    assert (partly.weight_variance() >= missing.weight_variance() - 1e-12).all()
    y[5, 0] = float("nan")
    assert fit(problem._replace(y=y)).log_likelihood() != partly.log_likelihood()


# -- gradients by x ----------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("family", ["gaussian-2", "categorical"])
def test_gradients_of_mean_and_variance_by_x(family, structure):
    problem = of(family)
    posterior = fit(problem, structure)
    x = inputs(3, seed=9)

    def quantities(f):
        return {"mean": f.mean.square().sum(), "variance": f.variance.square().sum(), "covariance": f.covariance_matrix.sin().sum()}

    for name in ("mean", "variance", "covariance"):
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(quantities(posterior(point))[name], point)
        wanted = dense.finite_difference(lambda t, name=name: quantities(posterior(t.clone()))[name], x, 1e-5)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert not posterior(point).variance.requires_grad
    assert not posterior(x).variance.requires_grad and not posterior(x).mean.requires_grad
    assert all(p.grad is None for p in problem.net.parameters())


def test_gradient_of_the_predictive_by_x():
    """An input can be moved to where the predictive is least certain: the whole chain is differentiable."""
    problem = of("gaussian-2")
    posterior = fit(problem)
    point = inputs(2, seed=4).requires_grad_()
    y = posterior.likelihood(posterior(point))
    (gradient,) = torch.autograd.grad(y.variance.sum(), point)
    wanted = dense.finite_difference(lambda t: posterior.likelihood(posterior(t.clone())).variance.sum(), point, 1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


# -- positions, dicts, other shapes ------------------------------------------------------------------------------------------


def positions_problem(name):
    net, x, _ = named(name).build()
    likelihood = likelihoods.Categorical(class_dim=1) if "class_dim" in named(name).marks else likelihoods.Categorical()
    f = likelihood.rows(dense.call(net, x)).detach()
    y = likelihood.sample(f, generator=seeded())
    y.view(len(y), -1)[0, 0] = -100  # one position has no label
    return Problem(net, x, y, likelihood), f


@structures
@pytest.mark.parametrize("name", ["segmentation", "gpt"])
def test_segmentation_and_language(name, structure):
    """(n, c, H, W) under class_dim=1 and (n, time, c): one row for each position, joint over all."""
    problem, f = positions_problem(name)
    posterior = fit(problem, structure, models.WeightPrior(0.7))
    J = dense.jacobian(problem.net, problem.x, rows=problem.likelihood.rows)
    H, theta = dense_ggn(problem), dense.vector(problem.net)
    prior = torch.full_like(theta, 0.7)
    cov = dense.posterior_cov(H, prior)
    answer = posterior(problem.x)
    c, positions = f.shape[-1], f.shape[1:-1]
    assert answer.event_shape == (f[..., 0].numel(), c)
    close(answer.mean, f.reshape(-1, c), 1e-9)
    close(answer.covariance_matrix, dense.joint_function_cov(J, cov))
    mean, blocks = answer.marginals()
    assert mean.shape == f.shape and blocks.shape == (*f.shape, c)
    whole = dense.function_cov(J, cov).reshape(len(f), positions.numel(), c, positions.numel(), c)
    wanted = torch.stack([whole[:, t, :, t] for t in range(positions.numel())], 1)
    close(blocks, wanted.reshape(blocks.shape))
    close(answer.variance, blocks.diagonal(dim1=-2, dim2=-1).reshape(-1, c), 1e-12)
    close(posterior.log_evidence(), dense.log_evidence(log_lik(problem), theta, 0.0, prior, H))
    y = posterior.likelihood(answer)
    assert y.probs.shape == f.shape
    torch.testing.assert_close(y.probs.sum(-1), torch.ones(f.shape[:-1], dtype=D))
    assert posterior.sample_outputs(problem.x, 2, seeded()).shape == (2, *f.shape)
    draws = posterior.sample_functions(2, seeded())(problem.x)
    delta = posterior.sample_weights(2, seeded()) - posterior.mean
    close(draws.flatten(2), f.flatten(1) + torch.einsum("nrp,sp->snr", J, delta))


@pytest.mark.parametrize("case", [*having("dict"), *having("tuple"), *having("structured")], ids=str)
def test_inputs_and_answers_in_containers(case):
    net, x, _ = case.build()
    f = dense.outputs(net, x)
    likelihood = likelihoods.Gaussian(torch.tensor(0.3, dtype=D))
    problem = Problem(net, x, dense.call(net, x).detach() + 0.1, likelihood)
    posterior = fit(problem)
    J, H, theta = dense.jacobian(net, x), dense_ggn(problem), dense.vector(net)
    cov = dense.posterior_cov(H, torch.ones_like(theta))
    close(posterior(x).mean.reshape(f.shape), f, 1e-9)
    close(posterior(x).covariance_matrix, dense.joint_function_cov(J, cov))
    if isinstance(x, dict):  # as a Hugging Face batch, targets among the inputs
        model = models.Network(net, structure=ggn.Full)
        batched = bgn.laplace(model, likelihood, [{**x, "labels": problem.y}], progress=False)
        close(batched(x).variance, posterior(x).variance, 1e-12)


def test_a_net_that_answers_n_numbers():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(1)

        def forward(self, x):
            return self.body(x)[:, 0]

    net = Flat().eval()
    x = inputs(8)
    posterior = fit(Problem(net, x, net(x).detach() + 0.1, likelihoods.Gaussian(torch.tensor(0.3, dtype=D))))
    column = fit(Problem(net.body, x, net(x).detach() + 0.1, likelihoods.Gaussian(torch.tensor(0.3, dtype=D))))
    assert posterior(x).mean.shape == (8, 1)
    close(posterior(x).covariance_matrix, column(x).covariance_matrix, 1e-10)


# -- the predictive ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_predictives_in_both_views(family):
    """p(y|x) is a normalised torch Distribution over y from function space and from weight space."""
    problem = of(family)
    posterior = fit(problem, ggn.Full)
    posterior.prior.precision = 1e10  # the two views meet where the posterior is narrow
    by_function = posterior.likelihood(posterior(problem.x))
    by_weight = posterior.likelihood(posterior.sample_outputs(problem.x, 3, seeded()))
    assert isinstance(by_function, torch.distributions.Distribution)
    y = problem.likelihood.targets(problem.net(problem.x), problem.y)
    wanted = problem.likelihood.conditional(problem.net(problem.x).detach()).log_prob(y).detach()
    for found in (by_function, by_weight):
        value = found.log_prob(y).detach()
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3)
    posterior.prior.precision = 1.0
    assert posterior.likelihood(posterior(problem.x)).log_prob(y).isfinite().all()


def test_gaussian_predictive_in_closed_form():
    problem = of("gaussian-full")
    posterior = fit(problem)
    y = posterior.likelihood(posterior(problem.x))
    mean, cov = posterior(problem.x).marginals()
    close(y.mean, mean, 1e-12)
    close(y.covariance_matrix.detach(), cov + problem.likelihood.noise.detach(), 1e-10)


# -- as a gpytorch distribution ----------------------------------------------------------------------------------------------


def test_the_answer_is_gpytorchs():
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from linear_operator import to_linear_operator

    problem = of("gaussian-2")
    posterior = fit(problem)
    f = posterior(problem.x)
    assert isinstance(f, MultitaskMultivariateNormal) and f._interleaved and f.num_tasks == 2
    assert f.event_shape == (12, 2) and f.batch_shape == ()
    plain = MultitaskMultivariateNormal(f.mean, to_linear_operator(f.covariance_matrix))
    close(f.variance, plain.variance)
    close(f.stddev, plain.stddev)
    for a, b in zip(f.confidence_region(), plain.confidence_region(), strict=True):
        close(a, b)
    for index in (slice(5), 3, (slice(None), 1), (slice(2, 5), slice(1)), (4, 0)):
        a, b = f[index], plain[index]
        assert type(a) is type(b) is not type(f) and isinstance(a, MultivariateNormal)
        close(a.mean, b.mean, 1e-12)
        close(a.covariance_matrix, b.covariance_matrix, 1e-10)
    for change in (
        lambda g: g + 1.0, lambda g: 1.0 + (g + 0.0), lambda g: g * 3.0, lambda g: g / 2.0, lambda g: g + plain,
        lambda g: g.add_jitter(1e-3), lambda g: g.expand(torch.Size([4])), lambda g: g.to_data_independent_dist(),
    ):  # fmt: skip
        close(change(f).mean, change(plain).mean, 1e-12)
        close(change(f).covariance_matrix, change(plain).covariance_matrix, 1e-10)
    close((f + f).covariance_matrix, 2 * f.covariance_matrix, 1e-10)
    close(f.lazy_covariance_matrix.to_dense(), f.covariance_matrix, 1e-12)
    close(f.lazy_covariance_matrix @ torch.ones(24, dtype=D), f.covariance_matrix.sum(1), 1e-10)
    one = fit(of("poisson"))(problem.x)
    assert isinstance(one, MultitaskMultivariateNormal) and one.event_shape == (12, 1)  # also for one output


def test_log_prob_of_a_joint_answer():
    posterior = fit(of("gaussian-2"))
    f = posterior(inputs(4, seed=9))  # 8 rows of rank 8 ≤ p = 22
    value = f.mean + 0.1 * torch.randn(3, 4, 2, dtype=D, generator=seeded())
    torch_own = torch.distributions.MultivariateNormal(f.mean.flatten(), f.covariance_matrix)
    close(f.log_prob(value), torch_own.log_prob(value.flatten(1)), 1e-6)
    with pytest.raises(ValueError, match=r"value has shape \(4, 3\); expected \[..., 4, 2\]"):
        f.log_prob(torch.zeros(4, 3))


def test_rsample_is_joint_and_exact_beyond_800_rows():
    """Above 800 rows linear_operator would go over to Lanczos; here base samples still give the exact root."""
    posterior = fit(of("gaussian-2"))
    x = inputs(450, seed=9)
    f = posterior(x)  # 900 rows
    draws = f.rsample(base_samples=torch.eye(900, dtype=D).reshape(900, 450, 2))
    root = (draws - f.mean).flatten(1).mT
    close(root @ root.mT, f.covariance_matrix, 1e-9)
    draws = f.rsample(base_samples=f.get_base_samples(torch.Size([3])))
    assert draws.shape == (3, 450, 2)
    # of rank p = 22: draws lie in the span of J, as functions of the weights do
    J = dense.jacobian(of("gaussian-2").net, x).flatten(0, 1)
    inside = J @ torch.linalg.pinv(J) @ (draws - f.mean).flatten(1).mT
    torch.testing.assert_close(inside, (draws - f.mean).flatten(1).mT, rtol=0, atol=1e-4)
    small = posterior(x[:3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        many = small.sample(torch.Size([20_000]))
    assert_moments(many.flatten(1), small.mean.flatten(), small.covariance_matrix)
    with pytest.raises(ValueError, match=r"base_samples have shape \(3, 9, 2\); expected \[..., 450, 2\]"):
        f.rsample(base_samples=torch.zeros(3, 9, 2))


def test_covariance_is_worked_out_when_asked(monkeypatch):
    posterior = fit(of("gaussian-2"))
    x = inputs(6, seed=9)
    calls, linearize = [], posterior.linearizer._linearize
    monkeypatch.setattr(posterior.linearizer, "_linearize", lambda *a: calls.append(1) or linearize(*a))
    f = posterior(x)
    f.mean  # noqa: B018
    assert not calls
    f.variance, f.variance, f.stddev  # noqa: B018
    assert len(calls) == 1


# -- what belongs to the user ------------------------------------------------------------------------------------------------


def test_the_users_objects_are_not_changed():
    problem = of("gaussian-2")
    prior = models.WeightPrior(0.7)
    state = {k: v.clone() for k, v in problem.likelihood.state_dict().items()}
    posterior = fit(problem, ggn.Kron, prior)
    posterior.prior.precision, posterior.likelihood.noise = 5.0, 3.0
    assert prior.precision.item() == pytest.approx(0.7) and prior.log_precision.grad is None
    assert all(torch.equal(v, problem.likelihood.state_dict()[k]) for k, v in state.items())
    # and the other way round
    prior.precision, problem.likelihood.noise = 9.0, 9.0
    assert posterior.prior.precision.item() == pytest.approx(5.0) and posterior.likelihood.noise.item() == pytest.approx(3.0)


def peculiar_net():
    """Buffers, BatchNorm, Dropout, a frozen layer, a hook of the user's, gradients left behind, mixed modes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)
        ).double()
    net[4].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[2].register_forward_hook(lambda m, a, out: None)
    net.train()
    net[1].eval()
    return net


@pytest.mark.filterwarnings("ignore:Sequential is in train mode")
@every_structure
def test_the_net_comes_back_as_it_came(structure):
    net = peculiar_net()
    x, y = inputs(12), inputs(12, seed=3)
    before = snapshot(net)
    posterior = fit(Problem(net, x, y, likelihoods.Gaussian(torch.tensor(0.3, dtype=D))), structure)
    f = posterior(x.clone().requires_grad_())
    (f.variance.sum() + f.mean.sum()).backward()
    posterior(x).covariance_matrix, posterior.likelihood(posterior(x))
    posterior.sample_outputs(x, 2), posterior.sample_functions(2)(x), posterior.log_evidence().backward()
    posterior.condition((x, y), progress=False) if structure is not ggn.EigenKron else None
    assert_same(before, snapshot(net))
    quiet = copy.deepcopy(net).eval()
    quiet[2]._forward_hooks.clear()
    close(posterior(x).mean, quiet(x).detach(), 1e-10)  # eval mode throughout: dropout off


@pytest.mark.filterwarnings("ignore:Sequential is in train mode")
@every_structure
def test_the_net_comes_back_also_when_a_call_raises(structure):
    net = peculiar_net()
    x, y = inputs(12), inputs(12, seed=3)
    likelihood = likelihoods.Gaussian(torch.tensor(0.3, dtype=D))
    before = snapshot(net)

    def late():  # a loader that ends badly, in its second batch
        yield x[:6], y[:6]
        raise OSError("disk gone")

    bad = x.clone()
    bad[9, 1] = float("nan")
    labels = y.clone()
    labels[8, 0] = float("inf")
    for data, error in (
        ([(x[:6], y[:6]), (bad[6:], y[6:])], ValueError),
        ([(x[:6], y[:6]), (x[6:], labels[6:])], ValueError),
        ([(x[:6], y[:6]), (x[6:, :1], y[6:])], RuntimeError),
        (late(), (OSError, ValueError)),
    ):
        with pytest.raises(error):
            bgn.laplace(models.Network(net, structure=structure), likelihood, data, progress=False)
        assert_same(before, snapshot(net))
    posterior = fit(Problem(net, x, y, likelihood), structure)
    for call in (posterior, posterior.sample_functions(2), lambda x: posterior.sample_outputs(x, 2)):
        for wrong in (bad, x[:, :1], x.float()):
            with pytest.raises((ValueError, RuntimeError)):
                call(wrong)
            assert_same(before, snapshot(net))


def test_a_forward_that_raises_midway_leaves_no_hook():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.armed = nn.Linear(2, 3).double(), nn.Linear(3, 2).double(), False

        def forward(self, x):
            h = self.a(x)
            if self.armed:
                raise KeyError("forward failed")
            return self.b(h)

    net = Fails().eval()
    posterior = fit(Problem(net, inputs(6), inputs(6, seed=2), likelihoods.Gaussian(torch.tensor(0.3, dtype=D))), ggn.Kron)
    net.armed = True
    before = snapshot(net)
    for use in (lambda: posterior(inputs(3)), lambda: posterior.sample_outputs(inputs(3)), lambda: posterior.condition((inputs(6), inputs(6)))):
        with pytest.raises(KeyError, match="forward failed"):
            use()
        assert_same(before, snapshot(net))


# -- stale posteriors --------------------------------------------------------------------------------------------------------


def step(net, x):
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).sum().backward()
    opt.step()


def load_other(net, x):
    net.load_state_dict({k: v + 0.1 for k, v in net.state_dict().items()})


def in_place(net, x):
    with torch.no_grad():
        net[2].bias[0] += 1e-9


def through_data(net, x):
    net[0].weight.data[0, 0] += 0.1


def swapped(net, x):
    net[0].weight.data = net[0].weight.data.flip(0)


def replaced(net, x):
    net[2] = mlp(2, seed=5)[2]


def buffer(net, x):
    net.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("change", [step, load_other, in_place, through_data, swapped, replaced, buffer], ids=lambda f: f.__name__)
def test_a_stale_posterior_is_refused(change):
    problem = of("gaussian-2")
    posterior = fit(problem, ggn.Kron)
    functions, lazy = posterior.sample_functions(2), posterior(problem.x)
    kept = copy.deepcopy(problem.net.state_dict())
    change(problem.net, problem.x)
    for use in (
        lambda: posterior(problem.x), lambda: posterior.sample_outputs(problem.x), lambda: functions(problem.x),
        lambda: posterior.condition((problem.x, problem.y)), lambda: lazy.variance, lambda: lazy.covariance_matrix,
    ):  # fmt: skip
        with pytest.raises(models.StalePosteriorError, match="changed after the posterior was made.*Fit again, or load the old weights"):
            use()
    if change in (step, load_other, in_place, through_data, swapped):
        problem.net.load_state_dict(kept)  # back again: as good as new
        fresh = fit(problem, ggn.Kron)
        assert torch.equal(posterior(problem.x).variance, fresh(problem.x).variance)


def test_what_changes_nothing_is_no_reason_to_refuse():
    problem = of("gaussian-2")
    posterior = fit(problem, ggn.Kron)
    wanted = posterior(problem.x).variance
    net = problem.net
    net.load_state_dict(net.state_dict())
    net.train()
    net.zero_grad()
    net(problem.x).sum().backward()  # gradients, but no step
    for p in net.parameters():
        p.data = p.data.clone()
    torch.optim.SGD(net.parameters(), lr=0.0).step()
    assert torch.equal(posterior(problem.x).variance, wanted)


def test_x_overwritten_before_the_covariance_was_asked_for():
    posterior = fit(of("gaussian-2"))
    x = inputs(4, seed=9)
    early, late = posterior(x), posterior(x)
    wanted = early.variance.clone()
    x += 1
    assert torch.equal(early.variance, wanted)  # asked before: kept
    with pytest.raises(RuntimeError, match="x was overwritten in place between"):
        late.variance  # noqa: B018


@pytest.mark.parametrize("use_backpack", [True, False])
def test_one_model_fitted_at_several_weights(use_backpack):
    """A model may be conditioned again after training went on, however the weights were moved."""
    problem = of("gaussian-2")
    net = problem.net
    model = models.Network(net, structure=ggn.Full, use_backpack=use_backpack)
    bgn.laplace(model, problem.likelihood, (problem.x, problem.y), progress=False)
    for change in (in_place, step, through_data, swapped):
        change(net, problem.x)
        again = bgn.laplace(model, problem.likelihood, (problem.x, problem.y), progress=False)
        J, cov = dense.jacobian(net, problem.x), dense.posterior_cov(dense_ggn(problem), torch.ones(22, dtype=D))
        close(again(problem.x).covariance_matrix, dense.joint_function_cov(J, cov))


# -- low precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the evidence counts the likelihood of all 2000 data")
@every_structure
@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("family", ["gaussian-2", "categorical"])
def test_low_precision_nets(family, dtype, tol, structure):
    """Accumulators are float64 whatever the net's dtype; many small terms are not lost (bfloat16 sums would stop at 256)."""
    problem = of(family)
    n = 2000
    x = inputs(n, seed=4)
    with torch.no_grad():
        y = problem.likelihood.sample(problem.net(x), generator=seeded())
    structure = ggn.Gram(subset=64) if structure is ggn.Gram else structure
    exact = fit(Problem(problem.net, x, y, problem.likelihood), structure)
    low = copy.deepcopy(problem.net).to(dtype)
    target = y if family == "categorical" else y.to(dtype)
    posterior = fit(Problem(low, x.to(dtype), target, problem.likelihood), structure)
    summed = [t for t in posterior.curvature.tensors().values() if t.is_floating_point()]
    if not isinstance(structure, ggn.Gram):
        assert summed and all(t.dtype == D for t in summed)
    test = inputs(6, seed=9)
    f, wanted = posterior(test.to(dtype)), exact(test)
    assert f.mean.dtype == f.variance.dtype == torch.float32
    assert ((f.mean - wanted.mean).norm() / wanted.mean.norm()) < tol
    assert ((f.variance - wanted.variance).norm() / wanted.variance.norm()) < 3 * tol
    evidence = posterior.log_evidence()
    assert evidence.dtype == D and abs(evidence - exact.log_evidence()) < tol * abs(exact.log_evidence())
    assert posterior.sample_outputs(test.to(dtype), 2, seeded()).isfinite().all()
    assert posterior.sample_functions(2, seeded())(test.to(dtype)).dtype == torch.float32
    assert f.rsample().isfinite().all() and posterior.likelihood(f).log_prob(y[:6].float() if family != "categorical" else y[:6]).isfinite().all()


# -- the prior ---------------------------------------------------------------------------------------------------------------


def test_priors_are_positive_and_say_what_they_are():
    net = mlp(2)
    assert repr(models.WeightPrior(2.0)) == "WeightPrior(precision=2)"
    assert repr(models.WeightPrior.per_layer(net)) == "WeightPrior(precisions=2)"
    prior = models.WeightPrior.per_layer(net, torch.tensor([1.0, 4.0]))
    close(prior.precision.detach(), torch.tensor([1.0, 4.0], dtype=D))
    prior.precision = 3.0  # one number for all
    close(prior.precision.detach(), torch.tensor([3.0, 3.0], dtype=D))
    with pytest.raises(ValueError, match=r"precision has shape \(3,\); expected a number or one for each of \['0', '2'\]"):
        models.WeightPrior.per_layer(net, torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\); expected a number or one for each of the 22 weights"):
        models.WeightPrior.per_weight(net, torch.ones(3))
    with pytest.raises(ValueError, match="the prior has layers .* but the net has"):
        models.Network(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)).eval(), models.WeightPrior.per_layer(net))
    with pytest.raises(ValueError, match="22 precisions but 10 weights are selected"):
        models.Network(net, models.WeightPrior.per_weight(net), parameters=bgn.last_layer(net))


def test_a_prior_mean_that_does_not_fit_is_refused():
    problem = of("gaussian-2")
    with pytest.raises(ValueError, match=r"the prior mean names \['nowhere'\]"):
        fit(problem, prior=models.WeightPrior(1.0, {"nowhere": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"the prior mean of 2.bias has shape \(3,\); expected \(2,\)"):
        fit(problem, prior=models.WeightPrior(1.0, {"2.bias": torch.zeros(3)}))
