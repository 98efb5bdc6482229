"""Predictives ∫ p(y | f) N(f; m, V) df against brute force: scipy quadrature for one latent, large Monte Carlo for several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats as ss
import torch
import torch.distributions as td

from bayesgn import likelihoods as L
from bayesgn.likelihoods import links
from bayesgn.likelihoods import predictives as P
from bayesgn.likelihoods.cubature import GaussHermite
from bayesgn.likelihoods.student_t import gaussian_scales

from .families import BY_NAME, FAMILIES, D, tensor

close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def gaussian(*batch, c, width=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, c, c, dtype=D, generator=g) * width / c**0.5
    return torch.randn(*batch, c, dtype=D, generator=g), A @ A.mT


def as_mvn(mean, cov):
    return td.MultivariateNormal(mean, cov + 1e-12 * torch.eye(mean.shape[-1], dtype=D))


ONE_LATENT = [f for f in FAMILIES if f.c == 1 and f.oracle is not None]


@pytest.mark.parametrize("family", ONE_LATENT, ids=lambda f: f.name)
@pytest.mark.parametrize("width", [0.1, 0.8])
def test_one_latent_by_scipy_quadrature(family, width):
    lik = family.build()
    mean, y = family.data(3)
    cov = torch.full((3, 1, 1), width**2, dtype=D)
    p = lik(as_mvn(mean, cov))
    log_p = p.log_prob(y)
    assert p.batch_shape == (3,) and log_p.shape == (3,)
    moments = not isinstance(p, td.Categorical)                             # torch's Categorical has no mean
    for n in range(3):
        m = mean[n].item()
        grid = np.linspace(m - 9 * width, m + 9 * width, 801)               # Simpson's rule, against our trapezoid
        weight = ss.norm.pdf(grid, m, width)
        integrate = lambda values, x=grid, w=weight: scipy.integrate.simpson(values * w, x=x)
        value = np.asarray(y[n].numpy(), dtype=float).reshape(())
        if family.name == "ordinal":                                        # scipy's rv_discrete takes one f at a time
            density = np.array([family.oracle(np.array([f])).pmf(value) for f in grid])
        else:
            o = family.oracle(grid[None])
            density = (o.pdf if hasattr(o.dist, "pdf") else o.pmf)(value)
        assert math.isclose(log_p[n].item(), math.log(integrate(density)), abs_tol=2e-7)
        if moments:
            first, second = integrate(o.mean()), integrate(o.var() + o.mean() ** 2)
            assert math.isclose(p.mean[n].item(), first, rel_tol=1e-6, abs_tol=1e-7)
            assert math.isclose(p.variance[n].item(), second - first**2, rel_tol=1e-6, abs_tol=1e-7)


def test_narrow_likelihood_under_a_wide_gaussian_is_no_comb():
    """A Student's t of scale 0.01 under N(0, 1): the predictive is nearly N(0, 1) everywhere, not spikes at nodes."""
    lik = L.StudentT(tensor(30.0), tensor(0.01))
    y = torch.linspace(-2, 2, 41, dtype=D)[:, None]
    p = lik(as_mvn(torch.zeros(41, 1, dtype=D), torch.ones(41, 1, 1, dtype=D)))
    torch.testing.assert_close(p.log_prob(y), torch.tensor(ss.norm.logpdf(y[:, 0].numpy())), atol=1e-3, rtol=0)


def test_too_narrow_a_likelihood_is_said_in_the_log(caplog):
    L.StudentT(tensor(5.0), tensor(1e-6))(as_mvn(torch.zeros(1, 1, dtype=D), torch.ones(1, 1, 1, dtype=D)))
    assert "as wide as the likelihood" in caplog.text


@pytest.mark.parametrize("name", ["gaussian-2", "gaussian-each", "gaussian-full"])
def test_gaussian_is_exact(name):
    lik = BY_NAME[name].build()
    mean, cov = gaussian(4, c=2)
    p = lik(as_mvn(mean, cov))
    R = lik.noise if lik.noise.ndim == 2 else torch.diag_embed(lik.noise.expand(2))
    close(p.mean, mean)
    close(p.covariance_matrix, cov + R)


