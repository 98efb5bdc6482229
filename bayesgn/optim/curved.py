"""The quadratic of a network's loss on the batches of one step, its H in any structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn import Curvature
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.keeping import compact
from bayesgn.ggn.products import FactorProducts
from bayesgn.optim.batches import Batches
from bayesgn.optim.quadratic import Quadratic
from bayesgn.optim.scaling import Scaling


class Curved(Quadratic):
    """H = 1/N Σ JᵀΛJ + diag(decay), kept in a structure.

    Args:
        curvature: an empty H.
        p: weights.
        products: whether H v will be asked for (the factors of the batches are then kept).
        diagonal: whether diag(H) will.
    """

    def __init__(self, curvature: Curvature, p: int, products: bool, diagonal: bool) -> None:
        self.held_in, self.p, self.keep, self.measure = curvature, p, products, diagonal
        self.products: list[FactorProducts] = []
        self.diagonal: Tensor | None = None
        self.columns, self.group = 0, None

    def fit(self, batches: Batches) -> None:
        """Add the batches; loss and gradient are theirs to note."""
        self.held_in.fit(_Watched(batches, self))
        self.columns += batches.columns
        if self.held_in.partial:
            raise ValueError(
                f"{type(self.held_in).__name__} keeps H of fewer data than the loss is of, and the two would not fit; hand the step fewer "
                "data, or take ggn.Gram(), ggn.Gram(inducing=…) or ggn.LowRank."
            )

    def note(self, factors: list[Factors]) -> None:
        """Keep what will be asked for of one chunk's factors."""
        dtype = torch.float64 if factors[0].dtype == torch.float64 else torch.float32
        if self.keep and not self.held_in.multiplies:
            self.products.append(FactorProducts(self.held_in.blocks, [compact(f) for f in factors], dtype))
        if self.measure:
            square = torch.cat([f.to(dtype).square() for f in factors])
            self.diagonal = square if self.diagonal is None else self.diagonal + square

    def join(self, group: Any) -> None:
        """H of the data of all processes, on each."""
        self.group = group
        if group is None:
            return
        self.held_in.all_reduce(group)
        columns = torch.tensor(float(self.columns), dtype=torch.float64)
        self.columns = int(_distributed.all_sum([columns], group)[0])
        if self.measure:
            none = self.held_in.blocks and self.diagonal is None
            own = torch.zeros(self.p, dtype=torch.float64) if none else self.diagonal
            self.diagonal = _distributed.all_sum([own], group)[0]  # type: ignore[list-item]

    def settle(self, gradient: Tensor, decay: Tensor, count: int, scaling: Scaling | None, last: Tensor | None) -> None:
        """All data are in: the gradient of the mean loss [p], weight decay [p], rows, D, and a guess at the step [p]."""
        self.gradient, self.decay, self.count, self.guess = gradient, decay, count, last
        self.scale = 1.0 / (gradient.new_zeros(()) + count)
        self.even = not bool((decay != decay[0]).any())
        self.scaling = None if scaling is None or self.diagonal is None else scaling(self.scale * self.diagonal.to(gradient) + decay)

    def _prior(self, damping: float) -> list[Tensor]:
        blocks = self.held_in.blocks
        if self.even and self.scaling is None:
            return [self.decay[0] + damping] * len(blocks)  # one and the same tensor: a scalar prior
        P = self.decay + damping * (1.0 if self.scaling is None else self.scaling)
        parts = [P[b.where] for b in blocks]
        if self.scaling is not None:
            return parts
        return [part[0] if bool((part == part[0]).all()) else part for part in parts]  # one number for a block, where that is all

    def solve(self, damping: float) -> Tensor:
        precision = self.held_in.solver(self._prior(damping), self.scale)
        δ = precision.solve_from(-self.gradient, torch.zeros_like(self.gradient) if self.guess is None else self.guess)
        self.guess = δ
        return δ

    def solved(self, δ: Tensor, damping: float) -> float:
        return self.curvature(δ) if self.held_in.multiplies else super().solved(δ, damping)  # (conjugate gradients may stop early)

    def curvature(self, δ: Tensor) -> float:
        decay = float((self.decay * δ.square()).sum())
        product = self.held_in.times(δ[:, None], self.scale)
        if product is not None:
            return float(δ @ product[:, 0]) + decay
        if not self.keep:
            raise RuntimeError("H v was not foreseen for this step; a damping or momentum that asks for it says so by `products = True`.")
        total = torch.zeros_like(self.scale)
        for batch in self.products:
            total += batch.matvec(δ[:, None].to(batch.dtype)).square().sum().to(total)
        return float(self.scale * _distributed.all_sum([total], self.group)[0]) + decay

    def smallest_eigenvalue(self) -> float:
        spectrum = self.held_in.spectrum()
        if spectrum is None:
            raise ValueError(f"{type(self.held_in).__name__} keeps no eigenvalues; use structure=ggn.Gram (more weights than data), ggn.Full "
                             "or ggn.Layerwise.")  # fmt: skip
        # Of each independent part the smallest that its data can make: no more than rows of J̃ are other than 0.
        smallest = [part.eigenvalues.reshape(-1).topk(min(part.eigenvalues.numel(), self.columns)).values[-1] for part in spectrum]
        return float(self.scale * torch.stack(smallest).min())


class _Watched:
    """A stream whose factors are shown to the quadratic on the first walk."""

    def __init__(self, batches: Batches, curved: Curved) -> None:
        self.batches, self.curved = batches, curved

    def __iter__(self):
        first = self.batches.walks == 0
        for lin, S in self.batches:
            if first and (self.curved.keep or self.curved.measure):
                lin.watch = self.curved.note  # type: ignore[attr-defined]
            yield lin, S
