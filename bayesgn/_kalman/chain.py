"""A chain x_k = A x_{k-1} + q with sites on f = H x, and what is asked of it; which engine answers is decided here."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._kalman import compiled, scan
from bayesgn._psd import psd_root

log = logging.getLogger("bayesgn.kalman")


class Chain(NamedTuple):
    """x_0 ~ N(0, P0), x_k = A x_{k−1} + q_k with q_k ~ N(0, Q), f_k = H x_k; for n points with d states and c latents.

    Transitions that several steps share are kept once: step k takes the pair (A, Q) number ``step[k]``, or none at all where it is −1 (the
    same instant as the point before; always so at the first point).
    """

    A: Tensor  # [u d d]
    Q: Tensor  # [u d d]
    step: Tensor  # [n] int64
    P0: Tensor  # [d d]
    H: Tensor  # [c d], or [n c d] where it changes from point to point


def smooth(chain: Chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log ∫ p(f) Π_k exp(nat1ᵀf_k − ½ f_kᵀ nat2 f_k) df, and the mean [n c] and covariance [n c c] of each f_k under that density.

    nat1 [n c], nat2 [n c c]; float64 (or the widest type of the device). Differentiable in all tensors of the chain and of the sites.
    """
    if served(chain):
        return compiled.Smooth.apply(chain.A, chain.Q, chain.P0, chain.H, nat1, nat2, chain.step)  # type: ignore[return-value]
    return scan.smooth(chain, nat1, nat2)


def states(chain: Chain, nat1: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n d] and covariance [n d d] of each state x_k; a constant, without a graph."""
    chain = Chain(*(t.detach() for t in chain))
    if served(chain):
        return compiled.states(chain, nat1.detach(), nat2.detach())
    return scan.states(chain, nat1.detach(), nat2.detach())


def means(chain: Chain, nat1: Tensor, nat2: Tensor) -> Tensor:
    """Means of every f_k for many sets of nat1 [s n c] over one nat2 [n c c]: [s n c]. The gains are worked out once where no graph is asked for."""
    if len(nat1) == 0:
        return nat1.clone()
    if not served(chain):
        return scan.means(chain, nat1, nat2)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*chain, nat1, nat2)):
        return torch.stack([smooth(chain, h, nat2)[1] for h in nat1])
    return compiled.means(chain, nat1, nat2)


def draw(chain: Chain, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Paths of x from the prior [samples n d]."""
    chain = Chain(*(t.detach() for t in chain))
    n, d = len(chain.step), chain.P0.shape[-1]
    device = chain.P0.device if generator is None else generator.device
    ε = torch.randn(samples, n, d, dtype=chain.P0.dtype, device=device, generator=generator).to(chain.P0.device)
    if n == 0:
        return ε
    R = psd_root(torch.cat([chain.Q, chain.P0[None]]))  # of any rank
    which = chain.step.clone()
    which[0] = len(chain.Q)
    noise = torch.zeros_like(ε)
    for k in range(d):  # R[which] would be n d² numbers at once
        noise += R[which, :, k] * ε[:, :, k, None]
    noise = torch.where((which >= 0)[:, None], noise, 0.0)
    return compiled.propagate(chain, noise) if served(chain) else scan.propagate(chain, noise)


def served(chain: Chain) -> bool:
    """Whether the compiled engine serves this chain; the log says which one was taken, once for each kind of chain."""
    like = chain.P0
    wanted = like.device.type == "cpu" and like.dtype == torch.float64
    compiled_ = wanted and compiled.available(chain)
    _report("the compiled filter" if compiled_ else "the torch scan", *chain.H.shape[-2:], like.device, like.dtype)
    return compiled_


@functools.cache
def _report(engine: str, c: int, d: int, device: torch.device, dtype: torch.dtype) -> None:
    log.info("chains of %d states and %d latents (%s, %s) run on %s", d, c, device, dtype, engine)
