"""Small regression and classification problems with everything dense beside them, for the structure tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Curvature, Linearizer, Structure
from tests.oracles import dense


def rows(output: Tensor) -> Tensor:
    return output


class Batches:
    """A stream: batches of (linearization, S) that can be walked again and again, as ``models.network.Stream``."""

    def __init__(self, problem: Problem, index: list[list[int]]) -> None:
        self.problem, self.index, self.walks = problem, index, 0

    def __iter__(self) -> Iterator:
        self.walks += 1
        for part in self.index:
            x = self.problem.x[part]
            lin = self.problem.linearizer(x, rows)
            lin.source = (self.problem.linearizer, x, rows)
            yield lin, self.problem.S[part].to(x.dtype)


@dataclass
class Problem:
    """A net, data x [n …], and a root S [n r k] of Λ. J [n r p] and H [p p] by brute force."""

    net: nn.Module
    x: Tensor
    S: Tensor

    def __post_init__(self) -> None:
        self.linearizer = Linearizer(self.net, ParameterVector.of(self.net))
        self.linearizer.prepare(self.x, rows)
        self.n, self.p = len(self.x), self.linearizer.vector.numel

    @property
    def blocks(self):
        return self.linearizer.blocks

    @cached_property
    def J(self) -> Tensor:
        return dense.jacobian(self.net, self.x)

    @cached_property
    def H(self) -> Tensor:
        return dense.ggn(self.J, self.S @ self.S.mT)

    def stream(self, *index: list[int]) -> Batches:
        """All data in one batch, or the batches of indices that are given."""
        return Batches(self, list(index) or [list(range(self.n))])

    def fit(self, structure: Structure, *index: list[int]) -> Curvature:
        curvature = structure.start(self.blocks, next(self.net.parameters()))
        curvature.fit(self.stream(*index))
        return curvature

    def factors(self, x: Tensor):
        return self.linearizer(x, rows).factors()

    def weights(self, names: str) -> Tensor:
        """Columns of the parameters whose name starts with ``names``."""
        start, out = 0, []
        for name, q in self.net.named_parameters():
            if name.startswith(names):
                out.append(torch.arange(start, start + q.numel()))
            start += q.numel()
        return torch.cat(out)


def softmax_root(f: Tensor) -> Tensor:
    return dense.psd_root(dense.softmax_ggn(f))


def make(net: nn.Module, x: Tensor, root: Callable[[Tensor], Tensor] = softmax_root, seed: int = 0) -> Problem:
    """A problem in float64, weights drawn from N(0, 0.7²); Λ is a softmax's unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    with torch.no_grad():
        for q in net.parameters():
            q.copy_(0.7 * torch.randn(q.shape, generator=generator, dtype=torch.float64))
    return Problem(net, x, root(dense.outputs(net, x)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def mlp(d: int = 3, h: int = 4, c: int = 3, n: int = 6, seed: int = 0) -> Problem:
    """Two Linear layers and a softmax: J = δ ⊗ a everywhere, Λ singular."""
    return make(nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, c)), draw(n, d, seed=seed), seed=seed)


def conv(n: int = 5, seed: int = 0) -> Problem:
    """Shared weights (Conv2d), an explicit block (LayerNorm) and a Linear layer."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2))
    return make(net, draw(n, 1, 3, 3, seed=seed), seed=seed)


def squared(f: Tensor) -> Tensor:
    """S of squared loss."""
    return torch.eye(f.shape[1], dtype=torch.float64).expand(len(f), -1, -1)
