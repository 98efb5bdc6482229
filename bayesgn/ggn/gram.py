"""Gram: the exact dual. The factors of J̃ = SᵀJ of the training data are kept, and H = J̃ᵀJ̃ is never formed.

Λ enters through its root S, never as Λ⁻¹: a softmax, whose Λ is singular, is served exactly.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.dual import DualCurvature, FactorRows, Rows
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.keeping import Kept, compressed
from bayesgn.ggn.sharded import ShardedRows
from bayesgn.ggn.structure import Curvature, Stream, Structure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("bayesgn.ggn")


_NO_AVERAGE = (
    "Gram keeps the data's own rows of J, of which there is no running average; use ggn.Full, ggn.Layerwise, ggn.Kron, ggn.Diag, "
    "ggn.LowRank or ggn.LowRankPlusDiagonal."
)


class Gram(Structure):
    """All of H, exactly, in data × data form: for nets with more weights than (data × outputs).

        K = J̃ P⁻¹ J̃ᵀ with J̃ = SᵀJ;   for Linear layers (A Aᵀ) ∘ (Δ Δᵀ), no Jacobian is formed

    The answers are those of :class:`Full` to rounding. A scalar prior costs one eigendecomposition [N N], N = data × outputs
    (softmax: c − 1), for all later prior and noise steps; a prior per layer one Cholesky factor a step from cached Gram
    matrices; a prior per weight forms K anew. Memory: the factors of all data, and N² numbers (a few N² for a prior per layer).

    Args:
        subset: keep this many data, chosen at random, and nothing of the others. The posterior is that of those data alone
            (wider than the whole data's), and so is the log-determinant in the evidence.
        inducing: keep the factors of this many data Z, chosen at random, and project all data onto what they span
            (Nyström; DTC in the language of Gaussian processes):
            H ≈ Q H Q with Q = Gᵀ(G Gᵀ)⁻¹G, G = J̃_Z. In numbers: G Gᵀ = E κ Eᵀ, W = E κ^(-1/2), and one [M M] sum over data
            T = Σ_n (K_nz W)ᵀ Λ_n (K_nz W). Never larger than H in any direction of Z; equal to the exact dual when Z is all
            data. Needs data that can be walked twice. Data added later (``posterior.condition``) are projected onto the Z of the
            first fit, so that adding is not the same as fitting all at once.
        seed: of the random choice.
        sharded: for a fit by several processes (``group=``): each keeps the factors of its own data and works out its rows of K, where otherwise
            all factors go to all. Less memory, and every answer of the posterior is then a joint one: all processes must ask for it.

    Raises:
        ValueError: for sizes below one, or both at once.

    Example:
        >>> import torch
        >>> from bayesgn import ggn
        >>> from bayesgn._parameters import ParameterVector
        >>> net = torch.nn.Linear(3, 2).double(); x = torch.eye(3, dtype=torch.float64)
        >>> lin = ggn.Linearizer(net, ParameterVector.of(net))(x, lambda f: f)
        >>> H = ggn.Gram().start(lin.blocks, next(net.parameters()))
        >>> H.add(lin.factors())
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(H.with_prior([one], one).logdet().item(), 6)  # log det(I + I + 11ᵀ) for each of two outputs: 2 log 20
        5.991465

    Source: Khan et al. (2019), "Approximate inference turns deep networks into Gaussian processes"; Immer et al. (2023),
    "Stochastic marginal likelihood gradients using neural tangent kernels"; Quiñonero-Candela and Rasmussen (2005) for DTC.
    """

    def __init__(self, subset: int | None = None, inducing: int | None = None, seed: int = 0, sharded: bool = False) -> None:
        for name, value in (("subset", subset), ("inducing", inducing)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected a number of data, at least 1, or None.")
        if subset is not None and inducing is not None:
            raise ValueError(f"subset={subset} and inducing={inducing} are two ways to be smaller; choose one.")
        if sharded and (subset is not None or inducing is not None):
            raise ValueError("sharded=True keeps all data in pieces, subset= and inducing= keep few data whole; choose one.")
        self.subset, self.inducing, self.seed, self.sharded = subset, inducing, seed, sharded

    def check_blend(self) -> None:
        raise ValueError(_NO_AVERAGE)

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        if self.inducing is not None:
            return InducingCurvature(blocks, like, Kept(self.inducing, self.seed))
        return GramCurvature(blocks, like, Kept(self.subset, self.seed), self.sharded)


class GramCurvature(DualCurvature):
    """J̃ of the data seen (or of a random subset), exactly."""

    def __init__(self, blocks: list[Block], like: Tensor, kept: Kept, sharded: bool = False) -> None:
        super().__init__(blocks, like)
        self.kept, self.sharded = kept, sharded
        self.group: ProcessGroup | None = None  # among whose processes the rows of J̃ are spread

    @property
    def resumable(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return not self.partial

    @property
    def partial(self) -> bool:
        return self.kept.size is not None and self.kept.seen > self.kept.size

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        self._check_whole()
        if group is not None:
            self.kept.draw_apart(group)
        for lin, S in stream:
            chosen = self.kept.draw(lin.n)
            if len(chosen):
                self.kept.put(lin.factors(compressed(S)), chosen)
        self.forget()
        if group is not None:
            self.all_reduce(group)
        if self.partial:
            logger.info("Gram keeps %d of %d data: posterior and log-determinant are of those", self.kept.size, self.kept.seen)

    def add(self, factors: list[Factors]) -> None:
        self._check_whole()
        self.kept.put(factors, self.kept.draw(factors[0].n))
        self.forget()

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        raise ValueError(_NO_AVERAGE)

    def all_reduce(self, group: ProcessGroup) -> None:
        self._check_whole()
        if self.sharded:
            self.group = group
        else:
            self.kept.gather(group, self.blocks, self.zero)
        self.forget()

    def _check_whole(self) -> None:
        if self.group is not None:
            raise ValueError(_IN_PIECES)

    def copy(self) -> Curvature:
        memo: dict[int, object] = {id(b): b for b in self.blocks}
        return copy.deepcopy(self, memo | {id(self.group): self.group})

    def make_rows(self) -> Rows:
        if self.group is not None:
            return ShardedRows(self.blocks, self.kept, self.zero, self.group)
        return FactorRows(self.blocks, self.kept.settle(), self.zero.dtype)

    def tensors(self) -> dict[str, Tensor]:
        self._check_whole()
        return self.kept.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.kept.load(tensors, self.blocks, self.zero)
        self.forget()


_IN_PIECES = (
    "structure=ggn.Gram(sharded=True) leaves the factors of the data on the processes that saw them, so it cannot be saved, and no data can be "
    "added. Use ggn.Gram(), which keeps all factors on every process, or fit all data at once."
)


class InducingCurvature(DualCurvature):
    """H ≈ Q H Q on the span of the inducing data's rows; T [m m] is a sum over data."""

    def __init__(self, blocks: list[Block], like: Tensor, kept: Kept) -> None:
        super().__init__(blocks, like)
        self.kept, self.W, self.T = kept, None, self.zero

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        if self.W is None:
            if group is not None:
                self.kept.draw_apart(group)
            for lin, S in stream:
                chosen = self.kept.draw(lin.n)
                if len(chosen):
                    self.kept.put(lin.factors(compressed(S)), chosen)
            if group is not None:
                self.kept.gather(group, self.blocks, self.zero)
            self._whiten(group)
        before, self.T = self.T, torch.zeros_like(self.T)
        for lin, S in stream:
            self._accumulate(lin.factors(S))
        self.T = before + _distributed.all_sum([self.T], group)[0]
        self.forget()

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        raise ValueError(_NO_AVERAGE)

    def all_reduce(self, group: ProcessGroup) -> None:
        raise ValueError("Gram(inducing=…) needs one set of inducing data for all processes: fit it with group=, on all data at once.")

    def add(self, factors: list[Factors]) -> None:
        if self.W is None:  # no walk came before: the inducing data are chosen among these
            self.kept.put(factors, self.kept.draw(factors[0].n))
            self._whiten()
        self._accumulate(factors)

    def _whiten(self, group: ProcessGroup | None = None) -> None:
        """W [m₀ m] with Wᵀ G Gᵀ W = I on the range of G."""
        inducing = FactorRows(self.blocks, self.kept.settle(), self.zero.dtype)
        κ, E = torch.linalg.eigh(sum(inducing.gram(i, self.zero + 1) for i in range(len(self.blocks))))
        good = κ > 1e-12 * κ[-1]
        self.W = E[:, good] * κ[good].rsqrt()
        if group is not None:
            self.W = _distributed.object_from(self.W.cpu(), group).to(self.zero)  # (eigh may round otherwise elsewhere)
        self.T = torch.zeros(self.W.shape[1], self.W.shape[1]).to(self.zero)

    def _accumulate(self, factors: list[Factors]) -> None:
        inducing = FactorRows(self.blocks, self.kept.settle(), self.zero.dtype, self.W)
        X = inducing.cross(factors, [self.zero + 1] * len(self.blocks))
        self.T = self.T + X.mT @ X
        self.forget()

    def make_rows(self) -> Rows:
        # H = Gᵀ W T Wᵀ G = J̃ᵀJ̃ with J̃ = Cᵀ G, C = W V μ^(1/2) for T = V μ Vᵀ; then J̃J̃ᵀ = diag(μ).
        if self.W is None:
            raise ValueError("the dual (ggn.Gram) holds no data; condition it on some first.")
        μ, V = torch.linalg.eigh(self.T)
        μ = μ.clamp_min(0)
        self._eigen = μ, None
        return FactorRows(self.blocks, self.kept.settle(), self.zero.dtype, self.W @ (V * μ.sqrt()))

    def tensors(self) -> dict[str, Tensor]:
        return self.kept.tensors() | ({} if self.W is None else {"W": self.W, "T": self.T})

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.kept.load(tensors, self.blocks, self.zero)
        if "W" in tensors:
            self.W, self.T = tensors["W"].to(self.zero), tensors["T"].to(self.zero)
        self.forget()
