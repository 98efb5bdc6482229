"""GP against gpytorch's exact regression, textbook Laplace and EP written out by hand, bounds from their definition, and a hundred digits."""

from __future__ import annotations

import gpytorch
import mpmath
import numpy as np
import pytest
import torch
from gpytorch import kernels
from scipy import special, stats
from torch.testing import assert_close

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models import gp, rows
from bayesgn.models.dense_sites import Conditioned

D = torch.float64


def made(kernel, **values):
    kernel = kernel.double()
    for name, value in values.items():
        setattr(kernel, name, torch.as_tensor(value, dtype=D))
    return kernel


def matern(scale=1.3, lengthscale=0.8):
    return made(kernels.ScaleKernel(made(kernels.MaternKernel(nu=2.5), lengthscale=lengthscale)), outputscale=scale)


def settle(model, likelihood, data, rule, tol=1e-12, steps=300):
    return bgn.bayes_newton(model, likelihood, data, rule=rule, tol=tol, steps=steps, progress=False)


def random_sites(n, c, generator, kind):
    h = torch.randn(n, c, dtype=D, generator=generator)
    A = torch.randn(n, c, c, dtype=D, generator=generator)
    Λ = A @ A.mT
    if kind == "low rank":
        Λ = A[..., :1] @ A[..., :1].mT
    if kind == "some missing":
        Λ[::3], h[1::3] = 0, 0
    return h, Λ


# -- the algebra -----------------------------------------------------------------------------------------------------------


def plain(K, h, Λ):
    """log Z, mean and covariance blocks by inverses, as one would write them down."""
    n, c = h.shape
    block = torch.block_diag(*Λ)
    Σ = torch.linalg.solve(torch.eye(n * c, dtype=D) + K @ block, K)
    mean = Σ @ h.reshape(-1)
    log_Z = 0.5 * h.reshape(-1) @ mean - 0.5 * torch.linalg.slogdet(torch.eye(n * c, dtype=D) + K @ block).logabsdet
    return log_Z, mean.reshape(n, c), torch.stack([Σ[i * c : i * c + c, i * c : i * c + c] for i in range(n)])


