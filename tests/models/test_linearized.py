"""The posterior of a linearised network beside dense algebra: weights, functions, evidence, what a structure may and may not move, and manners."""

import math

import gpytorch
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from tests.models.problems import Problem, assert_moments, close, inputs, mlp, of
from tests.oracles import dense

D = torch.float64
EXACT = {"Full": ggn.Full(), "Gram": ggn.Gram(), "MatrixFree": ggn.MatrixFree(tol=1e-13, probes=10**4), "LowRank": ggn.LowRank(rank=100)}
PROJECTED = {"Kron": ggn.Kron(), "EigenKron": ggn.EigenKron(), "Layerwise": ggn.Layerwise(), "Diag": ggn.Diag(), "subset": ggn.Gram(subset=5)}
APPROXIMATE = PROJECTED | {"LowRank": ggn.LowRank(rank=3), "inducing": ggn.Gram(inducing=4)}
FAMILIES = ["gaussian", "heteroscedastic", "categorical", "bernoulli", "poisson", "student-t", "student-t-2"]
GH = rules.GaussHermite(8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def each(structures: dict, name: str = "structure"):
    return pytest.mark.parametrize(name, structures.values(), ids=structures.keys())


def at_the_mode(problem: Problem, precision: float = 0.7) -> models.WeightPrior:
    """The prior under which the net's weights are the exact mode: its mean is θ* − P⁻¹ ∇ log p(y | f)."""
    f = problem.likelihood.rows(problem.net(problem.x))
    slope = torch.autograd.grad(problem.likelihood.log_prob(f, problem.y).sum(), list(problem.net.parameters()))
    return models.WeightPrior(precision, {name: (p - g / precision).detach() for (name, p), g in zip(problem.net.named_parameters(), slope)})


def start(problem: Problem, structure=None, prior=None, rule=None, **options):
    model = models.Network(problem.net, prior=prior, structure=ggn.Full() if structure is None else structure)
    return model.start(problem.likelihood, (problem.x, problem.y), rule, **options)


class Linear:
    """f* [N c] and J [N c p] of a net by torch.func, and dense weight-space algebra for sites."""

    def __init__(self, net: nn.Module, x, rows=lambda f: f) -> None:
        weights = {k: p.detach() for k, p in net.named_parameters()}
        answer = lambda w: rows(functional_call(net, w, (x,))).flatten(0, -2)
        self.θ = torch.cat([p.reshape(-1) for p in weights.values()])
        self.f = answer(weights).detach()
        J = jacrev(answer)(weights)
        self.J = torch.cat([J[k].flatten(2) for k in weights], -1).detach()

    def H(self, Λ):
        return torch.einsum("nap,nab,nbq->pq", self.J, Λ, self.J)

    def mean_and_cov(self, sites, P, μ):
        """θ̄ and Σ for the prior N(μ, diag(P)⁻¹)."""
        A = self.H(sites.nat2) + torch.diag(P)
        f0 = self.f - self.J @ self.θ  # f_lin at θ = 0
        b = torch.einsum("nap,na->p", self.J, sites.nat1 - (sites.nat2 @ f0[..., None])[..., 0]) + P * μ
        return torch.linalg.solve(A, b), torch.linalg.inv(A)

    def at(self, θ):
        return self.f + self.J @ (θ - self.θ)


def random_sites(f, seed=3):
    """PSD sites of any rank, some of them zero."""
    g = seeded(seed)
    root = torch.randn(*f.shape, f.shape[-1], dtype=D, generator=g) * torch.randint(2, (len(f), 1, 1), generator=g)
    return rules.Sites(torch.randn(f.shape, dtype=D, generator=g), root @ root.mT)


def prior_of(problem: Problem, kind: str) -> tuple[models.WeightPrior, torch.Tensor, torch.Tensor]:
    """A prior, and its P [p] and μ [p]."""
    net, p = problem.net, len(dense.vector(problem.net))
    if kind == "scalar":
        return models.WeightPrior(0.6, 0.3), torch.full((p,), 0.6, dtype=D), torch.full((p,), 0.3, dtype=D)
    if kind == "layers":
        sizes = torch.tensor([sum(q.numel() for q in m.parameters()) for m in net if list(m.parameters())])
        P = torch.tensor([0.4, 2.0], dtype=D)
        return models.WeightPrior.per_layer(net, P), P.repeat_interleave(sizes), torch.zeros(p, dtype=D)
    P = torch.linspace(0.3, 3.0, p, dtype=D)
    return models.WeightPrior.per_weight(net, P), P, torch.zeros(p, dtype=D)


# -- given sites -------------------------------------------------------------------------------------------------------------


@each(EXACT)
@pytest.mark.parametrize("kind", ["scalar", "layers", "weights"])
@pytest.mark.parametrize("family", ["student-t", "categorical"])
def test_the_belief_of_sites_is_the_dense_one(family, kind, structure):
    problem = of(family)
    linear = Linear(problem.net, problem.x)
    prior, P, μ = prior_of(problem, kind)
    sites = random_sites(linear.f)
    posterior = start(problem, structure, prior, sites=sites)
    θ, Σ = linear.mean_and_cov(sites, P, μ)
    close(posterior.mean, θ)
    close(posterior.weight_variance(), Σ.diagonal(), 1e-7)
    q = posterior.marginals()
    close(q.mean, linear.at(θ))
    close(q.cov, linear.J @ Σ @ linear.J.mT, 1e-7)
    # The evidence under Laplace: log p + log N(θ̄; μ, P⁻¹) + p/2 log 2π − ½ log det, whatever the sites.
    wanted = dense.log_evidence(problem.likelihood.log_prob(linear.at(θ), problem.y).sum(), θ, μ, P, linear.H(sites.nat2))
    close(posterior.log_evidence().detach(), wanted.detach(), 1e-7)
    close(posterior.log_likelihood().detach(), problem.likelihood.log_prob(linear.at(θ), problem.y).sum().detach())
    x = inputs(4, seed=9)
    there, f = Linear(problem.net, x), posterior(x)
    close(f.mean, there.at(linear_shift(there, linear, θ)))
    close(f.covariance_matrix, torch.einsum("nap,pq,mbq->namb", there.J, Σ, there.J).flatten(0, 1).flatten(1), 1e-7)
    close(f.marginals()[1], there.J @ Σ @ there.J.mT, 1e-7)


def linear_shift(there: Linear, here: Linear, θ):
    assert torch.equal(there.θ, here.θ)
    return θ


@each(APPROXIMATE)
def test_no_structure_moves_the_mean_at_given_sites(structure):
    problem = of("categorical")
    linear = Linear(problem.net, problem.x)
    sites = random_sites(linear.f)
    posterior = start(problem, structure, models.WeightPrior(0.6), sites=sites)
    θ, _ = linear.mean_and_cov(sites, torch.full_like(linear.θ, 0.6), torch.zeros_like(linear.θ))
    close(posterior.mean, θ)
    close(posterior.marginals().mean, linear.at(θ))
    # The covariance is the structure's: that of H̃ fitted to the same JᵀS by bgn.ggn alone.
    lin = posterior.linearizer(problem.x, problem.likelihood.rows)
    S = dense.psd_root(sites.nat2)

    class Stream:
        def __iter__(self):
            yield posterior.linearizer(problem.x, problem.likelihood.rows), S

    H = structure.start(posterior.linearizer.blocks, θ)
    H.fit(Stream())
    precision = H.with_prior(posterior.prior.of(H.blocks), torch.ones((), dtype=D))
    close(posterior.marginals().cov, precision.covariance(lin.factors()).detach(), 1e-7)


@pytest.mark.parametrize(
    "family, structure",
    [(family, s) for family in ("heteroscedastic", "categorical") for s in (EXACT | APPROXIMATE).values()]
    + [(family, ggn.Full()) for family in ("bernoulli", "student-t", "poisson", "gaussian")],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_at_the_mode_it_is_bgn_laplace(family, structure):
    """Before the first turn and after it, and whatever the curvature: posterior, evidence and predictions to 1e-9."""
    problem = of(family)
    prior, x = at_the_mode(problem), inputs(3, seed=9)
    for curvature in (rules.GaussNewton(), rules.Exact()):
        rule = rules.Laplace(curvature)
        wanted = bgn.laplace(models.Network(problem.net, prior, structure), problem.likelihood, (problem.x, problem.y), rule, progress=False)
        first = start(problem, structure, prior, rule)
        after = bgn.bayes_newton(
            models.Network(problem.net, prior, structure), problem.likelihood, (problem.x, problem.y), rule, steps=1, lr=1.0, progress=False
        )
        for found in (first, after) if isinstance(curvature, rules.GaussNewton) else (after,):
            close(found.mean, wanted.mean, 1e-9)
            close(found.log_evidence().detach(), wanted.log_evidence().detach(), 1e-9)
            close(found(x).mean, wanted(x).mean, 1e-9)
            close(found(x).covariance_matrix, wanted(x).covariance_matrix, 1e-9 if structure not in (EXACT["MatrixFree"],) else 1e-7)


@each({k: s for k, s in (EXACT | APPROXIMATE).items() if k != "MatrixFree"})
def test_under_laplace_every_structure_ends_at_the_mode_of_the_linearised_model(structure):
    """From a net that is nowhere near its MAP."""
    problem = of("categorical", n=15)
    labels = torch.arange(15) % 4
    problem = problem._replace(y=labels)
    linear = Linear(problem.net, problem.x)
    model = models.Network(problem.net, models.WeightPrior(0.5), structure)
    posterior = bgn.bayes_newton(model, problem.likelihood, (problem.x, labels), steps=60, lr=1.0, progress=False)
    θ = linear.θ.clone()
    for _ in range(50):  # Newton's method on the dense concave objective
        f = linear.at(θ)
        slope = torch.einsum("nap,na->p", linear.J, nn.functional.one_hot(labels, 4) - f.softmax(-1)) - 0.5 * θ
        θ = θ + torch.linalg.solve(linear.H(dense.softmax_ggn(f)) + 0.5 * torch.eye(len(θ), dtype=D), slope)
    assert (θ - linear.θ).abs().max() > 0.3
    close(posterior.mean, θ, 1e-5)


@each({k: s for k, s in EXACT.items() if k != "MatrixFree"})
def test_gaussian_noise_is_exact_in_one_step(structure):
    """The linearised net under Gaussian noise is Bayesian linear regression on J."""
    net, x, noise, P = mlp(2), inputs(12), 0.2, 0.7
    y = net(x).detach() + torch.randn(12, 2, dtype=D, generator=seeded())
    model = models.Network(net, models.WeightPrior(P), structure)
    likelihood = likelihoods.Gaussian(torch.tensor(noise, dtype=D))
    linear = Linear(net, x)
    Φ = linear.J.flatten(0, 1)
    target = (y - linear.f + linear.J @ linear.θ).reshape(-1)
    K = Φ @ Φ.mT / P + noise * torch.eye(24, dtype=D)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(24, dtype=D), K).log_prob(target)
    for rule in (rules.Laplace(), rules.Variational(), rules.PowerEP(0.5), rules.PowerEP(1.0)):
        for sites in (None, rules.Sites.flat(12, 2, x)):
            posterior = bgn.bayes_newton(model, likelihood, (x, y), rule, steps=1, lr=1.0, sites=sites, progress=False)
            close(posterior.mean, Φ.mT @ torch.linalg.solve(K, target) / P, 1e-7)
            close(posterior.log_evidence().detach(), evidence, 1e-7)


def test_going_on_from_a_posterior():
    """Two turns and three more are five; the posterior that was left stays; another rule may take over."""
    problem = of("student-t")
    args = models.Network(problem.net, structure=ggn.Kron), problem.likelihood, (problem.x, problem.y), rules.Variational(cubature=GH)
    fit = lambda steps: bgn.bayes_newton(*args, steps=steps, lr=0.7, progress=False)
    first = fit(2)
    mean, energy = first.mean.clone(), float(first.log_evidence().detach())
    more = bgn.bayes_newton(first, steps=3, lr=0.7, progress=False)
    close(more.mean, fit(5).mean, 1e-9)
    close(first.mean, mean, 1e-12)
    more.prior.precision = 7.0
    assert float(first.log_evidence().detach()) == pytest.approx(energy, rel=1e-12)
    other = bgn.bayes_newton(first, rule=rules.Laplace(), steps=30, lr=1.0, progress=False)
    close(other.mean, bgn.bayes_newton(*args[:3], rules.Laplace(), steps=30, lr=1.0, progress=False).mean, 1e-5)


# -- evidence ----------------------------------------------------------------------------------------------------------------


@each(EXACT | PROJECTED | {"inducing": ggn.Gram(inducing=4)})
def test_the_variational_evidence_is_the_bound_of_its_own_gaussian(structure):
    """E_q log p(y | f) − KL(N(θ̄, Σ̃) ‖ prior), for every structure: by gpytorch's quadrature and torch's KL."""
    problem = of("bernoulli")
    linear = Linear(problem.net, problem.x)
    posterior = start(problem, structure, models.WeightPrior(0.6), rules.Variational(cubature=rules.GaussHermite(40)), sites=random_sites(linear.f))
    p = len(linear.θ)
    Σ = posterior.precision().solve(torch.eye(p, dtype=D)).detach()
    N = torch.distributions.MultivariateNormal
    q, prior = N(posterior.mean, (Σ + Σ.mT) / 2), N(torch.zeros(p, dtype=D), torch.eye(p, dtype=D) / 0.6)
    f, width = linear.at(posterior.mean)[:, 0], torch.einsum("nap,pq,naq->n", linear.J, Σ, linear.J).sqrt()
    quadrature = gpytorch.utils.quadrature.GaussHermiteQuadrature1D(60).double()
    sign = 2.0 * problem.y.reshape(-1).double() - 1
    expected = quadrature(lambda f: nn.functional.logsigmoid(sign * f), torch.distributions.Normal(f, width)).sum()
    bound = expected - torch.distributions.kl_divergence(q, prior)
    close(posterior.log_evidence().detach(), bound, 1e-6)


class OneLayer(nn.Module):
    """Two weights and a bias: evidence by quadrature over weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, -0.5]]))
            self.layer.bias.fill_(0.2)

    def forward(self, x):
        return self.layer(x)


def true_evidence(x, y, likelihood, P, mean, cov) -> float:
    """log ∫ N(θ; 0, 1/P) Π p(y_n | f_n) dθ by the trapezoidal rule within seven standard deviations of a Gaussian near the posterior."""
    axis = torch.linspace(-7, 7, 57, dtype=D)
    θ = mean + torch.cartesian_prod(axis, axis, axis) @ torch.linalg.cholesky(cov).mT
    log_cell = 3 * (axis[1] - axis[0]).log() + 0.5 * torch.linalg.slogdet(cov).logabsdet
    f = x @ θ[:, :2].mT + θ[:, 2]
    log_p = likelihood.log_prob(f.mT[..., None], y.expand(len(θ), *y.shape)).sum(-1)
    return float(torch.logsumexp(log_p + 1.5 * math.log(P / (2 * math.pi)) - 0.5 * P * θ.square().sum(-1) + log_cell, 0))


@pytest.mark.parametrize("kind", ["bernoulli", "student-t"])
def test_refinement_raises_the_bound_towards_the_true_evidence(kind):
    """ELBO of Laplace's Gaussian ≤ ELBO of the variational one ≤ log evidence, and EP is nearer than both."""
    net, x, P = OneLayer().eval(), inputs(15), 0.5
    if kind == "bernoulli":
        likelihood, y = likelihoods.Bernoulli(), (net(x) + torch.randn(15, 1, dtype=D, generator=seeded()) > 0).double().detach()
    else:
        likelihood, y = likelihoods.StudentT(3.0, 0.3).double(), net(x).detach() + 0.3 * torch.randn(15, 1, dtype=D, generator=seeded())
        y[:2] += 4.0  # outliers
    log_prob = lambda: likelihood.log_prob(net(x), y).sum() - 0.5 * P * sum(p.square().sum() for p in net.parameters())
    opt = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        (loss := -log_prob()).backward()
        return loss

    opt.step(closure)
    net.zero_grad()
    model = models.Network(net, models.WeightPrior(P), ggn.Full)
    fit = lambda rule: bgn.bayes_newton(model, likelihood, (x, y), rule, steps=100, progress=False)
    cubature = rules.GaussHermite(40)
    vi, ep = fit(rules.Variational(rules.Exact(), cubature)), fit(rules.PowerEP(1.0, rules.Exact(), cubature))
    # The same functional at Laplace's own Gaussian.
    at_laplace = vi.trace.energy[0]
    laplace = bgn.laplace(model, likelihood, (x, y), progress=False)
    q = rules.Marginals(laplace(x).mean, laplace(x).marginals()[1])
    f, w = cubature(q.mean, q.cov)
    expected = torch.einsum("q,qn->", w, likelihood.log_prob(f, y.expand(len(f), *y.shape)))
    Σ = laplace.precision().solve(torch.eye(3, dtype=D)).detach()
    truth = true_evidence(x, y, likelihood, P, laplace.mean, 1.5 * Σ)
    N = torch.distributions.MultivariateNormal
    kl = torch.distributions.kl_divergence(N(laplace.mean, (Σ + Σ.mT) / 2), N(torch.zeros(3, dtype=D), torch.eye(3, dtype=D) / P))
    assert abs(at_laplace - float(expected - kl)) < 1e-6
    assert at_laplace + 1e-3 < vi.trace.energy[-1] < truth - 1e-3
    if kind == "bernoulli":  # (an outlier's exact site would be a negative precision, which is left out)
        assert abs(ep.trace.energy[-1] - truth) < 0.8 * (truth - vi.trace.energy[-1])
    assert abs(ep.trace.energy[-1] - truth) < 0.03


@each({"Full": ggn.Full(), "Gram": ggn.Gram(), "Kron": ggn.Kron(), "Diag": ggn.Diag(), "LowRank": ggn.LowRank(rank=3)})
@pytest.mark.parametrize(
    "rule", [rules.Laplace(), rules.Variational(cubature=GH), rules.PowerEP(0.5, cubature=rules.GaussHermite(150))], ids=lambda r: type(r).__name__
)
def test_the_evidence_is_differentiable_at_fixed_sites(rule, structure):
    problem = of("student-t")
    prior = models.WeightPrior.per_layer(problem.net, torch.tensor([0.4, 2.0]))
    posterior = start(problem, structure, prior, rule)
    parameters = posterior.hyperparameters()
    assert len(parameters) == 3
    value = posterior.log_evidence()
    found = torch.autograd.grad(value, parameters)
    for p, g in zip(parameters, found):
        before = p.detach().clone()

        def at(z, p=p):
            with torch.no_grad():
                p.copy_(z)
                return posterior.log_evidence()

        close(g, dense.finite_difference(at, before, 1e-5), 1e-5)
        with torch.no_grad():
            p.copy_(before)
    close(posterior.log_evidence().detach(), value.detach(), 1e-12)


def test_answers_follow_the_prior():
    """A prior changed in place is a posterior made with that prior."""
    problem = of("categorical")
    sites = random_sites(problem.net(problem.x).detach())
    posterior = start(problem, ggn.Kron(), models.WeightPrior(0.6), rules.Variational(cubature=GH), sites=sites)
    posterior(problem.x).variance, posterior.log_evidence()
    posterior.prior.precision = 2.0
    again = start(problem, ggn.Kron(), models.WeightPrior(2.0), rules.Variational(cubature=GH), sites=sites)
    x = inputs(3, seed=9)
    close(posterior.mean, again.mean, 1e-9)
    close(posterior(x).mean, again(x).mean, 1e-9)
    close(posterior(x).covariance_matrix, again(x).covariance_matrix, 1e-9)
    close(posterior.marginals().cov, again.marginals().cov, 1e-9)
    close(posterior.log_evidence().detach(), again.log_evidence().detach(), 1e-9)


def outliers(n: int = 20) -> Problem:
    """A Student-t regression on the answers of a net with large weights, some targets far off."""
    net, x = mlp(1), inputs(n)
    with torch.no_grad():
        net[0].weight.mul_(3), net[2].weight.mul_(3)
        y = net(x) + 0.2 * torch.randn(n, 1, dtype=D, generator=seeded())
    y[::7] += 3.0
    return Problem(net, x, y, likelihoods.StudentT(3.0, 0.3).double())


@pytest.mark.parametrize("rule", [rules.Laplace(), rules.Variational(cubature=GH)], ids=["Laplace", "Variational"])
def test_maximize_evidence_finds_the_best_prior(rule):
    """The optimum over priors, each refined to its fixed point from the start."""
    problem = outliers()
    problem.likelihood.requires_grad_(False)
    data = (problem.x, problem.y)
    posterior = bgn.bayes_newton(models.Network(problem.net, structure=ggn.Full), problem.likelihood, data, rule, steps=5, progress=False)
    trace = bgn.maximize_evidence(posterior, progress=False)
    assert trace.converged and trace.evidence == sorted(trace.evidence) and trace.evidence[-1] > trace.evidence[0] + 0.1

    def refined(log_precision: float) -> float:
        model = models.Network(problem.net, models.WeightPrior(math.exp(log_precision)), ggn.Full)
        return bgn.bayes_newton(model, problem.likelihood, data, rule, steps=60, lr=1.0, tol=1e-9, progress=False).trace.energy[-1]

    best = float(posterior.prior.log_precision)
    low, at, high = (refined(best + h) for h in (-0.05, 0.0, 0.05))
    assert abs(float(posterior.log_evidence().detach()) - at) < 1e-6 * abs(at)
    assert at > max(low, high)
    assert abs(0.05 * (low - high) / (low - 2 * at + high) / 2) < 5e-3  # the vertex of the parabola through the three


def test_maximize_evidence_tunes_the_likelihood_too():
    problem = outliers(12)
    args = models.Network(problem.net, structure=ggn.Full), problem.likelihood, (problem.x, problem.y)
    posterior = bgn.bayes_newton(*args, rules.Variational(cubature=GH), steps=30, progress=False)
    before, scale = float(posterior.log_evidence().detach()), float(posterior.likelihood.scale)
    trace = bgn.maximize_evidence(posterior, steps=3, progress=False)
    assert trace.evidence[-1] > before + 0.1 and abs(float(posterior.likelihood.scale) - scale) > 1e-3
    assert trace.evidence[-1] == pytest.approx(float(posterior.log_evidence().detach()), rel=1e-6)


def test_maximize_evidence_refuses():
    problem = of("bernoulli")
    posterior = start(problem, ggn.Kron(), rule=rules.PowerEP(0.5))
    with pytest.raises(ValueError, match=r"energy of PowerEP.* with those of Kron.*ggn.Full"):
        bgn.maximize_evidence(posterior)
    with pytest.raises(ValueError, match="holds its data"):
        bgn.maximize_evidence(start(problem), data=(problem.x, problem.y))
    with pytest.raises(ValueError, match="nothing to tune"):
        bgn.maximize_evidence(start(problem), prior=False)


# -- draws -------------------------------------------------------------------------------------------------------------------


@each({"Full": ggn.Full(), "Kron": ggn.Kron()})
def test_draws(structure):
    problem = of("categorical")
    posterior = start(problem, structure, sites=random_sites(problem.net(problem.x).detach()))
    x = inputs(2, seed=9)
    Σ = posterior.precision().solve(torch.eye(len(posterior.mean), dtype=D)).detach()
    assert_moments(posterior.sample_weights(20_000, seeded(1)), posterior.mean, Σ)
    f = posterior(x)
    assert_moments(posterior.sample_outputs(x, 20_000, seeded(2)).flatten(1), f.mean.reshape(-1), f.covariance_matrix)
    # One draw of the functions is the linearised model at one draw of the weights.
    linear, functions = Linear(problem.net, x), posterior.sample_functions(4, seeded(3))
    θ = posterior.sample_weights(4, seeded(3))
    close(functions(x), torch.stack([linear.at(t) for t in θ]), 1e-10)
    close(functions(x[:1]), functions(x)[:, :1], 1e-10)
    close(posterior.sample_outputs(x, 4, seeded(3)), functions(x), 1e-12)


def test_gradients_to_the_inputs():
    problem = of("student-t")
    posterior = start(problem, sites=random_sites(problem.net(problem.x).detach()))
    x = inputs(3, seed=9)
    for what in (lambda f: f.mean.sum(), lambda f: f.variance.sum(), lambda f: f.covariance_matrix.sum()):
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(what(posterior(at)), at)
        close(g, dense.finite_difference(lambda z, what=what: what(posterior(z)), x, 1e-6), 1e-6)
    assert all(p.grad is None for p in problem.net.parameters())


def test_what_else_works_on_it(generator):
    """Comparing, tuning by held-out data, and mixing, as for any posterior of a network."""
    problem = of("categorical", n=30)
    data = (problem.x, problem.y)
    model = models.Network(problem.net, structure=ggn.Kron)
    fit = lambda: bgn.bayes_newton(model, problem.likelihood, data, rules.Laplace(), steps=5, progress=False)
    posterior = fit()
    nll = lambda: -float(posterior.likelihood(posterior(problem.x)).log_prob(problem.y).mean())
    before = nll()
    comparison = bgn.compare(posterior, data, temperature_data=data, warn=False)
    assert comparison.rows["posterior"]["nll"] == pytest.approx(before, rel=1e-5)
    mixed = bgn.mixture([posterior, fit()])
    close(mixed(problem.x).probs, posterior.likelihood(posterior(problem.x)).probs, 1e-9)
    bgn.tune(posterior, data)
    assert nll() < before
