"""The dual: equal to Full for every module, subsets that say what they keep, inducing data, and factors that can be saved."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from bayesgn import _data
from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Full, Gram, Linearizer
from bayesgn.ggn.keeping import compact, compressed, concatenate
from tests.ggn.problem import Problem, draw, make, mlp
from tests.ggn.test_modules import rows_of
from tests.oracles import dense
from tests.zoo.modules import ZOO

ONE = torch.ones((), dtype=torch.float64)


def prior(problem, value: float = 0.8):
    return [torch.tensor(value, dtype=torch.float64)] * len(problem.blocks)


def close(a, b, tol=1e-8):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_every_module_equals_full(case):
    net, x, r = case.build()
    rows = rows_of(case)
    linearizer = Linearizer(net, ParameterVector.of(net))
    linearizer.prepare(x, rows)
    S = draw(_data.len_of(x), r, 2)
    pieces = [linearizer(_data.rows(x, part), rows).factors(S[part]) for part in ([0, 1], list(range(2, len(S))))]
    two = []
    for structure in (Gram(), Full()):
        curvature = structure.start(linearizer.blocks, next(net.parameters()))
        for factors in pieces:
            curvature.add(factors)
        two.append(curvature)
    p = linearizer.vector.numel
    layers = [1.0 + torch.rand((), generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, _ in enumerate(linearizer.blocks)]
    each = [0.5 + torch.rand(b.numel, generator=torch.Generator().manual_seed(i)).double() for i, b in enumerate(linearizer.blocks)]
    for P in ([0.7 * ONE] * len(layers), layers, each):
        ours, theirs = (curvature.with_prior(P, 1.3 * ONE) for curvature in two)
        lin = linearizer(x, rows).factors()
        close(ours.logdet(), theirs.logdet())
        close(ours.covariance(lin), theirs.covariance(lin))
        close(ours.joint(lin), theirs.joint(lin))
        v = draw(2, p)
        close(ours.solve(v), theirs.solve(v))


def test_gradients_to_the_inputs():
    problem = mlp()
    x = draw(2, 3, seed=5).requires_grad_()
    grads = []
    for structure in (Gram(), Full()):
        precision = problem.fit(structure).with_prior(prior(problem), ONE)
        lin = problem.linearizer(x, lambda f: f, differentiable=True)
        (g,) = torch.autograd.grad((draw(2, 3, 3) * precision.covariance(lin.factors())).sum(), x)
        grads.append(g)
    close(*grads)
    assert grads[0].abs().max() > 1e-3


# -- a subset ----------------------------------------------------------------------------------------------------------


def test_subset_is_the_posterior_of_the_data_it_keeps(caplog):
    problem = mlp(n=12)
    with caplog.at_level(logging.INFO, logger="bayesgn.ggn"):
        curvature = problem.fit(Gram(subset=5, seed=3), [0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11])
    assert "5 of 12 data" in caplog.text
    kept = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64).argsort()[:5].sort().values
    part = Problem(problem.net, problem.x[kept], problem.S[kept])
    ours, theirs = (c.with_prior(prior(problem), ONE) for c in (curvature, part.fit(Full())))
    close(ours.logdet(), theirs.logdet())
    close(ours.covariance(problem.factors(problem.x)), theirs.covariance(problem.factors(problem.x)))


def test_subset_does_not_depend_on_batches_and_goes_on_after_loading():
    problem = mlp(n=12)
    structure = Gram(subset=5, seed=1)
    whole = problem.fit(structure)
    first = problem.fit(structure, [0, 1, 2, 3], [4, 5, 6])
    fresh = structure.start(problem.blocks, problem.x)
    fresh.load({k: v.clone() for k, v in first.tensors().items()})
    fresh.fit(problem.stream([7, 8], [9, 10, 11]))
    close(fresh.with_prior(prior(problem), ONE).logdet(), whole.with_prior(prior(problem), ONE).logdet(), 1e-12)


def test_subsets_are_uniform():
    problem = mlp(n=6)
    counts = torch.zeros(6)
    for seed in range(300):
        kept = Gram(subset=2, seed=seed).start(problem.blocks, problem.x).kept
        for n in (2, 3, 1):
            kept.put(problem.factors(problem.x[:n]), kept.draw(n))
        keys = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(kept.keys, keys[keys.argsort()[:2].sort().values])
        counts[keys.argsort()[:2]] += 1
    assert (counts / 300 - 1 / 3).abs().max() < 0.1  # 3.7 σ


# -- inducing data -----------------------------------------------------------------------------------------------------


def test_inducing_all_data_is_exact():
    problem = mlp(d=4, h=3, c=3, n=6)
    for P in (prior(problem), [0.5 * ONE, 2 * ONE], [0.5 + draw(b.numel, seed=i).square() for i, b in enumerate(problem.blocks)]):
        ours = problem.fit(Gram(inducing=10), [0, 1], [2, 3, 4, 5]).with_prior(P, 1.3 * ONE)
        theirs = problem.fit(Full()).with_prior(P, 1.3 * ONE)
        x = draw(3, 4, seed=7)
        close(ours.logdet(), theirs.logdet())
        close(ours.covariance(problem.factors(x)), theirs.covariance(problem.factors(x)))
        close(ours.diagonal(), theirs.diagonal())


def test_inducing_is_the_projection():
    problem = mlp(d=5, h=4, c=3, n=9)
    curvature = problem.fit(Gram(inducing=2, seed=4), [0, 1, 2, 3], [4, 5, 6, 7, 8])
    Z = torch.rand(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64).argsort()[:2]
    G = (problem.S[Z].mT @ problem.J[Z]).flatten(0, 1)
    U, values, _ = torch.linalg.svd(G.mT, full_matrices=False)
    U = U[:, values > 1e-6]
    H = U @ U.mT @ problem.H @ U @ U.mT
    eye = torch.eye(problem.p, dtype=torch.float64)
    for P in (prior(problem), [0.5 * ONE, 2 * ONE]):
        diagonal = torch.cat([p.expand(b.numel) for p, b in zip(P, problem.blocks, strict=True)])
        Σ = torch.linalg.inv(1.3 * H + torch.diag(diagonal))
        precision = curvature.with_prior(P, 1.3 * ONE)
        close(precision.logdet(), -torch.linalg.slogdet(Σ)[1])
        close(precision.covariance(problem.factors(problem.x)), dense.function_cov(problem.J, Σ))
        close(precision.solve(eye), Σ)


def test_inducing_adds_saves_and_says_when_it_holds_nothing():
    problem = mlp(n=8)
    structure = Gram(inducing=3)
    curvature = problem.fit(structure, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="holds no data"):
        structure.start(problem.blocks, problem.x).with_prior(prior(problem), ONE)
    with pytest.raises(ValueError, match="holds no data"):
        Gram().start(problem.blocks, problem.x).with_prior(prior(problem), ONE)
    fresh = structure.start(problem.blocks, problem.x)
    fresh.load({k: v.clone() for k, v in curvature.tensors().items()})
    for c in (curvature, fresh):
        c.fit(problem.stream([4, 5], [6, 7]))  # the inducing data stay
    lin, S = next(iter(problem.stream([4, 5, 6, 7])))
    added = problem.fit(structure, [0, 1, 2, 3])
    added.add(lin.factors(S))
    values = [c.with_prior(prior(problem), ONE).logdet() for c in (curvature, fresh, added)]
    close(values[0], values[1], 1e-12)
    close(values[0], values[2])


def test_options_are_checked():
    with pytest.raises(ValueError, match="subset=0"):
        Gram(subset=0)
    with pytest.raises(ValueError, match="choose one"):
        Gram(subset=3, inducing=3)


# -- keeping factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_roots_lose_their_null_column(dtype):
    from bayesgn.likelihoods import Categorical

    S = Categorical().ggn_root((8 * draw(7, 4)).to(dtype))
    small = compressed(S)
    assert small.shape == (7, 4, 3) and small.dtype == dtype
    torch.testing.assert_close(small @ small.mT, S @ S.mT, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)
    full_rank = draw(7, 4, 4)
    assert compressed(full_rank) is full_rank


def test_sequences_of_different_length_are_joined():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2), nn.Tanh())

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net, nn.Linear(2, 2)

        def forward(self, ids):
            return self.head(self.body(ids).mean(1))

    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(7, (3, t), generator=generator) for t in (2, 9))
    problem = make(Mean(), short)
    other = Problem(problem.net, long, draw(3, 2, 1))
    pieces = [q.linearizer(q.x, lambda f: f).factors(q.S) for q in (problem, other)]
    curvature = Gram().start(problem.blocks, problem.S)
    for factors in pieces:
        curvature.add(factors)
    H = problem.H + other.H
    close(
        curvature.with_prior(prior(problem, 1.0), ONE).logdet(),
        torch.linalg.slogdet(H + torch.eye(problem.p, dtype=torch.float64))[1],
    )
    for f, g in zip(*pieces, strict=True):  # and the joined factors are those of each
        J = concatenate([compact(f), compact(g)]).jacobian()
        close(J[:3, : f.k], f.jacobian())
        close(J[3:, : g.k], g.jacobian())
