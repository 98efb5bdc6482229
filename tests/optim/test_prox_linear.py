"""The prox-linear method against convex solvers of scipy, closed forms, linear programs and its own dual."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch.func import jacrev, vmap

from bayesgn.optim import outer
from bayesgn.optim.prox_linear import prox_linear, subgradient
from bayesgn.optim.prox_solvers import SVRG, DualAscent, DualNewton
from bayesgn.optim.prox_subproblem import DenseJacobian, JacobianProducts, Subproblem

OUTERS = [outer.L2Norm(), outer.Huber(0.5), outer.L1Norm(), outer.Max(), outer.HalfSquare()]
SHAPES = [(12, 2, 4), (3, 2, 9)]  # more components than unknowns, and fewer


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(x, J, c):
    return c + J @ x


def problem(h: outer.Outer, shape: tuple[int, int, int], gamma: float, kind=DenseJacobian, seed: int = 0) -> Subproblem:
    n, k, p = shape
    return Subproblem(h, kind(affine, torch.zeros(p, dtype=torch.float64), (draw(n, k, p, seed=seed), draw(n, k, seed=seed + 1))), gamma)


def by_scipy(h: outer.Outer, sub: Subproblem) -> float:
    """min P by SLSQP on the epigraph: min mean_i t_i + ‖δ‖²/2γ where t_i is at least h at c_i + J_i δ."""
    assert isinstance(sub.J, DenseJacobian)
    c, J, γ = sub.c.numpy(), sub.J.J.numpy(), sub.gamma
    n, k = c.shape
    p = J.shape[-1]
    residual = lambda y: c + J @ y[:p]
    if isinstance(h, outer.L1Norm):  # a bound for every component
        m, above = n * k, [lambda y: (y[p:] - residual(y).ravel()), lambda y: (y[p:] + residual(y).ravel())]
        scale, start = 1 / n, np.abs(c).ravel()
    elif isinstance(h, outer.Max):
        m, above, scale, start = n, [lambda y: (y[p:, None] - residual(y)).ravel()], 1 / n, c.max(1)
    elif isinstance(h, outer.L2Norm):  # the primal has kinks; the dual is a concave quadratic on balls
        flat = J.reshape(n * k, p)
        slope_of = lambda u: flat.T @ u / n
        balls = {"type": "ineq", "fun": lambda u: 1 - np.square(u.reshape(n, k)).sum(1)}
        loss = lambda u: -(u @ c.ravel() / n - γ / 2 * np.square(slope_of(u)).sum())
        grad = lambda u: -(c.ravel() - γ * flat @ slope_of(u)) / n
        options = {"ftol": 1e-15, "maxiter": 1000}
        return -float(minimize(loss, np.zeros(n * k), jac=grad, method="SLSQP", constraints=balls, options=options).fun)
    else:  # smooth
        found = minimize(lambda y: sub.primal(torch.tensor(y)), np.zeros(p), method="BFGS", options={"gtol": 1e-10})
        return float(found.fun)
    cost = lambda y: scale * y[p:].sum() + y[:p] @ y[:p] / (2 * γ)
    slope = lambda y: np.concatenate([y[:p] / γ, np.full(m, scale)])
    constraints = [{"type": "ineq", "fun": f} for f in above]
    y0, options = np.concatenate([np.zeros(p), start + 0.1]), {"ftol": 1e-13, "maxiter": 500}
    found = minimize(cost, y0, jac=slope, method="SLSQP", constraints=constraints, options=options)
    return float(found.fun)


# -- outer functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", OUTERS, ids=repr)
@given(seed=st.integers(0, 10_000), step=st.floats(0.01, 100), k=st.integers(1, 5), size=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_prox_is_characterised_by_a_subgradient(h, seed, step, k, size):
    z, w = size * draw(20, k, seed=seed), size * draw(20, k, seed=seed + 1)
    v = h.prox(z, step)
    u = (z - v) / step  # v = prox(z) ⇔ u ∈ ∂h(v) ⇔ h lies above its tangent everywhere
    assert (h(w) >= h(v) + (u * (w - v)).sum(-1) - 1e-9 * (1 + size + size**2)).all()
    torch.testing.assert_close(h.prox(h.prox(z, step) + step * u, step), v)  # v + step u is z again


@pytest.mark.parametrize("h", OUTERS, ids=repr)
def test_bend_is_the_derivative_of_the_proximal_map_and_envelope_its_integral(h):
    z = 2 * draw(30, 3)
    for step in (0.1, 1.0, 5.0):
        slope_of_prox = vmap(jacrev(lambda one, step=step: h.prox(one[None], step)[0]))(z)
        torch.testing.assert_close(h.bend(z, step), torch.eye(3, dtype=z.dtype) - slope_of_prox)
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(h.envelope(leaf, step).sum(), leaf)
        torch.testing.assert_close(slope, (z - h.prox(z, step)) / step)


def test_values_are_those_of_torch():
    z = draw(7, 4)
    torch.testing.assert_close(outer.L2Norm()(z), z.norm(dim=1))
    torch.testing.assert_close(outer.L1Norm()(z), z.norm(p=1, dim=1))
    one = 3 * z[:, :1]
    torch.testing.assert_close(outer.Huber(0.7)(one), torch.nn.functional.huber_loss(one, 0 * one, reduction="none", delta=0.7)[:, 0])


@pytest.mark.parametrize("h", OUTERS, ids=repr)
def test_zero_and_ties_stay_finite(h):
    z = torch.zeros(2, 3, dtype=torch.float64)
    for number in (h(z), h.prox(z, 1.0), h.bend(z, 1.0)):
        assert number.isfinite().all()


# -- the subproblem and its dual -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("h", OUTERS, ids=repr)
def test_subproblem_equals_a_convex_solver(h, shape):
    for gamma in (0.1, 3.0):
        sub = problem(h, shape, gamma)
        solution = DualNewton().solve(sub)
        reference = by_scipy(h, sub)
        assert solution.gap < 1e-9
        assert abs(solution.value - reference) < 1e-6 * (1 + abs(reference))


@pytest.mark.parametrize("h", OUTERS, ids=repr)
@given(seed=st.integers(0, 10_000), smoothing=st.floats(0.01, 100))
@settings(max_examples=15, deadline=None)
def test_every_dual_point_is_a_bound(h, seed, smoothing):
    sub = problem(h, SHAPES[0], 1.0, seed=seed)
    least = DualNewton().solve(sub).value
    z = 3 * draw(*sub.c.shape, seed=seed + 7)
    v = h.prox(z, smoothing)
    u = (z - v) / smoothing
    assert sub.dual(u, v, sub.slope(u)) <= least + 1e-9
    step = draw(sub.J.p, seed=seed + 8)
    assert sub.primal(step) >= DualNewton().solve(sub).bound - 1e-9


@pytest.mark.parametrize("kind", [DenseJacobian, JacobianProducts])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("h", OUTERS, ids=repr)
def test_inner_solvers_agree_and_their_gaps_hold(h, shape, kind):
    least = DualNewton().solve(problem(h, shape, 0.5)).value
    sub = problem(h, shape, 0.5, kind)
    generator = torch.Generator().manual_seed(0)
    for solver in (DualAscent(1e-7), SVRG(1e-4, epochs=400, batch_size=4)):
        solution = solver.solve(sub, generator=generator)
        gain = sub.start - least
        assert sub.solved(solution, solver.tolerance), solver
        assert -1e-12 <= solution.value - least <= solution.gap + 1e-12
        assert solution.value - least <= solver.tolerance * gain * 1.001
        torch.testing.assert_close(sub.primal(solution.step), solution.value)


def test_products_are_those_of_the_dense_jacobian():
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)
    sizes = [s.numel() for s in shapes]

    def c(w, x):
        weights = {n: part.reshape(s) for n, part, s in zip(names, w.split(sizes), shapes, strict=True)}
        return torch.func.functional_call(net, weights, (x,))

    w, x = draw(sum(sizes)), draw(6, 3, seed=1)
    dense, products = DenseJacobian(c, w, (x,)), JacobianProducts(c, w, (x,))
    step, u, rows = draw(len(w), seed=2), draw(6, 2, seed=3), torch.tensor([4, 1])
    for _ in range(3):  # the first product and the later ones go different ways
        torch.testing.assert_close(products.forward(step), dense.forward(step))
        torch.testing.assert_close(products.adjoint(u), dense.adjoint(u))
    torch.testing.assert_close(products.forward(step, rows), dense.forward(step, rows))
    torch.testing.assert_close(products.adjoint(u[rows], rows), dense.adjoint(u[rows], rows))
    exact = torch.linalg.matrix_norm(dense.J.reshape(12, -1), ord=2).square().item()
    assert exact <= dense.square_norm() <= 1.001 * exact
    assert exact <= products.square_norm() <= 1.5 * exact
    assert products.visits > 0


def test_half_square_is_levenberg_marquardt():
    n, k, p = SHAPES[0]
    sub = problem(outer.HalfSquare(), SHAPES[0], 0.3)
    J, c = sub.J.J.reshape(-1, p), sub.c.reshape(-1)  # pyright: ignore[reportAttributeAccessIssue]
    step = -torch.linalg.solve(J.mT @ J / n + torch.eye(p, dtype=J.dtype) / 0.3, J.mT @ c / n)
    torch.testing.assert_close(DualNewton(1e-14).solve(sub).step, step)


def test_a_subproblem_that_is_solved_already_and_one_that_nothing_moves():
    # At c = 0 no step helps; where J = 0 none does either.
    for solver in (DualNewton(), DualAscent(), SVRG()):
        for c in (lambda x, t: t * x, lambda x, t: t + 0 * x.sum()):
            J = DenseJacobian(c, torch.zeros(1, dtype=torch.float64), (torch.ones(3, 1, dtype=torch.float64),))
            solution = solver.solve(Subproblem(outer.L2Norm(), J, 1.0))
            assert float(solution.step.abs().max()) < 1e-12
            assert solution.gap < 1e-12


# -- the method ------------------------------------------------------------------------------------------------------------


def phase(x, A, b):
    return (A @ x).square() - b


def retrieval(noise: float = 0.0, n: int = 60, d: int = 8):
    A, x = draw(n, d), draw(d, seed=1)
    x /= x.norm()
    return x + 0.15 * draw(d, seed=3), x, (A, (A @ x).square() + noise * draw(n, seed=2))


def test_quadratic_phase_without_noise():
    x0, x, batch = retrieval()
    fit = prox_linear(phase, x0, batch=batch, gamma=10.0)
    assert fit.converged and fit.value < 1e-14
    torch.testing.assert_close(fit.x, x, rtol=0, atol=1e-12)
    values = [step.value for step in fit.history]
    pairs = [(a, b) for a, b in zip(values, values[1:], strict=False) if 1e-7 < a < 0.1]
    assert len(pairs) >= 2
    assert all(b <= 2 * a**2 for a, b in pairs), values  # the error is squared: digits double


def test_quadratic_phase_of_a_wide_net():
    # As in the paper's proposition: d > nk, J onto, so F falls to zero quadratically whatever the targets are.
    X, Y = draw(5, 3), draw(5, 2, seed=1)
    start = {"W": draw(20, 3, seed=2), "V": 0.3 * draw(2, 20, seed=3)}
    fit = prox_linear(lambda w, X, Y: torch.tanh(X @ w["W"].mT) @ w["V"].mT - Y, start, batch=(X, Y), gamma=1e3)
    assert set(fit.x) == {"W", "V"} and fit.x["W"].shape == (20, 3)
    assert fit.value < 1e-13
    values = [step.value for step in fit.history]
    fast = [(a, b) for a, b in zip(values, values[1:], strict=False) if 1e-6 < a < 0.1]
    assert fast and all(b < a**1.6 for a, b in fast), values


def test_minimum_under_noise_is_stationary_and_monotone():
    x0, _, batch = retrieval(noise=0.3)
    for h in (outer.L2Norm(), outer.Huber(0.2)):
        fit = prox_linear(phase, x0, h, batch)
        assert fit.converged
        values = [step.value for step in fit.history]
        assert all(b <= a for a, b in zip(values, values[1:], strict=False))
        around = torch.stack([h(phase(fit.x + 1e-3 * draw(8, seed=s), *batch)[:, None]).mean() for s in range(50)])
        assert (around >= fit.value - 1e-12).all()


def test_smooth_outer_function_finds_the_minimum_of_scipy():
    x0, _, batch = retrieval(noise=0.3)
    f = lambda x: float(0.5 * phase(torch.tensor(x), *batch).square().mean())
    reference = minimize(f, x0.numpy(), method="BFGS", options={"gtol": 1e-9})
    fit = prox_linear(phase, x0, outer.HalfSquare(), batch)
    assert abs(fit.value - reference.fun) < 1e-9
    np.testing.assert_allclose(fit.x.numpy(), reference.x, atol=1e-5)


def test_max_gives_the_chebyshev_fit_of_a_linear_program():
    t = torch.linspace(-1, 1, 21, dtype=torch.float64)
    V, y = torch.stack([t**i for i in range(4)], -1), t.exp()
    both = lambda w, V, y: torch.cat([V @ w - y, y - V @ w])[None]  # one term of 42 components: the largest |residual|
    fit = prox_linear(both, torch.zeros(4, dtype=torch.float64), outer.Max(), (V, y), gamma=1e4)
    A = torch.cat([torch.cat([V, -V]), -torch.ones(42, 1, dtype=torch.float64)], -1).numpy()
    lp = linprog([0, 0, 0, 0, 1], A, torch.cat([y, -y]).numpy(), bounds=[(None, None)] * 5)
    assert fit.value == pytest.approx(lp.fun, abs=1e-8)


def test_a_function_of_the_users_own():
    class Quantile(outer.Outer):  # the pinball loss
        def __init__(self, q: float) -> None:
            self.q = q

        def __call__(self, z):
            return torch.maximum(self.q * z, (self.q - 1) * z).sum(-1)

        def prox(self, z, step):
            return z - z.clamp(step * (self.q - 1), step * self.q)

    y = draw(101)
    for inner in (DualNewton(), DualAscent(1e-8, 20_000)):
        fit = prox_linear(lambda x, y: y - x, torch.zeros(1, dtype=torch.float64), Quantile(0.9), (y,), inner=inner, gamma=10.0)
        torch.testing.assert_close(fit.x, y.sort().values[[90]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", [DualAscent(1e-3), SVRG(0.1, epochs=15, batch_size=8)], ids=repr)
def test_inexact_inner_solvers_and_products_reach_the_same_minimum(inner):
    x0, x, batch = retrieval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may leave the tolerance open
        generator = torch.Generator().manual_seed(0)
        fit = prox_linear(phase, x0, batch=batch, inner=inner, jacobian=JacobianProducts, generator=generator, max_iterations=6)
    torch.testing.assert_close(fit.x, x, rtol=0, atol=1e-4)


def test_order_of_the_data_and_the_form_of_x_do_not_matter():
    x0, _, (A, b) = retrieval(noise=0.2)
    fit = prox_linear(phase, x0, batch=(A, b))
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prox_linear(phase, x0, batch=(A[order], b[order])).x, fit.x, rtol=0, atol=1e-6)
    tree = prox_linear(lambda q, A, b: phase(torch.cat([q["u"], q["v"]]), A, b), {"u": x0[:3], "v": x0[3:]}, batch=(A, b)).x
    torch.testing.assert_close(torch.cat([tree["u"], tree["v"]]), fit.x, rtol=0, atol=1e-6)


def test_float32_ends_at_its_precision():
    x0, x, (A, b) = retrieval()
    fit = prox_linear(phase, x0.float(), batch=(A.float(), b.float()))
    assert fit.converged and fit.x.dtype == torch.float32
    torch.testing.assert_close(fit.x.double(), x, rtol=0, atol=1e-5)


def test_callback_and_history_tell_the_course():
    x0, _, batch = retrieval(noise=0.2)
    seen = []
    fit = prox_linear(phase, x0, batch=batch, callback=lambda x, step: seen.append((x.clone(), step)))
    assert [step for _, step in seen] == fit.history and len(seen) == fit.iterations
    torch.testing.assert_close(seen[-1][0], fit.x)
    assert fit.value == pytest.approx(float(phase(fit.x, *batch).abs().mean()), rel=1e-12)
    assert all(a.visits < b.visits for a, b in zip(fit.history, fit.history[1:], strict=False))


def test_steps_into_nothingness_are_rejected():
    # log is not finite where the first, long steps lead.
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    fit = prox_linear(lambda x, t: torch.log(x) * t, torch.tensor([0.05], dtype=torch.float64), batch=(t,), gamma=1e6)
    torch.testing.assert_close(fit.x, torch.ones(1, dtype=torch.float64))


# -- the baseline ----------------------------------------------------------------------------------------------------------


def test_subgradient_method_takes_the_papers_steps():
    x0, _, (A, b) = retrieval(noise=0.2)
    x, lr = x0.clone(), 1e-3
    for t in range(1, 4):  # whole batches: nothing is random
        x = x - lr / t**0.5 * (2 * (phase(x, A, b).sign() * (A @ x))[:, None] * A).mean(0)
    torch.testing.assert_close(subgradient(phase, x0, batch=(A, b), lr=lr, decay=0.5, epochs=3, batch_size=len(b)), x)
    runs = [subgradient(phase, x0, batch=(A, b), lr=lr, epochs=2, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_subgradient_method_finds_the_median():
    y = draw(41)
    x0, generator = torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(0)
    x = subgradient(lambda x, y: y - x, x0, batch=(y,), lr=0.3, decay=1.0, epochs=60, generator=generator)
    assert float((x - y.median()).abs()) < 0.05


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_bad_input():
    x0, _, batch = retrieval()
    nan = torch.tensor([float("nan")], dtype=torch.float64)
    with pytest.raises(ValueError, match="1 of 8 entries that are not finite"):
        prox_linear(phase, torch.cat([x0[:7], nan]), batch=batch)
    with pytest.raises(ValueError, match="not finite in 60 of 60 terms"):
        prox_linear(lambda x, A, b: (A @ x - 1e9).log(), x0, batch=batch)
    with pytest.raises(ValueError, match=r"\(\).*expected a tensor \[n k\]"):
        prox_linear(lambda x, A, b: phase(x, A, b).sum(), x0, batch=batch)
    with pytest.raises(ValueError, match="does not depend on x"):
        prox_linear(lambda x, A, b: phase(x.detach(), A, b), x0, batch=batch)
    with pytest.raises(ValueError, match="float32 but x0 is torch.float64"):
        prox_linear(lambda x, A, b: phase(x, A, b).float(), x0, batch=batch)
    with pytest.raises(TypeError, match="floating point"):
        prox_linear(phase, torch.arange(8), batch=batch)
    with pytest.raises(TypeError, match="tuple of tensors"):
        prox_linear(phase, x0, batch=list(batch))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="optim.outer.Outer"):
        prox_linear(phase, x0, torch.abs, batch)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="instance of optim.DualNewton"):
        prox_linear(phase, x0, batch=batch, inner=DualNewton)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="needs J itself"):
        prox_linear(phase, x0, batch=batch, inner=DualNewton(), jacobian=JacobianProducts)
    with pytest.raises(ValueError, match="n rows"):
        prox_linear(lambda x: phase(x, *batch), x0, jacobian=JacobianProducts)
    with pytest.raises(ValueError, match="gamma=0"):
        prox_linear(phase, x0, batch=batch, gamma=0)
    with pytest.raises(ValueError, match="delta=-1"):
        outer.Huber(-1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        DualNewton(tolerance=2)
    with pytest.raises(ValueError, match="epochs=0"):
        SVRG(epochs=0)
    with pytest.raises(ValueError, match="rows"):
        subgradient(lambda x: phase(x, *batch), x0)


def test_a_start_is_never_changed_and_an_open_end_is_said():
    x0, _, batch = retrieval(noise=0.3)
    kept = x0.clone()
    with pytest.warns(UserWarning, match="max_iterations=1 reached"):
        fit = prox_linear(phase, x0, batch=batch, max_iterations=1)
    assert not fit.converged and fit.iterations == 1
    torch.testing.assert_close(x0, kept, rtol=0, atol=0)


def test_a_loss_that_does_not_fall_ends_where_it_began():
    # A c whose derivative is a lie: no step ever helps.
    class Lie(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.abs() + 1

        @staticmethod
        def backward(ctx, g):
            return g

    x0 = torch.zeros(1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no step lowers"):
        fit = prox_linear(lambda x: Lie.apply(x), x0)
    assert not fit.converged and fit.iterations == 0
    torch.testing.assert_close(fit.x, x0, rtol=0, atol=0)
