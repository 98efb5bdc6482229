"""LowRank: the leading eigenpairs, a density for the rest, and the exact answer where the rank suffices."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Full, Linearizer, LowRank
from bayesgn.ggn.dual import FactorRows
from bayesgn.ggn.keeping import compressed
from bayesgn.ggn.lanczos import density, orthonormal
from bayesgn.ggn.low_rank import largest
from tests.ggn.problem import draw, mlp
from tests.oracles import dense

ONE = torch.ones((), dtype=torch.float64)


def prior(problem, value: float = 0.8):
    return [torch.tensor(value, dtype=torch.float64)] * len(problem.blocks)


def close(a, b, tol=1e-8):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def psd(eigenvalues: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    Q = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return Q @ torch.diag(eigenvalues) @ Q.mT, Q


def test_largest_eigenpairs():
    λ = 10.0 ** -torch.linspace(0, 20, 120, dtype=torch.float64)
    H, Q = psd(λ)
    found, U = largest(lambda V: H @ V, 120, 10, 20, 11, torch.Generator().manual_seed(0), like=H)
    close(found, λ[:10], 1e-9)
    close(U.mT @ U, torch.eye(10, dtype=torch.float64), 1e-12)
    close((U.mT @ Q[:, :10]).abs(), torch.eye(10, dtype=torch.float64), 1e-4)


def test_a_basis_that_is_used_up_stays_orthonormal():
    B = torch.linalg.qr(draw(30, 12)).Q
    W = orthonormal(B[:, :4] @ draw(4, 4, seed=1), B)  # nothing of W lies outside B
    close(W.mT @ W, torch.eye(4, dtype=torch.float64), 1e-12)
    close(B.mT @ W, torch.zeros(12, 4, dtype=torch.float64), 1e-12)


def test_density_of_the_rest():
    λ = torch.cat([torch.full((5,), 100.0), torch.linspace(0.01, 2, 60)]).double()
    H, Q = psd(λ)
    nodes, weights = density(lambda V: H @ V, Q[:, :5], 60, 40, torch.Generator().manual_seed(0))
    assert nodes.max() < 2.0 + 1e-9, "nothing of the deflated part comes back"
    for f in (lambda t: t, torch.log1p):
        torch.testing.assert_close(weights @ f(nodes), f(λ[5:]).sum(), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["scalar", "per_layer", "per_weight"])
def test_enough_rank_is_exact(kind):
    # rank H = n (c − 1) = 8 among 85 weights, found in a Krylov space of 84
    problem = mlp(d=6, h=8, c=3, n=4)
    P = {
        "scalar": prior(problem),
        "per_layer": [0.5 * ONE, 2 * ONE],
        "per_weight": [0.5 + draw(b.numel, seed=i).square() for i, b in enumerate(problem.blocks)],
    }[kind]
    curvature = problem.fit(LowRank(rank=20, oversample=0), [0, 1], [2, 3])
    assert len(curvature.nodes) == 0
    ours, theirs = (c.with_prior(P, 1.3 * ONE) for c in (curvature, problem.fit(Full())))
    x, v = draw(3, 6, seed=7), draw(2, problem.p)
    close(ours.logdet(), theirs.logdet())
    close(ours.covariance(problem.factors(x)), theirs.covariance(problem.factors(x)))
    close(ours.solve(v), theirs.solve(v))
    close(ours.diagonal(), theirs.diagonal())


def truncated(problem, rank):
    λ, Q = torch.linalg.eigh(problem.H)
    U, λ = Q[:, -rank:], λ[-rank:]
    return (U * λ) @ U.mT


def test_too_small_a_rank_truncates_and_never_claims_too_much():
    problem = mlp(d=5, h=6, c=4, n=12)
    rank = 12
    curvature = problem.fit(LowRank(rank=rank, tail=0, walks=8))
    H = truncated(problem, rank)
    P = [0.5 * ONE, 2 * ONE]
    diagonal = torch.cat([p.expand(b.numel) for p, b in zip(P, problem.blocks, strict=True)])
    Σ = torch.linalg.inv(1.3 * H + torch.diag(diagonal))
    ours, exact = (c.with_prior(P, 1.3 * ONE) for c in (curvature, problem.fit(Full())))
    close(ours.solve(torch.eye(problem.p, dtype=torch.float64)), Σ)
    close(ours.logdet(), -torch.linalg.slogdet(Σ)[1])
    close(ours.covariance(problem.factors(problem.x)), dense.function_cov(problem.J, Σ))
    assert (ours.diagonal() >= exact.diagonal() - 1e-10).all()
    close(curvature.τ, (problem.H - H).diagonal())


@pytest.mark.parametrize("P", [0.3, 3.0, 30.0])
def test_the_log_determinant_counts_what_is_left_out(P):
    problem = mlp(d=8, h=8, c=4, n=40)
    exact = problem.fit(Full()).with_prior(prior(problem, P), ONE).logdet()
    with_tail, without = (
        problem.fit(LowRank(rank=15, tail=tail)).with_prior(prior(problem, P), ONE).logdet() for tail in (8, 0)
    )
    assert without < exact, "dropping eigenvalues can only lose"
    assert (with_tail - exact).abs() < 0.1 * (exact - without)


def test_the_tail_is_exact_to_first_order_for_any_prior():
    problem = mlp(d=5, h=6, c=4, n=12)
    P = [1e4 * (0.5 + draw(b.numel, seed=i).square()) for i, b in enumerate(problem.blocks)]
    ours, exact = (problem.fit(s).with_prior(P, ONE).logdet() for s in (LowRank(rank=5), Full()))
    close(ours - torch.cat(P).log().sum(), exact - torch.cat(P).log().sum(), 1e-6)


def test_gradients_of_the_tail_are_those_of_its_value():
    problem = mlp(d=5, h=6, c=4, n=12)
    curvature = problem.fit(LowRank(rank=5))
    assert curvature.spectrum() is None

    def value(θ):
        return curvature.with_prior([θ[0], θ[1]], θ[2]).logdet()

    θ = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(θ), θ)
    close(grad, dense.finite_difference(value, θ.detach()), 1e-6)


def test_more_data_is_truncated_again():
    problem = mlp(d=6, h=8, c=3, n=8)
    curvature = problem.fit(LowRank(rank=20, oversample=0), [0, 1, 2, 3])
    curvature.fit(problem.stream([4, 5], [6, 7]))  # rank 16: nothing was left out, so this is exact
    close(curvature.with_prior(prior(problem), ONE).logdet(), problem.fit(Full()).with_prior(prior(problem), ONE).logdet())
    small = problem.fit(LowRank(rank=6, oversample=0), [0, 1, 2, 3])
    small.fit(problem.stream([4, 5, 6, 7]))
    assert small.U.shape[1] == 6
    close((small.U.square() @ small.λ + small.τ).sum(), problem.H.trace())  # no curvature is lost from the trace


def test_seed_decides():
    problem = mlp(d=5, h=6, c=4, n=12)
    a, b, other = (problem.fit(LowRank(rank=5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a.U, b.U) and torch.equal(a.nodes, b.nodes) and not torch.equal(a.nodes, other.nodes)


def test_options_are_checked():
    with pytest.raises(ValueError, match="rank=0"):
        LowRank(rank=0)


@pytest.mark.slow
def test_digits_rank_400():
    """25,482 weights, 1,797 data, 10 classes: fit in under a minute on one thread, evidence within 15 nats of the exact dual."""
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    from bayesgn.likelihoods import Categorical

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 192), nn.Tanh(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(40):
            for i in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                penalty = 0.5 * sum(q.square().sum() for q in net.parameters()) / len(x)
                (nn.functional.cross_entropy(net(x[i]), y[i]) + penalty).backward()
                optimizer.step()
    likelihood, linearizer = Categorical(), Linearizer(net, ParameterVector.of(net))
    linearizer.prepare(x, likelihood.rows)

    class Stream:
        def __init__(self, n: int) -> None:
            self.x = x[:n]

        def __iter__(self):
            for part in self.x.split(128):
                lin = linearizer(part, likelihood.rows)
                yield lin, likelihood.ggn_root(lin.output)

    def fitted(n: int):
        curvature = LowRank(rank=400).start(linearizer.blocks, x)
        curvature.fit(Stream(n))
        return curvature

    start = time.process_time()  # one thread: as wall time on an idle machine
    fitted(len(x))
    seconds = time.process_time() - start
    # The dual of all data is 16,173²: ½ log det(I + K) = 500.22 there (P = 1) by a Cholesky factor of one minute, and rank 400
    # gives 502.17. Here 600 data stand in.
    curvature = fitted(600)
    lin = linearizer(x[:600], likelihood.rows)
    S = compressed(likelihood.ggn_root(lin.output))
    assert S.shape[-1] == 9
    rows = FactorRows(linearizer.blocks, lin.factors(S), torch.float64)
    K = sum(rows.gram(i, ONE) for i in range(3))
    for P in (0.3, 1.0, 3.0):
        M = K / P
        M.diagonal().add_(1)
        exact = torch.linalg.cholesky(M).diagonal().log().sum()  # ½ log det(I + K)
        p = linearizer.vector.numel
        ours = 0.5 * (curvature.with_prior([P * ONE] * 3, ONE).logdet() - p * torch.tensor(P).double().log())
        print(f"P={P}: exact {exact:.2f}, rank 400 {ours:.2f} nats; fit {seconds:.1f} s")
        assert (ours - exact).abs() < 15
    assert seconds < 60
