"""Dampings, scalings, line searches and momenta on a dense quadratic, each against its own definition or scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesgn import optim
from bayesgn.optim.damping import Proposal


class Dense(optim.Quadratic):
    """gᵀδ + ½ δᵀHδ with everything in the open."""

    def __init__(self, H: Tensor, g: Tensor, D: Tensor | None = None) -> None:
        self.H, self.gradient, self.scaling, self.solves = H, g, D, 0
        self.D = torch.diag(torch.ones_like(g) if D is None else D)

    def solve(self, damping: float) -> Tensor:
        self.solves += 1
        return torch.linalg.solve(self.H + damping * self.D, -self.gradient)

    def curvature(self, δ: Tensor) -> float:
        return float(δ @ self.H @ δ)

    def smallest_eigenvalue(self) -> float:
        return float(torch.linalg.eigvalsh(self.H)[0])

    def value(self, δ: Tensor) -> float:
        return float(self.gradient @ δ + 0.5 * δ @ self.H @ δ)


def quadratic(seed: int, p: int = 5, scaled: bool = False, rank: int | None = None) -> Dense:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank or p + 2, p, generator=g, dtype=torch.float64) * torch.logspace(-1.5, 0.5, p, dtype=torch.float64)
    D = torch.rand(p, generator=g, dtype=torch.float64) + 0.2 if scaled else None
    return Dense(A.mT @ A, A.mT @ torch.randn(len(A), generator=g, dtype=torch.float64), D)


DAMPINGS = [
    optim.Constant(0.3), optim.LevenbergMarquardt(0.3), optim.SmallestEigenvalue(2.0), optim.TrustRegion(0.05), optim.Dogleg(0.05),
]  # fmt: skip
problems = st.builds(quadratic, st.integers(0, 10_000), st.integers(2, 7), st.booleans())


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from(DAMPINGS))
def test_what_a_proposal_says_of_itself(q, damping):
    δ, bend, λ = damping.propose(q)
    assert bend == pytest.approx(q.curvature(δ), rel=1e-6, abs=1e-10)
    assert q.decrease(δ, bend) == pytest.approx(-q.value(δ), rel=1e-6, abs=1e-10) and q.value(δ) < 0
    if not isinstance(damping, optim.Dogleg):
        torch.testing.assert_close((q.H + λ * q.D) @ δ, -q.gradient, atol=1e-7, rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(problems, st.floats(1e-3, 10.0))
def test_trust_region_is_the_minimiser_within_the_radius(q, radius):
    δ, _, λ = optim.TrustRegion(radius).propose(q)
    length = q.size(δ)
    newton = q.solve(0.0)
    assert q.solves <= 12
    if q.size(newton) <= radius:
        torch.testing.assert_close(δ, newton, rtol=1e-4, atol=1e-8)
    else:
        assert length == pytest.approx(radius, rel=0.1) and λ > 0
    # No other point of that length is better (scipy, on the sphere's own radius).
    L = q.D.diagonal().sqrt()

    def model(u: np.ndarray) -> float:
        z = torch.as_tensor(u) / L
        return q.value(z * min(1.0, length / max(q.size(z), 1e-300)))

    best = min(scipy.optimize.minimize(model, (L * δ).numpy() * s, method="Nelder-Mead", options={"maxiter": 400}).fun for s in (1.0, 0.5))
    assert q.value(δ) <= best + 1e-6 * abs(best)


@settings(max_examples=30, deadline=None)
@given(problems, st.floats(1e-3, 10.0))
def test_dogleg_lies_between_cauchy_and_trust_region(q, radius):
    δ = optim.Dogleg(radius).propose(q).δ
    assert q.size(δ) <= radius * (1 + 1e-9)
    s = q.steepest()
    t = min(float(-(q.gradient @ s) / (s @ q.H @ s)), radius / q.size(s))
    assert q.value(δ) <= q.value(t * s) + 1e-12, "no worse than the best along the steepest descent"
    assert q.value(δ) >= q.value(optim.TrustRegion(radius).propose(q).δ * 1.0) - 0.11 * abs(q.value(δ)), "the exact minimiser is no worse"


def test_trust_region_of_a_singular_quadratic_and_of_none():
    q = quadratic(1, p=6, rank=3)
    assert q.size(optim.TrustRegion(0.01).propose(q).δ) == pytest.approx(0.01, rel=0.1)
    flat = Dense(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for damping in (optim.TrustRegion(), optim.Dogleg()):
        assert float(damping.propose(flat).δ.norm()) == 0.0


def test_nielsen_rule():
    damping = optim.LevenbergMarquardt(1.0)
    proposal = Proposal(torch.ones(1), 1.0, 1.0)
    for ρ, factor in ((1.0, 1 / 3), (0.75, 1 - 0.5**3), (0.5, 1.0), (0.25, 1 + 0.5**3), (0.1, 1 + 0.8**3)):
        before = damping.λ
        damping.learn(proposal, 1.0, actual=ρ * 2.0, predicted=2.0)
        assert damping.λ == pytest.approx(before * factor)
    before = damping.λ
    for k in (2, 8, 64):  # ν doubles: 2, 2·4, 2·4·8
        damping.learn(proposal, 1.0, actual=-math.inf, predicted=2.0)
        assert damping.λ == pytest.approx(before * k)
    assert not damping.accepts(-0.1, 1.0, cosine=1.0)


def test_uphill_steps_only_where_the_last_one_went():
    damping = optim.LevenbergMarquardt(uphill=1.0)
    assert damping.accepts(-0.5, 1.0, cosine=0.9) and not damping.accepts(-0.95, 1.0, cosine=0.9)
    assert not damping.accepts(-0.01, 1.0, cosine=-0.9) and not damping.accepts(-math.inf, 1.0, cosine=1.0)


def test_radius_follows_the_ratio():
    for kind in (optim.TrustRegion, optim.Dogleg):
        damping = kind(1.0)
        proposal = Proposal(torch.ones(1), 1.0, 0.0)
        damping.learn(proposal, 1.0, actual=0.9, predicted=1.0)
        assert damping._radius == 2.0
        damping.learn(proposal, 0.5, actual=0.9, predicted=1.0)  # within: no reason to grow
        assert damping._radius == 2.0
        damping.learn(proposal, 2.0, actual=-math.inf, predicted=1.0)
        assert damping._radius == 0.5


def test_state_of_a_damping_can_be_taken_up_by_its_kind_only():
    one, two = optim.LevenbergMarquardt(1.0), optim.LevenbergMarquardt(5.0)
    one.learn(Proposal(torch.ones(1), 1.0, 1.0), 1.0, -1.0, 1.0)
    two.load_state_dict(one.state_dict())
    assert (two.λ, two._ν) == (one.λ, one._ν)
    with pytest.raises(ValueError, match="saved with another damping"):
        optim.TrustRegion().load_state_dict(one.state_dict())


@pytest.mark.parametrize("make", [
    lambda: optim.Constant(-1.0), lambda: optim.LevenbergMarquardt(0.0), lambda: optim.TrustRegion(math.inf), lambda: optim.Dogleg(-1.0),
    lambda: optim.SmallestEigenvalue(0.0), lambda: optim.HeavyBall(1.0), lambda: optim.Adaptive(1.0), lambda: optim.Backtracking(shrink=1.0),
    lambda: optim.Grid(ratio=0.0), lambda: optim.RunningMax(0.0), lambda: optim.LevenbergMarquardt(uphill=math.nan),
])  # fmt: skip
def test_numbers_that_cannot_be_right(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# -- scalings, line searches, momenta ------------------------------------------------------------------------------------


def test_scalings_are_free_of_units():
    q = quadratic(3)
    units = torch.logspace(-2, 2, 5, dtype=torch.float64)
    other = Dense(units[:, None] * q.H * units, units * q.gradient)
    q.scaling, other.scaling = optim.Diagonal(1e-30)(q.H.diagonal()), optim.Diagonal(1e-30)(other.H.diagonal())
    q.D, other.D = torch.diag(q.scaling), torch.diag(other.scaling)
    torch.testing.assert_close(units * other.solve(0.1), q.solve(0.1))


def test_backtracking_and_grid():
    def parabola(α: float) -> float:  # minimum at 0.3, slope −0.6 at 0
        return (α - 0.3) ** 2

    α, value = optim.Backtracking()(parabola, 0.09, -0.6)
    assert (α, value) == (0.5, parabola(0.5))
    assert optim.Backtracking(tries=3)(lambda α: 1.0 + α, 1.0, -1.0) == (0.0, 1.0)
    assert optim.Backtracking()(lambda α: math.nan if α > 0.2 else parabola(α), 0.09, -0.6)[0] == 0.125
    α, value = optim.Grid(largest=2.4, ratio=0.5, count=6)(parabola, 0.09, -0.6)
    assert α == pytest.approx(0.3) and value == pytest.approx(0.0, abs=1e-15)
    assert optim.Grid()(lambda α: math.inf, 1.0, -1.0) == (0.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(problems, st.floats(0.3, 0.95), st.integers(0, 1000))
def test_adaptive_momentum_solves_its_own_problem(q, ξ, seed):
    λ = 0.2
    g = torch.Generator().manual_seed(seed)
    last = torch.randn(len(q.gradient), generator=g, dtype=torch.float64)
    δ = q.solve(λ)
    proposal = Proposal(δ, q.solved(δ, λ), λ)
    step = optim.Adaptive(ξ)(q, proposal, last)
    M = q.H + λ * q.D
    G = float(q.gradient @ torch.linalg.solve(M, q.gradient))
    assert float(step.δ @ M @ step.δ) == pytest.approx(G, rel=1e-6), "δᵀMδ = r²"
    assert float(q.gradient @ step.δ) == pytest.approx(-ξ * G, rel=1e-6), "gᵀδ = −ξ r √G"
    assert step.bend == pytest.approx(q.curvature(step.δ), rel=1e-6, abs=1e-9)
    # Among random steps that meet both constraints none is more conjugate to the last one.
    L = torch.linalg.cholesky(M)
    along = torch.linalg.solve_triangular(L, -q.gradient[:, None], upper=False)[:, 0]
    for _ in range(20):
        u = torch.randn(len(last), generator=g, dtype=torch.float64)
        u = u - along * (u @ along) / (along @ along)
        u = ξ * along + u / u.norm() * math.sqrt((1 - ξ**2) * G)
        other = torch.linalg.solve_triangular(L.mT, u[:, None], upper=True)[:, 0]
        assert float(other @ M @ last) <= float(step.δ @ M @ last) + 1e-7 * G


def test_heavy_ball_and_a_last_step_along_this_one():
    q = quadratic(5)
    proposal = optim.Constant(0.1).propose(q)
    last = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = optim.HeavyBall(0.5)(q, proposal, last)
    torch.testing.assert_close(step.δ, proposal.δ + 0.5 * last)
    assert step.bend == pytest.approx(q.curvature(step.δ))
    assert optim.Adaptive(0.9)(q, proposal, 3 * proposal.δ) is proposal
