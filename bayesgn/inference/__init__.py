"""Inference: repeat until it settles. Laplace, evidence, tuning, comparison, persistence."""

from bayesgn.inference.compare import Comparison
from bayesgn.inference.evidence import Trace
from bayesgn.inference.mixture import Mixture
from bayesgn.inference.temperature import Tempered, fit_temperature
from bayesgn.inference.training import History
from bayesgn.inference.tuning import Tuning
from bayesgn.inference.variational import VariationalTrace

__all__ = ["Comparison", "History", "Mixture", "Tempered", "Trace", "Tuning", "VariationalTrace", "fit_temperature"]
