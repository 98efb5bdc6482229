"""Gauss-Newton as a torch Optimizer: the likelihood, curvatures and structures of the inference, and damping for a prior precision."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bayesgn import _data, _distributed
from bayesgn._parameters import Selection, unwrap
from bayesgn._psd import NotPositiveDefiniteError
from bayesgn.ggn import Full, Linearizer, Structure
from bayesgn.likelihoods import Likelihood
from bayesgn.optim.batches import Batches, captured, loss_at
from bayesgn.optim.checks import check_kind
from bayesgn.optim.curved import Curved
from bayesgn.optim.damping import Damping, LevenbergMarquardt
from bayesgn.optim.line_search import LineSearch
from bayesgn.optim.momentum import Momentum
from bayesgn.optim.scaling import Scaling
from bayesgn.optim.weights import Weights
from bayesgn.rules.curvatures import Curvature
from bayesgn.rules.curvatures import GaussNewton as GeneralisedGaussNewton
from bayesgn.rules.expansions import Expansion

logger = logging.getLogger("bayesgn.optim")

_OTHERWISE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Step(NamedTuple):
    """What became of a step.

    Attributes:
        loss, trial: mean penalised loss before the step and at the last weights tried.
        damping: λ it was solved with.
        rate: along the step (0 where it was rejected).
        ratio: actual over predicted decrease.
        accepted: whether the weights moved.
        tries: proposals.
    """

    loss: float
    trial: float
    damping: float
    rate: float
    ratio: float
    accepted: bool
    tries: int


class GaussNewton(torch.optim.Optimizer):
    """Gauss-Newton steps on the mean loss of a network.

        loss(θ) = −1/N Σ log p(y_n | f(x_n; θ)) + ½ Σ weight_decay θ²        over the N rows that have a target
        δ = −(1/N Σ JᵀΛJ + weight_decay + λD)⁻¹ ∂loss,      θ ← θ + lr · α · δ

    The arguments are independent of one another, and name the classical methods among them:

    | method | arguments |
    |---|---|
    | gradient descent | ``structure=ggn.Identity, damping=Constant(0)`` |
    | classical Gauss-Newton | ``curvature=rules.Identity()`` |
    | natural gradient | the defaults: ``rules.GaussNewton()`` is the Fisher information |
    | generalised Gauss-Newton | ``curvature=rules.Exact()``; the same thing for softmax, Bernoulli and Gaussian |
    | empirical Fisher ("gradient covariance") | ``curvature=rules.EmpiricalFisher()`` |
    | Newton | ``curvature=rules.Exact(), structure=ggn.Hessian`` |
    | Gram-Gauss-Newton (as many unknowns as data) | ``structure=ggn.Gram`` |
    | layerwise Gauss-Newton, KFAC | ``structure=ggn.Layerwise``, ``ggn.Kron`` |
    | Hessian-free | ``structure=ggn.MatrixFree(tol=1e-2, iterations=50)``: conjugate gradients, begun at the last step |
    | Levenberg-Marquardt of Pooladzandi and Zhou | ``damping=LevenbergMarquardt(1e-2, uphill=1.0), scaling=RunningMax(), momentum=Adaptive()`` |

    Every step is tried before it is taken: the loss is evaluated on the same batch at θ + αδ, without touching the net. A step that is not
    finite, or that the damping does not accept, is rejected; after ``damping.tries`` proposals a warning says so and the weights stay.
    A row without a target (NaN, the label to ignore) is not counted in N; class weights do not enter N (torch's cross-entropy divides by their sum).
    The net is linearised in eval mode (dropout off, BatchNorm by its running statistics), and its mode and flags are left as they came.

    Args:
        net: trained in place.
        likelihood: p(y|f): ``Categorical()`` for cross-entropy, ``Gaussian(1.0)`` for half the squared error, …
        curvature: Λ, a ``rules`` curvature.
        structure: how H is kept; ``Full`` for up to some thousand weights.
        damping: how far the quadratic is trusted; ``LevenbergMarquardt(1e-2)`` unless given.
        line_search: α; 1 unless given.
        momentum: what is kept of the last step.
        scaling: D; the identity unless given.
        lr, weight_decay: as in torch, and in its parameter groups.
        parameters: the weights that are trained: names, ``{name: mask}``, or a list of groups ``{"parameters": names, "lr": …, "weight_decay": …}``.
        generator: for curvatures that draw.
        use_backpack: as in ``models.Network``.
        group: a ``torch.distributed`` process group whose ranks each bring data of their own: one step over all of them.

    Attributes:
        last: what became of the last step (:class:`Step`).

    Raises:
        TypeError, ValueError: for arguments, batches or closures that cannot be right.

    Example:
        >>> import torch
        >>> from bayesgn import likelihoods, optim
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = 2 * x + 1
        >>> net = torch.nn.Linear(1, 1)
        >>> opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), damping=optim.Constant(0.0))
        >>> _ = opt.step(x, y)  # one step solves a linear model
        >>> net.weight.item(), net.bias.item()
        (2.000, 1.000)

    Source: Schraudolph (2002); Martens (2020), "New insights and perspectives on the natural gradient method".
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature | None = None,
        structure: Structure | type[Structure] = Full,
        damping: Damping | None = None,
        line_search: LineSearch | None = None,
        momentum: Momentum | None = None,
        scaling: Scaling | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        parameters: Iterable[str] | Selection | list[dict[str, Any]] | None = None,
        generator: torch.Generator | None = None,
        use_backpack: bool | None = None,
        group: Any = None,
    ) -> None:
        self.curvature = GeneralisedGaussNewton() if curvature is None else curvature
        self.structure = structure() if isinstance(structure, type) else structure
        self.damping = LevenbergMarquardt() if damping is None else damping
        self.line_search, self.momentum, self.scaling = line_search, momentum, scaling
        self.likelihood, self.generator, self.group = likelihood, generator, group
        _distributed.check_group(group)
        check_kind("net", net, nn.Module, "torch.nn.Module")
        check_kind("likelihood", likelihood, Likelihood, "likelihood of bayesgn.likelihoods, e.g. likelihoods.Categorical()")
        if isinstance(curvature, Expansion):
            raise TypeError(f"curvature={curvature!r}; an optimizer expands at its weights: pass the curvature alone, {curvature.curvature!r}.")
        check_kind("curvature", self.curvature, Curvature, "curvature of bayesgn.rules, e.g. rules.GaussNewton()")
        check_kind("structure", self.structure, Structure, "structure of bayesgn.ggn, e.g. ggn.Layerwise")
        check_kind("damping", self.damping, Damping, "damping of bayesgn.optim, e.g. optim.Constant(1e-3)")
        for name, value, kind in (("line_search", line_search, LineSearch), ("momentum", momentum, Momentum), ("scaling", scaling, Scaling)):
            if value is not None:
                check_kind(name, value, kind, f"{kind.__name__} of bayesgn.optim")
        if group is None and isinstance(net, nn.parallel.DistributedDataParallel) and torch.distributed.get_world_size(net.process_group) > 1:
            raise ValueError("net is a DistributedDataParallel of several processes but group=None, so that each would take steps of its own; pass "
                             "group=net.process_group.")  # fmt: skip
        self._called = net if hasattr(net, "_orig_mod") else unwrap(net)  # what a closure calls (a compiled net does not call the hooks inside)
        self.net = unwrap(net)
        self.weights = Weights(self.net, parameters)
        self.linearizer = Linearizer(self.net, self.weights.vector, use_backpack)
        self._batches: list[Batches] = []
        self._curved: Curved | None = None
        self._step: Tensor | None = None  # the last accepted one [p]
        self.last: Step | None = None
        super().__init__(self.weights.groups, {"lr": float(lr), "weight_decay": float(weight_decay)})
        for g in self.param_groups:
            if not (0 < g["lr"] < math.inf and 0 <= g["weight_decay"] < math.inf):
                raise ValueError(f"lr={g['lr']}, weight_decay={g['weight_decay']}; expected lr > 0 and weight_decay ≥ 0, both finite.")
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameter groups are given when the optimizer is made."""
        if hasattr(self, "_complete"):
            raise ValueError("the trained weights are settled when the optimizer is made; build a new one with parameters=[{...}, {...}].")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles: all but the step to come, and a scheduler's wrapper around `step`.
        return {k: v for k, v in vars(self).items() if k != "step"} | {"_curved": None, "_batches": []}

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, x: Any = None, y: Tensor | None = None, *, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; the mean penalised loss before it.

        ``step(x, y)`` on one batch, ``step(loader)`` on all batches of some data, ``step(closure)`` as with ``torch.optim.LBFGS`` (the
        closure calls ``zero_grad()``, the net, the loss and ``backward()``), or ``step()`` after :meth:`accumulate`.

        A closure's gradient is taken as it stands, the curvature is the likelihood's, so its loss must be the mean over rows of −log p(y|f), up
        to a constant: ``F.cross_entropy`` for ``Categorical()``; for ``Gaussian(1.0)`` half the squared error summed over outputs,
        ``0.5 * (f - y).square().sum(-1).mean()`` (``F.mse_loss`` is twice that, over the number of outputs, and would not settle). It cannot tell
        missing rows, which then count in the curvature.
        """
        if closure is None and callable(x) and not isinstance(x, Tensor) and not hasattr(x, "__iter__"):
            closure = cast(Callable[[], Tensor], x)
        if closure is not None:
            return self._close(closure)
        if x is not None:
            self.accumulate(x, y)
        if not self._batches:
            raise RuntimeError("step() without data: call step(x, y), step(closure), or accumulate(x, y) before step().")
        data, zero = [batch.data for batch in self._batches], self.weights.zero

        def loss(weights: Mapping[str, Tensor] | None) -> float:
            with _distributed.together(self.group):
                parts = [loss_at(self.linearizer, self.likelihood, d, weights, zero) for d in data]
            return self._mean(parts) + self._penalty(weights)

        try:
            return self._take(float(self._loss) + self._penalty(None), loss)
        finally:
            self._forget()

    def accumulate(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Add a micro-batch (or all batches of a loader) to the step to come; the mean loss of all so far.

        The mean gradient of all so far, weight decay included, is written into ``.grad``, where it may be clipped before ``step()``.
        """
        self._warn_of_mode()
        self.weights.check()
        with _distributed.together(self.group):
            pairs = list(_data.batches((x, y), batch_size=2**62) if y is not None else _data.batches(x))
            if not pairs:
                raise ValueError("the data are empty (0 batches); there is nothing to learn from.")
            self._add(Batches(self.linearizer, self.likelihood, self.curvature, pairs, self._seed(), self.damping.eigenvalues))
        parts = [(b.gradient, b.loss, b.noise, self.weights.zero + b.count) for b in self._batches]
        gradient, loss, noise, count = self._sum([torch.stack(part).sum(0) for part in zip(*parts, strict=True)])
        if count == 0:
            self._forget()
            raise ValueError("no row of y has a target (all are NaN, or the label to ignore); there is nothing to learn from.")
        self._count, self._loss, self._noise = int(count), loss / count, float(noise / count)
        self.weights.set_grad(gradient / count + self._decay() * self.weights.flat())
        return self._loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and what was accumulated for the step to come."""
        if hasattr(self, "_batches"):
            self._forget()
        super().zero_grad(set_to_none)

    def _close(self, closure: Callable[[], Tensor]) -> Tensor:
        """A step of a closure's loss."""
        if self.group is not None:
            raise ValueError("a closure's gradient is of this process's data alone; with group= use step(x, y).")
        if self.curvature.targets:
            raise TypeError(f"curvature={self.curvature!r} needs the targets, which a closure does not tell; use step(x, y).")
        self.weights.check()
        own, seen = self.weights.own(), []
        before = captured(self._called, closure, seen)
        if not isinstance(before, Tensor) or before.numel() != 1:
            raise TypeError(f"the closure returned {_data.describe(before)}; expected its loss, a tensor of one number.")
        if all(p.grad is None for p in own.values()):
            raise RuntimeError(
                "the closure left no gradient on any trained weight; it must call zero_grad(), the net, and backward() on the loss, as for LBFGS."
            )
        if not seen:
            raise RuntimeError(f"the closure did not call {type(self.net).__name__}, so there are no inputs to linearise it at; use step(x, y).")
        self._warn_of_mode()
        saved = {n: p.detach().clone() for n, p in own.items()}
        grads: dict[str, Tensor] = {}

        def back() -> None:
            self.weights.assign(saved)
            for n, p in own.items():
                p.grad = grads[n]

        def loss(weights: Mapping[str, Tensor] | None) -> float:
            try:
                self.weights.assign(saved if weights is None else weights)
                with torch.enable_grad():
                    return self._mean([(closure().detach().to(self.weights.zero), 1)]) + self._penalty(weights)
            finally:
                back()

        try:
            self._add(Batches(self.linearizer, self.likelihood, self.curvature, [(x, None) for x in seen], self._seed(), self.damping.eigenvalues))
            self._count = int(self._sum([self.weights.zero + self._batches[0].count])[0])
            self.weights.set_grad(self._decay() * self.weights.flat(), add=True)
            grads.update({n: cast(Tensor, p.grad).clone() for n, p in own.items()})
            self._noise = abs(float(before.detach()))
            return self._take(self._mean([(before.detach().to(self.weights.zero), 1)]) + self._penalty(None), loss)
        finally:
            self._forget()

    # -- one step of given data ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, start: float, loss: Callable[[Mapping[str, Tensor] | None], float]) -> Tensor:
        curved, rates, θ = self._curved, self.weights.spread(self.param_groups, "lr"), self.weights.flat()
        assert curved is not None
        if not math.isfinite(start):
            raise ValueError(f"the loss is {start} at the present weights; look for NaN in the data, or go back to weights where it was finite.")
        gradient = self.weights.gradient()
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"the gradient has {int((~gradient.isfinite()).sum())} NaN or infinite entries though the loss is {start:.4g}; look for a function "
                "without a derivative in the net (a root at 0, the norm of a zero vector)."
            )
        curved.join(self.group)
        curved.settle(gradient, self._decay(), self._count, self.scaling, self._step)
        uneven = bool((rates != rates[0]).any())
        tries, trial, rate, ratio, accepted, λ = 0, math.nan, 0.0, math.nan, False, math.nan
        eps = torch.finfo(self.weights.first.dtype).eps
        while tries < self.damping.tries and not accepted:
            tries += 1
            try:
                proposal = self.damping.propose(curved)
            except NotPositiveDefiniteError as error:
                logger.info("proposal %d: %s", tries, error)
                self.damping.learn(None, math.inf, -math.inf, 0.0)  # type: ignore[arg-type]
                if tries == self.damping.tries:
                    raise ValueError(f"the damped system could not be solved: {error}; raise the damping ({self.damping!r}).") from error
                continue
            if self.momentum is not None and self._step is not None and tries == 1:  # damping does not shorten what is kept of the last step
                proposal = cast(Momentum, self.momentum)(curved, proposal, self._step)
            λ = proposal.damping
            if not bool(proposal.δ.isfinite().all()):
                self.damping.learn(proposal, math.inf, -math.inf, 0.0)
                continue
            δ, bend = rates * proposal.δ, proposal.bend * float(rates[0]) ** 2
            if uneven:
                bend = curved.curvature(δ)
            slope, cosine = float(gradient @ δ), self._cosine(δ)

            along = partial(self._along, loss, θ, δ)
            rate, trial = (1.0, along(1.0)) if self.line_search is None else self.line_search(along, start, slope)
            if rate == 0 and self.damping.uphill > 0:  # no rate lowers the loss, but the whole step may be worth a rise
                rate, trial = 1.0, along(1.0)
            actual = start - trial if math.isfinite(trial) else -math.inf
            full = -(slope + 0.5 * bend)
            predicted = -(rate * slope + 0.5 * rate**2 * bend)
            predicted = max(predicted, full) if rate > 1 else predicted  # beyond its own minimum the quadratic promises nothing
            ratio = actual / predicted if predicted > 0 else math.nan
            accepted = rate > 0 and math.isfinite(trial) and self.damping.accepts(actual, predicted, cosine)
            if not accepted and abs(full) <= 100 * eps * max(self._noise, eps):
                break  # the loss can fall no further in this dtype: nothing to learn from rounding
            self.damping.learn(proposal, (rate or 1.0) * curved.size(δ), actual if rate > 0 else -math.inf, predicted if rate > 0 else full)
            if accepted:
                self._step = rate * δ
                self.weights.assign(self.weights.shaped(θ + self._step))
        else:
            if not accepted:
                warnings.warn(
                    f"the step was rejected {tries} times and the weights stay (loss {start:.4g}, last trial {trial:.4g}, damping {λ:.2g}): raise "
                    "the damping, shrink lr, or stop: the loss may be at its minimum.", stacklevel=4,
                )  # fmt: skip
        self.last = Step(start, trial, λ, rate if accepted else 0.0, ratio, accepted, tries)
        logger.debug("%s", self.last)
        return self.weights.zero + start

    def _along(self, loss: Callable[[Mapping[str, Tensor] | None], float], θ: Tensor, δ: Tensor, α: float) -> float:
        return loss(self.weights.shaped(θ + α * δ))

    def _add(self, batches: Batches) -> None:
        """H of these batches into the step to come."""
        if self._curved is None:
            x, _ = next(iter(batches.data))
            self.linearizer.prepare(x, self.likelihood.rows)
            products = self.damping.products or self.momentum is not None or len(self.param_groups) > 1
            H = self.structure.start(self.linearizer.blocks, self.weights.first)
            self._curved = Curved(H, self.weights.vector.numel, products, diagonal=self.scaling is not None)
        batches.most = self._curved.held_in.columns
        try:
            self._curved.fit(batches)
        except BaseException:
            self._forget()
            raise
        self._batches.append(batches)

    def _forget(self) -> None:
        self._batches, self._curved = [], None

    def _decay(self) -> Tensor:
        return self.weights.spread(self.param_groups, "weight_decay")

    def _penalty(self, weights: Mapping[str, Tensor] | None) -> float:
        if not any(g["weight_decay"] for g in self.param_groups):
            return 0.0
        vector, own = self.weights.vector, self.weights.own() if weights is None else weights
        parts = [t.detach().reshape(-1) for t in own.values()]
        parts = [t[vector.masks[n]] if n in vector.masks else t for n, t in zip(own, parts, strict=True)]
        return 0.5 * float((self._decay() * torch.cat(parts).to(self.weights.zero).square()).sum())

    def _cosine(self, δ: Tensor) -> float:
        if self._step is None:
            return 0.0
        length = float(δ.norm() * self._step.norm())
        return float(δ @ self._step) / length if length > 0 else 0.0

    # -- processes -------------------------------------------------------------------------------------------------

    def _sum(self, tensors: list[Tensor]) -> list[Tensor]:
        return _distributed.all_sum(tensors, self.group)

    def _mean(self, parts: list[tuple[Tensor, int]]) -> float:
        zero = self.weights.zero
        total, count = self._sum([zero + sum(t for t, _ in parts), zero + sum(n for _, n in parts)])
        return float(total / count)

    def _seed(self) -> tuple[int, torch.device] | None:
        if not self.curvature.random:
            return None
        if self.generator is None:
            return int(torch.randint(2**62, ())), self.weights.first.device
        return int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device)), self.generator.device

    def _warn_of_mode(self) -> None:
        if not self.net.training:
            return
        odd = {type(m).__name__ for m in self.net.modules() if m.training and isinstance(m, _OTHERWISE_IN_TRAINING)}
        if odd:
            warnings.warn(
                f"{type(self.net).__name__} is in train mode with {', '.join(sorted(odd))}; Gauss-Newton evaluates it in eval mode (dropout off, "
                "BatchNorm by its running statistics, which do not move). Call net.eval() to silence this.", stacklevel=4,
            )  # fmt: skip

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with what damping, scaling and momentum have learnt; safe to load with ``weights_only=True``."""
        state = super().state_dict()
        state["gauss_newton"] = {
            "damping": self.damping.state_dict(),
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
            "step": self._step,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same arguments stood."""
        own = state_dict.get("gauss_newton")
        if own is None:
            raise ValueError("this state_dict is not of a GaussNewton optimizer: it has no 'gauss_newton'.")
        step = own["step"]
        if step is not None and step.shape != (self.weights.vector.numel,):
            raise ValueError(f"the saved step has {step.numel()} entries, this optimizer trains {self.weights.vector.numel} weights.")
        self.damping.load_state_dict(own["damping"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "gauss_newton"})
        if self.scaling is not None and own["scaling"] is not None:
            self.scaling.load_state_dict(own["scaling"])
        self._step = None if step is None else step.to(self.weights.zero)

    def __repr__(self) -> str:
        options = [f"{self.curvature!r}", f"{self.structure!r}", f"{self.damping!r}"]
        options += [f"{k}={v!r}" for k in ("line_search", "momentum", "scaling") if (v := getattr(self, k)) is not None]
        return f"GaussNewton({self.weights.vector.numel} weights, {', '.join(options)})"
