"""Nonlinear least squares for any torch residual function."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import FlatFunction
from bayesgn.optim.acceleration import Geodesic
from bayesgn.optim.box import Box
from bayesgn.optim.damping import Damping, LevenbergMarquardt
from bayesgn.optim.fit import Attempt, Fit
from bayesgn.optim.parameter_scaling import FadingMax
from bayesgn.optim.residual_quadratic import DenseQR, ResidualQuadratic, ResidualSolver
from bayesgn.optim.restarts import Restarts
from bayesgn.optim.robust import RobustLoss, Squared
from bayesgn.optim.scaling import Scaling

logger = logging.getLogger("bayesgn.optim")

TRIES = 60  # proposals at one point
POLISH = 20  # undamped steps at the end


class Iteration(NamedTuple):
    """What a callback is given at each linearization.

    Attributes:
        iteration, evaluations: counts so far.
        x: the parameters, as x0 was given.
        cost: there.
        offset: cosine of the residuals with the span of J, 0 at the optimum.
        damping: the object, with what it has learnt.
    """

    iteration: int
    evaluations: int
    x: Any
    cost: float
    offset: float
    damping: Damping


def least_squares(
    residual_fn: Callable[..., Any],
    x0: Any,
    *batch: Any,
    bounds: tuple[Any, Any] | None = None,
    loss: RobustLoss | None = None,
    noise: float | None = None,
    damping: Damping | None = None,
    scaling: Scaling | None = None,
    acceleration: Geodesic | None = None,
    solver: ResidualSolver | None = None,
    restarts: Restarts | None = None,
    max_iterations: int = 2500,
    gtol: float | None = None,
    xtol: float | None = None,
    callback: Callable[[Iteration], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Fit:
    """Fit parameters by nonlinear least squares: Levenberg-Marquardt with geodesic acceleration, unless told otherwise.

        min_x ½ Σ_i C² ρ( (r_i(x)/C)² ),   lower ≤ x ≤ upper;      without a robust loss ½ ‖r(x)‖²

    Derivatives are torch's. float64 is advised: its answers carry up to ten digits; of float32 about three to five can be had, and the log says so.
    Dampings and scalings are copied before use, so that one object serves many fits. They see the cost divided by twice its value at x0:
    a λ or a radius means the same for data in any unit.

    Args:
        residual_fn: (x, *batch) -> residuals: a tensor of any shape, or a tuple of tensors.
        x0: where to start: a tensor, or a mapping, tuple or list of tensors.
        batch: further arguments of residual_fn.
        bounds: (lower, upper), each a number, None or shaped as x0.
        loss: of :mod:`optim.robust`; squares by default.
        noise: variance of the residuals where known (1.0 for standardised ones); estimated from the fit by default.
        damping: :class:`LevenbergMarquardt`, :class:`TrustRegion`, :class:`Dogleg` or :class:`Constant`.
        scaling: :class:`FadingMax` (of JᵀJ's diagonal; the default), :class:`RunningMax`, :class:`Diagonal`, :class:`Unscaled`, :class:`Units`.
        acceleration: :class:`Geodesic` (the default) or :class:`Straight` for none.
        solver: :class:`DenseQR` (the default), :class:`SparseLU` for a known sparsity pattern, :class:`ConjugateGradients` for no J at all.
        restarts: :class:`Restarts`, further runs of which the best is kept.
        max_iterations: linearizations in one run.
        gtol: converged when the residuals' cosine with the span of J (:class:`ConjugateGradients`, :class:`SparseLU`: with any column)
            falls below; eps^0.6 by default.
        xtol: converged when an undamped step moves the parameters by less, relative to their scaled length; eps^0.65 by default.
        callback: called with an :class:`Iteration` at each linearization; what it answers as true ends the fit.
        generator: of perturbed starts and random probes.

    Raises:
        ValueError: residuals or derivatives that are not finite at x0, residuals that do not depend on x, x0 outside the bounds.
        TypeError: x0 or residuals that are not real floating-point tensors.

    Example:
        >>> t = torch.linspace(0, 4, 9, dtype=torch.float64)
        >>> y = 2.5 * torch.exp(-1.3 * t) + 0.01 * torch.cos(40 * t)
        >>> one = torch.ones((), dtype=torch.float64)
        >>> fit = least_squares(lambda b: b["size"] * torch.exp(-b["rate"] * t) - y, {"size": one, "rate": one})
        >>> print(f"{fit.x['rate']:.3f} ± {fit.standard_errors['rate']:.3f}, {fit.success}")
        1.308 ± 0.007, True

    Source: Levenberg (1944); Marquardt (1963); Moré (1978); Nielsen (1999); Transtrum and Sethna (2012).
    """
    function = FlatFunction(residual_fn, x0, *batch)
    start = function.start
    if start.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x0 has dtype {start.dtype}; expected float64 (or float32), in which linear systems can be solved.")
    box = Box.of(bounds, function.tree, start)
    if box is not None:
        box.check(start)
    if not bool(start.isfinite().all()):
        j = int((~start.isfinite()).nonzero()[0])
        raise ValueError(f"x0 is not finite: {function.tree.name(j)} = {float(start[j])}.")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise={noise}; expected the variance of the residuals, a positive number, or None to estimate it.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations}; expected at least one.")
    eps = torch.finfo(start.dtype).eps
    if eps > 1e-10:
        logger.info("x0 is %s: about %d digits can be had; pass float64 for more", start.dtype, max(1, round(-math.log10(eps) * 0.6)))
    run = _Run(
        function, box, loss or Squared(), acceleration or Geodesic(), solver or DenseQR(), max_iterations,
        eps**0.6 if gtol is None else gtol, eps**0.65 if xtol is None else xtol, callback, generator, noise,
    )  # fmt: skip
    # Units of parameters differ by any order of magnitude, so λ must be free to do so, too.
    damping, scaling = damping or LevenbergMarquardt(1e-3, smallest=1e-60, largest=1e60), scaling or FadingMax()
    if restarts is None:
        return run(start, damping, scaling)
    best, attempts, first = None, [], True
    for θ, d, s in restarts.runs(start, damping, scaling, generator):
        try:
            fit = run(θ if box is None else box.clip(θ), d, s)
        except ValueError as error:
            if first:
                raise
            attempts.append(Attempt(math.inf, 0, False, str(error)))
            continue
        first = False
        attempts.append(Attempt(fit.cost, fit.iterations, fit.success, fit.message))
        # A run that did not converge may still have the lowest cost: then it is the one to go on from.
        if best is None or fit.cost < best.cost:
            best = fit
    assert best is not None
    best.attempts = tuple(attempts)
    return best


class _Run(NamedTuple):
    """One run's choices; called with a start."""

    function: FlatFunction
    box: Box | None
    loss: RobustLoss
    acceleration: Geodesic
    solver: ResidualSolver
    max_iterations: int
    gtol: float
    xtol: float
    callback: Callable[[Iteration], Any] | None
    generator: torch.Generator | None
    noise: float | None

    def __call__(self, θ: Tensor, damping: Damping, scaling: Scaling) -> Fit:
        damping, scaling = copy.deepcopy(damping), copy.deepcopy(scaling)
        function = self.function
        began = function.evaluations
        r = function.value(θ)
        if not bool(r.isfinite().all()):
            i = int((~r.isfinite()).nonzero()[0])
            raise ValueError(
                f"{int((~r.isfinite()).sum())} of {len(r)} residuals are not finite at the start (residual {i} is {float(r[i])}); "
                "choose x0 where all are, or check the data for NaN."
            )
        cost = float(self.loss.cost(r))
        unit = math.sqrt(2 * cost) if cost > 0 else 1.0
        lin = function.linearize(θ, r)
        self.solver.check(lin, self.generator)
        try:
            q = self.solver.quadratic(lin, self.loss, unit, self.box, scaling, self.generator)
        except FloatingPointError as error:
            raise ValueError(f"{error} at the start; choose x0 where the residuals are differentiable.") from None
        self._warn_of_idle(q)
        success, message, last = False, "", None
        for iteration in range(self.max_iterations + 1):
            offset = q.offset()
            logger.debug("iteration %d: cost %.10g, offset %.2e, %r", iteration, cost, offset, damping)
            if self.callback is not None:
                x = function.tree.unflatten(q.lin.θ.clone())
                if self.callback(Iteration(iteration, function.evaluations - began, x, cost, offset, damping)):
                    message = "ended by the callback"
                    break
            if cost == 0 or offset <= self.gtol:
                success, message = True, "the gradient is zero" if cost > 0 else "the residuals are zero"
                break
            if iteration == self.max_iterations:
                message = f"max_iterations={iteration} reached: go on with x0=fit.x, or try restarts, a closer start or other units"
                break
            step = self._step(q, damping, scaling, unit, last)
            if step is None:
                success, message = self._at_rest(q, cost, unit)
                break
            last, small, q = step
            cost = float(self.loss.cost(q.lin.value))
            if small and self._settled(q):
                success, message = True, "the steps are zero"
                iteration += 1
                break
        if success:
            q = self._polished(q, scaling, unit)
            cost = float(self.loss.cost(q.lin.value))
        logger.info("least squares: %s after %d iterations, cost %.10g", message, iteration, cost)
        bend = self.loss.bend(q.lin.value)
        active = torch.zeros_like(q.lin.θ, dtype=torch.int8) if self.box is None else self.box.side(q.lin.θ)
        return Fit(
            x=function.tree.unflatten(q.lin.θ.clone()), cost=cost, residual=q.lin.value, gradient=q.lin.rmatvec(bend.slope),
            iterations=iteration, evaluations=function.evaluations - began, success=success, message=message, active=active,
            linearization=q.lin, rank=q.rank(), loss=self.loss, given_noise=self.noise,
            attempts=(Attempt(cost, iteration, success, message),),
        )  # fmt: skip

    def _step(
        self, q: ResidualQuadratic, damping: Damping, scaling: Scaling, unit: float, last: Tensor | None
    ) -> tuple[Tensor, bool, ResidualQuadratic] | None:
        """The accepted step, whether it was small, and the quadratic there; None where no step is."""
        θ, eps = q.lin.θ, torch.finfo(q.lin.θ.dtype).eps
        for _ in range(TRIES if damping.tries > 1 else 1):
            proposal = damping.propose(q)
            δ = self._inside(θ, proposal.δ)
            if not bool(δ.isfinite().all()):
                damping.learn(proposal, 1.0, -math.inf, 1.0)
                continue
            if bool((δ.abs() <= eps * θ.abs()).all()):
                return None  # the parameters cannot move by less
            Jδ = q.matvec(δ)
            length, bend = q.size(δ), float(Jδ.square().sum())
            predicted = -float(q.slope @ δ) - 0.5 * bend
            if 0 <= predicted <= eps * 0.5 * float(q.residual.square().sum()):
                return None  # less than the cost can tell
            δ2 = self.acceleration(q, δ, q.unweighted(Jδ), self.function.value)
            actual, new = -math.inf, None
            if δ2 is not None or damping.tries == 1:
                trial = self._inside(θ, δ if δ2 is None else δ + δ2)
                r = self.function.value(θ + trial)
                actual = float(self.loss.fall(q.lin.value, r)) / unit**2
                actual = actual if math.isfinite(actual) else -math.inf
                cosine = 0.0 if last is None else float((q.scaling * last) @ δ) / max(q.size(last) * length, 1e-300)
                if damping.accepts(actual, predicted, cosine):
                    # The point must have derivatives, too, or the fit would end there.
                    kept = copy.deepcopy(scaling)
                    try:
                        lin = self.function.linearize(θ + trial, r)
                        new = self.solver.quadratic(lin, self.loss, unit, self.box, scaling, self.generator)
                    except FloatingPointError:
                        scaling.load_state_dict(kept.state_dict())
                        actual = -math.inf
            damping.learn(proposal, length, actual, predicted)
            if new is not None:
                return δ, length <= self.xtol * q.size(θ), new
        return None

    def _inside(self, θ: Tensor, δ: Tensor) -> Tensor:
        return δ if self.box is None else self.box.clip(θ + δ) - θ

    def _polished(self, q: ResidualQuadratic, scaling: Scaling, unit: float) -> ResidualQuadratic:
        """Undamped steps while they lower the offset. The cost is flat at its minimum and tells half of the digits; the gradient tells the rest."""
        tol, offset = torch.finfo(q.residual.dtype).eps ** 0.5, q.offset()
        for _ in range(POLISH):
            δ = self._inside(q.lin.θ, q.solve(0.0))
            if offset <= 0.01 * self.gtol or not bool(δ.isfinite().all()) or q.size(δ) > 100 * self.xtol**0.5 * q.size(q.lin.θ):
                break
            r = self.function.value(q.lin.θ + δ)
            if not float(self.loss.fall(q.lin.value, r)) >= -tol * unit**2 * 0.5 * float(q.residual.square().sum()):
                break
            try:
                new = self.solver.quadratic(self.function.linearize(q.lin.θ + δ, r), self.loss, unit, self.box, scaling, self.generator)
            except FloatingPointError:
                break
            if not new.offset() <= 0.9 * offset:
                break
            q, offset = new, new.offset()
        return q

    def _settled(self, q: ResidualQuadratic, tol: float | None = None) -> bool:
        """Whether an undamped step would be negligible; a damped one is small in a narrow valley, too."""
        δ = self._inside(q.lin.θ, q.solve(0.0))
        return bool(δ.isfinite().all()) and q.size(δ) <= (self.xtol if tol is None else tol) * q.size(q.lin.θ)

    def _at_rest(self, q: ResidualQuadratic, cost: float, unit: float) -> tuple[bool, str]:
        """Success and message where no step lowers the cost."""
        eps = torch.finfo(q.lin.θ.dtype).eps
        if cost <= (100 * eps * unit) ** 2 or q.offset() <= self.gtol**0.5 or self._settled(q, self.xtol**0.5):
            return True, "the cost is at its minimum, to rounding"
        return False, (
            f"no step lowers the cost, though its gradient is not zero (offset {q.offset():.1e}): is residual_fn differentiable, free of "
            "randomness, and float64 throughout?"
        )

    def _warn_of_idle(self, q: ResidualQuadratic) -> None:
        idle = (q.diagonal == 0).nonzero().flatten().tolist()
        if idle and len(idle) == len(q.diagonal):
            return  # a flat start: the gradient says so
        if idle:
            names = ", ".join(self.function.tree.name(j) for j in idle[:5]) + (" …" if len(idle) > 5 else "")
            warnings.warn(
                f"{names} {'has' if len(idle) == 1 else 'have'} no effect on the residuals at x0 (a column of J is zero): is it used by residual_fn, "
                "or is x0 a point where its effect vanishes?",
                RuntimeWarning,
                stacklevel=4,
            )
