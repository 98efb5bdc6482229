"""H ← keep · H + gain · H' in every storage: against dense sums, and the laws that a running average needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesgn.ggn import (
    Curvature,
    Diag,
    EigenKron,
    Full,
    Gram,
    Hessian,
    Kron,
    Layerwise,
    LowRank,
    LowRankPlusDiagonal,
    MatrixFree,
    Structure,
)
from tests.ggn.problem import Problem, conv, mlp
from tests.ggn.test_structures import block_diagonal, layers
from tests.oracles import dense

D = torch.float64
A, B = [0, 1, 2], [3, 4, 5]

# Storages that are linear in H, and the dense matrix each stands for.
LINEAR = [
    (Full(), lambda q: q.H),
    (Layerwise(), block_diagonal),
    (Diag(), lambda q: torch.diag(q.H.diagonal())),
    (LowRank(rank=200), lambda q: q.H),
    (LowRankPlusDiagonal(rank=200), lambda q: q.H),
]
TRUNCATED = [LowRank(rank=3, oversample=2, walks=3), LowRankPlusDiagonal(rank=3, oversample=2, walks=3)]
EVERY = [s for s, _ in LINEAR] + TRUNCATED + [Kron(), Kron(reduce=True)]
linear = pytest.mark.parametrize("structure, dense_of", LINEAR, ids=lambda v: repr(v) if isinstance(v, Structure) else "")
every = pytest.mark.parametrize("structure", EVERY, ids=repr)


def matrix(curvature: Curvature, scale: float = 1.0, P: float = 1.0) -> Tensor:
    """scale · H, from Σ."""
    p = curvature.blocks[-1].where.stop
    prior = [torch.tensor(P, dtype=D)] * len(curvature.blocks)
    precision = curvature.with_prior(prior, torch.tensor(scale, dtype=D))
    return torch.linalg.inv(precision.solve(torch.eye(p, dtype=D))) - P * torch.eye(p, dtype=D)


def part(problem: Problem, index: list[int]) -> Problem:
    return Problem(problem.net, problem.x[index], problem.S[index])


@linear
@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("keep, gain", [(0.7, 0.3), (1.0, 2.5), (0.0, 3.0), (0.4, 0.0), (1e-3, 50.0)])
def test_blend_is_the_sum_with_weights(structure, dense_of, make, keep, gain):
    problem = make()
    a, b = list(range(3)), list(range(3, problem.n))
    H, other = problem.fit(structure, a), problem.fit(structure, b)
    H.blend(other, keep, gain)
    expected = keep * dense_of(part(problem, a)) + gain * dense_of(part(problem, b))
    torch.testing.assert_close(matrix(H), expected, rtol=1e-8, atol=1e-9)
    precision = H.with_prior([torch.tensor(2.0, dtype=D)] * len(H.blocks), torch.tensor(0.5, dtype=D))
    torch.testing.assert_close(precision.logdet(), torch.logdet(0.5 * expected + 2 * torch.eye(len(expected), dtype=D)))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("make", [mlp, conv])
def test_kron_blends_sums_of_its_factors(reduce, make):
    """(k A + g A') ⊗ (k B + g B') / (k n + g n') for Kronecker blocks, sums elsewhere."""
    problem, keep, gain = make(), 0.6, 2.0
    a, b = list(range(3)), list(range(3, problem.n))
    H = problem.fit(Kron(reduce=reduce), a)
    H.blend(problem.fit(Kron(reduce=reduce), b), keep, gain)
    expected = keep * block_diagonal(part(problem, a)) + gain * block_diagonal(part(problem, b))
    variant = dense.kron_reduce if reduce else dense.kron_expand
    for name in layers(problem):
        module = problem.net.get_submodule(name)
        i = problem.weights(f"{name}.")[dense.homogeneous_order(module.weight, module.bias is not None)]
        parts = []
        for index in (a, b):
            q = part(problem, index)
            parts.append(variant(dense.layer_factors(q.net, q.x, name), q.S))
        (A1, B1, n1), (A2, B2, n2) = parts
        expected[i[:, None], i] = torch.kron(keep * B1 + gain * B2, keep * A1 + gain * A2) / (keep * n1 + gain * n2)
    torch.testing.assert_close(matrix(H), expected, rtol=1e-8, atol=1e-9)


@every
def test_from_nothing_it_is_the_other_scaled(structure):
    """keep · 0 + gain · H' = gain · H', also where ``keep`` is 0 over an old H."""
    problem = mlp()
    other = problem.fit(structure, A)
    expected = matrix(other, scale=2.5)
    for H, keep in ((structure.start(problem.blocks, problem.x), 1.0), (problem.fit(structure, B), 0.0)):
        H.blend(other, keep, 2.5)
        torch.testing.assert_close(matrix(H), expected, rtol=1e-7, atol=1e-8)


@every
def test_the_average_of_an_h_with_itself_is_itself(structure):
    problem = mlp()
    H = problem.fit(structure, A)
    before, precision = matrix(H), H.with_prior([torch.tensor(2.0, dtype=D)] * 2, torch.tensor(1.5, dtype=D)).logdet()
    for _ in range(3):
        H.blend(problem.fit(structure, A), 0.7, 0.3)
    torch.testing.assert_close(matrix(H), before, rtol=1e-6, atol=1e-6)
    after = H.with_prior([torch.tensor(2.0, dtype=D)] * 2, torch.tensor(1.5, dtype=D)).logdet()
    rtol = 1e-2 if isinstance(structure, LowRank) else 1e-6  # (densities of what was left out are joined: exact to first order)
    torch.testing.assert_close(after, precision, rtol=rtol, atol=1e-6)


@every
def test_the_other_is_not_touched_and_copies_are_apart(structure):
    problem = mlp()
    H, other = problem.fit(structure, A), problem.fit(structure, B)
    held, kept = {k: t.clone() for k, t in other.tensors().items()}, H.copy()
    before = matrix(kept)
    H.blend(other, 0.5, 0.5)
    for k, t in other.tensors().items():
        assert torch.equal(t, held[k]), k
    torch.testing.assert_close(matrix(kept), before, rtol=0, atol=0)
    new = structure.start(problem.blocks, problem.x)  # and its tensors rebuild it
    new.load({k: t.clone() for k, t in H.tensors().items()})
    torch.testing.assert_close(matrix(new), matrix(H), rtol=0, atol=0)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**4), keep=st.floats(0, 1), gain=st.floats(0, 100), which=st.integers(0, len(EVERY) - 1))
