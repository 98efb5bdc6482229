"""The one list of likelihoods that every contract test runs over: a new family joins by one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats as ss
import torch
import torch.distributions as td

from bayesgn import likelihoods as L

D = torch.float64


@dataclass
class Family:
    name: str
    make: Callable[[], L.Likelihood]
    c: int                                          # latents of a row
    support: str                                    # where one scalar y lives: real, positive, unit, counts, labels (vectors: see `density`)
    oracle: Callable | None = None                  # f [c] -> a frozen scipy distribution of y, where scipy has the family
    density: bool = True                            # False: class weights or smoothing make log_prob a loss
    exact: bool = True                              # False: the GGN is Monte Carlo
    missing: float = float("nan")

    def build(self) -> L.Likelihood:
        return self.make().double()

    def data(self, *batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        f = torch.randn(*batch, self.c, dtype=D, generator=g)
        return f, self.build().sample(f, generator=g).detach()


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D)


def sigma(f):
    return 1 / (1 + np.exp(-f))


def softplus(f):
    return np.logaddexp(0, f)


class ZeroInflatedOracle:
    """scipy's negative binomial with a point mass at zero."""

    dist = None

    def __init__(self, f, r, K):
        m = np.exp(f)
        self.kept, self.counts = m / (K + m), ss.nbinom(r, r / (r + m))

    def pmf(self, y):
        return self.kept * self.counts.pmf(y) + (1 - self.kept) * (np.asarray(y) == 0)

    def logpmf(self, y):
        return np.log(self.pmf(y))

    def mean(self):
        return self.kept * self.counts.mean()

    def var(self):
        return self.kept * (self.counts.var() + self.counts.mean() ** 2) - self.mean() ** 2


def multistage(f, r=None):
    """Probabilities of 0, 1 and the rest from 2 on, counted by enumeration."""
    k = np.arange(400)
    rest = ss.poisson(np.exp(f[2])) if r is None else ss.nbinom(r, r / (r + np.exp(f[2])))
    p = np.concatenate([[sigma(f[0]), sigma(-f[0]) * sigma(f[1])], sigma(-f[0]) * sigma(-f[1]) * rest.pmf(k)])
    return ss.rv_discrete(values=(np.arange(402), p / p.sum()))


R = tensor([1.0, 0.3], [0.3, 0.5])
R3 = tensor([1.0, 0.3, -0.2], [0.3, 0.5, 0.1], [-0.2, 0.1, 0.8])
W32 = tensor([1.0, 0.2], [-0.5, 1.0], [0.3, 0.7])
def demodulated(f, W):                                # y's scipy normal for f = (carriers, modulators)
    D = len(W)
    return ss.norm((f[:D] * (W @ softplus(f[D:]))).sum(), 0.3**0.5)


def network(f, k, d, R, offset):
    return ss.multivariate_normal((f[k:].reshape(d, k) + offset) @ f[:k], R)


