"""Closed forms of E[log p] and log E[p^α] under a Gaussian: values against fine quadrature, derivatives against autodiff of the value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesgn import likelihoods as L
from bayesgn.likelihoods.cubature import GaussHermite
from bayesgn.likelihoods.links import NormCDF

from .families import BY_NAME, FAMILIES, D, Family, tensor

close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)
POINTS = {1: 100, 2: 60, 3: 30, 4: 16, 8: 3}                        # 3 points for 8 latents: exact for the quartic of a regression network


def marginals(c: int, n: int = 4, width: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    A = width * torch.randn(n, c, c, dtype=D, generator=g) / c**0.5
    return torch.randn(n, c, dtype=D, generator=g), A @ A.mT + 0.01 * torch.eye(c, dtype=D)


def data(family: Family) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Marginals and y; the second row is missing, and in part the third where y is a vector."""
    y = family.data(4)[1]
    y[1] = family.missing
    if y.ndim == 2 and y.shape[1] > 1 and y.is_floating_point():
        y[2, 0] = torch.nan
    return *marginals(family.c), y


EXPECTED = [f for f in FAMILIES if (m := marginals(f.c)) and f.build().expected(*m, f.data(4)[1]) is not None]
TILTED = [(f, power) for f in FAMILIES for power in (1.0, 0.5) if (m := marginals(f.c)) and f.build().tilted(*m, f.data(4)[1], power) is not None]


def test_which_are_in_closed_form():
    closed = {"gaussian", "heteroscedastic", "poisson", "gamma", "coregionalisation", "regression-network"}
    assert closed <= {f.name for f in EXPECTED}
    assert {"gaussian", "gaussian-full", "coregionalisation", "bernoulli-normcdf"} <= {f.name for f, _ in TILTED}
    assert ("bernoulli-normcdf", 0.5) not in {(f.name, power) for f, power in TILTED}
    m, C, y = data(BY_NAME["heteroscedastic-softplus"])
    assert BY_NAME["heteroscedastic-softplus"].build().expected(m, C, y) is None


def derivatives_by_autodiff(value_of, mean, got):
    for n in range(len(mean)):
        alone = lambda m, n=n: value_of(m.unsqueeze(0), n)
        close(got.gradient[n], torch.autograd.functional.jacobian(alone, mean[n]))
        close(got.neg_hessian[n], -torch.autograd.functional.hessian(alone, mean[n]))


@pytest.mark.parametrize("family", EXPECTED, ids=lambda f: f.name)
def test_expected(family):
    lik = family.build()
    m, C, y = data(family)
    got = lik.expected(m, C, y)
    f, w = GaussHermite(POINTS[family.c])(m, C)
    many = y.expand(len(w), *y.shape)
    close(got.value, torch.einsum("q,qn->n", w, lik.log_prob(f, many)), 1e-8)
    close(got.fisher, torch.einsum("q,qnij->nij", w, lik.ggn(f, many)), 1e-8)
    derivatives_by_autodiff(lambda x, n: lik.expected(x, C[n : n + 1], y[n : n + 1]).value[0], m, got)
    assert got.value[1] == 0 and got.gradient[1].abs().sum() == 0 and got.neg_hessian[1].abs().sum() == 0 and got.fisher[1].abs().sum() == 0


@pytest.mark.parametrize("family, power", TILTED, ids=lambda v: getattr(v, "name", str(v)))
def test_tilted(family, power):
    lik = family.build()
    m, C, y = data(family)
    got = lik.tilted(m, C, y, power)
    f, w = GaussHermite(POINTS[family.c])(m, C)
    many = y.expand(len(w), *y.shape)
    log_p = power * lik.log_prob(f, many) + w.log()[:, None]
    close(got.value, log_p.logsumexp(0), 1e-8)
    close(got.fisher, torch.einsum("qn,qnij->nij", log_p.softmax(0), lik.ggn(f, many)), 1e-8)
    derivatives_by_autodiff(lambda x, n: lik.tilted(x, C[n : n + 1], y[n : n + 1], power).value[0], m, got)
    assert got.value[1].abs() < 1e-14 and got.gradient[1].abs().sum() == 0 and got.neg_hessian[1].abs().sum() == 0 and got.fisher[1].abs().sum() == 0


@pytest.mark.parametrize("m", [-40.0, -3.0, 0.0, 2.0, 30.0])
@pytest.mark.parametrize("v", [0.0, 1e-6, 0.3, 9.0, 1e4])
def test_tilted_fisher_of_a_probit(m, v):
    """Against a sum over a million nodes in f, and against the Fisher information itself where f is certain."""
    link = NormCDF()
    got = link.tilted_fisher(tensor([m]), tensor([v]))
    if v == 0:
        return close(got, link.fisher(tensor([m])), 1e-9)
    s = v**0.5
    f = torch.linspace(m - 40 * min(s, 3.0), m + 40 * min(s, 3.0), 1_000_001, dtype=D).clamp(-45, 45)
    weights = torch.diff(f, append=f[-1:])
    log_tilted = link.log(f) - 0.5 * (f - m).square() / v - 0.5 * np.log(2 * np.pi * v)
    Z = torch.special.log_ndtr(tensor([m]) / (1 + v) ** 0.5)
    close(got, ((log_tilted - Z).exp() * link.fisher(f) * weights).sum().reshape(1), 1e-7)


def test_a_logit_has_no_closed_form():
    m, C, y = data(BY_NAME["bernoulli"])
    assert L.Bernoulli().tilted(m, C, y, 1.0) is None and L.Bernoulli().expected(m, C, y) is None
