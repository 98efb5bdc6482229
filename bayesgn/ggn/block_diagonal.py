"""Block-diagonal structures: Full (one block), Layerwise, Diag, Kron. H + P falls into independent blocks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Embedding, Factors, Linear, flatten_weights, unflatten_weights
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure, accumulator, randn, working

logger = logging.getLogger("bayesgn.ggn")


class BlockCurvature(ABC):
    """H of one block."""

    @abstractmethod
    def add(self, f: Factors) -> None:
        """H ← H + Σ JᵀSSᵀJ."""

    @abstractmethod
    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        """scale · H + P; ``prior`` is a scalar or [p]."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """λ of H [...], in the weights' order for a diagonal (``diagonal = True``)."""

    diagonal = False

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """State by name."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, t in self.tensors().items():
            setattr(self, name, tensors[name].to(t.device, t.dtype))


class BlockPrecision(ABC):
    """As :class:`Precision`, for one block."""

    logdet: Tensor

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def diagonal(self) -> Tensor: ...

    @abstractmethod
    def covariance(self, f: Factors) -> Tensor: ...

    @abstractmethod
    def joint(self, f: Factors, other: Factors) -> Tensor: ...


# -- explicit block ----------------------------------------------------------------------------------------------------


class DenseBlock(BlockCurvature):
    """H [p p] as it is."""

    def __init__(self, p: int, like: Tensor) -> None:
        self.H = torch.zeros(p, p, dtype=accumulator(like), device=like.device)
        self._eigen: tuple[Tensor, Tensor] | None = None

    def add(self, f: Factors) -> None:
        self.H += f.to(working(f.dtype)).full()
        self._eigen = None

    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        if prior.dim() > 0:
            return CholeskyPrecision(scale * self.H + torch.diag(prior))
        eigenvalues, Q = self.eigen()
        return EigenPrecision(scale * eigenvalues + prior, Q)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [p] and basis of H, worked out once: every prior and noise step afterwards costs p, not p³."""
        if self._eigen is None:
            eigenvalues, Q = torch.linalg.eigh(self.H)
            self._eigen = eigenvalues.clamp_min(0), Q
        return self._eigen

    def eigenvalues(self) -> Tensor:
        return self.eigen()[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"H": self.H}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._eigen = None


class EigenPrecision(BlockPrecision):
    """Q diag(precision) Qᵀ."""

    def __init__(self, precision: Tensor, Q: Tensor) -> None:
        self.precision, self.Q = precision, Q
        self.logdet = precision.log().sum()

    def solve(self, v: Tensor) -> Tensor:
        return ((v @ self.Q) / self.precision) @ self.Q.mT

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        ε = randn((count, len(self.precision)), self.Q, generator)
        return (ε * self.precision.rsqrt()) @ self.Q.mT

    def diagonal(self) -> Tensor:
        return self.Q.square() @ self.precision.reciprocal()

    def covariance(self, f: Factors) -> Tensor:
        out = []
        for part in f.slices():
            V = (part.jacobian().to(self.Q) @ self.Q) * self.precision.rsqrt()
            out.append(V @ V.mT)
        return torch.cat(out)

    def joint(self, f: Factors, other: Factors) -> Tensor:
        V = (f.jacobian().flatten(0, 1).to(self.Q) @ self.Q) / self.precision
        return V @ (other.jacobian().flatten(0, 1).to(self.Q) @ self.Q).mT


class CholeskyPrecision(BlockPrecision):
    """L Lᵀ = scale · H + P, so J (H + P)⁻¹ Jᵀ = VᵀV with V = L⁻¹Jᵀ: no inverse is formed."""

    def __init__(self, M: Tensor) -> None:
        self.L = safe_cholesky(M)
        self.logdet = 2 * self.L.diagonal().log().sum()

    def _half(self, J: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.L, J.to(self.L).mT, upper=False).mT

    def solve(self, v: Tensor) -> Tensor:
        flat = v.reshape(-1, v.shape[-1]).to(self.L)
        return torch.cholesky_solve(flat.mT, self.L).mT.reshape(v.shape)

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        ε = randn((len(self.L), count), self.L, generator)
        return torch.linalg.solve_triangular(self.L.mT, ε, upper=True).mT

    def diagonal(self) -> Tensor:
        half = torch.linalg.solve_triangular(self.L, torch.eye(len(self.L)).to(self.L), upper=False)
        return half.square().sum(0)

    def covariance(self, f: Factors) -> Tensor:
        out = []
        for part in f.slices():
            V = self._half(part.jacobian().flatten(0, 1)).unflatten(0, (part.n, part.k))
            out.append(V @ V.mT)
        return torch.cat(out)

    def joint(self, f: Factors, other: Factors) -> Tensor:
        return self._half(f.jacobian().flatten(0, 1)) @ self._half(other.jacobian().flatten(0, 1)).mT


