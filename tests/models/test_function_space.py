"""One posterior three times: in weight space (Full), in the dual (Gram), and as a Gaussian process with the Jacobian kernel."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.models import WeightPrior
from bayesgn.models.jacobian_kernel import JacobianKernel, LinearizedMean
from tests.models.problems import inputs, mlp
from tests.models.test_jacobian_kernel import exact
from tests.oracles import dense

GAUSSIAN = lambda noise=0.1: likelihoods.Gaussian(torch.tensor(noise, dtype=torch.float64))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def at_map(c: int, likelihood, x: Tensor, y: Tensor, precision: float) -> nn.Module:
    """A net at its MAP, to 1e-11 in the gradient: L-BFGS, then Newton steps with the whole Hessian."""
    net = mlp(c, hidden=4)
    shapes = {n: p.shape for n, p in net.named_parameters()}

    def loss(θ: Tensor) -> Tensor:
        parts = θ.split([s.numel() for s in shapes.values()])
        f = torch.func.functional_call(net, {n: t.view(s) for (n, s), t in zip(shapes.items(), parts)}, (x,))
        return -likelihood.log_prob(likelihood.rows(f), y).sum() + 0.5 * precision * θ.square().sum()

    θ = dense.vector(net).requires_grad_()
    optimizer = torch.optim.LBFGS([θ], max_iter=500, tolerance_grad=1e-7, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(θ)
        value.backward()
        return value

    optimizer.step(closure)
    θ = θ.detach()
    for _ in range(4):
        g, H = torch.func.grad(loss)(θ), torch.func.hessian(loss)(θ)
        λ, V = torch.linalg.eigh(H)
        θ = θ - V @ ((V.T @ g) / λ.abs().clamp_min(1e-3))
    assert torch.func.grad(loss)(θ).norm() < 1e-10
    torch.nn.utils.vector_to_parameters(θ, net.parameters())
    return net


def regression(n: int = 14) -> tuple[Tensor, Tensor]:
    x = inputs(n)
    return x, (x[:, 0].sin() + 0.3 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).unsqueeze(-1)


def slopes(posterior) -> list[Tensor]:
    """Of the log evidence in log prior precision and in the noise."""
    value = posterior.log_evidence()
    a, b = torch.autograd.grad(value, [posterior.prior.log_precision, posterior.likelihood.raw_noise])
    return [a, b / torch.autograd.grad(posterior.likelihood.noise, posterior.likelihood.raw_noise)[0]]


# -- Laplace at the MAP --------------------------------------------------------------------------------------------------


def test_laplace_in_weight_space_is_the_gaussian_process():
    """Mean, covariance, evidence and its gradients: Full = Gram = ExactGP = models.GP."""
    x, y = regression()
    z = inputs(5, seed=4)
    net = at_map(1, GAUSSIAN(), x, y, 0.7)
    full, gram = (
        bgn.laplace(models.Network(net, WeightPrior(0.7), structure), GAUSSIAN(), (x, y), progress=False) for structure in (ggn.Full, ggn.Gram)
    )
    network = models.Network(net, WeightPrior(0.7))

    gp = exact(network, x, y[:, 0])
    gp.train()
    value = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(x), y[:, 0]) * len(y)
    prior, noise = torch.autograd.grad(value, [gp.covar_module.prior.log_precision, gp.likelihood.raw_noise])
    noise = (noise / torch.autograd.grad(gp.likelihood.noise, gp.likelihood.raw_noise)[0]).squeeze()
    gp.eval()
    f = gp(z)

    own = bgn.bayes_newton(models.GP(JacobianKernel(network), LinearizedMean(network)), GAUSSIAN(), (x, y[:, 0]), rule=rules.Variational())
    own_f = own(z)
    for posterior in (full, gram):
        q = posterior(z)
        for other in (f, own_f):
            close(other.mean, q.mean[:, 0])
            close(other.covariance_matrix, q.covariance_matrix)
            close(other.variance, q.variance[:, 0])
        close(value, posterior.log_evidence())
        close(own.log_evidence(), posterior.log_evidence())
        a, b = slopes(posterior)
        close(prior, a)
        close(noise, b)
    kernel = own.model.kernels[0]
    a, b = torch.autograd.grad(own.log_evidence(), [kernel.prior.log_precision, own.likelihood.raw_noise])
    close(a, prior)
    close(b / torch.autograd.grad(own.likelihood.noise, own.likelihood.raw_noise)[0], noise)


def test_both_views_are_tuned_to_one_optimum():
    x, y = regression(20)
    net = mlp(1, hidden=5)  # anywhere: the linearised model is conditioned exactly
    network = models.Network(net, WeightPrior(0.7), ggn.Full)
    weights = bgn.bayes_newton(network, GAUSSIAN(), (x, y), rule=rules.Variational())
    functions = bgn.bayes_newton(models.GP(JacobianKernel(network), LinearizedMean(network)), GAUSSIAN(), (x, y), rule=rules.Variational())
    for posterior in (weights, functions):
        bgn.maximize_evidence(posterior, tol=1e-9, progress=False)
    close(weights.log_evidence(), functions.log_evidence(), 1e-8)
    close(weights.prior.precision.log(), functions.model.kernels[0].prior.precision.log(), 1e-4)
    close(weights.likelihood.noise.log(), functions.likelihood.noise.log(), 1e-4)


# -- any likelihood ------------------------------------------------------------------------------------------------------

LABELS = {
    "Bernoulli": (likelihoods.Bernoulli(), lambda f: (f > f.median()).double()),
    "Poisson": (likelihoods.Poisson(), lambda f: (2 * f).exp().round()),
}
RULES = {
    "Laplace": rules.Laplace(),
    "Variational": rules.Variational(),
    "PowerEP": rules.PowerEP(0.5, rules.GaussNewton()),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", LABELS)
def test_any_rule_and_likelihood_in_both_views(family, rule):
    likelihood, label = LABELS[family]
    net, x, z = mlp(1, hidden=8, seed=1), inputs(16), inputs(5, seed=4)
    y = label(net(x).detach()[:, 0] + 0.3 * x[:, 1])
    prior = WeightPrior.per_layer(net, torch.tensor([0.5, 2.0], dtype=torch.float64))
    network = models.Network(net, prior, ggn.Full)
    weights = bgn.bayes_newton(network, likelihood, (x, y), rule=RULES[rule], tol=1e-11, steps=300, progress=False)
    model = models.GP(JacobianKernel(network), LinearizedMean(network))
    functions = bgn.bayes_newton(model, likelihood, (x, y), rule=RULES[rule], tol=1e-11, steps=300, progress=False)
    f, g = functions(z), weights(z)
    close(f.mean, g.mean[:, 0])
    close(f.covariance_matrix, g.covariance_matrix)
    close(functions.log_evidence(), weights.log_evidence())
    # (a net starts at its trained weights, a process at its prior: the gradient is compared where both have settled)
    own = torch.autograd.grad(functions.log_evidence(), functions.model.kernels[0].prior.log_precision)[0]
    close(own, torch.autograd.grad(weights.log_evidence(), weights.prior.log_precision)[0], 1e-7)


@pytest.mark.parametrize("rule", ["Laplace", "Variational"])
def test_classes_with_a_last_layer_are_independent_processes(rule):
    """The outputs of a last layer share nothing before the data: a kernel for each of them is the whole kernel."""
    net, x, z = mlp(3, hidden=6), inputs(15), inputs(4, seed=4)
    y = torch.arange(15) % 3
    network = models.Network(net, WeightPrior(0.5), ggn.Full, parameters=bgn.last_layer(net))
    kernel, mean = JacobianKernel(network), LinearizedMean(network)
    K = kernel(x).to_dense().detach().view(15, 3, 15, 3)
    assert all(float(K[:, i, :, j].abs().max()) < 1e-12 for i in range(3) for j in range(3) if i != j)
    model = models.GP([kernel.output(j) for j in range(3)], [mean.output(j) for j in range(3)])
    weights, functions = (
        bgn.bayes_newton(m, likelihoods.Categorical(), (x, y), rule=RULES[rule], tol=1e-11, steps=300, progress=False) for m in (network, model)
    )
    f, g = functions(z), weights(z)
    close(f.mean, g.mean)
    close(f.covariance_matrix, g.covariance_matrix)
    close(functions.log_evidence(), weights.log_evidence())


def test_classes_with_all_weights_in_the_dual():
    """With what outputs share, the process is Network(structure=Gram): Full's answer under refinement."""
    net, x, z = mlp(3, hidden=6), inputs(15), inputs(4, seed=4)
    y = torch.arange(15) % 3
    for rule in (rules.Laplace(), rules.Variational()):
        full, gram = (
            bgn.bayes_newton(models.Network(net, WeightPrior(0.5), s), likelihoods.Categorical(), (x, y), rule=rule, tol=1e-11, progress=False)
            for s in (ggn.Full, ggn.Gram)
        )
        close(gram(z).mean, full(z).mean)
        close(gram(z).covariance_matrix, full(z).covariance_matrix)
        close(gram.log_evidence(), full.log_evidence())
        slope = lambda p: torch.autograd.grad(p.log_evidence(), p.prior.log_precision)[0]
        close(slope(gram), slope(full))


