"""Refinement: from a net's posterior to the best Gaussian of its linearised model, never downhill."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgn.ggn.structure import Structure
from bayesgn.inference.ascent import Bar
from bayesgn.inference.bayes_newton import InferenceTrace, bayes_newton
from bayesgn.inference.step_size import StepSize, change_of
from bayesgn.models.linearized import LinearizedPosterior, trained_sites
from bayesgn.models.linearized_data import LinearizedData
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.rules import Curvature, Expansion, Marginals, Sites, Turn, Variational

log = logging.getLogger("bayesgn.inference")

ROUNDING = 1e-4  # standard deviations: what a shorter step gains, its square, is lost in the rounding of a bound summed over data


def refine(
    posterior: WeightPosterior,
    data: Any = None,
    rule: Expansion | None = None,
    structure: Structure | type[Structure] | None = None,
    steps: int = 100,
    lr: float | str = "auto",
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> LinearizedPosterior:
    """The posterior of the linearised net under a rule, from a Laplace (or variational) posterior of the net.

        f_lin(x; θ) = f(x; θ*) + J(x) (θ − θ*),    q(θ) = argmax_q E_q[Σ log p(y_n | f_lin(x_n; θ))] − KL(q ‖ prior)

    The linearised net is a generalised linear model, in which Laplace's Gaussian of the net is only a start: its mean is the mode of the net,
    or where training stopped, and its covariance is a curvature at one point. Under ``rules.Variational()`` the result is the Gaussian with the
    largest variational bound (ELBO), under ``rules.Laplace()`` the mode of the linearised model with the curvature there; every other rule of
    :func:`bayesgn.bayes_newton` serves too. The net, its prior and its likelihood stand as the posterior has them, hyper-parameters as tuned.

    With ``lr="auto"`` no step lowers the bound, whatever the structure. A turn of the rule is tried whole, or as long as the moves before it
    suggest, and halved until the bound is no lower. Under an exact structure, ``Diag`` and ``Layerwise`` a turn is the natural gradient of the
    bound, so that a short one climbs; under ``Kron``, ``LowRank``, … it need not be. Where no length climbs, the covariance stays and the mean
    goes on by itself, along its own gradient; where that has come to rest too, the search ends, and the trace says so. The expectations are
    sums over fixed nodes (the rule's ``cubature``), so that two bounds can be compared to rounding.

    With a number for ``lr`` every step is of that size; the best posterior on the way is returned, with a warning if that was not the last.

    Args:
        posterior: of ``bgn.laplace``, ``bgn.variational`` or ``bgn.bayes_newton`` on a net; it is left as it is.
        data: the training data that it saw: (x, y), a Dataset or a DataLoader, walked once and kept. A posterior of ``bgn.bayes_newton`` or
            ``bgn.refine`` has them: leave them out.
        rule: ``rules.Variational()`` unless given.
        structure: the posterior's own unless given; ``ggn.Diag`` makes it mean-field.
        steps: at most so many.
        lr: a step size in (0, 1], or ``"auto"``.
        tol: stop when a whole step would move no marginal of the data by more than this, in standard deviations.
        generator: randomness of random curvatures.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.

    Returns:
        A posterior of functions and weights; its ``log_evidence()`` is the rule's, and its ``trace`` says what happened.

    Raises:
        TypeError: for what is no posterior of a net, or a rule that is none.
        ValueError: without data, for data that are not as many as the posterior saw, or that cannot be right.
        FloatingPointError: where the bound is finite neither at the start nor after any step.

    Example:
        >>> import torch, bayesgn as bgn
        >>> from bayesgn.inference.refine import refine
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = (x[:, 0] > 0.1).long()
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
        >>> laplace = bgn.laplace(bgn.models.Network(net, structure=bgn.ggn.Kron), bgn.likelihoods.Categorical(), (x, y))
        >>> refined = refine(laplace, (x, y))
        >>> refined.trace.energy == sorted(refined.trace.energy)  # the bound, after every step
        True

    Source: Immer, Korzepa and Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization", sec. 3.3; Khan and Lin
    (2017), "Conjugate-computation variational inference", for the natural gradient.
    """
    rule = Variational() if rule is None else rule
    if not isinstance(rule, Expansion):
        raise TypeError(f"rule={rule!r}; expected an expansion with a curvature such as rules.Variational() or rules.Laplace().")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r}; expected how many steps to take at most, e.g. 100.")
    automatic = isinstance(lr, str) and lr == "auto"
    if not automatic and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr <= 1):
        raise ValueError(f'lr={lr!r}; expected a number in (0, 1], or "auto".')
    belief = _begin(posterior, data, rule, structure)
    if not rule.bound:  # an energy that may well fall on the way
        return bayes_newton(belief, rule=rule, steps=steps, lr=lr, tol=tol, generator=generator, progress=progress)
    if automatic:
        return _Climb(belief, _given(posterior, belief), tol, generator).run(steps, progress)
    return _best(belief, float(lr), steps, tol, generator, progress)


# -- where it begins ---------------------------------------------------------------------------------------------------


def _begin(posterior: Any, data: Any, rule: Expansion, structure: Structure | type[Structure] | None) -> LinearizedPosterior:
    """The linearised model of a posterior's net at its data, with hyper-parameters of its own."""
    if not isinstance(posterior, WeightPosterior):
        raise TypeError(
            f"posterior is a {type(posterior).__name__}; expected the posterior of a net, from bgn.laplace, bgn.variational or bgn.bayes_newton. "
            "For a model that has seen no data, or one of Gaussian processes, use bgn.bayes_newton(model, likelihood, data, rule)."
        )
    if structure is not None:
        structure = structure() if isinstance(structure, type) else structure
        if not isinstance(structure, Structure):
            raise TypeError(f"structure={structure!r}; expected a structure such as ggn.Kron or ggn.LowRank(rank=100).")
    posterior.check_fresh()
    if isinstance(posterior, LinearizedPosterior):
        if data is not None:
            raise TypeError("this posterior has its data; leave them out: refine(posterior). For other data begin anew, with bgn.laplace.")
        if structure is None:
            return posterior.restart(rule)
        seen, sites = posterior.data, posterior.sites._replace(memory=())
        return _linearized(posterior, structure, rule, seen, sites, posterior.shift())
    temperature = getattr(posterior, "temperature", 1.0)
    if temperature != 1.0:
        warnings.warn(f"the posterior is of temperature {temperature:g}; refinement is of the posterior itself, temperature 1.", stacklevel=3)
    if data is None:
        raise ValueError(f"a {type(posterior).__name__} does not keep its data, and refinement needs them: refine(posterior, train_loader).")
    seen = LinearizedData(posterior.linearizer, posterior.likelihood, data)
    _check_seen(posterior, seen)
    with torch.no_grad():
        sites = trained_sites(posterior.likelihood, seen.f, seen.y)
    return _linearized(posterior, posterior.structure if structure is None else structure, rule, seen, sites)


def _given(posterior: WeightPosterior, belief: LinearizedPosterior) -> float:
    """The bound of the Gaussian to be refined, where it can be had: the one around θ* with the covariance of the first sites."""
    return float(belief.bound_at(torch.zeros_like(belief.shift()))) if isinstance(posterior, NetworkPosterior) else -math.inf


def _linearized(
    posterior: WeightPosterior, structure: Structure, rule: Expansion, data: LinearizedData, sites: Sites, shift: Tensor | None = None
) -> LinearizedPosterior:
    likelihood, prior = copy.deepcopy(posterior.likelihood), copy.deepcopy(posterior.prior)
    structure.check_prior(posterior.linearizer.blocks, prior.of(posterior.linearizer.blocks))
    return LinearizedPosterior(posterior.linearizer, structure, likelihood, prior, rule, data, sites, shift)


def _check_seen(posterior: WeightPosterior, data: LinearizedData) -> None:
    """Raise for data that are fewer or more than the posterior saw, and warn of others: a posterior of other data would be refined."""
    if data.count != posterior.num_data:
        raise ValueError(
            f"the posterior saw {posterior.num_data} data but {data.count} came; refinement needs the data that it was made from. Pass the same "
            "loader (without drop_last), or make a posterior of these data first."
        )
    if not isinstance(posterior, NetworkPosterior):
        return
    with torch.no_grad():
        then, now = float(posterior.log_likelihood()), float(posterior.likelihood.log_prob(data.f, data.y).sum())
    if not abs(now - then) <= 1e-2 * (1 + abs(then)):  # bfloat16 nets, and batches of another size, round otherwise
        warnings.warn(
            f"the log likelihood of these data at the net's weights is {now:.6g}, of those that the posterior saw {then:.6g}: they are as many, but "
            "not the same (another set, or augmentation). The result belongs to these.",
            stacklevel=4,
        )


# -- the climb -------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A step that was taken: from a turn of the rule, of size lr, after so many that were not."""

    belief: LinearizedPosterior
    turn: Turn
    energy: float
    lr: float
    rejected: int


class _Climb:
    """Turns of a rule with a bound, each as long as the bound allows.

    Where the net was not at its mode, the Gaussian it came with is not of the sites' family, and may be better than the one of their sites at
    the net's outputs. Then the mean climbs first, until that is made up for.
    """

    def __init__(self, belief: LinearizedPosterior, given: float, tol: float, generator: torch.Generator | None) -> None:
        self.belief, self.given, self.tol, self.generator = belief, given, tol, generator
        self.trace = InferenceTrace(energy=[_bound(belief)])
        self.size = {_turn: StepSize(1.0, True), _mean_turn: StepSize(1.0, True)}
        self.catching_up = self.trace.energy[0] < given
        self.turn = _mean_turn if self.catching_up else _turn
        self.whole: Turn | None = None

    def run(self, steps: int, progress: bool | None) -> LinearizedPosterior:
        trace = self.trace
        if not math.isfinite(trace.energy[0]):
            log.warning("the variational bound is %g at the start", trace.energy[0])
        try:
            with Bar(steps, progress) as bar:
                while trace.steps < steps and not trace.reason:
                    self.step()
                    bar.update()
            trace.reason = trace.reason or f"all {steps} steps were taken"
        except KeyboardInterrupt:
            trace.reason = "interrupted"
            warnings.warn(f"interrupted after {trace.steps} steps; the posterior is what they made. refine(posterior) goes on.", stacklevel=3)
        self.belief.trace = trace
        log.info("%s: %r", self.belief.rule, trace)
        if trace.energy[-1] < self.given - 1e-6 * (1 + abs(self.given)):
            warnings.warn(
                f"the variational bound is {trace.energy[-1]:.6g} after {trace.steps} steps ({trace.reason}) but {self.given:.6g} for the posterior "
                "that was to be refined: the net was far from its mode. Train it further, or go on with refine(posterior).",
                stacklevel=3,
            )
        return self.belief

    def step(self) -> None:
        """One step up, or the reason why there is none."""
        step, far = self.search()
        if step is None and self.catching_up:
            self.catching_up, self.turn = False, _turn
            step, far = self.search()
        if step is None and self.turn is _turn and far > ROUNDING and math.isfinite(self.trace.energy[-1]):
            log.info("no length of a turn raises the bound under %r: the covariance stays, the mean goes on", self.belief.structure)
            self.turn = _mean_turn
            step, far = self.search()
        if step is not None:
            self.take(step)
        elif not math.isfinite(self.trace.energy[-1]):
            raise FloatingPointError(
                f"the variational bound is {self.trace.energy[-1]} at the start and finite after no step. Look at the data's scale, take a larger "
                "prior precision, or refine under rules.Laplace()."
            )
        elif far > ROUNDING:
            self.rest(f"no step raises the bound, not even of the mean by {SHORTEST[_mean_turn]:g} of its turn", False)
        elif self.turn is _turn:
            self.rest("no step raises the bound beyond rounding", True)
        else:
            self.rest(AT_REST, False)

    def search(self) -> tuple[_Step | None, float]:
        """The first of ever shorter steps after which the bound is no lower, and how far a whole one would go, by the last one tried."""
        size, before, last = self.size[self.turn], self.belief.marginals(), self.trace.energy[-1]
        lr, rejected, far = size.begin(), 0, math.inf
        whole = self.whole = self.whole or _turn_of(self.belief, 1.0, self.generator)  # also for the mean alone, if it comes to that
        while True:
            sites = self.turn(self.belief, whole, lr, self.generator)
            new = self.belief.with_sites(sites)
            energy, after = _try(new)
            if after is not None:
                far = change_of(before, after) / lr
                if energy >= last or not math.isfinite(last):
                    return _Step(new, whole, energy, lr, rejected), far
            if lr <= SHORTEST[self.turn] or far <= ROUNDING and lr <= 0.5:
                return None, far
            lr, rejected = max(lr * (0.5 if after is not None else 0.25), SHORTEST[self.turn]), rejected + 1
            log.debug("step taken back (bound %.8g → %.8g); again with %g", last, energy, lr)

    def take(self, step: _Step) -> None:
        trace, before, after = self.trace, self.belief.marginals(), step.belief.marginals()
        self.belief, self.whole = step.belief, None
        self.size[self.turn].end(step.lr, before, after, whole=True)
        trace.energy.append(step.energy)
        trace.lr.append(step.lr)
        trace.change.append(change_of(before, after))
        trace.indefinite.append(step.turn.indefinite)
        trace.skipped.append(step.turn.skipped)
        trace.rejected.append(step.rejected)
        settled = trace.change[-1] / step.lr <= self.tol
        if self.catching_up:
            if settled or step.energy >= self.given:
                self.catching_up, self.turn = False, _turn
        elif settled and self.turn is _turn:
            self.rest(f"no marginal moves by more than {self.tol:g} standard deviations", True)
        elif settled:
            self.rest(AT_REST, False)

    def rest(self, reason: str, converged: bool) -> None:
        self.trace.reason, self.trace.converged = reason, converged


def _turn_of(belief: LinearizedPosterior, lr: float, generator: torch.Generator | None) -> Turn:
    return belief.rule(belief.likelihood, belief.marginals(), belief.y, belief.sites, lr, generator)


def _turn(belief: LinearizedPosterior, whole: Turn, lr: float, generator: torch.Generator | None) -> Sites:
    """Sites after a part of a turn of the rule: a mixture of old and new, unless the curvature blends them in a way of its own."""
    if lr == 1.0:
        return whole.sites
    if type(belief.rule.curvature).blend is not Curvature.blend:
        return _turn_of(belief, lr, generator).sites
    old, new = belief.sites, whole.sites
    return Sites(torch.lerp(old.nat1, new.nat1, lr), torch.lerp(old.nat2, new.nat2, lr), new.memory)


def _mean_turn(belief: LinearizedPosterior, whole: Turn, lr: float, generator: torch.Generator | None) -> Sites:
    """Every site keeps its precision, and so q its covariance: θ̄ ← θ̄ + lr (H + P)⁻¹ ∂ELBO/∂θ̄, which a short enough step climbs."""
    old = belief.sites
    nat1 = old.nat1 + lr * (whole.local.gradient - old.slope_at(belief.marginals().mean))
    return Sites(torch.where(whole.taken[:, None], nat1, old.nat1), old.nat2, old.memory)


def _try(new: LinearizedPosterior) -> tuple[float, Marginals | None]:
    """The bound after a step, and its marginals; None where either is not finite."""
    try:
        energy, after = _bound(new), new.marginals()
    except (ValueError, torch.linalg.LinAlgError):  # a matrix that is not finite, or far from PSD
        return math.nan, None
    return energy, after if math.isfinite(energy) and bool(after.mean.isfinite().all()) else None


def _bound(belief: LinearizedPosterior) -> float:
    with torch.no_grad():
        return float(belief.log_evidence())


# the shortest step tried before a direction counts as one that does not climb
SHORTEST = {_turn: 2.0**-12, _mean_turn: 2.0**-24}
AT_REST = "the mean is at rest, and no turn raises the bound, as structure, curvature and cubature make it"


# -- steps of a given size -------------------------------------------------------------------------------------------


def _best(
    belief: LinearizedPosterior, lr: float, steps: int, tol: float, generator: torch.Generator | None, progress: bool | None
) -> LinearizedPosterior:
    """The posterior with the largest bound among those that steps of one size lead to."""
    trace = InferenceTrace(energy=[_bound(belief)])
    best, top, at = belief, trace.energy[0] if math.isfinite(trace.energy[0]) else -math.inf, 0
    with Bar(steps, progress) as bar:
        for _ in range(steps):
            before = belief.marginals()
            belief, turn = belief.turn(lr, generator=generator)
            bar.update()
            energy, after = _try(belief)
            trace.energy.append(energy)
            trace.lr.append(lr)
            trace.change.append(math.nan if after is None else change_of(before, after))
            trace.indefinite.append(turn.indefinite)
            trace.skipped.append(turn.skipped)
            trace.rejected.append(0)
            if after is None:
                trace.reason = f"the bound is {energy}"
                break
            if energy > top:
                best, top, at = belief, energy, trace.steps
            if trace.change[-1] / lr <= tol:
                trace.reason, trace.converged = f"no marginal moves by more than {tol:g} standard deviations", True
                break
        else:
            trace.reason = f"all {steps} steps were taken"
    end = trace.energy[-1]
    if not end >= top - 1e-6 * (1 + abs(top)):
        warnings.warn(
            f"steps of lr={lr:g} diverge: the variational bound ended at {end:.6g} ({trace.reason}), below {top:.6g} after {at} of {trace.steps} "
            'steps, which is kept; posterior.trace.energy has all. Take lr="auto", whose steps never lower it, or a smaller lr.',
            stacklevel=3,
        )
    if end != top:
        trace.reason += f"; kept the best, after {at}"
    best.trace = trace
    return best


