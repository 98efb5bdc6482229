"""EigenKron: the Kronecker eigenbasis of a first walk over the data, with the exact diagonal of H in it from a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.block_diagonal import BlockCurvature, BlockDiagonal, BlockPrecision
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Embedding, Factors, Linear, unflatten_weights
from bayesgn.ggn.kron import KronBlock, Kronecker, KronPrecision
from bayesgn.ggn.structure import Curvature, Stream, accumulator, working

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class EigenKron(Kronecker):
    """Kron's eigenvectors with the best eigenvalues for them (EKFAC).

        H_block ≈ (Q_b ⊗ Q_a) diag(Σ_n (Q_bᵀδ ⊗ Q_aᵀa)²) (Q_b ⊗ Q_a)ᵀ

    Never further from H in Frobenius norm than :class:`Kron`, and the trace of H is exact. The data are walked twice; data
    cannot be added to a fitted one, because the first data would have to be seen again in the new basis.

    Args:
        reduce, explicit_limit: as in :class:`Kron`.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = models.Network(net, structure=ggn.EigenKron)
        >>> laplace(model, likelihoods.Gaussian(0.1), (x, y))(x).variance.shape
        torch.Size([20, 1])

    Source: George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", eqs. 9-11.
    """

    def factored(self, block: Block, like: Tensor) -> BlockCurvature:
        return EigenKronBlock(block, self.reduce, like)

    def joined(self, blocks: list[Block], parts: list[BlockCurvature]) -> BlockDiagonal:
        return EigenKronCurvature(blocks, parts)

    def check_blend(self) -> None:
        raise ValueError(_NOT_ADDITIVE)


class EigenKronCurvature(BlockDiagonal):
    """Blocks in their Kronecker eigenbasis."""

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        rotated = [part for part in self.parts if isinstance(part, EigenKronBlock)]
        if any(part.fitted for part in rotated):
            raise ValueError(_NOT_ADDITIVE)
        for lin, S in stream:
            for part, f in zip(self.parts, lin.factors(S), strict=True):
                (part.kron if isinstance(part, EigenKronBlock) else part).add(f)
        first = BlockDiagonal(self.blocks, [part.kron if isinstance(part, EigenKronBlock) else part for part in self.parts])
        if group is not None:
            first.all_reduce(group)
        if not rotated:
            return
        for part in rotated:
            part.settle()
            part.Q_a, part.Q_b = _distributed.from_first([part.Q_a, part.Q_b], group)  # (eigh may round otherwise elsewhere)
        for lin, S in stream:
            for part, f in zip(self.parts, lin.factors(S), strict=True):
                if isinstance(part, EigenKronBlock):
                    part.add(f)
        for part, h in zip(rotated, _distributed.all_sum([part.h for part in rotated], group), strict=True):
            part.h = h

    def all_reduce(self, group: ProcessGroup) -> None:
        raise ValueError(_NOT_ADDITIVE)

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        raise ValueError(_NOT_ADDITIVE)

    def add(self, factors: list[Factors]) -> None:
        raise ValueError(_NOT_ADDITIVE)


_NOT_ADDITIVE = (
    "EigenKron needs all data in both of its walks, so data cannot be added batch by batch or to a fitted one. Condition the "
    "model on all data at once, or use structure=ggn.Kron, which adds exactly."
)


class EigenKronBlock(BlockCurvature):
    """Q_a, Q_b and the diagonal of H in their basis, h [g o i] ([vocabulary o] for embeddings)."""

    def __init__(self, block: Block, reduce: bool, like: Tensor) -> None:
        self.block, self.kron = block, KronBlock(block, reduce, like)
        self.Q_a = self.Q_b = self.h = torch.zeros((), dtype=accumulator(like), device=like.device)

    @property
    def fitted(self) -> bool:
        """Whether the basis is settled."""
        return self.h.dim() > 0

    def settle(self) -> None:
        """Take the eigenbasis of the sums of the first walk, and begin the second with h = 0."""
        eigenvalues, Q_a, Q_b = self.kron.eigen()
        self.Q_b = Q_b.contiguous()  # as a file gives it back: products of other strides round differently
        self.Q_a = Q_b.new_zeros(()) if Q_a is None else Q_a.contiguous()
        self.h = torch.zeros(eigenvalues.shape, dtype=eigenvalues.dtype, device=eigenvalues.device)

    def add(self, f: Factors) -> None:
        assert isinstance(f, (Linear, Embedding))
        f = f.to(working(f.dtype))
        h = f.rotate(self._Q_a(f.dtype), self.Q_b.to(f.dtype)).square()
        if isinstance(f, Embedding):
            self.h += h.view_as(self.h)
        else:
            self.h += unflatten_weights(h, *self.h.shape, self.block.has_weight and self.block.has_bias)

    def _Q_a(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.Q_a.dim() == 0 else self.Q_a.to(dtype)

    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        if prior.dim() > 0:
            self.kron.with_prior(prior, scale)  # raises, saying why
        if not self.fitted:
            raise ValueError("EigenKron holds no data; condition it on some first.")
        return KronPrecision(scale * self.h + prior, self._Q_a(self.h.dtype), self.Q_b, self.block)

    def eigenvalues(self) -> Tensor:
        return self.h

    def tensors(self) -> dict[str, Tensor]:
        return {"Q_a": self.Q_a.contiguous(), "Q_b": self.Q_b.contiguous(), "h": self.h}