# -- diagonal block ----------------------------------------------------------------------------------------------------


class DiagBlock(BlockCurvature):
    """The diagonal of H [p]."""

    def __init__(self, p: int, like: Tensor) -> None:
        self.h = torch.zeros(p, dtype=accumulator(like), device=like.device)

    def add(self, f: Factors) -> None:
        self.h += f.to(working(f.dtype)).square()

    diagonal = True

    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        return DiagPrecision(scale * self.h + prior)

    def eigenvalues(self) -> Tensor:
        return self.h

    def tensors(self) -> dict[str, Tensor]:
        return {"h": self.h}


class DiagPrecision(BlockPrecision):
    """diag(precision)."""

    def __init__(self, precision: Tensor) -> None:
        self.precision = precision
        self.logdet = precision.log().sum()

    def solve(self, v: Tensor) -> Tensor:
        return v / self.precision

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        return randn((count, len(self.precision)), self.precision, generator) * self.precision.rsqrt()

    def diagonal(self) -> Tensor:
        return self.precision.reciprocal()

    def covariance(self, f: Factors) -> Tensor:
        f = f.to(working(f.dtype))
        return f.quadratic(self.precision.reciprocal().to(f.dtype)).to(self.precision)

    def joint(self, f: Factors, other: Factors) -> Tensor:
        dtype = self.precision.dtype
        return f.to(dtype).gram(other.to(dtype), self.precision.reciprocal())


# -- Kronecker block ---------------------------------------------------------------------------------------------------


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
        if prior.dim() > 0:
            raise ValueError(
                f"the prior gives every weight of block {self.block.name!r} its own precision; a Kronecker block needs one "
                "precision for the block. Use WeightPrior(scalar) or WeightPrior.per_layer(net), or structure=ggn.Diag, "
                "ggn.Full, ggn.LowRank or ggn.Gram."
            )
        eigenvalues, Q_a, Q_b = self.eigen()
        return KronPrecision(scale * eigenvalues + prior, Q_a, Q_b, self.block)

    def eigenvalues(self) -> Tensor:
        return self.eigen()[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self._eigen = None


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


# -- the structures ----------------------------------------------------------------------------------------------------


class BlockDiagonal(Curvature):
    """H as independent blocks, one for each unit of weights."""

    def __init__(self, blocks: list[Block], parts: list[BlockCurvature]) -> None:
        self.blocks, self.parts = blocks, parts

    def add(self, factors: list[Factors]) -> None:
        for part, f in zip(self.parts, factors, strict=True):
            part.add(f)

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return BlockDiagonalPrecision(
            self.blocks, [part.with_prior(p, scale) for part, p in zip(self.parts, prior, strict=True)]
        )

    def spectrum(self) -> list[Spectrum]:
        return [Spectrum((i,), part.eigenvalues().reshape(-1), 0, part.diagonal) for i, part in enumerate(self.parts)]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            part.load({name: tensors[f"{i}.{name}"] for name in part.tensors()})


class BlockDiagonalPrecision(Precision):
    """Blocks answer alone; function covariances add over blocks."""

    def __init__(self, blocks: list[Block], parts: list[BlockPrecision]) -> None:
        self.blocks, self.parts = blocks, parts

    def logdet(self) -> Tensor:
        return torch.stack([part.logdet for part in self.parts]).sum()

    def solve(self, v: Tensor) -> Tensor:
        return torch.cat([part.solve(v[..., b.where]) for part, b in zip(self.parts, self.blocks, strict=True)], dim=-1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.cat([part.sample(count, generator) for part in self.parts], dim=-1)

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts])

    def covariance(self, factors: list[Factors]) -> Tensor:
        return sum(part.covariance(f) for part, f in zip(self.parts, factors, strict=True))  # type: ignore[return-value]

    def joint(self, factors: list[Factors], other: list[Factors] | None = None) -> Tensor:
        other = factors if other is None else other
        return sum(part.joint(f, f_) for part, f, f_ in zip(self.parts, factors, other, strict=True))  # type: ignore[return-value]


class Layerwise(Structure):
    """Each module's block of H exactly, nothing between modules."""

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return BlockDiagonal(blocks, [DenseBlock(b.numel, like) for b in blocks])


class Diag(Structure):
    """The diagonal of H."""

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return BlockDiagonal(blocks, [DiagBlock(b.numel, like) for b in blocks])


