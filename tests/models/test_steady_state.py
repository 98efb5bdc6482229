"""SteadyStateGP against scipy's Riccati solver, a plain loop, and MarkovGP away from the ends."""

from __future__ import annotations

import gpytorch
import pytest
import scipy.linalg
import torch
from torch import Tensor

import bayesgn as bgn
from bayesgn import _kalman, likelihoods, models, rules
from bayesgn._kalman import gains
from bayesgn.models.steady_state import local_mean, riccati
from bayesgn.rules import Sites

k = gpytorch.kernels
KERNELS = {
    "Matern": lambda: k.ScaleKernel(k.MaternKernel(nu=2.5)),
    "sum": lambda: k.ScaleKernel(k.MaternKernel(nu=1.5)) + k.MaternKernel(nu=0.5),
    "product": lambda: k.MaternKernel(nu=1.5) * k.CosineKernel(),
    "RBF": lambda: k.ScaleKernel(k.RBFKernel()),
}


def equal(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def psd(n: int, c: int, generator) -> Tensor:
    R = torch.randn(n, c, c, dtype=torch.float64, generator=generator)
    return R @ R.mT


@pytest.mark.parametrize("name", KERNELS)
def test_riccati_against_scipy(name, generator):
    model = models.SteadyStateGP([KERNELS[name]().double(), KERNELS["Matern"]().double()])
    with torch.no_grad():
        chain = model.chain(model.place(0.3 * torch.arange(3, dtype=torch.float64)[:, None]))
    A, Q, H = chain.A[0], chain.Q[0], chain.H
    levels = torch.stack([1e-3 * torch.eye(2, dtype=torch.float64), psd(1, 2, generator)[0], 1e4 * torch.eye(2, dtype=torch.float64)])
    P, J = riccati(A, Q, H.mT @ levels @ H)
    for i, Λ in enumerate(levels):
        R = torch.linalg.inv(Λ)
        equal(P[i], torch.as_tensor(scipy.linalg.solve_discrete_are(A.mT.numpy(), H.mT.numpy(), Q.numpy(), R.numpy())))
        G = H.mT @ Λ @ H  # J is a fixed point of its own equation
        after = torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) + (J[i] + G) @ Q, J[i] + G)
        equal(J[i], A.mT @ after @ A, 1e-8 * float(1 + J[i].abs().max()))
        assert torch.linalg.eigvalsh(J[i])[0] > -1e-9 * J[i].abs().max()
    P, J = riccati(A, Q, torch.zeros_like(A)[None])
    equal(P[0], chain.P0)  # nothing seen: the prior
    equal(J[0], torch.zeros_like(A))


