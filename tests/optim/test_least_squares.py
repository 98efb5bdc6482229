"""Nonlinear least squares beside scipy, closed forms and simulation; bounds, robust losses, large problems, and what goes wrong."""

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn import optim
from bayesgn.optim import robust

DOUBLE = {"dtype": torch.float64}
T = torch.linspace(0, 3, 60, **DOUBLE)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def decay(b, t=T):
    return b[0] * torch.exp(-b[1] * t) + b[2]


TRUTH = torch.tensor([2.0, 1.1, 0.5], **DOUBLE)
START = torch.tensor([1.0, 1.0, 0.0], **DOUBLE)
Y = decay(TRUTH) + 0.05 * draw(60)
OUTLIERS = Y.clone()
OUTLIERS[::7] += 2.0


def misfit(b):
    return decay(b) - Y


def theirs(f, x0, **options):
    jac = lambda x: torch.func.jacrev(f)(torch.tensor(x)).numpy()
    return scipy.optimize.least_squares(
        lambda x: f(torch.tensor(x)).numpy(), x0.numpy(), jac=jac, xtol=1e-15, ftol=1e-15, gtol=1e-14, max_nfev=3000, **options
    )


# -- plain fits ----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(m=st.integers(6, 20), p=st.integers(1, 5), seed=st.integers(0, 100), unit=st.integers(-8, 8))
def test_a_linear_model_is_solved_in_any_unit(m, p, seed, unit):
    A, y = draw(m, p, seed=seed) * 10.0 ** torch.linspace(0, unit, p, **DOUBLE), draw(m, seed=seed + 1)
    fit = optim.least_squares(lambda x: A @ x - y, torch.zeros(p, **DOUBLE))
    scale = A.norm(dim=0)
    Q, R = torch.linalg.qr(A / scale)
    expected = torch.linalg.solve_triangular(R, (Q.T @ y)[:, None], upper=True)[:, 0]
    torch.testing.assert_close(fit.x * scale, expected, rtol=1e-7, atol=1e-9)
    assert fit.success and fit.iterations < 20
    covariance = 2 * fit.cost / (m - p) * torch.linalg.inv(R.T @ R)
    torch.testing.assert_close(fit.covariance * scale * scale[:, None], covariance, rtol=1e-6, atol=1e-12)


def test_a_curve_as_scipy_fits_it():
    fit = optim.least_squares(misfit, START)
    curve = lambda t, *b: decay(b, torch.tensor(t)).numpy()
    x, covariance = scipy.optimize.curve_fit(curve, T.numpy(), Y.numpy(), START.numpy(), ftol=1e-15, xtol=1e-15)
    torch.testing.assert_close(fit.x, torch.tensor(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(fit.covariance, torch.tensor(covariance), rtol=1e-4, atol=0)
    torch.testing.assert_close(fit.residual, misfit(fit.x))
    torch.testing.assert_close(fit.jacobian, torch.func.jacrev(misfit)(fit.x))
    assert fit.gradient.abs().max() < 1e-9 and fit.cost == pytest.approx(0.5 * float(misfit(fit.x).square().sum()))
    assert not fit.active.any() and fit.attempts[0].cost == fit.cost and fit.evaluations > fit.iterations


def test_the_answer_has_the_structure_of_the_start():
    start = {"size": torch.tensor(1.0, **DOUBLE), "rest": (torch.ones(1, **DOUBLE), torch.zeros(1, 1, **DOUBLE))}
    before = start["size"].clone()
    fit = optim.least_squares(lambda b, t, y: b["size"] * torch.exp(-b["rest"][0] * t) + b["rest"][1][0] - y, start, T, Y)
    plain = optim.least_squares(misfit, START)
    for found, vector in ((fit.x, plain.x), (fit.standard_errors, plain.standard_errors)):
        torch.testing.assert_close(torch.cat([found["size"].reshape(1), found["rest"][0], found["rest"][1][0]]), vector)
    assert fit.names == ["size", "rest[0][0]", "rest[1][0, 0]"] and torch.equal(start["size"], before)
    text = repr(fit)
    assert text.startswith("Fit: converged (") and "rest[1][0, 0]" in text and f"{float(fit.x['size']):.9g}" in text


def test_known_noise_and_standardised_residuals():
    fit = optim.least_squares(lambda b: misfit(b) / 0.05, START, noise=1.0)
    J = torch.func.jacrev(decay)(fit.x)
    torch.testing.assert_close(fit.covariance, 0.05**2 * torch.linalg.inv(J.T @ J), rtol=1e-9, atol=0)
    estimated = optim.least_squares(lambda b: misfit(b) / 0.05, START)
    torch.testing.assert_close(estimated.covariance, estimated.noise * fit.covariance, rtol=1e-6, atol=0)


def test_a_band_is_the_delta_method():
    fit = optim.least_squares(misfit, START)
    mean, error = fit.propagate(decay, T)
    J = torch.func.jacrev(decay)(fit.x)
    torch.testing.assert_close(mean, decay(fit.x))
    torch.testing.assert_close(error, (J @ fit.covariance @ J.T).diagonal().sqrt())


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-3), (torch.float64, 1e-8)])
def test_dtype_is_kept(dtype, tol, caplog):
    exact = optim.least_squares(misfit, START).x
    with caplog.at_level(logging.INFO, "bayesgn.optim"):
        fit = optim.least_squares(lambda b: decay(b, T.to(dtype)) - Y.to(dtype), START.to(dtype))
    assert fit.x.dtype == fit.covariance.dtype == fit.residual.dtype == dtype and fit.success
    assert ((fit.x - exact) / exact).abs().max() < tol
    assert ("pass float64 for more" in caplog.text) == (dtype == torch.float32)


