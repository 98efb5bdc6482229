"""Evidence of posteriors made of sites (Gaussian processes): hyper-parameters by the gradient of the energy, sites kept at their fixed point."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from bayesgn.inference.ascent import Bar, maximize
from bayesgn.inference.fixed_point import EvidenceGradient, Settled, evidence_gradient, seeded, settle
from bayesgn.inference.hyperparameters import Hyperparameters, in_double, log_prior
from bayesgn.rules import Sites

log = logging.getLogger("bayesgn.inference")

TURNS = 50  # at most, for the sites of one set of hyper-parameters
FINEST = 1e-6  # standard deviations by which sites that are settled may still move a mean
ACCURACY = 1e-9  # of the evidence, relative
FAR = 4.0  # a hyper-parameter that moved by so many log units …
NO_SLOPE = 1e-7  # nats a log unit: less is none at all
FLAT = 1e-2  # … and whose next two log units change the evidence by less than this many nats has run away


@dataclass
class HyperparameterTrace:
    """What a search for hyper-parameters did, step by step; ``plots.evidence_trace(trace.evidence)`` draws it.

    Attributes:
        evidence: the log evidence of the rule at the start and after every step, in nats.
        log_prior: log p(hyper-parameters) beside it, where priors are registered; else empty. Their sum never falls.
        hyperparameters: by name, in natural units, the values beside it; tensors of more than 50 entries are left out.
        turns: turns of the rule taken in all.
        evaluations: of the evidence and its gradient.
        reason: why it stopped.
        converged: whether it stopped because nothing more was to be gained.
        at_bounds: hyper-parameters that ran away or ended at a bound.

    Example:
        >>> HyperparameterTrace(evidence=[-30.0, -12.5], reason="settled", converged=True)
        HyperparameterTrace(1 steps, log evidence -30 → -12.5, settled)
    """

    evidence: list[float] = field(default_factory=list)
    log_prior: list[float] = field(default_factory=list)
    hyperparameters: dict[str, list[Any]] = field(default_factory=dict)
    turns: int = 0
    evaluations: int = 0
    reason: str = ""
    converged: bool = False
    at_bounds: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max(len(self.evidence) - 1, 0)

    def note(self, values: dict[str, Any], evidence: float, log_prior: float | None) -> None:
        """Add a step."""
        self.evidence.append(evidence)
        for name, value in values.items():
            self.hyperparameters.setdefault(name, []).append(value)
        if log_prior is not None:
            self.log_prior.append(log_prior)

    def __repr__(self) -> str:
        if not self.evidence:
            return "HyperparameterTrace(empty)"
        return f"HyperparameterTrace({self.steps} steps, log evidence {self.evidence[0]:.4g} → {self.evidence[-1]:.4g}, {self.reason})"


def maximize_over_sites(
    posterior: Any,
    steps: int = 100,
    prior: bool = True,
    noise: bool = True,
    tol: float = 1e-6,
    optimizer: Callable | None = None,
    progress: bool | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> HyperparameterTrace:
    """``maximize_evidence`` for a posterior made of sites; see there."""
    from bayesgn.inference import batch_evidence  # late: it brings gpytorch, which networks do without

    in_batches = batch_size is not None and batch_size < posterior.num_data
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected how many data a step takes, at least 1, or None for all.")
    if in_batches and not batch_evidence.serves(posterior):
        raise ValueError(
            f"batch_size={batch_size} is for models.SparseGP under rules.Variational(); this is {type(posterior.model).__name__} under "
            f"{posterior.rule!r}. Leave it out: every evaluation then walks through all data."
        )
    modules = {name: m for name, m, wanted in (("", posterior.model, prior), ("likelihood", posterior.likelihood, noise)) if wanted}
    mean = posterior.marginals().mean
    free = Hyperparameters(modules, float(mean.std()) if mean.numel() > 1 else 1.0)
    if not free.all:
        raise ValueError(
            "there is nothing to tune: every hyper-parameter of the model and the likelihood is frozen (requires_grad_(False)) or excluded by "
            "prior=False, noise=False; unfreeze one."
        )
    with in_double(free.parameters):
        search = Search(posterior, modules, free)
        try:
            if in_batches and batch_size is not None:
                batch_evidence.follow_batches(search, optimizer, steps, batch_size, generator, progress)
            elif optimizer is None:
                _climb(search, steps, tol, progress)
            else:
                _follow(search, optimizer, steps, tol, progress)
        finally:  # also after an interrupt: the best so far
            search.finish()
    posterior.sites = posterior.sites  # what was worked out before the parameters had their dtype again is forgotten
    search.warn()
    return search.trace


class Search:
    """The evidence as a function of z, with sites that follow; the best so far is kept.

    Attributes:
        best: z, the sites there and the objective (evidence plus log prior); None before the first evaluation.
    """

    def __init__(self, posterior: Any, modules: dict[str, nn.Module], free: Hyperparameters) -> None:
        self.posterior, self.modules, self.free, self.trace = posterior, modules, free, HyperparameterTrace()
        self.best: tuple[np.ndarray, Sites, float] | None = None
        self.last: tuple[np.ndarray, Sites, float, float | None] | None = None
        self.start = free.read()
        self.steepest = np.zeros_like(self.start)  # slope seen in each
        self.unsettled = 0.0

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray, None]:
        """Evidence plus log prior and its gradient at z, the sites at their fixed point. Minus infinity where it cannot be worked out."""
        self.free.write(z)
        self.trace.evaluations += 1
        try:
            found, log_p = self.gradient(settled := self.settle(z))
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
            if self.best is None:
                raise
            log.debug("no evidence at %s: %s", z, error)
            return -math.inf, np.full_like(z, np.nan), None
        gradient = self.free.chain(z, found.gradient)
        self.steepest = np.fmax(self.steepest, np.abs(gradient))
        value = found.value + (log_p or 0.0)
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            if self.best is None:
                bad = [name for name, g in zip(self.free.names(), gradient) if not math.isfinite(g)]
                raise FloatingPointError(
                    f"the log evidence is {found.value} at the start" + (f" and its slope is not finite in {', '.join(bad[:5])}" if bad else "")
                    + "; look at the data's scale and at the kernel's hyper-parameters, and run bgn.bayes_newton first."
                )  # fmt: skip
            return -math.inf, gradient, None
        self.last = z.copy(), settled.posterior.sites, found.value, log_p
        return value, gradient, None

    def settle(self, z: np.ndarray) -> Settled:
        """Sites at z, only as good as the step is small: the evidence errs by the square of what they miss."""
        if self.best is None:
            return settle(self._begin(), FINEST, TURNS)
        far = float(np.abs(z - self.best[0]).max())
        return settle(self._begin(), min(max(FINEST, 1e-2 * far), 1e-2), TURNS)

    def _begin(self) -> Any:
        return self.posterior.with_sites(self.posterior.sites if self.best is None else self.best[1])

    def gradient(self, settled: Settled) -> tuple[EvidenceGradient, float | None]:
        """In the parameters as they are stored, with the log prior's."""
        self.trace.turns += settled.turns
        self.unsettled = settled.change if settled.turns >= TURNS else 0.0
        extra = self.log_prior()
        chain = lambda g: float(np.abs(self.free.chain(self.free.read(), g)).max())
        return evidence_gradient(settled.posterior, self.free.parameters, chain, extra), None if extra is None else extra.item()

    def log_prior(self) -> torch.Tensor | None:
        with torch.enable_grad():
            return log_prior(self.modules)

    def accept(self, point: tuple[np.ndarray, float]) -> None:
        """The last evaluation is a step taken."""
        assert self.last is not None
        z, sites, evidence, log_p = self.last
        if self.best is None or point[1] >= self.best[2]:
            self.best = z, sites, point[1]
        self.trace.note(self.free.values(), evidence, log_p)

    def finish(self) -> None:
        """The posterior at the best point, its sites settled."""
        if self.best is None:
            return
        z, sites, _ = self.best
        self.free.write(z)
        try:
            settled = settle(self.posterior.with_sites(sites), 1e-7, TURNS)
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError):
            self.posterior.sites = sites
            return
        self.trace.turns += settled.turns
        self.posterior.sites = settled.posterior.sites
        with torch.no_grad():
            value = float(self.posterior.log_evidence())
        if self.trace.evidence and abs(value - self.trace.evidence[-1]) <= 1e-6 * (1 + abs(value)):
            self.trace.evidence[-1] = value  # to the last digit what posterior.log_evidence() says

    # -- words -----------------------------------------------------------------------------------------------------------

    def runaways(self) -> list[str]:
        """Names of hyper-parameters at a bound, or far from their start where the evidence is flat."""
        assert self.best is not None
        z, sites, value = self.best
        (low, high), out = self.free.limits(), []
        for i, name in enumerate(self.free.names()):
            if z[i] <= low[i] + 1e-9 or z[i] >= high[i] - 1e-9:
                out.append(name)
            elif abs(z[i] - self.start[i]) > FAR:
                further = z.copy()
                further[i] += 2.0 * np.sign(z[i] - self.start[i])
                if self(further)[0] > value - FLAT:
                    out.append(name)
        self.free.write(z)
        return out

    def warn(self) -> None:
        if self.best is None:
            return
        sites, evaluations = self.posterior.sites, self.trace.evaluations
        with in_double(self.free.parameters):
            self.trace.at_bounds = self.runaways()
        self.posterior.sites, self.trace.evaluations = sites, evaluations
        if self.trace.at_bounds:
            names = ", ".join(self.trace.at_bounds[:5]) + (" …" if len(self.trace.at_bounds) > 5 else "")
            warnings.warn(
                f"maximize_evidence: {names} ran away or ended at a bound: the evidence has no optimum inside (trace.hyperparameters has the "
                "values). A lengthscale without end or a variance of nought says that the data show no such variation; freeze it, register "
                "a gpytorch prior or constraint, or leave that part of the kernel out.",
                stacklevel=4,
            )
        blind = [name for name, g in zip(self.free.names(), self.steepest) if 0 < self.trace.evaluations and g < NO_SLOPE]
        if blind and len(blind) <= 5:
            warnings.warn(
                f"maximize_evidence: the evidence does not depend on {', '.join(blind)} near where the search began, so that was left as it was. "
                "A lengthscale far below the distance between inputs does this (or far above their range): start at the scale of the inputs.",
                stacklevel=4,
            )
        if self.unsettled:
            warnings.warn(
                f"maximize_evidence: after {TURNS} turns the sites still moved by {self.unsettled:.1e} standard deviations, so the evidence and its "
                f"gradient are approximate. {self.posterior.rule!r} may have no fixed point here: try curvature=rules.GaussNewton(), a smaller "
                "power, or rules.Variational().",
                stacklevel=4,
            )


