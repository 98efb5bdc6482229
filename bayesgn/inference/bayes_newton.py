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
from bayesgn.rules import Expansion, Sites

log = logging.getLogger("bayesgn.inference")


@dataclass
class InferenceTrace:
    """What the loop did, step by step; ``plots.evidence_trace(posterior.trace.energy)`` draws it.

    Attributes:
        energy: the log evidence of the rule at the start and after every step, in nats.
        lr: the step size taken.
        change: how far the marginal means moved in a step, in units of their standard deviations (largest).
        indefinite: data whose curvature block was indefinite before it was made PSD.
        skipped: data that kept their site because the new one was improper.
        reason: why it stopped.
        converged: whether it stopped because nothing moved any more.
    """

    energy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    indefinite: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
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
    likelihood,
    data: Any,
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

    Args:
        model: ``models.GP``, ``models.MarkovGP``, ``models.SparseGP`` …
        likelihood: p(y|f) with as many latents as the model has.
        data: a pair (x, y), a Dataset or a DataLoader.
        rule: ``rules.Variational()``, ``rules.PowerEP(0.5)``, ``rules.Laplace()`` …; Laplace unless given.
        steps: at most so many.
        lr: step size in (0, 1], or ``"auto"``: 1, halved whenever the log evidence falls.
        tol: stop when no marginal mean moved by more than this many standard deviations.
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

    Source: Wilkinson, Särkkä and Solin (2023), "Bayes-Newton methods for approximate Bayesian inference with PSD guarantees".
    """
    if steps < 0:
        raise ValueError(f"steps={steps}; expected how many steps to take at most, e.g. 100.")
    automatic = lr == "auto"
    if not automatic and not (isinstance(lr, (int, float)) and 0 < lr <= 1):
        raise ValueError(f'lr={lr!r}; expected a number in (0, 1], or "auto".')
    belief = model.start(likelihood, data, rule, sites)
    return run(belief, steps, 1.0 if automatic else float(lr), automatic, tol, batch_size, generator, progress)


def run(belief: Any, steps: int, lr: float, automatic: bool, tol: float, batch_size: int | None, generator, progress) -> Any:
    """The loop, from a belief that may have come some way already."""
    trace = InferenceTrace(energy=[_energy(belief)])
    order = None
    with Bar(steps, progress) as bar:
        for _ in range(steps):
            batch = None
            if batch_size is not None and batch_size < belief.num_data:
                if order is None or len(order) == 0:
                    device = None if generator is None else generator.device
                    order = torch.randperm(belief.num_data, generator=generator, device=device).to(belief.y.device)
                batch, order = order[:batch_size], order[batch_size:]
            belief, lr, stuck = _step(belief, lr, automatic, batch, generator, trace)
            bar.update()
            if stuck:
                trace.reason = "the log evidence falls at every step size"
                break
            if batch is None and trace.change[-1] <= tol * trace.lr[-1]:
                trace.reason, trace.converged = f"no mean moved by more than {tol:g} standard deviations", True
                break
        else:
            trace.reason = f"all {steps} steps were taken"
    belief.trace = trace
    _report(trace, automatic)
    return belief


SMALLEST = 2.0**-6  # of the automatic step size


def _step(belief: Any, lr: float, automatic: bool, batch: Tensor | None, generator, trace: InferenceTrace):
    """One accepted step, its size, and whether no size was good."""
    before = belief.marginals()
    while True:
        new, turn = belief.turn(lr, batch, generator)
        energy = _energy(new)
        finite = math.isfinite(energy)
        slack = 1e-9 * (1 + abs(trace.energy[-1]))
        if finite and (not automatic or batch is not None or energy >= trace.energy[-1] - slack):
            break
        if lr <= SMALLEST:
            if not finite:
                raise FloatingPointError(
                    f"the log evidence is {energy} after a step of {lr:g}; before it was {trace.energy[-1]:.6g}. Look at the data's scale and at "
                    "the kernel's hyper-parameters, or take rules.Laplace() for a start."
                )
            break  # an energy that is no bound (EP, Laplace) may fall on the way to its fixed point
        lr *= 0.5
    after = new.marginals()
    width = after.cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(1e-300)
    trace.change.append(float(((after.mean - before.mean).abs() / width).max()))
    trace.energy.append(energy)
    trace.lr.append(lr)
    trace.indefinite.append(turn.indefinite)
    trace.skipped.append(turn.skipped)
    return new, lr, False


def _energy(belief: Any) -> float:
    with torch.no_grad():
        return float(belief.log_evidence())


def _report(trace: InferenceTrace, automatic: bool) -> None:
    falls = sum(b < a - 1e-6 * (1 + abs(a)) for a, b in zip(trace.energy, trace.energy[1:]))
    if falls and not automatic:
        log.warning("the log evidence fell in %d of %d steps; lr='auto' halves the step where it does", falls, trace.steps)
    if trace.skipped and trace.skipped[-1]:
        warnings.warn(
            f"{trace.skipped[-1]} data kept their sites in the last step because the new ones were improper (a cavity that is no Gaussian, or a "
            "value that is not finite); posterior.trace.skipped has all steps. Try a smaller power, a smaller lr, or curvature=rules.GaussNewton().",
            stacklevel=4,
        )
