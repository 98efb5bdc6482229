"""p(y | f): one file a family. Every likelihood gives log density, gradient, Hessian, GGN with its root, and its predictive."""

from .base import Elementwise, Likelihood, Positive
from .bernoulli import Bernoulli
from .categorical import Categorical
from .config import from_config
from .counts import NegativeBinomial, Poisson
from .from_distribution import FromDistribution
from .gaussian import Gaussian
from .heteroscedastic import HeteroscedasticGaussian
from .links import Logit, NormCDF
from .marginals import marginals
from .ordinal import Ordinal
from .positive import Beta, Gamma
from .predictives import DirichletMatching, LaplaceBridge, MonteCarlo, Probit
from .student_t import StudentT

__all__ = [
    "Bernoulli", "Beta", "Categorical", "DirichletMatching", "Elementwise", "FromDistribution", "Gamma", "Gaussian",
    "HeteroscedasticGaussian", "LaplaceBridge", "Likelihood", "Logit", "MonteCarlo", "NegativeBinomial", "NormCDF", "Ordinal", "Poisson",
    "Positive", "Probit", "StudentT", "from_config", "marginals",
]