# -- some of the data ----------------------------------------------------------------------------------------------------


def test_a_subset_of_the_data_is_the_process_of_these_alone():
    """Gram(subset=m): the covariance is the exact process's given the m data kept, not scaled up to all n."""
    x, y = regression(20)
    z = inputs(5, seed=4)
    net = mlp(1, hidden=5)
    kept = torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).argsort()[:7].sort().values
    subset = bgn.laplace(models.Network(net, WeightPrior(0.7), ggn.Gram(subset=7, seed=2)), GAUSSIAN(), (x, y), progress=False)
    gp = exact(models.Network(net, WeightPrior(0.7)), x[kept], y[kept, 0]).eval()
    close(subset(z).covariance_matrix, gp(z).covariance_matrix)
    alone = bgn.laplace(models.Network(net, WeightPrior(0.7), ggn.Gram), GAUSSIAN(), (x[kept], y[kept]), progress=False)
    close(subset(z).covariance_matrix, alone(z).covariance_matrix)
    everything = bgn.laplace(models.Network(net, WeightPrior(0.7), ggn.Gram), GAUSSIAN(), (x, y), progress=False)
    assert bool((subset(z).variance > everything(z).variance).all())
    # For bayes_newton the subset holds the covariance alone; the mean goes on to see all data.
    with pytest.warns(UserWarning, match="the determinant of the subset"):
        refined = bgn.bayes_newton(models.Network(net, WeightPrior(0.7), ggn.Gram(subset=7, seed=2)), GAUSSIAN(), (x, y), progress=False)
    close(refined(z).mean[:, 0], exact(models.Network(net, WeightPrior(0.7)), x, y[:, 0]).eval()(z).mean, 1e-7)


