"""Compact factors of Jᵀ S for one block of weights: what the structures are written against.

For a Linear layer the Jacobian of one datum is an outer product, J = δ ⊗ a, summed over the positions t that share the
weights. Keeping a and δ instead of J makes Kron, Diag and Gram cost what a few gradients cost; J itself is formed only
where its own size is asked for, in slices of data that stay below ``SLICE_ENTRIES`` numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn.ggn import pairs

if TYPE_CHECKING:
    from typing_extensions import Self

SLICE_ENTRIES = 2**21  # 16 MB of float64: J of a slice fits in cache and memory stays flat


class Factors(ABC):
    """Jᵀ S of one block: n data, k columns, p weights. ``variance`` is a scalar tensor or [p], a diagonal of Σ."""

    n: int
    k: int
    p: int
    dtype: torch.dtype

    @abstractmethod
    def jacobian(self) -> Tensor:
        """The explicit (S-weighted) Jacobian [n k p], in the block's own weight order."""

    @abstractmethod
    def rows(self, part: slice) -> Self:
        """The same factors for a slice of the data."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype."""

    def without_missing(self, missing: Tensor) -> Self:
        """The same, knowing which data [n] have a missing target: it must not enter an average either."""
        return self

    @abstractmethod
    def with_uses(self, others: list[Self]) -> Self:
        """The factors of a module that the net calls several times, from those of each call: J is their sum."""

    def slices(self) -> Iterator[Self]:
        """Pieces of the data whose explicit Jacobian stays small."""
        size = max(1, SLICE_ENTRIES // max(1, self.k * self.p))
        if size >= self.n:
            yield self
            return
        for start in range(0, self.n, size):
            yield self.rows(slice(start, start + size))

    def square(self) -> Tensor:
        """Σ_n Σ_k J² [p], the diagonal of the GGN."""
        return sum(part.jacobian().square().sum((0, 1)) for part in self.slices())  # type: ignore[return-value]

    def full(self) -> Tensor:
        """Σ_n JᵀJ [p p]."""
        out = 0.0
        for part in self.slices():
            J = part.jacobian().flatten(0, 1)
            out = out + J.mT @ J
        return out  # type: ignore[return-value]

    def quadratic(self, variance: Tensor) -> Tensor:
        """J diag(variance) Jᵀ of each datum [n k k]."""
        out = []
        for part in self.slices():
            J = part.jacobian()
            out.append((J * variance) @ J.mT)
        return torch.cat(out)

    def gram(self, other: Factors, variance: Tensor) -> Tensor:
        """J diag(variance) J'ᵀ between all data of two sets [n k, n' k']."""
        J = torch.cat([(part.jacobian() * variance).flatten(0, 1) for part in self.slices()])
        return torch.cat([J @ part.jacobian().flatten(0, 1).mT for part in other.slices()], dim=1)

    def matvec(self, v: Tensor) -> Tensor:
        """J v for v [p s]: [n k s]."""
        return torch.cat([part.jacobian() @ v for part in self.slices()])

    def rmatvec(self, u: Tensor) -> Tensor:
        """Σ_n Jᵀ u for u [n k s]: [p s]."""
        out, start = 0.0, 0
        for part in self.slices():
            J = part.jacobian()
            out = out + J.flatten(0, 1).mT @ u[start : start + part.n].flatten(0, 1)
            start += part.n
        return out  # type: ignore[return-value]


def flatten_weights(M: Tensor, both: bool) -> Tensor:
    """[... g o i] -> [... p] in the net's order; with ``both`` the last input column is the bias, put at the end."""
    if both:
        return torch.cat([M[..., :-1].flatten(-3), M[..., -1].flatten(-2)], dim=-1)
    return M.flatten(-3)


def unflatten_weights(v: Tensor, g: int, o: int, i: int, both: bool) -> Tensor:
    """The inverse of :func:`flatten_weights`."""
    if both:
        W = v[..., : g * o * (i - 1)].unflatten(-1, (g, o, i - 1))
        return torch.cat([W, v[..., g * o * (i - 1) :].unflatten(-1, (g, o, 1))], dim=-1)
    return v.unflatten(-1, (g, o, i))


@dataclass
class Dense(Factors):
    """An explicit Jacobian: norms, recurrent cells, attention, raw and tied parameters."""

    J: Tensor  # [n k p]

    def __post_init__(self) -> None:
        self.n, self.k, self.p = self.J.shape
        self.dtype = self.J.dtype

    def jacobian(self) -> Tensor:
        return self.J

    def with_uses(self, others: list[Dense]) -> Dense:
        return Dense(torch.stack([self.J, *(f.J for f in others)]).sum(0))

    def rows(self, part: slice) -> Dense:
        return Dense(self.J[part])

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.J.to(dtype))


