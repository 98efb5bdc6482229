"""Draws of a network's weights: the functions that they are, and how far chains agree."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn._extras import load_arviz
from bayesgn.models.weight_posterior import check_input

GOOD, BAD = 1.01, 1.05  # R-hat: below the first chains agree, above the second they do not


class Diagnostics(NamedTuple):
    """How well chains agree, and what their draws are worth, for each of several scalars.

    Attributes:
        r_hat: the rank-normalised split R-hat; 1.01 or less where chains have mixed.
        ess: the bulk effective sample size, in independent draws.
    """

    r_hat: Tensor
    ess: Tensor


class Samples:
    """Draws of the weights by ``bayesgn.inference.hmc``, and the functions that they are.

    ``samples(x)`` is f at all draws [s n *positions c], so that ``samples.likelihood(samples(x))`` is the predictive distribution.

    A net is the same function at many weights (hidden units change places and signs), so that chains may differ in the weights and agree in the
    functions. ``r_hat`` and ``ess`` are of the weights; :meth:`diagnose` gives those of functions, which is what predictions need and what
    ``at_data``, the warnings and the repr go by.

    Attributes:
        weights: draws [chains draws p] in the order of ``names``.
        names: the parameters that the weights are.
        likelihood: own copy of p(y|f).
        log_joint: log p(y, θ) of each draw [chains draws], normalised.
        diverging: draws whose trajectory ended in a region that the step size is too large for [chains draws].
        accept: mean acceptance of each chain [chains].
        evaluations: of the log joint and its gradient, warm-up included.
        at_data: diagnostics of functions at some of the training data; None without arviz.
    """

    def __init__(self, target: Any, weights: Tensor, log_joint: Tensor, diverging: Tensor, accept: Tensor, evaluations: int) -> None:
        self.target, self.weights, self.log_joint = target, weights, log_joint
        self.diverging, self.accept, self.evaluations = diverging, accept, evaluations
        self.at_data: Diagnostics | None = None
        self._cached: Diagnostics | None = None

    @property
    def likelihood(self):
        """Own copy of p(y|f)."""
        return self.target.likelihood

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the weights are, in order."""
        return self.target.vector.names

    def __len__(self) -> int:
        """Draws of all chains."""
        return self.weights.shape[0] * self.weights.shape[1]

    # -- weights and functions -----------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Mean of the weights [p] over all draws."""
        return self.weights.flatten(0, 1).mean(0)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the weights [p p] over all draws."""
        return self.weights.flatten(0, 1).mT.cov().reshape(2 * self.weights.shape[-1:])

    def __call__(self, x: Any) -> Tensor:
        """f at x and all draws [s n *positions c], s = chains · draws, one chain after another."""
        check_input(x)
        with torch.no_grad():
            return self.target.outputs(x, self.weights.flatten(0, 1))

    def thinned(self, step: int) -> Samples:
        """Every ``step``-th draw of each chain, for cheaper predictions.

        Raises:
            ValueError: for a step below 1 or longer than a chain.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= self.weights.shape[1]:
            raise ValueError(f"step={step!r}; expected a whole number from 1 to {self.weights.shape[1]}, the draws of a chain.")
        kept = slice(step - 1, None, step)
        new = Samples(self.target, self.weights[:, kept], self.log_joint[:, kept], self.diverging[:, kept], self.accept, self.evaluations)
        new.at_data = self.at_data
        return new

    # -- convergence ---------------------------------------------------------------------------------------------------

    def _of_weights(self) -> Diagnostics:
        if self._cached is None:
            self._cached = diagnose(self.weights)
        return self._cached

    @property
    def r_hat(self) -> Tensor:
        """Rank-normalised split R-hat of each weight [p], by arviz. (A single chain is compared with itself, half with half.)"""
        return self._of_weights().r_hat

    @property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each weight [p], by arviz."""
        return self._of_weights().ess

    def diagnose(self, x: Any) -> Diagnostics:
        """R-hat and effective sample size of the functions at x, each [n *positions c], by arviz (milliseconds for each scalar)."""
        return diagnose(self(x).unflatten(0, self.weights.shape[:2]))

    @property
    def converged(self) -> bool:
        """Whether functions at the data have R-hat ≤ 1.01 and nothing diverged."""
        return self.at_data is not None and float(self.at_data.r_hat.max()) <= GOOD and not bool(self.diverging.any())

    def to_arviz(self) -> Any:
        """An ``arviz.InferenceData``: weights by parameter's name, ``sample_stats``, and the log likelihood of each datum (for ``arviz.loo``)."""
        az = load_arviz()
        chains, draws = self.weights.shape[:2]
        y, target = self.target.y, self.target
        with torch.no_grad():
            log_likelihood = torch.stack([target.log_likelihood(θ) for θ in self.weights.flatten(0, 1)]).unflatten(0, (chains, draws))
        return az.from_dict(
            posterior={name: part.cpu().numpy() for name, part in target.named(self.weights).items()},
            sample_stats={"diverging": self.diverging.cpu().numpy(), "lp": self.log_joint.cpu().numpy()},
            log_likelihood={"y": log_likelihood.cpu().numpy()},
            observed_data={"y": y.cpu().numpy()},
        )

    def __repr__(self) -> str:
        chains, draws, p = self.weights.shape
        said = "convergence unknown: arviz is not installed"
        if self.at_data is not None:
            r_hat, ess = float(self.at_data.r_hat.max()), float(self.at_data.ess.min())
            verdict = "" if r_hat <= GOOD else " (a longer run would do good)" if r_hat <= BAD else " (NOT CONVERGED)"
            said = f"functions: R-hat ≤ {r_hat:.3f}{verdict}, effective draws ≥ {ess:.0f}"
        count = int(self.diverging.sum())
        return f"Samples({chains} chains × {draws} draws of {p} weights; {said}; {count} divergent{' (NOT TO BE TRUSTED)' if count else ''})"


def diagnose(values: Tensor) -> Diagnostics:
    """R-hat and bulk effective sample size of draws [chains draws *shape], each [*shape], by arviz.

    Raises:
        ImportError: without arviz, saying what brings it.
    """
    az = load_arviz()
    if values.shape[0] == 1:  # halves of the one chain, as if they were two
        values = values[:, : 2 * (values.shape[1] // 2)].unflatten(1, (2, -1))[0]
    flat = values.detach().flatten(2).cpu().double().numpy() if values.dim() > 2 else values.detach().cpu().double().numpy()[..., None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of constant or few draws comes out as NaN
        data = az.convert_to_dataset({"v": flat})
        found = [torch.from_numpy(np.atleast_1d(np.asarray(of(data)["v"].values))) for of in (az.rhat, az.ess)]
    r_hat, ess = (t.reshape(values.shape[2:]) for t in found)
    return Diagnostics(r_hat, ess)
