"""Bayes-Newton: one loop for Newton, variational inference, expectation propagation and posterior linearisation."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesgn.inference.ascent import Bar
from bayesgn.inference.step_size import SMALLEST, StepSize, change_of, shortened
from bayesgn.rules import Expansion, Sites

log = logging.getLogger("bayesgn.inference")


@dataclass
class InferenceTrace:
    """What the loop did, step by step; ``plots.evidence_trace(posterior.trace.energy)`` draws it.

    Attributes:
        energy: the log evidence of the rule at the start and after every step, in nats; with batches, after every walk over the data and at the end.
        lr: the step size taken.
        change: how far the marginals moved in a step: means in units of their standard deviations, and these in parts of themselves (largest).
        indefinite: data whose curvature block was indefinite before it was made PSD.
        skipped: data that kept their site because the new one was improper.
        rejected: steps that were tried and taken back before this one, each shorter than the last.
        reason: why it stopped.
        converged: whether it stopped because nothing moved any more.
    """

    energy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    indefinite: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    reason: str = ""
    converged: bool = False

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.lr)

    def __repr__(self) -> str:
        if not self.energy:
            return "InferenceTrace(empty)"
        return f"InferenceTrace({self.steps} steps, log evidence {self.energy[0]:.4g} → {self.energy[-1]:.4g}, {self.reason})"


def bayes_newton(
    model: Any,
    likelihood=None,
    data: Any = None,
    rule: Expansion | None = None,
    steps: int = 100,
    lr: float | str = "auto",
    tol: float = 1e-6,
    batch_size: int | None = None,
    sites: Sites | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Any:
    """The posterior of a model under any likelihood, by repeating a rule until nothing moves.

        belief = start;   repeat:  sites ← (1 − lr) sites + lr rule(likelihood, belief(x), y);   belief ← condition(sites)

    With ``lr="auto"`` a step is whole unless something speaks against it. It is shortened and tried again where the log evidence is not finite,
    where a long step does not raise what the rule's slope is the slope of (the log joint at the mean for Laplace, E_q log p at the covariance as
    it was for variational inference, …; nothing for power EP), and where a long step lowers the variational bound though it went along its natural
    gradient. From step to step it follows how one move makes the next, lr ← lr / (1 − κ) with κ the part of the last move that the next one
    repeats: shorter where moves turn back (κ → −1), longer again where they go on (κ → 1). The log evidence itself may well fall on the way:
    for Laplace and EP it is no bound. A number for ``lr`` is taken as it is, shortened for one step where that would not be finite.

    Interrupted from the keyboard, it returns what it has, with a warning.

    Args:
        model: ``models.GP``, ``models.MarkovGP``, ``models.SparseGP``, ``models.Network`` …; or a posterior, to go on from where it stands (then
            without likelihood and data; the posterior given is left as it is).
        likelihood: p(y|f) with as many latents as the model has.
        data: a pair (x, y), a Dataset or a DataLoader.
        rule: ``rules.Variational()``, ``rules.PowerEP(0.5)``, ``rules.Laplace()`` …; Laplace unless given, or the posterior's own.
        steps: at most so many.
        lr: step size in (0, 1], or ``"auto"``.
        tol: stop when a whole step would move no marginal by more than this, in standard deviations.
        batch_size: data in a step; all unless given.
        sites: where to start; sites that say nothing unless given.
        generator: randomness of batches and of random curvatures.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.

    Returns:
        A posterior to call with new inputs; its ``trace`` says what happened.

    Raises:
        ValueError, TypeError: for data or arguments that cannot be right; FloatingPointError where even small steps end in NaN.

    Example:
        >>> import gpytorch, torch, bayesgn as bgn
        >>> t = torch.linspace(0, 10, 200); counts = torch.poisson(torch.exp(torch.sin(t)))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> posterior = bgn.bayes_newton(bgn.models.MarkovGP(kernel), bgn.likelihoods.Poisson(), (t, counts), rule=bgn.rules.PowerEP(0.5))
        >>> y = posterior.likelihood(posterior(t))
        >>> y.mean.shape
        torch.Size([200, 1])
        >>> bgn.bayes_newton(posterior).trace.converged  # goes on: there is nothing left to do
        True

    Source: Wilkinson, Särkkä and Solin (2023), "Bayes-Newton methods for approximate Bayesian inference with PSD guarantees"; the step size from
    moves, Irons and Tuck (1969), "A version of the Aitken accelerator for computer iteration".
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r}; expected how many steps to take at most, e.g. 100.")
    automatic = isinstance(lr, str) and lr == "auto"
    if not automatic and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr <= 1):
        raise ValueError(f'lr={lr!r}; expected a number in (0, 1], or "auto".')
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}; expected how many data a step takes, at least 1, or None for all.")
    if rule is not None and not isinstance(rule, Expansion):
        raise TypeError(f"rule={rule!r}; expected an expansion with a curvature such as rules.Variational(rules.GaussNewton()).")
    belief = _begin(model, likelihood, data, rule, sites)
    return _run(belief, steps, StepSize(1.0 if automatic else float(lr), automatic), tol, batch_size, generator, progress)


