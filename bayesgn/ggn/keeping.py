"""Keeping factors of many batches: the smallest form of each, joined over batches, all data or a random subset of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Dense, Embedding, Factors, Linear, Masked
from bayesgn.ggn.structure import working

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Kept:
    """Factors of the data seen, or of a uniform random ``size`` of them (those with the smallest of random keys).

    The key of a datum depends on its place in the stream alone, so two half streams keep what one whole stream keeps.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self.size, self.seed, self.generator = size, seed, torch.Generator().manual_seed(seed)
        self.seen = 0
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.factors: list[Factors] | None = None
        self._pending: list[list[Factors]] = []

    def draw(self, n: int) -> Tensor:
        """Which of the next n data to keep (for now) [≤ n]."""
        self.seen += n
        if self.size is None:
            return torch.arange(n)
        keys = torch.rand(n, generator=self.generator, dtype=torch.float64)
        threshold = self.keys.max() if len(self.keys) >= self.size else torch.inf
        chosen = (keys < threshold).nonzero()[:, 0]
        self.keys = torch.cat([self.keys, keys[chosen]])
        return chosen

    def put(self, factors: list[Factors], chosen: Tensor) -> None:
        """Keep the chosen rows of these factors."""
        if len(chosen) == 0:
            return
        if len(chosen) < factors[0].n:
            factors = [f.rows(chosen.to(_device(f))) for f in factors]  # type: ignore[arg-type]
        self._pending.append([compact(f) for f in factors])
        if self.size is not None:  # bounded memory: forget those that fell out
            self._keep_best()

    def _keep_best(self) -> None:
        joined = self.settle()
        best = self.keys.argsort()[: self.size].sort().values
        self.keys = self.keys[best]
        if len(best) < joined[0].n:
            self.factors = [f.rows(best.to(_device(f))) for f in joined]  # type: ignore[arg-type]

    def settle(self) -> list[Factors]:
        """One set of factors for each block."""
        pieces = [] if self.factors is None else [self.factors]
        pieces += self._pending
        if not pieces:
            raise ValueError("the dual (ggn.Gram) holds no data; condition it on some first.")
        self.factors, self._pending = [concatenate(list(fs)) for fs in zip(*pieces, strict=True)], []
        return self.factors

    def tensors(self) -> dict[str, Tensor]:
        out = {"seen": torch.tensor(self.seen)}
        if self.size is not None:
            out["keys"] = self.keys
        if self.seen:
            for i, f in enumerate(self.settle()):
                for name, t in _parts(f).items():
                    out[f"{i}.{name}"] = t
        return out

    def load(self, tensors: dict[str, Tensor], blocks: list[Block], like: Tensor) -> None:
        self._pending, self.factors, self.seen = [], None, int(tensors["seen"])
        if self.size is not None:
            self.keys = tensors["keys"].to("cpu", torch.float64)
            self._draw_from(self.generator.initial_seed())
        if self.seen:
            self.factors = [_factors(b, _local(tensors, i), like.device) for i, b in enumerate(blocks)]

    def draw_apart(self, group: ProcessGroup | None) -> None:
        """Let the keys of this process be independent of those of the others in ``group``."""
        self._draw_from(_distributed.own_seed(self.seed, group))

    def _draw_from(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        torch.rand(self.seen, generator=self.generator, dtype=torch.float64)  # go on after the data seen

    def of_all(self, i: int, group: ProcessGroup, block: Block, like: Tensor) -> list[Factors]:
        """The factors of block ``i`` of every process that keeps any, in their order. Collective."""
        own = _parts(self.settle()[i]) if self.seen else {}
        return [_factors(block, found, like.device) for found in _distributed.gather_tensors(own, group, like) if found]

    def gather(self, group: ProcessGroup, blocks: list[Block], like: Tensor) -> None:
        """Keep what all processes keep, in their order, or the ``size`` of it with the smallest keys. Collective."""
        lists = _distributed.gather_tensors(self.tensors(), group, like)
        self.seen, self.factors = sum(int(found["seen"]) for found in lists), None
        self._pending = [[_factors(b, _local(found, i), like.device) for i, b in enumerate(blocks)] for found in lists if int(found["seen"])]
        if self.size is not None:
            self.keys = torch.cat([found["keys"].to(self.keys) for found in lists])
            self._keep_best()
        self._draw_from(self.seed)


def compressed(S: Tensor) -> Tensor:
    """S [n r k] with the same SSᵀ, without columns that are zero for all data (softmax: c − 1 of c)."""
    if not 1 < S.shape[-1] <= 64:
        return S
    λ, V = torch.linalg.eigh(S.double().mT @ S.double())
    noise = (16 * torch.finfo(S.dtype).eps) ** 2 * λ.amax()  # what rounding of S leaves in a direction of zero
    keep = (λ > (1e-12 * λ[..., -1:]).clamp_min(noise)).any(0)
    keep[-1] = True
    return S if bool(keep.all()) else (S.double() @ V[..., keep]).to(S.dtype)


def compact(f: Factors) -> Factors:
    """The smallest form of these factors: δ and a, or J itself where that is smaller (weights shared over many positions)."""
    f = f.to(working(f.dtype))
    explicit = isinstance(f, Masked) or (isinstance(f, Linear) and f.t * (f.i + f.k * f.o) > f.k * f.o * f.i)
    if explicit:
        return Dense(f.jacobian().clone())
    # Contiguous, as a file gives it back: products of other strides round differently.
    if isinstance(f, Linear):
        return Linear(_plain(f.a), _plain(f.δ), f.weight, f.bias)
    return Embedding(_plain(f.ids), _plain(f.δ), f.vocabulary) if isinstance(f, Embedding) else f


def _plain(t: Tensor) -> Tensor:
    """A copy with the strides of its shape, also along dimensions of size one."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def bytes_of(f: Factors) -> int:
    """Memory of compact factors."""
    return sum(t.numel() * t.element_size() for t in _parts(f).values())


def concatenate(pieces: list[Factors]) -> Factors:
    """Factors of several batches as one; shorter sequences and fewer columns are padded with zeros, which add nothing."""
    if len(pieces) == 1:
        return pieces[0]
    if len({type(f) for f in pieces}) > 1:
        pieces = [Dense(f.jacobian()) for f in pieces]
    k = max(f.k for f in pieces)
    linear = [f for f in pieces if isinstance(f, Linear)]
    if linear:
        t = max(f.t for f in linear)
        a, δ = torch.cat([_pad(f.a, {2: t}) for f in linear]), torch.cat([_pad(f.δ, {2: t, 3: k}) for f in linear])
        return Linear(a, δ, linear[0].weight, linear[0].bias)
    embeddings = [f for f in pieces if isinstance(f, Embedding)]
    if embeddings:
        t = max(f.t for f in embeddings)
        ids, δ = (
            torch.cat([_pad(f.ids, {1: t}) for f in embeddings]), torch.cat([_pad(f.δ, {1: t, 2: k}) for f in embeddings])
        )  # fmt: skip
        return Embedding(ids, δ, embeddings[0].vocabulary)
    return Dense(torch.cat([_pad(f.jacobian(), {1: k}) for f in pieces]))


def _pad(t: Tensor, sizes: dict[int, int]) -> Tensor:
    padding = [0, 0] * t.dim()
    for dim, size in sizes.items():
        padding[2 * (t.dim() - 1 - dim) + 1] = size - t.shape[dim]
    return F.pad(t, padding) if any(padding) else t


def _device(f: Factors) -> torch.device:
    return next(iter(_parts(f).values())).device


def _parts(f: Factors) -> dict[str, Tensor]:
    """The tensors of compact factors by name."""
    if isinstance(f, Linear):
        return {"a": f.a.contiguous(), "delta": f.δ.contiguous()}
    if isinstance(f, Embedding):
        return {"ids": f.ids.contiguous(), "delta": f.δ.contiguous()}
    return {"J": f.jacobian()}


def _local(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{i}.")}


def _factors(block: Block, parts: dict[str, Tensor], device: torch.device) -> Factors:
    """The inverse of :func:`_parts`."""
    parts = {name: t.to(device) for name, t in parts.items()}
    if "a" in parts:
        return Linear(parts["a"], parts["delta"], block.has_weight, block.has_bias)
    if "ids" in parts:
        return Embedding(parts["ids"], parts["delta"], block.numel // parts["delta"].shape[-1])
    return Dense(parts["J"])
