"""LowRank: the leading eigenpairs of H, found without forming it, and what is known of the rest by its density.

    H ≈ U diag(λ) Uᵀ                                U [p r], from products H V alone
    log det(s H + P) ≈ log det(s U diag(λ) Uᵀ + P) + Σ_j w_j log(1 + s θ_j v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.dual import DualCurvature, DualPrecision, Rows
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.lanczos import density, orthonormal
from bayesgn.ggn.products import FactorProducts, Products
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Stream, Structure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


MOST_NODES = 256  # of the density of what was left out


class LowRank(Structure):
    """The ``rank`` largest eigenpairs of H by randomised block Lanczos, with a density for the eigenvalues left out.

        H ≈ U diag(λ) Uᵀ,  τ = diag(H − U diag(λ) Uᵀ) ≥ 0 exactly,  v = Σ_i τ_i/P_i / Σ_i τ_i

    Covariances, solves and draws are those of U diag(λ) Uᵀ + P: outside U the prior's variance stands, so no variance comes
    out too small. The log-determinant also counts the eigenvalues left out, by nodes θ and weights w of a stochastic Lanczos
    quadrature scaled to the exact trace Σ τ; it is exact to first order in them for any diagonal prior. (Digits, 25,482
    weights, rank 400, P = 1: without it the evidence misses 92 nats, with it 2.) Where ``rank`` reaches the rank of H
    everything is exact to rounding. A scalar prior costs r a step of tuning, a general one an r × r matrix.

    Data added to a fitted one: U diag(λ) Uᵀ + H_new is truncated to ``rank`` again and the densities add; exact only as long
    as nothing was left out.

    Args:
        rank: r, eigenpairs kept.
        tail: random vectors of the quadrature for the rest; 0 leaves it out of the log-determinant.
        oversample: columns beyond the rank while searching.
        walks: products with a block of (rank + oversample)/(walks − 1) columns; more walks, sharper eigenpairs.
        memory: bytes of factors to keep between products; beyond it every product walks the data (which must allow it).
        seed: of the first block and the quadrature.
        graph: the engine of the products, see :class:`Products`.

    Raises:
        ValueError: for a rank below 1 or fewer than 2 walks.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = models.Network(net, structure=ggn.LowRank(rank=10))
        >>> laplace(model, likelihoods.Gaussian(0.1), (x, y))(x).variance.shape
        torch.Size([20, 1])

    Source: Golub and Underwood (1977) and Musco and Musco (2015) for randomised block Lanczos; Ubaru, Chen and Saad (2017) for
    the quadrature; Sharma, Azizan and Pavone (2021), "Sketching curvature", for low-rank posteriors of networks.
    """

    def __init__(
        self,
        rank: int = 100,
        tail: int = 8,
        oversample: int = 20,
        walks: int = 6,
        memory: int = 2**30,
        seed: int = 0,
        graph: bool | None = None,
    ) -> None:
        if rank < 1 or walks < 2 or tail < 0 or oversample < 0:
            raise ValueError(
                f"rank={rank}, walks={walks}, tail={tail}, oversample={oversample}; expected rank ≥ 1, walks ≥ 2 and others ≥ 0."
            )
        self.rank, self.tail, self.oversample, self.walks = rank, tail, oversample, walks
        self.memory, self.seed, self.graph = memory, seed, graph

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return LowRankCurvature(blocks, like, self)


class LowRankCurvature(DualCurvature):
    """U [p r], λ [r], the variance left out τ [p], and its density (nodes, weights)."""

    def __init__(self, blocks: list[Block], like: Tensor, options: LowRank) -> None:
        super().__init__(blocks, like)
        self.options = options
        self.U = self.zero.new_zeros(blocks[-1].where.stop, 0)
        self.λ, self.nodes, self.weights = (self.zero.new_zeros(0) for _ in range(3))
        self.τ = self.zero.new_zeros(len(self.U))

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        products = Products(stream, self.blocks, self.zero, self.options.memory, self.options.graph)
        self._take(products, products.diagonal, group)

    def all_reduce(self, group: ProcessGroup) -> None:
        # Σ U diag(λ) Uᵀ over processes has a higher rank and is truncated again; what each left out adds up.
        U, λ, kept = self.U, self.λ, {"nodes": self.nodes, "weights": self.weights}
        kept = _distributed.gather_tensors(kept, group, self.zero)
        self.nodes, self.weights = (torch.cat([found[name] for found in kept]) for name in ("nodes", "weights"))
        (self.τ,) = _distributed.all_sum([self.τ], group)
        self.U, self.λ = U[:, :0], λ[:0]
        self._take(lambda V: U @ (λ[:, None] * (U.mT @ V)), U.square() @ λ, group)

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        # keep · U diag(λ) Uᵀ + gain · U' diag(λ') U'ᵀ is truncated to the rank again; densities of what was left out are scaled and joined.
        assert isinstance(other, LowRankCurvature)
        U, λ = other.U, gain * other.λ
        self.λ, self.τ = keep * self.λ, keep * self.τ + gain * other.τ
        nodes, weights = torch.cat([keep * self.nodes, gain * other.nodes]), torch.cat([self.weights, other.weights])
        self.nodes, self.weights = merged(nodes, weights, MOST_NODES)
        if bool(λ.any()):
            self._take(lambda V: U @ (λ[:, None] * (U.mT @ V)), U.square() @ λ)
        self.forget()

    def add(self, factors: list[Factors]) -> None:
        batch = FactorProducts(self.blocks, factors, self.zero.dtype)
        diagonal = torch.cat([f.to(self.zero.dtype).square() for f in factors])
        self._take(lambda V: batch.rmatvec(batch.matvec(V)), diagonal)

    def _take(self, new: Callable[[Tensor], Tensor], diagonal: Tensor, group: ProcessGroup | None = None) -> None:
        """Truncate U diag(λ) Uᵀ + H_new, whose diagonal is known; H_new is a sum over the processes of ``group``."""
        (diagonal,) = _distributed.all_sum([diagonal], group)
        found = _distributed.led(new, lambda H: self._truncated(H, diagonal), group, self.zero)
        self.λ, self.U, τ, nodes, weights = found
        self.τ, self.nodes, self.weights = self.τ + τ, torch.cat([self.nodes, nodes]), torch.cat([self.weights, weights])
        self.forget()

    def _truncated(self, new: Callable[[Tensor], Tensor], diagonal: Tensor) -> list[Tensor]:
        """λ, U, and of what they leave out the diagonal τ, nodes and weights."""
        o, U, λ = self.options, self.U, self.λ

        def H(V: Tensor) -> Tensor:
            return new(V) + U @ (λ[:, None] * (U.mT @ V)) if len(λ) else new(V)

        diagonal = diagonal + U.square() @ λ
        generator = torch.Generator().manual_seed(o.seed)
        found, Q = largest(H, len(U), o.rank, o.oversample, o.walks, generator, like=self.zero)
        found, Q = found.clamp_min(0), Q.contiguous()
        τ = (diagonal - Q.square() @ found).clamp_min(0)
        nodes = weights = self.zero.new_zeros(0)
        if τ.sum() <= 1e-10 * diagonal.sum():  # nothing but rounding
            τ = torch.zeros_like(τ)
        elif o.tail:
            nodes, weights = density(H, Q, o.tail, 20, generator)
            weights = weights * (τ.sum() / (weights @ nodes))
        return [found, Q, τ, nodes, weights]

    def make_rows(self) -> Rows:
        self._eigen = self.λ, None
        return ExplicitRows(self.blocks, self.U * self.λ.sqrt())

    def spectrum(self) -> list[Spectrum] | None:
        return super().spectrum() if len(self.nodes) == 0 else None  # a density has no whole number of eigenvalues

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        dual = super().with_prior(prior, scale)
        if len(self.nodes) == 0:
            return dual
        assert isinstance(dual, DualPrecision)
        dual.rest = (self.weights * torch.log1p(scale * dual.mean_variance(self.τ) * self.nodes)).sum()
        return dual

    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.U, "eigenvalues": self.λ, "left_out": self.τ, "nodes": self.nodes, "weights": self.weights}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.U, self.λ, self.τ, self.nodes, self.weights = (
            tensors[name].to(self.zero) for name in ("U", "eigenvalues", "left_out", "nodes", "weights")
        )
        self.forget()


def merged(nodes: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A density of at most so many nodes with the same mass and mean: neighbours are joined, two by two."""
    good = weights * nodes > 0
    nodes, weights = nodes[good], weights[good]
    while len(nodes) > most:
        nodes, order = nodes.sort()
        weights = weights[order]
        if len(nodes) % 2:
            nodes, weights = torch.cat([nodes, nodes[-1:]]), torch.cat([weights, torch.zeros_like(weights[-1:])])
        mass = weights.reshape(-1, 2).sum(-1)
        nodes, weights = (weights * nodes).reshape(-1, 2).sum(-1) / mass, mass
    return nodes, weights


