"""p(y | f): one file a family. Every likelihood gives log density, gradient, Hessian, GGN with its root, and its predictive."""

from .adapters import as_likelihood, from_gpytorch
from .base import Elementwise, Likelihood, Positive
from .bernoulli import Bernoulli
from .categorical import Categorical
from .config import from_config
from .counts import NegativeBinomial, Poisson
from .covariance import Covariance
from .demodulation import AmplitudeDemodulation, NonnegativeMatrixFactorisation
from .from_distribution import FromDistribution
from .gaussian import Gaussian
from .gaussian_noise import GaussianNoise
from .heteroscedastic import HeteroscedasticGaussian, HeteroscedasticStudentT
from .linked import Linked
from .links import Exp, Logit, LogSoftplus, NormCDF, Softplus
from .marginals import marginals
from .mixing import LinearCoregionalisation, RegressionNetwork
from .multistage import MultiStage
from .ordinal import Ordinal
from .positive import Beta, Gamma
from .predictives import DirichletMatching, LaplaceBridge, MonteCarlo, Probit
from .student_t import MultivariateStudentT, StudentT
from .zero_inflated import ZeroInflatedNegativeBinomial

__all__ = [
    "AmplitudeDemodulation", "Bernoulli", "Beta", "Categorical", "Covariance", "DirichletMatching", "Elementwise", "Exp",
    "FromDistribution", "Gamma", "Gaussian", "GaussianNoise", "HeteroscedasticGaussian", "HeteroscedasticStudentT", "LaplaceBridge",
    "Likelihood", "LinearCoregionalisation", "Linked", "Logit", "LogSoftplus", "MonteCarlo", "MultiStage", "MultivariateStudentT",
    "NegativeBinomial", "NonnegativeMatrixFactorisation", "NormCDF", "Ordinal", "Poisson", "Positive", "Probit", "RegressionNetwork",
    "Softplus", "StudentT", "ZeroInflatedNegativeBinomial", "as_likelihood", "from_config", "from_gpytorch", "marginals",
]
