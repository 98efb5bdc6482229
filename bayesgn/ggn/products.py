"""Products H V = Σ JᵀΛJ V with many columns at once: what LowRank and MatrixFree are built on. H itself is never formed.

Two engines give J V and Jᵀ U of a batch. *Factors*: for J = δ ⊗ a both are two matrix products; kept in memory they serve
every later product (32 columns: 0.15 to 0.7 of a gradient for each, measured on an MLP, a CNN, an encoder and an LSTM).
*Graph*: exact double backward; g(u) = Jᵀu is linear in u, so ∂⟨g(u), v⟩/∂u = J v, and one more backward pass gives Jᵀ (0.9 to
1.4 gradients). The graph needs no explicit Jacobians, whose making costs an encoder 140 gradients: it serves nets that have
such blocks where factors do not fit in memory and would be made anew at every walk. It is compared with the factors on a
batch first, and the log says which was taken.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesgn.ggn.blocks import Block
from bayesgn.ggn.dual import FactorRows
from bayesgn.ggn.evaluation import at_rest, call, close
from bayesgn.ggn.factors import Dense, Factors
from bayesgn.ggn.keeping import bytes_of, compact, concatenate
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.structure import Stream, randn

logger = logging.getLogger("bayesgn.ggn")

ACTIVATION_ENTRIES = 2**25  # data × columns × widest layer of one matrix product (256 MB of float64)


class BatchProducts(ABC):
    """J̃ = SᵀJ of one batch, [n·k p]."""

    m: int

    @abstractmethod
    def matvec(self, V: Tensor) -> Tensor:
        """J̃ V [m s] for V [p s]."""

    @abstractmethod
    def rmatvec(self, U: Tensor) -> Tensor:
        """J̃ᵀ U [p s] for U [m s]."""


class FactorProducts(BatchProducts):
    """Through the batch's factors, in slices of data whose activations stay small."""

    def __init__(self, blocks: list[Block], factors: list[Factors], dtype: torch.dtype) -> None:
        self.blocks, self.factors, self.dtype = blocks, factors, dtype
        self.m = factors[0].n * factors[0].k
        self._widest = max(getattr(f, "o", 1) * getattr(f, "g", 1) * getattr(f, "t", 1) for f in factors)

    def _pieces(self, columns: int) -> Iterator[tuple[slice, FactorRows]]:
        n, k = self.factors[0].n, self.factors[0].k
        size = max(1, ACTIVATION_ENTRIES // (columns * self._widest))
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            factors = self.factors if size >= n else [f.rows(part) for f in self.factors]
            yield slice(part.start * k, part.stop * k), FactorRows(self.blocks, factors, self.dtype)

    def matvec(self, V: Tensor) -> Tensor:
        return torch.cat([rows.matvec(V) for _, rows in self._pieces(V.shape[1])])

    def rmatvec(self, U: Tensor) -> Tensor:
        return sum(rows.rmatvec(U[part]) for part, rows in self._pieces(U.shape[1]))  # type: ignore[return-value]


class GraphProducts(BatchProducts):
    """Double backward on a graph that is kept: J̃ V costs a backward pass through it for every column, and so does J̃ᵀ.

    Args:
        linearizer, x, rows: the net, its weights, a batch, and how its output is read (see :class:`Linearizer`).
        S: Λ = SSᵀ [n r k].

    Raises:
        RuntimeError: for a net with an operation that cannot be differentiated twice.
    """

    COLUMNS = 32  # of one batched backward pass

    def __init__(self, linearizer: Linearizer, x: Any, rows: Callable[[Tensor], Tensor], S: Tensor, dtype: torch.dtype) -> None:
        self.net, self.vector, self.S, self.dtype = linearizer.net, linearizer.vector, S, dtype
        self.selected = self.vector.tensors(self.net)
        self.m, self._batched = S.shape[0] * S.shape[2], True
        with at_rest(self.net, self.selected), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            f = rows(call(self.net, x))
            self.f = f.reshape(len(f), -1)
            self.u = torch.zeros_like(self.f, requires_grad=True)
            self.g = self._grad([self.f], list(self.selected.values()), [self.u], create_graph=True)

    @staticmethod
    def _grad(outputs: list[Tensor], inputs: list[Tensor], v: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True, **options)
        columns = (len(v[0]),) if options.get("is_grads_batched") else ()  # (materialize_grads forgets the columns)
        return tuple(q.new_zeros(*columns, *q.shape) if g is None else g for g, q in zip(found, inputs, strict=True))

    def _columns(self, outputs: list[Tensor], inputs: list[Tensor], columns: list[Tensor]) -> list[Tensor]:
        """Products of columns [s …] with the transposed Jacobian of outputs by inputs: [s …] for every input."""
        live = [i for i, o in enumerate(outputs) if o.requires_grad]
        outputs, columns = [outputs[i] for i in live], [columns[i] for i in live]
        with at_rest(self.net, self.selected):
            if self._batched and len(columns[0]) > 1:
                try:
                    return list(self._grad(outputs, inputs, columns, is_grads_batched=True))
                except RuntimeError as error:
                    logger.info("products run one column at a time: %s", str(error).splitlines()[0])
                    self._batched = False
            per_column = [self._grad(outputs, inputs, [c[s] for c in columns]) for s in range(len(columns[0]))]
        return [torch.stack(t) for t in zip(*per_column, strict=True)]

    def _weights(self, V: Tensor) -> list[Tensor]:
        """[p s] as columns of every parameter [s *shape], zero where an entry is not selected."""
        out = []
        for (name, part), q in zip(self.vector.split(V.mT.to(self.f.dtype)).items(), self.selected.values(), strict=True):
            if name in self.vector.masks:
                part = part.new_zeros(len(part), q.numel()).index_copy(1, self.vector.masks[name], part)
            out.append(part.reshape(len(part), *q.shape))
        return out

    def _vector(self, found: list[Tensor]) -> Tensor:
        parts = []
        for (name, _), t in zip(self.selected.items(), found, strict=True):
            flat = t.reshape(len(t), -1)
            parts.append(flat[:, self.vector.masks[name]] if name in self.vector.masks else flat)
        return torch.cat(parts, dim=1).mT.to(self.dtype)

    def matvec(self, V: Tensor) -> Tensor:
        out = []
        for part in V.split(self.COLUMNS, dim=1):
            (Jv,) = self._columns(list(self.g), [self.u], self._weights(part))  # [s n r]
            out.append((self.S.mT @ Jv.movedim(0, -1).to(self.S)).flatten(0, 1))
        return torch.cat(out, dim=1).to(self.dtype)

    def rmatvec(self, U: Tensor) -> Tensor:
        out, n = [], len(self.S)
        for part in U.split(self.COLUMNS, dim=1):
            c = (self.S @ part.unflatten(0, (n, -1)).to(self.S)).movedim(-1, 0).to(self.f.dtype)
            out.append(self._vector(self._columns([self.f], list(self.selected.values()), [c.contiguous()])))
        return torch.cat(out, dim=1)


class Products:
    """H V over a whole stream.

    The first walk decides the engine, sums diag(H), and keeps what later products need as long as it fits ``memory``;
    beyond that every product walks the stream again.

    Args:
        stream: batches of (linearization, S).
        like: a number of the dtype and device to answer in.
        memory: bytes of factors (or data × columns of graphs) that may be kept.
        graph: ``None`` takes double backward where the factors do not fit and some are explicit Jacobians; ``True`` wherever
            it passes the self-check; ``False`` never.
        most: with ``graph=True``, make the factors of no more columns of S than this, random mixtures of them: a net of sequences has
            positions × classes of them, and only the diagonal asks for factors. It is then an unbiased estimate.

    Attributes:
        diagonal: diag(H) [p].
        m: rows of J̃ over all data.
    """

    def __init__(
        self,
        stream: Stream,
        blocks: list[Block],
        like: Tensor,
        memory: int = 2**30,
        graph: bool | None = None,
        most: int | None = None,
    ) -> None:
        self.stream, self.blocks, self.dtype, self.device, self.memory = stream, blocks, like.dtype, like.device, memory
        self._use_graph, self._checked = graph, False
        self.diagonal = torch.zeros(blocks[-1].where.stop, dtype=like.dtype, device=like.device)
        self.m, used, whole = 0, 0, True
        kept: list[BatchProducts] = []
        generator = torch.Generator().manual_seed(0)
        for lin, S in stream:
            mixed = S if most is None or not self._use_graph else mixtures(S, most, generator)
            factors = lin.factors(mixed)
            if mixed is not S and not self._serves(lin, mixed, factors):
                linearizer, x, rows = lin.source  # type: ignore[misc]
                mixed, factors = S, linearizer(x, rows).factors(S)
            self.diagonal += torch.cat([f.to(self.dtype).square() for f in factors])
            self.m += S.shape[0] * S.shape[-1] if S.dim() else factors[0].n * factors[0].k
            if not whole:
                continue
            batch = self._graph(lin, S, factors) if self._use_graph else None
            batch = FactorProducts(blocks, [compact(f) for f in factors], self.dtype) if batch is None else batch
            used += _bytes(batch)
            kept.append(batch)
            if used > memory:
                whole, kept = False, []
                if graph is None and any(isinstance(f, Dense) for f in factors):
                    self._use_graph = self._graph(lin, S, factors) is not None
        self.kept = kept if whole else None
        if self.kept and all(isinstance(batch, FactorProducts) for batch in self.kept):
            joined = [concatenate(list(fs)) for fs in zip(*(b.factors for b in self.kept), strict=True)]  # type: ignore[attr-defined]
            self.kept = [FactorProducts(blocks, joined, self.dtype)]  # few large matrix products
        if self.kept is None:
            how = "double backward" if self._use_graph else "factors"
            logger.info("products walk the data anew each time, by %s: keeping them needs more than %.1f GB", how, memory / 2**30)

    def _graph(self, lin: Linearization, S: Tensor, factors: list[Factors]) -> GraphProducts | None:
        source = getattr(lin, "source", None)  # (linearizer, x, rows)
        if source is None:
            logger.info("products by factors: this linearization does not say where it comes from")
            self._use_graph = False
            return None
        try:
            linearizer, x, rows = source
            graph = GraphProducts(linearizer, x, rows, S, self.dtype)
            if not self._checked:
                V = torch.randn(len(self.diagonal), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                V = V.to(self.diagonal)
                u, other = graph.matvec(V), FactorProducts(self.blocks, factors, self.dtype)
                tolerant = S.dtype  # equal up to rounding of the net's dtype
                if not close(u.to(tolerant), other.matvec(V).to(tolerant)) or not close(
                    graph.rmatvec(u).to(tolerant), other.rmatvec(u).to(tolerant)
                ):
                    raise RuntimeError("its answer differs from the factors'")
                logger.info("products by double backward on a cached graph")
                self._checked = True
            return graph
        except (RuntimeError, NotImplementedError) as error:
            logger.info("products by factors; double backward does not serve this net: %s", str(error).splitlines()[0])
            self._use_graph = False
            return None

    def _serves(self, lin: Linearization, S: Tensor, factors: list[Factors]) -> bool:
        """Whether double backward serves this net, tried on a few columns."""
        return self._checked or self._graph(lin, S, factors) is not None

    def batches(self) -> Iterator[BatchProducts]:
        """J̃ batch by batch."""
        if self.kept is not None:
            yield from self.kept
            return
        for lin, S in self.stream:
            if self._use_graph:
                graph = self._graph(lin, S, [])
                if graph is not None:
                    yield graph
                    continue
            yield FactorProducts(self.blocks, [compact(f) for f in lin.factors(S)], self.dtype)

    def __call__(self, V: Tensor) -> Tensor:
        """H V [p s] for V [p s]."""
        return sum((batch.rmatvec(batch.matvec(V)) for batch in self.batches()), torch.zeros_like(V))

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Draws of N(0, H) [p count]: J̃ᵀ ε."""
        zero = self.diagonal.new_zeros(len(self.diagonal), count)
        return sum((batch.rmatvec(randn((batch.m, count), self.diagonal, generator)) for batch in self.batches()), zero)


def mixtures(S: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """S ε / √m with random signs ε [k m] for each datum, which has S Sᵀ as its expected square; S itself where it has no more columns."""
    if S.dim() == 0 or S.shape[-1] <= most:
        return S
    signs = torch.randint(2, (len(S), S.shape[-1], most), generator=generator).to(S) * 2 - 1
    return S @ signs / most**0.5


def _bytes(batch: BatchProducts) -> int:
    if isinstance(batch, FactorProducts):
        return sum(bytes_of(f) for f in batch.factors)
    # A graph holds each activation about four times: forward, backward and their own graph; the weights bound what we know.
    assert isinstance(batch, GraphProducts)
    return 4 * batch.f.element_size() * batch.f.numel() * max(1, len(list(batch.net.modules())))
