"""Full Gauss-Newton at the scale of language models: the step is what a first-order optimizer finds on the linearised net."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._parameters import unwrap
from bayesgn.ggn.evaluation import aliases, at_rest, call
from bayesgn.likelihoods import Likelihood
from bayesgn.optim.batches import rows_of
from bayesgn.optim.checks import check_kind
from bayesgn.optim.inner_objectives import InnerObjective, Quadratized
from bayesgn.optim.line_search import Grid, LineSearch
from bayesgn.optim.muon import MuonRecipe
from bayesgn.optim.tangent import FiniteDifference, TangentProduct

# --- what is coupled ------------------------------------------------------------------------------------------------------------------------


class Blocks(ABC):
    """Which weights see each other in the linearised net."""

    @abstractmethod
    def __call__(self, names: Sequence[str]) -> list[list[str]]:
        """The names in blocks; each block is linearised on its own."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Whole(Blocks):
    """All weights in one block: full Gauss-Newton.

    Example:
        >>> Whole()(["0.weight", "0.bias", "1.weight"])
        [['0.weight', '0.bias', '1.weight']]
    """

    def __call__(self, names):
        return [list(names)]


class Layerwise(Blocks):
    """The diagonal blocks of H alone: each layer as if the others stood still, all of them at once on the same micro-batches.

        min_δᵦ  objective(f + Jᵦ δᵦ)   for every block b

    An inner step costs a product and a backward pass (down to the block) for each block.

    Args:
        block: name of a weight ↦ name of its block; None takes the module that holds it.

    Example:
        >>> names = ["body.0.weight", "body.0.bias", "body.1.weight", "head.weight"]
        >>> Layerwise()(names)
        [['body.0.weight', 'body.0.bias'], ['body.1.weight'], ['head.weight']]
        >>> Layerwise(lambda name: name.split(".")[0])(names)
        [['body.0.weight', 'body.0.bias', 'body.1.weight'], ['head.weight']]
    """

    def __init__(self, block: Callable[[str], str] | None = None) -> None:
        self.block = block

    def __call__(self, names):
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.block(name) if self.block is not None else name.rpartition(".")[0], []).append(name)
        return list(found.values())


# --- which point of the inner path --------------------------------------------------------------------------------------------------------


class Averaging(ABC):
    """The point that an inner path θ_1 … θ_K stands for: θ̄ ← θ̄ + rate (θ_k − θ̄)."""

    @abstractmethod
    def rate(self, k: int, K: int) -> float:
        """For the k-th of K iterates, counted from 0; 1 forgets what came before."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in vars(self).items())})"


class LastIterate(Averaging):
    """The end of the path.

    Example:
        >>> LastIterate().rate(3, 10)
        1.0
    """

    def rate(self, k, K):
        return 1.0


class ExponentialAverage(Averaging):
    """Σ_k decay^(K−k) θ_k / Σ_k decay^(K−k).

    Raises:
        ValueError: for a decay outside [0, 1).

    Example:
        >>> [round(ExponentialAverage(0.5).rate(k, 3), 3) for k in range(3)]
        [1.0, 0.667, 0.571]
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ExponentialAverage: decay={decay}; expected 0 ≤ decay < 1.")
        self.decay = decay

    def rate(self, k, K):
        return (1 - self.decay) / (1 - self.decay ** (k + 1))


class TailAverage(Averaging):
    """The mean of the last share of the path (Polyak and Ruppert's average where the share is 1).

    Raises:
        ValueError: for a share outside (0, 1].

    Example:
        >>> [round(TailAverage(0.5).rate(k, 4), 3) for k in range(4)]
        [1.0, 1.0, 1.0, 0.5]
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"TailAverage: share={share}; expected 0 < share ≤ 1.")
        self.share = share

    def rate(self, k, K):
        first = min(K - 1, math.floor((1 - self.share) * K))
        return 1.0 if k <= first else 1 / (k - first + 1)


def cosine(progress: float) -> float:
    """The inner learning rate over its start: ½ (1 + cos π k/K).

    Example:
        >>> [round(cosine(k / 4), 2) for k in range(4)]
        [1.0, 0.85, 0.5, 0.15]
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


# --- the optimizer --------------------------------------------------------------------------------------------------------------------------


