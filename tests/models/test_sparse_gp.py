"""SparseGP: the exact model where all inputs are inducing, dense algebra elsewhere, bounds in closed form, batches, inducing points that move."""

from __future__ import annotations

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models import gp, rows, sparse_gp
from bayesgn.rules import Sites

from .test_gp import made, matern, random_sites

D = torch.float64

RULES = [
    rules.Laplace(), rules.Variational(), rules.Variational(rules.Exact()), rules.PowerEP(0.5), rules.PowerEP(1.0, rules.Exact()),
    rules.PosteriorLinearization(), rules.PosteriorLinearization2(), rules.Taylor(), rules.Variational(rules.QuasiNewton()),
    rules.Variational(rules.Riemann()),
]  # fmt: skip


def problem(likelihood, generator, n=18):
    """Inputs and targets, one of them missing."""
    x = 3 * torch.rand(n, 2, dtype=D, generator=generator)
    f = x[:, 0].sin() + 0.5 * x[:, 1]
    if isinstance(likelihood, likelihoods.Poisson):
        y = torch.poisson(f.exp(), generator=generator)
    else:
        y = f + torch.randn(n, dtype=D, generator=generator)
    y[3] = torch.nan
    return x, y


def two():
    return [matern(), matern(0.5, 1.9)]


def constant(value):
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(value)
    return mean


# -- all inputs inducing: the exact model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make, c", [(likelihoods.Poisson, 1), (likelihoods.HeteroscedasticGaussian, 2)], ids=["Poisson", "heteroscedastic"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_with_all_inputs_inducing_it_is_the_gp(rule, make, c, generator):
    x, y = problem(make(), generator)
    new = 3 * torch.rand(5, 2, dtype=D, generator=generator)
    found = []
    for kind in ("GP", "SparseGP"):
        ks, means = two()[:c], [constant(0.3 + a) for a in range(c)]
        model = models.GP(ks, mean=means) if kind == "GP" else models.SparseGP(ks, x[torch.randperm(len(x), generator=generator)], mean=means)
        p = model.start(make(), (x, y), rule)
        for _ in range(5):
            p, _ = p.turn(0.6)
        evidence, f = p.log_evidence(), p(new)
        parameters = [*p.model.kernels.parameters(), *p.model.means.parameters(), *p.likelihood.parameters()]
        slopes = torch.autograd.grad(evidence, parameters)
        found.append([evidence, *slopes, f.mean, f.covariance_matrix, *p.marginals(), p.sites.nat1, p.sites.nat2])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- any inducing points: dense algebra --------------------------------------------------------------------------------------


