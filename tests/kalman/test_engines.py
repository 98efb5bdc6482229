"""Every engine on every chain against dense algebra: values, all gradients, states, paths."""

import math

import mpmath
import pytest
import torch

from bayesgn import _kalman
from bayesgn._kalman import Chain
from tests.kalman.chains import CHAINS, DOUBLE, Problem, dense, first_row, gradients, joint, make
from tests.kalman.engines import NAMES, engine

close = torch.testing.assert_close


@pytest.fixture(params=NAMES)
def run(request):
    with engine(request.param) as it:
        yield it


@pytest.fixture(params=CHAINS)
def problem(request) -> Problem:
    return CHAINS[request.param]()


def test_values(run, problem):
    log_Z, mean, cov, _, _ = dense(problem)
    got = run.smooth(*problem)
    for a, b in zip(got, (log_Z, mean, cov)):
        close(a, b, rtol=1e-10, atol=1e-12)


def test_states(run, problem):
    *_, mean, cov = dense(problem)
    m, P = run.states(*problem)
    close(m, mean, rtol=1e-10, atol=1e-12)
    close(P, cov, rtol=1e-10, atol=1e-12)


def test_gradients_of_log_Z(run, problem):
    got = gradients(lambda p: run.smooth(*p), problem)
    for a, b in zip(got, gradients(dense, problem)):
        close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("parts", ["all", "means", "covs"])
def test_gradients_of_moments(run, problem, parts):
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(s, generator=g, dtype=DOUBLE) for s in ((), problem.nat1.shape, problem.nat2.shape)]
    weights = {"all": weights, "means": [0.0, weights[1]], "covs": [0.0, 0.0, weights[2]]}[parts]
    got = gradients(lambda p: run.smooth(*p), problem, weights)
    for a, b in zip(got, gradients(dense, problem, weights)):
        close(a, b, rtol=1e-8, atol=1e-9)


