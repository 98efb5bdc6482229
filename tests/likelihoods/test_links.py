"""Links: derivatives by autodiff where autodiff is exact, by many-digit arithmetic far below zero."""

from __future__ import annotations

import math

import pytest
import torch

from bayesgn import likelihoods as L

from .families import D, tensor

LINKS = [L.Exp(), L.Exp(0.5), L.Softplus(), L.LogSoftplus()]
close = lambda a, b, tol=1e-12: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_derivatives(link):
    f = torch.linspace(-30, 30, 241, dtype=D, requires_grad=True)
    g = link(f)
    (slope,) = torch.autograd.grad(g.sum(), f, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), f)
    close(link.slope(f), slope)
    torch.testing.assert_close(link.bend(f), bend, atol=1e-11, rtol=1e-11)
    if hasattr(link, "log"):
        torch.testing.assert_close(link.log(f), g.log(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(link.log_slope(f), link.slope(f) / g, atol=1e-12, rtol=1e-12)
        want = link.bend(f) / g - (link.slope(f) / g).square()
        torch.testing.assert_close(link.log_bend(f), want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("f", [-700.0, -50.0, -36.1, -36.0, -20.0, -10.01, -9.99, -3.0, 0.0, 3.0, 19.0, 21.0, 50.0, 700.0])
def test_log_softplus_in_fifty_digits(f):
    mp = pytest.importorskip("mpmath")                               # comes with torch
    with mp.workdps(400):
        softplus = mp.log1p(mp.e ** mp.mpf(f))
        slope = 1 / (1 + mp.e ** -mp.mpf(f)) / softplus
        bend = slope * (1 / (1 + mp.e ** mp.mpf(f)) - slope)
        want = [float(mp.log(softplus)), float(slope), float(bend)]
    link = L.LogSoftplus()
    x = tensor([f])
    assert math.isclose(L.Softplus()(x).item(), float(softplus), rel_tol=1e-15)
    for got, value in zip((link(x), link.slope(x), link.bend(x)), want):
        assert math.isclose(got.item(), value, rel_tol=1e-10 if value == want[2] else 1e-15, abs_tol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_finite_everywhere(dtype):
    f = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    for link in (L.Softplus(), L.LogSoftplus()):
        for values in (link(f), link.slope(f), link.bend(f)):
            assert values.isfinite().all() and values.dtype == dtype
            assert torch.autograd.grad(values.sum(), f)[0].isfinite().all()


def test_bad_rate():
    with pytest.raises(ValueError, match="rate must be positive"):
        L.Exp(-1.0)
