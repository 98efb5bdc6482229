"""SparseMarkovGP against the dense algebra of its states, MarkovGP, and the closed forms of sparse Gaussian processes."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models.averaging import averaged, opened
from bayesgn.models.sde_kernels import state_space
from bayesgn.rules import Marginals, Sites

RULES = [
    rules.Laplace(), rules.Variational(), rules.PowerEP(1.0), rules.PowerEP(0.5), rules.Laplace(rules.Exact()), rules.Variational(rules.Exact()),
]  # fmt: skip


def matern(nu: float = 1.5, lengthscale: float = 1.0, scale: float = 1.0):
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=nu)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, scale
    return kernel


def equal(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# -- a second opinion: Gram matrices of the states -----------------------------------------------------------------------------


def states_gram(space, s: Tensor, t: Tensor) -> Tensor:
    """Cov(x(s), x(t)) [len(s) d, len(t) d]."""
    a, b = torch.meshgrid(s, t, indexing="ij")
    low, high = torch.minimum(a, b).flatten(), torch.maximum(a, b).flatten()
    C = space.covariance(low) @ space.transition(high - low).mT
    C = torch.where((a <= b).flatten()[:, None, None], C, C.mT).unflatten(0, a.shape)
    return C.transpose(1, 2).flatten(0, 1).flatten(1)


class Dense:
    """p(u) and p(f_n | u) of a model at times t, all latents, data first: K_uu, K_fu, K_ff, B = K_fu K_uu⁻¹, S = blocks of K_ff − B K_uf."""

    def __init__(self, model, t: Tensor) -> None:
        z, n, c = model.inducing_times, len(t), model.latents
        uu, fu, ff = [], [], []
        for kernel in model.kernels:
            space = state_space(kernel)
            eye, H = torch.eye(n, dtype=t.dtype), space.H
            uu.append(states_gram(space, z, z))
            fu.append(torch.kron(eye, H[None]) @ states_gram(space, t, z))
            ff.append(torch.kron(eye, H[None]) @ states_gram(space, t, t) @ torch.kron(eye, H[:, None]))
        self.K_uu = torch.block_diag(*uu)
        self.K_fu = torch.block_diag(*fu).reshape(c, n, -1).transpose(0, 1).reshape(n * c, -1)
        full = torch.block_diag(*ff).reshape(c, n, c, n).permute(1, 0, 3, 2)
        self.K_ff = full.reshape(n * c, n * c)
        self.B = self.K_fu @ torch.linalg.pinv(self.K_uu, hermitian=True, rtol=1e-12)
        left = self.K_ff - self.B @ self.K_fu.mT
        self.left = left
        self.S = left.reshape(n, c, n, c)[torch.arange(n), :, torch.arange(n)]

    def dtc(self) -> Tensor:
        return self.B @ self.K_fu.mT

    def fitc(self) -> Tensor:
        return self.dtc() + torch.block_diag(*self.S)


def gaussian_sites(K: Tensor, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log ∫ N(f; 0, K) Π exp(nat1ᵀf − ½ fᵀ nat2 f) df, and the posterior's mean and covariance of f."""
    Λ, h = torch.block_diag(*nat2), nat1.reshape(-1)
    M = torch.eye(len(K), dtype=K.dtype) + K @ Λ
    Σ = torch.linalg.solve(M, K)
    return 0.5 * h @ Σ @ h - 0.5 * torch.linalg.slogdet(M)[1], Σ @ h, Σ