def _climb(search: Search, steps: int, tol: float, progress: bool | None) -> None:
    """L-BFGS on the evidence at settled sites."""
    z = search.start
    low, high = search.free.limits()
    _, reason, converged = maximize(search, z, low, high, steps, tol, search.accept, progress, noise=ACCURACY)
    search.trace.reason, search.trace.converged = reason, converged


def _follow(search: Search, make: Callable, steps: int, tol: float, progress: bool | None) -> None:
    """A torch optimizer on the parameters as they are stored, one turn of the rule before every gradient."""
    parameters = search.free.parameters
    made = make(parameters)
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer= gave {type(optimizer).__name__}; expected a torch optimizer, as lambda p: torch.optim.Adam(p, lr=0.1) gives it.")
    current, first = search.posterior.with_sites(search.posterior.sites), True

    def closure() -> torch.Tensor:
        nonlocal current, first
        optimizer.zero_grad()
        search.trace.evaluations += 1
        try:
            new, _ = current.with_sites(current.sites).turn(generator=seeded(current))
            found, log_p = search.gradient(Settled(new, 1, 0.0))
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError):
            if search.best is None:
                raise
            return torch.tensor(math.nan)
        value = found.value + (log_p or 0.0)
        search.steepest = np.fmax(search.steepest, np.abs(search.free.chain(search.free.read(), found.gradient)))
        if math.isfinite(value) and all(bool(g.isfinite().all()) for g in found.gradient):
            current = new
            for p, g in zip(parameters, found.gradient, strict=True):
                p.grad = -g.to(p)
            if first:
                search.last, first = (search.free.read(), new.sites, found.value, log_p), False
                search.accept((search.last[0], value))
            return torch.tensor(-value)
        return torch.tensor(math.nan)

    search.trace.reason = f"all {steps} steps were taken"
    with Bar(steps, progress) as bar:
        for _ in range(steps):
            before, first = search.free.read(), True
            loss = optimizer.step(closure)  # type: ignore[call-overload]
            if first:  # no value: back to the best point, and on with smaller steps
                if search.best is None:
                    raise FloatingPointError("the log evidence or its gradient is not finite at the start; run bgn.bayes_newton first.")
                search.free.write(search.best[0])
                current = current.with_sites(search.best[1])
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
                log.warning("the log evidence is not finite; back to the best point with half the step size")
                continue
            if scheduler is not None:
                scheduler.step(loss) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else scheduler.step()
            bar.update()
            if np.abs(search.free.read() - before).max() <= tol:
                search.trace.reason, search.trace.converged = f"no log hyper-parameter moved by more than {tol:g}", True
                break
        first = True
        closure()
