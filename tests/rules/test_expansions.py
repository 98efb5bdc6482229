"""Every expansion with every curvature and every likelihood: slopes by autodiff, curvatures by their definitions, laws over random beliefs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn import likelihoods, rules
from bayesgn.rules import Marginals, Sites
from bayesgn.rules.integrals import log_integral
from tests.likelihoods.families import BY_NAME, FAMILIES

D = torch.float64
EXPANSIONS = {
    "laplace": rules.Laplace,
    "variational": rules.Variational,
    "ep": lambda c=None: rules.PowerEP(1.0, c),
    "power-ep": lambda c=None: rules.PowerEP(0.5, c),
    "pl": rules.PosteriorLinearization,
    "pl2": rules.PosteriorLinearization2,
    "taylor": rules.Taylor,
}
CURVATURES = {
    "gauss-newton": rules.GaussNewton,
    "exact": rules.Exact,
    "exact-abs": lambda: rules.Exact(rules.eigabs),
    "monte-carlo": lambda: rules.MonteCarloFisher(3),
    "empirical": rules.EmpiricalFisher,
    "identity": lambda: rules.Identity(2.0),
    "mean-field": lambda: rules.MeanField(rules.Exact()),
    "quasi-newton": rules.QuasiNewton,
    "riemann": rules.Riemann,
}
LINEAR = ("pl", "pl2", "taylor")  # need E[y | f] and Cov[y | f]
MOMENTS = [f for f in FAMILIES if f.density]
every_expansion = pytest.mark.parametrize("expansion", EXPANSIONS)
every_curvature = pytest.mark.parametrize("curvature", CURVATURES)
every_family = pytest.mark.parametrize("family", MOMENTS, ids=lambda f: f.name)


def belief(c: int, n: int = 4, size: float = 0.3, seed: int = 0) -> Marginals:
    g = torch.Generator().manual_seed(seed)
    A = size / c**0.5 * torch.randn(n, c, c, dtype=D, generator=g)
    return Marginals(0.5 * torch.randn(n, c, dtype=D, generator=g), A @ A.mT + 0.1 * size**2 * torch.eye(c, dtype=D))


def some_sites(c: int, n: int = 4, seed: int = 5) -> Sites:
    """PSD, and weak enough that every cavity is proper."""
    g = torch.Generator().manual_seed(seed)
    A = 0.3 / c**0.5 * torch.randn(n, c, c, dtype=D, generator=g)
    return Sites(0.3 * torch.randn(n, c, dtype=D, generator=g), A @ A.mT)


def posterior(prior: Marginals, sites: Sites) -> Marginals:
    """Data by themselves: prior · site."""
    P = torch.linalg.inv(prior.cov)
    cov = torch.linalg.inv(P + sites.nat2)
    return Marginals((cov @ ((P @ prior.mean.unsqueeze(-1)).squeeze(-1) + sites.nat1).unsqueeze(-1)).squeeze(-1), 0.5 * (cov + cov.mT))


def problem(family, n: int = 4):
    likelihood = family.build().requires_grad_(False)
    return likelihood, belief(family.c, n), family.data(n, seed=2)[1], some_sites(family.c, n)


def skip_unknown(expansion: str, family) -> None:
    if expansion in LINEAR:
        f = torch.zeros(1, family.c, dtype=D)
        try:
            mean, _ = family.build().conditional_moments(f)
        except NotImplementedError:
            pytest.skip("the distribution has no moments")
        if not bool(mean.isfinite().all()):
            pytest.skip("the distribution has no mean")


def derivative(function, x, order: int = 1):
    """Of a function of rows [n c] -> [n], row by row."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=order == 2)
    if order == 1:
        return g
    return torch.stack([torch.autograd.grad(g[:, i].sum(), x, retain_graph=True, materialize_grads=True)[0] for i in range(x.shape[-1])], 1)


# -- slopes and curvatures ---------------------------------------------------------------------------------------------------