@pytest.mark.parametrize("kind", ["full", "low rank", "some missing"])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_values_and_adjoints_are_those_of_the_plain_formulas(c, kind, generator):
    n = 6
    h, Λ = random_sites(n, c, generator, kind)
    A = torch.randn(n * c, n * c, dtype=D, generator=generator)
    K = A @ A.T / (n * c) + 0.1 * torch.eye(n * c, dtype=D)
    inputs = [t.requires_grad_() for t in (K, h, Λ)]
    ours, theirs = Conditioned.apply(*inputs), plain(*inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12)
    weights = [torch.randn(t.shape, dtype=D, generator=generator) for t in theirs]
    for which in ([0], [1], [2], [0, 1, 2]):
        total = [sum((outputs[i] * weights[i]).sum() for i in which) for outputs in (ours, theirs)]
        found, expected = (torch.autograd.grad(t, inputs, retain_graph=True, allow_unused=True, materialize_grads=True) for t in total)
        # Of matrices that are symmetric anyway, only the symmetric part of a slope means something.
        sym = lambda g: [0.5 * (g[0] + g[0].mT), g[1], 0.5 * (g[2] + g[2].mT)]
        for a, b in zip(sym(found), sym(expected), strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("c", [1, 2])
def test_sites_of_any_strength_keep_their_digits(c):
    """Precisions from nothing over 1e-20 to 1e12 side by side, against 60 digits."""
    n = 8
    x = np.linspace(0, 2, n)
    K = np.kron(np.exp(-0.5 * (x[:, None] - x) ** 2), np.eye(c))
    strengths = np.array([0, 1e-20, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e12])
    rotation = np.array([[0.8, -0.6], [0.6, 0.8]])[:c, :c] if c == 2 else np.eye(1)
    # The second latent has the opposite order, so that strong and weak meet within a datum.
    Λ = np.stack([rotation @ np.diag([s, t][:c]) @ rotation.T for s, t in zip(strengths, strengths[::-1])])
    h = np.where(np.arange(n * c) % 3 == 0, 0.0, Λ.sum(-1).reshape(-1))
    log_Z, mean, cov = Conditioned.apply(torch.tensor(K), torch.tensor(h).view(n, c), torch.tensor(Λ))
    with mpmath.workdps(60):
        exact = mpmath.matrix(K.tolist())
        block = mpmath.zeros(n * c)
        for i in range(n):
            for a in range(c):
                for b in range(c):
                    block[i * c + a, i * c + b] = mpmath.mpf(Λ[i, a, b])
        M = mpmath.eye(n * c) + exact * block
        Σ = M**-1 * exact
        m = Σ * mpmath.matrix(h.tolist())
        Z = (mpmath.matrix(h.tolist()).T * m)[0] / 2 - mpmath.log(mpmath.det(M)) / 2
        expected = torch.tensor([[[float(Σ[i * c + a, i * c + b]) for b in range(c)] for a in range(c)] for i in range(n)])
        m = torch.tensor([[float(m[i * c + a]) for a in range(c)] for i in range(n)])
    # c = 2: Λ itself, rounded to 16 digits, has no small eigenvalue of 1e-20 beside one of 1e12.
    assert_close(cov, expected.double(), rtol=1e-6, atol=1e-12 if c == 1 else 1e-9)
    assert_close(mean, m.double(), rtol=1e-6, atol=1e-6)
    assert_close(log_Z, torch.tensor(float(Z), dtype=D), rtol=1e-9, atol=0)


def test_a_missing_datum_is_as_no_datum(generator):
    h, Λ = random_sites(5, 2, generator, "full")
    h[2], Λ[2] = 0, 0
    A = torch.randn(10, 10, dtype=D, generator=generator)
    K = A @ A.T
    some = [0, 1, 3, 4]
    which = [2 * i + a for i in some for a in range(2)]
    with_it, without = Conditioned.apply(K, h, Λ), Conditioned.apply(K[which][:, which], h[some], Λ[some])
    assert_close(with_it[0], without[0], rtol=1e-13, atol=0)
    assert_close(with_it[1][some], without[1], rtol=1e-11, atol=1e-12)
    assert_close(with_it[2][some], without[2], rtol=1e-10, atol=1e-12)


def test_a_negative_precision_is_refused():
    with pytest.raises(ValueError, match="positive semi-definite"):
        Conditioned.apply(torch.eye(2, dtype=D), torch.zeros(2, 1, dtype=D), torch.tensor([[[1.0]], [[-0.1]]], dtype=D))


# -- kernels' matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        matern(),
        kernels.ScaleKernel(kernels.RBFKernel(active_dims=[1])),
        kernels.ScaleKernel(kernels.RBFKernel(), active_dims=[0]),
        kernels.ScaleKernel(kernels.ScaleKernel(kernels.PeriodicKernel())) + kernels.ConstantKernel(),
        kernels.RBFKernel(ard_num_dims=2) * kernels.LinearKernel(),
    ],
    ids=lambda k: type(k).__name__,
)
def test_covariances_are_the_kernels(kernel, generator):
    a, b = (torch.randn(n, 2, dtype=D, generator=generator) for n in (4, 3))
    assert_close(gp.covariance(kernel, a, b), kernel(a, b).to_dense().to(D), rtol=1e-14, atol=1e-15)
    assert_close(gp.covariance(kernel, a, a), kernel(a, a).to_dense().to(D), rtol=1e-14, atol=1e-15)
    assert_close(gp.variance(kernel, a), kernel(a, diag=True).to(D), rtol=1e-14, atol=1e-15)


# -- regression: gpytorch's exact GP ---------------------------------------------------------------------------------------


class Exact(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel, mean):
        super().__init__(x, y, likelihood)
        self.covar_module, self.mean_module = kernel, mean

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


REGRESSION = {
    "Matern": lambda: matern(),
    "RBF ard": lambda: made(kernels.ScaleKernel(made(kernels.RBFKernel(ard_num_dims=2), lengthscale=[[0.7, 1.9]])), outputscale=0.6),
    "sum and product": lambda: made(kernels.RBFKernel(active_dims=[0])) * made(kernels.LinearKernel(), variance=0.3) + matern(0.4),
    "rational quadratic": lambda: made(kernels.RQKernel(), alpha=1.7),
}