def _begin(model: Any, likelihood, data, rule: Expansion | None, sites: Sites | None) -> Any:
    if hasattr(model, "restart"):
        if likelihood is not None or data is not None:
            raise TypeError(
                f"the first argument is a {type(model).__name__}, which has its likelihood and data; to go on from it leave them out, or pass the "
                "model (posterior.model) with the others to begin anew."
            )
        belief = model.restart(rule)
        return belief if sites is None else belief.with_sites(sites)
    if likelihood is None or data is None:
        raise TypeError(f"bayes_newton needs a likelihood and data (x, y) beside a {type(model).__name__}; only a posterior brings its own.")
    if not hasattr(model, "start"):
        raise TypeError(f"model is a {type(model).__name__}; expected one of bayesgn.models, such as models.GP(kernel), or a posterior.")
    return model.start(likelihood, data, rule, sites)


def _run(belief: Any, steps: int, size: StepSize, tol: float, batch_size: int | None, generator, progress) -> Any:
    """The loop, from a belief that may have come some way already."""
    trace = InferenceTrace(energy=[_energy(belief)])
    if not math.isfinite(trace.energy[0]):
        log.warning("the log evidence is %g at the start", trace.energy[0])
    batches = _Batches(belief, batch_size, generator)
    try:
        with Bar(steps, progress) as bar:
            for _ in range(steps):
                batch = batches.draw()
                belief, stuck = _step(belief, size, batch, batches.walked, generator, trace)
                bar.update()
                if stuck:
                    trace.reason = f"a step of {SMALLEST:g} is still too long"
                    break
                if batches.settled(trace, tol):
                    trace.reason, trace.converged = f"no marginal moves by more than {tol:g} standard deviations", True
                    break
            else:
                trace.reason = f"all {steps} steps were taken"
    except KeyboardInterrupt:
        trace.reason = "interrupted"
    if trace.steps and not batches.walked:  # in the middle of a walk
        trace.energy.append(_energy(belief))
    belief.trace = trace
    _report(belief, trace, size)
    return belief


class _Batches:
    """Which data each step takes, and whether a walk over all of them has moved nothing."""

    def __init__(self, belief: Any, batch_size: int | None, generator) -> None:
        self.num_data, self.generator, self.device = belief.num_data, generator, belief.sites.nat1.device
        self.size = None if batch_size is None or batch_size >= belief.num_data else batch_size
        self.order = torch.empty(0, dtype=torch.long)
        self.worst = math.inf

    def draw(self) -> Tensor | None:
        if self.size is None:
            self.worst = 0.0
            return None
        if not len(self.order):
            device = None if self.generator is None else self.generator.device
            self.order, self.worst = torch.randperm(self.num_data, generator=self.generator, device=device).to(self.device), 0.0
        batch, self.order = self.order[: self.size], self.order[self.size :]
        return batch

    @property
    def walked(self) -> bool:
        """Whether the batch just drawn ends a walk over all data."""
        return not len(self.order)

    def settled(self, trace: InferenceTrace, tol: float) -> bool:
        self.worst = max(self.worst, trace.change[-1] / trace.lr[-1])
        return self.walked and self.worst <= tol