METHODS = {
    "trust region": {"damping": optim.TrustRegion(1.0)},
    "dogleg": {"damping": optim.Dogleg(1.0)},
    "straight": {"acceleration": optim.Straight()},
    "running max": {"scaling": optim.RunningMax()},
    "diagonal": {"scaling": optim.Diagonal()},
    "unscaled": {"scaling": optim.Unscaled()},
    "units": {"scaling": optim.Units(torch.tensor([2.0, 1.0, 0.5]))},
    "uphill": {"damping": optim.LevenbergMarquardt(1e-2, uphill=1.0)},
    "gauss-newton": {"damping": optim.Constant(0.0), "acceleration": optim.Straight()},
    "conjugate gradients": {"solver": optim.ConjugateGradients(tol=1e-8)},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_all_methods_agree(options):
    expected = optim.least_squares(misfit, START)
    for _ in range(2):  # the objects are copied, so that they serve again
        fit = optim.least_squares(misfit, START, **options)
        assert fit.success, fit
        torch.testing.assert_close(fit.x, expected.x, rtol=1e-7, atol=0)


def rosenbrock(b):
    return torch.stack([10 * (b[1:] - b[:-1] ** 2), 1 - b[:-1]])


@pytest.mark.parametrize("p", [2, 10])
def test_zero_residuals(p):
    start = torch.ones(p, **DOUBLE)
    start[::2] = -1.2
    fit = optim.least_squares(rosenbrock, start)
    assert fit.success and fit.cost < 1e-24
    torch.testing.assert_close(fit.x, torch.ones(p, **DOUBLE), rtol=1e-9, atol=0)
    again = optim.least_squares(rosenbrock, torch.ones(p, **DOUBLE))
    assert again.success and again.iterations == 0 and again.cost == 0


def test_acceleration_saves_iterations_and_keeps_off_plateaus():
    # BoxBOD of NIST's datasets: from (1, 1) a plain step leaps to b1 ≫ 1, where the curve is a constant.
    x, y = torch.tensor([1.0, 2, 3, 5, 7, 10], **DOUBLE), torch.tensor([109.0, 149, 149, 191, 213, 224], **DOUBLE)
    f = lambda b: b[0] * (1 - torch.exp(-b[1] * x)) - y
    bent = optim.least_squares(f, torch.ones(2, **DOUBLE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        straight = optim.least_squares(f, torch.ones(2, **DOUBLE), acceleration=optim.Straight(), scaling=optim.Diagonal())
    assert bent.cost == pytest.approx(584.00443830, rel=1e-9) and straight.cost > 1.5 * bent.cost
    restarted = optim.least_squares(
        f, torch.ones(2, **DOUBLE), acceleration=optim.Straight(),
        restarts=optim.Restarts(perturbed=0, dampings=[optim.LevenbergMarquardt(λ) for λ in (1e-3, 1e2)], scalings=[optim.RunningMax()]),
    )  # fmt: skip
    assert restarted.cost == pytest.approx(bent.cost) and len(restarted.attempts) == 2


def test_restarts_find_the_better_minimum():
    f = lambda b: torch.cat([torch.cos(3 * b), 0.3 * (b - 2.0)])
    stuck = optim.least_squares(f, torch.tensor([0.5], **DOUBLE))
    options = {"restarts": optim.Restarts(perturbed=20, spread=1.5)}
    fits = [optim.least_squares(f, torch.tensor([0.5], **DOUBLE), generator=torch.Generator().manual_seed(1), **options) for _ in range(2)]
    grid = torch.linspace(-10, 10, 20001, **DOUBLE)
    best = 0.5 * (torch.cos(3 * grid).square() + (0.3 * (grid - 2)).square()).min()
    assert fits[0].cost < stuck.cost and fits[0].cost == pytest.approx(float(best), rel=1e-5)
    assert torch.equal(fits[0].x, fits[1].x) and len(fits[0].attempts) == 21
    assert fits[0].cost == min(attempt.cost for attempt in fits[0].attempts)


# -- bounds --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_bounds_beside_scipy(seed):
    g = torch.Generator().manual_seed(seed)
    m, p = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((5, 25), (2, 7)))
    A, B, y, lower = draw(m, p, seed=seed + 1), draw(m, p, seed=seed + 2), 3 * draw(m, seed=seed + 3), draw(p, seed=seed + 4) - 0.5
    upper = lower + 2 * torch.rand(p, generator=g, **DOUBLE) + 1e-3
    lower[0], upper[-1] = (-math.inf if seed % 3 == 0 else lower[0]), (math.inf if seed % 5 == 0 else upper[-1])
    f = lambda x: torch.sin(A @ x) + 0.3 * (B @ x) ** 2 + A @ x - y
    room = 0.05 * (upper - lower).clamp_max(1.0)
    start = torch.minimum(torch.maximum(torch.zeros(p, **DOUBLE), lower + room), upper - room)
    fit = optim.least_squares(f, start, bounds=(lower, upper))
    assert fit.success and bool(((fit.x >= lower) & (fit.x <= upper)).all())
    # First-order conditions: the gradient is zero inside, and pushes against the bound at one.
    g = fit.gradient
    wrong = torch.where(fit.active < 0, (-g).clamp_min(0), torch.where(fit.active > 0, g.clamp_min(0), g.abs()))
    assert wrong.max() < 1e-6 * (1 + fit.cost)
    assert fit.cost <= theirs(f, start, bounds=(lower.numpy(), upper.numpy())).cost * (1 + 1e-7)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), p=st.integers(1, 8), seed=st.integers(0, 200))
