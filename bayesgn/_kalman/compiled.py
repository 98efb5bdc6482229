"""The compiled engine: kernel.cpp through ctypes, with its hand-written adjoint as a torch function. float64 on a CPU."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from bayesgn._kalman import build

LARGEST = 256  # states; beyond, matrix products of a library are faster than the loops here
KEPT = 64 * 2**20  # bytes of workspace kept from call to call


def available(chain) -> bool:
    """Whether there is a compiled kernel for this chain; it is built where it can be."""
    return chain.P0.shape[-1] <= LARGEST and _library(chain.H) is not None


def _library(H: Tensor) -> Any:
    # The common H of ones and zeros is known to the compiler, which spares the products with it.
    entries = H.detach().flatten().tolist() if H.dim() == 2 else []
    ones = tuple(int(h) for h in entries) if all(h in (0.0, 1.0) for h in entries) else ()
    return build.library(H.shape[-1], H.shape[-2], ones)


_own = threading.local()


def _workspace(library: Any, n: int, which: int) -> Tensor:
    """Memory for n points: values alone (0), with states or the adjoint of log Z (1), the adjoint of the
    moments (2). Fresh memory costs as much as the work done in it."""
    sizes = (ctypes.c_int64 * 3)()
    library.sizes(sizes)
    needed = n * sizes[which]
    kept = getattr(_own, "workspace", None)
    if kept is None or kept.numel() < needed:
        kept = torch.empty(needed, dtype=torch.uint8)
        if needed <= KEPT:
            _own.workspace = kept
    return kept


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    """Its address: the tensor has to be held by a name until the call is over."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _inputs(A: Tensor, Q: Tensor, P0: Tensor, H: Tensor, nat1: Tensor, nat2: Tensor, step: Tensor) -> tuple[list[Any], list[Tensor]]:
    """What every function of the kernel takes first, and the tensors behind the pointers, to be kept as long as they are used."""
    kept = [t.detach().contiguous() for t in (step, A, Q, P0, H, nat1, nat2)]
    chain, sites = [_at(t) for t in kept[:5]], [_at(t) for t in kept[5:]]
    return [*chain, ctypes.c_int64(H[0].numel() if H.dim() == 3 else 0), *sites], kept


class Smooth(torch.autograd.Function):
    """log Z, mean and covariance of every f_k, with the hand-written adjoint: for log Z alone the smoother's own (r, N); for the moments, which
    are derivatives of log Z in the sites, the same two passes on dual numbers."""

    @staticmethod
    def forward(ctx, A, Q, P0, H, nat1, nat2, step):
        library, n = _library(H), len(step)
        inputs, _kept = _inputs(A, Q, P0, H, nat1, nat2, step)
        log_Z, mean, cov = nat1.new_empty(()), torch.empty_like(_kept[5]), torch.empty_like(_kept[6])
        work = _workspace(library, n, 0)
        library.smooth(ctypes.c_int64(n), *inputs, _at(work), ctypes.c_double(1.0), *map(_at, (log_Z, mean, cov)), *[_at(None)] * 6)
        ctx.save_for_backward(A, Q, P0, H, nat1, nat2, step, mean, cov)
        ctx.set_materialize_grads(False)
        return log_Z, mean, cov

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_Z, g_mean, g_cov):  # type: ignore[override]
        A, Q, P0, H, nat1, nat2, step, mean, cov = ctx.saved_tensors
        if g_Z is None and g_mean is None and g_cov is None:
            return (None,) * 7
        library, n, weight = _library(H), len(step), 0.0 if g_Z is None else float(g_Z)
        inputs, _kept = _inputs(A, Q, P0, H, nat1, nat2, step)
        dA, dQ, dP0 = (torch.zeros_like(t) for t in _kept[1:4])
        dH = torch.zeros_like(_kept[4]) if ctx.needs_input_grad[3] else None
        if g_mean is None and g_cov is None:
            d1, d2 = weight * mean, -0.5 * weight * (cov + mean[:, :, None] * mean[:, None, :])
            if any(ctx.needs_input_grad[:4]):
                work, again = _workspace(library, n, 1), [torch.empty_like(t) for t in (nat1.new_empty(()), mean, cov)]
                library.smooth(
                    ctypes.c_int64(n), *inputs, _at(work), ctypes.c_double(weight), *map(_at, again), _at(None), _at(None),
                    *map(_at, (dA, dQ, dP0, dH)),
                )  # fmt: skip
            return dA, dQ, dP0, dH, d1, d2, None
        work, d1, d2 = _workspace(library, n, 2), torch.empty_like(mean), torch.empty_like(cov)
        given = [None if g is None else g.contiguous() for g in (g_mean, g_cov)]
        library.adjoint(
            ctypes.c_int64(n), *inputs, _at(work), ctypes.c_double(weight), _at(mean), *map(_at, given), *map(_at, (d1, d2, dA, dQ, dP0, dH))
        )
        return dA, dQ, dP0, dH, d1, d2, None


def states(chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed states [n d], [n d d]."""
    library, n, d = _library(chain.H), len(chain.step), len(chain.P0)
    inputs, _kept = _inputs(chain.A, chain.Q, chain.P0, chain.H, nat1, nat2, chain.step)
    log_Z, mean, cov, m, P = (nat1.new_empty(shape) for shape in ((), nat1.shape, nat2.shape, (n, d), (n, d, d)))
    work = _workspace(library, n, 1)
    library.smooth(ctypes.c_int64(n), *inputs, _at(work), ctypes.c_double(1.0), *map(_at, (log_Z, mean, cov, m, P)), *[_at(None)] * 4)
    return m, P


def means(chain, nat1: Tensor, nat2: Tensor) -> Tensor:
    """The smoothed mean of f for each nat1 [s n c] over the gains of one nat2: [s n c]."""
    library, n = _library(chain.H), len(chain.step)
    inputs, _kept = _inputs(chain.A, chain.Q, chain.P0, chain.H, nat1, nat2, chain.step)
    work, mean = _workspace(library, n, 0), torch.empty_like(_kept[5])
    library.means(ctypes.c_int64(n), ctypes.c_int64(len(nat1)), *inputs, _at(work), _at(mean))
    return mean


def gained(A: Tensor, H: Tensor, K: Tensor, b: Tensor, from_the_end: bool) -> Tensor:
    """See gains.py."""
    A, H, K, b = (t.detach().contiguous() for t in (A, H, K, b))
    x, stride = torch.empty_like(b), 0 if len(K) == 1 else K[0].numel()
    _library(H).gained(ctypes.c_int64(len(b)), ctypes.c_int(from_the_end), _at(A), _at(H), _at(K), ctypes.c_int64(stride), _at(b), _at(x))
    return x


def propagate(chain, noise: Tensor) -> Tensor:
    """x_k = A x_{k−1} + noise_k for each path [s n d]."""
    noise, A, step = noise.contiguous(), chain.A.contiguous(), chain.step.contiguous()
    x = torch.empty_like(noise)
    _library(chain.H).propagate(ctypes.c_int64(noise.shape[1]), ctypes.c_int64(noise.shape[0]), _at(step), _at(A), _at(noise), _at(x))
    return x
