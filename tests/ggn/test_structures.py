"""The contract of all structures: one list, every answer against dense algebra on a brute-force Jacobian, and the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bayesgn.ggn import (
    Diag,
    EigenKron,
    Full,
    Gram,
    Kron,
    Layerwise,
    LowRank,
    LowRankPlusDiagonal,
    MatrixFree,
    Structure,
)
from tests.ggn import problem as problems
from tests.ggn.problem import Problem, draw, make, mlp, squared
from tests.oracles import dense

# -- the list ----------------------------------------------------------------------------------------------------------


def layers(problem: Problem) -> list[str]:
    return [name for name, m in problem.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def block_diagonal(problem: Problem) -> Tensor:
    out = torch.zeros_like(problem.H)
    for name, m in problem.net.named_modules():
        if list(m.parameters(recurse=False)):
            i = problem.weights(f"{name}.")
            out[i[:, None], i] = problem.H[i[:, None], i]
    return out


def kronecker(problem: Problem, variant: Callable = dense.kron_expand) -> Tensor:
    """A ⊗ B / count for every layer that has factors, the exact block elsewhere."""
    out = block_diagonal(problem)
    K = dense.kron_ggn(problem.net, problem.x, problem.S, layers(problem), variant)
    for name in layers(problem):
        i = problem.weights(f"{name}.")
        out[i[:, None], i] = K[i[:, None], i]
    return out


def eigen_kronecker(problem: Problem) -> Tensor:
    """Q diag(Qᵀ H Q) Qᵀ with Q = Q_b ⊗ Q_a for every layer that has factors."""
    out = block_diagonal(problem)
    for name in layers(problem):
        module = problem.net.get_submodule(name)
        i = problem.weights(f"{name}.")[dense.homogeneous_order(module.weight, module.bias is not None)]
        A, B, _ = dense.kron_expand(dense.layer_factors(problem.net, problem.x, name), problem.S)
        Q = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
        out[i[:, None], i] = Q @ torch.diag((Q.mT @ problem.H[i[:, None], i] @ Q).diagonal()) @ Q.mT
    return out


@dataclass(frozen=True)
class Member:
    """A structure and the dense matrix it stands for."""

    structure: Structure
    dense: Callable[[Problem], Tensor]
    per_weight: bool = True
    additive: bool = True
    saved: bool = True

    def __str__(self) -> str:
        return type(self.structure).__name__


MEMBERS = [
    Member(Full(), lambda q: q.H),
    Member(Gram(), lambda q: q.H),
    Member(LowRank(rank=200), lambda q: q.H),
    Member(LowRankPlusDiagonal(rank=200), lambda q: q.H),
    Member(MatrixFree(tol=1e-13, probes=10_000, steps=200), lambda q: q.H, saved=False),
    Member(Layerwise(), block_diagonal),
    Member(Diag(), lambda q: torch.diag(q.H.diagonal())),
    Member(Kron(), kronecker, per_weight=False),
    Member(EigenKron(), eigen_kronecker, per_weight=False, additive=False),
]
PROBLEMS = {"mlp": mlp(), "conv": problems.conv()}
PRIORS = ("scalar", "per_layer", "per_weight")
ALL = pytest.mark.parametrize("member", MEMBERS, ids=str)


def prior_of(kind: str, problem: Problem) -> tuple[Tensor, list[Tensor], Tensor]:
    """Hyper-parameters θ that require grad, P of every block, and P [p]."""
    size = {"scalar": 1, "per_layer": len(problem.blocks), "per_weight": problem.p}[kind]
    θ = (0.5 + draw(size, seed=9).square()).requires_grad_()
    if kind == "scalar":
        P = θ[0]
        return θ, [P] * len(problem.blocks), P.expand(problem.p)
    if kind == "per_layer":
        return θ, list(θ), torch.cat([θ[i].expand(b.numel) for i, b in enumerate(problem.blocks)])
    return θ, [θ[b.where] for b in problem.blocks], θ


def close(a: Tensor, b: Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def some_prior(problem: Problem, value: float = 0.8) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64)] * len(problem.blocks)


ONE = torch.ones((), dtype=torch.float64)

# -- every answer, and its gradients in prior and scale ----------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_dense_algebra(member, kind, name):
    problem = PROBLEMS[name]
    if kind == "per_weight" and not member.per_weight:
        with pytest.raises(ValueError, match="ggn.Diag"):
            problem.fit(member.structure).with_prior(prior_of(kind, problem)[1], ONE)
        return
    H = member.dense(problem)
    n, p = problem.n, problem.p
    x_new, x_other = draw(3, *problem.x.shape[1:], seed=1), draw(2, *problem.x.shape[1:], seed=2)
    J, J_ = dense.jacobian(problem.net, x_new), dense.jacobian(problem.net, x_other)
    θ, prior, P = prior_of(kind, problem)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    precision = problem.fit(member.structure, list(range(0, n, 2)), list(range(1, n, 2))).with_prior(prior, scale)
    v = draw(2, 3, p, seed=3)
    Σ = torch.linalg.inv(scale * H + torch.diag(P))
    answers = {
        "logdet": (precision.logdet(), torch.linalg.slogdet(scale * H + torch.diag(P))[1]),
        "solve": (precision.solve(v), v @ Σ),
        "diagonal": (precision.diagonal(), Σ.diagonal()),
        "covariance": (precision.covariance(problem.factors(x_new)), dense.function_cov(J, Σ)),
        "joint": (precision.joint(problem.factors(x_new)), dense.joint_function_cov(J, Σ)),
        "joint with others": (
            precision.joint(problem.factors(x_new), problem.factors(x_other)),
            J.flatten(0, 1) @ Σ @ J_.flatten(0, 1).mT,
        ),
    }
    for what, (ours, theirs) in answers.items():
        assert ours.dtype == torch.float64, what
        close(ours, theirs)
        weight = draw(*ours.shape, seed=4)
        found = torch.autograd.grad((weight * ours).sum(), (θ, scale), retain_graph=True)
        wanted = torch.autograd.grad((weight * theirs).sum(), (θ, scale), retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            close(a, b)


@ALL
@pytest.mark.parametrize("kind", PRIORS)
def test_a_solver_solves_as_the_whole_precision_does(member, kind):
    if kind == "per_weight" and not member.per_weight:
        pytest.skip("this structure takes no prior per weight")
    problem = PROBLEMS["conv"]
    H, (_, prior, P) = member.dense(problem), prior_of(kind, problem)
    v = draw(problem.p, seed=3)
    with torch.no_grad():
        wanted = torch.linalg.solve(1.7 * H + torch.diag(P), v)
        fitted = problem.fit(member.structure)
        for precision in (fitted.solver(prior, 1.7 * ONE), fitted.with_prior(prior, 1.7 * ONE), fitted.solver(prior, 1.7 * ONE)):
            close(precision.solve(v), wanted)  # before and after H was decomposed
            close(precision.solve_from(v, wanted + 0.1 * v), wanted)


@ALL
def test_draws_have_the_covariance(member):
    problem = PROBLEMS["conv"]
    with torch.no_grad():
        precision = problem.fit(member.structure).with_prior(some_prior(problem), 1.7 * ONE)
        draws = precision.sample(4000, torch.Generator().manual_seed(0))
        again = precision.sample(3, torch.Generator().manual_seed(5))
        assert torch.equal(again, precision.sample(3, torch.Generator().manual_seed(5))), "a seed gives the same draws"
        assert not torch.equal(again, precision.sample(3, torch.Generator().manual_seed(6)))
    assert draws.shape == (4000, problem.p)
    # Whitened by the dense posterior, the sample covariance is I ± 1/√n (√2/√n on the diagonal); 990 entries, 5 σ.
    M = 1.7 * member.dense(problem) + 0.8 * torch.eye(problem.p, dtype=torch.float64)
    ε = draws @ torch.linalg.cholesky(M)
    C = ε.mT @ ε / len(ε) - torch.eye(problem.p, dtype=torch.float64)
    assert C.abs().max() < 5 * (2 / len(ε)) ** 0.5
    assert ε.mean(0).abs().max() < 5 / len(ε) ** 0.5


# -- laws --------------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
few = settings(max_examples=6, deadline=None, derandomize=True)


def answers(member: Member, problem: Problem, *index: list[int], curvature=None, prior: float = 0.8) -> list[Tensor]:
    curvature = problem.fit(member.structure, *index) if curvature is None else curvature
    precision = curvature.with_prior(some_prior(problem, prior), 1.3 * ONE)
    eye = torch.eye(problem.p, dtype=torch.float64)
    return [precision.logdet(), precision.solve(eye), precision.covariance(problem.factors(problem.x))]


@ALL
@few
@given(shapes)
def test_positive_definite_and_consistent(member, shape):
    problem = mlp(*shape)
    precision = problem.fit(member.structure).with_prior(some_prior(problem), ONE)
    Σ = precision.solve(torch.eye(problem.p, dtype=torch.float64))
    close(Σ, Σ.mT)
    eigenvalues = torch.linalg.eigvalsh((Σ + Σ.mT) / 2)
    assert eigenvalues.min() > 0 and eigenvalues.max() <= 1 / 0.8 + 1e-9, "data only ever shrink the prior's variance"
    close(precision.logdet(), -eigenvalues.log().sum())
    joint, c = precision.joint(problem.factors(problem.x)), problem.J.shape[1]
    blocks = joint.view(problem.n, c, problem.n, c)
    covariance = precision.covariance(problem.factors(problem.x))
    close(covariance, torch.stack([blocks[i, :, i] for i in range(problem.n)]))
    assert torch.linalg.eigvalsh((joint + joint.mT) / 2).min() > -1e-9


@ALL
@few
@given(shapes, st.randoms(use_true_random=False))
def test_order_and_batches_do_not_matter(member, shape, random):
    problem = mlp(*shape)
    order = random.sample(range(problem.n), problem.n)
    cut = random.randint(0, problem.n - 1)
    halves = [part for part in (order[:cut], order[cut:]) if part]
    for a, b in zip(answers(member, problem), answers(member, problem, *halves), strict=True):
        close(a, b)


@ALL
def test_adding_data_equals_all_at_once(member):
    problem = PROBLEMS["mlp"]
    curvature = problem.fit(member.structure, [0, 1, 2])
    rest = next(iter(problem.stream([3, 4, 5])))
    if not member.additive:
        with pytest.raises(ValueError, match="all data at once"):
            curvature.add(rest[0].factors(rest[1]))
        with pytest.raises(ValueError, match="all data at once"):
            curvature.fit(problem.stream([3, 4, 5]))
        return
    curvature.with_prior(some_prior(problem), ONE).logdet()  # whatever is cached by use must not outlive new data
    curvature.add(rest[0].factors(rest[1]))
    for a, b in zip(answers(member, problem, curvature=curvature), answers(member, problem), strict=True):
        close(a, b)


@ALL
@few
@given(shapes)
def test_prior_wins_in_the_limit(member, shape):
    problem = mlp(*shape)
    _, Σ, covariance = answers(member, problem, prior=1e9)
    close(1e9 * Σ, torch.eye(problem.p, dtype=torch.float64), 1e-5)
    close(1e9 * covariance, dense.function_cov(problem.J, torch.eye(problem.p, dtype=torch.float64)), 1e-5)


@ALL
def test_saved_and_loaded(member):
    for problem in PROBLEMS.values():
        curvature = problem.fit(member.structure)
        if not member.saved:
            with pytest.raises(ValueError, match="condition"):
                curvature.tensors()
            continue
        tensors = {name: t.clone() for name, t in curvature.tensors().items()}
        assert all(t.is_contiguous() and t.grad_fn is None and name.isascii() for name, t in tensors.items())
        fresh = member.structure.start(problem.blocks, next(problem.net.parameters()))
        fresh.load(tensors)
        for a, b in zip(answers(member, problem, curvature=fresh), answers(member, problem), strict=True):
            close(a, b, 1e-12)


@ALL
def test_spectrum_gives_the_logdet(member):
    problem = PROBLEMS["mlp"]
    curvature = problem.fit(member.structure)
    parts = curvature.spectrum()
    if parts is None:
        assert isinstance(member.structure, (MatrixFree, LowRankPlusDiagonal))
        return
    P, s = torch.tensor(0.3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    value = sum((s * part.eigenvalues + P).log().sum() + part.zeros * P.log() for part in parts)
    close(value, curvature.with_prior([P] * len(problem.blocks), s).logdet())


@ALL
def test_float32_nets_are_summed_in_float64(member):
    problem = PROBLEMS["mlp"]
    import copy

    single = Problem(copy.deepcopy(problem.net).float(), problem.x.float(), problem.S)
    curvature = single.fit(member.structure, *[[i] for i in range(problem.n)])
    precision = curvature.with_prior(some_prior(problem), 1.3 * ONE)
    wanted = problem.fit(member.structure).with_prior(some_prior(problem), 1.3 * ONE)
    assert precision.logdet().dtype == torch.float64
    torch.testing.assert_close(precision.logdet(), wanted.logdet(), rtol=1e-5, atol=1e-5)
    ours = precision.covariance(single.factors(single.x))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, wanted.covariance(problem.factors(problem.x)), rtol=1e-4, atol=1e-5)
    assert precision.sample(2, torch.Generator().manual_seed(0)).dtype == torch.float64


# -- where the Kronecker forms are exact, and how close they are -------------------------------------------------------


def kron_matrix(structure: Structure, problem: Problem) -> Tensor:
    """H as a structure keeps it."""
    precision = problem.fit(structure).with_prior(some_prior(problem, 1.0), ONE)
    eye = torch.eye(problem.p, dtype=torch.float64)
    return torch.linalg.inv(precision.solve(eye)) - eye


EXACT = {
    "one datum": mlp(n=1),
    "deep linear net, squared loss": make(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), draw(6, 3), squared),
    "last layer, squared loss": make(nn.Sequential(nn.Linear(3, 2)), draw(6, 3).tanh(), squared),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("structure", [Kron(), EigenKron()], ids=str)
def test_kronecker_is_exact(structure, name):
    problem = EXACT[name]
    wanted = block_diagonal(problem)
    error = (kron_matrix(structure, problem) - wanted).abs().max()
    assert error < 1e-12 * (1 + wanted.abs().max()) * torch.linalg.cond(wanted + torch.eye(problem.p).double())


@few
@given(shapes)
def test_eigen_kron_is_nearer_than_kron(shape):
    problem = mlp(*shape)
    wanted = block_diagonal(problem)
    near, far = (torch.linalg.norm(kron_matrix(s, problem) - wanted) for s in (EigenKron(), Kron()))
    assert near <= far * (1 + 1e-9) + 1e-9
    close(kron_matrix(EigenKron(), problem).trace(), wanted.trace())


def test_reduce_is_the_reduced_form():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    problem = make(net, draw(4, 1, 3, 3))
    close(kron_matrix(Kron(reduce=True), problem), kronecker(problem, dense.kron_reduce), 1e-9)
