"""Variational inference over the weights of a net, by natural gradients, from a trained or an untrained net."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn._psd import NotPositiveDefiniteError
from bayesgn.inference.training import Epochs
from bayesgn.models.network import Network, check_likelihood
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.stream import callers_level
from bayesgn.models.variational_posterior import VariationalPosterior
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.optim import Draws, Expectation, Reparameterized, Variational
from bayesgn.rules import Curvature

log = logging.getLogger("bayesgn.inference")

SMALLEST = 1e-4  # step of a line search
RESCUES = 5  # returns to the best epoch, each with half the step


@dataclass
class VariationalTrace:
    """The course of :func:`variational`; ``plots.evidence_trace(posterior.trace.elbo)`` draws it.

    Attributes:
        elbo: the bound (at a temperature T, E_q log p − T KL) after every epoch, in nats; where steps are by draws or batches, that of the q
            before it, with E_q log p as the steps met it.
        lr: the step size of every epoch.
        precision, noise: hyper-parameters after every epoch (noise where the likelihood has one).
        rejected: steps that were taken back, by epoch: shortened where the bound is known, returned to the best epoch where it diverged.
        kept: the epoch whose q the posterior is (counted from 1; 0 is the start).
        reason: why it stopped.
        converged: whether it stopped because a whole step no longer raised the bound.
        expectation: by which the steps were taken.
    """

    elbo: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    precision: list[Any] = field(default_factory=list)
    noise: list[Any] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    kept: int = 0
    reason: str = ""
    converged: bool = False
    expectation: Any = None

    def __repr__(self) -> str:
        if not self.elbo:
            return "VariationalTrace(empty)"
        return f"VariationalTrace({len(self.elbo)} epochs, ELBO {self.elbo[0]:.4g} → {self.elbo[-1]:.4g}, epoch {self.kept} kept, {self.reason})"


def variational(
    model: Any,
    likelihood=None,
    data: Any = None,
    epochs: int = 50,
    curvature: Curvature | None = None,
    expectation: Expectation | None = None,
    lr: float | None = None,
    precision_lr: float | None = None,
    momentum: float = 0.0,
    damping: float = 0.0,
    temperature: float | None = None,
    tune: bool = False,
    burn_in: int = 0,
    every: int = 1,
    batch_size: int | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    draws: int = 20,
    tol: float = 1e-8,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> VariationalPosterior:
    """The Gaussian posterior of a net's weights that maximises the variational bound, in any structure of the shared Gauss-Newton matrix.

        ELBO = E_q log p(y|θ) − T · KL(q ‖ prior),      q = N(m, (H/T + P)⁻¹)

    Steps are those of :class:`bayesgn.optim.Variational`, whose table names the methods (VOGGN, VOGN, OGGN, VON, IVON, SLANG) among its
    arguments. It begins at the weights that the net has: train it first, or not. Your net is not touched; the posterior holds a copy.

    Where the expectation needs no draws (``optim.Linearized()``) and a step takes all data, every step is tried before it is taken, so that the
    bound never falls: whole at first, halved until the bound rises. Elsewhere ``lr`` falls by half a cosine from 0.1; a bound that is not
    finite, or falls far below where it began, is caught: the best epoch is restored, the step halved, and the log says so. In the end the best
    epoch's q is kept where the last is worse.

    Interrupted from the keyboard, it returns what it has, with a warning; ``bgn.variational(posterior, data=…)`` goes on.

    Args:
        model: ``models.Network(net, prior, structure)``; or a posterior of a net (of Laplace or of this function), to start from its mean and H.
        likelihood: p(y|f); the posterior's own where one is given.
        data: training data, ``(x, y)``, a Dataset or a DataLoader.
        epochs: walks over the data at most.
        curvature, expectation, precision_lr, momentum, damping, every: of the steps, see :class:`bayesgn.optim.Variational`;
            curvature and expectation are those of the posterior that is gone on from, unless given.
        temperature: T; that of the posterior which is gone on from, 1 otherwise, unless given.
        lr: of the mean (and of H, unless ``precision_lr``), in (0, 1]; constant unless ``scheduler`` is given.
        tune: raise the bound also in prior precision(s) and the likelihood's parameters, after each epoch beyond ``burn_in``.
        batch_size: of a pair of tensors; 64, or all data where the expectation needs no draws, unless given.
        scheduler: a function from the optimizer to a learning-rate scheduler, stepped every epoch.
        draws: of the weights, by which the bound of the posterior is worked out at the end (and the likelihood is tuned).
        tol: stop where a whole step raises the bound by no more than this part of it (only where steps are tried).
        generator: of batches and draws.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.

    Returns:
        A posterior with ``posterior(x)``, ``sample_outputs``, ``log_evidence()`` (the bound) and a ``trace``.

    Raises:
        ValueError, TypeError: for data or arguments that cannot be right; FloatingPointError where even small steps end in NaN.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = (x[:, 0] > 0).float()
        >>> model = bgn.models.Network(torch.nn.Linear(1, 1).eval(), structure=bgn.ggn.Full)
        >>> posterior = bgn.variational(model, bgn.likelihoods.Bernoulli(), (x, y), expectation=bgn.optim.Linearized())
        >>> posterior.trace.converged, posterior.trace.elbo == sorted(posterior.trace.elbo)
        (True, True)

    Source: Khan and Rue (2023), "The Bayesian learning rule"; Immer (2020), "Disentangling the Gauss-Newton method and approximate inference
    for neural networks".
    """
    for name, value, least in (("epochs", epochs, 1), ("burn_in", burn_in, 0), ("draws", draws, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; expected a whole number, at least {least}.")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}; expected a whole number, at least 1, or None.")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise ValueError(f"tol={tol!r}; expected a part of the bound, 0 or more, e.g. 1e-8.")
    if scheduler is not None and not callable(scheduler):
        raise TypeError(f"scheduler={scheduler!r}; expected a function from the optimizer to a scheduler: lambda opt: StepLR(opt, 10).")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r}; expected a torch.Generator: torch.Generator().manual_seed(0).")
    if expectation is None:
        expectation = getattr(getattr(model, "trace", None), "expectation", None) or Draws()
    if curvature is None and isinstance(model, VariationalPosterior) and not isinstance(expectation, Reparameterized):
        curvature = model.rule.curvature
    if data is None:
        raise TypeError("variational needs its data: bgn.variational(model, likelihood, (x, y)), or data=train_loader for a posterior.")
    own, likelihood, start = _begin(model, likelihood)
    check_likelihood(likelihood)
    steady = getattr(expectation, "steady", False)
    walk = Epochs(data, batch_size or (2**62 if steady else 64), generator)
    whole = getattr(data, "dataset", None)
    if hasattr(whole, "__len__") and len(whole) > len(walk):  # type: ignore[arg-type]
        warnings.warn(
            f"the loader gives {len(walk)} of the {len(whole)} data of its dataset (drop_last, a sampler?); the posterior is of those alone, "  # type: ignore[arg-type]
            "and wider than that of all.", stacklevel=callers_level(),
        )  # fmt: skip
    try:
        opt = Variational(
            own, likelihood, len(walk), curvature, expectation, 1.0 if lr is None else lr, precision_lr, momentum, damping,
            getattr(model, "temperature", 1.0) if temperature is None else temperature, every, generator,
        )  # fmt: skip
        run = _Run(opt, walk, tune, burn_in, draws, generator)
        run.begin(start)
        if run.exact and lr is None and scheduler is None:
            _search(run, epochs, tol, progress)
        else:
            _epochs(run, epochs, 0.1 if lr is None else lr, lr is None, scheduler, progress)
        return run.posterior()
    finally:
        for p in own.net.parameters():
            p.grad = None


def _begin(model: Any, likelihood) -> tuple[Network, Any, Any]:
    """A model over a copy of the net, the likelihood, and a posterior to take H from (None: H at the mean)."""
    if isinstance(model, Network):
        if likelihood is None:
            raise TypeError("variational needs a likelihood beside a Network: bgn.variational(model, likelihoods.Categorical(), train_loader).")
        model._warn_of_mode()
        return model.copy(), likelihood, None
    if not isinstance(model, WeightPosterior):
        raise TypeError(f"model is a {type(model).__name__}; expected models.Network(net, ...), or a posterior of one to start from.")
    model.check_fresh()
    try:
        model.structure.check_blend()
    except ValueError as error:
        raise ValueError(f"{error} Here: make models.Network(posterior.net, prior=posterior.prior, structure=...) and start from it.") from None
    start = model if isinstance(model, (NetworkPosterior, VariationalPosterior)) else None
    return Network.of(model), model.likelihood if likelihood is None else likelihood, start


class _Run:
    """The optimizer on its way, its trace, and the best of it."""

    def __init__(self, opt: Variational, walk: Epochs, tune: bool, burn_in: int, draws: int, generator: torch.Generator | None) -> None:
        self.opt, self.walk, self.tune, self.burn_in, self.draws, self.generator = opt, walk, tune, burn_in, draws, generator
        self.trace = VariationalTrace(expectation=opt.expectation)
        self.data = walk.walk if walk.pair is None else _data.batches(walk.pair)  # in one order, to judge by
        self.exact = opt.expectation.steady and len(walk.first_batch()[1]) == len(walk)  # the bound is known after every epoch
        self.best: tuple[float, int, dict[str, Any]] = (-math.inf, 0, {})

    def begin(self, start: Any) -> None:
        if start is None:
            self.opt.begin(self.data)
        else:
            # H is kept at unit noise by some curvatures, whole by others (the empirical Fisher).
            unit = float(start.rule.curvature.scale(start.likelihood) / self.opt.bending.scale(start.likelihood))
            H = start.curvature
            if unit != 1.0:
                H = H.copy()
                H.blend(H.copy(), unit, 0.0)
            self.opt.start(H)
        self.best = -math.inf, 0, self.opt.snapshot()

    def tuned(self) -> None:
        if self.tune and len(self.trace.elbo) >= self.burn_in:
            self.opt.tune(self.data, max(1, self.draws // 4), self.generator)

    def tuned_from(self, now: float) -> float:
        """The bound after tuning; q follows its prior and may lose by it, and then nothing is tuned."""
        if not self.tune or len(self.trace.elbo) < self.burn_in:
            return now
        before = self.opt.snapshot()
        self.tuned()
        value = self.objective()
        if value >= now:
            return value
        self.opt.restore(before)
        return now

    def note(self, elbo: float, lr: float, rejected: int, of: dict[str, Any] | None = None) -> None:
        """An epoch is over; ``of`` is the q that the bound is of, where it is not the present one but the epoch's first."""
        trace, prior, noise = self.trace, self.opt.prior.precision, getattr(self.opt.likelihood, "noise", None)
        trace.elbo.append(elbo)
        trace.lr.append(lr)
        trace.rejected.append(rejected)
        trace.precision.append(prior.detach().tolist())
        if isinstance(noise, Tensor):
            trace.noise.append(noise.detach().tolist())
        trace.kept = len(trace.elbo)
        if elbo > self.best[0]:
            self.best = elbo, len(trace.elbo) - (of is not None), self.opt.snapshot() if of is None else of

    def objective(self) -> float:
        """What the steps climb, by the same draws at every call."""
        return float(self.opt.objective(self.data, self.draws, _fork(self.opt)))

    def posterior(self) -> VariationalPosterior:
        trace = self.trace
        if trace.kept != self.best[1]:
            last, own = self.objective(), self.opt.snapshot()
            self.opt.restore(self.best[2])
            best = self.objective()
            if best > last or not math.isfinite(last):
                trace.kept = self.best[1]
                log.info("epoch %d is kept: its ELBO of %.6g is above the last one's, %.6g", trace.kept, best, last)
            else:
                self.opt.restore(own)
        posterior = self.opt.posterior(self.data, self.draws, _fork(self.opt))
        posterior.trace = trace
        log.info("%r", trace)
        if trace.reason == "interrupted":
            warnings.warn(
                f"interrupted after {len(trace.elbo)} epochs; the posterior is what they made. bgn.variational(posterior, data=…) goes on.",
                stacklevel=callers_level(),
            )
        return posterior