def test_a_linear_model_in_a_box_is_solved_as_bvls_does(m, p, seed):
    A, y, lower = draw(m, p, seed=seed), 2 * draw(m, seed=seed + 1), -draw(p, seed=seed + 2).abs()
    upper = draw(p, seed=seed + 3).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = optim.least_squares(lambda x: A @ x - y, torch.zeros(p, **DOUBLE), bounds=(lower, upper))
    expected = scipy.optimize.lsq_linear(A.numpy(), y.numpy(), (lower.numpy(), upper.numpy()), method="bvls", tol=1e-14)
    assert fit.cost <= expected.cost + 1e-9 and bool(((fit.x >= lower) & (fit.x <= upper)).all())


def test_a_parameter_at_its_bound_is_held_there():
    fit = optim.least_squares(misfit, torch.tensor([1.0, 1.0, 0.1], **DOUBLE), bounds=(None, torch.tensor([math.inf, 1.0, math.inf], **DOUBLE)))
    free = optim.least_squares(lambda b: decay(torch.stack([b[0], torch.ones((), **DOUBLE), b[1]])) - Y, START[:2])
    assert fit.active.tolist() == [0, 1, 0] and fit.x[1] == 1.0 and "at its bound" in repr(fit)
    torch.testing.assert_close(fit.x[[0, 2]], free.x, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit.covariance[[0, 2]][:, [0, 2]], free.covariance, rtol=1e-6, atol=0)
    assert fit.standard_errors[1] == 0 and fit.noise == pytest.approx(free.noise)


