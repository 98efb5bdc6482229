"""Full: all of H [p p]."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgn.ggn.block_diagonal import BlockPrecision, DenseBlock
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Factors, Linear
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure


class Full(Structure):
    """All of H [p p]: up to some ten thousand weights, with the best evidence.

    One eigendecomposition of H serves every step of tuning a scalar prior and noise; other priors cost a Cholesky factor a step.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.tensor([[1.0], [2.0]]); y = 2 * x
        >>> posterior = laplace(models.Network(torch.nn.Linear(1, 1).eval(), structure=ggn.Full), likelihoods.Gaussian(1.0), (x, y))
        >>> posterior.weight_variance()  # of (H + I)⁻¹ with H = [[5, 3], [3, 2]]
        tensor([0.3333, 0.6667], dtype=torch.float64)

    Source: Schraudolph (2002), "Fast curvature matrix-vector products", for H; MacKay (1992) for its use.
    """

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return FullCurvature(blocks, like)


class FullCurvature(Curvature):
    """H [p p] as one block over all weights."""

    def __init__(self, blocks: list[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.whole = DenseBlock(blocks[-1].where.stop, like)

    @property
    def exact(self) -> bool:
        return True

    def add(self, factors: list[Factors]) -> None:
        self.whole.add(Concatenated(factors))

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return FullPrecision(self.whole.with_prior(joined_prior(prior, self.blocks), scale))

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return FullPrecision(self.whole.solver(joined_prior(prior, self.blocks), scale))

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

    def full(self) -> Tensor:
        parts = [f for f in self.parts if isinstance(f, Linear) and f.paired]
        if len(parts) < len(self.parts):
            return super().full()
        rows = [[f.full() if i == j else f.across(g) if i < j else f.a.new_zeros(()) for j, g in enumerate(parts)] for i, f in enumerate(parts)]
        rows = [[rows[i][j] if i <= j else rows[j][i].mT for j in range(len(parts))] for i in range(len(parts))]
        return torch.cat([torch.cat(row, dim=1) for row in rows])

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
