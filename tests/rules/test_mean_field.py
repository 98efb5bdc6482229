"""MeanField and Identity: their roots for a network, and what they leave of other curvatures."""

from __future__ import annotations

import pytest
import torch

from bayesgn import ggn, likelihoods, rules
from bayesgn.rules import Sites
from tests.likelihoods.families import BY_NAME
from tests.models.problems import close, fit, of
from tests.oracles import dense
from tests.rules.test_expansions import EXPANSIONS, problem

D = torch.float64


def diagonal(M):
    return torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("inner", [rules.GaussNewton(), rules.Exact(rules.eigabs), rules.EmpiricalFisher(), rules.MonteCarloFisher(2)], ids=repr)
def test_the_root_is_that_of_the_diagonal(inner):
    likelihood, f, y = likelihoods.Categorical(), torch.randn(4, 3, 3, dtype=D), torch.tensor([[0, 1, 2], [1, -100, 0], [2, 2, 2], [-100] * 3])
    S = rules.MeanField(inner).root(likelihood, f, y, torch.Generator().manual_seed(0))
    full = inner.root(likelihood, f, y, torch.Generator().manual_seed(0))
    torch.testing.assert_close(S @ S.mT, diagonal(full @ full.mT))
    assert S.shape == (4, 9, 9) and rules.MeanField(inner).columns(9) == 9 and not S[3].any()
    assert rules.MeanField(inner).random == inner.random


@pytest.mark.parametrize("curvature", [rules.MeanField(), rules.Identity(0.3)], ids=repr)
@pytest.mark.parametrize("family", ["categorical", "heteroscedastic", "gaussian-2"])
def test_in_a_networks_posterior(curvature, family):
    """H = Σ Jᵀ Λ J with Λ = diag of the Fisher information, or 0.3 I."""
    p = of(family)
    posterior = fit(p, ggn.Full, rule=rules.Laplace(curvature))
    Λ = diagonal(p.likelihood.ggn(p.net(p.x), p.y).detach())
    if isinstance(curvature, rules.Identity):
        Λ = 0.3 * (Λ != 0).to(D)
    cov = dense.posterior_cov(dense.ggn(dense.jacobian(p.net, p.x), Λ), torch.ones(len(posterior.mean), dtype=D))
    close(posterior.precision().solve(torch.eye(len(cov), dtype=D)), cov)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_cross_terms_go_before_anything_is_made_psd(expansion):
    likelihood, q, y, _ = problem(BY_NAME["heteroscedastic"])
    flat = Sites.flat(4, 2, q.mean)
    local = EXPANSIONS[expansion]().local(likelihood, q, y, flat)
    for curvature, matrix in ((rules.GaussNewton(), local.fisher()), (rules.Exact(), local.hessian()), (rules.EmpiricalFisher(), local.outer())):
        turn = EXPANSIONS[expansion](rules.MeanField(curvature))(likelihood, q, y, flat)
        torch.testing.assert_close(turn.sites.nat2, diagonal(matrix).clamp_min(0))
        assert turn.indefinite == int((matrix.diagonal(dim1=-2, dim2=-1) < -1e-12 * matrix.abs().amax((-1, -2))[:, None]).any(-1).sum())


def test_as_an_argument():
    rule = rules.Variational(rules.MeanField(rules.Exact()))
    assert repr(rule) == "Variational(curvature=MeanField(curvature=Exact(psd=eigclip)))"
    assert rule.curvature.exact and not rules.MeanField().exact
    assert repr(rules.Identity(2)) == "Identity(precision=2.0)"
    assert rules.MeanField().scale(likelihoods.Gaussian(0.5)).item() == pytest.approx(2.0)