def test_bad_bounds():
    with pytest.raises(ValueError, match=r"x\[2\] = 0 is not in \[0.1, inf\]"):
        optim.least_squares(misfit, START, bounds=(0.1, None))
    with pytest.raises(ValueError, match=r"bounds of x\[0\] are 2 and 1; expected lower ≤ upper"):
        optim.least_squares(misfit, START, bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="expected a pair"):
        optim.least_squares(misfit, START, bounds=[0.0, 1.0])


# -- robust losses -------------------------------------------------------------------------------------------------------------------------

NAMES = {"huber": robust.Huber, "soft_l1": robust.SoftL1, "cauchy": robust.Cauchy, "arctan": robust.Arctan}
LOSSES = [robust.Squared(), *(kind(s) for kind in (*NAMES.values(), robust.GemanMcClure) for s in (0.1, 3.0))]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_have_their_derivatives(loss):
    z = torch.cat([torch.zeros(1, **DOUBLE), draw(30).exp() ** 3]).requires_grad_()
    value, first, second = loss.rho(z)
    (g,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    torch.testing.assert_close(first, g)
    h = torch.autograd.grad(g.sum(), z)[0] if g.requires_grad else torch.zeros_like(z)
    torch.testing.assert_close(second, h, rtol=1e-6, atol=1e-12)
    r = draw(30).requires_grad_()
    bend = loss.bend(r.detach())
    torch.testing.assert_close(bend.slope, torch.autograd.grad(loss.cost(r), r)[0])
    assert (bend.curvature >= 0).all() and (first <= 1).all()
    old, new = draw(30), draw(30, seed=1)
    torch.testing.assert_close(loss.fall(old, new), loss.cost(old) - loss.cost(new))
    torch.testing.assert_close(loss.cost(1e-6 * old), 0.5 * (1e-6 * old).square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_robust_fits_beside_scipy(name):
    f = lambda b: decay(b) - OUTLIERS
    fit = optim.least_squares(f, START, loss=NAMES[name](0.1))
    expected = theirs(f, START, loss=name, f_scale=0.1)
    assert fit.success and fit.cost == pytest.approx(expected.cost, rel=1e-9)
    torch.testing.assert_close(fit.x, torch.tensor(expected.x), rtol=1e-6, atol=0)


def test_outliers_pull_less_and_in_the_end_not_at_all():
    f = lambda b: decay(b) - OUTLIERS
    keep = torch.ones(60, dtype=torch.bool)
    keep[::7] = False
    clean = optim.least_squares(lambda b: (decay(b) - OUTLIERS)[keep], START).x
    losses = [robust.Squared(), robust.Huber(0.1), robust.Cauchy(0.1), robust.GemanMcClure(0.15)]
    off = [float((optim.least_squares(f, START, loss=loss).propagate(decay)[0] - decay(clean)).abs().max()) for loss in losses]
    assert off[0] > 0.3 and off[1] < off[0] / 5 and max(off[2:]) < off[1] / 2, off


@pytest.mark.slow
@pytest.mark.parametrize("loss", [robust.Squared(), robust.Huber(0.05), robust.Cauchy(0.1)], ids=repr)
def test_standard_errors_under_heavy_tails_are_those_of_repetition(loss):
    """Errors of Student's t with three degrees of freedom: the spread of 100 fits is what each of them says of itself."""
    rng = np.random.default_rng(0)
    found, claimed = [], []
    for _ in range(100):
        y = decay(TRUTH) + torch.tensor(0.05 * rng.standard_t(3, 60))
        fit = optim.least_squares(lambda b: decay(b) - y, START, loss=loss)  # noqa: B023
        found.append(fit.x)
        claimed.append(fit.standard_errors)
    ratio = torch.stack(claimed).square().mean(0).sqrt() / torch.stack(found).std(0)
    assert (ratio > 0.8).all() and (ratio < 1.25).all(), ratio


# -- many parameters -----------------------------------------------------------------------------------------------------------------------


def smoothing(p):
    """A cubic observation of each entry, and neighbours that ought to agree: residuals, start, pattern."""
    y = torch.sin(torch.linspace(0, 10, p, **DOUBLE)) + 0.3 * draw(p)
    i, j = torch.arange(p), torch.arange(p - 1)
    index = torch.stack([torch.cat([i, p + j, p + j]), torch.cat([i, j, j + 1])])
    pattern = torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), (2 * p - 1, p))
    return lambda x: (x + 0.1 * x**3 - y, 3 * (x[1:] - x[:-1])), torch.zeros(p, **DOUBLE), pattern


