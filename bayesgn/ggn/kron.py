"""Kron: a Kronecker product for each module, H ≈ A ⊗ B / count."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from bayesgn.ggn.block_diagonal import BlockCurvature, BlockDiagonal, BlockPrecision, explicit_block, tell_diagonal
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Embedding, Factors, Linear, flatten_weights, unflatten_weights
from bayesgn.ggn.structure import Curvature, Structure, accumulator, randn, working


class KronBlock(BlockCurvature):
    """H ≈ A ⊗ B / count with A = Σ aaᵀ [g i i] (a diagonal [i] for embeddings) and B = Σ δδᵀ [g o o].

    Sums of A and B are kept, never their product: two half data sets add to the whole.
    """

    def __init__(self, block: Block, reduce: bool, like: Tensor) -> None:
        self.block, self.reduce = block, reduce
        self.A = self.B = torch.zeros((), dtype=accumulator(like), device=like.device)
        self.count = torch.zeros((), dtype=accumulator(like), device=like.device)
        self._eigen: tuple[Tensor, Tensor | None, Tensor] | None = None

    def add(self, f: Factors) -> None:
        assert isinstance(f, (Linear, Embedding))
        A, B, count = f.to(working(f.dtype)).kron(self.reduce)
        self.A, self.B = self.A + A.to(self.A.dtype), self.B + B.to(self.B.dtype)  # (0-dim sums would not promote)
        self.count = self.count + count
        self._eigen = None

    def eigen(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Eigenvalues [... o i] of H, and the bases Q_a (None for an embedding), Q_b."""
        if self._eigen is None:
            λ_b, Q_b = torch.linalg.eigh(self.B.contiguous())
            λ_b, count = λ_b.clamp_min(0), self.count.clamp_min(1)
            if self.A.dim() == 1:
                self._eigen = self.A[:, None] * λ_b / count, None, Q_b
            else:
                λ_a, Q_a = torch.linalg.eigh(self.A.contiguous())
                self._eigen = λ_b[..., :, None] * λ_a.clamp_min(0)[..., None, :] / count, Q_a, Q_b
        return self._eigen

    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        check_scalar(self.block, prior)
        eigenvalues, Q_a, Q_b = self.eigen()
        return KronPrecision(scale * eigenvalues + prior, Q_a, Q_b, self.block)

    def eigenvalues(self) -> Tensor:
        return self.eigen()[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._eigen = None


def check_scalar(block: Block, prior: Tensor) -> None:
    """A Kronecker product plus a diagonal is diagonal in the eigenbasis only where the diagonal is a multiple of the identity."""
    if prior.dim() > 0:
        raise ValueError(
            f"the prior gives every weight of block {block.name!r} its own precision; a Kronecker block needs one "
            "precision for the block. Use WeightPrior(scalar) or WeightPrior.per_layer(net), or structure=ggn.Diag, "
            "ggn.Full, ggn.LowRank or ggn.Gram."
        )


class KronPrecision(BlockPrecision):
    """(Q_b ⊗ Q_a) diag(precision) (Q_b ⊗ Q_a)ᵀ, precision [g o i] ([i o] for embeddings, whose Q_a is the identity)."""

    def __init__(self, precision: Tensor, Q_a: Tensor | None, Q_b: Tensor, block: Block) -> None:
        self.precision, self.Q_a, self.Q_b, self.block = precision, Q_a, Q_b, block
        self.logdet = precision.log().sum()

    def _flatten(self, M: Tensor) -> Tensor:
        return M.flatten(-2) if self.Q_a is None else flatten_weights(M, self.block.has_weight and self.block.has_bias)

    def _unflatten(self, v: Tensor) -> Tensor:
        if self.Q_a is None:
            return v.unflatten(-1, self.precision.shape)
        g, o, i = self.precision.shape
        return unflatten_weights(v, g, o, i, self.block.has_weight and self.block.has_bias)

    def _into(self, M: Tensor) -> Tensor:
        """Coordinates of M in the eigenbasis."""
        return M @ self.Q_b if self.Q_a is None else self.Q_b.mT @ M @ self.Q_a

    def _out_of(self, M: Tensor) -> Tensor:
        return M @ self.Q_b.mT if self.Q_a is None else self.Q_b @ M @ self.Q_a.mT

    def solve(self, v: Tensor) -> Tensor:
        return self._flatten(self._out_of(self._into(self._unflatten(v.to(self.Q_b))) / self.precision))

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        ε = randn((count, *self.precision.shape), self.precision, generator)
        return self._flatten(self._out_of(ε * self.precision.rsqrt()))

    def diagonal(self) -> Tensor:
        variance = self.precision.reciprocal()
        if self.Q_a is None:
            return self._flatten(variance @ self.Q_b.square().mT)
        return self._flatten(self.Q_b.square() @ variance @ self.Q_a.square().mT)

    def _rotate(self, f: Factors, dtype: torch.dtype) -> tuple[Factors, Tensor]:
        Q_a = None if self.Q_a is None else self.Q_a.to(dtype)
        rotated = f.to(dtype).rotate(Q_a, self.Q_b.to(dtype))  # type: ignore[attr-defined]
        return rotated, self._flatten(self.precision.reciprocal()).to(dtype)

    def covariance(self, f: Factors) -> Tensor:
        rotated, variance = self._rotate(f, working(f.dtype))
        return rotated.quadratic(variance).to(self.precision)

    def joint(self, f: Factors, other: Factors) -> Tensor:
        dtype = self.precision.dtype
        rotated, variance = self._rotate(f, dtype)
        return rotated.gram(rotated if other is f else self._rotate(other, dtype)[0], variance)


class Kronecker(Structure):
    """A storage in Kronecker coordinates for each block that has factors; the rest exact, or a diagonal where it is large."""

    def __init__(self, reduce: bool = False, explicit_limit: int = 1024) -> None:
        self.reduce, self.explicit_limit = reduce, explicit_limit

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        tell_diagonal(self, blocks, self.explicit_limit)
        parts = [self.factored(b, like) if b.factored else explicit_block(b, self.explicit_limit, like) for b in blocks]
        return self.joined(blocks, parts)

    def check_prior(self, blocks: list[Block], prior: list[Tensor]) -> None:
        for b, p in zip(blocks, prior, strict=True):
            if b.factored:
                check_scalar(b, p)

    @abstractmethod
    def factored(self, block: Block, like: Tensor) -> BlockCurvature:
        """The storage of a block that has Kronecker factors."""

    @abstractmethod
    def joined(self, blocks: list[Block], parts: list[BlockCurvature]) -> BlockDiagonal:
        """The storages of all blocks as one H."""


class Kron(Kronecker):
    """A Kronecker product for each Linear, Conv and Embedding module, weight and bias together; exact small blocks elsewhere.

        H_block ≈ (Σ aaᵀ) ⊗ (Σ δδᵀ) / count

    Exact for one datum, for the last layer under squared loss, and for deep linear nets under squared loss.

    Args:
        reduce: for weights shared over positions (sequences, pixels), average inputs and sum gradients over them first
            (KFAC-reduce); the default counts each position as a datum (KFAC-expand).
        explicit_limit: weights that are not in a Kronecker module (norms, recurrent cells, …) keep an exact block up to this
            size, and a diagonal beyond it (a warning names them).

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.tensor([[1.0], [2.0]]); y = 2 * x
        >>> posterior = laplace(models.Network(torch.nn.Linear(1, 1).eval(), structure=ggn.Kron), likelihoods.Gaussian(1.0), (x, y))
        >>> posterior.weight_variance()  # a last layer under squared loss: that of ggn.Full
        tensor([0.3333, 0.6667], dtype=torch.float64)

    Source: Martens and Grosse (2015); Eschenhagen et al. (2023), eqs. for expand and reduce.
    """

    def factored(self, block: Block, like: Tensor) -> BlockCurvature:
        return KronBlock(block, self.reduce, like)

    def joined(self, blocks: list[Block], parts: list[BlockCurvature]) -> BlockDiagonal:
        return BlockDiagonal(blocks, parts)