@dataclass
class Linear(Factors):
    """J = Σ_t δ_t ⊗ a_t in g groups: weights [g o i], the bias as the last input column (a ≡ 1).

    Attributes:
        a: inputs [n g t i].
        δ: Jᵀ S at the layer's output [n g t k o].
        weight, bias: whether the block holds the weight and the bias.
        counted: which rows a Kronecker factor averages over [n t]: all (``None``), or all but those of missing targets.
    """

    a: Tensor
    δ: Tensor
    weight: bool = True
    bias: bool = False
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        self.n, self.g, self.t, self.k, self.o = self.δ.shape
        self.i = self.a.shape[-1]
        self.p = self.g * self.o * self.i
        self.dtype = self.δ.dtype

    # The block's own order is that of the net's parameters: weight [g o i'] flattened, then bias [g o].
    def flatten(self, M: Tensor) -> Tensor:
        """[... g o i] -> [... p]: the homogeneous column becomes the bias at the end."""
        return flatten_weights(M, self.weight and self.bias)

    def unflatten(self, v: Tensor) -> Tensor:
        """[... p] -> [... g o i], the inverse of :meth:`flatten`."""
        return unflatten_weights(v, self.g, self.o, self.i, self.weight and self.bias)

    # δ comes from a backward pass of each column, laid out [k n g o t] (a convolution) or [k n t o] (a Linear layer); it is
    # only ever viewed as [n g t k o]. Copying it into that order would cost as much as everything else together.
    def _outer(self) -> Tensor:
        """J [n k g o i]: a product over the shared positions for each column."""
        if self.t == 1:
            return self.δ[:, :, 0].transpose(1, 2)[..., None] * self.a[:, None, :, 0, None]
        columns = [self.δ[:, :, :, k].mT @ self.a for k in range(self.k)]
        return torch.stack(columns, dim=1)

    def jacobian(self) -> Tensor:
        return self.flatten(self._outer())

    @property
    def paired(self) -> bool:
        """Whether sums over pairs (:mod:`bayesgn.ggn.pairs`) are cheaper than J: no shared positions, and several columns."""
        return self.t == 1 and self.g == 1 and self.k > 2

    def full(self) -> Tensor:
        if not self.paired:
            return super().full()
        return self._both(pairs.within(self.a[:, 0, 0], self.δ[:, 0, 0]), self)

    def across(self, other: Linear) -> Tensor:
        """Σ_n JᵀJ' [p p'] with another layer's factors, where both are paired."""
        return self._both(pairs.across(self.a[:, 0, 0], self.δ[:, 0, 0], other.a[:, 0, 0], other.δ[:, 0, 0]), other)

    def _both(self, M: Tensor, other: Linear) -> Tensor:
        """[o i o' i'] -> [p p']."""
        half = other.flatten(M.unsqueeze(2))  # [o i p']
        return self.flatten(half.permute(2, 0, 1).unsqueeze(1)).mT

    def with_uses(self, others: list[Linear]) -> Linear:
        # Uses are shared positions.
        a, δ = torch.cat([self.a, *(f.a for f in others)], 2), torch.cat([self.δ, *(f.δ for f in others)], 2)
        return replace(self, a=a, δ=δ)

    def without_missing(self, missing: Tensor) -> Linear:
        return replace(self, counted=_counted(missing, (self.δ != 0).any(-1).any(-1).any(1)))

    def rows(self, part: slice) -> Linear:
        counted = None if self.counted is None else self.counted[part]
        return replace(self, a=self.a[part], δ=self.δ[part], counted=counted)

    def to(self, dtype: torch.dtype) -> Linear:
        return replace(self, a=self.a.to(dtype), δ=self.δ.to(dtype))

    def rotate(self, Q_a: Tensor | None, Q_b: Tensor | None) -> Linear:
        """The factors in rotated coordinates: a Q_a [g i i'], δ Q_b [g o o']."""
        a = self.a if Q_a is None else _times(self.a, Q_a)
        δ = self.δ
        if Q_b is not None:
            δ = _times(δ.permute(3, 0, 1, 2, 4).flatten(0, 1), Q_b).unflatten(0, (self.k, self.n)).permute(1, 2, 3, 0, 4)
        return replace(self, a=a, δ=δ)

    def kron(self, reduce: bool) -> tuple[Tensor, Tensor, float]:
        """Σ aaᵀ [g i i], Σ δδᵀ [g o o] and the count of rows summed, so that H ≈ A ⊗ B / count.

        ``expand`` counts every shared position as a datum; ``reduce`` averages a and sums δ over them first
        (Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural network architectures").
        """
        a, δ = self.a, self.δ
        count = float(self.n if reduce else self.n * self.t)
        if self.counted is not None:
            weight = self.counted.to(a)
            a = a * weight[:, None, :, None]
            count = float((weight.sum(1).clamp_max(1) if reduce else weight).sum())
        if reduce and self.t > 1:
            positions = self.t if self.counted is None else weight.sum(1).clamp_min(1)[:, None, None, None]
            a, δ = a.sum(2, keepdim=True) / positions, δ.sum(2, keepdim=True)
        return _second_moment(a), _second_moment(δ.permute(3, 0, 1, 2, 4).flatten(0, 1)), count

    def square(self) -> Tensor:
        if self.t > 1:
            return self.flatten(sum(part._square_sum() for part in self.slices()))  # type: ignore[arg-type]
        # t = 1: (δ ⊗ a)² = δ² ⊗ a², a product of two small matrices.
        δ2 = self.δ[:, :, 0].square().sum(2).permute(1, 2, 0)  # [g o n]
        return self.flatten(δ2 @ self.a[:, :, 0].square().transpose(0, 1))

    def _square_sum(self) -> Tensor:
        """Σ_n Σ_k J² [g o i], column by column."""
        total = 0.0
        for k in range(self.k):
            total = total + (self.δ[:, :, :, k].mT @ self.a).square_().sum(0)
        return total  # type: ignore[return-value]

    def quadratic(self, variance: Tensor) -> Tensor:
        if variance.dim() == 0:
            return self._quadratic_scalar() * variance
        V = self.unflatten(variance)
        if self.t > 1:
            out = []
            for part in self.slices():
                J = part._outer().mul(V.sqrt()).flatten(2)  # [n k p]
                out.append(J @ J.mT)
            return torch.cat(out)
        # t = 1: cov = δ diag(w) δᵀ with w_o = Σ_i a_i² V_oi: no J.
        w = (self.a.square() @ V.mT)[:, :, 0]  # [n g o]
        δ = self.δ[:, :, 0].transpose(1, 2)  # [n k g o]
        return (δ * w[:, None]).flatten(2) @ δ.flatten(2).mT

    def _quadratic_scalar(self) -> Tensor:
        if self.t == 1:
            a2 = self.a.square().sum(-1)[:, :, 0]  # [n g]
            δ = self.δ[:, :, 0]
            return torch.einsum("ng,ngko,nglo->nkl", a2, δ, δ)
        out = []
        for part in self.slices():
            J = part._outer().flatten(2)
            out.append(J @ J.mT)
        return torch.cat(out)

    def gram(self, other: Factors, variance: Tensor) -> Tensor:
        assert isinstance(other, Linear)
        if self.t > 1 or other.t > 1:
            return super().gram(other, variance)
        if variance.dim() > 0:
            return self._gram_weighted(other, self.unflatten(variance))
        # (A Aᵀ) ∘ (Δ Δᵀ), summed over groups.
        out = 0.0
        for g in range(self.g):
            AA = self.a[:, g, 0] @ other.a[:, g, 0].mT  # [n n']
            δ, δ_ = self.δ[:, g, 0].flatten(0, 1), other.δ[:, g, 0].flatten(0, 1)
            DD = (δ @ δ_.mT).view(self.n, self.k, other.n, other.k)
            out = out + DD * AA[:, None, :, None]
        return (out * variance).reshape(self.n * self.k, other.n * other.k)  # type: ignore[union-attr]

    def _gram_weighted(self, other: Linear, V: Tensor) -> Tensor:
        """t = 1: Σ_o δ_o δ'_o w_o with w_o = Σ_i a_i V_oi a'_i for each pair of data; a slice of data at a time, no J."""
        size, out = max(1, SLICE_ENTRIES // (other.n * self.k * self.g * self.o)), []
        δ_ = other.δ[:, :, 0].transpose(1, 2).flatten(2).mT  # [m (g o) l]
        for start in range(0, self.n, size):
            a, δ = self.a[start : start + size, :, 0], self.δ[start : start + size, :, 0].transpose(1, 2).flatten(2)
            w = torch.stack([(a[:, g, None] * V[g]) @ other.a[:, g, 0].mT for g in range(self.g)], dim=1)  # [n g o m]
            pairs = (δ[:, None] * w.flatten(1, 2).mT[:, :, None]) @ δ_  # [n m k l]
            out.append(pairs.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(out)

    def matvec(self, v: Tensor) -> Tensor:
        # V a for all data and columns in one product, then δᵀ(V a): J is not formed.
        V = self.unflatten(v.mT).transpose(0, 1).flatten(1, 2)  # [g (s o) i]
        Va = (self.a.transpose(0, 1).flatten(1, 2) @ V.mT).view(self.g, self.n, self.t, v.shape[1], self.o)
        return (self.δ.transpose(0, 1) @ Va.mT).sum((0, 2))

    def rmatvec(self, u: Tensor) -> Tensor:
        δu = u.mT[:, None, None] @ self.δ  # [n g t s o]
        δu = δu.transpose(0, 1).reshape(self.g, self.n * self.t, -1)
        V = δu.mT @ self.a.transpose(0, 1).flatten(1, 2)  # [g (s o) i]
        return self.flatten(V.unflatten(1, (u.shape[2], self.o)).transpose(0, 1)).mT


def _counted(missing: Tensor, touched: Tensor) -> Tensor:
    """Rows [n t] that count: all of a datum without missing targets [n], elsewhere those that some present target depends on."""
    return touched | ~missing[:, None]


def _second_moment(x: Tensor) -> Tensor:
    """Σ x xᵀ [g c c] over the first and third dimension of x [b g t c]."""
    if x.shape[2] >= x.shape[3]:  # many positions: a product for each b, whatever the memory order within it
        return (x.mT @ x).sum(0)
    x = x.transpose(0, 1).flatten(1, 2)
    return x.mT @ x


def _times(x: Tensor, Q: Tensor) -> Tensor:
    """x [b g t c] @ Q [g c c'], as one product for each group."""
    b, g, t, _ = x.shape
    return (x.transpose(0, 1).reshape(g, b * t, -1) @ Q).view(g, b, t, -1).transpose(0, 1)


@dataclass
class Embedding(Factors):
    """J = Σ_t δ_t ⊗ onehot(ids_t): a Linear layer whose input is an index; weights [vocabulary, o]."""

    ids: Tensor  # [n t]
    δ: Tensor  # [n t k o]
    vocabulary: int
    counted: Tensor | None = None  # as in Linear

    def __post_init__(self) -> None:
        self.n, self.t, self.k, self.o = self.δ.shape
        self.p = self.vocabulary * self.o
        self.dtype = self.δ.dtype

    def jacobian(self) -> Tensor:
        J = self.δ.new_zeros(self.n, self.vocabulary, self.k, self.o)
        J = J.scatter_add(1, self.ids[:, :, None, None].expand_as(self.δ), self.δ)
        return J.transpose(1, 2).flatten(2)

    def without_missing(self, missing: Tensor) -> Embedding:
        return replace(self, counted=_counted(missing, (self.δ != 0).any(-1).any(-1)))

    def with_uses(self, others: list[Embedding]) -> Embedding:
        ids, δ = torch.cat([self.ids, *(f.ids for f in others)], 1), torch.cat([self.δ, *(f.δ for f in others)], 1)
        return replace(self, ids=ids, δ=δ)

    def rows(self, part: slice) -> Embedding:
        counted = None if self.counted is None else self.counted[part]
        return replace(self, ids=self.ids[part], δ=self.δ[part], counted=counted)

    def to(self, dtype: torch.dtype) -> Embedding:
        return replace(self, δ=self.δ.to(dtype))

    def rotate(self, Q_a: Tensor | None, Q_b: Tensor | None) -> Embedding:
        """The factors with δ rotated by Q_b [o o']; the input side stays an index."""
        if Q_a is not None:
            raise ValueError("an embedding's input factor is diagonal already; pass Q_a=None.")
        return self if Q_b is None else replace(self, δ=self.δ @ Q_b.reshape(Q_b.shape[-2:]))

    def kron(self, reduce: bool) -> tuple[Tensor, Tensor, float]:
        """Counts of each index [vocabulary] (A is diagonal), Σ δδᵀ [o o], and the count of rows."""
        rows = self.ids.new_ones(self.ids.shape, dtype=torch.bool) if self.counted is None else self.counted
        counts = torch.bincount(self.ids[rows], minlength=self.vocabulary).to(self.δ)
        δ = self.δ.flatten(0, 2)
        return counts, δ.mT @ δ, float(rows.sum())

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Repeated indices of one datum summed: datum [u], id [u], δ [u k o]."""
        where = torch.arange(self.n, device=self.ids.device)[:, None]
        unique, inverse = torch.unique(where * self.vocabulary + self.ids, return_inverse=True)
        merged = self.δ.new_zeros(len(unique), self.k, self.o).index_add(0, inverse.reshape(-1), self.δ.flatten(0, 1))
        return unique // self.vocabulary, unique % self.vocabulary, merged

    def matvec(self, v: Tensor) -> Tensor:
        return (self.δ @ v.view(self.vocabulary, self.o, -1)[self.ids]).sum(1)

    def rmatvec(self, u: Tensor) -> Tensor:
        δu = (self.δ.mT @ u[:, None]).flatten(0, 1)  # [(n t) o s]
        out = δu.new_zeros(self.vocabulary, *δu.shape[1:]).index_add(0, self.ids.reshape(-1), δu)
        return out.flatten(0, 1)

    def gram(self, other: Factors, variance: Tensor) -> Tensor:
        if not isinstance(other, Embedding):
            return super().gram(other, variance)
        # J over the indices that occur, not over the vocabulary.
        used = torch.unique(torch.cat([self.ids.reshape(-1), other.ids.reshape(-1)]))
        V = variance if variance.dim() == 0 else variance.view(self.vocabulary, self.o)[used].reshape(-1)
        f, g = (
            replace(e, ids=torch.searchsorted(used, e.ids.contiguous()), vocabulary=len(used)) for e in (self, other)
        )
        return Factors.gram(f, g, V)

    def square(self) -> Tensor:
        _, ids, δ = self._merged()
        return self.δ.new_zeros(self.vocabulary, self.o).index_add(0, ids, δ.square().sum(1)).flatten()

    def quadratic(self, variance: Tensor) -> Tensor:
        datum, ids, δ = self._merged()
        V = variance if variance.dim() == 0 else variance.view(self.vocabulary, self.o)[ids][:, None]
        return self.δ.new_zeros(self.n, self.k, self.k).index_add(0, datum, (δ * V) @ δ.mT)


@dataclass
class Masked(Factors):
    """Selected entries of another block's weights."""

    inner: Factors
    index: Tensor  # positions within the inner block's weight order

    def __post_init__(self) -> None:
        self.n, self.k, self.p = self.inner.n, self.inner.k, len(self.index)
        self.dtype = self.inner.dtype

    def jacobian(self) -> Tensor:
        return self.inner.jacobian()[..., self.index]

    def slices(self) -> Iterator[Masked]:
        for part in self.inner.slices():
            yield Masked(part, self.index)

    def with_uses(self, others: list[Masked]) -> Masked:
        return Masked(self.inner.with_uses([f.inner for f in others]), self.index)

    def rows(self, part: slice) -> Masked:
        return Masked(self.inner.rows(part), self.index)

    def to(self, dtype: torch.dtype) -> Masked:
        return Masked(self.inner.to(dtype), self.index)

    def square(self) -> Tensor:
        return self.inner.square()[self.index]