def test_heteroscedastic_by_quadrature_over_both_latents():
    lik = L.HeteroscedasticGaussian()
    mean, cov = gaussian(1, c=2, width=0.8)
    y = tensor([0.3]).reshape(1, 1)
    u = torch.linspace(-8.5, 8.5, 1501, dtype=D)
    z = torch.stack(torch.meshgrid(u, u, indexing="ij"), -1).reshape(-1, 2)
    w = (-0.5 * z.square().sum(-1)).softmax(0)                              # the latents' correlation is −0.998 here: a hard case
    f = mean + z @ torch.linalg.cholesky(cov[0]).T
    p = lik(as_mvn(mean, cov))
    close(p.log_prob(y).exp()[0], (w * lik.log_prob(f, y.expand(len(f), 1)).exp()).sum(), 1e-7)
    close(p.mean[0], mean[0, :1], 1e-7)
    close(p.variance[0, 0], cov[0, 0, 0] + (w * f[:, 1].exp()).sum(), 1e-7)


def test_heteroscedastic_of_two_targets_by_monte_carlo():
    lik = L.HeteroscedasticGaussian()
    mean, cov = gaussian(1, c=4, width=0.6)
    f = td.MultivariateNormal(mean[0], cov[0]).sample(torch.Size([200_000]))
    p = lik(as_mvn(mean, cov))
    torch.testing.assert_close(p.variance[0], f[:, :2].var(0) + f[:, 2:].exp().mean(0), rtol=0.03, atol=0)
    y = tensor([0.2, -0.4]).reshape(1, 2)
    torch.testing.assert_close(p.log_prob(y)[0], lik.log_prob(f, y.expand(len(f), 2)).logsumexp(0) - math.log(len(f)), rtol=0, atol=0.02)


# Name, and by how much the log density may be off: these integrate some latents at nodes of their own (20 a latent, or 1024 of a Sobol sequence).
SEVERAL_LATENTS = [
    ("heteroscedastic-softplus", 1e-7), ("heteroscedastic-student", 1e-7), ("product", 1e-7), ("multivariate-student", 1e-7),
    ("multivariate-student-each", 1e-7), ("regression-network-1", 1e-4), ("linked-gaussian-full", 1e-5), ("multi-stage", 1e-5),
    ("heteroscedastic-softplus-2", 0.02), ("demodulation", 0.02), ("matrix-factorisation", 0.02), ("regression-network", 0.02),
    ("coregionalisation", 1e-9),
]


@pytest.mark.parametrize("name, tolerance", SEVERAL_LATENTS)
def test_several_latents(name, tolerance):
    """Density, mean and covariance against a fine grid, or 400,000 draws of many latents."""
    family = BY_NAME[name]
    lik = family.build()
    mean, cov = gaussian(2, c=family.c, width=0.5)
    y = lik.sample(mean, torch.Generator().manual_seed(2)).detach()
    p = lik(as_mvn(mean, cov))
    for n in range(2):
        if family.c <= 3:
            u = torch.linspace(-8, 8, {2: 601, 3: 81}[family.c], dtype=D)
            z = torch.cartesian_prod(*[u] * family.c)
            f, w = mean[n] + z @ torch.linalg.cholesky(cov[n]).T, (-0.5 * z.square().sum(-1)).softmax(0)
        else:
            f = td.MultivariateNormal(mean[n], cov[n] + 1e-12 * torch.eye(family.c, dtype=D)).sample(torch.Size([400_000]))
            w = f.new_full((len(f),), 1 / len(f))
        log_p = lik.log_prob(f, y[n].expand(len(f), *y[n].shape))
        exact = (log_p + w.log()).logsumexp(0)
        assert math.isclose(p.log_prob(y)[n].item(), exact.item(), abs_tol=max(tolerance, 1e-9))
        m, C = lik.conditional_moments(f)
        want = w @ m
        between = torch.einsum("q,qi,qj->ij", w, m - want, m - want)
        total = torch.einsum("q,qij->ij", w, C) + between
        torch.testing.assert_close(p.mean[n], want, atol=max(tolerance, 1e-9), rtol=tolerance)
        # a mixture over nodes of a t's gamma variable misses what lies beyond them, 1e-13 of the mass
        torch.testing.assert_close(p.variance[n], total.diagonal(), atol=1e-9, rtol=max(2 * tolerance, 1e-6))


