"""What a posterior keeps between questions: the belief about f at given sites and hyper-parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgn.rules import Marginals, Sites


class Solution(NamedTuple):
    """What a model makes of sites: log Z = log ∫ p(f) Π t_n(f_n) df, and the marginals at the data."""

    log_Z: Tensor
    marginals: Marginals


def state_of(model: Any) -> list[Tensor]:
    """The values of a model's hyper-parameters. gpytorch's setters write through ``.data``, which moves no version counter."""
    return [p.detach().clone() for p in model.parameters()]


def same_state(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two states are equal to the last bit; NaN is equal to nothing."""
    return len(a) == len(b) and all(p.dtype == q.dtype and p.device == q.device and torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Belief:
    """q(f) at given sites, worked out once and without a graph to them or to hyper-parameters; answers may have one to new inputs.

    A model whose answers share a factorisation, or that can take in a few new sites for less than all of them, gives an heir.
    """

    def __init__(self, model: Any, inputs: Any, sites: Sites) -> None:
        self.model, self.inputs, self.sites = model, inputs, sites
        self._solution: Solution | None = None

    @torch.no_grad()
    def solution(self) -> Solution:
        """log Z and the marginals at all data."""
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    def _solve(self) -> Solution:
        return self.model.solve(self.inputs, self.sites)

    def marginals(self, index: Tensor) -> Marginals:
        """At some of the data."""
        return self.solution().marginals.rows(index)

    def renewed(self, index: Tensor, sites: Sites) -> Belief:
        """The belief when the data ``index`` have other sites; ``sites`` are those of all data."""
        return self.model.belief(self.inputs, sites)

    def predict(self, x: Tensor) -> Marginals:
        """Marginals at x [m d]."""
        return self.model.predict(self.inputs, self.sites, x)

    def joint(self, x: Tensor) -> Tensor:
        """Joint covariance [m c, m c] at x [m d]."""
        return self.model.joint(self.inputs, self.sites, x)
