"""The dual in pieces: every process keeps the factors of its own data, and K = J̃ P⁻¹ J̃ᵀ is worked out by rows.

    K = [K_1; K_2; …],  K_r = J̃_r P⁻¹ J̃ᵀ on process r      J̃ v = [J̃_1 v; J̃_2 v; …]      J̃ᵀu = Σ_r J̃_rᵀ u_r

K itself, [m m] with m = data × outputs, is small beside the factors, and stands on every process. All here is collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.dual import FactorRows, Rows, tiled_gram
from bayesgn.ggn.factors import Factors, Masked
from bayesgn.ggn.keeping import Kept

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedRows(Rows):
    """J̃ [m p] of which this process holds some rows."""

    def __init__(self, blocks: list[Block], kept: Kept, like: Tensor, group: ProcessGroup) -> None:
        self.blocks, self.kept, self.like, self.group = blocks, kept, like, group
        self.own = FactorRows(blocks, kept.settle(), like.dtype) if kept.seen else None  # None: a process without data
        self.sizes = _distributed.gather(self.own.m if self.own else 0, group)
        self.m = sum(self.sizes)
        if self.m == 0:
            raise ValueError("the dual (ggn.Gram) holds no data on any process; condition it on some first.")
        start = sum(self.sizes[: _distributed.rank(group)])
        self.here = slice(start, start + self.sizes[_distributed.rank(group)])

    def cross(self, factors: list[Factors], variance: list[Tensor]) -> Tensor:
        if any(t.requires_grad for f in factors for t in _tensors(f)):
            raise ValueError("structure=ggn.Gram(sharded=True) gives no gradients in x; use ggn.Gram(), which keeps all factors on every process.")
        variance = [_replicated(v, self.group) for v in variance]
        X = self.own.cross(factors, variance) if self.own else _nothing(variance).expand(factors[0].n * factors[0].k, 0)
        return _Joined.apply(X.mT, self).mT

    def gram(self, block: int, variance: Tensor) -> Tensor:
        # The factors of one block travel at a time.
        variance, own = _replicated(variance, self.group), None if self.own is None else self.own.factors[block].to(self.own.dtype)
        everyone = self.kept.of_all(block, self.group, self.blocks[block], self.like)
        if own is None:
            rows = _nothing(variance).expand(0, self.m)
        else:
            rows = torch.cat([tiled_gram(own, f.to(own.dtype), variance) for f in everyone], dim=1)
        return _Joined.apply(rows, self)

    def matvec(self, v: Tensor) -> Tensor:
        return _Product.apply(v, self, False)

    def rmatvec(self, u: Tensor) -> Tensor:
        return _Product.apply(u, self, True)


class _Product(torch.autograd.Function):
    """J̃ v or J̃ᵀu on every process; each is the other's derivative."""

    @staticmethod
    def forward(ctx, v: Tensor, rows: ShardedRows, transpose: bool) -> Tensor:
        ctx.rows, ctx.transpose = rows, transpose
        own = rows.own
        if transpose:
            mine = own.rmatvec(v[rows.here]) if own else v.new_zeros(rows.blocks[-1].where.stop, v.shape[1])
            return _distributed.all_sum([mine], rows.group)[0]
        mine = own.matvec(v) if own else v.new_zeros(0, v.shape[1])
        _distributed.check(rows.group)
        return _distributed.join_rows(mine, rows.sizes, rows.group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _Product.apply(grad, ctx.rows, not ctx.transpose), None, None


class _Joined(torch.autograd.Function):
    """The pieces of all processes, one below the other. All processes do the same with the whole, so each takes its own piece of the gradient."""

    @staticmethod
    def forward(ctx, piece: Tensor, rows: ShardedRows) -> Tensor:
        ctx.here = rows.here
        _distributed.check(rows.group)
        return _distributed.join_rows(piece, rows.sizes, rows.group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[ctx.here], None


class _Replicated(torch.autograd.Function):
    """What all processes hold alike and each uses for its own piece: the gradients of the pieces add up."""

    @staticmethod
    def forward(ctx, v: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return v.view_as(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _distributed.all_sum([grad], ctx.group)[0], None


def _replicated(v: Tensor, group: ProcessGroup) -> Tensor:
    return _Replicated.apply(v, group) if v.requires_grad and torch.is_grad_enabled() else v


def _nothing(variance: Tensor | list[Tensor]) -> Tensor:
    """A 0 [1 1] with a graph to the variances, so that a process without data takes part in their gradients."""
    parts = variance if isinstance(variance, list) else [variance]
    return sum((0 * v.sum() for v in parts), torch.zeros_like(parts[0].sum())).reshape(1, 1)


def _tensors(f: Factors) -> list[Tensor]:
    return _tensors(f.inner) if isinstance(f, Masked) else [t for t in vars(f).values() if isinstance(t, Tensor)]
