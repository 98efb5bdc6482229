"""Every rule on a linearised network: it is the Gaussian process with the kernel J P⁻¹ Jᵀ, step by step; and what refinement gains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from tests.models.problems import close, inputs, mlp

D = torch.float64
GH = rules.GaussHermite(8)


def every_rule() -> list[rules.Expansion]:
    """Every expansion there is, with every curvature that keeps no history and draws nothing."""
    out: list[rules.Expansion] = [rules.Laplace(), rules.Laplace(rules.Exact()), rules.Laplace(rules.EmpiricalFisher())]
    for curvature in (rules.GaussNewton(), rules.Exact()):
        out += [rules.Variational(curvature, GH), rules.PowerEP(0.5, curvature, GH), rules.PowerEP(1.0, curvature, GH)]
    for name, options in (("PosteriorLinearization", {"cubature": GH}), ("PosteriorLinearization2", {"cubature": GH}), ("Taylor", {})):
        if hasattr(rules, name):
            out.append(getattr(rules, name)(**options))
    if hasattr(rules, "QuasiNewton"):
        out.append(rules.Variational(rules.QuasiNewton(), GH))
    return out


class Dense:
    """The belief of a Gaussian process with prior covariance K [N c, N c] and mean [N c], in the loop of bayes_newton: textbook algebra."""

    def __init__(self, K, mean, y, likelihood, rule, sites):
        self.K, self.m, self.y, self.likelihood, self.rule, self.sites = K, mean, y, likelihood, rule, sites
        self.num_data = len(y)

    def _solve(self):
        Λ = torch.block_diag(*self.sites.nat2)
        A = torch.eye(len(Λ), dtype=D) + self.K @ Λ
        return Λ, torch.linalg.solve(A, self.K), torch.linalg.slogdet(A).logabsdet

    def marginals(self):
        N, c = self.m.shape
        Λ, Σ, _ = self._solve()
        mean = self.m + (Σ @ (self.sites.nat1.reshape(-1) - Λ @ self.m.reshape(-1))).reshape(N, c)
        blocks = Σ.reshape(N, c, N, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return rules.Marginals(mean, 0.5 * (blocks + blocks.mT))

    def log_evidence(self):
        Λ, Σ, logdet = self._solve()
        g = self.sites.nat1.reshape(-1) - Λ @ self.m.reshape(-1)
        log_Z = self.sites.log_at(self.m).sum() + 0.5 * g @ Σ @ g - 0.5 * logdet
        return log_Z + self.rule.term(self.likelihood, self.marginals(), self.y, self.sites).sum()

    def turn(self, lr, batch=None, generator=None):
        turn = self.rule(self.likelihood, self.marginals(), self.y, self.sites, lr, generator)
        return Dense(self.K, self.m, self.y, self.likelihood, self.rule, turn.sites), turn


def jacobian(net, x):
    """f* [n c] and J [n c p] by torch.func."""
    weights = {k: p.detach() for k, p in net.named_parameters()}
    J = jacrev(lambda w: functional_call(net, w, (x,)))(weights)
    return net(x).detach(), torch.cat([J[k].flatten(2) for k in weights], -1).detach()


def problem(kind: str):
    g = torch.Generator().manual_seed(0)
    n, x = 14, inputs(14)
    noise = torch.randn(n, 1, dtype=D, generator=g)
    if kind.startswith("classes"):
        c = int(kind[-1])
        net = mlp(c)
        return net, x, (net(x) + torch.randn(n, c, dtype=D, generator=g)).argmax(-1), likelihoods.Categorical()
    if kind == "student-t":
        net = mlp(1)
        y = net(x).detach() + 0.3 * noise
        y[::5] += 3.0
        return net, x, y, likelihoods.StudentT(3.0, 0.3).double()
    net = mlp(2)
    return net, x, net(x).detach()[:, :1] + 0.3 * noise, likelihoods.HeteroscedasticGaussian()


RULES = every_rule()


@pytest.mark.parametrize("structure", [ggn.Full(), ggn.Gram()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", ["classes 2", "classes 3", "student-t", "heteroscedastic"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_linearised_network_is_a_gaussian_process(rule, kind, structure):
    """Means, covariances and energy of every one of four steps from the prior, and the predictions after them."""
    net, x, y, likelihood = problem(kind)
    P, μ = 5.0 if kind == "heteroscedastic" else 0.7, 0.2  # (under a wide prior of the log variance E[1/variance] is astronomical)
    f, J = jacobian(net, x)
    θ = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    N, c, p = J.shape
    Φ = J.flatten(0, 1)
    at_prior = f + J @ (μ - θ)
    flat = rules.Sites.flat(N, c, f)
    likelihood.validate(f, y)
    targets = likelihood.targets(f, y)
    wanted = Dense(Φ @ Φ.mT / P, at_prior, targets, likelihood, rule, flat)
    found = models.Network(net, models.WeightPrior(P, μ), structure).start(likelihood, (x, y), rule, flat)
    for _ in range(4):
        q, q_ = found.marginals(), wanted.marginals()
        close(q.mean, q_.mean, 1e-8)
        close(q.cov, q_.cov, 1e-8)
        close(found.log_evidence().detach(), wanted.log_evidence().detach(), 1e-8)
        (found, turn), (wanted, turn_) = found.turn(0.7), wanted.turn(0.7)
        assert (turn.indefinite, turn.skipped) == (turn_.indefinite, turn_.skipped)
    x_new = inputs(3, seed=9)
    f_new, J_new = jacobian(net, x_new)
    Φ_new = J_new.flatten(0, 1)
    Λ, Σ, _ = wanted._solve()
    # K_*f K⁻¹ (…) written without an inverse of K, which is singular: h = nat1 − Λ m, mean = K_*f (I + Λ K)⁻¹ h.
    K_new = Φ_new @ Φ.mT / P
    h = wanted.sites.nat1.reshape(-1) - Λ @ at_prior.reshape(-1)
    B = torch.eye(len(Λ), dtype=D) + Λ @ wanted.K
    mean = (f_new + J_new @ (μ - θ)).reshape(-1) + K_new @ torch.linalg.solve(B, h)
    cov = Φ_new @ Φ_new.mT / P - K_new @ torch.linalg.solve(B, Λ) @ K_new.mT
    answer = found(x_new)
    close(answer.mean.reshape(-1), mean, 1e-8)
    close(answer.covariance_matrix, cov, 1e-7)


@pytest.mark.parametrize("rule", [rules.Laplace(), rules.Variational(cubature=GH), rules.PowerEP(0.5, cubature=GH)], ids=lambda r: type(r).__name__)
def test_one_output_is_bgn_models_gp(rule):
    """The same beside models.GP with the kernel of the linearised net, through the whole loop with its automatic steps."""
    import gpytorch

    net, x, y, likelihood = problem("student-t")
    f, J = jacobian(net, x)
    θ = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    class Tangent(gpytorch.kernels.Kernel):
        def forward(self, a, b, diag=False, **_):
            K = jacobian(net, a)[1][:, 0] @ jacobian(net, b)[1][:, 0].mT / 0.7
            return K.diagonal() if diag else K

    class AtPrior(gpytorch.means.Mean):
        def forward(self, a):
            f, J = jacobian(net, a)
            return (f - J @ θ)[:, 0]

    sites = rules.Sites.flat(len(x), 1, x)
    fit = lambda model: bgn.bayes_newton(model, likelihood, (x, y), rule, steps=8, sites=sites, progress=False)
    gp, network = fit(models.GP(Tangent(), AtPrior())), fit(models.Network(net, models.WeightPrior(0.7), ggn.Full))
    close(torch.tensor(network.trace.energy, dtype=D), torch.tensor(gp.trace.energy, dtype=D), 1e-8)
    x_new = inputs(3, seed=9)
    close(network(x_new).mean[:, 0], gp(x_new).mean.detach(), 1e-7)
    close(network(x_new).covariance_matrix, gp(x_new).covariance_matrix.detach(), 1e-7)


# -- what refinement gains ---------------------------------------------------------------------------------------------------


def train(net: nn.Module, likelihood, x, y, P: float) -> None:
    """To the MAP, by L-BFGS."""
    opt = torch.optim.LBFGS(net.parameters(), max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = -likelihood.log_prob(net(x), y).sum() + 0.5 * P * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    net.zero_grad(set_to_none=True)


def classification(n: int = 60):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centre = torch.stack([(2.1 * y).cos(), (2.1 * y).sin()], -1).double()
    x = centre + 0.6 * torch.randn(n, 2, dtype=D, generator=g)
    net = mlp(3, hidden=6)
    likelihood = likelihoods.Categorical()
    train(net, likelihood, x, y, 0.5)
    return net, x, y, likelihood


def regression(n: int = 50):
    """One in seven targets is an outlier."""
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(-3, 3, n, dtype=D)[:, None]
    y = torch.sin(2 * x) + 0.1 * torch.randn(n, 1, dtype=D, generator=g)
    y[::7] += 2.0
    net, likelihood = mlp(1, 1, 8), likelihoods.StudentT(3.0, 0.1).double().requires_grad_(False)
    train(net, likelihood, x, y, 0.5)
    return net, x, y, likelihood


@pytest.mark.parametrize("make, least", [(classification, 0.5), (regression, 0.03)])
def test_refinement_raises_its_energy_above_that_of_laplace(make, least):
    """E_q log p − KL(q ‖ prior) of Laplace's Gaussian, from bgn.laplace itself, and of the variational one; then of each structure."""
    net, x, y, likelihood = make()
    cubature = rules.GaussHermite(6) if make is classification else rules.GaussHermite(20)
    model = lambda structure: models.Network(net, models.WeightPrior(0.5), structure)
    laplace = bgn.laplace(model(ggn.Full), likelihood, (x, y), progress=False)
    fit = lambda rule, structure: bgn.bayes_newton(model(structure), likelihood, (x, y), rule, steps=40, tol=1e-4, progress=False)
    vi = fit(rules.Variational(cubature=cubature), ggn.Full)
    mean, cov = laplace(x).marginals()
    f, w = cubature(mean, cov)
    expected = torch.einsum("q,qn->", w, likelihood.log_prob(f, y.expand(len(f), *y.shape)))
    Σ = laplace.precision().solve(torch.eye(len(laplace.mean), dtype=D)).detach()
    N = torch.distributions.MultivariateNormal
    prior = N(torch.zeros_like(laplace.mean), torch.eye(len(Σ), dtype=D) / 0.5)
    bound = float(expected - torch.distributions.kl_divergence(N(laplace.mean, 0.5 * (Σ + Σ.mT)), prior))
    assert abs(bound - vi.trace.energy[0]) < 1e-3  # where it starts, but for what L-BFGS left of the slope
    assert vi.trace.energy[-1] > bound + least and vi.trace.energy[-1] > max(vi.trace.energy) - 1e-6
    ep = fit(rules.PowerEP(0.5, cubature=cubature), ggn.Full)
    assert ep.trace.converged and ep.trace.energy[-1] > vi.trace.energy[-1]
    for structure in (ggn.Kron, ggn.Layerwise, ggn.Diag):
        rough = fit(rules.Variational(cubature=cubature), structure)
        assert rough.trace.energy[0] + least < rough.trace.energy[-1] < vi.trace.energy[-1]


