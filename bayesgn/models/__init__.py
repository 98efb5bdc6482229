"""Models p(f): what was believed about functions before the data, and what is believed after."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bayesgn._extras import quiet_import
from bayesgn.models.checkpoint import Checkpoint
from bayesgn.models.linearized import LinearizedPosterior
from bayesgn.models.network import Network
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.posterior import Posterior, StalePosteriorError
from bayesgn.models.subsets import largest_variance, last_layer, magnitude, named, random_subset
from bayesgn.models.variational_posterior import VariationalPosterior
from bayesgn.models.weight_prior import WeightPrior

if TYPE_CHECKING:
    from bayesgn.models import sde_kernels
    from bayesgn.models.gaussian_process import GaussianProcess
    from bayesgn.models.gp import GP
    from bayesgn.models.gp_posterior import GaussianProcessPosterior
    from bayesgn.models.jacobian_kernel import JacobianKernel, LinearizedMean
    from bayesgn.models.markov_gp import MarkovGP
    from bayesgn.models.pyro_model import PyroModel
    from bayesgn.models.sparse_gp import SparseGP, inducing_points
    from bayesgn.models.sparse_markov_gp import SparseMarkovGP
    from bayesgn.models.spatio_temporal_gp import SpatioTemporalGP
    from bayesgn.models.steady_state import SteadyStateGP

# Gaussian processes bring gpytorch with them, Pyro programs Pyro: imported when first asked for, so that a network costs nothing of it.
_LATE = {
    "GP": "gp",
    "GaussianProcess": "gaussian_process",
    "GaussianProcessPosterior": "gp_posterior",
    "MarkovGP": "markov_gp",
    "SparseGP": "sparse_gp",
    "SparseMarkovGP": "sparse_markov_gp",
    "SteadyStateGP": "steady_state",
    "SpatioTemporalGP": "spatio_temporal_gp",
    "inducing_points": "sparse_gp",
    "JacobianKernel": "jacobian_kernel",
    "LinearizedMean": "jacobian_kernel",
    "PyroModel": "pyro_model",
}

__all__ = [
    "Checkpoint", "GP", "GaussianProcess", "GaussianProcessPosterior", "JacobianKernel", "LinearizedMean", "LinearizedPosterior", "MarkovGP",
    "Network", "NetworkPosterior", "Posterior", "PyroModel", "SparseGP", "SparseMarkovGP", "SpatioTemporalGP", "StalePosteriorError",
    "SteadyStateGP", "VariationalPosterior", "WeightPrior", "inducing_points", "largest_variance", "last_layer", "magnitude", "named",
    "random_subset", "sde_kernels",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATE and name != "sde_kernels":
        raise AttributeError(f"module 'bayesgn.models' has no attribute {name!r}; it has {', '.join(__all__)}")
    with quiet_import():
        module = importlib.import_module(f"bayesgn.models.{_LATE.get(name, name)}")
    value = module if name not in _LATE else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