def by_hand(model, x, h, Λ, power, new):
    """log Z, marginals at x and the joint at new inputs, by inverses in u itself, one site at a time."""
    z, c = model.inducing_points.detach(), model.latents
    K = {name: torch.block_diag(*[gp.covariance(k, a, b) for k in model.kernels]).detach()  # latents first
         for name, a, b in (("zz", z, z), ("xz", x, z), ("nz", new, z), ("nn", new, new))}  # fmt: skip
    n, m = len(x), len(new)
    inverse = torch.linalg.inv(K["zz"])
    precision, shift, log_Z = inverse.clone(), torch.zeros(len(inverse), dtype=D), torch.zeros((), dtype=D)
    parts = []
    for i in range(n):
        A = K["xz"][[a * n + i for a in range(c)]] @ inverse
        S = torch.diag_embed(torch.stack([gp.variance(k, x[i : i + 1])[0] for k in model.kernels])).detach() - A @ K["zz"] @ A.mT
        if power:
            # E[t^α]^(1/α) of f ~ N(φ, S): precision (Λ⁻¹ + α S)⁻¹, here for Λ of full rank
            site = torch.linalg.inv(torch.linalg.inv(Λ[i]) + power * S)
            along = site @ torch.linalg.solve(Λ[i], h[i])
            g = torch.linalg.solve(Λ[i], h[i])
            log_Z += 0.5 * (h[i] @ g - along @ g) - torch.linalg.slogdet(torch.eye(c, dtype=D) + power * Λ[i] @ S).logabsdet / (2 * power)
        else:
            site, along = Λ[i], h[i]
            log_Z -= 0.5 * torch.trace(Λ[i] @ S)
        precision, shift = precision + A.mT @ site @ A, shift + A.mT @ along
        parts.append((A, S))
    cov = torch.linalg.inv(precision)
    mean = cov @ shift
    log_Z += 0.5 * shift @ mean - 0.5 * (torch.linalg.slogdet(precision).logabsdet + torch.linalg.slogdet(K["zz"]).logabsdet)
    means, covs = [], []
    for i, (A, S) in enumerate(parts):
        if power:  # the cavity of u, spread by S, times t^α
            site = torch.linalg.inv(torch.linalg.inv(Λ[i]) + power * S)
            along = site @ torch.linalg.solve(Λ[i], h[i])
            P = torch.linalg.inv(precision - power * A.mT @ site @ A)
            cavity = A @ P @ A.mT + S
            m_ = A @ P @ (shift - power * A.mT @ along)
            V = torch.linalg.inv(torch.linalg.inv(cavity) + power * Λ[i])
            means.append(V @ (torch.linalg.solve(cavity, m_) + power * h[i]))
            covs.append(V)
        else:
            means.append(A @ mean)
            covs.append(A @ cov @ A.mT + S)
    A = K["nz"] @ inverse
    joint = K["nn"] - A @ K["zz"] @ A.mT + A @ cov @ A.mT
    order = [a * m + i for i in range(m) for a in range(c)]
    return log_Z, torch.stack(means), torch.stack(covs), (A @ mean)[order].reshape(m, c), joint[order][:, order]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("c, coupled", [(1, True), (2, True), (2, False)])
def test_dense_algebra(c, coupled, power, generator):
    x, z, new = (3 * torch.rand(n, 2, dtype=D, generator=generator) for n in (9, 4, 3))
    h, Λ = random_sites(9, c, generator, "full")
    Λ = Λ + 0.1 * torch.eye(c, dtype=D)
    if not coupled:
        Λ = torch.diag_embed(Λ.diagonal(dim1=-2, dim2=-1))
    model = models.SparseGP(two()[:c], z)
    model.power = power
    inputs, sites = model.place(x), Sites(h, Λ)
    log_Z, mean, cov, at_new, joint = by_hand(model, x, h, Λ, power, new)
    found = model.solve(inputs, sites)
    assert_close(found.log_Z, log_Z, rtol=1e-10, atol=1e-10)
    assert_close(found.marginals.mean, mean, rtol=1e-8, atol=1e-9)
    assert_close(found.marginals.cov, cov, rtol=1e-8, atol=1e-9)
    q = model.predict(inputs, sites, new)
    assert_close(q.mean, at_new, rtol=1e-8, atol=1e-9)
    assert_close(model.joint(inputs, sites, new), joint, rtol=1e-8, atol=1e-9)
    blocks = torch.stack([joint[i * c : i * c + c, i * c : i * c + c] for i in range(3)])
    assert_close(q.cov, blocks, rtol=1e-8, atol=1e-9)
    draws = model.draw(inputs, sites, new, 20_000, generator).flatten(1)
    assert_close(draws.mean(0), at_new.flatten(), rtol=0, atol=0.05)
    assert_close(torch.cov(draws.mT), joint, rtol=0, atol=0.06)