def test_heteroscedastic_student_of_two_targets_each_by_itself():
    family = BY_NAME["heteroscedastic-student-2"]
    lik = family.build()
    mean, cov = gaussian(1, c=4, width=0.5)
    p = lik(as_mvn(mean, cov))
    y = tensor([0.2, -0.4]).reshape(1, 2)
    for k in range(2):
        pair = [k, 2 + k]
        f, w = GaussHermite(120)(mean[:, pair], cov[:, pair][..., pair])
        all_ = mean.expand(len(f), 4).clone()
        all_[:, pair] = f[:, 0]
        alone = torch.full((len(f), 2), torch.nan, dtype=D)
        alone[:, k] = y[0, k]
        close(p.base_dist.log_prob(y)[0, k], (lik.log_prob(all_, alone) + w.log()).logsumexp(0), 1e-6)
    close(p.log_prob(y), p.base_dist.log_prob(y).sum(-1))


def test_a_narrow_t_under_a_wide_gaussian_is_no_comb():
    """Scales far below the Gaussian's width: the predictive is nearly that Gaussian everywhere."""
    y = torch.linspace(-2, 2, 41, dtype=D)
    flat = torch.tensor(ss.norm.logpdf(y.numpy()))
    p = L.MultivariateStudentT(tensor(30.0), tensor(1e-4))(as_mvn(torch.zeros(41, 1, dtype=D), torch.ones(41, 1, 1, dtype=D)))
    torch.testing.assert_close(p.log_prob(y[:, None]), flat, atol=1e-3, rtol=0)
    p = L.HeteroscedasticStudentT(tensor(30.0))(as_mvn(tensor([0.0, -9.0]).expand(41, 2), torch.diag(tensor(1.0, 0.01)).expand(41, 2, 2)))
    torch.testing.assert_close(p.log_prob(y[:, None]), flat, atol=1e-3, rtol=0)


@pytest.mark.parametrize("nu", [0.3, 1.0, 2.5, 4.0, 30.0, 1e3, 1e6])
def test_a_student_t_is_a_mixture_of_normals(nu):
    gamma, log_w = gaussian_scales(tensor(nu))
    y = tensor(0.0, 0.3, 1.0, 4.0, 30.0, 90.0)
    log_p = (log_w + td.Normal(0.0, gamma.rsqrt()).log_prob(y[:, None])).logsumexp(-1)
    torch.testing.assert_close(log_p, torch.tensor(ss.t(nu).logpdf(y.numpy())), atol=2e-6, rtol=1e-9)
    torch.testing.assert_close(log_p[:4], torch.tensor(ss.t(nu).logpdf(y[:4].numpy())), atol=2e-9, rtol=1e-9)
    assert len(gamma) < 700


@pytest.mark.parametrize("s", [0.0, 1e-3, 0.5, 2.0, 3.99, 4.01, 10.0, 100.0])
def test_logistic_normal_to_rounding(s):
    for m in (-12.0, -1.0, 0.0, 3.0):
        got = links.logistic_normal(tensor([m]), tensor([s**2])).item()
        h = lambda z, m=m: 1 / (1 + math.exp(-min(max(m + s * z, -700), 700))) * ss.norm.pdf(z)
        points = sorted({min(max(-m / s, -37), 37), 0.0}) if s else None
        want = scipy.integrate.quad(h, -38, 38, points=points, epsabs=1e-15, epsrel=1e-13, limit=1000)[0]
        assert math.isclose(got, want, rel_tol=1e-11, abs_tol=1e-14)


def test_logistic_normal_has_finite_gradients():
    m, v = tensor([1.0, 1.0, -3.0]).requires_grad_(), tensor([0.0, 100.0, 1.0]).requires_grad_()
    assert all(g.isfinite().all() for g in torch.autograd.grad(links.logistic_normal(m, v).sum(), (m, v)))


