"""Rules (Λ): how the loss at one datum bends. A rule is expansion × curvature."""

from bayesgn._psd import eigabs, eigclip
from bayesgn.likelihoods.cubature import Cubature, GaussHermite, MonteCarloCubature, Unscented
from bayesgn.rules.curvatures import (
    Curvature,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Identity,
    MeanField,
    MonteCarloFisher,
)
from bayesgn.rules.expansions import Expansion, Laplace, Variational
from bayesgn.rules.histories import QuasiNewton, Riemann
from bayesgn.rules.linearization import PosteriorLinearization, PosteriorLinearization2, Taylor
from bayesgn.rules.power_ep import PowerEP
from bayesgn.rules.sites import Marginals, Sites, Turn

__all__ = [
    "Cubature", "Curvature", "EmpiricalFisher", "Exact", "Expansion", "GaussHermite", "GaussNewton", "Identity", "Laplace", "Marginals",
    "MeanField", "MonteCarloCubature", "MonteCarloFisher", "PosteriorLinearization", "PosteriorLinearization2", "PowerEP", "QuasiNewton",
    "Riemann", "Sites", "Taylor", "Turn", "Unscented", "Variational", "eigabs", "eigclip",
]  # fmt: skip
