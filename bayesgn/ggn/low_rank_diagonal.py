"""LowRankPlusDiagonal: the leading eigenpairs of H, and of what they leave out the diagonal."""

from __future__ import annotations

from torch import Tensor

from bayesgn.ggn.blocks import Block
from bayesgn.ggn.low_rank import LowRank, LowRankCurvature
from bayesgn.ggn.structure import Curvature, Precision, Structure


class LowRankPlusDiagonal(Structure):
    """The ``rank`` largest eigenpairs of H, and the diagonal of the rest, so that diag(H) is exact.

        H ≈ U diag(λ) Uᵀ + diag(τ),      τ = diag(H − U diag(λ) Uᵀ) ≥ 0

    Where ``LowRank`` keeps the prior's variance in what it leaves out, here the data narrow every weight. It is a Gaussian whose determinant
    and covariance belong together, so that a variational bound with it is a bound.

    Args:
        rank: r, eigenpairs kept.
        oversample, walks, memory, seed: as in :class:`LowRank`.

    Raises:
        ValueError: for a rank below 1 or fewer than 2 walks.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.tensor([[1.0], [2.0]]); y = 2 * x
        >>> model = models.Network(torch.nn.Linear(1, 1).eval(), structure=ggn.LowRankPlusDiagonal(rank=1))
        >>> laplace(model, likelihoods.Gaussian(1.0), (x, y)).weight_variance()  # those of ggn.Full are 1/3 and 2/3
        tensor([0.3487, 0.6973], dtype=torch.float64)

    Source: Mishkin et al. (2018), "SLANG: fast structured covariance approximations for Bayesian deep learning with natural gradient".
    """

    def __init__(self, rank: int = 20, oversample: int = 10, walks: int = 4, memory: int = 2**30, seed: int = 0) -> None:
        self._options(rank, oversample, walks, memory, seed)
        self.rank, self.oversample, self.walks, self.memory, self.seed = rank, oversample, walks, memory, seed

    @staticmethod
    def _options(rank: int, oversample: int, walks: int, memory: int, seed: int) -> LowRank:
        return LowRank(rank, tail=0, oversample=oversample, walks=walks, memory=memory, seed=seed)

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return LowRankPlusDiagonalCurvature(blocks, like, self._options(self.rank, self.oversample, self.walks, self.memory, self.seed))


class LowRankPlusDiagonalCurvature(LowRankCurvature):
    """U [p r], λ [r], τ [p]: the diagonal stands beside the prior."""

    def spectrum(self) -> None:
        return None  # τ is not diagonal in U

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        τ = scale * self.τ
        return super().with_prior([p.to(τ) + τ[b.where] for p, b in zip(prior, self.blocks, strict=True)], scale)

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        return self.with_prior(prior, scale)
