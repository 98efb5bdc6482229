"""A net linearised at its weights, as functions of plain inputs [n d]: f(x; θ*) and the factors of J(x), kept from call to call."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.held import bytes_held
from bayesgn.ggn.keeping import compact, concatenate
from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import accumulator
from bayesgn.models._identity import fingerprint, marks, sums, versions
from bayesgn.models.network import Network
from bayesgn.models.posterior import StalePosteriorError

HELD_BYTES = 2**29  # of inputs seen lately and what was made of them


class Seen:
    """Inputs x [n d], the factors of J there, and what was made of these and of those of other inputs.

    Attributes:
        x: a copy; a graph to what it was copied from, where there is one.
        factors: of J(x), one for each block of weights.
    """

    def __init__(self, x: Tensor, factors: list[Factors]) -> None:
        self.x, self.factors = x, factors
        self._made: list[tuple[weakref.ref[Seen], Any, list[Tensor]]] = []

    def keep(self, other: Seen, what: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """``make()``, or what it gave before; forgotten with either of the two inputs."""
        for ref, known, value in self._made:
            if ref() is other and known == what:
                return value
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._made = [(ref, known, v) for ref, known, v in self._made if ref() is not None]
        self._made.append((weakref.ref(other), what, value))
        return value

    @property
    def bytes(self) -> int:
        """Memory of all that."""
        tensors = [self.x, *(t for *_, value in self._made for t in value)]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(map(bytes_held, self.factors))


class Tangent:
    """f(x; θ*) and J(x) of a net at the weights θ* it has now, for inputs as Gaussian processes have them: x [n d].

    The net is shared and never changed: a copy of a tangent is itself.

    Args:
        network: whose net, and whose choice of weights.
        input_shape: of one datum as the net takes it; x [n d] is unflattened to it. ``None`` for nets that take [n d].

    Attributes:
        weights: a hash of the net's weights and buffers.
        point: θ* of the selected weights [p].
        wide: dtype of factors and sums.
    """

    def __init__(self, network: Network, input_shape: tuple[int, ...] | None = None) -> None:
        if not isinstance(network, Network):
            raise TypeError(f"network is a {type(network).__name__}; expected models.Network(net, prior=...), which says what of a net is uncertain.")
        network._warn_of_mode()
        self.network, self.net = network, network.net
        self.input_shape = None if input_shape is None else tuple(input_shape)
        # Hooks alone: BackPACK works on a copy of the net, which would not notice a module that is put in later.
        self.linearizer = Linearizer(self.net, network.vector, use_backpack=False)
        self.point = network.vector.flatten(self.net)
        self.wide = accumulator(self.point)
        self.weights = fingerprint(self.net)
        self._seen, self._sums, self._marks = versions(self.net), sums(self.net), marks(self.net)
        self._outputs: int | None = None
        self._recent: list[Seen] = []  # the last is the latest

    def __deepcopy__(self, memo: dict) -> Tangent:
        return self

    @property
    def blocks(self) -> list[Block]:
        """The units of weights, in the order of θ."""
        return self.linearizer.blocks

    def outputs(self, x: Tensor) -> int:
        """c, all numbers that the net answers to a datum."""
        if self._outputs is None:
            self._outputs = self.value(x.detach().reshape(-1, x.shape[-1])[:2]).shape[1]
        return self._outputs

    def value(self, x: Tensor) -> Tensor:
        """f(x; θ*) [n c], with a graph to x where x asks for one."""
        self.check_fresh()
        placed = self._place(x)
        with self._explained(placed):
            if follows(x):
                return self.linearizer(placed, _rows, differentiable=True).output.to(self.wide)
            return self.linearizer.evaluate(placed, _rows).to(self.wide)

    def at(self, x: Tensor) -> Seen:
        """The factors of J(x): those of inputs with the same numbers that were seen lately, or new ones."""
        self.check_fresh()
        if follows(x):
            placed = self._place(x)
            with self._explained(placed):
                return Seen(x, [f.to(self.wide) for f in self.linearizer(placed, _rows, differentiable=True).factors()])
        found = next((seen for seen in reversed(self._recent) if _equal(seen.x, x)), None)
        if found is None:
            found = Seen(_copy(x), self._factors(x))
        else:
            self._recent.remove(found)
        self._recent.append(found)
        # A kernel asks for two inputs at a time: these stay.
        while len(self._recent) > 2 and sum(seen.bytes for seen in self._recent) > HELD_BYTES:
            self._recent.pop(0)
        return found

    def check_fresh(self) -> None:
        """Raise where the net has other weights than when it was linearised."""
        if marks(self.net) != self._marks:  # hooks, or other modules: f and J are those of the net as it is now
            self._marks = marks(self.net)
            self.linearizer, self._recent = Linearizer(self.net, self.network.vector, use_backpack=False), []
        seen = versions(self.net)
        if seen == self._seen and sums(self.net) == self._sums:
            return
        if fingerprint(self.net) != self.weights:
            raise StalePosteriorError(
                f"the weights or buffers of {type(self.net).__name__} changed after this kernel or mean was made, which are those of the net "
                "linearised at the old ones. Make new ones, JacobianKernel(network) and LinearizedMean(network), or load the old weights back."
            )
        self._seen, self._sums = seen, sums(self.net)

    # -- inside --------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _factors(self, x: Tensor) -> list[Factors]:
        placed = self._place(x)
        with self._explained(placed):
            pieces = [[compact(f) for f in lin.factors()] for lin in self.linearizer.parts(placed, _rows)]
        return [concatenate(list(block)).to(self.wide) for block in zip(*pieces, strict=True)]

    def _place(self, x: Tensor) -> Tensor:
        """x [n d] as the net takes it: unflattened, in its dtype, on its device."""
        if len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: 0 data; pass at least one.")
        _data.check_finite(x, "x")
        if self.input_shape is not None:
            if math.prod(self.input_shape) != x.shape[-1]:
                raise ValueError(
                    f"x has shape {tuple(x.shape)}, {x.shape[-1]} columns, but input_shape={self.input_shape} has {math.prod(self.input_shape)} "
                    "numbers; flatten all of a datum into one row, x.flatten(1)."
                )
            x = x.unflatten(-1, self.input_shape)
        return x.to(self.point)

    @contextlib.contextmanager
    def _explained(self, placed: Tensor) -> Iterator[None]:
        """Where the net fails on what it was given, say how that came about."""
        try:
            yield
        except (RuntimeError, IndexError) as error:
            if type(error) not in (RuntimeError, IndexError):
                raise
            how = "for a net that takes images, say input_shape=(1, 28, 28)" if self.input_shape is None else "look at input_shape"
            raise ValueError(
                f"{type(self.net).__name__} failed on inputs {tuple(placed.shape)} of {placed.dtype}, made of x [n d]: {how}; a net that takes "
                f"indices needs a module around it that casts, net(x.long()). (What failed: {str(error).splitlines()[0]})"
            ) from error


def follows(*x: Tensor) -> bool:
    """Whether what is made of these inputs should have a graph to them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in x)


@torch.inference_mode(False)
def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _rows(output: Tensor) -> Tensor:
    """All numbers of a datum in one row [n c]."""
    return output.reshape(len(output), -1)