def test_a_blend_is_psd_and_keeps_the_diagonal_law(seed, keep, gain, which):
    problem = mlp(n=6, seed=seed)
    structure = EVERY[which]
    H = problem.fit(structure, A)
    H.blend(problem.fit(structure, B), keep, gain)
    M = matrix(H)
    size = keep * part(problem, A).H.diagonal() + gain * part(problem, B).H.diagonal()
    assert torch.linalg.eigvalsh(0.5 * (M + M.mT)).min() > -1e-8 * (1 + size.max())
    if isinstance(structure, LowRankPlusDiagonal):  # diag(H) is exact, whatever the rank
        torch.testing.assert_close(M.diagonal(), size, rtol=1e-6, atol=1e-8)
    if isinstance(structure, LowRank):  # never more than there is
        assert bool((M.diagonal() <= size + 1e-8 * (1 + size)).all())


@pytest.mark.parametrize("structure", TRUNCATED, ids=repr)
def test_what_is_left_out_of_a_truncated_blend_is_still_counted(structure):
    problem, keep, gain = mlp(n=6), 0.5, 1.5
    H = problem.fit(structure, A)
    H.blend(problem.fit(structure, B), keep, gain)
    assert H.tensors()["U"].shape[1] <= 3
    trace = keep * part(problem, A).H.trace() + gain * part(problem, B).H.trace()
    torch.testing.assert_close(H.tensors()["eigenvalues"].sum() + H.tensors()["left_out"].sum(), trace)
    if isinstance(structure, LowRank):
        torch.testing.assert_close(H.tensors()["nodes"] @ H.tensors()["weights"], H.tensors()["left_out"].sum())


def test_the_density_of_what_was_left_out_stays_small():
    problem = mlp(n=6)
    H = problem.fit(TRUNCATED[0], A)
    other = problem.fit(TRUNCATED[0], B)
    for _ in range(12):
        H.blend(other, 0.9, 0.1)
    assert len(H.tensors()["nodes"]) <= 512 and bool(torch.isfinite(matrix(H)).all())


@pytest.mark.parametrize("structure", [Gram(), Gram(inducing=3), MatrixFree(), EigenKron()], ids=repr)
def test_storages_without_a_weighted_sum_say_so(structure):
    problem = mlp()
    H = problem.fit(structure)
    with pytest.raises(ValueError, match=type(structure).__name__):
        H.blend(problem.fit(structure), 0.5, 0.5)
    with pytest.raises(ValueError, match=type(structure).__name__):
        structure.check_blend()


def test_hessian_blends_before_it_is_made_psd():
    problem = mlp()
    G = torch.randn(problem.p, problem.p, dtype=D, generator=torch.Generator().manual_seed(0))
    H, other = (Hessian().start(problem.blocks, problem.x) for _ in range(2))
    H.load({"H": G + G.mT})
    H.times(torch.ones(problem.p, 1, dtype=D), torch.ones((), dtype=D))  # (made PSD once)
    other.load({"H": torch.eye(problem.p, dtype=D)})
    H.blend(other, 0.5, 1.0)
    λ, Q = torch.linalg.eigh(0.5 * (G + G.mT) + torch.eye(problem.p, dtype=D))
    torch.testing.assert_close(matrix(H), Q @ torch.diag(λ.abs()) @ Q.mT, rtol=1e-7, atol=1e-7)