# -- energies in closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("α", [0.0, 0.3, 1.0])
def test_the_evidence_of_gaussian_noise_is_that_of_sparse_power_ep(α, generator):
    """Titsias' bound for variational inference, FITC's evidence for EP, between them Bui, Yan and Turner (2017), eq. 16."""
    x, z = (3 * torch.rand(n, 2, dtype=D, generator=generator) for n in (30, 6))
    y, kernel, noise = x.sin().sum(-1) + 0.3 * torch.randn(30, dtype=D, generator=generator), matern(), 0.09
    rule = rules.PowerEP(α) if α else rules.Variational()
    p = bgn.bayes_newton(models.SparseGP(kernel, z), likelihoods.Gaussian(torch.tensor(noise, dtype=D)), (x, y), rule=rule, tol=1e-12, progress=False)
    Kzz, Kzx, k = gp.covariance(kernel, z, z), gp.covariance(kernel, z, x), gp.variance(kernel, x)
    Q = Kzx.mT @ torch.linalg.solve(Kzz, Kzx)
    left = k - Q.diagonal()
    log_p = torch.distributions.MultivariateNormal(torch.zeros(30, dtype=D), Q + torch.diag(α * left + noise)).log_prob(y)
    extra = -0.5 * left.sum() / noise if α == 0 else -(1 - α) / (2 * α) * torch.log1p(α * left / noise).sum()
    assert_close(p.log_evidence(), log_p + extra, rtol=1e-11, atol=1e-10)
    # The slopes in all hyper-parameters, too: at the optimum sites these do not matter.
    ours = torch.autograd.grad(p.log_evidence(), list(p.model.kernels.parameters()))
    theirs = torch.autograd.grad(log_p + extra, list(kernel.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_the_variational_bound_from_its_definition(generator):
    """E_q[log p] by quadrature less KL(q(u) ‖ p(u)), for a posterior that is not settled."""
    x, y = problem(likelihoods.Poisson(), generator)
    y[3] = 2.0
    z, kernel = x[:5] + 0.05, matern()
    p = models.SparseGP(kernel, z).start(likelihoods.Poisson(), (x, y), rules.Variational())
    for _ in range(3):
        p, _ = p.turn(0.7)
    with torch.no_grad():
        u, f = p(z), p(x)
        m, S = u.mean, u.covariance_matrix
        K = gp.covariance(kernel, z, z)
        kl = 0.5 * (torch.trace(torch.linalg.solve(K, S)) + m @ torch.linalg.solve(K, m) - len(z) + K.logdet() - S.logdet())
        nodes, w = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(80))
        values = f.mean[:, None] + f.stddev[:, None] * nodes
        expected = (w / w.sum() * torch.distributions.Poisson(values.exp()).log_prob(y[:, None])).sum()
        assert_close(p.log_evidence(), expected - kl, rtol=1e-10, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_law_the_bound_grows_with_every_inducing_point(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(15, 2, dtype=D, generator=generator)
    y = torch.bernoulli(torch.sigmoid(2 * x[:, 0].sin()), generator=generator)
    data, rule, before = (x, y), rules.Variational(rules.Exact()), -torch.inf
    for m in np.cumsum(counts):
        p = bgn.bayes_newton(models.SparseGP(matern(), x[:m]), likelihoods.Bernoulli(), data, rule=rule, tol=1e-9, progress=False)
        assert p.trace.energy[-1] >= before - 1e-8
        before = p.trace.energy[-1]
    full = bgn.bayes_newton(models.GP(matern()), likelihoods.Bernoulli(), data, rule=rule, tol=1e-9, progress=False)
    assert full.trace.energy[-1] >= before - 1e-8


# -- batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, c", [(likelihoods.Poisson, 1), (likelihoods.HeteroscedasticGaussian, 2)], ids=["Poisson", "heteroscedastic"])
@pytest.mark.parametrize("rule", [rules.Variational(), rules.PowerEP(0.5), rules.Variational(rules.QuasiNewton())], ids=repr)
def test_sums_follow_batches(rule, make, c, generator):
    """After any turns the kept sum, and all that is read from it, is that of the sites; a batch's marginals are those of all data."""
    x, y = problem(make(), generator, 40)
    p = models.SparseGP(two()[:c], x[:6], mean=[constant(0.4)] * c).start(make(), (x, y), rule)
    new = 3 * torch.rand(3, 2, dtype=D, generator=generator)
    for _ in range(4):
        for batch in torch.randperm(40, generator=generator).split(13):
            p, _ = p.turn(0.5, batch)
            fresh = p.with_sites(p.sites)
            for a, b in zip(p.marginals(batch), fresh.marginals(), strict=True):
                assert_close(a, b[batch], rtol=1e-10, atol=1e-10)
            other = torch.tensor([0, 7, 39])
            for a, b in zip(p.marginals(other), fresh.marginals(), strict=True):
                assert_close(a, b[other], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert_close(p(new).covariance_matrix, fresh(new).covariance_matrix, rtol=1e-9, atol=1e-10)
        assert_close(p(new).mean, fresh(new).mean, rtol=1e-9, atol=1e-10)
        assert_close(p.log_evidence(), fresh.log_evidence(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [rules.Variational(), rules.PowerEP(0.5)], ids=repr)
def test_batches_end_where_all_data_do(rule, generator):
    x, y = problem(likelihoods.Poisson(), generator, 60)
    model = models.SparseGP(matern(), x[:8])
    whole = bgn.bayes_newton(model, likelihoods.Poisson(), (x, y), rule=rule, tol=1e-9, progress=False)
    batches = bgn.bayes_newton(
        model, likelihoods.Poisson(), (x, y), rule=rule, tol=1e-9, batch_size=13, steps=500, progress=False, generator=generator
    )
    assert batches.trace.converged
    assert_close(batches.log_evidence(), whole.log_evidence(), rtol=1e-9, atol=1e-9)
    assert_close(batches.sites.nat1, whole.sites.nat1, rtol=1e-6, atol=1e-7)


def test_a_batch_costs_what_it_has(generator, monkeypatch):
    """Kernels are asked for the rows of the batch; all data come in once at the start and once an epoch."""
    x, y = problem(likelihoods.Poisson(), generator, 50)
    seen = []
    kept = sparse_gp.SparseGP.whitened
    monkeypatch.setattr(sparse_gp.SparseGP, "whitened", lambda self, L, x: seen.append(len(x)) or kept(self, L, x))
    p = bgn.bayes_newton(
        models.SparseGP(matern(), x[:8]), likelihoods.Poisson(), (x, y), rule=rules.Variational(), batch_size=10, steps=12, progress=False,
        generator=generator,
    )  # fmt: skip
    assert seen == [50, *[10] * 5, 50, *[10] * 5, 50, *[10] * 2, 50]
    assert len(p.trace.energy) == 4 and p.trace.steps == 12
    assert all(b > a for a, b in zip(p.trace.energy, p.trace.energy[1:]))


# -- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, c", [(likelihoods.Poisson, 1), (likelihoods.HeteroscedasticGaussian, 2)], ids=["Poisson", "heteroscedastic"])
def test_many_data_a_few_at_a_time(make, c, generator, monkeypatch):
    x, y = problem(make(), generator)
    model = models.SparseGP(two()[:c], x[:5], learn_inducing=True)
    p = bgn.bayes_newton(model, make(), (x, y), rule=rules.PowerEP(0.5), steps=5, progress=False)
    new = 3 * torch.rand(20, 2, dtype=D, generator=generator)

    def everything():
        q = p.with_sites(p.sites)
        evidence, f = q.log_evidence(), q(new)
        parameters = [*q.model.parameters(), *q.likelihood.parameters()]
        slopes = torch.autograd.grad(evidence + f.mean.sum() + f.variance.sum(), parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            return [evidence, f.mean, f.variance, *slopes, *q.marginals(), q.log_evidence()]

    whole = everything()
    monkeypatch.setattr(rows, "NUMBERS", 5 * c * 4)
    monkeypatch.setattr(sparse_gp, "KEPT", 0)
    for a, b in zip(everything(), whole, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-10)


# -- inducing points -----------------------------------------------------------------------------------------------------------


def test_slopes_in_inducing_points(generator):
    x, y = problem(likelihoods.Poisson(), generator)
    p = models.SparseGP(matern(), x[:5] + 0.1, learn_inducing=True).start(likelihoods.Poisson(), (x, y), rules.PowerEP(0.5))
    for _ in range(3):
        p, _ = p.turn()
    z = p.model.inducing_points
    (slope,) = torch.autograd.grad(p.log_evidence(), z)
    along = torch.randn(5, 2, dtype=D, generator=generator)
    with torch.no_grad():
        start, values = z.clone(), []
        for step in (2e-4, -2e-4):
            z.copy_(start + step * along)
            values.append(p.log_evidence())
    assert_close((slope * along).sum(), (values[0] - values[1]) / 4e-4, rtol=1e-6, atol=1e-7)


def test_inducing_points_are_learned_where_asked_for(generator):
    x = torch.cat([3 * torch.rand(40, 1, dtype=D, generator=generator), 20 + 3 * torch.rand(40, 1, dtype=D, generator=generator)])
    y = (3 * x[:, 0]).sin() + 0.1 * torch.randn(80, dtype=D, generator=generator)
    z = torch.linspace(0, 3, 12, dtype=D)[:, None]  # none near the second half of the data
    gains = []
    for learn in (False, True):
        model = models.SparseGP(matern(1.0, 0.5).requires_grad_(False), z, learn_inducing=learn)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["inducing_points"] * learn
        p = bgn.bayes_newton(model, likelihoods.Gaussian(0.01).requires_grad_(False), (x, y), rule=rules.Variational(), progress=False)
        before = p.trace.energy[-1]
        if learn:
            p.model.inducing_points.data[6:] += 20 - 1.5  # within reach: far away the slope is nought
            bgn.maximize_evidence(p, steps=30, progress=False)
            assert (p.model.inducing_points.detach()[6:] > 18).all()
        gains.append(p.log_evidence().item() - before)
        assert torch.equal(model.inducing_points, z)  # the user's own stay
    assert gains[0] == 0 and gains[1] > 100


@pytest.mark.parametrize("kernel", [matern(), made(kernels.LinearKernel()) + made(kernels.RBFKernel())], ids=["Matern", "Linear + RBF"])
def test_inducing_points_are_chosen_greedily(kernel, generator):
    """Each is where the conditional variance given those before, by dense algebra, is largest."""
    x = torch.randn(40, 2, dtype=D, generator=generator)
    chosen = models.inducing_points(kernel, x, 8)
    for j in range(8):
        past = chosen[:j]
        K = gp.covariance(kernel, past, x)
        left = gp.variance(kernel, x) - (K * torch.linalg.solve(gp.covariance(kernel, past, past), K)).sum(0)
        assert_close(x[left.argmax()], chosen[j])


def test_inducing_points_that_say_nothing_new_are_not_chosen():
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0])
    assert models.inducing_points(matern(), x, 5).flatten().sort().values.tolist() == [0.0, 1.0, 2.0]
    assert len(models.inducing_points(made(kernels.LinearKernel()), torch.arange(1.0, 9.0, dtype=D), 5)) == 1
    assert models.inducing_points(matern(), x, 2).dtype == torch.float32
    for m in (0, 2.0, True):
        with pytest.raises(ValueError, match="at least 1"):
            models.inducing_points(matern(), x, m)


def test_what_cannot_be_is_refused(generator):
    x, y = problem(likelihoods.Poisson(), generator)
    with pytest.raises(TypeError, match=r"inducing_points is .*expected a tensor \[M d\]"):
        models.SparseGP(matern(), 20)
    with pytest.raises(ValueError, match="0 inducing points"):
        models.SparseGP(matern(), x[:0])
    with pytest.raises(ValueError, match="1 of 4 inducing points come twice"):
        models.SparseGP(matern(), x[[0, 1, 2, 1]])
    with pytest.raises(ValueError, match="1 non-finite"):
        models.SparseGP(matern(), torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match=r"\(18, 2\) but the inducing points \(3, 1\)"):
        models.SparseGP(matern(), x[:3, :1]).start(likelihoods.Poisson(), (x, y))


def test_it_says_what_it_is():
    assert repr(models.SparseGP(matern(), torch.arange(4.0))) == "SparseGP(Scale(Matern), 4 inducing points)"
