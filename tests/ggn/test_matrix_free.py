"""MatrixFree: exact where it says so, estimates with honest errors elsewhere, and warnings instead of silent wrong numbers."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn.ggn import Full, MatrixFree
from bayesgn.ggn.lanczos import quadrature, tridiagonal
from bayesgn.ggn.matrix_free import conjugate_gradients
from tests.ggn.problem import draw, mlp

ONE = torch.ones((), dtype=torch.float64)


def prior(problem, value: float = 0.8):
    return [torch.tensor(value, dtype=torch.float64)] * len(problem.blocks)


def close(a, b, tol=1e-8):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 100))
def test_conjugate_gradients(p, columns, seed):
    A = draw(p, p, seed=seed)
    M, B = A @ A.mT + torch.eye(p, dtype=torch.float64), draw(p, columns, seed=seed + 1)
    X = conjugate_gradients(lambda V: M @ V, B, M.diagonal(), 1e-12, 500)
    close(M @ X, B)
    products = []
    again = conjugate_gradients(lambda V: products.append(V) or M @ V, B, M.diagonal(), 1e-8, 500, start=X)
    close(again, X)
    assert len(products) <= 2, "a warm start at the solution needs one product to see it"


def test_a_solve_that_does_not_converge_says_so(caplog):
    problem = mlp()
    precision = problem.fit(MatrixFree(iterations=2, tol=1e-10)).with_prior(prior(problem, 1e-4), ONE)
    with caplog.at_level(logging.WARNING, logger="bayesgn.ggn"):
        precision.solve(draw(problem.p))
    assert "after 2 iterations" in caplog.text and "residual" in caplog.text
    assert precision.solve(torch.zeros(problem.p, dtype=torch.float64)).abs().max() == 0


def test_lanczos_quadrature_is_exact_after_p_steps():
    λ = torch.tensor([0.0, 0.1, 2.0, 2.0, 30.0], dtype=torch.float64)
    Q = torch.linalg.qr(draw(5, 5)).Q
    H = Q @ torch.diag(λ) @ Q.mT
    z = torch.linalg.qr(draw(5, 3, seed=1)).Q
    θ, w = quadrature(*tridiagonal(lambda V: H @ V, z, 10))
    close((w * torch.log1p(θ.clamp_min(0))).sum(1), (z * (Q @ torch.diag(torch.log1p(λ)) @ Q.mT @ z)).sum(0))


def test_log_determinant_and_gradients_within_their_standard_error():
    problem = mlp(d=8, h=10, c=4, n=20)
    θ = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64, requires_grad=True)
    ours, exact = (
        problem.fit(s).with_prior([θ[0], θ[1]], θ[2]) for s in (MatrixFree(probes=64, steps=60, tol=1e-10), Full())
    )
    error = ours.logdet_error()
    assert 0 < error < 0.1 * exact.logdet()
    assert (ours.logdet() - exact.logdet()).abs() < 4 * error
    assert torch.equal(ours.logdet(), ours.logdet()), "the same random vectors every time"
    found, wanted = (torch.autograd.grad(precision.logdet(), θ)[0] for precision in (ours, exact))
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.0)
    torch.testing.assert_close(ours.diagonal(), exact.diagonal(), rtol=0, atol=0.6)


def test_gradient_is_that_of_the_value():
    # signs for probes: both value and gradient are of the same estimate, up to the quadrature
    problem = mlp()
    curvature = problem.fit(MatrixFree(probes=3, steps=100, tol=1e-12))

    def value(P):
        return curvature.with_prior([P] * 2, 1.3 * ONE).logdet()

    P = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(P), P)
    step = 1e-5
    close(grad, (value(P.detach() + step) - value(P.detach() - step)) / (2 * step), 1e-6)


def test_walks_the_data_it_is_given():
    problem = mlp()
    stream = problem.stream([0, 1, 2], [3, 4, 5])
    curvature = MatrixFree(memory=0, tol=1e-12).start(problem.blocks, problem.x)
    curvature.fit(stream)
    precision = curvature.with_prior(prior(problem), ONE)
    v = draw(problem.p)
    close(precision.solve(v), problem.fit(Full()).with_prior(prior(problem), ONE).solve(v))
    assert stream.walks > 2


def test_cannot_be_saved():
    problem = mlp()
    curvature = problem.fit(MatrixFree())
    with pytest.raises(ValueError, match=r"nothing to save.*ggn.LowRank"):
        curvature.tensors()
    with pytest.raises(ValueError, match="nothing to save"):
        curvature.load({})


def test_options_are_checked():
    with pytest.raises(ValueError, match="tol=0"):
        MatrixFree(tol=0)
    with pytest.raises(ValueError, match="probes=0"):
        MatrixFree(probes=0)
