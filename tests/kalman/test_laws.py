"""Laws that hold for any chain, over random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn._kalman import Chain
from tests.kalman.chains import DOUBLE, Problem, first_row, make, psd
from tests.kalman.engines import NAMES, engine

close = torch.testing.assert_close
few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
SHAPES = ((1, 1), (3, 1), (4, 2))  # each is compiled once


@pytest.fixture(params=NAMES)
def run(request):
    with engine(request.param) as it:
        yield it


def problem(seed: int, n: int, shape: tuple[int, int]) -> Problem:
    """Random steps, some of them none at all, some data missing."""
    d, c = shape
    p = make(n, d, c, H=first_row(3) if d == 3 else None, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    p.chain.step[torch.rand(n, generator=g) < 0.2] = -1
    gone = torch.rand(n, generator=g) < 0.2
    p.nat1[gone], p.nat2[gone] = 0, 0
    return p


@few
@given(seed=seeds, n=st.integers(1, 70), shape=st.sampled_from(SHAPES))
def test_engines_agree(seed, n, shape):
    p = problem(seed, n, shape)
    found = []
    for name in NAMES:
        with engine(name) as run:
            found.append((*run.smooth(*p), *run.states(*p)))
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            close(a, b, rtol=1e-9, atol=1e-11)


def test_order_of_coincident_data_does_not_matter(run):
    @few
    @given(seed=seeds, n=st.integers(2, 30))
    def law(seed, n):
        p = problem(seed, n, (3, 1))
        p.chain.step[n // 2] = -1
        instant = torch.cumsum(p.chain.step >= 0, 0)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        order = order[torch.argsort(instant[order], stable=True)]  # only within each instant
        a, b = run.smooth(*p), run.smooth(p.chain, p.nat1[order], p.nat2[order])
        close(b[0], a[0], rtol=1e-10, atol=1e-11)
        close(b[1], a[1], rtol=1e-9, atol=1e-11)  # points of one instant have one mean
        close(b[2], a[2], rtol=1e-9, atol=1e-11)

    law()


def test_coincident_data_add_up(run):
    @few
    @given(seed=seeds, n=st.integers(2, 30))
    def law(seed, n):
        p = problem(seed, n, (3, 1))
        p.chain.step[:] = torch.arange(n) - 1
        k = n // 2
        p.chain.step[k] = -1
        keep = torch.arange(n) != k
        nat1, nat2 = p.nat1.clone(), p.nat2.clone()
        nat1[k - 1] += nat1[k]
        nat2[k - 1] += nat2[k]
        a, b = run.smooth(*p), run.smooth(p.chain._replace(step=p.chain.step[keep]), nat1[keep], nat2[keep])
        close(b[0], a[0], rtol=1e-10, atol=1e-11)
        close(b[1], a[1][keep], rtol=1e-9, atol=1e-11)

    law()


def test_a_step_may_be_split_by_a_point_without_a_datum(run):
    @few
    @given(seed=seeds, n=st.integers(2, 30))
    def law(seed, n):
        p = problem(seed, n, (4, 2))
        A, Q, k = p.chain.A, p.chain.Q, n // 2
        g = torch.Generator().manual_seed(seed)
        A1, Q1 = torch.randn(4, 4, generator=g, dtype=DOUBLE) / 4, psd(g, 4)
        A2, Q2 = torch.randn(4, 4, generator=g, dtype=DOUBLE) / 4, psd(g, 4)
        step = p.chain.step.clone()
        step[k] = len(A) + 2
        u = torch.cat([A, A1[None], A2[None], (A2 @ A1)[None]]), torch.cat([Q, Q1[None], Q2[None], (A2 @ Q1 @ A2.mT + Q2)[None]])
        split = torch.cat([step[:k], torch.tensor([len(A), len(A) + 1]), step[k + 1 :]])
        insert = lambda t: torch.cat([t[:k], torch.zeros_like(t[:1]), t[k:]])
        keep = torch.arange(n + 1) != k
        a = run.smooth(Chain(*u, step, *p.chain[3:]), p.nat1, p.nat2)
        b = run.smooth(Chain(*u, split, *p.chain[3:]), insert(p.nat1), insert(p.nat2))
        close(b[0], a[0], rtol=1e-9, atol=1e-11)
        close(b[1][keep], a[1], rtol=1e-9, atol=1e-11)
        close(b[2][keep], a[2], rtol=1e-9, atol=1e-11)

    law()


def test_time_may_run_backwards(run):
    """A stationary process with P = I seen from its end has the transitions Aᵀ and the noises I − AᵀA."""

    @few
    @given(seed=seeds, n=st.integers(1, 40))
    def law(seed, n):
        p = problem(seed, n, (3, 1))
        eye = torch.eye(3, dtype=DOUBLE)
        A = p.chain.A
        step = p.chain.step
        back = torch.cat([step[:1], step[1:].flip(0)])
        forward = Chain(A, eye - A @ A.mT, step, eye, p.chain.H)
        reverse = Chain(A.mT, eye - A.mT @ A, back, eye, p.chain.H)
        a, b = run.smooth(forward, p.nat1, p.nat2), run.smooth(reverse, p.nat1.flip(0), p.nat2.flip(0))
        close(b[0], a[0], rtol=1e-10, atol=1e-11)
        close(b[1].flip(0), a[1], rtol=1e-9, atol=1e-11)
        close(b[2].flip(0), a[2], rtol=1e-9, atol=1e-11)

    law()