class OuterStep(NamedTuple):
    """What became of a step.

    Attributes:
        loss: mean over rows of the micro-batches, at the weights before the step.
        before, after: the loss on the held-out data, before the step and behind it.
        rate: α; 0 where the step was not taken.
        length: ‖δ‖ of the whole step.
    """

    loss: float
    before: float
    after: float
    rate: float
    length: float


_GRID = Grid(largest=1.0, ratio=0.5, count=8)


class GaussNewtonInner(torch.optim.Optimizer):
    """Gauss-Newton (or prox-linear) steps found by an inner first-order optimizer, for nets whose H is out of reach.

        δ ≈ argmin_δ  1/n Σ_n L̃_n(f_n(θ) + J_n δ),    θ ← θ + α δ,    α by line search

    Every micro-batch serves one inner step: one forward pass with its graph, a product Jδ, one backward pass. The net stays linearised at θ
    meanwhile, and its weights change only if the line search finds a rate at which the loss of held-out data falls. Loss means −log p(y|f),
    averaged over rows (data, or data × positions), so for a language model it is in nats a token. The net is evaluated at rest, as everywhere
    here: dropout is off, batch norms keep their statistics.

    Args:
        net: trained are its parameters that require grad.
        likelihood: p(y|f); `likelihoods.Categorical()` for logits [n classes] or [n positions classes]. Its own parameters stay as they are.
        inner: list of weights ↦ torch Optimizer, for the inner problem; it is given copies that start at θ, in the order of
            ``net.parameters()``, so that a recipe for ordinary training (and its weight decay) serves. None: Muon for hidden matrices and AdamW
            for the rest, ``optim.MuonRecipe(net)``.
        steps: K, inner steps of one outer step; None takes as many as ``step`` is given micro-batches.
        objective: L̃: ``Quadratized()`` is Gauss-Newton, ``Convex()`` prox-linear.
        blocks: ``Whole()``, or ``Layerwise()`` for the diagonal blocks of H.
        products: how Jδ is had: ``FiniteDifference()`` (quick) or ``ForwardMode()`` (exact).
        line_search: from ``optim.Grid``, ``optim.Backtracking``; None takes every whole step.
        schedule: progress k/K ↦ factor of the inner learning rate: ``optim.cosine``, or ``lambda progress: 1.0``.
        averaging: ``LastIterate()``, ``ExponentialAverage(decay)``, ``TailAverage(share)`` of the inner path.
        warm_start: whether the inner optimizer's state (momenta) outlives an outer step.
        carry: the inner path starts at this multiple of the last step taken.
        lr: factor of all inner learning rates, in ``param_groups``, so for schedulers of torch (the "global" schedule).

    Attributes:
        last: :class:`OuterStep` of the last call of ``step``.

    Raises:
        ValueError: for options that cannot be right; from ``step`` for data that do not fit or outputs that are not finite. The weights and
            the optimizer's state are then as before.

    Example:
        >>> from bayesgn import likelihoods
        >>> x = torch.linspace(-1, 1, 64)[:, None]; y = torch.sin(3 * x)
        >>> net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> opt = GaussNewtonInner(net, likelihoods.Gaussian(0.01), inner=lambda params: torch.optim.Adam(params, lr=0.05))
        >>> losses = [opt.step([(x, y)] * 50) for _ in range(5)]
        >>> losses[-1] < losses[0], opt.last.after <= opt.last.before
        (True, True)

    Source: Abreu et al. (2025), "The potential of second-order optimization for LLMs: a study with full Gauss-Newton", algorithm 1.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        steps: int | None = None,
        objective: InnerObjective | None = None,
        blocks: Blocks | None = None,
        products: TangentProduct | None = None,
        line_search: LineSearch | None = _GRID,
        schedule: Callable[[float], float] = cosine,
        averaging: Averaging | None = None,
        warm_start: bool = True,
        carry: float = 0.0,
        lr: float = 1.0,
    ) -> None:
        check_kind("net", net, nn.Module, "torch.nn.Module")
        check_kind("likelihood", likelihood, Likelihood, "likelihood of bayesgn.likelihoods, e.g. likelihoods.Categorical()")
        for name, value, kind in (("objective", objective, InnerObjective), ("blocks", blocks, Blocks), ("products", products, TangentProduct),
                                  ("line_search", line_search, LineSearch), ("averaging", averaging, Averaging)):  # fmt: skip
            if value is not None:
                check_kind(name, value, kind, f"{kind.__name__} of bayesgn.optim")
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps}; expected at least one inner step, or None for one a micro-batch.")
        if not lr >= 0 or not 0 <= carry <= 1:
            raise ValueError(f"lr={lr}, carry={carry}; expected lr ≥ 0 and 0 ≤ carry ≤ 1.")
        self.net, self.likelihood = unwrap(net), likelihood
        self.weights = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        if not self.weights:
            raise ValueError(f"{type(self.net).__name__} has no parameter with requires_grad=True; unfreeze some.")
        self.inner = MuonRecipe(self.net) if inner is None else inner
        self.steps, self.line_search, self.schedule, self.warm_start, self.carry = steps, line_search, schedule, warm_start, carry
        self.objective = Quadratized() if objective is None else objective
        self.products = FiniteDifference() if products is None else products
        self.averaging = LastIterate() if averaging is None else averaging
        self.blocks = (Whole() if blocks is None else blocks)(list(self.weights))
        if sorted(itertools.chain(*self.blocks)) != sorted(self.weights):
            raise ValueError(f"the blocks {self.blocks} do not hold each weight of {list(self.weights)} once.")
        self.last: OuterStep | None = None
        self._inner_state: dict[str, Any] | None = None
        self._step: list[Tensor] | None = None  # the last one taken
        super().__init__(list(self.weights.values()), {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "step"}  # for copies and pickles: all but a scheduler's wrapper

    # --- one outer step -----------------------------------------------------------------------------------------------------------------
    def step(self, batches: Iterable, held_out: Iterable | None = None) -> float:  # type: ignore[override]
        """One outer step.

        Args:
            batches: micro-batches (x, y): a list, a loader, or an iterator together with ``steps``.
            held_out: micro-batches for the line search; None takes the last of ``batches``.

        Returns:
            The mean loss over ``batches`` at the weights before the step.
        """
        data = _data.batches(batches)
        K = self.steps if self.steps is not None else _length(data)
        with at_rest(self.net, self.weights):
            θ = aliases(self.weights)
            loss, end, inner, last_batch = self._path(θ, data, K)
            δ = [e - p.detach() for e, p in zip(end, θ.values(), strict=True)]
            held = [last_batch] if held_out is None else [self._here(x, y) for x, y in _data.batches(held_out)]
            length = float(torch.stack([d.square().sum() for d in δ]).sum().sqrt())
            before, after, α = self._search(θ, δ, length, held)
        self.last = OuterStep(loss, before, after, α, length)
        if α == 0.0:
            why = "lowers the held-out loss at no rate" if math.isfinite(length) else "is not finite; lower the inner learning rate"
            text = f"the step was not taken: it {why} (loss {before:.6g}); the weights stay."
            warnings.warn(text, RuntimeWarning, stacklevel=3)  # torch wraps step
            return loss
        with torch.no_grad():
            for p, d in zip(self.weights.values(), δ, strict=True):
                p.add_(d, alpha=α)
        self._inner_state = inner.state_dict() if self.warm_start else None
        self._step = [α * d for d in δ] if self.carry else None
        return loss

    def _path(self, θ: dict[str, Tensor], data: Iterable, K: int) -> tuple[float, list[Tensor], torch.optim.Optimizer, tuple[Any, Tensor]]:
        """The inner optimizer's way from θ: mean loss at θ, the end (averaged), the optimizer, the last micro-batch."""
        params = [nn.Parameter(p.detach().clone()) for p in θ.values()]
        named = dict(zip(θ, params, strict=True))
        inner = self.inner(params)
        base = [group["lr"] for group in inner.param_groups]
        if self._inner_state is not None:
            inner.load_state_dict(copy.deepcopy(self._inner_state))  # torch shares tensors with the state it loads, and steps write to them
        moved = False
        if self._step is not None and self.carry > 0:
            torch._foreach_add_([p.data for p in params], self._step, alpha=self.carry)
            moved = True
        mean: list[Tensor] = []
        total, rows, batch = 0.0, 0, None
        factor = self.param_groups[0]["lr"]
        for k, (x, y) in enumerate(itertools.islice(data, K)):
            batch = x, y = self._here(x, y)
            f = self._outputs(x, θ)
            self.likelihood.validate(f.detach(), y)
            total, rows = total + self._loss(f.detach(), y), rows + rows_of(self.likelihood, f.detach(), y)
            self._gradients(x, y, f, θ, named, moved)
            for group, lr in zip(inner.param_groups, base, strict=True):
                group["lr"] = lr * factor * self.schedule(k / K)
            inner.step()
            moved = True
            if not isinstance(self.averaging, LastIterate):
                mean = _averaged(mean, params, self.averaging.rate(k, K))
        if batch is None or k + 1 < K:
            came = 0 if batch is None else k + 1
            raise ValueError(f"{came} micro-batches came for {K} inner steps; pass as many, an endless iterator, or a smaller steps=.")
        if rows == 0:
            raise ValueError("no row of y has a target (all are NaN, or the label to ignore); there is nothing to learn from.")
        return total / rows, mean or [p.detach() for p in params], inner, batch

    def _gradients(self, x: Any, y: Tensor, f: Tensor, θ: dict[str, Tensor], params: Mapping[str, nn.Parameter], moved: bool) -> None:
        """∂/∂δ of the objective = Jᵀu, u = ∂/∂v at v = Jδ, block by block, into the params' grad."""
        at = f.detach()
        with torch.no_grad():
            δ = dict(zip(θ, torch._foreach_sub(list(params.values()), list(θ.values())), strict=True))
        for i, block in enumerate(self.blocks):
            if moved:
                v = self.products(lambda weights: self._outputs(x, weights), θ, at, {name: δ[name] for name in block})
            else:
                v = torch.zeros_like(at)
            with torch.no_grad():
                u = self.objective.gradient(self.likelihood, at, v, y)
            leaves = [θ[name] for name in block]
            found = torch.autograd.grad(f, leaves, u, retain_graph=i + 1 < len(self.blocks), allow_unused=True)
            for name, g in zip(block, found, strict=True):
                params[name].grad = torch.zeros_like(params[name]) if g is None else g

    def _search(self, θ: dict[str, Tensor], δ: list[Tensor], length: float, held: list[tuple[Any, Tensor]]) -> tuple[float, float, float]:
        """(loss before, loss after, α) on the held-out micro-batches."""

        @torch.no_grad()
        def loss(α: float) -> float:
            weights = {name: torch.add(p.detach(), d, alpha=α) for (name, p), d in zip(θ.items(), δ, strict=True)}
            total, rows = 0.0, 0
            for x, y in held:
                f = self._outputs(x, weights)
                total, rows = total + self._loss(f, y), rows + rows_of(self.likelihood, f.detach(), y)
            return total / max(rows, 1)

        before = loss(0.0)
        if not math.isfinite(length):
            return before, before, 0.0
        if self.line_search is None:
            after = loss(1.0)
            return (before, after, 1.0) if math.isfinite(after) else (before, before, 0.0)
        α, after = self.line_search(loss, before, 0.0)  # without a slope, backtracking asks for a fall alone
        return before, after, α

    def _outputs(self, x: Any, weights: Mapping[str, Tensor]) -> Tensor:
        return self.likelihood.rows(call(self.net, x, weights))

    @torch.no_grad()
    def _loss(self, f: Tensor, y: Tensor) -> float:
        return -float(self.likelihood.log_prob(f, y).sum())

    def _here(self, x: Any, y: Tensor) -> tuple[Any, Tensor]:
        device = next(iter(self.weights.values())).device
        return _data.to(x, device), y.to(device)

    # --- state --------------------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the inner optimizer's state and the last step beside it."""
        return super().state_dict() | {"inner": self._inner_state, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; a later ``step`` then does what it would have done there."""
        missing = [key for key in ("inner", "step") if key not in state_dict]
        if missing:
            raise ValueError(f"the saved state has no {missing}; it has {list(state_dict)}. Was it saved by another optimizer?")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in ("inner", "step")})
        self._inner_state = state_dict["inner"]
        step = state_dict["step"]
        self._step = None if step is None else [d.to(p) for d, p in zip(step, self.weights.values(), strict=True)]


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        raise ValueError(f"batches is an iterator ({type(data).__name__}) of unknown length; pass steps=, or a list or loader.") from None


@torch.no_grad()
def _averaged(mean: list[Tensor], params: list[nn.Parameter], rate: float) -> list[Tensor]:
    if not mean:
        return [p.detach().clone() for p in params]
    for m, p in zip(mean, params, strict=True):
        m.lerp_(p, rate)
    return mean