class ExplicitRows(Rows):
    """J̃ᵀ [p m] as it is."""

    def __init__(self, blocks: list[Block], Jt: Tensor) -> None:
        self.blocks, self.Jt, self.m = blocks, Jt, Jt.shape[1]

    def cross(self, factors: list[Factors], variance: list[Tensor]) -> Tensor:
        return sum(  # type: ignore[return-value]
            f.matvec((v if v.dim() == 0 else v[:, None]) * self.Jt[b.where]).flatten(0, 1)
            for f, v, b in zip(factors, variance, self.blocks, strict=True)
        )

    def gram(self, block: int, variance: Tensor) -> Tensor:
        Jt = self.Jt[self.blocks[block].where]
        return Jt.mT @ ((variance if variance.dim() == 0 else variance[:, None]) * Jt)

    def matvec(self, v: Tensor) -> Tensor:
        return self.Jt.mT @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.Jt @ u


def largest(
    H: Callable[[Tensor], Tensor], p: int, rank: int, oversample: int, walks: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues of a PSD operator, descending, and their vectors [p r].

    Block Lanczos with full re-orthogonalisation, B = [Q₁ … Q_w] with span {Ω, HΩ, H²Ω, …}, then Rayleigh-Ritz on Bᵀ H B.
    """
    columns = -(-(rank + oversample) // (walks - 1))
    if columns * walks >= p:  # the Krylov space would be everything
        HB = H(torch.eye(p, dtype=like.dtype, device=like.device))
        B = None
        T = HB
    else:
        Ω = torch.randn(p, columns, generator=generator, dtype=like.dtype).to(like.device)
        Q = B = torch.linalg.qr(Ω).Q
        products = []
        for step in range(walks):
            products.append(H(Q))
            if step < walks - 1:
                Q = orthonormal(products[-1], B)
                B = torch.cat([B, Q], dim=1)
        T = B.mT @ torch.cat(products, dim=1)
    λ, V = torch.linalg.eigh((T + T.mT) / 2)
    λ, V = λ[-rank:].flip(0), V[:, -rank:].flip(1)
    return λ, V if B is None else B @ V