@every_expansion
@every_family
def test_the_gradient_is_the_slope_of_the_value(expansion, family):
    """∂L_n/∂m by autodiff of L_n itself. Posterior linearisation takes A by regression, which is the slope but for the cubature's error."""
    skip_unknown(expansion, family)
    likelihood, q, y, sites = problem(family)
    if expansion == "pl":  # small enough a covariance that E[ω] is a cubic in m to many digits
        q = q._replace(cov=1e-4 * q.cov)
    rule = EXPANSIONS[expansion]()
    local = rule.local(likelihood, q, y, sites)
    if local.value is not None:
        wanted = derivative(local.value, local.place)
    else:  # power EP: log E_cavity[p^α] / α in the cavity's mean
        cavity, proper = rule.cavity(q, sites)
        assert proper.all()
        closed = likelihood.tilted(*cavity, y, rule.power)
        if closed is not None:
            wanted = derivative(lambda m: likelihood.tilted(m, cavity.cov, y, rule.power).value / rule.power, cavity.mean)
        else:
            nodes = rule.nodes(likelihood, cavity, y, sites)
            wanted = derivative(lambda m: log_integral(likelihood, Marginals(m, cavity.cov), y, nodes, rule.power), cavity.mean)
    torch.testing.assert_close(local.gradient, wanted, rtol=1e-5 if expansion == "pl" else 1e-8, atol=1e-8)


@pytest.mark.parametrize("expansion", ["variational", "taylor", "pl2"])
@every_family
def test_the_exact_curvature_is_the_hessian_of_the_value(expansion, family):
    skip_unknown(expansion, family)
    likelihood, q, y, sites = problem(family)
    local = EXPANSIONS[expansion]().local(likelihood, q, y, sites)
    torch.testing.assert_close(local.hessian(), -derivative(local.value, local.place, 2), rtol=1e-6, atol=1e-7)


@every_family
def test_linearisation_held_and_moving(family):
    """PL's value is PL2's with Ω held; where y | f has a constant Gaussian noise and a linear mean the two are one."""
    skip_unknown("pl", family)
    likelihood, q, y, sites = problem(family)
    small = q._replace(cov=1e-4 * q.cov)
    local = rules.PosteriorLinearization().local(likelihood, small, y, sites)
    torch.testing.assert_close(local.hessian(), -derivative(local.value, local.place, 2), rtol=1e-3, atol=1e-4)
    if isinstance(likelihood, likelihoods.Gaussian):
        moving = rules.PosteriorLinearization2().local(likelihood, q, y, sites)
        held = rules.PosteriorLinearization().local(likelihood, q, y, sites)
        for name in ("fisher", "hessian"):
            torch.testing.assert_close(getattr(moving, name)(), getattr(held, name)())
            torch.testing.assert_close(getattr(held, name)(), likelihood.ggn(q.mean, y))


def test_posterior_linearisation_of_counts_in_closed_form():
    """e^f under N(m, v): E = e^{m + v/2} = A, Var = E² (e^v − 1)."""
    m, v, y = torch.tensor([[0.3], [-1.0]], dtype=D), torch.tensor([0.2, 0.5], dtype=D)[:, None, None], torch.tensor([2.0, 0.0], dtype=D)
    E = (m + v[:, 0] / 2).exp()[:, 0]
    Ω = E + E**2 * (v.flatten().exp() - 1) - E**2 * v.flatten()
    local = rules.PosteriorLinearization().local(likelihoods.Poisson(), Marginals(m, v), y, Sites.flat(2, 1, m))
    torch.testing.assert_close(local.fisher().flatten(), E**2 / Ω)
    torch.testing.assert_close(local.gradient.flatten(), E / Ω * (y - E))
    torch.testing.assert_close(local.hessian().flatten(), E**2 / Ω - E / Ω * (y - E))  # ∂²E/∂m² = E


