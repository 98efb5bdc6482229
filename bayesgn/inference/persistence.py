"""Persistence: posteriors in safe files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bayesgn.models import _files
from bayesgn.models.network_posterior import NetworkPosterior


def load(path: str | Path, net: nn.Module, likelihood=None) -> NetworkPosterior:
    """The posterior that ``posterior.save(path)`` wrote, on the net it was made from.

    The file is safetensors with JSON metadata: it holds H, hyper-parameters, statistics and the names of bayesgn's own
    classes, never code; nothing is unpickled. Predictions and evidence equal the saved posterior's, and it can be tuned
    and conditioned further.

    Args:
        path: the file.
        net: the same net with the same weights; the file holds hashes of them, not the net.
        likelihood: needed where the likelihood holds code (``FromDistribution``, a class of your own): the same again, whose
            parameters are then set to the saved ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, a newer format, another net (saying which names, shapes or values differ), or a
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
    return _files.load(path, net, likelihood)