def test_bernoulli_keeps_both_tails_and_labels():
    p = L.Bernoulli()(as_mvn(tensor([[-60.0, 2.0]]), torch.eye(2, dtype=D)[None]))
    assert p.batch_shape == (1,) and p.event_shape == (2,) and p.probs.shape == (1, 2)
    assert math.isclose(p.log_prob(torch.tensor([[1, 1]])).item(), -59.5 + math.log(p.probs[0, 1].item()), rel_tol=1e-9)
    with pytest.raises(ValueError, match=r"y has shape \[5\].*unsqueeze"):
        L.Bernoulli()(as_mvn(torch.zeros(5, 1, dtype=D), torch.ones(5, 1, 1, dtype=D))).log_prob(torch.ones(5))


def test_normcdf_is_closed_form():
    p = L.Bernoulli(L.NormCDF())(as_mvn(tensor([[0.7]]), tensor([[[2.0]]])))
    assert math.isclose(p.probs.item(), ss.norm.cdf(0.7 / 3**0.5), rel_tol=1e-10)


WAYS = [L.Probit(), L.MonteCarlo(4096), L.LaplaceBridge(), L.DirichletMatching()]


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_categorical_ways(way):
    lik = L.Categorical(predictive=way)
    mean, cov = gaussian(6, 5, c=4)
    p = lik(as_mvn(mean, cov))
    assert isinstance(p, td.Categorical) and p.batch_shape == (6, 5) and p.probs.shape == (6, 5, 4)
    # No variance: the softmax. Nothing that all logits share counts. Finite at ±1e3. A permutation of classes permutes the answer.
    if not isinstance(way, L.LaplaceBridge):
        torch.testing.assert_close(lik.predict(mean, 1e-10 * cov).probs, mean.softmax(-1), atol=1e-6, rtol=1e-6)
    else:                                                                   # exact for two classes alone
        torch.testing.assert_close(way(mean[..., :2], 1e-6 * torch.eye(2, dtype=D).expand(6, 5, 2, 2)).probs, mean[..., :2].softmax(-1),
                                   atol=1e-5, rtol=1e-5)
    if not isinstance(way, L.MonteCarlo):                                   # (its points differ along the shared direction)
        close(lik.predict(mean + 3, cov + 2.5).probs, p.probs, 1e-8)
        order = [2, 0, 3, 1]
        close(lik.predict(mean[..., order], cov[..., order, :][..., order]).probs, p.probs[..., order], 1e-9)
    assert lik.predict(1e3 * mean, cov).probs.isfinite().all() and lik.predict(mean, 1e6 * cov).probs.isfinite().all()
    close(lik.predict(mean, cov).probs, lik.predict(mean, cov).probs, 0)
    assert lik.predict(mean.float(), cov.float()).probs.dtype == torch.float32
    m = mean.clone().requires_grad_()
    assert torch.autograd.grad(lik.predict(m, cov).probs[..., 0].sum(), m)[0].isfinite().all()


def exact(mean, cov, samples=100_000):
    z = torch.randn(samples, *mean.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    return (mean + torch.einsum("nij,snj->sni", torch.linalg.cholesky(cov + 1e-12 * torch.eye(mean.shape[-1], dtype=D)), z)).softmax(-1)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1).mean().item()


@pytest.mark.parametrize("way, bound", list(zip(WAYS, [0.01, 1e-4, 0.4, 0.01])), ids=lambda v: repr(v))
def test_categorical_ways_against_monte_carlo(way, bound):
    """Mean KL to 100,000 samples; measured 0.003, 1e-5, 0.2, 0.003."""
    mean, cov = gaussian(10, c=4)
    assert kl(exact(mean, cov).mean(0), way(mean, cov).probs) < bound


def test_probit_beats_mackay_where_logits_are_correlated():
    mean, cov = gaussian(10, c=4)
    cov = cov + 2.0
    p = exact(mean, cov).mean(0)
    mackay = (mean / (1 + math.pi / 8 * cov.diagonal(dim1=-2, dim2=-1)).sqrt()).softmax(-1)
    assert kl(p, L.Probit()(mean, cov).probs) < 0.4 * kl(p, mackay)


