"""Identity: no curvature at all, H = I of the mean loss, with which a Gauss-Newton step is a step of gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn.ggn.block_diagonal import BlockDiagonalPrecision, DiagPrecision
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.structure import Curvature, Precision, Stream, Structure, accumulator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Identity(Structure):
    """H = I whatever the data: the metric of gradient descent, for comparisons within one optimizer.

        scale · H + P := I + P

    It is the curvature of the *mean* loss and does not grow with the data, so it is of no use to an inference.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, likelihoods, optim
        >>> net = torch.nn.Linear(1, 1, bias=False); _ = torch.nn.init.zeros_(net.weight)
        >>> opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), structure=ggn.Identity, damping=optim.Constant(0.0), lr=0.1)
        >>> _ = opt.step(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
        >>> net.weight.item()  # 0.1 · 2 · 3
        0.6000...

    Source: Pierrot, Perrin-Gilbert and Sigaud (2021), "First-order and second-order variants of the gradient descent in a unified framework".
    """

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return IdentityCurvature(blocks, like)


class IdentityCurvature(Curvature):
    """I."""

    def __init__(self, blocks: list[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.one = torch.ones((), dtype=accumulator(like), device=like.device)

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        for lin, S in stream:
            if getattr(lin, "slope", None) is not None:
                lin.factors(S[..., :0])  # no columns of curvature: what watches the stream still gets its gradient

    def all_reduce(self, group: ProcessGroup) -> None:
        pass

    def add(self, factors: list[Factors]) -> None:
        pass

    multiplies = True

    def times(self, V: Tensor, scale: Tensor) -> Tensor:
        return V

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        ones = [(self.one + p).expand(b.numel) for p, b in zip(prior, self.blocks, strict=True)]
        return BlockDiagonalPrecision(self.blocks, [DiagPrecision(one) for one in ones])

    def tensors(self) -> dict[str, Tensor]:
        return {"one": self.one}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.one = tensors["one"].to(self.one)
