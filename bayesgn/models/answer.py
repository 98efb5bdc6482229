"""What a posterior still owes after it was called: the covariance, worked out when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn._psd import safe_cholesky
from bayesgn.ggn.evaluation import at_rest, call
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.marginals import moved, row_blocks
from bayesgn.ggn.structure import Precision, accumulator, randn, working


class Answer:
    """The mean and covariance of one call of a posterior; the covariance is worked out when asked for.

    Args:
        linearizer, rows: of the net, and of the likelihood that reads its output.
        settled: Σ⁻¹, with hyper-parameters as they are at the call.
        x: the inputs of the call.
        check_fresh: raises where the net is no longer that of the call.
        shift: θ̄ − θ* [p] at the call; None for zero.
    """

    def __init__(
        self,
        linearizer: Linearizer,
        rows: Callable[[Tensor], Tensor],
        settled: Precision,
        x: Any,
        check_fresh: Callable[[], None],
        shift: Tensor | None = None,
    ) -> None:
        self.linearizer, self.rows, self.settled, self.x, self.check_fresh = linearizer, rows, settled, x, check_fresh
        self.shift = shift
        self.differentiable = any(t.requires_grad for t in _data.tensors(x)) and torch.is_grad_enabled()
        self._written = [(t, t._version) for t in _data.tensors(x) if not t.is_inference()]
        self._mean: Tensor | None = None
        self._blocks: Tensor | None = None
        self._dense: Tensor | None = None

    def mean(self) -> Tensor:
        """[n *positions c]"""
        if self._mean is None:
            if self.shift is not None:
                f = torch.cat([moved(lin, self.shift) for lin in self._linearizations()])
            elif self.differentiable:
                with at_rest(self.linearizer.net, {}):
                    f = self.rows(call(self.linearizer.net, self.linearizer.place(self.x)))
            else:
                f = self.linearizer.evaluate(self.x, self.rows)
            _data.check_finite(f, "the net's output")
            self._mean = f.to(working(f.dtype))
        return self._mean

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and outputs."""
        mean = self.mean()
        return mean[..., 0].numel(), mean.shape[-1]

    def blocks(self) -> Tensor:
        """Covariance within each row [N c c]."""
        if self._blocks is None:
            self._blocks = torch.cat([row_blocks(self.settled, lin) for lin in self._linearizations()]).to(self.mean().dtype)
        return self._blocks

    def dense(self) -> Tensor:
        """Joint covariance [N c, N c]."""
        if self._dense is None:
            parts = [lin.factors() for lin in self._linearizations()]
            rows = [torch.cat([self.settled.joint(a, b) for b in parts], dim=1) for a in parts]
            joint = torch.cat(rows)
            self._dense = _symmetric(joint).to(self.mean().dtype)
        return self._dense

    def cholesky(self) -> Tensor:
        """An exact root of the joint covariance (of rank p at most, so that it may need jitter of the order of rounding)."""
        return safe_cholesky(self.dense().to(accumulator(self.dense())))

    def draw(self, mean: Tensor, shape: torch.Size, base: Tensor | None) -> Tensor:
        """Joint draws of [N c] by an exact root of the dense covariance."""
        L = self.cholesky()
        ε = randn((*shape, L.shape[0]), L, None) if base is None else base.reshape(*shape, -1).to(L)
        return mean + (ε @ L.mT).unflatten(-1, mean.shape).to(mean)

    def _linearizations(self) -> Iterator[Linearization]:
        self.check_fresh()  # the mean was taken when the posterior was called, the covariance is worked out now
        if any(t._version != version for t, version in self._written):
            raise RuntimeError(
                "x was overwritten in place between posterior(x) and the covariance, which is worked out when it is asked for; call "
                "posterior(x) again, or ask for .variance before x changes."
            )
        if self.differentiable:
            yield self.linearizer(self.x, self.rows, differentiable=True)
        else:
            yield from self.linearizer.parts(self.x, self.rows)


def _symmetric(M: Tensor) -> Tensor:
    return 0.5 * (M + M.mT)