def _fork(opt: Variational) -> torch.Generator:
    """The same draws at every call, so that two beliefs are compared by them."""
    return torch.Generator(opt.mean.device).manual_seed(0)


def _search(run: _Run, epochs: int, tol: float, progress: bool | None) -> None:
    """Whole natural-gradient steps, shortened until the bound rises."""
    opt, trace = run.opt, run.trace
    data, now, lr = list(run.walk), run.objective(), 1.0
    if not math.isfinite(now):
        raise FloatingPointError(f"the ELBO is {now} at the start; look at the data's scale, or train the net first.")
    start, settled, trace.reason = now, opt.snapshot(), f"all {epochs} steps were taken"
    try:
        with _bar(epochs, progress) as bar:
            for _ in range(epochs):
                rejected, better = 0, False
                while lr >= SMALLEST:
                    opt.param_groups[0]["lr"] = lr
                    value = math.nan
                    try:
                        opt.step(data)
                        value = run.objective()
                    except (FloatingPointError, NotPositiveDefiniteError, torch.linalg.LinAlgError) as error:
                        log.info("a step of %g: %s", lr, error)
                    better = value >= now - 1e-12 * (1 + abs(now))
                    if better:
                        break
                    opt.restore(settled)
                    lr, rejected = 0.5 * lr, rejected + 1
                if not better:
                    value = run.tuned_from(now)
                    if value > now + tol * (1 + abs(now)):  # the hyper-parameters may still raise it
                        now, settled, lr = value, opt.snapshot(), 1.0
                        run.note(now, 0.0, rejected)
                        continue
                    trace.reason = f"no step of {SMALLEST:g} or more raises the bound"
                    warnings.warn(
                        f"{trace.reason} of {now:.6g}, after {len(trace.elbo)} steps. The bound is of the net linearised anew at every mean, which a "
                        "step does not foresee unless the net is linear in its weights: take bgn.refine (one linearisation), or optim.Draws().",
                        stacklevel=callers_level(),
                    )
                    break
                value = run.tuned_from(value)
                gain, now = value - now, value
                run.note(now, lr, rejected)
                settled = opt.snapshot()
                bar.update()
                bar.set_postfix_str(f"ELBO {now:.6g}", refresh=False)
                if lr == 1.0 and gain <= tol * (1 + abs(now)):
                    trace.reason, trace.converged = "a whole step no longer raises the bound", True
                    break
                lr = min(1.0, 2 * lr)
    except KeyboardInterrupt:
        opt.restore(settled)  # (in the middle of a step, or of judging it)
        trace.reason = "interrupted"
    if not trace.elbo:
        trace.elbo.append(start)


