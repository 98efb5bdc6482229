"""The dual: H = J̃ᵀJ̃ kept as the rows of J̃ [m p], and all algebra m × m.

    K = J̃ P⁻¹ J̃ᵀ      log det(s H + P) = log det P + log det(I + s K)
    (s H + P)⁻¹ = P⁻¹ − s P⁻¹ J̃ᵀ (I + s K)⁻¹ J̃ P⁻¹                      (Woodbury)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import SLICE_ENTRIES, Factors
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, accumulator, randn

TILE_ENTRIES = 2**24  # numbers of an explicit Jacobian held at once while a Gram matrix is formed (128 MB of float64)


# -- H = J̃ᵀJ̃ through the rows of J̃ ------------------------------------------------------------------------------------


class Rows(ABC):
    """J̃ [m p] with H = J̃ᵀJ̃ and m small enough for m × m algebra. ``variance`` is a scalar or [p_block] for every block."""

    m: int

    @abstractmethod
    def cross(self, factors: list[Factors], variance: list[Tensor]) -> Tensor:
        """J diag(variance) J̃ᵀ [n k, m] for the factors of new data."""

    @abstractmethod
    def gram(self, block: int, variance: Tensor) -> Tensor:
        """One block's term of J̃ diag(variance) J̃ᵀ [m m]."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """J̃ v [m s] for v [p s]."""

    @abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """J̃ᵀ u [p s] for u [m s]."""


class FactorRows(Rows):
    """J̃ = Cᵀ G with G the factors of m₀ = n·k training rows and C [m₀ m] a mixing of them (``None``: the identity)."""

    def __init__(self, blocks: list[Block], factors: list[Factors], dtype: torch.dtype, mix: Tensor | None = None) -> None:
        self.blocks, self.factors, self.dtype, self.mix = blocks, factors, dtype, mix
        self.n, self.k = factors[0].n, factors[0].k
        self.m = self.n * self.k if mix is None else mix.shape[1]

    def cross(self, factors: list[Factors], variance: list[Tensor]) -> Tensor:
        X = sum(
            tiled_gram(f.to(self.dtype), g.to(self.dtype), v) for f, g, v in zip(factors, self.factors, variance, strict=True)
        )
        return X if self.mix is None else X @ self.mix  # type: ignore[return-value]

    def gram(self, block: int, variance: Tensor) -> Tensor:
        f = self.factors[block].to(self.dtype)
        K = tiled_gram(f, f, variance)
        return K if self.mix is None else self.mix.mT @ K @ self.mix

    def matvec(self, v: Tensor) -> Tensor:
        u = sum(f.to(self.dtype).matvec(v[b.where]) for f, b in zip(self.factors, self.blocks, strict=True))
        u = u.flatten(0, 1)  # type: ignore[union-attr]
        return u if self.mix is None else self.mix.mT @ u

    def rmatvec(self, u: Tensor) -> Tensor:
        u = u if self.mix is None else self.mix @ u
        u = u.unflatten(0, (self.n, self.k))
        return torch.cat([f.to(self.dtype).rmatvec(u) for f in self.factors])


