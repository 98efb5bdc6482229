"""Inference: repeat until it settles. Laplace, variational, evidence, tuning, comparison, NUTS, persistence."""

from bayesgn.inference.compare import Comparison
from bayesgn.inference.evidence import Trace
from bayesgn.inference.hmc import hmc
from bayesgn.inference.mixture import Mixture
from bayesgn.inference.samples import Samples
from bayesgn.inference.temperature import Tempered, fit_temperature
from bayesgn.inference.training import History
from bayesgn.inference.tuning import Tuning
from bayesgn.inference.variational import VariationalTrace

__all__ = ["Comparison", "History", "Mixture", "Samples", "Tempered", "Trace", "Tuning", "VariationalTrace", "fit_temperature", "hmc"]