def test_inducing_data_in_the_dual_are_the_projected_process():
    """Gram(inducing=m): Cov = K** − Q** + K*z (K_zz + K_zn K_nz / σ²)⁻¹ K_z*, deterministic training conditional."""
    x, y = regression(20)
    z, m, noise = inputs(5, seed=4), 6, 0.1
    net = mlp(1, hidden=5)
    kept = torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).argsort()[:m]
    posterior = bgn.laplace(models.Network(net, WeightPrior(0.7), ggn.Gram(inducing=m, seed=2)), GAUSSIAN(noise), (x, y), progress=False)
    k = lambda a, b: (dense.jacobian(net, a)[:, 0] @ dense.jacobian(net, b)[:, 0].mT) / 0.7
    Z = x[kept]
    Q = k(z, Z) @ torch.linalg.solve(k(Z, Z), k(Z, z))
    wanted = k(z, z) - Q + k(z, Z) @ torch.linalg.solve(k(Z, Z) + k(Z, x) @ k(x, Z) / noise, k(Z, z))
    close(posterior(z).covariance_matrix, wanted)
    logdet = torch.linalg.slogdet(k(Z, Z) + k(Z, x) @ k(x, Z) / noise)[1] - torch.linalg.slogdet(k(Z, Z))[1]
    p = sum(q.numel() for q in net.parameters())
    close(posterior.precision().logdet(), logdet + p * math.log(0.7))


# -- inducing points -----------------------------------------------------------------------------------------------------


def sparse(network, Z: Tensor, likelihood, data, rule=None, **options):
    model = models.SparseGP(JacobianKernel(network), Z, LinearizedMean(network), **options)
    return bgn.bayes_newton(model, likelihood, data, rule=rules.Variational() if rule is None else rule, tol=1e-10, steps=300, progress=False)