CASES = [{}, {"loss": robust.Cauchy(0.3)}, {"bounds": (-0.3, 0.3)}, {"loss": robust.Huber(0.2), "bounds": (-0.3, 0.3)}]


@pytest.mark.parametrize("options", CASES, ids=["plain", "robust", "bounds", "both"])
def test_sparse_and_matrix_free_equal_dense(options):
    f, start, pattern = smoothing(25)
    dense = optim.least_squares(f, start, **options)
    for layout in (pattern, pattern.to_dense().bool()):
        fit = optim.least_squares(f, start, solver=optim.SparseLU(layout), **options)
        torch.testing.assert_close(fit.x, dense.x, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(fit.covariance, dense.covariance, rtol=1e-5, atol=1e-10)
    free = optim.least_squares(f, start, solver=optim.ConjugateGradients(tol=1e-6), generator=torch.Generator().manual_seed(0), **options)
    torch.testing.assert_close(free.x, dense.x, rtol=1e-6, atol=1e-7)
    assert free.success and ("bounds" not in options or int(dense.active.abs().sum()) > 0)


def test_twenty_thousand_parameters(monkeypatch):
    """Without J; beside sparse LU, which has it. Dense, J would take 6.4 GB."""
    f, start, pattern = smoothing(20_000)
    monkeypatch.setattr(optim.Fit, "jacobian", property(lambda self: pytest.fail("J was formed")))
    free = optim.least_squares(f, start, solver=optim.ConjugateGradients(), generator=torch.Generator().manual_seed(0))
    sparse = optim.least_squares(f, start, solver=optim.SparseLU(pattern))
    assert free.success and sparse.success and free.gradient.abs().max() < 1e-6
    torch.testing.assert_close(free.x, sparse.x, rtol=1e-6, atol=1e-7)
    assert "(19980 more)" in repr(free)
    with pytest.raises(ValueError, match="covariance of 20000 parameters is a matrix of 3.2 GB"):
        free.covariance  # noqa: B018


def test_colours_are_few_and_do_not_meet():
    pattern = torch.zeros(30, 30, dtype=torch.bool)
    for k in (-1, 0, 1):
        pattern |= torch.diag(torch.ones(30 - abs(k), dtype=torch.bool), k)
    solver = optim.SparseLU(pattern)
    assert solver.colours == 3 and not solver.by_rows
    tall = torch.zeros(30, 31, dtype=torch.bool)  # every row has its own column, and all have the last: by rows it takes 30, by columns 2
    tall[:, :30], tall[:, 30] = torch.eye(30, dtype=torch.bool), True
    assert optim.SparseLU(tall).colours == 2
    arrow = optim.SparseLU(tall.T)
    assert arrow.by_rows and arrow.colours == 2  # one row has all columns


def test_a_pattern_must_hold_all_of_J():
    f, start, pattern = smoothing(10)
    short = pattern.to_dense().bool()
    short[12, 3] = False  # the residual between entries 2 and 3
    with pytest.raises(ValueError, match="the sparsity pattern misses entries of J: residual 12"):
        optim.least_squares(f, start + 0.1, solver=optim.SparseLU(short))
    with pytest.raises(ValueError, match=r"pattern is \[19, 10\]; this problem has 17 residuals of 9"):
        optim.least_squares(smoothing(9)[0], start[:9], solver=optim.SparseLU(pattern))
    with pytest.raises(ValueError, match=r"the pattern is a tensor \(4,\); expected"):
        optim.SparseLU(torch.ones(4))


# -- what goes wrong -----------------------------------------------------------------------------------------------------------------------


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"2 of 3 residuals are not finite at the start \(residual 1 is nan\)"):
        optim.least_squares(lambda b: torch.sqrt(torch.arange(3.0, **DOUBLE) * b), torch.tensor([-1.0], **DOUBLE))
    with pytest.raises(ValueError, match=r"derivative of residual 0 with respect to x\[0\] is inf at the start"):
        optim.least_squares(lambda b: torch.sqrt(b), torch.tensor([0.0], **DOUBLE))
    with pytest.raises(ValueError, match=r"x0 is not finite: x\[1\] = nan"):
        optim.least_squares(misfit, torch.tensor([1.0, math.nan, 1.0], **DOUBLE))