def test_means_for_many_sets(run, problem):
    several = torch.randn(11, *problem.nat1.shape, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    got = run.means(problem.chain, several, problem.nat2)
    close(got, torch.stack([dense(problem._replace(nat1=h))[1] for h in several]), rtol=1e-10, atol=1e-11)


def test_propagate(run, problem):
    """Unit noises give the matrix by which noise becomes a path; with the noise's covariance it makes the joint covariance."""
    chain = problem.chain
    n, d = len(chain.step), len(chain.P0)
    paths = run.propagate(chain, torch.eye(n * d, dtype=DOUBLE).reshape(n * d, n, d)).reshape(n * d, n * d).mT
    noise = [chain.P0] + [chain.Q[s] if s >= 0 else torch.zeros_like(chain.P0) for s in chain.step[1:]]
    close(paths @ torch.block_diag(*noise) @ paths.mT, joint(chain), rtol=1e-10, atol=1e-12)


def test_no_points(run):
    chain = make(3, H=first_row(3)).chain._replace(step=torch.zeros(0, dtype=torch.long))
    empty = torch.zeros(0, 1, dtype=DOUBLE)
    log_Z, mean, cov = run.smooth(chain, empty, empty[:, :, None])
    assert log_Z == 0 and mean.shape == (0, 1) and cov.shape == (0, 1, 1)
    m, P = run.states(chain, empty, empty[:, :, None])
    assert m.shape == (0, 3) and P.shape == (0, 3, 3)
    assert run.propagate(chain, torch.zeros(4, 0, 3, dtype=DOUBLE)).shape == (4, 0, 3)
    assert run.means(chain, torch.zeros(2, 0, 1, dtype=DOUBLE), empty[:, :, None]).shape == (2, 0, 1)


def test_a_site_that_is_no_density_gives_nan(run):
    """nat2 so negative that I + nat2 V is not positive: no normaliser exists, and the caller hears of it by NaN."""
    for p, k in ((make(5, H=first_row(3)), 2), (make(5, 4, 2), 0), (make(5, 5, 4), 3)):
        p.nat2[k] = torch.diag(torch.tensor([-100.0, 1.0, 1.0, 1.0], dtype=DOUBLE)[: p.nat2.shape[-1]])
        assert run.smooth(*p)[0].isnan()
    p = make(5, H=first_row(3))
    p.nat1[1] = math.nan
    log_Z, mean, _ = run.smooth(*p)
    assert log_Z.isnan() and mean.isnan().all()


def test_long_regular_chain_with_many_steps(run):
    """Beyond the sizes at which the scan changes its layout on the way up its tree."""
    p = make(1237, kinds=2, H=first_row(3))
    want = _kalman.scan.smooth(*p)  # compared with dense algebra above
    for a, b in zip(run.smooth(*p), want):
        close(a, b, rtol=1e-11, atol=1e-12)
    g = gradients(lambda q: run.smooth(*q), p, [1.0, 0.3, -0.2])
    for a, b in zip(g, gradients(lambda q: _kalman.scan.smooth(*q), p, [1.0, 0.3, -0.2])):
        close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", [1e4, 1e9])
def test_precise_data_on_a_dense_grid(run, precision):
    """Matern-3/2 at steps of 1e-4 lengthscales and noise down to 1e-9: P − P N P of the predicted state would lose all digits."""
    n, z = 8, 1e-4
    A = torch.tensor([[1 + z, z], [-z, 1 - z]], dtype=DOUBLE) * math.exp(-z)
    Q = torch.eye(2, dtype=DOUBLE) - A @ A.mT
    chain = Chain(A[None], Q[None], torch.tensor([-1] + [0] * (n - 1)), torch.eye(2, dtype=DOUBLE), torch.tensor([[1.0, 0.0]], dtype=DOUBLE))
    y = torch.sin(torch.arange(n, dtype=DOUBLE))
    _, mean, cov = run.smooth(chain, precision * y[:, None], torch.full((n, 1, 1), precision, dtype=DOUBLE))
    with mpmath.workdps(60):
        a, q = mpmath.matrix(A.tolist()), mpmath.matrix(Q.tolist())
        marginals = [mpmath.eye(2)]
        for _ in range(n - 1):
            marginals.append(a * marginals[-1] * a.T + q)
        K = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(i, n):
                K[i, j] = K[j, i] = ((a ** (j - i)) * marginals[i])[0, 0]
        gain = K * mpmath.inverse(K + mpmath.eye(n) / precision)
        want = gain * mpmath.matrix(y.tolist())
        spread = [(gain[i, i] / precision) for i in range(n)]  # K (K + I/λ)⁻¹ / λ
    close(mean[:, 0], torch.tensor([float(v) for v in want], dtype=DOUBLE), rtol=1e-6, atol=1e-9)
    close(cov[:, 0, 0], torch.tensor([float(v) for v in spread], dtype=DOUBLE), rtol=1e-6, atol=0)


def test_gradcheck(run):
    p = make(4, kinds=2, seed=3)

    def function(A, root, start, H, nat1, factor):
        return run.smooth(*p.at(A, root @ root.mT, start @ start.mT, H, nat1, factor @ factor.mT))

    A, Q, P0, H, nat1, nat2 = p.tensors
    inputs = (A, torch.linalg.cholesky(Q), torch.linalg.cholesky(P0), H, nat1, torch.linalg.cholesky(nat2))
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize("name", ["scan", "scan on planes"])
def test_second_derivatives_of_the_scan(name):
    p = make(3, kinds=1, seed=3)
    with engine(name) as run:
        function = lambda A, nat1: run.smooth(*p.at(A, *p.tensors[1:4], nat1, p.nat2))
        assert torch.autograd.gradgradcheck(function, [t.clone().requires_grad_() for t in (p.chain.A, p.nat1)], fast_mode=True)


# -- the door: bayesgn._kalman ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["irregular", "coincident", "P0 of rank 1"])
def test_draws_have_the_prior_covariance(name):
    chain = CHAINS[name]().chain
    n, d = len(chain.step), 3
    samples = 20_000
    x = _kalman.draw(chain, samples, torch.Generator().manual_seed(0)).reshape(samples, n * d)
    K, found = joint(chain), x.mT @ x / samples
    error = ((K.diagonal()[:, None] * K.diagonal() + K**2) / samples).sqrt()  # of an entry of a sample covariance
    assert float(((found - K).abs() / (error + 1e-12)).max()) < 5
    again = _kalman.draw(chain, samples, torch.Generator().manual_seed(0)).reshape(samples, n * d)
    assert torch.equal(x, again)
    still = chain.step[1:] < 0
    close(x.reshape(samples, n, d)[:, 1:][:, still], x.reshape(samples, n, d)[:, :-1][:, still])


def test_float32_takes_the_scan():
    p = make(500, kinds=3, H=first_row(3))
    want, got = _kalman.smooth(*p), _kalman.smooth(*p.to(torch.float32))
    assert all(t.dtype == torch.float32 for t in got)
    for a, b in zip(got, want):
        close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_states_and_draws_are_constants():
    p = make(4, H=first_row(3))
    p.chain.A.requires_grad_()
    assert not _kalman.states(*p)[0].requires_grad and not _kalman.draw(p.chain, 2).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [n for n in CHAINS if n != "all missing"])
def test_scan_on_a_gpu(name):
    p = CHAINS[name]()
    moved = p.to("cuda")
    for a, b in zip(_kalman.smooth(*moved), _kalman.smooth(*p)):
        close(a.cpu(), b, rtol=1e-9, atol=1e-10)
    for a, b in zip(_kalman.states(*moved), _kalman.states(*p)):
        close(a.cpu(), b, rtol=1e-9, atol=1e-10)
    got = gradients(lambda q: _kalman.smooth(*q), moved, [1.0, 0.3, -0.2])
    for a, b in zip(got, gradients(lambda q: _kalman.smooth(*q), p, [1.0, 0.3, -0.2])):
        close(a.cpu(), b, rtol=1e-8, atol=1e-9)
    draws = _kalman.draw(moved.chain, 3, torch.Generator("cuda").manual_seed(0))
    assert draws.device.type == "cuda" and draws.shape == (3, len(p.chain.step), len(p.chain.P0))