def _epochs(run: _Run, epochs: int, lr: float, anneal: bool, scheduler, progress: bool | None) -> None:
    """Stochastic steps; the best epoch is returned to where the bound diverges."""
    opt, trace = run.opt, run.trace
    opt.param_groups[0]["lr"] = opt.param_groups[0]["initial_lr"] = lr
    schedule = scheduler(opt) if scheduler is not None else None
    trace.reason, rescued, lost, shrink, floor = f"all {epochs} epochs were taken", 0, 0, 1.0, run.objective()
    try:
        with _bar(epochs, progress) as bar:
            for epoch in range(epochs):
                if schedule is None:
                    opt.param_groups[0]["lr"] = shrink * lr * (0.5 * (1 + math.cos(math.pi * epoch / epochs)) if anneal else 1.0)
                first = opt.snapshot()
                try:
                    value = _epoch(run)
                except (FloatingPointError, NotPositiveDefiniteError, torch.linalg.LinAlgError) as error:
                    log.info("epoch %d: %s", epoch + 1, error)
                    value = math.nan
                if math.isfinite(value) and math.isfinite(floor) and value < floor - 0.5 * abs(floor) - 10:
                    value = run.objective()  # by more draws than the epoch's: one unlucky draw is no divergence
                if not math.isfinite(value) or value < floor - 0.5 * abs(floor) - 10:
                    rescued, lost, shrink = rescued + 1, lost + 1, 0.5 * shrink
                    rate = opt.param_groups[0]["lr"]
                    opt.restore(run.best[2])
                    if schedule is not None:
                        opt.param_groups[0]["lr"] *= 0.5
                        schedule.base_lrs = [0.5 * base for base in getattr(schedule, "base_lrs", [])]  # (of those in closed form)
                    warnings.warn(
                        f"the ELBO diverged in epoch {epoch + 1} (to {value:.4g}, lr {rate:.2g}); epoch {run.best[1]} is restored "
                        "and the step halved. Lower lr, take more draws, or raise damping.", stacklevel=callers_level(),
                    )  # fmt: skip
                    if rescued == RESCUES:
                        trace.reason = f"the ELBO diverged {RESCUES} times"
                        trace.kept = run.best[1]
                        break
                    continue
                run.tuned()
                run.note(value, float(opt.param_groups[0]["lr"]), lost, None if run.exact else first)
                lost = 0
                if schedule is not None:
                    schedule.step()
                bar.update()
                bar.set_postfix_str(f"ELBO {value:.6g}", refresh=False)
        tenth = len(trace.elbo) // 10
        if tenth and trace.reason.startswith("all"):
            rise = sum(trace.elbo[-tenth:]) / tenth - sum(trace.elbo[-2 * tenth : -tenth]) / tenth
            if rise > 1 + 0.01 * abs(trace.elbo[-1]):
                trace.reason += ", and the bound was still rising"
    except KeyboardInterrupt:
        trace.reason = "interrupted"
    if not trace.elbo:
        trace.elbo.append(run.objective())


def _epoch(run: _Run) -> float:
    """One walk; the bound, with E_q log p as the steps met it, and so of the q at its beginning, more or less."""
    opt, walk, total, seen, divergence = run.opt, run.walk, 0.0, 0, float(run.opt.kl())
    for x, y in walk:
        B = _data.len_of(x)
        if not B:
            continue
        total, seen = total + float(opt.step(x, y)) * B, seen + B
    return run.objective() if run.exact else -total * len(walk) / seen - opt.temperature * divergence


def _bar(epochs: int, progress: bool | None):
    from tqdm.auto import tqdm

    return tqdm(total=epochs, desc="variational", unit="epoch", leave=False, delay=0 if progress else 2, disable=progress is False)


__all__ = ["VariationalTrace", "variational"]
