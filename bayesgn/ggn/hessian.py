"""Hessian: the second derivative of the loss itself, the net's own bending included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesgn import _data
from bayesgn._psd import eigabs
from bayesgn.ggn.block_diagonal import DenseBlock
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.evaluation import at_rest, call
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.full import FullCurvature, FullPrecision, joined_prior
from bayesgn.ggn.linearization import Linearization
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Stream, Structure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COLUMNS = 64  # of one batched backward pass


class Hessian(Structure):
    """All of the loss's Hessian [p p], made positive semi-definite: Newton's method, where the others keep the Gauss-Newton part alone.

        ∂²loss = Σ_n JᵀΛJ + Σ_n Σ_k (∂loss_n/∂f_k) ∂²f_k,     H = psd(∂²loss)

    Λ is the rule's: with ``rules.Exact()`` the sum is the Hessian where the loss is convex in f. The second term takes a backward pass for every
    weight, so this is for small nets, as a yardstick. It serves optimizers, whose streams tell the loss's slope; a Laplace fit does not.

    Args:
        psd: of the whole matrix: ``eigabs`` (|λ|: saddles repel) or ``eigclip`` (flat where it was negative).

    Raises:
        TypeError: for a ``psd`` that is no function.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, likelihoods, optim, rules
        >>> net = torch.nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 9)[:, None]; y = (x > 0).float()
        >>> opt = optim.GaussNewton(net, likelihoods.Bernoulli(), rules.Exact(), ggn.Hessian, weight_decay=1e-2)
        >>> for _ in range(8): loss = opt.step(x, y)
        >>> net.weight.grad.abs().item() < 1e-6
        True

    Source: Pearlmutter (1994) for products with it; Dauphin et al. (2014), "Identifying and attacking the saddle point problem", for |λ|.
    """

    def __init__(self, psd: Callable[[Tensor], Tensor] = eigabs) -> None:
        if not callable(psd):
            raise TypeError(f"Hessian: psd={psd!r}; expected a function of matrices such as rules.eigabs or rules.eigclip.")
        self.psd = psd

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return HessianCurvature(blocks, like, self.psd)

    def __repr__(self) -> str:
        return f"Hessian(psd={getattr(self.psd, '__name__', self.psd)})"


class HessianCurvature(FullCurvature):
    """∂²loss [p p], made PSD when it is asked for."""

    def __init__(self, blocks: list[Block], like: Tensor, psd: Callable[[Tensor], Tensor]) -> None:
        super().__init__(blocks, like)
        self.psd = psd
        self._made: DenseBlock | None = None

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        for lin, S in stream:
            slope = getattr(lin, "slope", None)
            if slope is None or lin.source is None:
                raise ValueError("structure=ggn.Hessian needs the loss's slope at each datum, which optim.GaussNewton's step(x, y) tells and a "
                                 "Laplace fit or a closure does not; use ggn.Full there.")  # fmt: skip
            self.add(lin.factors(S))
            self.whole.H += net_hessian(lin, slope).to(self.whole.H)
        if group is not None:
            self.all_reduce(group)

    def add(self, factors: list[Factors]) -> None:
        self._made = None
        super().add(factors)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._made = None
        super().load(tensors)

    def made(self) -> DenseBlock:
        """psd(∂²loss), worked out once."""
        if self._made is None:
            self._made = copy.copy(self.whole)
            self._made.H, self._made._eigen = self.psd(0.5 * (self.whole.H + self.whole.H.mT)), None
        return self._made

    multiplies = True

    def times(self, V: Tensor, scale: Tensor) -> Tensor:
        return scale * (self.made().H @ V.to(self.whole.H))

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return FullPrecision(self.made().with_prior(joined_prior(prior, self.blocks), scale))

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return FullPrecision(self.made().solver(joined_prior(prior, self.blocks), scale))

    def spectrum(self) -> list[Spectrum]:
        return [Spectrum(tuple(range(len(self.blocks))), self.made().eigenvalues())]


def net_hessian(lin: Linearization, slope: Tensor) -> Tensor:
    """Σ_n Σ_k slope_nk ∂²f_nk / ∂θ² [p p] for slope [n r], by double backward."""
    linearizer, x, rows = lin.source  # type: ignore[misc]
    vector, net = linearizer.vector, linearizer.net
    selected = vector.tensors(net)
    weights = list(selected.values())

    def flat(found: tuple) -> Tensor:
        parts = []
        for name, t in zip(selected, found, strict=True):
            t = t.reshape(*t.shape[: t.dim() - selected[name].dim()], -1)
            parts.append(t[..., vector.masks[name]] if name in vector.masks else t)
        return torch.cat(parts, dim=-1)

    with at_rest(net, selected), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        f = rows(call(net, x)).reshape(_data.len_of(x), -1)
        g = flat(torch.autograd.grad((slope.to(f) * f).sum(), weights, create_graph=True, materialize_grads=True))
        p = len(g)
        if not g.requires_grad:  # linear in every weight
            return torch.zeros(p, p, dtype=g.dtype, device=g.device)
        out = []
        for start in range(0, p, COLUMNS):
            eye = torch.eye(p, dtype=g.dtype, device=g.device)[start : start + COLUMNS]
            found = torch.autograd.grad(g, weights, eye, is_grads_batched=True, retain_graph=True, allow_unused=True)
            out.append(flat(tuple(w.new_zeros(len(eye), *w.shape) if t is None else t for t, w in zip(found, weights, strict=True))))
    return torch.cat(out)
