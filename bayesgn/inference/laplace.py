"""Laplace's method: one turn of the rule at the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesgn.models.checkpoint import Checkpoint
from bayesgn.models.network import Network
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.rules import Laplace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def laplace(
    model: Network,
    likelihood,
    data: Any,
    rule: Laplace | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    group: ProcessGroup | None = None,
) -> NetworkPosterior:
    """The Gaussian posterior of a trained net, q(θ) = N(θ*, (Σ JᵀΛJ + P)⁻¹).

    Args:
        model: ``models.Network(net, …)`` at its trained (MAP) weights.
        likelihood: p(y|f); its training loss is the one the net was trained with.
        data: the training data: a DataLoader, Dataset, pair (x, y) or batches; walked once (some structures: twice or more).
        rule: ``rules.Laplace(curvature=…)``; the generalised Gauss-Newton matrix unless given.
        generator: randomness of ``MonteCarloFisher``.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.
        checkpoint: a path (or a ``models.Checkpoint`` with a rhythm of its own): an interrupted fit is kept there, and the same
            call again goes on from it and ends with the same numbers.
        group: several processes (``torchrun``) fit together: ``torch.distributed.group.WORLD``, and ``data`` is this process's part of the data
            (``bgn.shard(dataset, group)``). Each gets the posterior of all of them. ``None``: this process alone, with all data.

    Returns:
        A posterior to call with new inputs; see :class:`bayesgn.models.NetworkPosterior`.

    Raises:
        ValueError, TypeError: for data, labels, outputs or shapes that cannot be right, with the value that came.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> posterior = bgn.laplace(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> posterior(x).variance.shape
        torch.Size([20, 1])

    Source: MacKay (1992); Ritter, Botev and Barber (2018); Daxberger et al. (2021), "Laplace redux".
    """
    if not isinstance(model, Network):
        raise TypeError(f"model is a {type(model).__name__}; wrap the net first: models.Network(net).")
    return model.condition(data, likelihood, rule, generator=generator, progress=progress, checkpoint=checkpoint, group=group)