def test_steps_into_the_undefined_are_taken_back():
    # log b has no value beyond 0, where a full step from 5 would lead.
    bold = {"damping": optim.LevenbergMarquardt(1e-9), "acceleration": optim.Straight()}
    fit = optim.least_squares(lambda b: torch.log(b) + 2.0, torch.tensor([5.0], **DOUBLE), **bold)
    assert fit.success and float(fit.x) == pytest.approx(math.exp(-2), rel=1e-9)


BAD = [
    (lambda b: b.detach(), ValueError, "do not depend on the parameters"),
    (lambda b: torch.tensor(misfit(b).tolist()), ValueError, "do not depend on the parameters"),
    (lambda b: None, TypeError, "answered a NoneType; expected a tensor of residuals"),
    (lambda b: b[:0], ValueError, "no residuals"),
]


@pytest.mark.parametrize("f, kind, message", BAD)
def test_bad_residual_functions(f, kind, message):
    with pytest.raises(kind, match=message):
        optim.least_squares(f, START)


def test_residuals_that_change_in_number_are_refused():
    calls = []

    def f(b):
        calls.append(1)
        return misfit(b)[: 60 - (len(calls) > 4)]

    with pytest.raises(ValueError, match="answered 59 residuals where it answered 60"):
        optim.least_squares(f, START)


def test_bad_options():
    with pytest.raises(ValueError, match="noise=-1.0; expected the variance"):
        optim.least_squares(misfit, START, noise=-1.0)
    with pytest.raises(ValueError, match="max_iterations=0"):
        optim.least_squares(misfit, START, max_iterations=0)
    with pytest.raises(TypeError, match="hold a int at the top"):
        optim.least_squares(misfit, 3)
    with pytest.raises(TypeError, match="x0 has dtype torch.bfloat16; expected float64"):
        optim.least_squares(misfit, START.bfloat16())
    with pytest.raises(ValueError, match="Huber: scale=0"):
        robust.Huber(0.0)
    with pytest.raises(ValueError, match="Units has 2 sizes; there are 3 parameters"):
        optim.least_squares(misfit, START, scaling=optim.Units(torch.ones(2)))


def test_a_parameter_without_effect_is_named():
    with pytest.warns(RuntimeWarning, match=r"unused\[1\] has no effect on the residuals at x0"):
        fit = optim.least_squares(lambda b: decay(b["b"]) - Y + b["unused"][0] * T, {"b": START, "unused": torch.zeros(2, **DOUBLE)})
    assert fit.success and "unused[1]" in repr(fit)
    with pytest.warns(RuntimeWarning, match=r"do not determine 1 of 5 directions: \+1 unused\[1\]"):
        errors = fit.standard_errors
    assert errors["unused"].isinf().tolist() == [False, True] and errors["b"].isfinite().all()


def test_directions_that_are_not_determined_are_named():
    f = lambda b: (b[0] + b[1]) * T + b[2] - Y  # only the sum of two
    fit = optim.least_squares(f, torch.tensor([1.0, 2.0, 0.0], **DOUBLE))
    with pytest.warns(RuntimeWarning, match=r"1 of 3 directions: (\+1 x\[0\] -1 x\[1\]|\+1 x\[1\] -1 x\[0\]|-1 x\[\d\] \+1 x\[\d\])"):
        covariance = fit.covariance
    with pytest.warns(RuntimeWarning, match="some standard errors are infinite"):
        assert fit.standard_errors.isinf().tolist() == [True, True, False]
    # What the data do determine has its proper error.
    line = optim.least_squares(lambda b: b[0] * T + b[1] - Y, torch.zeros(2, **DOUBLE))
    way = torch.tensor([1.0, 1.0, 0.0], **DOUBLE)
    assert float(way @ covariance @ way) == pytest.approx(float(line.covariance[0, 0]), rel=1e-6)
    torch.testing.assert_close(fit.propagate(lambda b: (b[0] + b[1]) * T + b[2])[1], line.propagate(lambda b: b[0] * T + b[1])[1], rtol=1e-4, atol=0)


