"""Curvatures with a past: damped BFGS and Riemannian steps against their formulas, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.rules import Marginals, Sites
from bayesgn.rules.histories import damped_bfgs, within

D = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def spd(n: int, c: int, seed: int = 0):
    A = random(n, c, c, seed=seed)
    return A @ A.mT + 0.1 * torch.eye(c, dtype=D)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.05, 1.0), st.floats(0.0, 3.0))
def test_damped_bfgs_keeps_psd_and_powells_bound(seed, c, damping, indefinite):
    """Whatever the secant, convex or not: B stays PSD, and sᵀB's is the larger of sᵀv and damping · sᵀBs."""
    B, s = spd(6, c, seed), random(6, c, seed=seed + 1)
    H = spd(6, c, seed + 2) - indefinite * torch.eye(c, dtype=D)
    v = (H @ s.unsqueeze(-1)).squeeze(-1)
    new = damped_bfgs(B, s, v, damping)
    bend = lambda M: torch.einsum("ni,nij,nj->n", s, M, s)
    torch.testing.assert_close(bend(new), torch.maximum((s * v).sum(-1), damping * bend(B)), rtol=1e-6, atol=1e-9)
    λ = torch.linalg.eigvalsh(new)
    assert (λ[:, 0] >= -1e-9 * λ[:, -1]).all()
    convex = (s * v).sum(-1) >= damping * bend(B)
    torch.testing.assert_close((new @ s.unsqueeze(-1)).squeeze(-1)[convex], v[convex], rtol=1e-6, atol=1e-8)  # the secant equation


def test_bfgs_finds_a_quadratic():
    """Along conjugate directions c secants of a quadratic give its Hessian, from any start."""
    H, B = spd(5, 3, 1), spd(5, 3, 2)
    λ, V = torch.linalg.eigh(H)
    for k in range(3):
        s = V[..., k]
        B = damped_bfgs(B, s, λ[:, k : k + 1] * s, 1e-3)
    # (every secant is kept, because later directions are conjugate to it; Powell's bound is not met)
    torch.testing.assert_close(B, H, rtol=1e-8, atol=1e-8)


def test_no_step_no_news():
    """Where neither B nor the gradient bends along s there is nothing to learn: NaN, for the caller to leave B alone."""
    B = torch.tensor([[[0.25, -0.25], [-0.25, 0.25]]], dtype=D)
    s = torch.ones(1, 2, dtype=D)  # all latents of a softmax alike
    assert damped_bfgs(B, s, 1e-17 * s, 0.2).isnan().all()
    assert damped_bfgs(B, 0 * s, 0 * s, 0.2).isnan().all()


def test_quasi_newton_by_hand():
    """Two turns under Laplace, with the secant written out; a third over next to nothing changes nothing."""
    likelihood = likelihoods.HeteroscedasticGaussian()
    y, cov = torch.tensor([0.3, -2.0, 1.0], dtype=D), 0.5 * spd(3, 2, 3)
    a, b = random(3, 2, seed=4), random(3, 2, seed=5)
    rule = rules.Laplace(rules.QuasiNewton(damping=0.3))
    first = rule(likelihood, Marginals(a, cov), y, Sites.flat(3, 2, a)).sites
    torch.testing.assert_close(first.nat2, likelihood.ggn(a, y))
    second = rule(likelihood, Marginals(b, cov), y, first).sites
    B = damped_bfgs(likelihood.ggn(a, y), b - a, likelihood.gradient(a, y) - likelihood.gradient(b, y), 0.3)
    B = within(B, likelihood.ggn(b, y), 100.0)
    torch.testing.assert_close(second.nat2, B)
    torch.testing.assert_close(second.nat1, likelihood.gradient(b, y) + (B @ b.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(second.memory[0], b)
    third = rule(likelihood, Marginals(b + 1e-9, cov), y, second).sites
    torch.testing.assert_close(third.nat2, second.nat2)
    torch.testing.assert_close(third.memory[0], b)  # the secant waits here


def test_quasi_newton_under_a_belief_takes_secants_at_the_present_covariance():
    """E_q ∂ log p moves with the covariance too; only what the mean does to it is curvature in the mean."""
    likelihood, y = likelihoods.StudentT(4.0, 0.5).double().requires_grad_(False), torch.tensor([0.2, 1.0], dtype=D)
    wide, narrow = torch.full((2, 1, 1), 2.0, dtype=D), torch.full((2, 1, 1), 0.1, dtype=D)
    a, b = torch.zeros(2, 1, dtype=D), torch.full((2, 1), 0.4, dtype=D)
    rule = rules.Variational(rules.QuasiNewton())
    first = rule(likelihood, Marginals(a, wide), y, Sites.flat(2, 1, a)).sites
    second = rule(likelihood, Marginals(b, narrow), y, first).sites
    slope = lambda m: rules.Variational().local(likelihood, Marginals(m, narrow), y, first).gradient
    secant = ((slope(a) - slope(b)) / (b - a)).flatten()
    torch.testing.assert_close(second.nat2.flatten(), torch.maximum(secant, 0.2 * first.nat2.flatten()))


def test_a_memory_for_each_datum():
    """Data that come later in other batches begin with a curvature of their own."""
    likelihood, y = likelihoods.Poisson(), torch.tensor([1.0, 4.0, 0.0], dtype=D)
    q = Marginals(random(3, 1), torch.full((3, 1, 1), 0.2, dtype=D))
    rule, sites = rules.Laplace(rules.QuasiNewton()), Sites.flat(3, 1, q.mean)
    for batch in (torch.tensor([0, 2]), torch.tensor([1]), torch.tensor([1, 2])):
        turn = rule(likelihood, q.rows(batch), y[batch], sites.rows(batch))
        sites = sites.replace(batch, turn.sites)
    torch.testing.assert_close(sites.nat2, likelihood.ggn(q.mean, y))
    torch.testing.assert_close(sites.memory[0], q.mean)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_within_a_factor_of_a_reference(seed, c):
    """In the reference's own units no eigenvalue is outside; what is inside is left as it is; no news where the reference is zero."""
    B, F = spd(4, c, seed), spd(4, c, seed + 1)
    out = within(1e4 * B, F, 100.0)
    L = torch.linalg.cholesky(F)
    relative = lambda M: torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, M, upper=False).mT, upper=False))
    assert relative(out).max() <= 100 * (1 + 1e-8) and relative(out).min() >= 0.01 * (1 - 1e-8)
    torch.testing.assert_close(within(2.0 * F, F, 100.0), 2.0 * F)
    assert not within(B, 0 * F, 100.0).any()


