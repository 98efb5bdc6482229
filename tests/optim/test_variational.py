"""optim.Variational: every step against the dense formula by autodiff, its laws, and what a torch optimizer owes its user."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, models, optim, rules
from tests.inference.problems import snapshot

D = torch.float64


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(100 + seed), dtype=D)


# -- losses written out, Σ_n −log p(y|f) for f [n c] -----------------------------------------------------------------------------


def bernoulli(f: Tensor, y: Tensor) -> Tensor:
    return (nn.functional.softplus(f[:, 0]) - y * f[:, 0]).sum()


def categorical(f: Tensor, y: Tensor) -> Tensor:
    return -f.log_softmax(-1).gather(-1, y[:, None]).sum()


def gaussian(f: Tensor, y: Tensor, noise: float = 0.3) -> Tensor:
    return 0.5 * ((f - y).square() / noise + math.log(2 * math.pi * noise)).sum()


FAMILIES = {
    "bernoulli": (likelihoods.Bernoulli(), bernoulli, 1),
    "categorical": (likelihoods.Categorical(), categorical, 3),
    "gaussian": (likelihoods.Gaussian(0.3), gaussian, 2),
}


class Problem:
    """An MLP 2-3-c on n data, with loss and outputs as functions of the flat weights [p]."""

    def __init__(self, family: str = "categorical", n: int = 8, linear: bool = False, seed: int = 0) -> None:
        self.likelihood, self._loss, c = FAMILIES[family]
        self.family = family
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.net = (nn.Linear(2, c) if linear else nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, c))).double().eval()
        self.x = draw(n, 2, seed=seed)
        noise = draw(n, c, seed=seed + 1)
        y = {"bernoulli": (noise[:, 0] > 0).double(), "categorical": noise.argmax(-1), "gaussian": noise}
        self.y = y[family]
        self.own = dict(self.net.named_parameters())
        self.p = sum(p.numel() for p in self.own.values())

    @property
    def θ(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def f(self, θ: Tensor, x: Tensor) -> Tensor:
        parts = θ.split([p.numel() for p in self.own.values()])
        weights = {k: part.reshape(p.shape) for (k, p), part in zip(self.own.items(), parts, strict=True)}
        return torch.func.functional_call(self.net, weights, (x,))

    def loss(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._loss(self.f(θ, x), y)

    def gradient(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(self.loss)(θ, x, y)

    def J(self, θ: Tensor, x: Tensor) -> Tensor:
        return torch.func.jacrev(self.f)(θ, x)

    def gauss_newton(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Σ JᵀΛJ with Λ the second derivative of the loss in f, row by row: the Fisher matrix of these families."""
        J, f = self.J(θ, x), self.f(θ, x)
        Λ = torch.vmap(torch.func.hessian(lambda v, t: self._loss(v[None], t[None])))(f, y)
        return torch.einsum("ncp,ncd,ndq->pq", J, Λ, J)

    def empirical_fisher(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        G = torch.vmap(torch.func.grad(lambda θ, x, y: self.loss(θ, x[None], y[None])), (None, 0, 0))(θ, x, y)
        return G.mT @ G

    def hessian(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        λ, Q = torch.linalg.eigh(torch.func.hessian(self.loss)(θ, x, y))
        return Q @ (λ.abs()[:, None] * Q.mT)

    def model(self, structure, precision: float | Tensor = 0.7, mean: float = 0.0, net: nn.Module | None = None) -> models.Network:
        net = copy.deepcopy(self.net) if net is None else net
        prior = models.WeightPrior.per_weight(net, precision, mean) if isinstance(precision, Tensor) else models.WeightPrior(precision, mean)
        return models.Network(net, prior, structure)

    def kept(self, H: Tensor, structure) -> Tensor:
        """What a structure keeps of H."""
        if isinstance(structure, ggn.Diag):
            return torch.diag(H.diagonal())
        if isinstance(structure, ggn.Layerwise) and not isinstance(self.net, nn.Linear):
            mask = torch.block_diag(torch.ones(9, 9), torch.ones(self.p - 9, self.p - 9)).to(D)
            return H * mask
        return H


class Dense:
    """The update of the docstring with matrices, given the curvature of a batch at a point."""

    def __init__(self, problem: Problem, structure, bend: Callable, N: int, P: Tensor, μ: float, lr=1.0, ρ=None, momentum=0.0, damping=0.0, T=1.0):
        self.q, self.structure, self.bend, self.N, self.P, self.μ = problem, structure, bend, N, P, μ
        self.lr, self.ρ, self.momentum, self.damping, self.T = lr, lr if ρ is None else ρ, momentum, damping, T
        self.m, self.H, self.v, self.t = problem.θ.clone(), None, torch.zeros(problem.p, dtype=D), 0

    def H_of(self, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.N / len(x) * self.q.kept(self.bend(θ, x, y), self.structure)

    def precision(self) -> Tensor:
        H = self.H
        if isinstance(self.structure, ggn.Hessian):
            λ, Q = torch.linalg.eigh(H)
            H = Q @ (λ.abs()[:, None] * Q.mT)
        return H / self.T + torch.diag(self.P)

    def step(self, x: Tensor, y: Tensor, ε: Tensor, renew: bool = True) -> None:
        g = self.N / len(x) * torch.stack([self.q.gradient(self.m + e, x, y) for e in ε]).mean(0)
        H = torch.stack([self.H_of(self.m + e, x, y) for e in ε]).mean(0)
        self.take(g, H if renew else None)

    def take(self, g: Tensor, H: Tensor | None, whole: Tensor | None = None) -> None:
        if H is not None:
            self.H = (1 - self.ρ) * self.H + self.ρ * H
        slope = g / self.T + self.P * (self.m - self.μ)
        self.t += 1
        self.v = self.momentum * self.v + (1 - self.momentum) * slope
        divide = self.precision() if whole is None else whole / self.T + torch.diag(self.P)
        δ = torch.linalg.solve(divide + self.damping * torch.eye(len(self.P), dtype=D), self.v / (1 - self.momentum**self.t))
        self.m = self.m - self.lr * δ


def same_q(opt: optim.Variational, dense: Dense, tol: float = 1e-9) -> None:
    torch.testing.assert_close(opt.mean, dense.m, rtol=tol, atol=tol)
    eye = torch.eye(len(dense.m), dtype=D)
    torch.testing.assert_close(opt.precision().solve(eye), torch.linalg.inv(dense.precision()), rtol=tol, atol=tol)


FORMS = [
    ("gauss_newton", rules.GaussNewton(), ggn.Full()),
    ("gauss_newton", rules.GaussNewton(), ggn.Layerwise()),
    ("gauss_newton", rules.GaussNewton(), ggn.Diag()),
    ("gauss_newton", rules.GaussNewton(), ggn.LowRank(rank=60)),
    ("gauss_newton", rules.GaussNewton(), ggn.LowRankPlusDiagonal(rank=60)),
    ("empirical_fisher", rules.EmpiricalFisher(), ggn.Full()),
    ("empirical_fisher", rules.EmpiricalFisher(), ggn.Diag()),  # VOGN: squares of per-datum gradients
]
SETTINGS = [
    {},
    {"lr": 0.3, "precision_lr": 0.6},
    {"lr": 0.3, "momentum": 0.5, "damping": 0.7, "temperature": 0.4},
]


@pytest.mark.parametrize("family, settings_", [("categorical", SETTINGS[0]), ("gaussian", SETTINGS[1]), ("categorical", SETTINGS[2])],
                         ids=["whole", "rates", "all"])  # fmt: skip
@pytest.mark.parametrize("bend, curvature, structure", FORMS, ids=lambda v: type(v).__name__ if not isinstance(v, str) else v)
@pytest.mark.parametrize("expectation", [optim.AtMean(), optim.Draws(3), optim.Draws(2, antithetic=False)], ids=repr)
def test_steps_are_the_dense_natural_gradient(bend, curvature, structure, expectation, settings_, family):
    q = Problem(family)
    N, P = 3 * len(q.x), torch.linspace(0.5, 2, q.p, dtype=D)
    opt = optim.Variational(
        q.model(structure, P, 0.2), q.likelihood, N, curvature, expectation, **({"lr": 1.0} | settings_), generator=gen(3)
    )  # fmt: skip
    rename = {"lr": "lr", "precision_lr": "ρ", "momentum": "momentum", "damping": "damping", "temperature": "T"}
    dense = Dense(q, structure, getattr(q, bend), N, P, 0.2, **{rename[k]: v for k, v in settings_.items()})
    other = draw(5, 2, seed=7)
    batches = [(q.x, q.y), (other, q.y[:5])]
    dense.H = dense.H_of(dense.m, *batches[0])
    opt.begin([batches[0]])
    for x, y in batches:
        if isinstance(expectation, optim.AtMean):
            ε = torch.zeros(1, q.p, dtype=D)
        else:
            again = opt.generator.clone_state()  # the draws that the step will make
            n = expectation.n
            if expectation.antithetic:
                half = opt.precision().sample((n + 1) // 2, again)
                ε = torch.cat([torch.stack([e, -e]) for e in half])[:n]
            else:
                ε = opt.precision().sample(n, again)
        mean_loss = torch.stack([q.loss(dense.m + e, x, y) for e in ε]).mean() / len(x)
        torch.testing.assert_close(opt.step(x, y), mean_loss)
        dense.step(x, y, ε)
        same_q(opt, dense)


def test_von_is_newton_with_the_hessian_of_the_net():
    q = Problem("categorical")
    opt = optim.Variational(q.model(ggn.Hessian()), q.likelihood, 16, rules.Exact(), optim.Draws(1), lr=0.5, generator=gen(1))
    P = torch.full((q.p,), 0.7, dtype=D)
    dense = Dense(q, ggn.Hessian(), lambda θ, x, y: torch.func.hessian(q.loss)(θ, x, y), 16, P, 0.0, lr=0.5)
    dense.H = dense.H_of(dense.m, q.x, q.y)
    opt.begin((q.x, q.y))
    for _ in range(2):
        ε = opt.precision().sample(1, opt.generator.clone_state())
        opt.step(q.x, q.y)
        dense.step(q.x, q.y, ε)
        same_q(opt, dense)


def test_oggn_with_a_whole_step_is_gauss_newton_on_the_map_loss():
    q = Problem("gaussian")
    opt = optim.Variational(q.model(ggn.Full, 0.5), q.likelihood, len(q.x), expectation=optim.AtMean(), lr=1.0)
    before = q.θ
    opt.step(q.x, q.y)
    J = q.J(before, q.x).flatten(0, 1)
    r = (q.y - q.f(before, q.x)).flatten()
    A = torch.cat([J / math.sqrt(0.3), math.sqrt(0.5) * torch.eye(q.p, dtype=D)])
    δ = torch.linalg.lstsq(A, torch.cat([r / math.sqrt(0.3), -math.sqrt(0.5) * before])[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(opt.mean, before + δ)


@pytest.mark.parametrize("structure", [ggn.Full(), ggn.Diag(), ggn.Layerwise(), ggn.LowRankPlusDiagonal(rank=2)], ids=repr)
@pytest.mark.parametrize("whole", [True, False])
def test_linearized_steps_are_quadrature_over_the_linearised_functions(structure, whole):
    """E under f_lin ~ N(f, J Σ Jᵀ), by Gauss-Hermite of 60 nodes written out; the mean moves by the exact matrix on all data."""
    q = Problem("bernoulli")
    N = len(q.x) if whole else 20
    P = torch.linspace(0.5, 2, q.p, dtype=D)
    expectation = optim.Linearized(rules.GaussHermite(60))
    opt = optim.Variational(q.model(structure, P, 0.1), q.likelihood, N, expectation=expectation, lr=0.6, precision_lr=0.8, temperature=0.5)
    opt.begin((q.x, q.y))
    nodes, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    w = w / w.sum()
    m, eye = q.θ, torch.eye(q.p, dtype=D)
    Σ = opt.precision().solve(eye)
    J, f = q.J(m, q.x)[:, 0], q.f(m, q.x)[:, 0]
    sd = (J @ Σ * J).sum(-1).sqrt()
    at = torch.sigmoid(f[:, None] + sd[:, None] * nodes)
    slope, bend = (w * (at - q.y[:, None])).sum(-1), (w * at * (1 - at)).sum(-1)
    H0 = opt.curvature.copy()
    opt.step(q.x, q.y)
    g, H = N / len(q.x) * J.mT @ slope, N / len(q.x) * J.mT @ (bend[:, None] * J)
    if not isinstance(structure, ggn.LowRankPlusDiagonal):  # (whose blend is truncated: tests/ggn/test_blend.py)
        before = torch.linalg.inv(H0.with_prior(opt._prior(), torch.tensor(2.0, dtype=D)).solve(eye)) - torch.diag(P)  # H / T
        kept = 0.2 * before + 0.8 * q.kept(H, structure) / 0.5
        torch.testing.assert_close(torch.linalg.inv(opt.precision().solve(eye)), kept + torch.diag(P), rtol=1e-8, atol=1e-8)
    after = H / 0.5 + torch.diag(P)
    exact = isinstance(structure, ggn.Full)
    divide = torch.linalg.inv(opt.precision().solve(eye)) if exact or not whole else after
    δ = torch.linalg.solve(divide, g / 0.5 + P * (m - 0.1))
    torch.testing.assert_close(opt.mean, m - 0.6 * δ, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("expectation", [optim.AtMean(), optim.Draws(2), optim.Linearized(), optim.Reparameterized(2)], ids=repr)
def test_between_renewals_the_precision_stands_still(expectation):
    q = Problem("bernoulli")
    opt = optim.Variational(q.model(ggn.Diag), q.likelihood, 24, expectation=expectation, lr=0.2, every=3, generator=gen())
    seen = []
    for _ in range(6):
        mean = opt.mean
        opt.step(q.x, q.y)
        assert not torch.equal(mean, opt.mean)
        seen.append(opt.precision().diagonal())
    assert all(torch.equal(seen[0], s) for s in seen[1:3]) and torch.equal(seen[3], seen[5])
    assert not torch.equal(seen[2], seen[3])


def test_a_rarer_renewal_moves_the_curvature_as_far():
    """Every k-th step H moves by 1 − (1 − ρ)^k."""
    q = Problem("gaussian")
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=optim.AtMean(), lr=0.3, precision_lr=0.2, every=3)
    dense = Dense(q, ggn.Full(), q.gauss_newton, 8, torch.full((q.p,), 0.7, dtype=D), 0.0, lr=0.3, ρ=1 - 0.8**3)
    dense.H = dense.H_of(dense.m, q.x, q.y)
    for t in range(5):
        opt.step(q.x, q.y)
        dense.step(q.x, q.y, torch.zeros(1, q.p, dtype=D), renew=t % 3 == 0)
        same_q(opt, dense)


def test_the_slope_alone_is_the_same_slope():
    q = Problem("categorical")
    for expectation in (optim.AtMean(), optim.Draws(3)):
        opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=expectation)
        opt.begin((q.x, q.y))
        whole = expectation.estimate(opt._belief(), [(q.x, q.y)], gen(5))
        alone = expectation.slope(opt._belief(), [(q.x, q.y)], gen(5))
        torch.testing.assert_close(whole.gradient, alone.gradient)
        torch.testing.assert_close(whole.loss, alone.loss)


# -- laws ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), lr=st.floats(0.01, 1.0), N=st.integers(8, 10**6), log_P=st.floats(-4, 4), T=st.floats(0.05, 5.0))
def test_the_riemannian_term_keeps_the_precision_positive(seed, lr, N, log_P, T):
    q = Problem("bernoulli", seed=seed % 50)
    expectation = optim.Reparameterized(1, initial=0.01)
    opt = optim.Variational(q.model(ggn.Diag, 10.0**log_P), q.likelihood, N, expectation=expectation, lr=0.01, precision_lr=lr, temperature=T,
                            generator=gen(seed))  # fmt: skip
    opt.begin((q.x, q.y))
    for _ in range(6):
        before = opt.precision().diagonal()
        try:
            opt.step(q.x, q.y)
        except FloatingPointError:
            break  # (the mean left the finite numbers: said, not hidden)
        now = 1 / opt.precision().diagonal()
        assert bool((now >= 0.5 / before * (1 - 1e-6)).all())  # tot (1 + u + u²/2) ≥ tot / 2


def test_reparameterized_step_is_the_published_update():
    q = Problem("bernoulli")
    N, P, T, ρ, lr = 24, torch.linspace(0.5, 2, q.p, dtype=D), 0.7, 0.3, 0.1
    opt = optim.Variational(q.model(ggn.Diag, P, 0.2), q.likelihood, N, expectation=optim.Reparameterized(2, initial=0.4), lr=lr,
                            precision_lr=ρ, temperature=T, generator=gen(2))  # fmt: skip
    opt.begin((q.x, q.y))
    h, m = torch.full((q.p,), 0.4 * N, dtype=D), q.θ
    for _ in range(3):
        torch.testing.assert_close(1 / opt.precision().diagonal(), h / T + P)
        e = opt.precision().sample(1, opt.generator.clone_state())[0]
        gs = [q.gradient(m + s, q.x, q.y) for s in (e, -e)]
        guess = N / len(q.x) * 0.5 * (gs[0] * e - gs[1] * e) * (h / T + P)
        g = N / len(q.x) * 0.5 * (gs[0] + gs[1])
        opt.step(q.x, q.y)
        h = (1 - ρ) * h + ρ * guess + 0.5 * ρ**2 * (h - guess) ** 2 / (h + T * P)
        m = m - lr * (g / T + P * (m - 0.2)) / (h / T + P)
        torch.testing.assert_close(opt.mean, m)


def test_reparameterized_curvature_is_unbiased_on_a_quadratic_loss():
    """Squared loss of a linear net: the Hessian's diagonal is Σ x²/noise whatever the weights; Stein's guess has just that mean."""
    q = Problem("gaussian", linear=True)
    opt = optim.Variational(q.model(ggn.Diag), q.likelihood, len(q.x), expectation=optim.Reparameterized(10, initial=1.0))
    opt.begin((q.x, q.y))
    generator, exact = gen(), torch.func.hessian(q.loss)(q.θ, q.x, q.y).diagonal()
    found = [opt.expectation.estimate(opt._belief(), [(q.x, q.y)], generator) for _ in range(40)]
    guesses = torch.stack([e.diagonal for e in found])
    error = guesses.std(0) / math.sqrt(len(guesses))
    assert bool((error < 0.25 * exact).all()) and bool(((guesses.mean(0) - exact).abs() < 4.5 * error).all())
    for e in found[:3]:  # mirrored draws: the slope is exact for a quadratic
        torch.testing.assert_close(e.gradient, q.gradient(q.θ, q.x, q.y))


def test_a_batch_in_parts_is_the_same_step():
    q = Problem("categorical")
    steps = []
    for data in ([(q.x, q.y)], [(q.x[:3], q.y[:3]), (q.x[3:], q.y[3:])], [(q.x[:8], q.y[:8]), (q.x[8:], q.y[8:])]):  # (the last one empty)
        opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=optim.Draws(2), lr=0.5, generator=gen())
        loss = opt.step(data)
        steps.append((loss, opt.mean, opt.precision().diagonal()))
    for other in steps[1:]:
        torch.testing.assert_close(steps[0], other)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.floats(0.1, 3.0))
def test_kl_and_bound_are_those_of_dense_gaussians(seed, T):
    q = Problem("categorical", seed=seed % 20)
    P = 0.1 + draw(q.p, seed=seed).square()
    opt = optim.Variational(q.model(ggn.Full, P, 0.3), q.likelihood, 8, expectation=optim.Draws(2), lr=0.5, temperature=T, generator=gen(seed))
    opt.step(q.x, q.y)
    Σ = opt.precision().solve(torch.eye(q.p, dtype=D))
    N = torch.distributions.MultivariateNormal
    posterior, prior = N(opt.mean, 0.5 * (Σ + Σ.mT)), N(torch.full((q.p,), 0.3, dtype=D), precision_matrix=torch.diag(P))
    kl = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(opt.kl(), kl)
    e = opt.precision().sample(1, gen(9))[0]
    fit = -0.5 * (q.loss(opt.mean + e, q.x, q.y) + q.loss(opt.mean - e, q.x, q.y))
    torch.testing.assert_close(opt.elbo((q.x, q.y), draws=2, generator=gen(9)), fit - kl)


# -- subsets, dtypes, shapes -----------------------------------------------------------------------------------------------------


def test_a_mask_moves_its_weights_alone_and_is_the_dense_step_there():
    q = Problem("categorical")
    net = copy.deepcopy(q.net)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    selection = {"0.weight": mask, "2.weight": None}
    index = torch.cat([mask.flatten().nonzero()[:, 0], torch.arange(9, 18)])
    model = models.Network(net, models.WeightPrior(0.7), ggn.Full, selection)
    opt = optim.Variational(model, q.likelihood, 8, expectation=optim.Draws(1), lr=1.0, generator=gen())
    opt.begin((q.x, q.y))
    e = torch.zeros(q.p, dtype=D)
    e[index] = opt.precision().sample(1, opt.generator.clone_state())[0]
    opt.step(q.x, q.y)
    at = q.θ + e
    H = q.gauss_newton(at, q.x, q.y)[index[:, None], index] + 0.7 * torch.eye(len(index), dtype=D)
    new = q.θ
    new[index] -= torch.linalg.solve(H, q.gradient(at, q.x, q.y)[index] + 0.7 * q.θ[index])
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in net.parameters()]), new)