def test_fewer_residuals_than_parameters():
    A, y = draw(3, 6), draw(3, seed=1)
    fit = optim.least_squares(lambda x: A @ x - y, torch.zeros(6, **DOUBLE))
    assert fit.success and fit.cost < 1e-20 and math.isnan(fit.noise)
    with pytest.warns(RuntimeWarning, match="do not determine 3 of 6 directions"):
        assert fit.standard_errors.isinf().all()
    known = optim.least_squares(lambda x: A @ x - y, torch.zeros(6, **DOUBLE), noise=0.01)
    with pytest.warns(RuntimeWarning):  # what the residuals determine, they determine to their own noise
        torch.testing.assert_close(A @ known.covariance @ A.T, 0.01 * torch.eye(3, **DOUBLE), rtol=1e-8, atol=1e-12)


def test_the_end_of_iterations_is_no_success():
    fit = optim.least_squares(rosenbrock, torch.tensor([-1.2, 1.0], **DOUBLE), max_iterations=2)
    assert not fit.success and fit.iterations == 2 and "go on with x0=fit.x" in fit.message and "NOT converged" in repr(fit)
    assert optim.least_squares(rosenbrock, fit.x).success


def test_callback_sees_the_way_and_may_end_it():
    seen = []
    fit = optim.least_squares(misfit, START, callback=seen.append)
    assert [s.iteration for s in seen][:3] == [0, 1, 2] and seen[0].cost > seen[-1].cost >= fit.cost
    assert all(a.cost >= b.cost for a, b in zip(seen, seen[1:])) and torch.equal(seen[0].x, START)
    ended = optim.least_squares(misfit, START, callback=lambda s: s.iteration == 2)
    assert not ended.success and ended.iterations == 2 and "callback" in ended.message


def test_an_interrupt_leaves_nothing_behind():
    x0, mode = START.clone().requires_grad_(), torch.is_grad_enabled()
    damping = optim.LevenbergMarquardt(1e-3)

    def stop(state):
        if state.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optim.least_squares(misfit, x0, damping=damping, callback=stop)
    assert torch.equal(x0.detach(), START) and x0.grad is None and torch.is_grad_enabled() == mode and damping.λ == 1e-3


def test_works_without_grad_mode_and_leaves_random_numbers_alone():
    state = torch.random.get_rng_state()
    with torch.no_grad():
        a = optim.least_squares(misfit, START)
    torch.testing.assert_close(a.x, optim.least_squares(misfit, START).x)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.gpu
def test_on_a_gpu():
    t, y = T.cuda(), Y.cuda()
    fit = optim.least_squares(lambda b: decay(b, t) - y, START.cuda())
    assert fit.x.is_cuda
    torch.testing.assert_close(fit.x.cpu(), optim.least_squares(misfit, START).x, rtol=1e-8, atol=0)


# -- laws ----------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), unit=st.floats(-6, 6), tilt=st.floats(-6, 6))
def test_neither_units_nor_order_matter(seed, unit, tilt):
    """The units of residuals and of each parameter, and the order of the residuals, change neither the fit nor its errors in proportion."""
    plain = optim.least_squares(misfit, START)
    units = 10.0 ** torch.tensor([tilt, -tilt, tilt / 2], **DOUBLE)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    other = optim.least_squares(lambda b: 10.0**unit * misfit(b * units)[order], START / units)
    torch.testing.assert_close(other.x * units, plain.x, rtol=1e-8, atol=0)
    torch.testing.assert_close(other.standard_errors * units, plain.standard_errors, rtol=1e-6, atol=0)
    assert other.noise == pytest.approx(plain.noise * 100.0**unit, rel=1e-8)
    assert abs(other.iterations - plain.iterations) <= 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_data_twice_halve_the_covariance_of_known_noise(seed):
    y = decay(TRUTH) + 0.05 * draw(60, seed=seed)
    once = optim.least_squares(lambda b: decay(b) - y, START, noise=0.0025)
    twice = optim.least_squares(lambda b: (decay(b) - y, decay(b) - y), START, noise=0.0025)
    torch.testing.assert_close(twice.x, once.x, rtol=1e-8, atol=0)
    torch.testing.assert_close(2 * twice.covariance, once.covariance, rtol=1e-7, atol=0)