def test_posterior_linearisation_of_second_order_informs_a_noise_latent():
    """Heteroscedastic: ω̄ = m_1, Ω = E e^{f_2} = e^{m_2 + C_22/2}, so the Fisher information is diag(1/Ω, ½); with Ω held the noise learns nothing."""
    family = BY_NAME["heteroscedastic"]
    likelihood, q, y, sites = problem(family)
    Ω = (q.mean[:, 1] + q.cov[:, 1, 1] / 2).exp()
    wanted = torch.diag_embed(torch.stack([1 / Ω, torch.full_like(Ω, 0.5)], -1))
    torch.testing.assert_close(rules.PosteriorLinearization2().local(likelihood, q, y, sites).fisher(), wanted)
    wanted[:, 1, 1] = 0
    held = rules.PosteriorLinearization().local(likelihood, q, y, sites)
    torch.testing.assert_close(held.fisher(), wanted)
    torch.testing.assert_close(held.gradient[:, 1], torch.zeros(4, dtype=D), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", [rules.PosteriorLinearization(), rules.PosteriorLinearization2(), rules.Taylor()], ids=repr)
def test_one_hot_labels_have_a_singular_noise(rule):
    """Ω of one-hot labels has rank c − 1. Leaving out the last class gives the same curvature with a regular Ω."""

    class AllButOne(likelihoods.Categorical):
        def response(self, f, y):
            return super().response(f, y)[..., :-1]

        def conditional_moments(self, f):
            mean, cov = super().conditional_moments(f)
            return mean[..., :-1], cov[..., :-1, :-1]

    q, y, sites = belief(3, 5), torch.tensor([0, 1, 2, 2, -100]), some_sites(3, 5)
    whole, reduced = (rule.local(likelihood, q, y, sites) for likelihood in (likelihoods.Categorical(), AllButOne()))
    for name in ("fisher", "hessian"):
        torch.testing.assert_close(getattr(whole, name)(), getattr(reduced, name)(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(whole.gradient, reduced.gradient, rtol=1e-8, atol=1e-9)
    assert not whole.gradient[4].any() and not whole.fisher()[4].any()  # a missing label


def test_taylor_is_laplace_for_natural_parameters():
    for name in ("poisson", "bernoulli", "categorical"):
        likelihood, q, y, sites = problem(BY_NAME[name])
        a, b = (rule.local(likelihood, q, y, sites) for rule in (rules.Taylor(), rules.Laplace()))
        torch.testing.assert_close(a.gradient, b.gradient)
        torch.testing.assert_close(a.fisher(), b.fisher())


@pytest.mark.parametrize("power", [1.0, 0.4])
def test_ep_matches_moments_of_several_latents(power):
    """Exact curvature: cavity · t^α has the mean and covariance of cavity · p^α, here by a product grid over two latents."""
    family = BY_NAME["heteroscedastic"]
    likelihood, q, y, sites = problem(family)
    rule = rules.PowerEP(power, rules.Exact(), rules.GaussHermite(40))
    cavity, _ = rule.cavity(q, sites)
    local = rule.local(likelihood, q, y, sites)
    Λ = local.hessian()
    nat1 = local.gradient + (Λ @ local.at.unsqueeze(-1)).squeeze(-1)
    P = torch.linalg.inv(cavity.cov)
    cov = torch.linalg.inv(P + power * Λ)
    mean = (cov @ (P @ cavity.mean.unsqueeze(-1) + power * nat1.unsqueeze(-1))).squeeze(-1)
    z = torch.linspace(-9, 9, 401, dtype=D)
    grid = torch.cartesian_prod(z, z)
    for i in range(4):
        f = cavity.mean[i] + grid @ torch.linalg.cholesky(cavity.cov[i]).T
        log_w = power * likelihood.log_prob(f, y[i].expand(len(f), *y.shape[1:])) - 0.5 * grid.square().sum(-1)
        w = log_w.softmax(0)
        wanted = w @ f
        torch.testing.assert_close(mean[i], wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(cov[i], (w[:, None] * (f - wanted)).T @ (f - wanted), rtol=1e-5, atol=1e-7)


def test_ep_without_power_is_variational():
    for family in ("student-t", "heteroscedastic", "categorical", "poisson"):
        likelihood, q, y, sites = problem(BY_NAME[family])
        for curvature in (rules.GaussNewton(), rules.Exact()):
            a, b = rules.PowerEP(1e-6, curvature), rules.Variational(curvature)
            for t, s in zip(a(likelihood, q, y, sites, 0.7).sites[:2], b(likelihood, q, y, sites, 0.7).sites[:2], strict=True):
                torch.testing.assert_close(t, s, rtol=3e-3 if family == "categorical" else 1e-5, atol=3e-3 if family == "categorical" else 1e-5)
            torch.testing.assert_close(a.term(likelihood, q, y, sites), b.term(likelihood, q, y, sites), rtol=1e-5, atol=1e-5)


# -- the contract: any expansion × any curvature × any likelihood ----------------------------------------------------------


@every_expansion
@every_family
def test_sites_are_psd_and_missing_data_say_nothing(expansion, family):
    """Under every curvature."""
    skip_unknown(expansion, family)
    likelihood, q, y, sites = problem(family)
    y = y.clone()
    y[1] = family.missing
    flat = Sites.flat(4, family.c, q.mean)
    slow = family.name.startswith("from-")  # derivatives by autodiff
    for name, make in [("gauss-newton", rules.GaussNewton)] if slow else CURVATURES.items():
        rule, generator = EXPANSIONS[expansion](make()), torch.Generator().manual_seed(0)
        turn = rule(likelihood, q, y, flat, 1.0, generator)
        turn = rule(likelihood, posterior(q, turn.sites), y, turn.sites, 0.5, generator)  # a history has begun
        λ = torch.linalg.eigvalsh(turn.sites.nat2)
        assert (λ[:, 0] >= -1e-12 * λ.abs().amax(-1)).all(), name
        assert turn.skipped == 0 and turn.taken.all() and turn.sites.nat1.isfinite().all(), name
        assert not turn.sites.nat1[1].any() and not turn.sites.nat2[1].any(), name
        if name in ("gauss-newton", "identity", "quasi-newton"):  # (an exact one may be clipped to nothing)
            assert turn.sites.nat2[0].any() and turn.sites.nat2[3].any(), name


@every_expansion
@every_curvature
def test_a_step_has_the_slope_of_the_rule(expansion, curvature):
    """Whatever Λ, new sites are steep at the mean as (1 − lr) old + lr (g + Λ (at − m)): the curvature adds no slope of its own."""
    likelihood, q, y, sites = problem(BY_NAME["heteroscedastic"])
    rule, generator = EXPANSIONS[expansion](CURVATURES[curvature]()), torch.Generator().manual_seed(0)
    turn = rule(likelihood, q, y, sites, 0.3, generator)
    local = rule.local(likelihood, q, y, sites)
    Λ = rule.curvature.bend(local, (), torch.Generator().manual_seed(0)).matrix
    target = local.gradient + (Λ @ (local.at - q.mean).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(turn.sites.slope_at(q.mean), 0.7 * sites.slope_at(q.mean) + 0.3 * target)


@every_expansion
@pytest.mark.parametrize("family", ["student-t", "heteroscedastic", "categorical", "poisson"])
@pytest.mark.parametrize("curvature", ["gauss-newton", "exact"])
def test_a_turn_is_differentiable(expansion, family, curvature):
    """New sites in the belief and the old sites, by finite differences (nodes of EP are held, so it is exact only as far as they are)."""
    likelihood, q, y, sites = problem(BY_NAME[family], 2)
    rule = EXPANSIONS[expansion](CURVATURES[curvature]())
    if family == "heteroscedastic" and curvature == "exact":
        rule = EXPANSIONS[expansion](rules.Exact(lambda H: H + 3.0 * torch.eye(2, dtype=D)))  # away from the kink of a clipped eigenvalue
    direction = [torch.randn(t.shape, dtype=D, generator=torch.Generator().manual_seed(i)) for i, t in enumerate((*q, *sites[:2]))]
    direction = [0.5 * (t + t.mT) if t.dim() == 3 else t for t in direction]

    def turned(ε: float, graph: bool = False):
        leaves = [(t + ε * d).requires_grad_(graph) for t, d in zip((*q, *sites[:2]), direction)]
        new = rule.renew(likelihood, Marginals(*leaves[:2]), y, Sites(*leaves[2:]), 0.6).sites
        return leaves, (new.nat1.sum() + (new.nat2 * torch.arange(1.0, 1 + new.nat2.shape[-1], dtype=D)).sum())

    leaves, value = turned(0.0, graph=True)
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    found = sum((s * d).sum() for s, d in zip(slopes, direction))
    wanted = (turned(1e-5)[1] - turned(-1e-5)[1]) / 2e-5
    loose = "ep" in expansion and BY_NAME[family].c > 1
    torch.testing.assert_close(found, wanted, rtol=2e-2 if loose else 1e-5, atol=2e-2 if loose else 1e-6)


# -- laws ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([f.name for f in MOMENTS if f.exact]), st.sampled_from(list(EXPANSIONS)), st.floats(0.01, 3.0))
def test_gauss_newton_sites_are_always_psd(seed, name, expansion, size):
    family = BY_NAME[name]
    likelihood = family.build().requires_grad_(False)
    q, (_, y) = belief(family.c, 3, size, seed), family.data(3, seed=seed)
    sites = EXPANSIONS[expansion](rules.GaussNewton())(likelihood, q, y, some_sites(family.c, 3, seed)).sites
    λ = torch.linalg.eigvalsh(sites.nat2)
    assert (λ[:, 0] >= -1e-10 * λ.abs().amax(-1)).all()


@every_expansion
@pytest.mark.parametrize("family", ["student-t", "heteroscedastic", "categorical"])
def test_each_datum_by_itself(expansion, family):
    """Order and company of the data change nothing."""
    likelihood, q, y, sites = problem(BY_NAME[family], 5)
    rule = EXPANSIONS[expansion](rules.QuasiNewton())
    sites = rule(likelihood, q, y, sites).sites  # with a history
    order = torch.tensor([3, 0, 4])
    a = rule(likelihood, q._replace(mean=q.mean + 0.1), y, sites, 0.5).sites
    b = rule(likelihood, Marginals(q.mean[order] + 0.1, q.cov[order]), y[order], sites.rows(order), 0.5).sites
    for t, s in zip((*a[:2], *a.memory), (*b[:2], *b.memory), strict=True):
        torch.testing.assert_close(t[order], s)


# -- missing in part, failures ----------------------------------------------------------------------------------------------------


@every_expansion
def test_an_output_missing_in_part(expansion):
    """The other output's site is what it would be alone."""
    likelihood, q, _, sites = problem(BY_NAME["gaussian-each"])
    q, sites = q._replace(cov=torch.diag_embed(q.cov.diagonal(dim1=-2, dim2=-1))), Sites.flat(4, 2, q.mean)
    y = torch.tensor([[1.0, torch.nan]] * 4, dtype=D)
    rule = EXPANSIONS[expansion]()
    both = rule(likelihood, q, y, sites).sites
    alone = rule(likelihoods.Gaussian(0.5).double(), Marginals(q.mean[:, :1], q.cov[:, :1, :1]), y[:, :1], Sites.flat(4, 1, q.mean)).sites
    torch.testing.assert_close(both.nat1[:, :1], alone.nat1)
    torch.testing.assert_close(both.nat2[:, :1, :1], alone.nat2)
    for t in (both.nat1[:, 1], both.nat2[:, 1], both.nat2[:, :, 1]):
        torch.testing.assert_close(t, torch.zeros_like(t), atol=1e-12, rtol=0)


def test_what_is_not_finite_is_left_alone():
    """A datum whose new site would be NaN keeps its old one, and is counted."""
    likelihood, c = likelihoods.Poisson(), 1
    q = Marginals(torch.tensor([[0.0], [800.0]], dtype=D), 0.1 * torch.ones(2, 1, 1, dtype=D))
    sites = some_sites(c, 2)
    for curvature in CURVATURES.values():
        turn = rules.Laplace(curvature())(likelihood, q, torch.tensor([1.0, 1.0], dtype=D), sites)
        assert turn.skipped == 1 and turn.taken.tolist() == [True, False]
        assert torch.equal(turn.sites.nat1[1], sites.nat1[1]) and torch.equal(turn.sites.nat2[1], sites.nat2[1])
        assert turn.sites.nat1.isfinite().all() and all(t.isfinite().all() for t in turn.sites.memory)


def test_an_improper_cavity_is_left_alone():
    q = Marginals(torch.zeros(2, 1, dtype=D), torch.ones(2, 1, 1, dtype=D))
    sites = Sites(torch.zeros(2, 1, dtype=D), torch.tensor([0.5, 1.5], dtype=D)[:, None, None])  # the second says more than q knows
    turn = rules.PowerEP(1.0)(likelihoods.Bernoulli(), q, torch.ones(2, dtype=D), sites)
    assert turn.skipped == 1 and turn.sites.nat2[1] == 1.5 and turn.sites.nat2[0] != 0.5


def test_a_belief_without_variance():
    """A mean that is known exactly (a Wiener process at its start) has finite sites."""
    q = Marginals(torch.tensor([[0.3], [0.1]], dtype=D), torch.tensor([0.0, 0.2], dtype=D)[:, None, None])
    for name, make in EXPANSIONS.items():
        turn = make(rules.Exact())(likelihoods.Poisson(), q, torch.tensor([1.0, 2.0], dtype=D), Sites.flat(2, 1, q.mean))
        assert turn.skipped == 0, name
        assert turn.sites.nat1.isfinite().all(), name


def test_no_moments_no_linearisation():
    for rule in (rules.PosteriorLinearization(), rules.PosteriorLinearization2(), rules.Taylor()):
        with pytest.raises(ValueError, match=r"no finite mean and covariance of y given f .*; take rules.Laplace"):
            rule(likelihoods.StudentT(1.0, 0.5).double(), belief(1), torch.zeros(4, dtype=D), Sites.flat(4, 1, torch.zeros(1, dtype=D)))


@pytest.mark.parametrize("power", [0.0, -1.0, 1.5])
def test_powers(power):
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\] \(1 is EP; for 0 use rules.Variational"):
        rules.PowerEP(power)
