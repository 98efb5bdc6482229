"""What a structure promises: H = Σ JᵀΛJ kept in one storage, and H + P with everything inference asks of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.linearization import Linearization

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Stream = Iterable[tuple[Linearization, Tensor]]  # batches as (linearization, S) with Λ = SSᵀ; some structures walk it twice


class Structure(ABC):
    """How the sum over data is kept: an argument of ``models.Network``."""

    @abstractmethod
    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        """An empty H for these blocks, on ``like``'s device."""

    def check_prior(self, blocks: list[Block], prior: list[Tensor]) -> None:  # noqa: B027 (most structures take any prior)
        """Raise ValueError where this structure cannot be joined with such a prior (a scalar or [p_block] for each block)."""

    def check_blend(self) -> None:  # noqa: B027 (most structures keep sums with weights)
        """Raise ValueError where no weighted sum of two H can be kept, see :meth:`Curvature.blend`."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in sorted(vars(self).items()))
        return f"{type(self).__name__}({options})"


class Spectrum(NamedTuple):
    """Eigenvalues of one independent part of H.

        log det(s H + P) = Σ_i log(s λ_i + P) + zeros · log P   where all blocks of the part share one precision P

    Attributes:
        blocks: indices of the part's blocks.
        eigenvalues: λ [m].
        zeros: how many eigenvalues of 0 are left out of ``eigenvalues``.
        by_weight: H is diagonal here and λ stands in the order of the weights, so that each may have a precision of its own.
    """

    blocks: tuple[int, ...]
    eigenvalues: Tensor
    zeros: int = 0
    by_weight: bool = False


class Curvature(ABC):
    """H in one storage, additive over data.

    Attributes:
        blocks: the units of weights, in the order of the flat vector θ.
    """

    blocks: list[Block]
    multiplies = False  # whether :meth:`times` answers

    @property
    def columns(self) -> int | None:
        """How many columns of factors are made of a batch at most, where that is fewer than S has."""
        return None

    @property
    def partial(self) -> bool:
        """Whether H is of fewer data than were seen, so that it does not belong to their likelihood."""
        return False

    @property
    def exact(self) -> bool:
        """Whether this storage leaves nothing out of H."""
        return False

    @property
    def resumable(self) -> bool:
        """Whether :meth:`fit` is one walk that adds batch by batch, so that it can go on in the middle."""
        return type(self).fit is Curvature.fit

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        """Add all data of a stream; structures that need several passes override this.

        With a ``group`` of processes, every one of them with a stream of its own data, an empty H becomes that of all their data, on each.
        """
        for lin, S in stream:
            self.add(lin.factors(S))
        if group is not None:
            self.all_reduce(group)

    def all_reduce(self, group: ProcessGroup) -> None:
        """H ← Σ H over the processes of ``group``: from each process's own data to all data, on every one of them. Collective."""
        own = self.tensors()
        self.load(_distributed.all_sum_of(own, group, like=next(iter(own.values()))))

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        """H ← keep · H + gain · H', in place, for H' in the same storage; both weights may be anything that is not negative.

        Raises:
            ValueError: for a storage of which no weighted sum can be kept.
        """
        own, theirs = self.tensors(), other.tensors()
        self.load({name: keep * t + gain * theirs[name] for name, t in own.items()})

    @abstractmethod
    def add(self, factors: list[Factors]) -> None:
        """H ← H + Σ_n JᵀSSᵀJ, given the factors of JᵀS for every block."""

    @abstractmethod
    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        """scale · H + P, with P diagonal: a scalar or [p_block] tensor for every block."""

    def solver(self, prior: list[Tensor], scale: Tensor) -> Precision:
        """:meth:`with_prior` for a few solves only: by a factorisation where that would decompose, which costs ten times as much."""
        return self.with_prior(prior, scale)

    def times(self, V: Tensor, scale: Tensor) -> Tensor | None:
        """scale · H V [p s] for V [p s]; None for a storage that does not multiply (the factors of the data then do)."""
        return None

    def spectrum(self) -> list[Spectrum] | None:
        """Eigenvalues of H part by part, with which evidence tuning costs microseconds; None where they are not to be had."""
        return None

    def copy(self) -> Curvature:
        """An H of its own: what is added to one is not in the other."""
        return copy.deepcopy(self, {id(b): b for b in self.blocks})  # blocks are shared: they hold the user's modules

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to rebuild this H, by name (see :meth:`load`)."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the place of the H whose :meth:`tensors` these are."""


class Precision(ABC):
    """scale · H + P of a Gaussian over weights. Differentiable in the scale and P; float64 inside."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log det(scale · H + P)."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """(scale · H + P)⁻¹ v for v [... p]."""

    def solve_from(self, v: Tensor, start: Tensor) -> Tensor:
        """:meth:`solve` for v [p] where ``start`` [p] is near the answer: an iterative solver begins there."""
        return self.solve(v)

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of θ − mean [count p]."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Marginal variances of the weights [p]."""

    @abstractmethod
    def covariance(self, factors: list[Factors]) -> Tensor:
        """J Σ Jᵀ of each datum [n k k]."""

    @abstractmethod
    def joint(self, factors: list[Factors], other: list[Factors] | None = None) -> Tensor:
        """J Σ J'ᵀ between all data [n k, n' k'] (of the same set when ``other`` is None)."""


def accumulator(like: Tensor) -> torch.dtype:
    """dtype of sums over data: float64, whatever the net's, except on devices without it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def working(like: torch.dtype) -> torch.dtype:
    """dtype of products within a batch: at least float32."""
    return like if like in (torch.float32, torch.float64) else torch.float32


def randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws on ``like``'s device; a CPU generator serves every device (and gives the same draws)."""
    device = like.device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
