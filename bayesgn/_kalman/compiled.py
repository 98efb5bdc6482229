"""The compiled engine: kernel.cpp, built once for each (states, latents) by the machine's C++ compiler and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("bayesgn.kalman")

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared")
LARGEST = 128  # states; a chain beyond that is dense algebra, where torch is as good


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``BAYESGN_CACHE``, else ``bayesgn`` in the user's cache folder."""
    own = os.environ.get("BAYESGN_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(base).expanduser() / "bayesgn"


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The machine's C++ compiler as a command: ``CXX``, else c++, g++ or clang++; None where there is none."""
    own = os.environ.get("CXX")
    names = [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]
    for command in names:
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    return None


def available(d: int, c: int) -> bool:
    """Whether there is a compiled kernel for d states and c latents; builds it where it can."""
    return d <= LARGEST and _library(d, c) is not None


@functools.cache
def _library(d: int, c: int) -> Any:
    command = compiler()
    if command is None:
        warnings.warn(
            "no C++ compiler was found (c++, g++, clang++, or the environment variable CXX): state-space models run on the torch scan, which is "
            "several times slower. Install one to have the compiled filter.",
            stacklevel=2,
        )
        return None
    text = SOURCE.read_bytes()
    # A folder may be shared by machines with other processors: the name says for which one the code was made.
    identity = [*command, *FLAGS, str(d), str(c), platform.platform(), _processor()]
    key = hashlib.sha256(text + "\0".join(identity).encode()).hexdigest()[:20]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="bayesgn-"))
        log.warning("compiled kernels cannot be kept in %s (%s); using %s for this process", cache_folder(), error, folder)
    path = folder / f"kalman-{d}-{c}-{key}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as scratch:
            target = Path(scratch.name)
        done = subprocess.run(
            [*command, *FLAGS, f"-DD={d}", f"-DC={c}", str(SOURCE), "-o", str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            target.unlink(missing_ok=True)
            warnings.warn(
                f"{command[0]} could not compile the Kalman filter ({done.stderr.strip()[:300]}); state-space models run on the torch scan.",
                stacklevel=2,
            )
            return None
        os.replace(target, path)  # whole or not at all, also with two processes at work
        log.info("compiled the Kalman filter for %d states and %d latents into %s", d, c, path)
    library = ctypes.CDLL(str(path))
    for function in (library.smooth, library.smooth_dual, library.propagate):
        function.restype = None
    return library


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next((line for line in info if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _layout(A: Tensor, Q: Tensor, P0: Tensor, H: Tensor, nat1: Tensor, nat2: Tensor, step: Tensor):
    step = step.contiguous()
    tensors = [t.detach().contiguous() for t in (A, Q, P0, H, nat1, nat2)]
    n, c, d = len(step), H.shape[-2], P0.shape[-1]
    return (step, *tensors), n, c, d, (c * d if H.dim() == 3 else 0)


class Smooth(torch.autograd.Function):
    """log Z, mean and covariance of every f_k. The backward is the hand-written adjoint: for log Z by the smoother's own (r, N); for the
    moments, which are derivatives of log Z in the sites, by the same two passes on dual numbers."""

    @staticmethod
    def forward(ctx, A, Q, P0, H, nat1, nat2, step):
        (s, *t), n, c, d, stride = _layout(A, Q, P0, H, nat1, nat2, step)
        log_Z, mean, cov = t[4].new_empty(()), t[4].new_empty(n, c), t[4].new_empty(n, c, c)
        adjoint = any(ctx.needs_input_grad[:4])
        grads = [torch.zeros_like(x) for x in t[:3]] if adjoint else [None] * 3
        dH = torch.zeros_like(t[3]) if ctx.needs_input_grad[3] else None
        _library(d, c).smooth(
            ctypes.c_int64(n), _at(s), *map(_at, t[:4]), ctypes.c_int64(stride), *map(_at, t[4:]), _at(log_Z), _at(mean), _at(cov), _at(None),
            _at(None), ctypes.c_int(adjoint), *map(_at, grads), _at(dH),
        )  # fmt: skip
        ctx.save_for_backward(A, Q, P0, H, nat1, nat2, step, mean, cov)
        ctx.grads = (*grads, dH)
        ctx.set_materialize_grads(False)
        return log_Z, mean, cov

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):  # type: ignore[override]
        g_Z, g_mean, g_cov = cotangents
        A, Q, P0, H, nat1, nat2, step, mean, cov = ctx.saved_tensors
        if g_Z is None and g_mean is None and g_cov is None:
            return (None,) * 7
        second = -0.5 * (cov + mean[:, :, None] * mean[:, None, :])  # ∂ log Z / ∂ nat2
        if g_mean is None and g_cov is None:
            chain = [None if g is None else g_Z * g for g in ctx.grads]
            return (*chain, g_Z * mean, g_Z * second, None)
        # Σ ḡ·m + Ḡ:C = the derivative of log Z along nat1 + ε (ḡ − 2 Ḡ m), nat2 − 2 ε Ḡ, for m = ∂ log Z/∂nat1, C = −2 ∂ log Z/∂nat2 − m mᵀ.
        G = torch.zeros_like(cov) if g_cov is None else 0.5 * (g_cov + g_cov.mT)
        direction1 = (0 if g_mean is None else g_mean) - 2 * (G @ mean[:, :, None]).squeeze(-1)
        (s, *t), n, c, d, stride = _layout(A, Q, P0, H, nat1, nat2, step)
        pair1, pair2 = (torch.stack(p, -1).contiguous() for p in ((t[4], direction1), (t[5], -2 * G)))
        out = [x.new_zeros(*x.shape, 2) for x in (t[4].new_empty(()), mean, cov, *t[:3])]
        dH = t[3].new_zeros(*t[3].shape, 2) if ctx.needs_input_grad[3] else None
        _library(d, c).smooth_dual(
            ctypes.c_int64(n), _at(s), *map(_at, t[:4]), ctypes.c_int64(stride), _at(pair1), _at(pair2), *map(_at, out), _at(dH)
        )
        weight = 0.0 if g_Z is None else g_Z
        chain = [None if x is None else weight * x[..., 0] + x[..., 1] for x in (*out[3:], dH)]
        t1, t2 = out[1][..., 1], out[2][..., 1]
        t2 = -0.5 * (t2 + t1[:, :, None] * mean[:, None, :] + mean[:, :, None] * t1[:, None, :])
        # ḡ·m + Ḡ:C depends on the sites through m in the direction too, but that is held: its derivative is that of log Z alone.
        return (*chain, weight * mean + t1, weight * second + t2, None)


def states(chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed states [n d], [n d d]."""
    (s, *t), n, c, d, stride = _layout(chain.A, chain.Q, chain.P0, chain.H, nat1, nat2, chain.step)
    log_Z, mean, cov, m, P = (t[4].new_empty(shape) for shape in ((), (n, c), (n, c, c), (n, d), (n, d, d)))
    _library(d, c).smooth(
        ctypes.c_int64(n), _at(s), *map(_at, t[:4]), ctypes.c_int64(stride), *map(_at, t[4:]), _at(log_Z), _at(mean), _at(cov), _at(m), _at(P),
        ctypes.c_int(0), *[_at(None)] * 4,
    )  # fmt: skip
    return m, P


def propagate(chain, noise: Tensor) -> Tensor:
    """x_k = A x_{k−1} + noise_k for each path [s n d]."""
    noise, A, step = noise.contiguous(), chain.A.contiguous(), chain.step.contiguous()
    x = torch.empty_like(noise)
    d, c = chain.P0.shape[-1], chain.H.shape[-2]
    _library(d, c).propagate(ctypes.c_int64(noise.shape[1]), ctypes.c_int64(noise.shape[0]), _at(step), _at(A), _at(noise), _at(x))
    return x
