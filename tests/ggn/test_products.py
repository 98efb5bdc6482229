"""H V by factors and by double backward equals brute force, for every module of the zoo, kept or walked again."""

from __future__ import annotations

import logging

import pytest
import torch

from bayesgn import _data
from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Linearizer
from bayesgn.ggn.products import FactorProducts, GraphProducts, Products, mixtures
from tests.ggn.problem import draw, mlp
from tests.ggn.test_modules import rows_of, snapshot
from tests.oracles import dense
from tests.zoo.modules import ZOO, named

ZERO = torch.zeros((), dtype=torch.float64)
TWICE = {"embedding_bag"}  # torch has no second derivative of it: the factors serve


class Walks:
    """A stream over one batch of a zoo member, in two pieces, that can be walked again."""

    def __init__(self, case) -> None:
        self.net, self.x, self.r = case.build()
        self.rows = rows_of(case)
        self.linearizer = Linearizer(self.net, ParameterVector.of(self.net))
        self.linearizer.prepare(self.x, self.rows)
        self.p = self.linearizer.vector.numel
        self.S = draw(_data.len_of(self.x), self.r, 2)
        self.walks = 0

    def __iter__(self):
        self.walks += 1
        for part in ([0, 1], list(range(2, len(self.S)))):
            x = _data.rows(self.x, part)
            lin = self.linearizer(x, self.rows)
            lin.source = (self.linearizer, x, self.rows)
            yield lin, self.S[part]


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_every_module(case):
    stream = Walks(case)
    J = dense.jacobian(stream.net, stream.x, rows=stream.rows)
    H = dense.ggn(J, stream.S @ stream.S.mT)
    V = draw(stream.p, 3, seed=1)
    before = snapshot(stream.net)
    for graph in (False, True):
        products = Products(stream, stream.linearizer.blocks, ZERO, graph=graph)
        torch.testing.assert_close(products(V), H @ V, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(products.diagonal, H.diagonal(), rtol=1e-9, atol=1e-9)
        assert products.m == len(stream.S) * 2
        served = isinstance(products.kept[0], GraphProducts)
        assert served == (graph and case.name not in TWICE), "double backward serves what torch can differentiate twice"
    after = snapshot(stream.net)
    assert before[1:] == after[1:] and all(torch.equal(v, after[0][k]) for k, v in before[0].items())


def test_explicit_jacobians_that_do_not_fit_are_left_to_the_graph(caplog):
    with caplog.at_level(logging.INFO, logger="bayesgn.ggn"):
        for name, kind in (("lstm", GraphProducts), ("mlp", FactorProducts)):
            stream = Walks(named(name))
            products = Products(stream, stream.linearizer.blocks, ZERO, memory=0)
            assert products.kept is None and all(isinstance(batch, kind) for batch in products.batches())
            kept = Products(stream, stream.linearizer.blocks, ZERO).kept
            assert kept is not None and all(isinstance(batch, FactorProducts) for batch in kept)
            J = dense.jacobian(stream.net, stream.x)
            V = draw(stream.p, 2)
            torch.testing.assert_close(products(V), dense.ggn(J, stream.S @ stream.S.mT) @ V, rtol=1e-9, atol=1e-9)
    assert "anew each time, by double backward" in caplog.text and "anew each time, by factors" in caplog.text


@pytest.mark.parametrize("graph", [False, True])
def test_walks_again_when_memory_is_short(graph):
    problem = mlp()
    stream = problem.stream([0, 1], [2, 3, 4, 5])
    products = Products(stream, problem.blocks, ZERO, memory=0, graph=graph)
    V = draw(problem.p, 2)
    assert products.kept is None and stream.walks == 1
    torch.testing.assert_close(products(V), problem.H @ V, rtol=1e-10, atol=1e-10)
    assert stream.walks == 2
    ε = products.noise(20_000, torch.Generator().manual_seed(0))
    assert (ε @ ε.mT / 20_000 - problem.H).norm() < 0.05 * problem.H.norm()


def test_a_linearization_of_unknown_source_is_served_by_factors():
    problem = mlp()

    def plain():
        for lin, S in problem.stream():
            del lin.source
            yield lin, S

    products = Products(list(plain()), problem.blocks, ZERO, graph=True)
    V = draw(problem.p, 2)
    torch.testing.assert_close(products(V), problem.H @ V, rtol=1e-10, atol=1e-10)


def test_masked_weights():
    problem = mlp()
    names = dict(problem.net.named_parameters())
    masks = {n: draw(*q.shape, seed=3) > 0 for n, q in names.items()}
    problem.linearizer = Linearizer(problem.net, ParameterVector.of(problem.net, masks))
    problem.linearizer.prepare(problem.x, lambda f: f)
    keep = torch.cat([m.flatten() for m in masks.values()])
    H = problem.H[keep][:, keep]
    V = draw(len(H), 2)
    for graph in (False, True):
        products = Products(problem.stream(), problem.linearizer.blocks, ZERO, graph=graph)
        torch.testing.assert_close(products(V), H @ V, rtol=1e-10, atol=1e-10)


def test_few_columns_serve_a_net_of_many_outputs(monkeypatch):
    problem = mlp(2, 3, 12, 6)  # 12 outputs
    stream = problem.stream([0, 1], [2, 3, 4, 5])
    sizes = []
    for part in stream:
        sizes.append(part[1].shape[-1])
    assert min(sizes) > 3
    V = draw(problem.p, 2)
    exact = Products(stream, problem.blocks, ZERO, graph=True)
    few = Products(stream, problem.blocks, ZERO, graph=True, most=3)
    torch.testing.assert_close(few(V), problem.H @ V, rtol=1e-9, atol=1e-9)  # the products are of all columns
    ratio = few.diagonal / exact.diagonal
    assert few.m == exact.m and 0.7 < float(few.diagonal.sum() / exact.diagonal.sum()) < 1.4 and bool((ratio > 0).all())
    monkeypatch.setattr(Products, "_graph", lambda *_: None)  # double backward serves nothing: factors of all columns
    plain = Products(stream, problem.blocks, ZERO, graph=True, most=3)
    torch.testing.assert_close(plain(V), problem.H @ V, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.diagonal, exact.diagonal)


def test_mixtures_square_to_the_same_on_average():
    S = draw(1, 4, 6).expand(3000, -1, -1)
    mixed = mixtures(S, 2, torch.Generator().manual_seed(0))
    assert mixed.shape == (3000, 4, 2) and mixtures(S, 6, torch.Generator()) is S
    torch.testing.assert_close((mixed @ mixed.mT).mean(0), S[0] @ S[0].mT, rtol=0.1, atol=0.3)
