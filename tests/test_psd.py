"""_psd: roots, clipped spectra and Cholesky with jitter, against dense algebra and autodiff by finite differences."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn._psd import eigabs, eigclip, psd_root, safe_cholesky


def symmetric(seed: int, *shape: int) -> torch.Tensor:
    A = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (A + A.mT) / 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), c=st.integers(1, 5), rank=st.integers(0, 5))
def test_root_squares_back_at_any_rank(seed, c, rank):
    A = torch.randn(3, c, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    S = psd_root(A @ A.mT)
    torch.testing.assert_close(S @ S.mT, A @ A.mT, atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), c=st.integers(1, 5))
def test_clip_and_abs_by_the_spectrum(seed, c):
    A = symmetric(seed, 4, c)
    values = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(torch.linalg.eigvalsh(eigclip(A)), values.clamp_min(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.eigvalsh(eigabs(A)), values.abs().sort(-1).values, atol=1e-12, rtol=0)
    torch.testing.assert_close(eigabs(A), 2 * eigclip(A) - A, atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", [eigclip, eigabs, lambda A: psd_root(A @ A.mT)])
@pytest.mark.parametrize("c", [1, 3])
def test_gradients(function, c):
    A = symmetric(3, 2, c).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: function((A + A.mT) / 2), A)


def test_gradients_are_finite_where_eigenvalues_coincide():
    for function in (eigclip, eigabs, psd_root):
        for A in (torch.eye(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)):
            A = A.clone().requires_grad_()
            assert torch.autograd.grad(function(A).sum(), A)[0].isfinite().all()
    A = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A: psd_root((A + A.mT) / 2), A)


def test_root_refuses_an_indefinite_matrix():
    with pytest.raises(ValueError, match=r"eigenvalue is -1\.000e\+00.*eigclip"):
        psd_root(torch.diag(torch.tensor([2.0, -1.0])))
    with pytest.raises(ValueError, match="eigclip"):
        psd_root(torch.tensor([[-1.0]]))


def test_cholesky_is_plain_where_plain_works(caplog):
    A = symmetric(0, 3, 4)
    A = A @ A + torch.eye(4, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "bayesgn"):
        assert torch.equal(safe_cholesky(A), torch.linalg.cholesky(A))
    assert not caplog.records


def test_cholesky_logs_its_jitter_and_touches_only_failing_members(caplog):
    one = torch.ones(3, 3, dtype=torch.float64)
    one[0, 0] -= 1e-14
    good = 2 * torch.eye(3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "bayesgn"):
        L = safe_cholesky(torch.stack([one, good]))
    assert "1 of 2 matrices" in caplog.text
    assert torch.equal(L[1], torch.linalg.cholesky(good))
    torch.testing.assert_close(L[0] @ L[0].mT, one, atol=1e-10, rtol=0)


def test_cholesky_errors_say_what_and_what_next():
    with pytest.raises(ValueError, match=r"not positive definite \(smallest eigenvalue -1\.000e\+00.*eigclip"):
        safe_cholesky(torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        safe_cholesky(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))


def test_half_precision_and_meta():
    assert psd_root(torch.eye(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert psd_root(torch.empty(5, 3, 3, device="meta")).shape == (5, 3, 3)
