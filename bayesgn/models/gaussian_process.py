"""Gaussian processes as models: what GP, SparseGP, MarkovGP and SparseMarkovGP have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn.likelihoods import Likelihood, as_likelihood
from bayesgn.models.belief import Belief, Solution
from bayesgn.models.gp_posterior import GaussianProcessPosterior
from bayesgn.models.inputs import columns, tensors
from bayesgn.rules import Expansion, Laplace, Marginals, Sites


class GaussianProcess(nn.Module, ABC):
    """p(f) of c independent latent functions, each with a gpytorch kernel; data are met through sites only.

    Args:
        kernel: a gpytorch kernel, or a sequence of kernels, one for each latent function.
        mean: a gpytorch mean (or one for each latent); zero unless given.

    A heir gives four methods on zero-mean functions. Inputs are placed once (:meth:`place`) and used often.
    """

    power = 0.0  # of the rule that makes the sites (set by start): of concern to sparse models, see averaging.py

    def __init__(self, kernel, mean=None) -> None:
        super().__init__()
        several = list(kernel) if isinstance(kernel, (Sequence, nn.ModuleList)) else [kernel]
        if not several:
            raise ValueError("there are 0 kernels; pass one for each latent function.")
        for k in several:
            if not isinstance(k, gpytorch.kernels.Kernel):
                raise TypeError(f"kernel is {_data.describe(k)}; expected a gpytorch kernel such as ScaleKernel(MaternKernel(nu=1.5)), or a list.")
            if k.batch_shape.numel() != 1:
                raise ValueError(f"a kernel has batch shape {list(k.batch_shape)}; pass a list of kernels, one for each latent function.")
        means = list(mean) if isinstance(mean, (Sequence, nn.ModuleList)) else [mean] * len(several) if len(several) == 1 or mean is None else [mean]
        if len(means) != len(several):
            raise ValueError(f"{len(means)} mean function(s) for {len(several)} latent functions; pass a list with one for each (None for zero).")
        for m in means:
            if m is not None and not isinstance(m, gpytorch.means.Mean):
                raise TypeError(f"mean is {_data.describe(m)}; expected a gpytorch mean such as ConstantMean(), or a list of them.")
        self.kernels = nn.ModuleList(several)
        self.means = nn.ModuleList([gpytorch.means.ZeroMean() if m is None else m for m in means])

    @property
    def latents(self) -> int:
        """Latent functions, c."""
        return len(self.kernels)

    # -- what a heir gives: zero-mean functions --------------------------------------------------------------------------

    @abstractmethod
    def place(self, x: Tensor) -> Any:
        """Inputs made ready once: checked, in the widest dtype, sorted …; has ``.x`` [n d] in the order that came."""

    @abstractmethod
    def _solve(self, inputs: Any, nat1: Tensor, nat2: Tensor) -> Solution:
        """log Z and marginals at the data, with a graph to the hyper-parameters."""

    @abstractmethod
    def _predict(self, inputs: Any, nat1: Tensor, nat2: Tensor, x: Tensor) -> Marginals:
        """Marginals at x [m d]."""

    @abstractmethod
    def _joint(self, inputs: Any, nat1: Tensor, nat2: Tensor, x: Tensor) -> Tensor:
        """Joint covariance [m c, m c] at x, data first, then latents."""

    @abstractmethod
    def _draw(self, inputs: Any, nat1: Tensor, nat2: Tensor, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        """Joint draws [n m c] at x."""

    # -- with the mean functions -----------------------------------------------------------------------------------------

    def mean_at(self, x: Tensor) -> Tensor:
        """Prior means [n c] at x [n d]."""
        return torch.stack([m(x).reshape(len(x)).to(x) for m in self.means], -1)

    def solve(self, inputs: Any, sites: Sites) -> Solution:
        """log Z and marginals at the data, differentiable in the hyper-parameters at fixed sites."""
        # f = μ + h: nat1ᵀf − ½ fᵀΛf = (nat1 − Λμ)ᵀh − ½ hᵀΛh + log t(μ)
        μ = self.mean_at(inputs.x)
        log_Z, q = self._solve(inputs, self.shifted(sites, μ), sites.nat2)
        return Solution(log_Z + sites.log_at(μ).sum(), Marginals(q.mean + μ, q.cov))

    def predict(self, inputs: Any, sites: Sites, x: Tensor) -> Marginals:
        """Marginals at x [m d]."""
        q = self._predict(inputs, self.shifted(sites, self.mean_at(inputs.x)), sites.nat2, x)
        return Marginals(q.mean + self.mean_at(x), q.cov)

    def joint(self, inputs: Any, sites: Sites, x: Tensor) -> Tensor:
        """Joint covariance [m c, m c] at x [m d]."""
        return self._joint(inputs, self.shifted(sites, self.mean_at(inputs.x)), sites.nat2, x)

    def draw(self, inputs: Any, sites: Sites, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Joint draws [n m c] at x [m d]."""
        return self._draw(inputs, self.shifted(sites, self.mean_at(inputs.x)), sites.nat2, x, n, generator) + self.mean_at(x)

    @staticmethod
    def shifted(sites: Sites, μ: Tensor) -> Tensor:
        """nat1 [n c] of the sites as functions of f − μ."""
        return sites.nat1 - (sites.nat2 @ μ.unsqueeze(-1)).squeeze(-1)

    def belief(self, inputs: Any, sites: Sites) -> Belief:
        """What a posterior keeps between questions."""
        return Belief(self, inputs, sites)

    # -- inference --------------------------------------------------------------------------------------------------------

    def start(self, likelihood: Likelihood, data: Any, rule: Expansion | None = None, sites: Sites | None = None) -> GaussianProcessPosterior:
        """The belief before the first turn: the prior, with sites that say nothing (unless given)."""
        x, y = tensors(data)
        likelihood = copy.deepcopy(as_likelihood(likelihood)).to(x.device)
        return self.resume(likelihood, Laplace() if rule is None else rule, columns(x), y, sites, x.dtype)

    def resume(
        self, likelihood: Likelihood, rule: Expansion, x: Tensor, y: Tensor, sites: Sites | None, dtype: torch.dtype
    ) -> GaussianProcessPosterior:
        """A posterior with a copy of this model, for data x [n d], y and sites that some rule made; they say nothing unless given."""
        model = copy.deepcopy(self).to(x.device)
        model.power = rule.power
        inputs = model.place(x)
        n, c = len(x), self.latents
        likelihood.validate_targets(x.new_zeros(n, c), y)
        sites = Sites.flat(n, c, x) if sites is None else sites
        if sites.nat1.shape != (n, c) or sites.nat2.shape != (n, c, c):
            raise ValueError(
                f"sites have nat1 {list(sites.nat1.shape)} and nat2 {list(sites.nat2.shape)}; expected [{n}, {c}] and [{n}, {c}, {c}], one for "
                "each datum."
            )
        return GaussianProcessPosterior(model, likelihood, rule, inputs, y, sites, dtype)

    # -- before any data --------------------------------------------------------------------------------------------------

    def prior(self, x: Tensor):
        """f at x [m] or [m d] before any data, as a posterior gives it: a gpytorch Gaussian, with a graph to the hyper-parameters.

        Example:
            >>> import gpytorch, bayesgn as bgn
            >>> model = bgn.models.MarkovGP(gpytorch.kernels.MaternKernel(nu=1.5))
            >>> model.prior(torch.linspace(0, 1, 3, dtype=torch.float64)).variance.tolist()
            [1.0, 1.0, 1.0]
        """
        return self._before(x)(x)

    def sample_prior(self, x: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Joint draws [n m c] of f at x [m] or [m d] before any data."""
        return self._before(x).sample_outputs(x, n, generator)

    def _before(self, x: Tensor) -> GaussianProcessPosterior:
        """The posterior of no data."""
        none = columns(x)[:0]
        return GaussianProcessPosterior(self, None, Laplace(), self.place(none), none[:, 0], Sites.flat(0, self.latents, none), x.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(describe(k) for k in self.kernels)})"


def describe(kernel) -> str:
    """A kernel in short: Scale(Matern), Matern + Periodic."""
    inner = getattr(kernel, "base_kernel", None)
    several = getattr(kernel, "kernels", None)
    name = type(kernel).__name__.removesuffix("Kernel")
    if several is not None:
        return (" + " if "Add" in name else " * ").join(describe(k) for k in several)
    return f"{name}({describe(inner)})" if inner is not None else name