class Kron(Structure):
    """A Kronecker product for each Linear, Conv and Embedding module, weight and bias together; exact small blocks elsewhere.

        H_block ≈ (Σ aaᵀ) ⊗ (Σ δδᵀ) / count

    Exact for one datum, for the last layer under squared loss, and for deep linear nets under squared loss.

    Args:
        reduce: for weights shared over positions (sequences, pixels), average inputs and sum gradients over them first
            (KFAC-reduce); the default counts each position as a datum (KFAC-expand).
        explicit_limit: weights that are not in a Kronecker module (norms, recurrent cells, …) keep an exact block up to this
            size, and a diagonal beyond it (said in the log).

    Source: Martens and Grosse (2015); Eschenhagen et al. (2023), eqs. for expand and reduce.
    """

    def __init__(self, reduce: bool = False, explicit_limit: int = 1024) -> None:
        self.reduce, self.explicit_limit = reduce, explicit_limit

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return BlockDiagonal(blocks, [self.part(b, like) for b in blocks])

    def part(self, block: Block, like: Tensor) -> BlockCurvature:
        """The storage of one block."""
        if block.factored:
            return KronBlock(block, self.reduce, like)
        return explicit_block(block, self.explicit_limit, like)


def explicit_block(block: Block, limit: int, like: Tensor) -> BlockCurvature:
    """A block without Kronecker factors: exact up to ``limit`` weights, else its diagonal."""
    if block.numel <= limit:
        return DenseBlock(block.numel, like)
    logger.info("block %r has %d weights without Kronecker factors: its diagonal is kept", block.name, block.numel)
    return DiagBlock(block.numel, like)


class Full(Structure):
    """All of H [p p]."""

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return FullCurvature(blocks, like)


class FullCurvature(Curvature):
    """H [p p] as one block over all weights."""

    def __init__(self, blocks: list[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.whole = DenseBlock(blocks[-1].where.stop, like)

    def add(self, factors: list[Factors]) -> None:
        self.whole.add(Concatenated(factors))

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return FullPrecision(self.whole.with_prior(joined_prior(prior, self.blocks), scale))

    def spectrum(self) -> list[Spectrum]:
        return [Spectrum(tuple(range(len(self.blocks))), self.whole.eigenvalues())]

    def tensors(self) -> dict[str, Tensor]:
        return self.whole.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.whole.load(tensors)


class FullPrecision(Precision):
    """One block over all weights."""

    def __init__(self, whole: BlockPrecision) -> None:
        self.whole = whole

    def logdet(self) -> Tensor:
        return self.whole.logdet

    def solve(self, v: Tensor) -> Tensor:
        return self.whole.solve(v)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.whole.sample(count, generator)

    def diagonal(self) -> Tensor:
        return self.whole.diagonal()

    def covariance(self, factors: list[Factors]) -> Tensor:
        return self.whole.covariance(Concatenated(factors))

    def joint(self, factors: list[Factors], other: list[Factors] | None = None) -> Tensor:
        f = Concatenated(factors)
        return self.whole.joint(f, f if other is None else Concatenated(other))


class Concatenated(Factors):
    """The factors of all blocks side by side, as one explicit Jacobian."""

    def __init__(self, factors: list[Factors]) -> None:
        self.parts = factors
        self.n, self.k, self.p = factors[0].n, factors[0].k, sum(f.p for f in factors)
        self.dtype = factors[0].dtype

    def jacobian(self) -> Tensor:
        return torch.cat([f.jacobian() for f in self.parts], dim=-1)

    def with_uses(self, others: list[Concatenated]) -> Concatenated:
        return Concatenated([f.with_uses(list(uses)) for f, *uses in zip(self.parts, *(o.parts for o in others), strict=True)])

    def with_uses(self, others: list[Concatenated]) -> Concatenated:
        return Concatenated([f.with_uses(list(rest)) for f, *rest in zip(self.parts, *(o.parts for o in others), strict=True)])

    def rows(self, part: slice) -> Concatenated:
        return Concatenated([f.rows(part) for f in self.parts])

    def to(self, dtype: torch.dtype) -> Concatenated:
        return Concatenated([f.to(dtype) for f in self.parts])


def joined_prior(prior: list[Tensor], blocks: list[Block]) -> Tensor:
    """P as one scalar where all blocks share it, else as a vector [p]."""
    if all(p is prior[0] for p in prior) and prior[0].dim() == 0:
        return prior[0]
    return torch.cat([p.expand(b.numel) for p, b in zip(prior, blocks, strict=True)])
