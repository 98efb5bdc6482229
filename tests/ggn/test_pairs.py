"""Sums over pairs of δ ⊗ a are the sums through J, with weight and bias, within a layer and across two, in slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn.ggn import pairs
from bayesgn.ggn.factors import Factors, Linear
from bayesgn.ggn.full import Concatenated


def linear(seed: int, n: int, k: int, o: int, i: int, weight: bool = True, bias: bool = True) -> Linear:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, 1, 1, i if weight else 1, generator=g, dtype=torch.float64)
    return Linear(a, torch.randn(n, 1, 1, k, o, generator=g, dtype=torch.float64), weight, bias)


PARTS = st.sampled_from([(True, True), (True, False), (False, True)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(3, 5), st.integers(1, 4), st.integers(1, 4), PARTS)
def test_pairs_equal_products_of_jacobians(seed, n, k, o, i, parts):
    f, h = linear(seed, n, k, o, i, *parts), linear(seed + 1, n, k, i + 1, o + 1)
    both = Concatenated([f, h])
    assert f.paired and h.paired
    J = torch.cat([f.jacobian(), h.jacobian()], dim=-1).flatten(0, 1)
    torch.testing.assert_close(both.full(), J.mT @ J)
    torch.testing.assert_close(f.full(), Factors.full(f))


@pytest.mark.parametrize("entries", [1, 60, 10**6])
def test_slices_do_not_matter(entries, monkeypatch):
    f, h = linear(0, 11, 3, 4, 3), linear(1, 11, 3, 2, 5)
    wanted = Concatenated([f, h]).full()
    monkeypatch.setattr(pairs, "ENTRIES", entries)
    torch.testing.assert_close(Concatenated([f, h]).full(), wanted)


def test_few_columns_and_shared_positions_go_through_jacobians():
    assert not linear(0, 5, 2, 3, 3).paired
    shared = Linear(torch.randn(2, 1, 4, 3), torch.randn(2, 1, 4, 5, 2), True, True)
    assert not shared.paired
    J = shared.jacobian().flatten(0, 1)
    torch.testing.assert_close(shared.full(), J.mT @ J)