@pytest.mark.parametrize("mean", [None, "constant", "linear"])
@pytest.mark.parametrize("name", REGRESSION)
def test_regression_equals_gpytorch(name, mean, generator):
    x, xs = (torch.randn(n, 2, dtype=D, generator=generator) for n in (25, 7))
    y = x.sin().sum(-1) + 0.1 * torch.randn(25, dtype=D, generator=generator)
    kernel = REGRESSION[name]()
    prior_mean = {None: gpytorch.means.ZeroMean(), "constant": gpytorch.means.ConstantMean(), "linear": gpytorch.means.LinearMean(2)}[mean].double()
    if mean == "constant":
        prior_mean.constant.data.fill_(0.7)
    noise = gpytorch.likelihoods.GaussianLikelihood().double()
    noise.noise = torch.tensor(0.05, dtype=D)
    theirs = Exact(x, y, noise, kernel, prior_mean)
    with gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.max_cholesky_size(10_000):
        theirs.train()
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(noise, theirs)(theirs(x), y) * len(x)
        slopes = torch.autograd.grad(evidence, [*kernel.parameters(), *prior_mean.parameters()])
        theirs.eval()
        f = theirs(xs)
    ours = bgn.bayes_newton(models.GP(kernel, mean=None if mean is None else prior_mean), likelihoods.Gaussian(0.05), (x, y), progress=False)
    assert ours.trace.converged and ours.trace.steps <= 2
    assert_close(ours.log_evidence(), evidence, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(ours.log_evidence(), [*ours.model.kernels.parameters(), *ours.model.means.parameters()])
    for a, b in zip(found, slopes, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert_close(ours(xs).mean, f.mean, rtol=1e-8, atol=1e-9)
    assert_close(ours(xs).covariance_matrix, f.covariance_matrix, rtol=1e-7, atol=1e-9)
    y_ours, y_theirs = ours.likelihood(ours(xs)), noise(f)
    assert_close(y_ours.variance.flatten(), y_theirs.variance, rtol=1e-8, atol=1e-9)


# -- classification, written out ---------------------------------------------------------------------------------------------


def classes(generator, n=20):
    x = torch.sort(6 * torch.rand(n, 1, dtype=D, generator=generator), 0)[0]
    return x, torch.bernoulli(torch.sigmoid(3 * x[:, 0].sin()), generator=generator)


def textbook_laplace(K, y, Ks, kss):
    """Algorithms 3.1 and 3.2 of Rasmussen and Williams (2006), logistic likelihood, y in {−1, 1}."""
    f = np.zeros(len(y))
    for _ in range(100):
        p = special.expit(f)
        W = p * (1 - p)
        B = np.eye(len(y)) + np.sqrt(W)[:, None] * K * np.sqrt(W)
        L = np.linalg.cholesky(B)
        b = W * f + (y + 1) / 2 - p
        a = b - np.sqrt(W) * np.linalg.solve(L.T, np.linalg.solve(L, np.sqrt(W) * (K @ b)))
        f = K @ a
    p = special.expit(f)
    W = p * (1 - p)
    L = np.linalg.cholesky(np.eye(len(y)) + np.sqrt(W)[:, None] * K * np.sqrt(W))
    log_Z = -0.5 * a @ f - np.logaddexp(0, -y * f).sum() - np.log(np.diag(L)).sum()
    v = np.linalg.solve(L, np.sqrt(W)[:, None] * Ks.T)
    return f, log_Z, Ks @ ((y + 1) / 2 - p), kss - (v * v).sum(0)


def textbook_ep(K, y, Ks, kss):
    """Algorithms 3.5 and 3.6 of Rasmussen and Williams (2006), probit likelihood, one site after the other, y in {−1, 1}."""
    n = len(y)
    ν, τ, Σ, μ = np.zeros(n), np.zeros(n), K.copy(), np.zeros(n)
    for _ in range(60):
        for i in range(n):
            τ_, ν_ = 1 / Σ[i, i] - τ[i], μ[i] / Σ[i, i] - ν[i]
            m, s = ν_ / τ_, 1 / τ_
            z = y[i] * m / np.sqrt(1 + s)
            ratio = np.exp(stats.norm.logpdf(z) - stats.norm.logcdf(z))
            mean = m + y[i] * s * ratio / np.sqrt(1 + s)
            var = s - s**2 * ratio / (1 + s) * (z + ratio)
            Δτ = 1 / var - τ_ - τ[i]
            τ[i], ν[i] = τ[i] + Δτ, mean / var - ν_
            Σ = Σ - np.outer(Σ[:, i], Σ[:, i]) * Δτ / (1 + Δτ * Σ[i, i])
            μ = Σ @ ν
        B = np.eye(n) + np.sqrt(τ)[:, None] * K * np.sqrt(τ)
        Σ = K - K * np.sqrt(τ) @ np.linalg.solve(B, np.sqrt(τ)[:, None] * K)
        μ = Σ @ ν
    τ_, ν_ = 1 / np.diag(Σ) - τ, μ / np.diag(Σ) - ν
    m, s = ν_ / τ_, 1 / τ_
    # eq. 3.65: the sites' normalisers, then the Gaussian integral over them
    log_Z = stats.norm.logcdf(y * m / np.sqrt(1 + s)).sum() + 0.5 * np.log(s + 1 / τ).sum() + ((m - ν / τ) ** 2 / (2 * (s + 1 / τ))).sum()
    S = K + np.diag(1 / τ)
    log_Z += -0.5 * np.linalg.slogdet(S)[1] - 0.5 * (ν / τ) @ np.linalg.solve(S, ν / τ)
    return μ, np.diag(Σ), log_Z, Ks @ np.linalg.solve(S, ν / τ), kss - (Ks * np.linalg.solve(S, Ks.T).T).sum(1)


def arrays(kernel, x, xs):
    return (M.detach().numpy() for M in (gp.covariance(kernel, x, x), gp.covariance(kernel, xs, x), gp.variance(kernel, xs)))


def test_laplace_equals_the_textbook(generator):
    x, y = classes(generator)
    xs, kernel = torch.linspace(-1, 7, 9, dtype=D)[:, None], matern(4.0)
    f, log_Z, mean, var = textbook_laplace(*(lambda K, Ks, kss: (K, 2 * y.numpy() - 1, Ks, kss))(*arrays(kernel, x, xs)))
    ours = settle(models.GP(kernel), likelihoods.Bernoulli(), (x, y), rules.Laplace())
    assert_close(ours.marginals().mean.flatten(), torch.tensor(f), rtol=1e-9, atol=1e-10)
    assert_close(ours.log_evidence().detach(), torch.tensor(log_Z), rtol=1e-11, atol=0)
    assert_close(ours(xs).mean.detach(), torch.tensor(mean), rtol=1e-8, atol=1e-9)
    assert_close(ours(xs).variance.detach(), torch.tensor(var), rtol=1e-8, atol=1e-9)


def test_ep_equals_the_textbook(generator):
    x, y = classes(generator)
    xs, kernel = torch.linspace(-1, 7, 9, dtype=D)[:, None], matern(4.0)
    K, Ks, kss = arrays(kernel, x, xs)
    μ, v, log_Z, mean, var = textbook_ep(K, 2 * y.numpy() - 1, Ks, kss)
    ours = settle(models.GP(kernel), likelihoods.Bernoulli(likelihoods.NormCDF()), (x, y), rules.PowerEP(1.0, rules.Exact()))
    assert_close(ours.marginals().mean.flatten(), torch.tensor(μ), rtol=1e-6, atol=1e-7)
    assert_close(ours.marginals().cov.flatten(), torch.tensor(v), rtol=1e-6, atol=1e-7)
    assert_close(ours.log_evidence().detach(), torch.tensor(log_Z), rtol=1e-8, atol=0)
    assert_close(ours(xs).mean.detach(), torch.tensor(mean), rtol=1e-6, atol=1e-7)
    assert_close(ours(xs).variance.detach(), torch.tensor(var), rtol=1e-6, atol=1e-7)


def test_the_variational_bound_from_its_definition(generator):
    """E_q[log p] by scipy's quadrature less KL(q ‖ p) between dense Gaussians, and its slope at the fixed point."""
    x, y = classes(generator, 12)
    kernel = matern(2.0)
    ours = settle(models.GP(kernel), likelihoods.Bernoulli(), (x, y), rules.Variational(rules.Exact(), rules.GaussHermite(60)))
    K = gp.covariance(kernel, x, x).detach()
    with torch.no_grad():
        f = ours(x)
        m, S = f.mean, f.covariance_matrix
    nodes, w = np.polynomial.hermite_e.hermegauss(120)
    signs = (2 * y - 1).numpy()[:, None]
    values = m.numpy()[:, None] + S.diagonal().sqrt().numpy()[:, None] * nodes
    expected = (w / w.sum() * -np.logaddexp(0, -signs * values)).sum()
    n = len(x)
    kl = 0.5 * (torch.trace(torch.linalg.solve(K, S)) + m @ torch.linalg.solve(K, m) - n + K.logdet() - S.logdet())
    assert_close(ours.log_evidence().detach(), expected - kl, rtol=1e-8, atol=1e-8)
    g = torch.tensor((w / w.sum() * (signs * special.expit(-signs * values))).sum(-1))
    assert_close(torch.linalg.solve(K, m), g, rtol=1e-6, atol=1e-8)


# -- answers -----------------------------------------------------------------------------------------------------------------


def test_latents_that_no_site_couples_are_worked_out_one_by_one(generator, monkeypatch):
    x = torch.randn(9, 2, dtype=D, generator=generator)
    y = torch.randn(9, 2, dtype=D, generator=generator)
    both = [matern(), matern(0.5, 1.7)]
    one = bgn.bayes_newton(models.GP(both), likelihoods.Gaussian(0.1), (x, y), progress=False)
    sizes = []
    kept = Conditioned.apply
    monkeypatch.setattr(gp.Conditioned, "apply", lambda K, *rest: sizes.append(len(K)) or kept(K, *rest))
    apart = [bgn.bayes_newton(models.GP(k), likelihoods.Gaussian(0.1), (x, y[:, i]), progress=False) for i, k in enumerate(both)]
    sizes.clear()
    assert_close(one.log_evidence(), sum(p.log_evidence() for p in apart), rtol=1e-12, atol=1e-12)
    assert sizes == [9] * 4
    xs = torch.randn(4, 2, dtype=D, generator=generator)
    for i, p in enumerate(apart):
        assert_close(one(xs).mean[:, i], p(xs).mean, rtol=1e-11, atol=1e-12)
        assert_close(one(xs).covariance_matrix[i::2, i::2], p(xs).covariance_matrix, rtol=1e-11, atol=1e-12)
    assert not one(xs).covariance_matrix[0::2, 1::2].any()


def test_many_inputs_a_few_at_a_time(generator, monkeypatch):
    x, y = classes(generator)
    ours = settle(models.GP(matern()), likelihoods.Bernoulli(), (x, y), rules.Laplace(), tol=1e-6)
    xs = torch.linspace(0, 6, 50, dtype=D, requires_grad=True)
    weights = torch.randn(50, dtype=D, generator=generator)
    targets = [xs, *ours.model.parameters()]

    def answer():
        f = ours(xs)
        return f.mean, f.variance, *torch.autograd.grad(weights @ (f.mean + f.variance), targets)

    whole = answer()
    calls = []
    kept = gp.covariance
    monkeypatch.setattr(gp, "covariance", lambda k, a, b: calls.append(len(a)) or kept(k, a, b))
    monkeypatch.setattr(rows, "NUMBERS", 7 * 20)
    for a, b in zip(answer(), whole, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert calls.count(7) == 2 * 2 * 7 and 50 not in calls  # twice: forward, and again for the backward pass (a ScaleKernel calls its inner kernel)
    calls.clear()
    with torch.no_grad():
        assert_close(ours(xs).variance, whole[1].detach(), rtol=1e-11, atol=1e-12)
    assert calls.count(7) == 2 * 7


def test_factors_are_kept_between_calls_and_follow_hyper_parameters(generator, monkeypatch):
    x, y = classes(generator)
    ours = settle(models.GP(matern()), likelihoods.Bernoulli(), (x, y), rules.Laplace(), tol=1e-6)
    factored = []
    kept = gp.GP.factors
    monkeypatch.setattr(gp.GP, "factors", lambda self, *a: factored.append(1) or kept(self, *a))
    xs = torch.linspace(0, 6, 5, dtype=D)
    with torch.no_grad():
        first, again = ours(xs), ours(xs)
        assert len(factored) == 1 and torch.equal(first.mean, again.mean)
        joint = again.covariance_matrix
        assert len(factored) == 1
    assert_close(ours(xs).covariance_matrix, joint, rtol=1e-12, atol=1e-13)  # with a graph
    assert len(factored) == 3
    with torch.no_grad():
        ours.model.kernels[0].outputscale = 3.0
        changed = ours(xs)
        fresh = settle(ours.model, likelihoods.Bernoulli(), (x, y), rules.Laplace()).with_sites(ours.sites)(xs)
        assert_close(changed.mean, fresh.mean, rtol=1e-12, atol=0)
        assert (changed.mean - first.mean).abs().max() > 1e-2


def test_no_data_is_the_prior(generator):
    xs = torch.randn(4, 2, dtype=D, generator=generator)
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(0.3)
    f = models.GP([matern(), matern(0.2)], mean=[mean, None]).prior(xs)
    assert_close(f.mean, torch.tensor([[0.3, 0.0]], dtype=D).expand(4, 2))
    K = [gp.covariance(k, xs, xs) for k in (matern(), matern(0.2))]
    assert_close(f.covariance_matrix[0::2, 0::2], K[0], rtol=1e-13, atol=1e-13)
    assert_close(f.covariance_matrix[1::2, 1::2], K[1], rtol=1e-13, atol=1e-13)
    assert not f.covariance_matrix[0::2, 1::2].any()


def test_inputs_far_from_data_get_the_prior():
    x = torch.linspace(0, 1, 5, dtype=D)
    ours = bgn.bayes_newton(models.GP(matern(1.3)), likelihoods.Gaussian(0.1), (x, x.sin()), progress=False)
    far = ours(torch.tensor([1e6], dtype=D))
    assert_close(far.mean, torch.zeros(1, dtype=D))
    assert_close(far.variance, torch.full((1,), 1.3, dtype=D))
