"""Hyper-parameters in turns: with refits of H where H does not scale with them, with turns of a rule where the belief is made of sites."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.inference.ascent import maximize
from bayesgn.inference.evidence import (
    Trace,
    in_double,
    limits,
    over_one_curvature,
    read,
    tunable,
    warn_of_bounds,
    write,
)
from bayesgn.inference.fixed_point import settle
from bayesgn.likelihoods.predictives import nodes_of
from bayesgn.models.linearized import LinearizedPosterior
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.stream import Stream
from bayesgn.rules import Laplace, Sites

logger = logging.getLogger("bayesgn.inference")

ROUNDS = 50
TURNS, SETTLED = 50, 1e-7  # of a rule at one set of hyper-parameters: at most so many, until no mean moves by more standard deviations
FEW, STEP, ACCURACY = 8, 1e-3, 1e-9  # hyper-parameters that are differenced, by this much of a log unit; accuracy of the evidence, relative
RAW_BOUND = 25.0  # of a raw (log) parameter: e^25 = 7e10
NODES = 2**16  # quadrature nodes × data evaluated at once


def alternate(
    posterior: NetworkPosterior, steps: int, prior: bool, noise: bool, tol: float, bounds, noise_bounds, data: Any, progress: bool | None
) -> Trace:
    """``maximize_evidence`` with ``data``: over the same H, then the likelihood's other parameters φ, then H anew; until it settles.

        φ ← argmax Σ_n E_{f_n ~ q}[ log p(y_n | f_n; φ) ]

    For Gaussian noise of any form the fixed point of this is the stationary point of the evidence, R = Σ_n (r_n r_nᵀ + J_n Σ J_nᵀ) / n; for
    other likelihoods it is that of variational EM. A turn that would lower the evidence is halved, then given up: it never falls.
    """
    walk = _data.batches(data)
    if not hasattr(walk, "__len__") and iter(walk) is walk:
        raise ValueError("data= is an iterator, which can be walked once; H is refitted several times: pass a DataLoader or tensors.")
    others = [p for p in posterior.likelihood.parameters() if p.requires_grad and all(p is not q for q in posterior.hyperparameters())]
    inside = bool(tunable(posterior, prior, noise))
    if not noise or not others:
        return over_one_curvature(posterior, steps, prior, noise, tol, bounds, noise_bounds, progress)
    refit(posterior, walk)  # also checks that these are the data
    trace = Trace()
    trace.note(posterior)
    trace.reason = f"all {ROUNDS} rounds were taken"
    for _ in range(ROUNDS):
        if inside:
            inner = over_one_curvature(posterior, steps, prior, noise, tol, bounds, noise_bounds, progress)
            trace.at_bounds = inner.at_bounds
            for field in ("evidence", "precision", "noise"):
                getattr(trace, field).extend(getattr(inner, field)[1:])
        old, before = read(others), posterior.log_evidence().item()
        new = expected_maximum(posterior, others, walk, tol)
        kept = posterior.curvature, posterior.statistics
        for halving in range(6):
            write(others, old + 0.5**halving * (new - old))
            refit(posterior, walk)
            if posterior.log_evidence().item() >= before:
                break
        else:
            write(others, old)
            posterior.curvature, posterior.statistics = kept
            posterior._cached = None
            trace.reason, trace.converged = "no further gain from the likelihood's parameters", True
            break
        trace.note(posterior)
        if np.abs(read(others) - old).max() <= max(tol, 1e-5):
            trace.reason, trace.converged = "the likelihood's parameters settled", True
            break
    logger.info("%s after %d steps", trace.reason, trace.steps)
    return trace


def maximize_settled(
    posterior: LinearizedPosterior, steps: int, prior: bool, noise: bool, tol: float, bounds, noise_bounds, progress: bool | None
) -> Trace:
    """``maximize_evidence`` of a linearised network with sites: the evidence at the fixed point of the rule, by L-BFGS in log hyper-parameters.

    Raises:
        ValueError: for an approximate structure under a rule whose energy is not bounded above with it (power EP, …), or nothing to tune.
    """
    if not (posterior.curvature.exact or posterior.rule.bound or isinstance(posterior.rule, Laplace)):
        raise ValueError(
            f"the energy of {posterior.rule!r} takes sites and variances that belong together; with those of {posterior.structure} it may grow "
            "without end. Tune with an exact structure (ggn.Full, ggn.Gram) or under rules.Variational()."
        )
    parameters = tunable(posterior, prior, noise)
    if not parameters:
        raise ValueError("there is nothing to tune: all hyper-parameters are frozen (requires_grad_(False)) or excluded by prior=False, noise=False.")
    trace = Trace()
    with in_double(parameters):
        search = _Settled(posterior, parameters, trace)
        lower, upper = limits(posterior, parameters, bounds, noise_bounds)
        try:
            start = read(parameters)
            _, trace.reason, trace.converged = maximize(search, start, lower, upper, steps, tol, search.accept, progress, noise=ACCURACY)
        finally:  # also after an interrupt: the best so far
            if search.best is not None:
                write(parameters, search.best[0])
                posterior.sites = search.best[1]
    warn_of_bounds(posterior, parameters, trace, lower, upper, bounds, noise_bounds)
    return trace


class _Settled:
    """log p(y) at z with the sites at their fixed point, and its slope: by central differences of just that where there are few
    hyper-parameters, else at fixed sites (which is the same where the evidence is stationary in them, as for VI with the exact curvature)."""

    def __init__(self, posterior: LinearizedPosterior, parameters: list[torch.nn.Parameter], trace: Trace) -> None:
        self.posterior, self.parameters, self.trace = posterior, parameters, trace
        self.best: tuple[np.ndarray, Sites, float] | None = None
        self.last = posterior.sites

    def value(self, z: np.ndarray, sites: Sites) -> tuple[float, LinearizedPosterior]:
        write(self.parameters, z)
        settled = settle(self.posterior.with_sites(sites), SETTLED, TURNS).posterior
        with torch.no_grad():
            return settled.log_evidence().item(), settled

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray, None]:
        value, settled = self.value(z, self.posterior.sites if self.best is None else self.best[1])
        self.last = settled.sites
        if len(z) > FEW:
            with torch.enable_grad():
                found = torch.autograd.grad(settled.log_evidence(), self.parameters, allow_unused=True, materialize_grads=True)
            return value, np.concatenate([g.double().cpu().numpy().reshape(-1) for g in found]), None
        slope = [(self.value(z + h, self.last)[0] - self.value(z - h, self.last)[0]) / (2 * STEP) for h in STEP * np.eye(len(z))]
        write(self.parameters, z)
        return value, np.array(slope), None

    def accept(self, point: tuple[np.ndarray, float]) -> None:
        """The last evaluation is a step taken."""
        z, value = point
        self.best = z.copy(), self.last, value
        write(self.parameters, z)
        self.trace.note(self.posterior, value)


def refit(posterior: NetworkPosterior, data: Any) -> None:
    """H and statistics of a posterior anew, at its present likelihood, in place."""
    posterior.check_fresh()
    # The same draws at every refit, so that random curvatures do not make the evidence jump.
    stream = Stream(posterior.linearizer, posterior.likelihood, posterior.rule, data, torch.Generator().manual_seed(0), False)
    stream.begin()
    curvature = posterior.structure.start(posterior.curvature.blocks, posterior.mean)
    curvature.fit(stream)
    if stream.count != posterior.num_data:
        raise ValueError(
            f"data= holds {stream.count} data but the posterior saw {posterior.num_data}; pass the training data that it was fitted to."
        )
    posterior.curvature, posterior.statistics, posterior._cached = curvature, stream.statistics, None


def expected_maximum(posterior: NetworkPosterior, parameters: list[torch.nn.Parameter], data: Any, tol: float) -> np.ndarray:
    """argmax_φ Σ_n E_q[log p(y_n | f_n; φ)] by quadrature over the marginals of f."""
    likelihood, parts = posterior.likelihood, []
    for x, y in data:
        with torch.no_grad():
            mean, cov = posterior(x).marginals()
            y = likelihood.targets(mean, y.to(mean.device))
            flat = mean.dim() - 1
            parts.append((mean.flatten(0, flat - 1).double(), cov.flatten(0, flat - 1).double(), y.flatten(0, flat - 1)))

    def objective(z: np.ndarray) -> tuple[float, np.ndarray, None]:
        write(parameters, z)
        value, gradient = 0.0, np.zeros_like(z)
        for mean, cov, y in parts:
            for start in range(0, len(mean), size := max(1, NODES // _node_count(mean))):
                here = slice(start, start + size)
                with torch.no_grad():
                    f, log_w = nodes_of(mean[here], cov[here])
                f, w = f.movedim(-2, 0), log_w.movedim(-1, 0).exp()  # [q n c], [q n]
                with torch.enable_grad():
                    term = (w * likelihood.log_prob(f, y[here].expand(len(f), *y[here].shape))).sum()
                    g = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
                value += term.item()
                gradient += np.concatenate([t.double().cpu().numpy().reshape(-1) for t in g])
        return value, gradient, None

    start = read(parameters)
    bound = np.full_like(start, RAW_BOUND)
    try:
        with in_double(parameters):
            new, _, _ = maximize(objective, start, -bound, bound, 50, max(tol, 1e-6), lambda _: None, False)
    finally:
        write(parameters, start)
    return new


def _node_count(mean: Tensor) -> int:
    return nodes_of(mean[:1], torch.eye(mean.shape[-1]).to(mean)[None])[1].shape[-1]
