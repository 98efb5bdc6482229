"""The batches of one step on their way into a curvature: linearised at the present weights, with their loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.ggn.evaluation import at_rest, call, per_datum
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.held import columns
from bayesgn.ggn.keeping import compressed
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.structure import accumulator
from bayesgn.rules.curvatures import Curvature


class Batches:
    """One stream for :meth:`bayesgn.ggn.Curvature.fit`; the first walk notes loss and gradient, in one backward pass with the curvature.

    Args:
        linearizer, likelihood, curvature: J, p(y|f) and Λ.
        data: batches (x, y); y is None where the gradient comes from elsewhere.
        seed: (number, device) of the random draws, the same at every walk; None for a curvature that draws none.
        ranked: whether ``columns`` counts only those that are independent (softmax: c − 1 of c).

    Attributes:
        loss: Σ −log p(y|f) over all rows.
        noise: Σ |∂loss/∂f · f|, by which (times epsilon) the loss is uncertain.
        gradient: its gradient [p].
        count: rows seen (data × positions) that have a target.
        columns: columns of J̃ᵀ seen.
        most: columns of factors that H asks for at most, where these are fewer than Λ has.
    """

    def __init__(
        self, linearizer: Linearizer, likelihood, curvature: Curvature, data: Iterable, seed: tuple[int, torch.device] | None, ranked: bool = False
    ) -> None:
        self.linearizer, self.likelihood, self.curvature, self.data, self.seed = linearizer, likelihood, curvature, data, seed
        like = next(iter(linearizer.vector.tensors(linearizer.net).values()))
        self.like = torch.zeros((), dtype=accumulator(like), device=like.device)
        self.loss, self.noise, self.gradient = self.like.clone(), self.like.clone(), self.like.new_zeros(linearizer.vector.numel)
        self.count = self.columns = self.walks = 0
        self.ranked = ranked
        self.most: int | None = None

    def __iter__(self) -> Iterator[tuple[Linearization, Tensor]]:
        first, self.walks = self.walks == 0, self.walks + 1
        generator = None if self.seed is None else torch.Generator(self.seed[1]).manual_seed(self.seed[0])
        for x, y in self.data:
            _data.check_finite(x, "x")
            self.linearizer.prepare(x, self.likelihood.rows)
            k = self.curvature.columns(self.linearizer.r)
            size = self.linearizer.chunk((k if self.most is None else min(k, self.most)) + 1)
            for start, part in _data.split(x, size):
                lin = self.linearizer(part, self.likelihood.rows)
                f = lin.output
                target = None if y is None else _data.to(y[start : start + lin.n], f.device)
                if target is not None:
                    self.likelihood.validate(f, target)
                with torch.no_grad():
                    S = self.curvature.root(self.likelihood, f, target, generator)  # type: ignore[arg-type]
                    slope = None if target is None else -self.likelihood.gradient(f, target)
                    if first:
                        self._sum(f, target, S, slope)
                noted = _Noted(lin, None if slope is None else slope.reshape(lin.n, lin.r), self._note if first else None)
                yield noted, S
                noted.settle()

    def _sum(self, f: Tensor, y: Tensor | None, S: Tensor, slope: Tensor | None) -> None:
        self.count += rows_of(self.likelihood, f, y)
        self.columns += S.shape[0] * (compressed(S) if self.ranked else S).shape[-1]
        if y is not None and slope is not None:
            self.loss -= self.likelihood.log_prob(f.to(self.loss), y).sum()
            self.noise += (slope * f).abs().sum().to(self.loss)

    def _note(self, gradient: Tensor) -> None:
        self.gradient += gradient


class _Noted(Linearization):
    """A linearization whose factors bring the gradient along, as one more column.

    Attributes:
        slope: ∂(−log p)/∂f [n r], or None.
    """

    def __init__(self, lin: Linearization, slope: Tensor | None, note: Callable[[Tensor], None] | None) -> None:
        self.slope = slope
        self.watch: Callable[[list[Factors]], None] | None = None  # is shown the factors

        self._unnoted = slope is not None and note is not None

        def pull(S: Tensor) -> list[Factors]:
            found = gather(S)
            if self.watch is not None:
                self.watch(found)
            return found

        def gather(S: Tensor) -> list[Factors]:
            if slope is None or note is None:
                return lin.factors(S)
            k, self._unnoted = S.shape[-1], False
            found = lin.factors(torch.cat([S, slope.to(S)[..., None]], dim=-1))
            one = S.new_ones(lin.n, 1, 1)
            with torch.no_grad():
                note(torch.cat([columns(f, slice(k, k + 1)).rmatvec(one.to(f.dtype))[:, 0] for f in found]))
                return [columns(f, slice(0, k)) for f in found]

        super().__init__(lin.output, lin.blocks, pull, lin.source)

    def settle(self) -> None:
        """Note the gradient also where the structure asked for no factors (one that keeps some of the data)."""
        if self._unnoted:
            self.watch = None
            self.factors(self.output.new_zeros(self.n, self.r, 0))


def rows_of(likelihood, f: Tensor, y: Tensor | None) -> int:
    """Rows over which a mean loss is taken: missing ones do not count (all do, where no target is known)."""
    return f.shape[:-1].numel() if y is None else int(likelihood.observed(f, y).sum())


def loss_at(linearizer: Linearizer, likelihood, data: Iterable, weights: Mapping[str, Tensor] | None, like: Tensor) -> tuple[Tensor, int]:
    """Σ −log p(y|f) at other ``weights`` (the net's own for None), and the rows it is over; the net is not touched."""
    total, count = torch.zeros_like(like), 0
    with at_rest(linearizer.net, {}), torch.no_grad():
        for x, y in data:
            x = linearizer.place(x)
            f = per_datum(likelihood.rows(call(linearizer.net, x, weights)), _data.len_of(x))
            y = y.to(f.device)
            total -= likelihood.log_prob(f.to(like), y).sum()
            count += rows_of(likelihood, f, y)
    return total, count


def captured(net: torch.nn.Module, closure: Callable[[], Any], seen: list[Any]) -> Any:
    """What ``closure`` returns; the inputs of its calls of ``net`` are added to ``seen``."""

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # a metric beside the loss
        if args and kwargs:
            raise TypeError(f"the closure called {type(module).__name__} with positional and keyword arguments; use one kind, or step(x, y).")
        x = kwargs if kwargs else args[0] if len(args) == 1 else args
        seen.append(_data.apply(x, torch.Tensor.detach))

    handle = net.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.enable_grad():
            return closure()
    finally:
        handle.remove()
