"""A network, its weight prior and a likelihood as a Pyro program, for everything that Pyro can do with one."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn._extras import quiet_import
from bayesgn.ggn.evaluation import call, per_datum
from bayesgn.ggn.structure import working
from bayesgn.models.network import Network, check_likelihood

with quiet_import():
    import pyro
    import pyro.distributions as dist

HALF = (torch.float16, torch.bfloat16)


class PyroModel:
    """The joint density of a network's weights and of its data, as a Pyro program ``model(x, y)``; ``model(x)`` draws y too.

        θ ~ N(μ, P⁻¹)            sample site "weights" [p]
        f_n = net(x_n; θ)        deterministic site "f"
        y_n ~ p(y_n | f_n)       sample site "y" in the plate "data"

    One site holds all selected weights, flat and in the order of ``posterior.sample_weights``, so that draws of a posterior, of NUTS and of a
    guide are exchangeable, subsets of the weights (``parameters=``) are served, and guides and mass matrices see one block;
    :meth:`named` gives tensors by parameter. Missing targets (NaN, a label to ignore) count for nothing.

    The net is a private copy in eval mode: training the user's net, or freezing it, changes nothing here, and the other way round. So are prior
    and likelihood; their parameters stay as they are.

    Args:
        network: the net, its prior and the selection of weights.
        likelihood: p(y|f), any of ``bayesgn.likelihoods``.
        num_data: where a call brings a minibatch, the number of all data: the plate scales log p(y|f) by num_data / len(x).
        subsample_size: where a call brings all data, how many of them to draw for each evaluation.

    Raises:
        TypeError, ValueError: for what is no Network or Likelihood, sizes that cannot be right, and at a call for data that cannot be right.

    Example:
        >>> import pyro, bayesgn as bgn
        >>> from bayesgn.models.pyro_model import PyroModel
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = PyroModel(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(x, y)
        >>> drawn = pyro.infer.Predictive(model, guide=guide, num_samples=5)(x)
        >>> drawn["weights"].shape[-1], drawn["y"].shape
        (25, torch.Size([5, 20, 1]))

    Source: Bingham et al. (2019), "Pyro: deep universal probabilistic programming".
    """

    def __init__(self, network: Network, likelihood, num_data: int | None = None, subsample_size: int | None = None) -> None:
        if not isinstance(network, Network):
            raise TypeError(f"network is a {type(network).__name__}; wrap the net first: models.Network(net, prior=…).")
        check_likelihood(likelihood)
        for name, value in (("num_data", num_data), ("subsample_size", subsample_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}; expected a whole number of data, at least 1, or None.")
        if num_data is not None and subsample_size is not None:
            raise ValueError(
                f"num_data={num_data} says that calls bring minibatches, subsample_size={subsample_size} that they bring all data; choose one."
            )
        self.network, self.likelihood = network.copy(), copy.deepcopy(likelihood)
        self.num_data, self.subsample_size = num_data, subsample_size
        self.net, self.vector = self.network.net, self.network.vector
        self.net.eval().requires_grad_(False)
        if any(p.dtype in HALF for p in self.net.parameters()):
            self.net.float()  # a draw rounded to 8 bits is another draw
        self.likelihood.requires_grad_(False)
        self.trained = self.vector.flatten(self.net)  # θ* [p]
        self.dtype, self.device = working(self.trained.dtype), self.trained.device
        self.likelihood.to(self.device)
        blocks, prior = self.network.linearizer.blocks, self.network.prior
        with torch.no_grad():
            self.precision = torch.cat([P.to(self.device).expand(b.numel) for P, b in zip(prior.of(blocks), blocks, strict=True)])
            self.mean = prior.mean_vector(self.vector, self.trained.to(self.precision.dtype))
            self._root_precision = self.precision.sqrt()
            self._log_volume = float(self._root_precision.log().sum()) - 0.5 * len(self.mean) * math.log(2 * math.pi)
        self._checked: tuple[Any, Any] | None = None

    # -- in plain torch ------------------------------------------------------------------------------------------------

    def outputs(self, x: Any, weights: Tensor) -> Tensor:
        """f [... n *positions c] of the net at weights [... p], with a graph to them."""
        flat = weights.reshape(-1, weights.shape[-1]).to(self.dtype)
        f = [self.likelihood.rows(call(self.net, x, self._unflattened(θ))) for θ in flat]
        n = _data.len_of(x)
        return per_datum(f[0], n) if weights.dim() == 1 else torch.stack([per_datum(part, n) for part in f]).unflatten(0, weights.shape[:-1])

    def _unflattened(self, θ: Tensor) -> dict[str, Tensor]:
        if self.vector.masks:
            return self.vector.unflatten(θ, self.net)
        return {n: part.view(s) for n, part, s in zip(self.vector.names, θ.split(self.vector.sizes), self.vector.shapes)}

    def log_prior(self, weights: Tensor) -> Tensor:
        """log N(θ; μ, P⁻¹) [...] of weights [... p]."""
        half = (weights - self.mean.to(weights)) * self._root_precision.to(weights)
        return self._log_volume - 0.5 * (half * half).sum(-1)

    def log_likelihood(self, x: Any, y: Tensor, weights: Tensor) -> Tensor:
        """log p(y_n|f_n) of each datum [n] at weights [p]."""
        f = self.outputs(x, weights)
        return self.likelihood.log_prob(f, y).flatten(1).sum(1) if f.dim() > 2 else self.likelihood.log_prob(f, y)

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights [... p] as tensors [... *shape] by parameter's name; flat where only some entries of a parameter are selected."""
        shapes = dict(zip(self.vector.names, self.vector.shapes, strict=True))
        parts = self.vector.split(weights)
        return {name: part if name in self.vector.masks else part.unflatten(-1, shapes[name] or (1,)) for name, part in parts.items()}

    def place(self, x: Any) -> Any:
        """x on the net's device, in float32 where it is of half precision."""
        return _data.apply(_data.to(x, self.device), lambda t: t.float() if t.dtype in HALF else t)

    def check(self, x: Any, y: Tensor | None) -> Tensor | None:
        """Raise for data that cannot be right; y in its full shape."""
        if _data.len_of(x) == 0:
            raise ValueError(f"x is {_data.describe(x)}: 0 data; pass at least one.")
        _data.check_finite(x, "x")
        x = self.place(x)
        with torch.no_grad(), _data.advice(x, self.trained):
            f = self.outputs(x, self.trained)
        if y is None:
            return None
        if not isinstance(y, Tensor):
            raise TypeError(f"y is {_data.describe(y)}; expected a tensor.")
        y = y.to(self.device)
        self.likelihood.validate(f, y)
        return self.likelihood.targets(f, y)

    # -- as a Pyro program ---------------------------------------------------------------------------------------------

    def prior(self) -> Any:
        """N(μ, P⁻¹) as a pyro distribution over weights [p]."""
        return dist.Normal(self.mean.to(self.dtype), self.precision.rsqrt().to(self.dtype)).to_event(1)

    def __call__(self, x: Any, y: Tensor | None = None) -> Tensor:
        if self._checked is None or self._checked[0] is not x or self._checked[1] is not y:
            self.check(x, y)
            self._checked = x, y
        x, n = self.place(x), _data.len_of(x)
        if self.num_data is not None and y is not None and n > self.num_data:
            raise ValueError(f"x has {n} data, more than num_data={self.num_data}, the number of all.")
        weights = pyro.sample("weights", self.prior())
        if y is None:
            plate = pyro.plate("data", n, dim=-1)
        elif self.num_data is not None:
            plate = pyro.plate("data", self.num_data, subsample=torch.arange(n, device=self.device), dim=-1)
        else:
            plate = pyro.plate("data", n, subsample_size=self.subsample_size, dim=-1)
        with plate as index:
            if y is not None:
                y = y.to(self.device)
            if y is not None and index is not None and len(index) < n:
                x, y = _data.rows(x, index), y[index]
            # Particles and draws in parallel bring weights [... 1 p], with the 1 in the plate's place; Predictive leaves it out of draws [s p].
            if weights.dim() > 1 and weights.shape[-2] == 1:
                weights = weights.squeeze(-2)
            f = self.outputs(x, weights)
            positions, ahead = f.dim() - weights.dim() - 1, weights.dim() - 1
            if y is not None:
                y = self.likelihood.targets(f[(0,) * ahead], y)
            f = pyro.deterministic("f", f, event_dim=positions + 1)
            return pyro.sample("y", Observation(self.likelihood, f, positions), obs=y)

    def __repr__(self) -> str:
        size = "" if self.num_data is None else f", num_data={self.num_data}"
        size += "" if self.subsample_size is None else f", subsample_size={self.subsample_size}"
        return f"PyroModel({type(self.net).__name__}, {self.vector.numel} weights, {self.network.prior}, {self.likelihood}{size})"


class Observation(dist.TorchDistribution):
    """p(y|f) of each datum as a pyro distribution, by the likelihood itself: all positions of a datum are one event, a missing target counts 0.

    Args:
        likelihood: p(y|f).
        f: latent values [... n *positions c].
        positions: dimensions of f between data and outputs.
    """

    has_rsample = False
    arg_constraints: dict = {}

    def __init__(self, likelihood, f: Tensor, positions: int = 0) -> None:
        self.likelihood, self.f, self.positions = likelihood, f, positions
        batch = f.shape[: f.dim() - 1 - positions]
        super().__init__(batch, likelihood.target_shape(f)[len(batch) :], validate_args=False)

    @property
    def support(self):
        inside = self.likelihood.conditional(self.f).support
        return dist.constraints.independent(inside, self.positions) if self.positions else inside

    def log_prob(self, value: Tensor) -> Tensor:
        events = len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - events], self.batch_shape)
        f = self.f.expand(*batch, *self.f.shape[len(self.batch_shape) :])
        log_prob = self.likelihood.log_prob(f, value.expand(*batch, *self.event_shape))
        return log_prob.flatten(len(batch)).sum(-1) if self.positions else log_prob

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.likelihood.sample(self.f.expand(*sample_shape, *self.f.shape))

    def expand(self, batch_shape, _instance=None) -> Observation:
        return Observation(self.likelihood, self.f.expand(*batch_shape, *self.f.shape[len(self.batch_shape) :]), self.positions)
