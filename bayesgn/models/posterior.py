"""What a conditioned model answers: functions, outputs, weights and evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpytorch.distributions import MultivariateNormal


class Posterior(ABC):
    """q(f) after data: what every model's :meth:`condition` gives.

    ``posterior(x)`` is a gpytorch Gaussian over f (function space); ``posterior.likelihood(posterior(x))`` the predictive
    p(y|x), a torch Distribution; ``sample_outputs`` the weight-space view.
    """

    @abstractmethod
    def __call__(self, x: Any) -> MultivariateNormal:
        """The Gaussian over f at inputs x [n …]."""

    @abstractmethod
    def log_evidence(self) -> Tensor:
        """log p(y) in nats, fully normalised, for the data seen; differentiable in hyper-parameters."""

    @abstractmethod
    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Outputs under n draws from the posterior [n_draws n *positions c]."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the posterior, for a safe file."""


class StalePosteriorError(RuntimeError):
    """The net's weights moved since the posterior was made: its curvature belongs to another function."""