@pytest.mark.parametrize("engine", ["compiled", "scan"])
@pytest.mark.parametrize("from_the_end", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_recursion_under_given_gains(engine, from_the_end, shared, generator, monkeypatch):
    if engine == "scan":
        monkeypatch.setattr(gains, "served", lambda chain: False)
    n, d, c = 6, 3, 2

    def normal(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()

    A, H, K, b = normal(d, d), normal(c, d), normal(1 if shared else n, c, d), normal(n, d)
    x = _kalman.gained(A, H, K, b, from_the_end)
    F = (A - A @ K.mT @ H).expand(n, d, d)
    wanted, order = {}, range(n - 1, -1, -1) if from_the_end else range(n)
    for i in order:
        before = wanted.get(i + 1 if from_the_end else i - 1)
        step = 0 if before is None else (F[i].mT if from_the_end else F[i - 1]) @ before
        wanted[i] = b[i] + step
    equal(x, torch.stack([wanted[i] for i in range(n)]))
    assert torch.autograd.gradcheck(lambda *t: _kalman.gained(*t, from_the_end), (A, H, K, b))


def test_local_mean(generator):
    v = torch.rand(20, dtype=torch.float64, generator=generator)
    equal(local_mean(v, 3), torch.stack([v[max(0, i - 3) : i + 4].mean() for i in range(20)]))
    equal(local_mean(v, 0), v)
    equal(local_mean(v, 50), v.mean().expand(20))


GRID = 0.25 * torch.arange(240, dtype=torch.float64)[:, None]


def both(kernels: list, nat1: Tensor, nat2: Tensor, x: Tensor = GRID):
    a, b = models.SteadyStateGP(kernels), models.MarkovGP(kernels)
    return a._solve(a.place(x), nat1, nat2), b._solve(b.place(x), nat1, nat2)


@pytest.mark.parametrize("latents", [["Matern"], ["sum"], ["product"], ["RBF"], ["Matern", "sum"]], ids=str)
@pytest.mark.parametrize("coupled", [True, False])
def test_equal_precisions_are_exact_away_from_the_ends(latents, coupled, generator):
    c, n = len(latents), len(GRID)
    nat2 = psd(1, c, generator) + torch.eye(c, dtype=torch.float64)
    nat2 = (nat2 if coupled else torch.diag_embed(nat2.diagonal(dim1=-2, dim2=-1))).expand(n, c, c)
    nat1 = torch.randn(n, c, dtype=torch.float64, generator=generator)
    shuffled = torch.randperm(n, generator=generator)
    kernels = [KERNELS[name]().double() for name in latents]
    (log_Z, q), (wanted, p) = both(kernels, nat1[shuffled], nat2[shuffled], GRID[shuffled])
    inside = (shuffled > 80) & (shuffled < n - 80)
    equal(q.mean[inside], p.mean[inside])
    equal(q.cov[inside], p.cov[inside])
    # What is missed of log Z is missed at the start, and grows no more.
    (short, _), (short_wanted, _) = both(kernels, nat1[:120], nat2[:120], GRID[:120])
    (log_Z, _), (wanted, _) = both(kernels, nat1, nat2)
    equal(log_Z - wanted, short - short_wanted, 1e-8)
    assert abs(float(log_Z - wanted)) < 0.5 * c
    if c > 1:
        return
    slopes = [torch.autograd.grad(z, list(kernels[0].parameters()), allow_unused=True) for z in (log_Z - short, wanted - short_wanted)]
    for g, h in zip(*slopes):
        if g is not None:
            equal(g, h, 1e-7)


@pytest.mark.parametrize("latents", [["Matern"], ["RBF"], ["Matern", "sum"]], ids=str)
def test_hyper_gradients_where_precisions_differ(latents, generator):
    """Against finite differences; through the grid of steady states, the local mean and both recursions."""
    c, n = len(latents), 30
    nat2, nat1 = psd(n, c, generator), torch.randn(n, c, dtype=torch.float64, generator=generator)
    kernels = [KERNELS[name]().double() for name in latents]
    model = models.SteadyStateGP(kernels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = model.place(GRID[:n])
    w = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]

    def value() -> Tensor:
        log_Z, q = model._solve(inputs, nat1, nat2)
        return log_Z + (w * q.mean).sum() + (w[:, :, None] * q.cov).sum()

    slopes, h = torch.autograd.grad(value(), parameters, allow_unused=True), 1e-5
    for p, g in zip(parameters, slopes):
        if g is None:
            continue
        with torch.no_grad():
            p += h
            up = value()
            p -= 2 * h
            down = value()
            p += h
        # The filter's memory, a whole number of points, and the grid are held by the graph; a difference may see them jump.
        equal(g.sum(), (up - down) / (2 * h), 2e-4)


def quality(x: Sites, kernel) -> tuple[float, float]:
    (_, q), (_, p) = both([kernel], x.nat1, x.nat2)
    inside = slice(60, -60)
    sd = p.cov[inside, 0, 0].sqrt()
    mean = ((q.mean - p.mean)[inside, 0] / sd).square().mean().sqrt()
    return float(mean), float((q.cov[inside, 0, 0].sqrt() / sd).log().abs().mean())


def test_precisions_that_differ(generator):
    """How far marginals are off, in the exact model's standard deviations: figures of the docstring's approximations."""
    n, kernel = len(GRID), k.MaternKernel(nu=2.5).double()
    with torch.no_grad():
        f = models.MarkovGP(kernel).sample_prior(GRID, 1, generator)[0]
        noise = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        for precision, mean, scale in ((f.exp(), 0.15, 0.05), ((torch.rand(n, 1, generator=generator) < 0.7).double(), 0.25, 0.05)):
            got = quality(Sites(precision * f + precision.sqrt() * noise, precision[:, :, None]), kernel)
            assert got[0] < mean and got[1] < scale, got


def test_a_missing_point_says_nothing(generator):
    """Its variance is what the others leave, not what a point with a site has; and all cavities are proper."""
    n = len(GRID)
    nat1, nat2 = torch.randn(n, 1, dtype=torch.float64, generator=generator), torch.ones(n, 1, 1, dtype=torch.float64)
    nat2[100], nat1[100] = 0, 0
    with torch.no_grad():
        (_, q), (_, p) = both([k.MaternKernel(nu=1.5).double()], nat1, nat2)
        cavity = 1 / q.cov[:, 0, 0] - nat2[:, 0, 0]
    assert (cavity > 0).all()
    assert abs(float(q.cov[100, 0, 0] / p.cov[100, 0, 0]) - 1) < 0.25 < float(p.cov[100, 0, 0] / p.cov[40, 0, 0]) - 1


@pytest.mark.parametrize("rule", [rules.Laplace(), rules.Variational(), rules.PowerEP(0.5)], ids=repr)
def test_inference(rule, generator):
    t = GRID[:, 0]
    y = torch.poisson(torch.exp(torch.sin(t)), generator=generator)
    y[50] = float("nan")
    mean = gpytorch.means.ConstantMean().double()
    a, b = (
        bgn.bayes_newton(kind(KERNELS["Matern"]().double(), mean), likelihoods.Poisson(), (t, y), rule, progress=False)
        for kind in (models.SteadyStateGP, models.MarkovGP)
    )
    assert a.trace.converged and not any(a.trace.skipped)
    error = (a(t).mean - b(t).mean).abs() / b(t).stddev
    assert error.mean() < 0.05, error.mean()
    assert abs(a.trace.energy[-1] - b.trace.energy[-1]) < 0.02 * len(t)
    # elsewhere: exact in the sites that were found
    x = torch.tensor([-1.0, 0.1, 7.77, 70.0], dtype=torch.float64)
    same = models.MarkovGP(KERNELS["Matern"]().double(), mean).start(likelihoods.Poisson(), (t, y), rule, a.sites)
    equal(a(x).mean, same(x).mean)
    equal(a(x).covariance_matrix, same(x).covariance_matrix)
    equal(a.sample_outputs(x, 2, torch.Generator().manual_seed(1)), same.sample_outputs(x, 2, torch.Generator().manual_seed(1)))


def test_what_has_no_steady_state_is_refused():
    model = models.SteadyStateGP(KERNELS["Matern"]().double())
    for x, message in (([0.0, 1.0, 2.5], "steps go from 1 to 1.5"), ([0.0, 1.0, 1.0, 2.0], "1 steps are zero"), ([0.0], "one point")):
        with pytest.raises(ValueError, match=message):
            model.place(torch.tensor(x, dtype=torch.float64)[:, None])
    with pytest.raises(ValueError, match="works over time"):
        model.place(torch.zeros(3, 2))
    for kernel in (k.ConstantKernel() + k.MaternKernel(nu=0.5), k.PeriodicKernel(), k.LinearKernel()):
        model = models.SteadyStateGP(kernel.double())
        with pytest.raises(ValueError, match="never forgets"):
            model._solve(model.place(GRID), torch.zeros(240, 1, dtype=torch.float64), torch.ones(240, 1, 1, dtype=torch.float64))
    K = models.SteadyStateGP(KERNELS["Matern"]().double()).prior(GRID[:4]).covariance_matrix
    equal(K, KERNELS["Matern"]().double()(GRID[:4]).to_dense())