def tiled_gram(f: Factors, g: Factors, variance: Tensor) -> Tensor:
    """J diag(variance) J'ᵀ [n k, n' k'] in tiles of rows; without J where both sides are δ ⊗ a."""
    size = max(1, TILE_ENTRIES // max(1, f.k * f.p))
    same = type(f) is type(g)
    parts = [f.rows(slice(start, start + size)) for start in range(0, f.n, size)] if size < f.n else [f]
    return torch.cat([part.gram(g, variance) if same else Factors.gram(part, g, variance) for part in parts])


# -- (I + s K)⁻¹ -------------------------------------------------------------------------------------------------------


class EigenInverse:
    """M = I + U diag(t) Uᵀ (U = I for ``None``): every step of tuning a scalar prior or the noise costs m."""

    def __init__(self, t: Tensor, U: Tensor | None) -> None:
        self.weight, self.U = (1 + t).reciprocal(), U
        self.logdet = t.log1p().sum()

    def half(self, X: Tensor) -> Tensor:
        """V [... m] with V Vᵀ = X M⁻¹ Xᵀ for X [... m]."""
        return (X if self.U is None else X @ self.U) * self.weight.sqrt()

    def solve(self, u: Tensor) -> Tensor:
        """M⁻¹ u for u [m s]."""
        return self.weight[:, None] * u if self.U is None else self.U @ (self.weight[:, None] * (self.U.mT @ u))

    def root(self) -> Tensor:
        """R [m m] with R Rᵀ = M⁻¹."""
        return torch.diag(self.weight.sqrt()) if self.U is None else self.U * self.weight.sqrt()


class CholeskyInverse:
    """M = L Lᵀ."""

    def __init__(self, M: Tensor) -> None:
        self.L = safe_cholesky(M)
        self.logdet = 2 * self.L.diagonal().log().sum()

    def half(self, X: Tensor) -> Tensor:
        flat = X.reshape(-1, X.shape[-1])
        return torch.linalg.solve_triangular(self.L, flat.mT, upper=False).mT.reshape(X.shape)

    def solve(self, u: Tensor) -> Tensor:
        return torch.cholesky_solve(u, self.L)

    def root(self) -> Tensor:
        eye = torch.eye(len(self.L), dtype=self.L.dtype, device=self.L.device)
        return torch.linalg.solve_triangular(self.L, eye, upper=False).mT


class DualPrecision(Precision):
    """s J̃ᵀJ̃ + P with m × m algebra: exact, whatever p is."""

    def __init__(
        self, blocks: list[Block], rows: Rows, prior: list[Tensor], scale: Tensor, inverse: EigenInverse | CholeskyInverse
    ) -> None:
        self.blocks, self.rows, self.prior, self.scale, self.inverse = blocks, rows, prior, scale, inverse
        self.variance = [p.reciprocal() for p in prior]  # of the prior
        self.rest: Tensor | float = 0.0  # what the rows leave out of the log-determinant

    def _variances(self) -> Tensor:
        return torch.cat([v.expand(b.numel) for v, b in zip(self.variance, self.blocks, strict=True)])

    def logdet(self) -> Tensor:
        prior = sum(p.log() * b.numel if p.dim() == 0 else p.log().sum() for p, b in zip(self.prior, self.blocks, strict=True))
        return prior + self.inverse.logdet + self.rest

    def mean_variance(self, weight: Tensor) -> Tensor:
        """The prior variance averaged over the weights with ``weight`` [p]."""
        parts = [
            v * weight[b.where].sum() if v.dim() == 0 else v @ weight[b.where]
            for v, b in zip(self.variance, self.blocks, strict=True)
        ]
        return sum(parts) / weight.sum()  # type: ignore[return-value]

    def solve(self, v: Tensor) -> Tensor:
        variance = self._variances()
        w = v.reshape(-1, v.shape[-1]).to(variance) * variance
        u = self.inverse.solve(self.rows.matvec(w.mT))
        return (w - self.scale * variance * self.rows.rmatvec(u).mT).reshape(v.shape)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        # Matheron: a draw of the prior, corrected as if √s J̃ θ + ε₂ = 0 had been observed.
        variance, root = self._variances(), self.scale.sqrt()
        θ = randn((count, len(variance)), variance, generator) * variance.sqrt()
        ε2 = randn((self.rows.m, count), variance, generator)
        u = self.inverse.solve(root * self.rows.matvec(θ.mT) + ε2)
        return θ - root * variance * self.rows.rmatvec(u).mT

    def diagonal(self) -> Tensor:
        variance, R = self._variances(), self.inverse.root()
        size = max(1, 4 * SLICE_ENTRIES // len(variance))
        gain = sum(self.rows.rmatvec(part).square().sum(-1) for part in R.split(size, dim=1))
        return variance - self.scale * variance.square() * gain

    def covariance(self, factors: list[Factors]) -> Tensor:
        dtype = self.variance[0].dtype
        factors = [f.to(dtype) for f in factors]
        prior = sum(f.quadratic(v) for f, v in zip(factors, self.variance, strict=True))
        X = self.rows.cross(factors, self.variance).unflatten(0, (factors[0].n, factors[0].k))
        V = self.inverse.half(X)
        return prior - self.scale * V @ V.mT

    def joint(self, factors: list[Factors], other: list[Factors] | None = None) -> Tensor:
        dtype = self.variance[0].dtype
        factors = [f.to(dtype) for f in factors]
        other = factors if other is None else [f.to(dtype) for f in other]
        prior = sum(tiled_gram(f, g, v) for f, g, v in zip(factors, other, self.variance, strict=True))
        V = self.inverse.half(self.rows.cross(factors, self.variance))
        W = V if other is factors else self.inverse.half(self.rows.cross(other, self.variance))
        return prior - self.scale * V @ W.mT


def shared(prior: list[Tensor]) -> bool:
    """Whether all blocks have one and the same scalar precision."""
    return prior[0].dim() == 0 and all(p is prior[0] for p in prior)


class DualCurvature(Curvature):
    """H = J̃ᵀJ̃ as :class:`Rows`; the m × m matrices that outlive a change of prior are kept."""

    def __init__(self, blocks: list[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.zero = torch.zeros((), dtype=accumulator(like), device=like.device)
        self.forget()

    def forget(self) -> None:
        """Drop what was derived from the data seen so far."""
        self._rows: Rows | None = None
        self._eigen: tuple[Tensor, Tensor | None] | None = None
        self._grams: list[Tensor] | None = None

    @abstractmethod
    def make_rows(self) -> Rows:
        """J̃ of all data seen."""

    def rows(self) -> Rows:
        """J̃, made once."""
        if self._rows is None:
            self._rows = self.make_rows()
        return self._rows

    def eigen(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues of J̃J̃ᵀ (the non-zero ones of H) and their vectors [m m]."""
        rows = self.rows()  # (some leaves know the eigenvalues once the rows are made)
        if self._eigen is None:
            one = self.zero + 1
            eigenvalues, U = torch.linalg.eigh(sum(rows.gram(i, one) for i in range(len(self.blocks))))
            self._eigen = eigenvalues.clamp_min(0), U
        return self._eigen

    def spectrum(self) -> list[Spectrum]:
        eigenvalues, _ = self.eigen()
        p = self.blocks[-1].where.stop
        eigenvalues = eigenvalues.topk(min(p, len(eigenvalues))).values
        return [Spectrum(tuple(range(len(self.blocks))), eigenvalues, p - len(eigenvalues))]

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        prior = [p.to(self.zero) for p in prior] if any(p.dtype != self.zero.dtype for p in prior) else prior
        rows = self.rows()
        if not shared(prior):
            return self._by_cholesky(rows, prior, scale)
        eigenvalues, U = self.eigen()
        return DualPrecision(self.blocks, rows, prior, scale, EigenInverse(scale * eigenvalues / prior[0], U))

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        rows = self.rows()  # (some leaves know the eigenvalues once the rows are made)
        if self._eigen is not None or not shared(prior):
            return self.with_prior(prior, scale)
        return self._by_cholesky(rows, [prior[0].to(self.zero)] * len(prior), scale)

    def _by_cholesky(self, rows: Rows, prior: list[Tensor], scale: Tensor) -> Precision:
        eye = torch.eye(rows.m, dtype=self.zero.dtype, device=self.zero.device)
        return DualPrecision(self.blocks, rows, prior, scale, CholeskyInverse(eye + scale * self._weighted(rows, prior)))

    def _weighted(self, rows: Rows, prior: list[Tensor]) -> Tensor:
        """K = J̃ P⁻¹ J̃ᵀ: from the blocks' cached Gram matrices where a block has one precision, formed anew elsewhere."""
        if any(p.dim() > 0 for p in prior):
            return sum(rows.gram(i, p.reciprocal()) for i, p in enumerate(prior))  # type: ignore[return-value]
        if self._grams is None:
            self._grams = [rows.gram(i, self.zero + 1) for i in range(len(prior))]
        return sum(K / p for K, p in zip(self._grams, prior, strict=True))  # type: ignore[return-value]