@pytest.mark.slow
def test_variational_gauss_newton_on_the_motorcycle_data():
    """One fold of the experiment: every rule raises its energy from Laplace's Gaussian, and its predictions beat the MAP's."""
    from bayesgn.datasets import DatasetUnavailable

    repro = pytest.importorskip("paper_repro.bayes_newton.network_motorcycle")
    try:
        found = repro.run(folds=1, precisions=(1.0,))
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    for name in ("VI, Gauss-Newton", "VI, heuristic PSD", "PEP 0.5, Gauss-Newton"):
        assert found[f"P 1: {name}: energy"] < found[f"P 1: {name}: energy at Laplace"] - 0.5
        assert found[f"P 1: {name}: NLPD"] < found["P 1: MAP: NLPD"]
    assert found["P 1: VI, heuristic PSD: energy"] < found["P 1: VI, Gauss-Newton: energy"]


def test_a_cycle_of_several_steps_is_broken():
    # Whole steps on these counts come round every four, none of which undoes the one before; short steps settle at once.
    net, x = mlp(1, hidden=8, seed=1), 2 * inputs(16)
    f = net(x).detach()[:, 0] + 0.3 * x[:, 1]
    data = x, (2 * f).exp().round()
    prior = models.WeightPrior.per_layer(net, torch.tensor([0.5, 2.0], dtype=torch.float64))
    model = models.Network(net, prior, ggn.Full)
    found = bgn.bayes_newton(model, likelihoods.Poisson(), data, rule=rules.Variational(), tol=1e-9, steps=300, progress=False)
    slow = bgn.bayes_newton(model, likelihoods.Poisson(), data, rule=rules.Variational(), lr=0.1, tol=1e-9, steps=400, progress=False)
    assert found.trace.converged and found.trace.steps > 40
    assert found.trace.energy[-1] == pytest.approx(slow.trace.energy[-1], abs=1e-6)
