"""Persistence: posteriors in safe files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from bayesgn.inference.bayes_newton import InferenceTrace
from bayesgn.models import _files


def load(path: str | Path, net: nn.Module, likelihood=None) -> Any:
    """The posterior that ``posterior.save(path)`` wrote, on the net it was made from, or a Gaussian process's on a model with the same kernels.

    The file is safetensors with JSON metadata: it holds H or sites, hyper-parameters, statistics and the names of bayesgn's own
    classes, never code; nothing is unpickled. Predictions and evidence equal the saved posterior's, and it can be tuned
    and conditioned further.

    Args:
        path: the file.
        net: the same net with the same weights; the file holds hashes of them, not the net. For a Gaussian process the model built as before,
            ``models.GP(kernel)``: kernels and means of the same classes and shapes, whose values come from the file. The model is copied.
        likelihood: needed where the likelihood holds code (``FromDistribution``, a class of your own): the same again, whose
            parameters are then set to the saved ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, a newer format, another net or model (saying which names, shapes or values differ), or a
            likelihood that has to be passed.

    Example:
        >>> import tempfile, torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> posterior = bgn.laplace(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = posterior.save(folder + "/p.safetensors")
        ...     again = bgn.load(path, net)
        >>> torch.equal(again(x).variance, posterior(x).variance)
        True
    """
    if _is_gaussian_process(net):
        from bayesgn.models import _gp_files

        posterior, trace = _gp_files.load(path, net, likelihood)
        posterior.trace = None if trace is None else InferenceTrace(**trace)
        return posterior
    return _files.load(path, net, likelihood)


def _is_gaussian_process(model: Any) -> bool:
    # One exists only where its module was imported, and gpytorch with it.
    room = sys.modules.get("bayesgn.models.gaussian_process")
    return room is not None and isinstance(model, room.GaussianProcess)
