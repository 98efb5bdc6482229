"""Models p(f): what was believed about functions before the data, and what is believed after."""

from bayesgn.models.checkpoint import Checkpoint
from bayesgn.models.network import Network
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.posterior import Posterior, StalePosteriorError
from bayesgn.models.subsets import largest_variance, last_layer, magnitude, named, random_subset
from bayesgn.models.weight_prior import WeightPrior

__all__ = [
    "Checkpoint", "Network", "NetworkPosterior", "Posterior", "StalePosteriorError", "WeightPrior",
    "largest_variance", "last_layer", "magnitude", "named", "random_subset",
]  # fmt: skip