def _step(belief: Any, size: StepSize, batch: Tensor | None, walked: bool, generator, trace: InferenceTrace) -> tuple[Any, bool]:
    """One accepted step, and whether no size was good. The log evidence takes all data, so it is asked for where a walk over them ends."""
    before, rejected, stuck = belief.marginals(batch), 0, False
    lr = size.begin()
    while True:
        new, turn = belief.turn(lr, batch, generator)
        energy, failure, finite = math.nan, None, False
        try:
            energy = _energy(new) if walked else math.nan
            finite = (math.isfinite(energy) or not walked) and bool(new.marginals(batch).mean.isfinite().all())
        except (ValueError, torch.linalg.LinAlgError) as error:  # a matrix that is not finite, or far from PSD
            failure = error
        factor = 0.25
        if finite:
            factor = shortened(belief, new, turn, batch, energy, trace.energy[-1]) if size.automatic else 1.0
        if factor == 1.0:
            break
        if lr <= SMALLEST:
            if not finite:
                raise FloatingPointError(
                    f"the log evidence is {energy} after a step of {lr:g}; before it was {trace.energy[-1]:.6g}. Look at the data's scale and at "
                    "the kernel's hyper-parameters, or take another rule: rules.Laplace(), or curvature=rules.GaussNewton()."
                ) from failure
            stuck = True
            break
        lr, rejected = max(factor * lr, SMALLEST), rejected + 1
        log.debug("step taken back (log evidence %.6g → %.6g); again with %g", trace.energy[-1], energy, lr)
    after = new.marginals(batch)
    trace.change.append(change_of(before, after))
    if walked:
        trace.energy.append(energy)
    trace.lr.append(lr)
    trace.indefinite.append(turn.indefinite)
    trace.skipped.append(turn.skipped)
    trace.rejected.append(rejected)
    size.end(lr, before, after, whole=batch is None)
    return new, stuck


def _energy(belief: Any) -> float:
    with torch.no_grad():
        return float(belief.log_evidence())


def _report(belief: Any, trace: InferenceTrace, size: StepSize) -> None:
    """Says what went wrong, if something did."""
    log.info("%s: %r", belief.rule, trace)
    if trace.reason == "interrupted":
        warnings.warn(f"interrupted after {trace.steps} steps; the posterior is what they made. bgn.bayes_newton(posterior) goes on.", stacklevel=4)
    if not trace.steps:
        return
    if not math.isfinite(trace.energy[-1]):
        warnings.warn(f"the log evidence is {trace.energy[-1]} after {trace.steps} steps; posterior.trace.energy has it after each.", stacklevel=4)
    falls = sum(b < a - 1e-6 * (1 + abs(a)) for a, b in zip(trace.energy, trace.energy[1:]))
    if falls and not size.automatic and (belief.rule.bound or trace.energy[-1] < trace.energy[0]):
        log.warning("the log evidence fell in %d of %d steps; lr='auto' controls the step", falls, trace.steps)
    if any(trace.rejected) and not size.automatic:
        log.warning("%d steps were shortened because a step of %g was not finite", sum(r > 0 for r in trace.rejected), size.lr)
    far = trace.change[-1] / trace.lr[-1]
    if not trace.converged and trace.steps >= 20 and far > 1:
        warnings.warn(
            f"{belief.rule!r} is far from settled after {trace.steps} steps ({trace.reason}): a whole step would still move a marginal by {far:.2g} "
            "standard deviations. posterior.trace has all steps; go on with bgn.bayes_newton(posterior), or try curvature=rules.GaussNewton(), a "
            "smaller power, or a fixed lr.",
            stacklevel=4,
        )
    if trace.skipped[-1]:
        warnings.warn(
            f"{trace.skipped[-1]} data kept their sites in the last step because the new ones were improper (a cavity that is no Gaussian, or a "
            "value that is not finite); posterior.trace.skipped has all steps. Try a smaller power, a smaller lr, or curvature=rules.GaussNewton().",
            stacklevel=4,
        )