normal = lambda f: ss.norm(f[0], 0.7**0.5)
FAMILIES = [
    Family("gaussian", lambda: L.Gaussian(tensor(0.7)), 1, "real", normal),
    Family("gaussian-2", lambda: L.Gaussian(tensor(0.7)), 2, "vector", lambda f: ss.multivariate_normal(f, 0.7)),
    Family("gaussian-each", lambda: L.Gaussian(tensor(0.5, 2.0)), 2, "vector", lambda f: ss.multivariate_normal(f, np.diag([0.5, 2.0]))),
    Family("gaussian-full", lambda: L.Gaussian(R), 2, "vector", lambda f: ss.multivariate_normal(f, R.numpy())),
    Family("heteroscedastic", L.HeteroscedasticGaussian, 2, "real", lambda f: ss.norm(f[0], np.exp(f[1] / 2))),
    Family("heteroscedastic-2", L.HeteroscedasticGaussian, 4, "vector", lambda f: ss.multivariate_normal(f[:2], np.diag(np.exp(f[2:])))),
    Family("categorical", L.Categorical, 4, "labels", lambda f: ss.rv_discrete(values=(np.arange(4), np.exp(f) / np.exp(f).sum())), missing=-100),
    Family("categorical-weights", lambda: L.Categorical(weight=tensor(1.0, 2.0, 0.5)), 3, "labels", density=False, missing=-100),
    Family("categorical-smooth", lambda: L.Categorical(weight=tensor(1.0, 2.0, 0.5), label_smoothing=0.2, ignore_index=255), 3, "labels",
           density=False, missing=255),
    Family("bernoulli", L.Bernoulli, 1, "binary", lambda f: ss.bernoulli(sigma(f[0]))),
    Family("bernoulli-normcdf", lambda: L.Bernoulli(L.NormCDF()), 1, "binary", lambda f: ss.bernoulli(ss.norm.cdf(f[0]))),
    Family("bernoulli-3-labels", L.Bernoulli, 3, "binary"),
    Family("poisson", L.Poisson, 1, "counts", lambda f: ss.poisson(np.exp(f[0]))),
    Family("poisson-exposure", lambda: L.Poisson(tensor(2.0, 0.5)), 2, "counts"),
    Family("negative-binomial", lambda: L.NegativeBinomial(tensor(1.5)), 1, "counts", lambda f: ss.nbinom(1.5, 1.5 / (1.5 + np.exp(f[0])))),
    Family("negative-binomial-2", lambda: L.NegativeBinomial(tensor(1.5, 4.0)), 2, "counts"),
    Family("student-t", lambda: L.StudentT(tensor(5.0), tensor(0.6)), 1, "real", lambda f: ss.t(5.0, f[0], 0.6)),
    Family("student-t-2", lambda: L.StudentT(tensor(5.0, 9.0), tensor(0.6, 1.0)), 2, "real"),
    Family("gamma", lambda: L.Gamma(tensor(2.5)), 1, "positive", lambda f: ss.gamma(2.5, scale=np.exp(f[0]) / 2.5)),
    Family("gamma-2", lambda: L.Gamma(tensor(2.5, 4.0)), 2, "positive"),
    Family("beta", lambda: L.Beta(tensor(6.0)), 1, "unit", lambda f: ss.beta(6 * sigma(f[0]), 6 * sigma(-f[0]))),
    Family("beta-2", lambda: L.Beta(tensor(6.0, 9.0)), 2, "unit"),
    Family("ordinal", lambda: L.Ordinal(tensor(-1.0, 0.2, 1.5)), 1, "labels-4", lambda f: ss.rv_discrete(
        values=(np.arange(4), np.diff(np.concatenate([[0], sigma(np.array([-1.0, 0.2, 1.5]) - f[0]), [1]])))), missing=-100),
    Family("ordinal-two-levels", lambda: L.Ordinal(tensor([0.5])), 1, "labels-2", missing=-100),
    Family("heteroscedastic-softplus", lambda: L.HeteroscedasticGaussian(L.Softplus()), 2, "real", lambda f: ss.norm(f[0], softplus(f[1]))),
    Family("heteroscedastic-softplus-2", lambda: L.HeteroscedasticGaussian(L.Softplus()), 4, "real",
           lambda f: ss.multivariate_normal(f[:2], np.diag(softplus(f[2:]) ** 2))),
    Family("heteroscedastic-student", lambda: L.HeteroscedasticStudentT(tensor(5.0), L.Softplus()), 2, "real",
           lambda f: ss.t(5.0, f[0], softplus(f[1]))),
    Family("heteroscedastic-student-2", lambda: L.HeteroscedasticStudentT(tensor(5.0, 7.0)), 4, "real"),
    Family("multivariate-student", lambda: L.MultivariateStudentT(tensor(5.0), R), 2, "elliptical",
           lambda f: ss.multivariate_t(f, R.numpy(), df=5.0)),
    Family("multivariate-student-each", lambda: L.MultivariateStudentT(tensor(6.0), tensor(0.5, 2.0)), 2, "elliptical",
           lambda f: ss.multivariate_t(f, np.diag([0.5, 2.0]), df=6.0)),
    Family("linked-gaussian", lambda: L.Linked(L.Gaussian(tensor(0.7)), L.Softplus()), 1, "real", lambda f: ss.norm(softplus(f[0]), 0.7**0.5)),
    Family("linked-gaussian-full", lambda: L.Linked(L.Gaussian(R), L.Softplus()), 2, "vector",
           lambda f: ss.multivariate_normal(softplus(f), R.numpy())),
    Family("linked-student", lambda: L.Linked(L.StudentT(tensor(5.0), tensor(0.6)), L.Exp(0.7)), 1, "real",
           lambda f: ss.t(5.0, np.exp(0.7 * f[0]), 0.6)),
    Family("linked-poisson", lambda: L.Linked(L.Poisson(), L.LogSoftplus()), 1, "counts", lambda f: ss.poisson(softplus(f[0]))),
    Family("coregionalisation", lambda: L.LinearCoregionalisation(W32, R3), 2, "vector",
           lambda f: ss.multivariate_normal(W32.numpy() @ f, R3.numpy())),
    Family("regression-network", lambda: L.RegressionNetwork(2, 3, R3, offset=0.1), 8, "vector", lambda f: network(f, 2, 3, R3.numpy(), 0.1)),
    Family("regression-network-1", lambda: L.RegressionNetwork(1, 2, tensor(0.5, 2.0)), 3, "vector",
           lambda f: network(f, 1, 2, np.diag([0.5, 2.0]), 0.0)),
    Family("product", lambda: L.AmplitudeDemodulation(1, tensor(0.3)), 2, "real", lambda f: demodulated(f, np.eye(1))),
    Family("demodulation", lambda: L.AmplitudeDemodulation(2, tensor(0.3)), 4, "real", lambda f: demodulated(f, np.eye(2))),
    Family("matrix-factorisation", lambda: L.NonnegativeMatrixFactorisation(W32.abs(), tensor(0.3)), 5, "real",
           lambda f: demodulated(f, W32.abs().numpy())),
    Family("zero-inflated", lambda: L.ZeroInflatedNegativeBinomial(tensor(1.5), tensor(0.8)), 1, "counts",
           lambda f: ZeroInflatedOracle(f[0], 1.5, 0.8)),
    Family("zero-inflated-2", lambda: L.ZeroInflatedNegativeBinomial(tensor(1.5, 4.0), tensor(0.8)), 2, "counts"),
    Family("multi-stage", L.MultiStage, 3, "counts", multistage),
    Family("multi-stage-negative-binomial", lambda: L.MultiStage(2, L.NegativeBinomial(tensor(1.5))), 3, "counts", lambda f: multistage(f, 1.5)),
    Family("from-normal (KL)", lambda: L.FromDistribution(lambda f: td.Normal(f[..., 0], f[..., 1].exp())), 2, "real",
           lambda f: ss.norm(f[0], np.exp(f[1]))),
    Family("from-gamma (KL)", lambda: L.FromDistribution(lambda f: td.Gamma(f.exp() + 3, 2.0)), 1, "positive"),
    Family("from-bernoulli (enumeration)", lambda: L.FromDistribution(lambda f: td.Bernoulli(logits=f)), 1, "binary",
           lambda f: ss.bernoulli(sigma(f[0]))),
    Family("from-binomial (enumeration)", lambda: L.FromDistribution(lambda f: td.Binomial(5, logits=f)), 2, "counts-5"),
    Family("from-student (Monte Carlo)", lambda: L.FromDistribution(lambda f: td.StudentT(5.0, f[..., 0], 1.0), samples=20_000), 1, "real",
           lambda f: ss.t(5.0, f[0]), exact=False),
]
BY_NAME = {family.name: family for family in FAMILIES}
