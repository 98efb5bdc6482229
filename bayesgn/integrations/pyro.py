"""Pyro: posteriors as pyro distributions over the weights, and a guide whose covariance is the Gauss-Newton one."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from bayesgn._data import describe
from bayesgn._extras import quiet_import
from bayesgn._psd import safe_cholesky
from bayesgn.ggn.block_diagonal import BlockDiagonalPrecision, CholeskyPrecision, DiagPrecision, EigenPrecision
from bayesgn.ggn.dual import DualPrecision
from bayesgn.ggn.full import FullPrecision
from bayesgn.ggn.kron import KronPrecision
from bayesgn.ggn.matrix_free import MatrixFreePrecision
from bayesgn.ggn.structure import Precision
from bayesgn.inference.laplace import laplace
from bayesgn.models.network import Network
from bayesgn.models.pyro_model import PyroModel
from bayesgn.models.weight_posterior import WeightPosterior

with quiet_import():
    import pyro.distributions as dist
    from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
    from pyro.infer.autoguide.initialization import init_to_value
    from torch.distributions import constraints

__all__ = ["AutoGGN", "PyroModel", "WeightDistribution", "as_distribution"]


# -- a posterior as a distribution -------------------------------------------------------------------------------------------


class WeightDistribution(dist.TorchDistribution):
    """N(θ̄, Σ) over the weights [p] of a posterior, in the posterior's own structure: no p × p matrix is formed unless it keeps one.

        log p(θ) = ½ log det(H + P) − ½ (θ − θ̄)ᵀ(H + P)(θ − θ̄) − p/2 log 2π

    It is the posterior as it stands when this is made; later changes of its hyper-parameters do not reach it. For ``ggn.LowRank`` the
    determinant is that of the Gaussian which it draws from, without the density of what it left out. For ``ggn.MatrixFree`` it is an estimate
    where the weights are more than its probes.
    """

    arg_constraints: dict = {}
    support: Any = constraints.real_vector
    has_rsample = True

    def __init__(self, posterior: WeightPosterior, _precision: Precision | None = None, batch_shape: torch.Size = torch.Size()) -> None:
        self.posterior = posterior
        with torch.no_grad():
            self._precision = posterior.precision() if _precision is None else _precision
            self._logdet = self._precision.logdet()
            if isinstance(self._precision, DualPrecision):
                self._logdet = self._logdet - self._precision.rest
        self.loc = posterior.mean.detach().clone()
        super().__init__(batch_shape, self.loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        with torch.no_grad():
            return self._precision.diagonal().to(self.loc).expand(*self.batch_shape, -1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Σ [p p]."""
        with torch.no_grad():
            return dense_covariance(self._precision, self.loc).to(self.loc).expand(*self.batch_shape, -1, -1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            draws = self._precision.sample(max(1, shape.numel()))[: shape.numel()]
        return self.loc + draws.to(self.loc).reshape(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.loc.shape:
            raise ValueError(f"weights have shape {tuple(value.shape)}; expected [... {len(self.loc)}].")
        wide = self._logdet.dtype
        δ = (value.to(wide) - self.loc.to(wide)).expand(*torch.broadcast_shapes(value.shape[:-1], self.batch_shape), -1)
        quadratic = (δ * times(self._precision, δ)).sum(-1)
        return (0.5 * (self._logdet - quadratic) - 0.5 * len(self.loc) * math.log(2 * math.pi)).to(value.dtype)

    def expand(self, batch_shape, _instance=None) -> WeightDistribution:
        return WeightDistribution(self.posterior, self._precision, torch.Size(batch_shape))

    def __repr__(self) -> str:
        return f"WeightDistribution({self.posterior!r})"


def as_distribution(posterior: WeightPosterior) -> WeightDistribution:
    """A posterior's Gaussian over the weights as a pyro (and torch) distribution with event [p], for ``pyro.sample("weights", …)``.

    Args:
        posterior: from ``bgn.laplace``, ``bgn.variational``, ``bgn.bayes_newton`` on a network, …

    Raises:
        TypeError: for what has no Gaussian over weights.

    Example:
        >>> import torch, pyro, bayesgn as bgn
        >>> from bayesgn.integrations.pyro import PyroModel, as_distribution
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Linear(1, 1).eval()
        >>> network, likelihood = bgn.models.Network(net, structure=bgn.ggn.Full), bgn.likelihoods.Gaussian(0.1)
        >>> q = as_distribution(bgn.laplace(network, likelihood, (x, y)))
        >>> q.event_shape, q.rsample((5,)).shape, q.log_prob(q.mean).shape
        (torch.Size([2]), torch.Size([5, 2]), torch.Size([]))
        >>> guide = lambda x, y=None: pyro.sample("weights", q)
        >>> importance = pyro.infer.Importance(PyroModel(network, likelihood), guide, num_samples=10).run(x, y)
        >>> bool(importance.get_ESS() > 1)
        True

    Source: Bingham et al. (2019), "Pyro: deep universal probabilistic programming".
    """
    if not isinstance(posterior, WeightPosterior):
        raise TypeError(f"posterior is {describe(posterior)}; expected a Gaussian over a net's weights, such as bgn.laplace(...) gives.")
    posterior.check_fresh()
    return WeightDistribution(posterior)


def dense_covariance(precision: Precision, like: Tensor) -> Tensor:
    """Σ [p p]."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    Σ = precision.solve(torch.eye(like.shape[-1], dtype=dtype, device=like.device))
    return 0.5 * (Σ + Σ.mT)


@singledispatch
def times(precision: Any, v: Tensor) -> Tensor:
    """(H + P) v for v [... p], as each storage multiplies. (``Precision`` itself promises the inverse only.)"""
    L = safe_cholesky(dense_covariance(precision, v))
    return torch.cholesky_solve(v.reshape(-1, v.shape[-1]).mT, L).mT.reshape(v.shape)


@times.register
def _(precision: FullPrecision, v: Tensor) -> Tensor:
    return times(precision.whole, v)


@times.register
def _(precision: BlockDiagonalPrecision, v: Tensor) -> Tensor:
    return torch.cat([times(part, v[..., b.where]) for part, b in zip(precision.parts, precision.blocks, strict=True)], dim=-1)


@times.register
def _(precision: EigenPrecision, v: Tensor) -> Tensor:
    return ((v @ precision.Q) * precision.precision) @ precision.Q.mT


@times.register
def _(precision: CholeskyPrecision, v: Tensor) -> Tensor:
    return v @ precision.L @ precision.L.mT


@times.register
def _(precision: DiagPrecision, v: Tensor) -> Tensor:
    return v * precision.precision


@times.register
def _(precision: KronPrecision, v: Tensor) -> Tensor:
    return precision._flatten(precision._out_of(precision._into(precision._unflatten(v)) * precision.precision))


@times.register
def _(precision: DualPrecision, v: Tensor) -> Tensor:
    V = v.reshape(-1, v.shape[-1]).mT
    H = precision.scale * precision.rows.rmatvec(precision.rows.matvec(V))
    return (H + V / precision._variances()[:, None]).mT.reshape(v.shape)


@times.register
def _(precision: MatrixFreePrecision, v: Tensor) -> Tensor:
    return _Symmetric.apply(v, precision)


class _Symmetric(torch.autograd.Function):
    """M v of a symmetric M that runs without a graph."""

    @staticmethod
    def forward(ctx, v: Tensor, precision: MatrixFreePrecision) -> Tensor:
        ctx.precision = precision
        V = v.reshape(-1, v.shape[-1]).mT
        return (precision.scale * precision.H(V) + precision.P[:, None] * V).mT.reshape(v.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Symmetric.apply(grad, ctx.precision), None


# -- a guide -----------------------------------------------------------------------------------------------------------------


class AutoGGN(AutoLaplaceApproximation):
    """Laplace's guide by the generalised Gauss-Newton matrix, where Pyro's ``AutoLaplaceApproximation`` takes the Hessian.

        q(θ) = N(θ*, (Σ JᵀΛJ + P)⁻¹)        θ* by SVI with this guide, a point mass

    The Hessian of a net is indefinite wherever the search has not quite ended, and at saddles and kinks; its inverse is then no covariance. The
    Gauss-Newton matrix is positive semidefinite at any weights, and costs one walk over the data instead of p backward passes. Both are the same
    where the net is linear in its weights and the likelihood's link is canonical.

    Args:
        model: a ``PyroModel``, or a ``models.Network`` to make one of with the likelihood.
        likelihood: p(y|f), beside a Network.
        init_loc_fn: where the search begins; at the net's trained weights unless given.

    Raises:
        TypeError: for a Pyro program with other sites, of which there is no Gauss-Newton matrix.

    Example:
        >>> import torch, pyro, bayesgn as bgn
        >>> from bayesgn.integrations.pyro import AutoGGN, PyroModel
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = PyroModel(bgn.models.Network(net, structure=bgn.ggn.Full), bgn.likelihoods.Gaussian(0.1))
        >>> point = AutoGGN(model)
        >>> svi = pyro.infer.SVI(model, point, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        >>> losses = [svi.step(x, y) for _ in range(50)]
        >>> guide = point.laplace_approximation(x, y)
        >>> guide.get_posterior()
        MultivariateNormal(loc: torch.Size([25]), scale_tril: torch.Size([25, 25]))

    Source: Martens (2020), "New insights and perspectives on the natural gradient method"; Immer et al. (2021), "Improving predictions of
    Bayesian neural nets via local linearization".
    """

    def __init__(self, model: PyroModel | Network, likelihood=None, init_loc_fn=None) -> None:
        if isinstance(model, Network):
            if likelihood is None:
                raise TypeError("AutoGGN needs a likelihood beside a Network: AutoGGN(network, likelihoods.Gaussian(0.1)).")
            model = PyroModel(model, likelihood)
        elif likelihood is not None:
            raise TypeError("a PyroModel has its likelihood; leave it out, or pass a models.Network with it.")
        if not isinstance(model, PyroModel):
            raise TypeError(
                f"model is {describe(model)}; expected a PyroModel "
                "(models.PyroModel(network, likelihood)). Of other Pyro programs there is no Gauss-Newton matrix; "
                "use pyro.infer.autoguide.AutoLaplaceApproximation."
            )
        if init_loc_fn is None:
            init_loc_fn = init_to_value(values={"weights": model.trained.to(model.dtype)})
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.program = model

    def posterior(self, x: Any, y: Tensor) -> Any:
        """The ``bgn.laplace`` posterior at the weights where the search stands, over a copy of the net, in the network's structure.

        Args:
            x, y: all training data; not a minibatch.
        """
        if self.prototype_trace is None:
            raise RuntimeError("this guide has no weights yet: run SVI with it first, or call it once with the data, guide(x, y).")
        network, loc = self.program.network.copy(), self.loc.detach()
        own = network.vector.tensors(network.net)
        with torch.no_grad():
            for name, value in network.vector.unflatten(loc, network.net).items():
                own[name].copy_(value)
        return laplace(network, self.program.likelihood, (x, y), progress=False)

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> AutoMultivariateNormal:
        """The Gaussian guide N(θ*, (Σ JᵀΛJ + P)⁻¹) at the weights where the search stands.

        Args:
            args, kwargs: x and y, all training data, as the model takes them.
        """
        precision = self.posterior(*args, **kwargs).precision()
        with torch.no_grad():
            Σ = dense_covariance(precision, self.loc)
            scale = Σ.diagonal().sqrt()
            scale_tril = safe_cholesky(Σ / scale / scale[:, None])
        guide = AutoMultivariateNormal(self.model)
        guide._setup_prototype(*args, **kwargs)
        for name, value in (("loc", self.loc.detach().clone()), ("scale", scale), ("scale_tril", scale_tril)):
            delattr(guide, name)
            guide.register_buffer(name, value.to(self.loc))
        return guide