@pytest.mark.parametrize("family", ["Gaussian", "Bernoulli"])
def test_all_data_as_inducing_points_are_the_exact_process(family):
    x, y = regression(16)
    z = inputs(5, seed=4)
    likelihood, y = (GAUSSIAN(), y) if family == "Gaussian" else (likelihoods.Bernoulli(), (y > 0).double())
    network = models.Network(mlp(1, hidden=10), WeightPrior(0.7), ggn.Full)
    weights = bgn.bayes_newton(network, likelihood, (x, y), rule=rules.Variational(), tol=1e-10, progress=False)
    posterior = sparse(network, x, likelihood, (x, y))
    close(posterior(z).mean, weights(z).mean[:, 0], 1e-7)
    close(posterior(z).covariance_matrix, weights(z).covariance_matrix)
    close(posterior.log_evidence(), weights.log_evidence())
    slope = torch.autograd.grad(posterior.log_evidence(), posterior.model.kernels[0].prior.log_precision)[0]
    close(slope, torch.autograd.grad(weights.log_evidence(), weights.prior.log_precision)[0], 1e-7)


def test_the_bound_is_that_of_titsias():
    x, y = regression(20)
    network, noise = models.Network(mlp(1, hidden=10), WeightPrior(0.7)), 0.1
    kernel, mean, Z = JacobianKernel(network), LinearizedMean(network), x[3:9]
    posterior = sparse(network, Z, GAUSSIAN(noise), (x, y))
    K = lambda a, b: kernel(a, b).to_dense().detach()
    Q = K(x, Z) @ torch.linalg.solve(K(Z, Z), K(Z, x))
    N = torch.distributions.MultivariateNormal(mean(x), 0.5 * (Q + Q.mT) + noise * torch.eye(20, dtype=torch.float64))
    close(posterior.log_evidence(), N.log_prob(y[:, 0]) - (K(x, x) - Q).trace() / (2 * noise), 1e-7)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["Gaussian", "Bernoulli"]))
def test_more_inducing_points_never_lower_the_bound(seed, family):
    x, y = regression(14)
    likelihood, y = (GAUSSIAN(), y) if family == "Gaussian" else (likelihoods.Bernoulli(), (y > 0).double())
    network = models.Network(mlp(1, hidden=10, seed=seed), WeightPrior(0.7), ggn.Full)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        bounds = [sparse(network, x[order[:m]], likelihood, (x, y)).log_evidence().item() for m in (3, 8, 14)]
        exact_bound = bgn.bayes_newton(network, likelihood, (x, y), rule=rules.Variational(), tol=1e-10, progress=False).log_evidence().item()
    tolerance = 1e-6 * (1 + abs(exact_bound))
    assert all(b >= a - tolerance for a, b in zip(bounds, bounds[1:])), bounds
    assert bounds[-1] <= exact_bound + tolerance and bounds[-1] == pytest.approx(exact_bound, rel=1e-6)


def test_inducing_points_are_chosen_and_moved():
    """models.inducing_points finds p directions and no more; learn_inducing climbs the bound by the kernel's gradient in x."""
    x, y = regression(30)
    net = mlp(1, hidden=3)  # p = 13
    network = models.Network(net, WeightPrior(0.7))
    Z = models.inducing_points(JacobianKernel(network), x, 30)
    assert len(Z) == torch.linalg.matrix_rank(dense.jacobian(net, x)[:, 0])
    full = bgn.bayes_newton(models.Network(net, WeightPrior(0.7), ggn.Full), GAUSSIAN(), (x, y), progress=False)
    posterior = sparse(network, Z, GAUSSIAN(), (x, y))
    torch.testing.assert_close(posterior.log_evidence(), full.log_evidence(), rtol=1e-5, atol=1e-5)
    moved = sparse(network, Z[:3], GAUSSIAN(), (x, y), learn_inducing=True)
    start = moved.model.inducing_points.detach().clone()

    def bound(points: Tensor) -> Tensor:
        other = models.SparseGP(JacobianKernel(network), points, LinearizedMean(network))
        with torch.no_grad():
            return bgn.bayes_newton(other, GAUSSIAN(), (x, y), rule=rules.Variational(), progress=False).log_evidence()

    slope = torch.autograd.grad(moved.log_evidence(), moved.model.inducing_points)[0]
    close(slope.flatten(), dense.finite_difference(lambda v: bound(v.view(3, 2)), start.flatten(), 1e-5).flatten(), 1e-4)
    moved.model.kernels[0].prior.log_precision.requires_grad_(False)
    before = moved.log_evidence().item()
    bgn.maximize_evidence(moved, noise=False, steps=10, progress=False)
    assert before + 0.1 < moved.log_evidence().item() <= full.log_evidence().item() + 1e-6
