"""The prox-linear (modified Gauss-Newton) method for a mean of nonsmooth convex functions of smooth maps, and its stochastic subgradient baseline."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import Tree
from bayesgn.optim.outer import L2Norm, Outer
from bayesgn.optim.prox_solvers import DualAscent, DualNewton, InnerSolver
from bayesgn.optim.prox_subproblem import DenseJacobian, Solution, Subproblem, TermsJacobian

logger = logging.getLogger("bayesgn.optim")

NO_STEP = "no step lowers the loss any further"
Unknowns = Any  # a tensor, or a mapping, tuple or list of tensors


class ProxLinearStep(NamedTuple):
    """One outer iteration of :func:`prox_linear`.

    Attributes:
        value: the loss after it.
        gamma: proximal step γ it was taken with.
        mapping: ‖δ‖/γ, the norm of the prox-gradient mapping.
        gap: duality gap of its subproblem.
        inner: inner iterations, over all tries of γ.
        visits: values and derivative products so far, in passes over the data.
    """

    value: float
    gamma: float
    mapping: float
    gap: float
    inner: int
    visits: float


@dataclass
class ProxLinearFit:
    """What :func:`prox_linear` found.

    Attributes:
        x: the unknowns, in the form of ``x0``.
        value: (1/n) Σ h(c_i(x)).
        gap: duality gap of the last subproblem.
        mapping: ‖δ‖/γ of the last step found, how far from stationary.
        iterations: outer iterations that were accepted.
        converged: whether the tolerance, or the precision of the dtype, was reached.
        message: why it ended.
        history: every accepted iteration.
    """

    x: Unknowns
    value: float
    gap: float
    mapping: float
    iterations: int
    converged: bool
    message: str
    history: list[ProxLinearStep] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"ProxLinearFit(value={self.value:.6g}, mapping={self.mapping:.2g}, {self.iterations} iterations: {self.message})"


def prox_linear(
    c: Callable[..., Tensor],
    x0: Unknowns,
    outer: Outer | None = None,
    batch: tuple[Tensor, ...] = (),
    inner: InnerSolver | None = None,
    jacobian: Callable[..., TermsJacobian] = DenseJacobian,
    gamma: float = 1.0,
    grow: float = 4.0,
    shrink: float = 0.25,
    sufficient: float = 0.1,
    tolerance: float = 1e-8,
    max_iterations: int = 100,
    generator: torch.Generator | None = None,
    callback: Callable[[Unknowns, ProxLinearStep], object] | None = None,
) -> ProxLinearFit:
    """Minimise a mean of convex functions of smooth maps, linearising the maps and keeping the convex functions as they are.

        min_x F(x) = (1/n) Σ_i h(c_i(x));      x ← x + δ,   δ = argmin_δ (1/n) Σ_i h(c_i(x) + J_i δ) + ‖δ‖²/(2γ)

    A step is taken where F falls by ``sufficient`` of the model's decrease, proximal term included; else γ shrinks and the subproblem is solved
    again from the same Jacobian. After a step that fulfils the whole of it, from a subproblem that the inner solver finished, γ grows. Where F
    grows sharply around its minimiser, as without noise, the last phase converges quadratically. The end is reached when ‖δ‖/γ, the norm of the
    prox-gradient mapping, is below the tolerance (with a γ that has grown, ‖δ‖ over the first γ: a stricter test), or when no decrease is left
    to the dtype.

    Args:
        c: ``c(x, *batch)`` → [n k], or [n] for k = 1, n terms of k components, by torch operations.
        x0: start, a floating tensor, or a mapping, tuple or list of them.
        outer: h; :class:`outer.L2Norm` unless given.
        batch: data, with n rows each where Jacobian products take some of them.
        inner: solver of the subproblem; :class:`DualNewton` for a dense Jacobian, :class:`DualAscent` for products, unless given.
        jacobian: :class:`DenseJacobian` or :class:`JacobianProducts`.
        gamma: the first γ, in units of x² / F.
        grow, shrink: factors of γ; ``grow=1`` keeps γ until a step fails.
        sufficient: part of the model's decrease that is asked for.
        tolerance: of ‖δ‖/γ.
        max_iterations: steps at most.
        generator: for inner solvers that draw.
        callback: called with (x, step) after every accepted step.

    Raises:
        ValueError: where the start, or c at it, is not finite or not of the right shape, or c's answer does not depend on x.
        TypeError: where outer, inner or x0 is of another kind.

    Example:
        >>> from bayesgn.optim import outer
        >>> t = torch.linspace(0, 2, 9, dtype=torch.float64)
        >>> y = 3 * torch.exp(-1.5 * t)
        >>> y[4] = 50.0  # an outlier
        >>> fit = prox_linear(lambda x, t, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2, dtype=torch.float64), outer.L2Norm(), (t, y))
        >>> fit.x, fit.converged
        (tensor([3.0000, 1.5000], dtype=torch.float64), True)

    Source: Burke (1985); Drusvyatskiy and Paquette (2019); Pillutla, Roulet, Kakade and Harchaoui (2023), sec. 2, where κ = 1/γ.
    """
    outer = L2Norm() if outer is None else outer
    if not isinstance(outer, Outer):
        raise TypeError(f"prox_linear: outer={outer!r}; expected an optim.outer.Outer such as optim.outer.L2Norm(), or your own heir of it.")
    if inner is None:
        inner = DualNewton() if jacobian is DenseJacobian else DualAscent()
    if not isinstance(inner, InnerSolver):
        raise TypeError(f"prox_linear: inner={inner!r}; expected an instance of optim.DualNewton, optim.DualAscent or optim.SVRG.")
    if not (gamma > 0 and grow >= 1 and 0 < shrink < 1 and 0 < sufficient < 1 and tolerance >= 0):
        raise ValueError(
            f"prox_linear: gamma={gamma}, grow={grow}, shrink={shrink}, sufficient={sufficient}, tolerance={tolerance}; expected "
            "gamma > 0, grow ≥ 1, 0 < shrink < 1, 0 < sufficient < 1, tolerance ≥ 0."
        )
    x, restore = _flat(x0)
    terms = _Terms(c, restore)
    value = terms.at_start(x, batch)
    n = value.shape[0]

    first_gamma = gamma
    loss, gap, mapping, visits = float(outer(value).mean()), float("inf"), float("inf"), 1.0
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"prox_linear: {outer!r} of c(x0) is {loss}; expected a finite number for every finite term.")
    history: list[ProxLinearStep] = []
    multipliers: Tensor | None = None
    eps = torch.finfo(x.dtype).eps
    end = _End(False, f"max_iterations={max_iterations} reached")
    for _ in range(max_iterations):
        J = jacobian(terms, x, batch, value)
        used, ended, promised = 0, None, None
        shaken = _Shaken(J, x)
        while True:
            problem = Subproblem(outer, J, gamma)
            solution = inner.solve(problem, multipliers, generator)
            used, gap = used + solution.iterations, solution.gap
            solved = problem.solved(solution, inner.tolerance) or gap <= shaken.loss(solution)
            length = float(torch.linalg.vector_norm(solution.step))
            mapping, predicted = length / gamma, loss - solution.value
            promised = predicted if promised is None else promised  # by the longest step of this iteration
            # ‖δ − δ*‖² ≤ 2γ gap, as P is 1/γ strongly convex: what the inner solver left open of the mapping.
            unsure = 0.0 if solved else (2 * gap / gamma) ** 0.5
            if (mapping + unsure) * max(1.0, gamma / first_gamma) <= tolerance and promised == predicted:
                ended = _End(True, f"prox-gradient mapping below {tolerance:g}")
            elif predicted <= problem.rounding(solution):
                if solved:
                    ended = _End(True, f"no decrease left to {x.dtype}") if promised == predicted else _End(False, NO_STEP)
                elif gamma < 1e-6 * first_gamma:
                    ended = _End(False, f"the inner solver found no decrease, its gap is {gap:.2g}")
                else:
                    gamma *= shrink  # an easier subproblem
                    promised = None
                    continue
            trial = x + solution.step
            with torch.no_grad():
                trial_value = terms(trial, *batch)
            trial_loss = float(outer(trial_value).mean())
            visits += 1
            falls = trial_loss <= loss - sufficient * predicted and trial_loss < loss  # False for nan
            if falls or ended is not None:
                break
            logger.debug("prox_linear: rejected, loss %g → %g, predicted decrease %g, γ = %g", loss, trial_loss, predicted, gamma)
            if promised <= 1e3 * eps * abs(loss) + shaken.loss(solution):
                ended = _End(True, f"no decrease left to {x.dtype}")
                break
            if length <= 4 * eps * float(torch.linalg.vector_norm(x)) or gamma < 1e-30 * first_gamma:
                ended = _End(False, NO_STEP)
                break
            gamma *= shrink
        visits += J.visits / n
        if falls:  # also the last step, of which the mapping is small
            taken = ProxLinearStep(trial_loss, gamma, mapping, gap, used, visits)
            if solved and trial_loss <= loss - predicted:
                gamma *= grow
            x, value, loss, multipliers = trial, trial_value, trial_loss, solution.multipliers
            history.append(taken)
            if callback is not None:
                callback(restore(x), taken)
        if ended is not None:
            end = ended
            break
    if not end.converged:
        warnings.warn(
            f"prox_linear ended with ‖δ‖/γ = {mapping:.2g}, tolerance={tolerance:g}: {end.message}. The last accepted point is returned; "
            "raise max_iterations or the inner solver's accuracy.",
            stacklevel=2,
        )
    return ProxLinearFit(restore(x), loss, gap, mapping, len(history), end.converged, end.message, history)


def subgradient(
    c: Callable[..., Tensor],
    x0: Unknowns,
    outer: Outer | None = None,
    batch: tuple[Tensor, ...] = (),
    lr: float = 1e-2,
    decay: float = 0.0,
    epochs: int = 100,
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    callback: Callable[[Unknowns, int], object] | None = None,
) -> Unknowns:
    """The stochastic subgradient method on the same problem, the baseline of :func:`prox_linear`.

        x ← x − γ_t v,    v ∈ ∂ (1/|B|) Σ_{i ∈ B} h(c_i(x)),    γ_t = lr / t^decay with t counted in epochs from 1

    Args:
        c, x0, outer, batch: as in :func:`prox_linear`; every tensor of batch has n rows.
        lr: γ of the first epoch.
        decay: 0 for a constant step, ½ or 1 for γ/√t or γ/t.
        epochs: passes over the data, in random order.
        batch_size: data a step.
        generator: for the order.
        callback: called with (x, epoch) after every epoch.

    Returns:
        the last x, in the form of ``x0``; not finite where lr is too large.

    Example:
        >>> t = torch.tensor([1.0, 2.0, 9.0])
        >>> x = subgradient(lambda x, t: x - t, torch.zeros(1), batch=(t,), lr=0.5, decay=1.0, generator=torch.Generator().manual_seed(0))
        >>> (x - 2.0).abs() < 0.1  # the median
        tensor([True])

    Source: Pillutla, Roulet, Kakade and Harchaoui (2023), sec. 2 and 4.
    """
    outer = L2Norm() if outer is None else outer
    x, restore = _flat(x0)
    terms = _Terms(c, restore)
    n = terms.at_start(x, batch).shape[0]
    if not batch or any(b.shape[0] != n for b in batch):
        raise ValueError(f"subgradient: batch holds {[tuple(b.shape) for b in batch]} for {n} terms; expected tensors of {n} rows.")
    for epoch in range(1, epochs + 1):
        step = lr / epoch**decay
        order = torch.randperm(n, generator=generator, device="cpu" if generator is None else generator.device).to(x.device)
        for rows in order.split(batch_size):
            w = x.detach().requires_grad_()
            (v,) = torch.autograd.grad(outer(terms(w, *(b[rows] for b in batch))).mean(), w)
            x = x - step * v
        if callback is not None:
            callback(restore(x), epoch)
    return restore(x)


class _Shaken:
    """How much rounding x shakes the loss: eps J (x ⊙ signs) has the size of what rounding does to c. One product, and only when asked."""

    def __init__(self, J: TermsJacobian, x: Tensor) -> None:
        self.J, self.x = J, x
        self.size: float | None = None

    def loss(self, solution: Solution) -> float:
        if self.size is None:
            signs = torch.where(torch.arange(len(self.x), device=self.x.device) * 0.618034 % 1 < 0.5, 1, -1)  # a pattern of no meaning to J
            self.size = 8 * torch.finfo(self.x.dtype).eps * float(torch.linalg.vector_norm(self.J.forward(self.x * signs)))
        return self.size * float(torch.linalg.vector_norm(solution.multipliers)) / self.J.n


class _End(NamedTuple):
    converged: bool
    message: str


class _Terms:
    """c as a function of the flat unknowns, always [n k]."""

    def __init__(self, c: Callable[..., Tensor], restore: Callable[[Tensor], Unknowns]) -> None:
        self.c, self.restore = c, restore

    def __call__(self, x: Tensor, *batch: Tensor) -> Tensor:
        value = self.c(self.restore(x), *batch)
        return value[:, None] if value.dim() == 1 else value

    def at_start(self, x: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """c(x0), or what is wrong with it."""
        if not isinstance(batch, tuple) or not all(isinstance(b, Tensor) for b in batch):
            raise TypeError(f"batch is {type(batch).__name__}; expected a tuple of tensors, which c gets after x.")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"x0 has {int((~torch.isfinite(x)).sum())} of {x.numel()} entries that are not finite; expected a finite start.")
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.c(self.restore(leaf), *batch)
        if not isinstance(value, Tensor) or value.dim() not in (1, 2) or not value.numel():
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"c(x0, *batch) gave {came}; expected a tensor [n k] of n terms with k components each, or [n].")
        if not value.requires_grad:
            raise ValueError(
                "c(x0, *batch) does not depend on x by torch operations (detach, .item(), numpy, or torch.no_grad inside c?); "
                "expected an answer that can be differentiated."
            )
        if value.dtype != x.dtype:
            raise ValueError(f"c(x0, *batch) is {value.dtype} but x0 is {x.dtype}; give the data and the start one dtype.")
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(-1).sum())
            raise ValueError(f"c(x0, *batch) is not finite in {bad} of {len(value)} terms; start where all are finite, or mend these data.")
        value = value.detach()
        return value[:, None] if value.dim() == 1 else value


def _flat(x0: Unknowns) -> tuple[Tensor, Callable[[Tensor], Unknowns]]:
    """x0 as a vector of its own, and the way back."""
    tree = Tree(x0)
    if len(set(tree.dtypes)) > 1:
        raise ValueError(f"x0 mixes {', '.join(sorted(map(str, set(tree.dtypes))))}; expected one dtype.")
    return tree.flatten(x0), tree.unflatten
