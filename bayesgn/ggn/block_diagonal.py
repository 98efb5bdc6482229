"""Block-diagonal structures: H + P falls into independent blocks. Here the blocks kept as they are (Layerwise) and their diagonals (Diag)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure, accumulator, randn, working

MOST_BYTES = 16 * 2**30  # of one exact block: asking for more would end in the system killing the process


class BlockCurvature(ABC):
    """H of one block."""

    @abstractmethod
    def add(self, f: Factors) -> None:
        """H ← H + Σ JᵀSSᵀJ."""

    @abstractmethod
    def with_prior(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        """scale · H + P; ``prior`` is a scalar or [p]."""

    def solver(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        """As :meth:`Curvature.solver`."""
        return self.with_prior(prior, scale)

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
        if p * p * 8 > MOST_BYTES:
            raise ValueError(
                f"an exact block of {p} weights takes {p * p * 8 / 2**30:.0f} GB, more than block_diagonal.MOST_BYTES allows "
                f"({MOST_BYTES / 2**30:.0f} GB); use ggn.Kron, ggn.LowRank, ggn.Gram or ggn.Diag, or fewer weights (parameters=…)."
            )
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

    def solver(self, prior: Tensor, scale: Tensor) -> BlockPrecision:
        if self._eigen is not None:
            return self.with_prior(prior, scale)
        M = scale * self.H
        M.diagonal().add_(prior)
        return CholeskyPrecision(M)

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

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return BlockDiagonalPrecision(self.blocks, [part.solver(p, scale) for part, p in zip(self.parts, prior, strict=True)])

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
    """Each module's block of H exactly, nothing between modules.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> posterior = laplace(models.Network(net, structure=ggn.Layerwise), likelihoods.Gaussian(0.1), (x, y))
        >>> [len(part.eigenvalues) for part in posterior.curvature.spectrum()]  # two blocks, weight and bias together
        [16, 9]
    """

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return BlockDiagonal(blocks, [DenseBlock(b.numel, like) for b in blocks])


class Diag(Structure):
    """The diagonal of H: the least memory and time, and the worst evidence and draws.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.tensor([[1.0], [2.0]]); y = 2 * x
        >>> posterior = laplace(models.Network(torch.nn.Linear(1, 1).eval(), structure=ggn.Diag), likelihoods.Gaussian(1.0), (x, y))
        >>> posterior.weight_variance()  # 1 / (5 + 1) and 1 / (2 + 1): what ties weight and bias together is left out
        tensor([0.1667, 0.3333], dtype=torch.float64)
    """

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return BlockDiagonal(blocks, [DiagBlock(b.numel, like) for b in blocks])


def tell_diagonal(structure: Structure, blocks: list[Block], limit: int) -> None:
    """Warn of blocks that a Kronecker structure can keep as a diagonal only."""
    names = [f"{b.name or 'the net itself'} ({b.numel} weights)" for b in blocks if not b.factored and b.numel > limit]
    if names:
        warnings.warn(
            f"{structure} keeps only the diagonal of {', '.join(names[:5])}{' …' if len(names) > 5 else ''}: recurrent cells, packed "
            "attention, transposed convolutions, tied and masked weights have no Kronecker factors. Raise explicit_limit to keep "
            "exact blocks, or use ggn.LowRank or ggn.Gram.",
            stacklevel=4,
        )


def explicit_block(block: Block, limit: int, like: Tensor) -> BlockCurvature:
    """A block without Kronecker factors: exact up to ``limit`` weights, else its diagonal."""
    if block.numel <= limit:
        return DenseBlock(block.numel, like)
    return DiagBlock(block.numel, like)
