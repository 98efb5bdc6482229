"""Rules (Λ): how the loss at one datum bends. A rule is expansion × curvature."""

from bayesgn._psd import eigabs, eigclip
from bayesgn.rules.curvatures import Curvature, EmpiricalFisher, Exact, GaussNewton, MonteCarloFisher
from bayesgn.rules.expansions import Laplace

__all__ = ["Curvature", "EmpiricalFisher", "Exact", "GaussNewton", "Laplace", "MonteCarloFisher", "eigabs", "eigclip"]
