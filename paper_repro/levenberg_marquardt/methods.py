"""The contestants: each takes a problem and a new net, and tells its losses and seconds until the target is reached."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bayesgn import ggn, optim
from bayesgn.ggn import Structure
from paper_repro.levenberg_marquardt.problems import Problem


@dataclass
class Trace:
    """A training.

    Attributes:
        losses: of Gauss-Newton and first-order methods, before each step and after the last; of L-BFGS, at every evaluation.
        seconds: of the processor (one thread) at which each was known: wall time where nothing else runs.
        reached: the first index with a loss at or below the target, or None.
        accuracy: on held-out data at the end.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reached: int | None = None
    accuracy: float = math.nan

    @property
    def time(self) -> float:
        """Seconds to the target; ∞ where it was not reached."""
        return math.inf if self.reached is None else self.seconds[self.reached]

    @property
    def steps(self) -> float:
        """Iterations (L-BFGS: evaluations) to the target."""
        return math.inf if self.reached is None else self.reached


class _Enough(Exception):
    """The target is reached, the time is over, or the loss is lost."""


class _Watch:
    """Notes losses; says when to stop. ``budget`` is in seconds."""

    def __init__(self, target: float, budget: float, most: int) -> None:
        self.trace, self.target, self.budget, self.most = Trace(), target, budget, most
        self.began = time.process_time()

    def __call__(self, loss: float) -> None:
        now = time.process_time() - self.began
        self.trace.losses.append(loss)
        self.trace.seconds.append(now)
        if loss <= self.target:
            self.trace.reached = len(self.trace.losses) - 1
        if loss <= self.target or now > self.budget or len(self.trace.losses) > self.most or not math.isfinite(loss):
            raise _Enough


Method = Callable[[Problem, nn.Module, _Watch], None]
Options = dict[str, Callable[[], Any]]


def train(method: Method, problem: Problem, seed: int, budget: float, most: int = 100_000, target: float | None = None) -> Trace:
    """One training from the initial weights of ``seed``: until the target, for ``budget`` seconds or ``most`` losses."""
    net = problem.net(seed)
    watch = _Watch(problem.target if target is None else target, budget, most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rejected steps near a minimum
        try:
            method(problem, net, watch)
        except _Enough:
            pass
    watch.trace.accuracy = problem.accuracy(net)
    return watch.trace


def _first_order(make: Callable[[Problem, nn.Module], torch.optim.Optimizer]) -> Method:
    def run(problem: Problem, net: nn.Module, watch: _Watch) -> None:
        opt = make(problem, net)
        while True:
            opt.zero_grad()
            loss = problem.loss(net)
            watch(float(loss.detach()))
            loss.backward()
            opt.step()

    return run


def _lbfgs(line_search: str | None) -> Method:
    def run(problem: Problem, net: nn.Module, watch: _Watch) -> None:
        opt = torch.optim.LBFGS(net.parameters(), max_iter=20, line_search_fn=line_search)

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = problem.loss(net)
            watch(float(loss.detach()))
            loss.backward()
            return loss

        while True:
            opt.step(closure)

    return run


def gauss_newton(options: Options, structure: type[Structure] | Structure | None = None) -> Method:
    """GaussNewton with options that are made anew for each training; the problem's structure unless one is given."""

    def run(problem: Problem, net: nn.Module, watch: _Watch) -> None:
        chosen = problem.structure if structure is None else structure
        opt = optim.GaussNewton(net, problem.likelihood(), structure=chosen, **{name: make() for name, make in options.items()})
        watch(problem.of(float(opt.step(problem.x, problem.y))))
        while True:
            # The loss after a step is known when it is accepted; a rejected step leaves it.
            assert opt.last is not None
            watch(problem.of(opt.last.trial if opt.last.accepted else opt.last.loss))
            opt.step(problem.x, problem.y)

    return run


def _damping(uphill: float = 0.0) -> Callable[[], optim.LevenbergMarquardt]:
    return lambda: optim.LevenbergMarquardt(1e-2, uphill=uphill)


IMPROVED: Options = {
    "damping": _damping(1.0), "scaling": optim.RunningMax, "momentum": optim.Adaptive, "line_search": optim.Backtracking,
}  # fmt: skip


def without(name: str) -> Method:
    """The paper's method with one of its parts left out."""
    options = {k: v for k, v in IMPROVED.items() if k != name}
    if name == "uphill":
        options = {**IMPROVED, "damping": _damping()}
    return gauss_newton(options)


HESSIAN_FREE = ggn.MatrixFree(tol=0.1, iterations=20)  # the products of a step begin at the last one's solution

METHODS: dict[str, Method] = {
    "SGD": _first_order(lambda p, net: torch.optim.SGD(net.parameters(), lr=p.sgd, momentum=0.9)),
    "Adam": _first_order(lambda p, net: torch.optim.Adam(net.parameters(), lr=p.adam)),
    "L-BFGS": _lbfgs(None),
    "L-BFGS, strong Wolfe": _lbfgs("strong_wolfe"),
    "KFAC": gauss_newton({"damping": _damping()}, ggn.Kron),
    "Hessian-free": gauss_newton({"damping": _damping()}, HESSIAN_FREE),
    "LM": gauss_newton({"damping": _damping()}),
    "LM, improved": gauss_newton(IMPROVED),
}

ABLATIONS: dict[str, Method] = {
    "improved": METHODS["LM, improved"],
    "without momentum": without("momentum"),
    "without scaling": without("scaling"),
    "without line search": without("line_search"),
    "without uphill steps": without("uphill"),
    "plain LM": METHODS["LM"],
}