def test_dirichlets():
    mean, cov = gaussian(10, c=3)
    for way in (L.LaplaceBridge(), L.DirichletMatching()):
        close(way.dirichlet(mean, cov).mean, way(mean, cov).probs, 1e-9)
    variance = exact(mean, cov).var(0).sum(-1)
    ratio = (L.DirichletMatching().dirichlet(mean, cov).variance.sum(-1) / variance).log().abs().mean().exp()
    assert ratio < 2                                                        # measured 1.6
    bridge = L.LaplaceBridge().dirichlet(torch.zeros(1, 3, dtype=D), 0.1 * torch.eye(3, dtype=D)[None])
    # MacKay's Laplace approximation of Dirichlet(α) in the softmax basis has V_kk = (1/α)(1 − 2/c) + (1/c²) Σ 1/α: back to C V C.
    a = bridge.concentration[0]
    close((1 / a) * (1 - 2 / 3) + (1 / a).sum() / 9, torch.full((3,), 0.1 * 2 / 3, dtype=D), 1e-9)


def test_samples_average(family):
    """likelihood(samples [s n c]) is log mean_s p(y | f_s)."""
    if not family.density:
        pytest.skip("weighted loss")
    lik = family.build()
    f, y = family.data(3)
    samples = f + 0.3 * torch.randn(8, *f.shape, dtype=D, generator=torch.Generator().manual_seed(0))
    want = torch.stack([lik.conditional(f_s).log_prob(y) for f_s in samples]).logsumexp(0) - math.log(8)
    if isinstance(lik, L.Bernoulli) and family.c > 1:                       # labels' correlation is left out: marginals are exact
        want = torch.stack([lik.conditional(f_s).probs for f_s in samples]).mean(0)
        close(lik(samples).probs, want)
    else:
        close(lik(samples).log_prob(y), want)


def test_predictive_of_gaussian_and_positions(family):
    lik = family.build()
    mean, cov = gaussian(2, 3, c=family.c, width=0.3)
    p = lik(as_mvn(mean, cov))
    assert p.batch_shape == (2, 3)
    assert p.sample().shape[:2] == (2, 3)
    y = lik.sample(mean)
    assert p.log_prob(y).shape == (2, 3) and p.log_prob(y).isfinite().all()


def test_plain_latent_values_are_refused():
    with pytest.raises(ValueError, match=r"shape \[5, 3\].*conditional"):
        L.Categorical()(torch.zeros(5, 3))
    with pytest.raises(TypeError, match="got a str"):
        L.Categorical()("f")


def test_marginals_of_gpytorch_types():
    gpytorch = pytest.importorskip("gpytorch")
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal

    n, c = 3, 2
    A = torch.randn(n * c, n * c, dtype=D, generator=torch.Generator().manual_seed(0))
    K = A @ A.T + torch.eye(n * c, dtype=D)
    mean = torch.arange(n * c, dtype=D).reshape(n, c)
    for interleaved in (True, False):
        m, V = L.marginals(MultitaskMultivariateNormal(mean, K, interleaved=interleaved))
        close(m, mean)
        for i in range(n):
            index = [i * c + k if interleaved else k * n + i for k in range(c)]
            close(V[i], K[index][:, index])
        lazy = MultitaskMultivariateNormal(mean, gpytorch.lazify(K) if hasattr(gpytorch, "lazify") else K, interleaved=interleaved)
        close(L.marginals(lazy)[1], V)
    m, V = L.marginals(MultivariateNormal(mean.flatten(), K))
    close(m, mean.reshape(6, 1))
    close(V[:, 0, 0], K.diagonal())

    class Lazy:
        def marginals(self):
            return "mean", "cov"

    assert L.marginals(Lazy()) == ("mean", "cov")


def test_import_leaves_gpytorch_alone():
    import subprocess
    import sys

    code = "import sys, bayesgn.likelihoods; print([m for m in ('gpytorch', 'pyro', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_nodes_have_the_moments_of_the_gaussian():
    for c in (1, 2, 3, 5):
        mean, cov = gaussian(2, c=c)
        nodes, log_w = P.nodes_of(mean, cov)
        w = log_w.exp().unsqueeze(-1)
        close((w * nodes).sum(-2), mean)
        e = nodes - mean.unsqueeze(-2)
        close((w * e).mT @ e, cov)
