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


R = tensor([1.0, 0.3], [0.3, 0.5])
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