@pytest.mark.parametrize("structure", [ggn.Full, ggn.Kron, ggn.LowRankPlusDiagonal(rank=5)], ids=str)
@pytest.mark.parametrize("expectation", [optim.AtMean(), optim.Draws(2), optim.Linearized()], ids=repr)
def test_float32_nets_follow_float64_ones(structure, expectation):
    q = Problem("categorical")
    found = []
    for dtype in (torch.float64, torch.float32):
        model = q.model(structure, net=copy.deepcopy(q.net).to(dtype))
        opt = optim.Variational(model, q.likelihood, 8, expectation=expectation, lr=0.5, generator=gen())
        for _ in range(3):
            opt.step(q.x.to(dtype), q.y)
        assert next(model.net.parameters()).dtype == dtype and opt.mean.dtype == D
        found.append(torch.cat([opt.mean, opt.precision().diagonal().sqrt()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


class Pixels(nn.Module):
    """[n 1 h w] -> [n 3 h w]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2, padding="same")

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("expectation", [optim.AtMean(), optim.Draws(2), optim.Linearized(), optim.Reparameterized(1)], ids=repr)
@pytest.mark.parametrize("structure", [ggn.Full, ggn.Diag, ggn.Kron], ids=str)
def test_many_positions_class_weights_and_ignored_labels(structure, expectation):
    """Segmentation: an ignored pixel is as if it were not there, a class weight multiplies its loss."""
    if isinstance(expectation, optim.Reparameterized) and structure is not ggn.Diag:
        pytest.skip("Diag only")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Pixels().double().eval()
    x, weights = draw(4, 1, 3, 3), torch.tensor([1.0, 0.5, 2.0], dtype=D)
    y = draw(4, 3, 3, 3, seed=2).argmax(1)
    y[:, 0] = -100
    opt = optim.Variational(models.Network(net, models.WeightPrior(1.0), structure), likelihoods.Categorical(weight=weights, class_dim=1), 4,
                            expectation=expectation, lr=0.2, generator=gen())  # fmt: skip
    before = copy.deepcopy(net)
    opt.begin((x, y))
    e = torch.zeros(2, 15, dtype=D)
    if isinstance(expectation, (optim.Draws, optim.Reparameterized)):
        first = opt.precision().sample(1, opt.generator.clone_state())[0]
        e = torch.stack([first, -first])[: expectation.n]
    losses = []
    for row in e:
        moved = copy.deepcopy(before)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(before.parameters()) + row, moved.parameters())
        losses.append(nn.functional.cross_entropy(moved(x), y, weights, ignore_index=-100, reduction="sum"))
    loss = opt.step(x, y)
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(opt.elbo((x, y), 4)))
    if not isinstance(expectation, optim.Linearized):
        torch.testing.assert_close(loss, torch.stack(losses).mean().detach() / 4)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(1, 3)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


@pytest.mark.parametrize("expectation", [optim.AtMean(), optim.Draws(2), optim.Linearized(), optim.Reparameterized(4)], ids=repr)
def test_named_inputs(expectation):
    torch.manual_seed(0)
    net = TwoInputs().double().eval()
    x, y = {"left": draw(6, 2), "right": draw(6, 1, seed=3)}, draw(6, 3, seed=4).argmax(-1)
    opt = optim.Variational(models.Network(net, structure=ggn.Diag), likelihoods.Categorical(), 6, expectation=expectation, lr=0.2, generator=gen())
    opt.begin((x, y))
    first = opt.elbo((x, y), 64, gen(1))
    for _ in range(12):
        opt.step(x, y)
    assert opt.elbo((x, y), 64, gen(1)) > first
    f = opt.posterior((x, y))(x)
    assert f.mean.shape == (6, 3) and bool(f.variance.isfinite().all())


def test_missing_targets_tell_nothing():
    q = Problem("gaussian", n=8)
    y = q.y.clone()
    y[5:] = torch.nan
    for expectation in (optim.AtMean(), optim.Draws(2), optim.Linearized()):
        means = []
        for x, t in ((q.x, y), (q.x[:5], q.y[:5])):
            opt = optim.Variational(q.model(ggn.Full), q.likelihood, len(t), expectation=expectation, lr=1.0, generator=gen())
            opt.step(x, t)
            means.append((opt.mean, opt.precision().diagonal()))
        torch.testing.assert_close(means[0], means[1])


# -- tuning ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalar", "layer", "weight"])
def test_the_closed_form_precision_maximises_the_bound(kind):
    q = Problem("categorical")
    net = copy.deepcopy(q.net)
    prior = {"scalar": models.WeightPrior(0.7, 0.1), "layer": models.WeightPrior.per_layer(net, 0.7, 0.1),
             "weight": models.WeightPrior.per_weight(net, 0.7, 0.1)}[kind]  # fmt: skip
    opt = optim.Variational(models.Network(net, prior, ggn.Full), q.likelihood, 8, expectation=optim.Draws(2), lr=0.5, generator=gen())
    opt.step(q.x, q.y)
    Σ = opt.precision().solve(torch.eye(q.p, dtype=D))
    group = {"scalar": torch.zeros(q.p), "layer": torch.cat([torch.zeros(9), torch.ones(q.p - 9)]), "weight": torch.arange(q.p)}[kind].long()
    m = opt.mean

    def minus_kl(u: Tensor) -> Tensor:
        P = u.exp()[group]
        return -0.5 * (((m - 0.1).square() + Σ.diagonal()) * P - u[group]).sum()

    opt.tune((q.x, q.y))
    u = opt.prior.log_precision.detach().double().reshape(-1).requires_grad_()
    (slope,) = torch.autograd.grad(minus_kl(u), u)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)
    assert bool((torch.func.hessian(minus_kl)(u.detach()).diagonal() < 0).all())
    assert bool((prior.precision.detach() - 0.7).abs().max() < 1e-12)  # the user's own stays
    assert torch.equal(opt.mean, m)


def test_frozen_hyperparameters_stay():
    q = Problem("gaussian")
    model, likelihood = q.model(ggn.Full), likelihoods.Gaussian(0.3).requires_grad_(False)
    model.prior.requires_grad_(False)
    opt = optim.Variational(model, likelihood, 8, lr=0.5, generator=gen())
    opt.step(q.x, q.y)
    opt.tune((q.x, q.y))
    assert float(opt.prior.precision) == pytest.approx(0.7) and float(opt.likelihood.noise) == pytest.approx(0.3)


def test_tuned_noise_is_the_mean_square_under_q():
    q = Problem("gaussian", linear=True)
    for expectation in (optim.Linearized(), optim.Draws(2)):
        opt = optim.Variational(q.model(ggn.Full), likelihoods.Gaussian(0.3), 8, expectation=expectation, lr=1.0, generator=gen())
        opt.step(q.x, q.y)
        m, Σ, P0 = opt.mean, opt.precision().solve(torch.eye(q.p, dtype=D)), opt.prior.precision.detach().clone()
        J, f = q.J(m, q.x), q.f(m, q.x)
        if isinstance(expectation, optim.Linearized):
            square = ((f - q.y).square() + torch.einsum("ncp,pq,ncq->nc", J, Σ, J)).mean()
        else:
            e = opt.precision().sample(1, gen(4))[0]
            square = torch.stack([(q.f(m + s, q.x) - q.y).square() for s in (e, -e)]).mean()
        opt.tune((q.x, q.y), draws=2, generator=gen(4))
        assert float(opt.likelihood.noise) == pytest.approx(float(square), rel=1e-5)
        assert not torch.equal(opt.prior.precision, P0)


# -- an optimizer of torch's -----------------------------------------------------------------------------------------------------

EXPECTATIONS = [optim.AtMean(), optim.Draws(2), optim.Linearized(), optim.Reparameterized(2)]


def optimizer(q: Problem, expectation, **options) -> optim.Variational:
    return optim.Variational(q.model(ggn.Diag), q.likelihood, 24, expectation=expectation, lr=0.2, momentum=0.5, every=2, generator=gen(), **options)


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=repr)
def test_state_dict_has_the_same_future(expectation):
    q = Problem("gaussian")
    opt = optimizer(q, expectation)
    for _ in range(3):
        opt.step(q.x, q.y)
    opt.tune((q.x, q.y))
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "net": opt.net.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = optimizer(q, expectation)
    other.net.load_state_dict(state["net"])
    other.load_state_dict(state["opt"])
    other.generator.set_state(opt.generator.get_state())
    for _ in range(3):
        torch.testing.assert_close(opt.step(q.x, q.y), other.step(q.x, q.y), rtol=0, atol=0)
    torch.testing.assert_close(opt.mean, other.mean, rtol=0, atol=0)
    torch.testing.assert_close(opt.precision().diagonal(), other.precision().diagonal(), rtol=0, atol=0)
    assert torch.equal(opt.prior.precision, other.prior.precision)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_go_on_alone(duplicate, scheduled):
    q = Problem("gaussian")
    opt = optimizer(q, optim.Draws(2))
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    opt.step(q.x, q.y)
    other = duplicate(opt)
    mean = opt.mean
    torch.testing.assert_close(other.mean, mean, rtol=0, atol=0)
    first = other.step(q.x, q.y)
    torch.testing.assert_close(opt.mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(opt.step(q.x, q.y), first, rtol=0, atol=0)
    torch.testing.assert_close(opt.mean, other.mean, rtol=0, atol=0)


def test_foreign_states_are_refused():
    q = Problem("gaussian")
    opt = optimizer(q, optim.Draws(1))
    opt.step(q.x, q.y)
    mean, precision = opt.mean, opt.precision().diagonal()
    with pytest.raises(ValueError, match="not of optim.Variational"):
        opt.load_state_dict(torch.optim.SGD(q.net.parameters(), 0.1).state_dict())
    other = optim.Variational(q.model(ggn.Full), q.likelihood, 24)
    other.step(q.x, q.y)
    with pytest.raises(ValueError, match="structure"):
        opt.load_state_dict(other.state_dict())
    bigger = Problem("categorical")
    third = optim.Variational(bigger.model(ggn.Diag), bigger.likelihood, 24)
    third.step(bigger.x, bigger.y)
    with pytest.raises(ValueError):
        opt.load_state_dict(third.state_dict())
    torch.testing.assert_close((opt.mean, opt.precision().diagonal()), (mean, precision), rtol=0, atol=0)
    with pytest.raises(ValueError, match="structure"):
        opt.start(other.curvature)


def test_schedulers_move_the_step():
    q = Problem("gaussian")
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=optim.AtMean(), lr=0.8)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.begin((q.x, q.y))
    whole = Dense(q, ggn.Full(), q.gauss_newton, 8, torch.full((q.p,), 0.7, dtype=D), 0.0)
    whole.H = whole.H_of(whole.m, q.x, q.y)
    for lr in (0.8, 0.4, 0.2):
        whole.lr = whole.ρ = lr
        opt.step(q.x, q.y)
        whole.step(q.x, q.y, torch.zeros(1, q.p, dtype=D))
        schedule.step()
        same_q(opt, whole)


def test_snapshot_and_restore():
    q = Problem("gaussian")
    opt = optimizer(q, optim.Draws(2))
    opt.step(q.x, q.y)
    saved, state = opt.snapshot(), opt.generator.get_state()
    futures = []
    for _ in range(2):
        opt.restore(saved)
        opt.generator.set_state(state)
        opt.step(q.x, q.y)
        opt.tune((q.x, q.y))
        opt.step(q.x, q.y)
        futures.append((opt.mean, opt.precision().diagonal(), opt.prior.precision.detach().clone(), opt.likelihood.noise.detach().clone()))
    torch.testing.assert_close(futures[0], futures[1], rtol=0, atol=0)


def test_modes_flags_and_hooks_are_left_as_they_came():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)).double()
    net.train()
    net[1].eval()
    net[3].bias.requires_grad_(False)
    x, y = draw(6, 2), draw(6, 3).argmax(-1)
    before = snapshot(net)
    for expectation in EXPECTATIONS:
        opt = optim.Variational(models.Network(net, structure=ggn.Diag), likelihoods.Categorical(), 6, expectation=expectation, generator=gen())
        opt.step(x, y)
        after = snapshot(net)
        assert before[1] == after[1] and before[3] == after[3] and [r for r, _ in before[2]] == [r for r, _ in after[2]]
        for name, t in before[0].items():
            if "running" in name or name == "3.bias":
                assert torch.equal(t, after[0][name]), name
        with pytest.raises((ValueError, IndexError)):
            opt.step(x, y + 5)  # labels out of range
        again = snapshot(net)
        assert before[1] == again[1] and all(torch.equal(after[0][k], t) for k, t in again[0].items())  # a step that raises moves nothing


def test_what_is_not_finite_is_said_and_not_taken():
    q = Problem("gaussian")
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, generator=gen())
    opt.step(q.x, q.y)
    mean, precision = opt.mean, opt.precision().diagonal()
    x = q.x.clone()
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="x"):
        opt.step(x, q.y)
    y = q.y.clone()
    y[0, 0] = torch.inf
    with pytest.raises((ValueError, FloatingPointError)):
        opt.step(q.x, y)
    with pytest.raises(ValueError, match="0 rows"):
        opt.step(q.x[:0], q.y[:0])
    with pytest.raises(TypeError, match="step\\(x, y\\)"):
        opt.step()
    with pytest.raises(TypeError, match="step\\(x, y\\)"):
        opt.step(lambda: 1.0)
    torch.testing.assert_close((opt.mean, opt.precision().diagonal()), (mean, precision), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"lr": 2.0}, ValueError, "lr=2.0"),
        ({"lr": 0.0}, ValueError, "lr=0.0"),
        ({"lr": "fast"}, (TypeError, ValueError), "lr='fast'"),
        ({"lr": True}, ValueError, "lr=True"),
        ({"lr": math.nan}, ValueError, "lr=nan"),
        ({"precision_lr": 1.5}, ValueError, "precision_lr"),
        ({"precision_lr": "x"}, (TypeError, ValueError), "precision_lr='x'"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": None}, (TypeError, ValueError), "temperature=None"),
        ({"every": 0}, ValueError, "every"),
        ({"num_data": 0}, ValueError, "num_data"),
        ({"num_data": 8.0}, ValueError, "num_data"),
        ({"curvature": rules.Laplace()}, TypeError, "curvature"),
        ({"curvature": rules.GaussNewton}, TypeError, "class GaussNewton"),
        ({"expectation": optim.Draws}, TypeError, "class Draws"),
        ({"expectation": "draws"}, TypeError, "expectation"),
        ({"likelihood": likelihoods.Categorical}, TypeError, "class Categorical"),
        ({"likelihood": "categorical"}, TypeError, "likelihood"),
        ({"model": nn.Linear(1, 1)}, TypeError, "models.Network"),
        ({"expectation": optim.Reparameterized(), "curvature": rules.GaussNewton()}, TypeError, "Leave it out"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, error, words):
    q = Problem("categorical")
    right = {"model": q.model(ggn.Diag), "likelihood": q.likelihood, "num_data": 8}
    with pytest.raises(error, match=words):
        optim.Variational(**(right | options))


@pytest.mark.parametrize("structure", [ggn.Gram(), ggn.Gram(inducing=3), ggn.MatrixFree(), ggn.EigenKron()], ids=repr)
def test_structures_without_a_running_average_are_refused_before_any_step(structure):
    q = Problem("categorical")
    for expectation in (optim.AtMean(), optim.Draws(1), optim.Linearized()):
        with pytest.raises((ValueError, TypeError), match=type(structure).__name__):
            optim.Variational(q.model(structure), q.likelihood, 8, expectation=expectation)


def test_reparameterized_takes_diag_alone():
    q = Problem("categorical")
    with pytest.raises(TypeError, match="ggn.Diag"):
        optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=optim.Reparameterized())


def test_what_an_expectation_cannot_serve_is_refused_before_any_step():
    q = Problem("categorical")
    with pytest.raises(TypeError, match="optim.Draws"):
        optim.Variational(q.model(ggn.Hessian), q.likelihood, 8, rules.Exact(), optim.Linearized())
    for curvature in (rules.QuasiNewton(), rules.Riemann()):
        opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, curvature)
        with pytest.raises(TypeError, match=r"turn.*bgn\.bayes_newton"):
            opt.step(q.x, q.y)


def test_before_the_first_step_there_is_no_belief():
    q = Problem("categorical")
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8)
    for ask in (opt.precision, opt.kl, lambda: opt.posterior((q.x, q.y)), lambda: opt.elbo((q.x, q.y)), lambda: opt.tune((q.x, q.y))):
        with pytest.raises(RuntimeError, match="before the first step"):
            ask()
    assert "Variational" in repr(opt)


def test_a_replaced_parameter_is_noticed():
    q = Problem("categorical")
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8)
    opt.net.load_state_dict({k: v.clone() for k, v in q.net.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="replaced"):
        opt.step(q.x, q.y)


# -- what a reading found ----------------------------------------------------------------------------------------------------------


def test_hyperparameters_that_are_set_are_followed():
    q = Problem("gaussian")
    opt, fresh = (optim.Variational(q.model(ggn.Full), q.likelihood, 8, expectation=optim.Linearized(), generator=gen()) for _ in range(2))
    opt.step(q.x, q.y), fresh.step(q.x, q.y)
    before = opt.elbo((q.x, q.y))
    for o in (opt, fresh):
        o.prior.precision, o.likelihood.noise = 30.0, 1.5
    fresh._precision = None  # worked out anew in any case
    assert float(opt.elbo((q.x, q.y))) == pytest.approx(float(fresh.elbo((q.x, q.y))), rel=1e-12) != float(before)


def test_the_bound_is_of_all_data_and_a_batch_no_more_than_all():
    q = Problem()
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, generator=gen())
    opt.step(q.x[:4], q.y[:4])
    for ask in (opt.elbo, opt.objective, opt.posterior):
        with pytest.raises(ValueError, match="5 data but num_data=8"):
            ask((q.x[:5], q.y[:5]))
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 6, generator=gen())
    with pytest.raises(ValueError, match="a batch of 8 data, but num_data=6"):
        opt.step(q.x, q.y)


def test_the_bound_of_a_loader_does_not_depend_on_its_order():
    q = Problem(n=12)
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 12, generator=gen())
    opt.step(q.x, q.y)
    data = torch.utils.data.TensorDataset(q.x, q.y)
    found = [float(opt.elbo(torch.utils.data.DataLoader(data, 5, shuffle=True, generator=gen(s)), 4, gen(3))) for s in range(3)]
    assert found == pytest.approx([float(opt.elbo((q.x, q.y), 4, gen(3)))] * 3, rel=1e-12)


def test_a_scheduler_that_leaves_the_unit_interval_is_refused():
    q = Problem()
    opt = optim.Variational(q.model(ggn.Diag), q.likelihood, 8, lr=0.9, generator=gen())
    opt.step(q.x, q.y)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 3.0)
    before = opt.snapshot()
    with pytest.raises(ValueError, match="expected a part of a natural-gradient step"):
        opt.step(q.x, q.y)
    assert torch.equal(opt.mean, before["mean"])


def test_a_step_that_fails_in_its_solve_leaves_all_as_it_was(monkeypatch):
    q = Problem()
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8, momentum=0.5, generator=gen())
    opt.step(q.x, q.y)
    mean, H, velocity = opt.mean, opt.curvature.tensors()["H"].clone(), opt._velocity.clone()
    monkeypatch.setattr(opt, "_direction", lambda *_: torch.full_like(mean, math.nan))
    with pytest.raises(FloatingPointError, match="not finite"):
        opt.step(q.x, q.y)
    assert torch.equal(opt.mean, mean) and torch.equal(opt.curvature.tensors()["H"], H) and torch.equal(opt._velocity, velocity)


def test_a_generator_is_a_generator_and_draws_a_number():
    q = Problem()
    with pytest.raises(TypeError, match="manual_seed"):
        optim.Variational(q.model(ggn.Full), q.likelihood, 8, generator=0)
    opt = optim.Variational(q.model(ggn.Full), q.likelihood, 8)
    opt.step(q.x, q.y)
    with pytest.raises(ValueError, match="draws=0"):
        opt.elbo((q.x, q.y), draws=0)


def test_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match="steps below their rounding"):
        optim.Variational(models.Network(nn.Linear(2, 1).bfloat16().eval(), structure=ggn.Diag), likelihoods.Bernoulli(), 8)