# -- Riemann ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.01, 1.0), st.floats(0.0, 4.0))
def test_a_riemannian_step_by_its_formula(seed, c, lr, indefinite):
    """S − lr G + ½ lr² G S⁻¹ G with G = S − H, PSD for any H."""
    S, H = spd(5, c, seed), spd(5, c, seed + 1) - indefinite * torch.eye(c, dtype=D)
    new = rules.Riemann().blend(S, H, lr)
    assert (torch.linalg.eigvalsh(new)[:, 0] >= -1e-9).all()
    G = S - H
    formula = S - lr * G + 0.5 * lr**2 * G @ torch.linalg.inv(S) @ G
    M = (1 - lr) * S + lr * H
    trace = lambda A: A.diagonal(dim1=-2, dim2=-1).sum(-1)
    far = trace(formula) > 2 * (trace(S) + trace(rules.eigabs(M)))  # then |M| instead
    torch.testing.assert_close(new, torch.where(far[:, None, None], rules.eigabs(M), formula), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_fixed_points_of_riemannian_steps(lr):
    """H where it is PSD; lr/(2 − lr) |λ| for a negative eigenvalue."""
    H = torch.tensor([[[2.0]], [[-3.0]], [[0.5]]], dtype=D)
    S = torch.zeros_like(H)  # a site that says nothing
    for _ in range(200):
        S = rules.Riemann().blend(S, H, lr)
    torch.testing.assert_close(S.flatten(), torch.tensor([2.0, 3.0 * lr / (2 - lr), 0.5], dtype=D))


def test_riemann_counts_and_skips():
    likelihood, q = likelihoods.HeteroscedasticGaussian(), Marginals(torch.zeros(3, 2, dtype=D), torch.eye(2, dtype=D).expand(3, 2, 2))
    turn = rules.Laplace(rules.Riemann())(likelihood, q, torch.tensor([1.0, 2.0, torch.nan], dtype=D), Sites.flat(3, 2, q.mean))
    assert turn.indefinite == 2 and turn.skipped == 0 and not turn.sites.nat2[2].any()
    assert rules.Riemann().blend(torch.eye(1, dtype=D)[None], torch.full((1, 1, 1), torch.nan, dtype=D), 0.5).isnan().all()


# -- what they refuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [rules.QuasiNewton(), rules.Riemann(), rules.MeanField(rules.Riemann())], ids=repr)
def test_no_laplace_fit_of_a_network(curvature):
    net = torch.nn.Linear(2, 2).eval()
    model, data = models.Network(net), (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(TypeError, match=r"learns from turn to turn, and bgn.laplace takes one turn; use bgn.bayes_newton"):
        bgn.laplace(model, likelihoods.Categorical(), data, rule=rules.Laplace(curvature))


@pytest.mark.parametrize("rule", [rules.Variational(), rules.PowerEP(), rules.PosteriorLinearization(), rules.Taylor()], ids=repr)
def test_only_laplace_serves_a_laplace_fit(rule):
    net = torch.nn.Linear(2, 2).eval()
    with pytest.raises(TypeError, match="use bgn.bayes_newton"):
        bgn.laplace(models.Network(net), likelihoods.Categorical(), (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])), rule=rule)


def test_bad_arguments():
    for damping in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
            rules.QuasiNewton(damping)
    with pytest.raises(TypeError, match="expected a curvature such as rules.GaussNewton"):
        rules.QuasiNewton(start=0.1)
    with pytest.raises(TypeError, match=r"expected an instance such as rules.Exact\(\)"):
        rules.MeanField(rules.Exact)
    with pytest.raises(ValueError, match="expected a positive number"):
        rules.Identity(0.0)
    with pytest.raises(TypeError, match="expected a function of blocks"):
        rules.Exact("abs")
