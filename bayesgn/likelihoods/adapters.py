"""Likelihoods that come from elsewhere: gpytorch's as ours."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Likelihood
from .bernoulli import Bernoulli
from .categorical import Categorical
from .counts import Poisson
from .from_distribution import FromDistribution
from .gaussian import Gaussian
from .linked import Linked
from .links import LogSoftplus, NormCDF
from .student_t import StudentT

__all__ = ["as_likelihood", "from_gpytorch"]


def as_likelihood(likelihood: Any) -> Likelihood:
    """A likelihood of this package as it is, one of gpytorch's through :func:`from_gpytorch`.

    Raises TypeError for anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    # An object of gpytorch's exists only where gpytorch has been imported.
    if "gpytorch" in sys.modules and isinstance(likelihood, sys.modules["gpytorch"].likelihoods.Likelihood):
        return from_gpytorch(likelihood)
    if isinstance(likelihood, type):
        raise TypeError(f"likelihood is the class {likelihood.__name__}; pass an instance, {likelihood.__name__}()")
    raise TypeError(f"likelihood is {likelihood!r} (a {type(likelihood).__name__}); expected one of bayesgn.likelihoods or of gpytorch.likelihoods, "
                    "or FromDistribution(lambda f: …) around a torch Distribution")


def from_gpytorch(likelihood: Any) -> Likelihood:
    """A gpytorch likelihood as one of ours, with copies of its present values.

    | gpytorch | here |
    |---|---|
    | `GaussianLikelihood`, `GaussianLikelihoodWithMissingObs` | `Gaussian(noise)` |
    | `FixedNoiseGaussianLikelihood` with one noise for all data | `Gaussian(noise)` |
    | `MultitaskGaussianLikelihood` | `Gaussian(noise)` with [tasks] or [tasks tasks] |
    | `BernoulliLikelihood` | `Bernoulli(NormCDF())` |
    | `StudentTLikelihood` | `StudentT(dof, scale)` |
    | `PoissonLikelihood` | `Linked(Poisson(), LogSoftplus())` |
    | `SoftmaxLikelihood(mixing_weights=False)` | `Categorical()` |
    | others with p(y \\| f) in their `forward` (Beta, Laplace, softmax with mixing weights, your own) | `FromDistribution`, parameters kept |

    gpytorch's priors and constraints on hyper-parameters stay behind in our own classes.

    Args:
        likelihood: an instance from `gpytorch.likelihoods`, or an heir of `gpytorch.likelihoods.Likelihood`.
    Raises:
        TypeError: for what is no gpytorch likelihood, and for likelihoods that need more than f to say what y is (a noise for each datum, task
            indices, lists of likelihoods).

    >>> import gpytorch
    >>> from bayesgn import likelihoods
    >>> likelihoods.from_gpytorch(gpytorch.likelihoods.BernoulliLikelihood())
    Bernoulli(link=NormCDF())
    """
    from gpytorch import likelihoods as gp

    own: Any = likelihood
    if not isinstance(likelihood, gp.Likelihood):
        raise TypeError(f"from_gpytorch: got {likelihood!r} (a {type(likelihood).__name__}); expected an instance from gpytorch.likelihoods")
    exactly = type(likelihood)                       # an heir may have another forward: it goes through FromDistribution
    if isinstance(likelihood, gp.GaussianLikelihood) and exactly.forward is gp.GaussianLikelihood.forward:
        return Gaussian(_scalar(own, own.noise))
    if exactly is gp.MultitaskGaussianLikelihood:
        return Gaussian(_multitask_noise(likelihood))
    if exactly is gp.FixedNoiseGaussianLikelihood:
        noise = torch.as_tensor(own.noise).detach() + torch.as_tensor(own.second_noise).detach()
        if noise.numel() and bool((noise == noise.flatten()[0]).all()):
            return Gaussian(noise.flatten()[0])
    of_noise_model = exactly.forward is gp._GaussianLikelihoodBase.forward
    if isinstance(likelihood, (gp.LikelihoodList, gp.FixedNoiseGaussianLikelihood, gp.HadamardGaussianLikelihood)) or of_noise_model:
        raise TypeError(f"from_gpytorch: a {exactly.__name__} does not say what y is from f alone (it has noise for each datum or task index, or is "
                        "a list); use Gaussian(noise), HeteroscedasticGaussian() with a latent for the noise, or one likelihood for all outputs")
    if exactly is gp.BernoulliLikelihood:
        return Bernoulli(NormCDF())
    if exactly is gp.StudentTLikelihood:
        return StudentT(_scalar(own, own.deg_free), _scalar(own, own.noise).sqrt())
    if exactly is gp.PoissonLikelihood:
        return Linked(Poisson(), LogSoftplus())
    if exactly is gp.SoftmaxLikelihood:
        return Categorical() if likelihood.mixing_weights is None else FromDistribution(_Softmax(likelihood))
    return FromDistribution(_Forward(likelihood, isinstance(likelihood, gp._OneDimensionalLikelihood)))


class _Forward(nn.Module):
    """f [... c] -> gpytorch's p(y | f); its parameters are the likelihood's own."""

    def __init__(self, likelihood: Any, scalar: bool) -> None:
        super().__init__()
        self.likelihood, self.scalar = likelihood, scalar

    def forward(self, f: Tensor):
        if not self.scalar:
            return self.likelihood(f)
        if f.shape[-1] != 1:
            raise ValueError(f"{type(self.likelihood).__name__}: f has shape {list(f.shape)} but this likelihood has one latent, [... 1]")
        return self.likelihood(f[..., 0])


class _Softmax(nn.Module):
    """Classes from mixed features; gpytorch's own forward takes as many data as features for another layout."""

    def __init__(self, likelihood: Any) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, f: Tensor):
        W = self.likelihood.mixing_weights
        if f.shape[-1] != W.shape[1]:
            raise ValueError(f"SoftmaxLikelihood: f has shape {list(f.shape)} but the likelihood mixes {W.shape[1]} features into {W.shape[0]} "
                             f"classes; give it {W.shape[1]} latents")
        return torch.distributions.Categorical(logits=f @ W.to(f).mT)


def _scalar(likelihood: Any, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise TypeError(f"from_gpytorch: a {type(likelihood).__name__} with batch shape {list(value.shape[:-1])} holds several likelihoods at once; "
                        "convert them one by one, or use one of ours with a parameter for each output")
    return value.detach().reshape(())


def _multitask_noise(likelihood: Any) -> Tensor:
    """The covariance of one row: [tasks], or [tasks tasks] where it has a rank."""
    tasks = likelihood.num_tasks
    shared = _scalar(likelihood, likelihood.noise) if likelihood.has_global_noise else None
    if not likelihood.has_task_noise:
        return shared.expand(tasks)                                                            # type: ignore[union-attr]
    if likelihood.rank == 0:
        own = likelihood.task_noises.detach()
        if own.ndim > 1:
            raise TypeError(f"from_gpytorch: a MultitaskGaussianLikelihood with batch shape {list(own.shape[:-1])}; convert one by one")
        return own if shared is None else own + shared
    own = likelihood.task_noise_covar.detach()
    if shared is None and likelihood.rank < tasks:
        raise TypeError(f"from_gpytorch: a task noise of rank {likelihood.rank} for {tasks} tasks without global noise is singular; keep "
                        "has_global_noise=True")
    return own if shared is None else own + shared * torch.eye(tasks, dtype=own.dtype, device=own.device)