def some_sites(n: int, c: int, coupled: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    R = torch.randn(n, c, c, dtype=torch.float64, generator=g)
    nat2 = R @ R.mT if coupled else torch.diag_embed(R.diagonal(dim1=-2, dim2=-1) ** 2)
    nat2[n // 3] = 0  # a missing datum
    return torch.randn(n, c, dtype=torch.float64, generator=g), nat2


TIMES = torch.tensor([3.1, -1.2, 0.0, 0.45, 2.0, 1.1, 4.9, 1.1, 5.5, 7.2, -0.3, 2.2, 3.9], dtype=torch.float64)  # before, after, at, twice
INDUCING = torch.tensor([0.0, 5.0, 1.0, 2.0, 3.2], dtype=torch.float64)
NEW = torch.tensor([-2.0, -1.7, 0.3, 0.6, 1.0, 2.5, 2.7, 4.0, 5.0, 5.2, 9.0], dtype=torch.float64)
KERNELS = {"1": lambda: [matern(1.5)], "2": lambda: [matern(2.5, 1.3, 0.7), matern(0.5, 2.0, 1.9)]}


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("latents, coupled", [("1", True), ("2", True), ("2", False)])
def test_dense_algebra(latents, coupled, power):
    model = models.SparseMarkovGP(KERNELS[latents](), INDUCING)
    model.power = power
    c, x = model.latents, TIMES[:, None]
    nat1, nat2 = some_sites(len(TIMES), c, coupled)
    inputs, dense = model.place(x), Dense(model, TIMES)
    log_Z, q = model._solve(inputs, nat1, nat2)
    if power:  # FITC is a Gaussian process of its own
        wanted, mean, Σ = gaussian_sites(dense.fitc(), nat1, nat2)
        u_mean, u_cov = _states_given(dense, dense.fitc(), nat1, nat2)
    else:
        wanted, mean, Σ = gaussian_sites(dense.dtc(), nat1, nat2)
        wanted, Σ = wanted - 0.5 * (nat2 * dense.S).sum(), Σ + torch.block_diag(*dense.S)
        u_mean, u_cov = _states_given(dense, dense.dtc(), nat1, nat2)
    n = len(TIMES)
    equal(log_Z, wanted)
    equal(q.mean, mean.reshape(n, c))
    equal(q.cov, Σ.reshape(n, c, n, c)[torch.arange(n), :, torch.arange(n)])

    new, m = Dense(model, NEW), len(NEW)
    joint = new.B @ u_cov @ new.B.mT + new.left
    answer = model._predict(inputs, nat1, nat2, NEW[:, None])
    equal(answer.mean, (new.B @ u_mean).reshape(m, c))
    equal(answer.cov, joint.reshape(m, c, m, c)[torch.arange(m), :, torch.arange(m)])
    equal(model._joint(inputs, nat1, nat2, NEW[:, None]), joint)


def _states_given(dense: Dense, K: Tensor, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of u under sites on f ~ N(0, K), Cov(f, u) = K_fu."""
    Λ, h = torch.block_diag(*nat2), nat1.reshape(-1)
    G = torch.linalg.solve(torch.eye(len(K), dtype=K.dtype) + Λ @ K, torch.cat([Λ @ dense.K_fu, h[:, None]], -1))
    return dense.K_fu.mT @ G[:, -1], dense.K_uu - dense.K_fu.mT @ G[:, :-1]


k = gpytorch.kernels
OTHERS = {
    "Matern + Constant": lambda: matern(2.5) + k.ConstantKernel(),  # a constant is known between inducing times: Q is singular
    "Matern + Linear": lambda: matern(0.5) + k.ScaleKernel(k.LinearKernel()),  # P(t) moves, and has rank one
    "Matern * Cosine": lambda: matern(1.5) * k.CosineKernel(),
    "Matern * Linear": lambda: matern(1.5) * k.LinearKernel(),
    "Periodic": lambda: k.ScaleKernel(k.PeriodicKernel()),
    "RBF": lambda: k.ScaleKernel(k.RBFKernel()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels(name):
    """States of which some are known from others; tiny intervals and far ones."""
    kernel = OTHERS[name]().double()
    nat1, nat2 = some_sites(len(TIMES), 1, coupled=True)
    for z, tolerance in ((INDUCING, 1e-7), (torch.tensor([0.0, 1e-3, 2.0, 2.05, 30.0], dtype=torch.float64), 1e-6)):
        model = models.SparseMarkovGP(kernel, z)
        inputs = model.place(TIMES[:, None])
        log_Z, q = model._solve(inputs, nat1, nat2)
        dense = Dense(model, TIMES)
        wanted, mean, Σ = gaussian_sites(dense.dtc(), nat1, nat2)
        equal(log_Z, wanted - 0.5 * (nat2 * dense.S).sum(), tolerance)
        equal(q.mean[:, 0], mean, tolerance)
        equal(q.cov, (Σ.diagonal()[:, None, None] + dense.S), tolerance)
        new, (u_mean, u_cov) = Dense(model, NEW), _states_given(dense, dense.dtc(), nat1, nat2)
        equal(model._predict(inputs, nat1, nat2, NEW[:, None]).mean[:, 0], new.B @ u_mean, tolerance)
        equal(model._joint(inputs, nat1, nat2, NEW[:, None]), new.B @ u_cov @ new.B.mT + new.left, tolerance)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("latents", ["1", "2"])
def test_with_all_times_inducing_it_is_markov_gp(rule, latents, generator):
    t = TIMES
    if latents == "1":
        likelihood, y = likelihoods.Poisson(), torch.poisson(torch.exp(torch.sin(t)), generator=generator)
    else:
        likelihood, y = likelihoods.HeteroscedasticGaussian(), torch.sin(t) + 0.3 * torch.randn(len(t), dtype=torch.float64, generator=generator)
    means = [gpytorch.means.ConstantMean().double() for _ in KERNELS[latents]()]
    for mean in means:
        mean.initialize(constant=0.3)
    sparse = models.SparseMarkovGP(KERNELS[latents](), t.unique(), mean=means)
    full = models.MarkovGP(KERNELS[latents](), mean=means)
    a, b = (bgn.bayes_newton(m, likelihood, (t, y), rule, steps=3, lr=0.7, progress=False) for m in (sparse, full))
    equal(torch.tensor(a.trace.energy), torch.tensor(b.trace.energy))
    equal(a.sites.nat1, b.sites.nat1)
    equal(a.marginals().cov, b.marginals().cov)
    equal(a(NEW).covariance_matrix, b(NEW).covariance_matrix)
    equal(a(NEW).mean, b(NEW).mean)


# -- closed forms under Gaussian noise ---------------------------------------------------------------------------------------


NOISE = 0.2


def regression(n: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    t = 10 * torch.rand(n, dtype=torch.float64, generator=g)
    return t, torch.sin(t) + math.sqrt(NOISE) * torch.randn(n, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("rule", [*RULES, rules.PowerEP(0.1)], ids=repr)
def test_the_evidence_of_gaussian_noise_is_that_of_sparse_power_ep(rule):
    # Bui, Yan and Turner (2017), eq. 19; Titsias' bound for α → 0 and FITC for α = 1.
    t, y = regression()
    model = models.SparseMarkovGP(matern(1.5), torch.linspace(0, 10, 6))
    posterior = bgn.bayes_newton(model, likelihoods.Gaussian(NOISE), (t, y), rule, progress=False)
    dense, α = Dense(model, t), rule.power
    S, eye = dense.S[:, 0, 0], torch.eye(len(t), dtype=torch.float64)
    cov = dense.dtc() + torch.diag(α * S) + NOISE * eye
    wanted = torch.distributions.MultivariateNormal(torch.zeros(len(t), dtype=torch.float64), cov).log_prob(y)
    wanted = wanted - (0.5 * S / NOISE if α == 0 else 0.5 * (1 - α) / α * torch.log1p(α * S / NOISE)).sum()
    equal(posterior.log_evidence(), wanted, 1e-8)
    A = torch.linalg.solve(cov, dense.K_fu)
    equal(posterior(NEW).mean, Dense(model, NEW).B @ (A.mT @ y), 1e-8)


@pytest.mark.parametrize("α", [1.0, 0.5, 0.05])
def test_averaged_sites_by_quadrature(α, generator):
    # s(φ) = E[t(f)^α | φ]^(1/α), f | φ ~ N(φ, S), and q(f) ∝ ∫ q(φ) N(f; φ, S) t(f)^α / s(φ)^α dφ
    nat1, nat2, S = 0.7, 1.3, 0.4
    site = [torch.tensor(v, dtype=torch.float64).reshape(shape) for v, shape in ((nat1, (1, 1)), (nat2, (1, 1, 1)), (S, (1, 1, 1)))]
    s = averaged(*site, α)
    grid = torch.linspace(-9, 9, 601, dtype=torch.float64)
    step = grid[1] - grid[0]
    log_t = nat1 * grid - 0.5 * nat2 * grid**2

    def normal(mean: float, variance: float):
        return torch.distributions.Normal(*torch.tensor([mean, math.sqrt(variance)], dtype=torch.float64))

    for φ in (-0.8, 0.3):
        wanted = torch.log((normal(φ, S).log_prob(grid) + α * log_t).exp().sum() * step) / α
        equal(s.log_scale[0] + s.nat1[0, 0] * φ - 0.5 * s.nat2[0, 0, 0] * φ**2, wanted)
    m, v = 0.5, 0.6
    q = opened(Marginals(*(torch.tensor(w, dtype=torch.float64).reshape(shape) for w, shape in ((m, (1, 1)), (v, (1, 1, 1))))), s, site[2], α)
    log_s = s.log_scale + s.nat1[0] * grid - 0.5 * s.nat2[0, 0] * grid**2
    φ_weight = (normal(m, v).log_prob(grid) - α * log_s).exp() * step
    density = (normal(0.0, S).log_prob(grid - grid[:, None]).exp() * φ_weight[:, None]).sum(0) * (α * log_t).exp()
    equal((density * step).sum(), torch.ones((), dtype=torch.float64))
    equal(q.mean[0, 0], (density * grid * step).sum())
    equal(q.cov[0, 0, 0], (density * (grid - q.mean[0, 0]) ** 2 * step).sum())


def test_averaging_sites_of_several_latents_is_that_of_each_where_nothing_couples(generator):
    nat1, nat2 = some_sites(7, 3, coupled=False)
    S = torch.diag_embed(torch.rand(7, 3, dtype=torch.float64, generator=generator))
    mean, cov = torch.rand(2, 7, 3, dtype=torch.float64, generator=generator)
    q = Marginals(mean, torch.diag_embed(cov))
    for α in (0.0, 0.3, 1.0):
        s = averaged(nat1, nat2, S, α)
        each = [averaged(nat1[:, [a]], nat2[:, [a]][:, :, [a]], S[:, [a]][:, :, [a]], α) for a in range(3)]
        equal(s.nat1, torch.cat([e.nat1 for e in each], -1))
        equal(s.nat2.diagonal(dim1=-2, dim2=-1), torch.cat([e.nat2[..., 0] for e in each], -1))
        equal(s.log_scale, sum(e.log_scale for e in each))
        out = opened(q, s, S, α)
        parts = [opened(Marginals(q.mean[:, [a]], q.cov[:, [a]][:, :, [a]]), e, S[:, [a]][:, :, [a]], α) for a, e in enumerate(each)]
        equal(out.mean, torch.cat([p.mean for p in parts], -1))
        equal(out.cov.diagonal(dim1=-2, dim2=-1), torch.cat([p.cov[..., 0] for p in parts], -1))


# -- other likelihoods --------------------------------------------------------------------------------------------------------


def test_variational_bound_from_its_definition(generator):
    """ELBO = Σ E_q(f_n)[log p(y_n|f_n)] − KL(q(u) || p(u)), with q(u) dense."""
    t, _ = regression()
    y = torch.poisson(torch.exp(torch.sin(t)), generator=generator)
    model = models.SparseMarkovGP(matern(2.5), INDUCING)
    posterior = bgn.bayes_newton(model, likelihoods.Poisson(), (t, y), rules.Variational(), progress=False)
    dense, sites = Dense(model, t), posterior.sites
    mean, cov = _states_given(dense, dense.dtc(), sites.nat1, sites.nat2)
    f = dense.B @ mean, (dense.B @ cov @ dense.B.mT).diagonal() + dense.S[:, 0, 0]
    expected = (y * f[0] - torch.exp(f[0] + 0.5 * f[1]) - torch.lgamma(y + 1)).sum()
    normal = torch.distributions.MultivariateNormal
    kl = torch.distributions.kl_divergence(normal(mean, cov), normal(torch.zeros_like(mean), dense.K_uu))
    equal(posterior.log_evidence(), expected - kl, 1e-8)
    # and it is stationary: the sites are the natural gradient's fixed point
    mean, cov = mean.detach().requires_grad_(), cov.detach()
    L = torch.linalg.cholesky(cov).requires_grad_()
    f = dense.B @ mean, ((dense.B @ L) ** 2).sum(-1) + dense.S[:, 0, 0]
    expected = (y * f[0] - torch.exp(f[0] + 0.5 * f[1])).sum()
    elbo = expected - torch.distributions.kl_divergence(normal(mean, scale_tril=L), normal(torch.zeros_like(mean), dense.K_uu))
    for g in torch.autograd.grad(elbo, [mean, L]):
        equal(g.tril() if g.dim() == 2 else g, torch.zeros_like(g), 1e-4)


def test_ep_is_that_of_the_fitc_model(generator):
    """The sites EP ends with are a fixed point of EP with the dense FITC prior, at the same evidence."""
    t, _ = regression()
    y = (torch.sin(t) + 0.2 * torch.randn(len(t), dtype=torch.float64, generator=generator) > 0).double()
    rule = rules.PowerEP(1.0, curvature=rules.Exact())
    model = models.SparseMarkovGP(matern(1.5, scale=4.0), INDUCING)
    posterior = bgn.bayes_newton(model, likelihoods.Bernoulli(), (t, y), rule, tol=1e-10, progress=False)
    sites, likelihood, n = posterior.sites, posterior.likelihood, len(t)
    log_Z, mean, Σ = gaussian_sites(Dense(model, t).fitc(), sites.nat1, sites.nat2)
    q = Marginals(mean[:, None], Σ.diagonal().reshape(n, 1, 1))
    equal(posterior.log_evidence(), log_Z + rule.term(likelihood, q, posterior.y, sites).sum(), 1e-8)
    again = rule(likelihood, q, posterior.y, sites)
    assert again.skipped == 0
    equal(again.sites.nat1, sites.nat1, 1e-7)
    equal(again.sites.nat2, sites.nat2, 1e-7)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.booleans(), nu=st.sampled_from([0.5, 1.5, 2.5]))
def test_law_the_variational_bound_grows_with_every_inducing_time(seed, counts, nu):
    g = torch.Generator().manual_seed(seed)
    t, y = regression(20, seed)
    likelihood = likelihoods.Poisson() if counts else likelihoods.Gaussian(NOISE)
    y = torch.poisson(torch.exp(y), generator=g) if counts else y
    z = 12 * torch.rand(12, dtype=torch.float64, generator=g) - 1
    energies = [
        bgn.bayes_newton(m, likelihood, (t, y), rules.Variational(rules.Exact()), tol=1e-9, progress=False).trace.energy[-1]
        for m in [*(models.SparseMarkovGP(matern(nu), z[:M]) for M in (2, 3, 5, 12)), models.MarkovGP(matern(nu))]
    ]
    assert all(b >= a - 1e-6 for a, b in zip(energies, energies[1:])), energies


# -- gradients, batches, draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("names", [("Matern", "Matern"), ("Matern + Constant", "Matern * Cosine"), ("Matern * Linear", "RBF")], ids=str)
def test_hyper_gradients(names, power):
    kernels = [OTHERS[name]().double() if name in OTHERS else matern(nu, 1.3, 0.7) for name, nu in zip(names, (2.5, 0.5))]
    model = models.SparseMarkovGP(kernels, INDUCING)
    model.power = power
    nat1, nat2 = some_sites(len(TIMES), 2, coupled=True)
    log_Z, q = model._solve(model.place(TIMES[:, None]), nat1, nat2)
    parameters = list(model.parameters())
    w = torch.linspace(-1, 1, len(TIMES), dtype=torch.float64)[:, None]
    got = torch.autograd.grad(log_Z + (w * q.mean).sum() + (w[:, :, None] * q.cov).sum(), parameters)
    dense, n = Dense(model, TIMES), len(TIMES)
    log_Z, mean, Σ = gaussian_sites(dense.fitc() if power else dense.dtc(), nat1, nat2)
    cov = Σ.reshape(n, 2, n, 2)[torch.arange(n), :, torch.arange(n)]
    if not power:
        log_Z, cov = log_Z - 0.5 * (nat2 * dense.S).sum(), cov + dense.S
    wanted = torch.autograd.grad(log_Z + (w * mean.reshape(n, 2)).sum() + (w[:, :, None] * cov).sum(), parameters)
    for a, b in zip(got, wanted):
        equal(a, b, 1e-8 if names[0] == "Matern" else 1e-5)


def test_gradients_of_a_prediction_in_the_new_times():
    model = models.SparseMarkovGP(matern(2.5), INDUCING)
    nat1, nat2 = some_sites(len(TIMES), 1, coupled=True)
    inputs = model.place(TIMES[:, None])

    def variance(x: Tensor) -> Tensor:
        q = model._predict(inputs, nat1, nat2, x[:, None])
        return torch.cat([q.mean[:, 0], q.cov[:, 0, 0]])

    x = torch.tensor([-1.0, 0.4, 2.7, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(variance, (x,), atol=1e-6)


@pytest.mark.parametrize("rule", [rules.Variational(), rules.PowerEP(0.5)], ids=repr)
def test_mini_batches_end_at_the_same_sites(rule, generator):
    t, _ = regression(40)
    y = torch.poisson(torch.exp(torch.sin(t)), generator=generator)
    model = models.SparseMarkovGP(matern(1.5), INDUCING)
    whole = bgn.bayes_newton(model, likelihoods.Poisson(), (t, y), rule, tol=1e-9, progress=False)
    parts = bgn.bayes_newton(model, likelihoods.Poisson(), (t, y), rule, batch_size=10, lr=1.0, steps=150, generator=generator, progress=False)
    equal(parts.log_evidence(), whole.log_evidence(), 1e-8)
    equal(parts(NEW).mean, whole(NEW).mean, 1e-6)


@pytest.mark.parametrize("latents, coupled", [("1", True), ("2", True), ("2", False)])
def test_draws_have_the_joint_moments(latents, coupled, generator):
    model = models.SparseMarkovGP(KERNELS[latents](), INDUCING)
    nat1, nat2 = some_sites(len(TIMES), model.latents, coupled)
    inputs, S = model.place(TIMES[:, None]), 20_000
    x = NEW[torch.randperm(len(NEW), generator=generator)][:, None]
    with torch.no_grad():
        draws = model._draw(inputs, nat1, nat2, x, S, generator).reshape(S, -1)
        mean, Σ = model._predict(inputs, nat1, nat2, x).mean.reshape(-1), model._joint(inputs, nat1, nat2, x)
    s = Σ.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() / s).max() < 5 / math.sqrt(S)
    assert ((torch.cov(draws.mT) - Σ).abs() / (s[:, None] * s)).max() < 7 / math.sqrt(S)


def test_pieces_of_any_length_give_the_same(generator):
    """Points in few intervals or many, in order or not: each meets its own two states."""
    model = models.SparseMarkovGP(matern(1.5), INDUCING)
    t = torch.cat([torch.rand(700, dtype=torch.float64, generator=generator), 6 * torch.rand(50, dtype=torch.float64, generator=generator) - 0.5])
    nat1, nat2 = some_sites(len(t), 1, coupled=True)
    log_Z, q = model._solve(model.place(t[:, None]), nat1, nat2)
    wanted, mean, Σ = gaussian_sites(Dense(model, t).dtc(), nat1, nat2)
    equal(log_Z, wanted - 0.5 * (nat2 * Dense(model, t).S).sum(), 1e-8)
    equal(q.mean[:, 0], mean, 1e-8)


def test_hyper_parameters_that_change_are_seen():
    """What is kept for the data is kept for one state of the hyper-parameters."""
    t, y = regression()
    posterior = bgn.bayes_newton(models.SparseMarkovGP(matern(1.5), INDUCING), likelihoods.Gaussian(NOISE), (t, y), progress=False)
    posterior.marginals()
    with torch.no_grad():
        posterior.model.kernels[0].base_kernel.raw_lengthscale.add_(0.7)
        fresh = posterior.model.solve(posterior.model.place(t[:, None]), posterior.sites)
        equal(posterior.marginals().mean, fresh.marginals.mean)
        equal(posterior.log_evidence(), fresh.log_Z + posterior.rule.term(posterior.likelihood, fresh.marginals, posterior.y, posterior.sites).sum())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        models.SparseMarkovGP(matern(), torch.zeros(1))
    with pytest.raises(ValueError, match=r"1 inducing time\(s\) come twice, the first 2"):
        models.SparseMarkovGP(matern(), torch.tensor([1.0, 2.0, 2.0]))
    with pytest.raises(TypeError, match="expected a tensor"):
        models.SparseMarkovGP(matern(), 20)
    with pytest.raises(ValueError, match="NaN|finite"):
        models.SparseMarkovGP(matern(), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="works over time"):
        models.SparseMarkovGP(matern(), INDUCING).place(torch.zeros(3, 2))
    assert repr(models.SparseMarkovGP(matern(), INDUCING)) == "SparseMarkovGP(Scale(Matern), 5 inducing times)"


def test_sites_object_is_the_same_as_everywhere():
    """A mean function and given sites go through the base class."""
    mean = gpytorch.means.ConstantMean().double()
    mean.initialize(constant=2.0)
    t, y = regression()
    model = models.SparseMarkovGP(matern(), t.unique(), mean=mean)
    sites = Sites(y[:, None] / NOISE, torch.full((len(t), 1, 1), 1 / NOISE, dtype=torch.float64))
    posterior = model.start(likelihoods.Gaussian(NOISE), (t, y), sites=sites)
    K = models.GP(matern(), mean=mean).start(likelihoods.Gaussian(NOISE), (t, y), sites=sites)
    equal(posterior.log_evidence(), K.log_evidence())


def test_before_any_data_it_is_the_kernel():
    """p(f) = ∫ p(f | u) p(u) du has the kernel's own covariance, whatever the inducing times."""
    model = models.SparseMarkovGP(KERNELS["2"](), INDUCING)
    joint = model.prior(NEW).covariance_matrix
    K = torch.stack([kernel(NEW, NEW).to_dense() for kernel in model.kernels], -1)
    equal(joint, torch.diag_embed(K).transpose(1, 2).reshape(joint.shape))
    assert model.sample_prior(NEW, 3).shape == (3, len(NEW), 2)


def test_on_the_scan_it_is_the_same(monkeypatch, generator):
    """Where there is no compiled filter (a GPU, no compiler)."""
    model = models.SparseMarkovGP(KERNELS["2"](), INDUCING)
    nat1, nat2 = some_sites(len(TIMES), 2, coupled=True)
    inputs, x = model.place(TIMES[:, None]), NEW[:, None]
    with torch.no_grad():
        compiled = model._solve(inputs, nat1, nat2), model._joint(inputs, nat1, nat2, x)
        monkeypatch.setattr("bayesgn._kalman.chain.served", lambda chain: False)
        scanned = model._solve(inputs, nat1, nat2), model._joint(inputs, nat1, nat2, x)
        assert model._draw(inputs, nat1, nat2, x, 3, generator).shape == (3, len(x), 2)
    equal(scanned[0].log_Z, compiled[0].log_Z)
    equal(scanned[0].marginals.mean, compiled[0].marginals.mean)
    equal(scanned[1], compiled[1])
