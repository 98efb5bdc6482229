"""The promise every likelihood keeps: a normalised density p(y | f) with its first two derivatives in f, and its predictive."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _psd
from .config import describe
from .marginals import marginals
from .predictives import PerRow, mixture, nodes_of, scalar_nodes

__all__ = ["Elementwise", "Integrals", "Likelihood", "Positive"]


class Integrals(NamedTuple):
    """An expectation of the likelihood under N(mean, cov) in closed form, with its derivatives in the mean.

    Attributes:
        value [n], gradient [n c] and neg_hessian [n c c]: of E[log p] or of log E[p^α], in the mean.
        fisher [n c c]: the expected Fisher information under N(mean, cov), or under the density tilted by p^α.
    """

    value: Tensor
    gradient: Tensor
    neg_hessian: Tensor
    fisher: Tensor


class Likelihood(nn.Module, ABC):
    """p(y | f): y the data, f [... c] the latent values (a net's output), every leading dimension a row.

    Missing rows (y is NaN, or the label to ignore) count for nothing: zeros in log_prob, gradient, neg_hessian, ggn and ggn_root.
    Own parameters (noise, degrees of freedom …) are `nn.Parameter`s, unconstrained inside, natural units outside; freeze them by
    `requires_grad_(False)`. Everything follows f's device and dtype.

    `likelihood(f)` is the predictive p(y | x), a torch Distribution: f is a Gaussian (gpytorch's MultivariateNormal types, or an object
    with `.marginals()`) or samples [s n *positions c] with the leading sample dimension. Plain latent values go through `conditional`.
    """

    # --- shapes ---------------------------------------------------------------------------------------------------------------------
    def rows(self, output: Tensor) -> Tensor:
        """A net's raw output as f [n, *positions, c]; an output [n] becomes [n 1]."""
        return output.unsqueeze(-1) if output.ndim == 1 else output

    @abstractmethod
    def target_shape(self, f: Tensor) -> torch.Size:
        """The shape of the y that belongs to f, fully written: [...] for labels, [... d] for vectors."""

    def latents_for(self, d: int) -> int | None:
        """Latents that a row with d targets needs; None where d does not tell (a `Categorical` has one for each class)."""
        return None

    def targets(self, f: Tensor, y: Tensor) -> Tensor:
        """y in its full shape: a trailing dimension of one may be left out or added, nothing is ever broadcast."""
        shape = tuple(self.target_shape(f))
        if tuple(y.shape) == shape:
            return y
        if y.shape == (*shape, 1) or (shape and shape[-1] == 1 and tuple(y.shape) == shape[:-1]):
            return y.reshape(shape)
        short = f" (or {list(shape[:-1])})" if shape and shape[-1] == 1 else ""
        d = y.shape[-1] if y.ndim == f.ndim else 1
        needed = self.latents_for(d) if y.shape[: f.ndim - 1] == f.shape[:-1] and y.ndim <= f.ndim else None
        advice = "reshape y, or look at rows(output) if the net's classes are not in the last dimension"
        if needed is not None and needed != f.shape[-1]:
            advice = f"reshape y; y with {d} target{'s' * (d > 1)} a row needs {needed} latent{'s' * (needed > 1)}: {_latents(needed)}"
        raise ValueError(f"{type(self).__name__}: y has shape {list(y.shape)} but f has shape {list(f.shape)}, for which y should be "
                         f"{list(shape)}{short}; {advice}")

    def _refuse_latents(self, f: Tensor, what: str, needed: int, rule: str):
        """Raises for a number of latents that fits no y."""
        raise ValueError(f"{type(self).__name__}: f has shape {list(f.shape)}, {what}; {type(self).__name__} needs {rule}: {_latents(needed)}")

    # --- checks ---------------------------------------------------------------------------------------------------------------------
    def validate(self, f: Tensor, y: Tensor) -> None:
        """Raises ValueError (TypeError for a dtype) where f or y cannot be right: what came, what was expected, what to do."""
        if not f.is_floating_point():
            raise TypeError(f"{type(self).__name__}: f has dtype {f.dtype} but must be floating point; it is the net's raw output")
        y = self.targets(f, y)
        if f.device.type == "meta" or y.device.type == "meta":
            return
        bad = ~f.isfinite()
        if bool(bad.any()):
            row = int(bad.reshape(-1, f.shape[-1]).any(-1).nonzero()[0])
            raise ValueError(f"{type(self).__name__}: f has {int(bad.sum())} NaN or infinite values, the first in row {row}: "
                             f"{f.reshape(-1, f.shape[-1])[row].tolist()[:8]}; look for NaN in the inputs or a diverged net")
        self._validate_targets(f, y)
        self._suspect(f)

    def _suspect(self, f: Tensor) -> None:
        """Warns where the values of f look like those of a net that did more than it should."""

    def validate_targets(self, f: Tensor, y: Tensor) -> None:
        """:meth:`validate` for y alone; of f only the shape counts, so a model can check its data before it has an f."""
        y = self.targets(f, y)
        if y.device.type != "meta":
            self._validate_targets(f, y)

    @abstractmethod
    def _validate_targets(self, f: Tensor, y: Tensor) -> None:
        """The values of y, already in its full shape."""

    def _refuse_infinite(self, y: Tensor) -> None:
        self._refuse(y, y.isinf(), "targets must be finite (NaN marks a missing one)", "clean the data or mark such targets as NaN")

    def _refuse(self, y: Tensor, bad: Tensor, expected: str, advice: str) -> None:
        """Raises on the entries of y marked bad, showing the first."""
        if bool(bad.any()):
            first = y[bad][0].item()
            raise ValueError(f"{type(self).__name__}: y contains {first} ({int(bad.sum())} of {bad.numel()} values like it) "
                             f"but {expected}; {advice}")

    # --- density and derivatives ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def conditional(self, f: Tensor) -> Distribution:
        """p(y | f) for latent values f [... c]."""

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f) of each row, normalised, [...]."""

    @abstractmethod
    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """∂ log p(y | f) / ∂f, the true one, [... c]."""

    @abstractmethod
    def neg_hessian(self, f: Tensor, y: Tensor) -> Tensor:
        """−∂² log p(y | f) / ∂f², possibly indefinite, [... c c]."""

    @abstractmethod
    def ggn(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """The Fisher information E_{y|f}[−∂² log p(y | f) / ∂f²], PSD, [... c c]; y only marks missing rows and class weights."""

    def ggn_root(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """S [... c k] with S Sᵀ = ggn."""
        return _psd.psd_root(self.ggn(f, y))

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """y ~ p(y | f), one draw for each row, in its full shape."""

    @abstractmethod
    def moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of (each entry of) y given f; labels count as one-hot vectors, levels as numbers."""

    def observed(self, f: Tensor, y: Tensor) -> Tensor:
        """Which rows have a target [...], in part at least; the others count for nothing."""
        y = self.targets(f, y)
        if not y.is_floating_point():
            return torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device)
        there = ~y.isnan()
        return there if there.ndim < f.ndim else there.flatten(f.ndim - 1).any(-1)

    def response(self, f: Tensor, y: Tensor) -> Tensor:
        """y as the vector [... d] that :meth:`conditional_moments` are about: labels one-hot, levels as numbers, NaN where missing."""
        return self.targets(f, y).to(f)

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """E[y | f] [... d] and Cov[y | f] [... d d] of the vector y."""
        mean, variance = self.moments(f)
        return mean, torch.diag_embed(variance)

    # --- expectations over f --------------------------------------------------------------------------------------------------------
    def expected(self, mean: Tensor, cov: Tensor, y: Tensor) -> Integrals | None:
        """E[log p(y | f)] for f ~ N(mean [n c], cov [n c c]) in closed form; None where there is none (then it is done by cubature)."""
        return None

    def tilted(self, mean: Tensor, cov: Tensor, y: Tensor, power: float) -> Integrals | None:
        """log E[p(y | f)^power] for f ~ N(mean [n c], cov [n c c]) in closed form; None where there is none."""
        return None

    # --- sums over data -------------------------------------------------------------------------------------------------------------
    def statistics(self, f: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over the data, in float64 where the device has it, from which `log_prob_of` follows."""
        return {"log_prob": self.log_prob(f.float() if f.dtype.itemsize < 4 else f, y).detach().to(_accumulator(f)).sum()}

    def log_prob_of(self, statistics: dict[str, Tensor]) -> Tensor:
        """Σ_n log p(y_n | f_n) from summed statistics; differentiable in the parameters of those likelihoods that have sufficient
        statistics (`Gaussian`), a constant for the others."""
        return statistics["log_prob"]

    def ggn_scale(self) -> Tensor:
        """The scalar s with ggn = s · (a matrix free of the likelihood's parameters); 1 when there is none."""
        return torch.ones(())

    # --- predictive -----------------------------------------------------------------------------------------------------------------
    def forward(self, f) -> Distribution:
        if not isinstance(f, Tensor):
            return self.predict(*marginals(f))
        if f.ndim < 3:
            raise ValueError(f"{type(self).__name__}: likelihood(f) got a plain tensor of shape {list(f.shape)}, but samples have shape "
                             "[s, n, *positions, c]; use likelihood.conditional(f) for the latent values themselves, or f.unsqueeze(0)")
        return self.predict_from_samples(f)

    def predict(self, mean: Tensor, cov: Tensor) -> Distribution:
        """∫ p(y | f) N(f; mean [... c], cov [... c c]) df; in general a mixture over quadrature nodes that keeps the full covariance."""
        nodes, log_weights = nodes_of(mean, cov)
        return mixture(self.conditional(nodes), log_weights)

    def predict_from_samples(self, samples: Tensor) -> Distribution:
        """The equal-weight mixture over samples [s ... c]."""
        s = samples.shape[0]
        samples = samples.movedim(0, -2)
        return mixture(self.conditional(samples), samples.new_full(samples.shape[:-1], -math.log(s)))

    # --- as data --------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def arguments(self) -> dict:
        """The constructor's arguments that rebuild this likelihood as it is now."""

    def to_config(self) -> dict:
        """A JSON-able description from which `likelihoods.from_config` rebuilds the likelihood, parameters included."""
        config: Any = describe(self)
        return config

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_short(value)}" for name, value in self.arguments().items())


class Elementwise(Likelihood):
    """Likelihoods with one latent for each output, outputs independent given f: y [... c] (or [...] for c = 1).

    An heir gives the four functions of one latent; NaN in a single output drops that output alone.
    """

    placeholder = 1.0                                # what stands for a missing y during the arithmetic: inside every support

    @abstractmethod
    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _gradient(self, f: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _neg_hessian(self, f: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _fisher(self, f: Tensor) -> Tensor: ...

    @abstractmethod
    def _family(self, f: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """The torch distribution of each output: its class and parameters, each [... c]."""

    def target_shape(self, f):
        return f.shape

    def latents_for(self, d):
        return d

    def _observed(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.targets(f, y)
        observed = ~y.isnan()
        return observed, torch.where(observed, y, self.placeholder).to(f)

    def conditional(self, f):
        kind, parameters = self._family(f)
        return PerRow(kind(**parameters, validate_args=False))

    def predict(self, mean, cov):
        """For each output a mixture over its own marginal, in nodes spaced at half the likelihood's width 1/√Fisher, so that a narrow p(y | f)
        under a wide Gaussian is no comb of spikes. Correlation between outputs is left out; samples keep it."""
        width = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        with torch.no_grad():
            spread = torch.stack([self._fisher(mean + k * width) for k in (-3, 0, 3)]).amax(0).sqrt() * width
        nodes, log_weights = scalar_nodes(mean, width, spread)
        kind, parameters = self._family(nodes)                               # [q ... c], the likelihood's own [c] broadcast along outputs
        return PerRow(mixture(kind(**{name: value.movedim(0, -1) for name, value in parameters.items()}, validate_args=False), log_weights))

    def _only_observed(self, values: Tensor, observed: Tensor) -> Tensor:
        return torch.where(observed, values, torch.zeros_like(values))

    def log_prob(self, f, y):
        observed, y = self._observed(f, y)
        return self._only_observed(self._log_prob(f, y), observed).sum(-1)

    def gradient(self, f, y):
        observed, y = self._observed(f, y)
        return self._only_observed(self._gradient(f, y), observed)

    def neg_hessian(self, f, y):
        observed, y = self._observed(f, y)
        return torch.diag_embed(self._only_observed(self._neg_hessian(f, y), observed))

    def _masked_fisher(self, f: Tensor, y: Tensor | None) -> Tensor:
        fisher = self._fisher(f)
        return fisher if y is None else self._only_observed(fisher, self._observed(f, y)[0])

    def ggn(self, f, y=None):
        return torch.diag_embed(self._masked_fisher(f, y))

    def ggn_root(self, f, y=None):
        return torch.diag_embed(self._masked_fisher(f, y).sqrt())


class Positive:
    """A positive parameter that a likelihood learns: `noise = Positive()` keeps its logarithm in `log_noise`, an nn.Parameter."""

    name: str
    log_name: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.log_name = name, f"log_{name}"

    @overload
    def __get__(self, module: None, owner: type) -> Positive: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> Tensor: ...

    def __get__(self, module, owner=None):
        return self if module is None else getattr(module, self.log_name).exp()

    def __set__(self, module: nn.Module, value: float | Tensor) -> None:
        value = _as_parameter(value)
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{type(module).__name__}: {self.name} must be positive and finite but is {value.tolist()}")
        old = module._parameters.get(self.log_name)
        if old is None:
            module.register_parameter(self.log_name, nn.Parameter(value.log()))
        else:
            if value.ndim and value.shape != old.shape:
                raise ValueError(f"{type(module).__name__}: {self.name} has shape {list(old.shape)} but the new value "
                                 f"{list(value.shape)}; build a new likelihood for another shape")
            with torch.no_grad():
                old.copy_(value.log())


def _as_parameter(value: float | list | Tensor) -> Tensor:
    """A parameter's value: a floating tensor in its own dtype, a plain number in float64 (rounding 0.1 to float32 costs 1e-8)."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach()
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _constant(value: float | list | Tensor) -> Tensor:
    """A buffer's value: as `_as_parameter`, in memory of its own."""
    return _as_parameter(value).clone()


def _latents(needed: int) -> str:
    return f"{needed} kernel{'s' * (needed > 1)} for a Gaussian process, {needed} output{'s' * (needed > 1)} for a net"


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _like(parameter: Tensor, f: Tensor) -> Tensor:
    """A parameter in the latents' dtype and device, differentiable."""
    return parameter.to(device=f.device, dtype=f.dtype)


def _randn(f: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers shaped like f, drawn where the generator lives."""
    device = f.device if generator is None else generator.device
    return torch.randn(f.shape, dtype=f.dtype, device=device, generator=generator).to(f.device)


def _rand(f: Tensor, generator: torch.Generator | None) -> Tensor:
    device = f.device if generator is None else generator.device
    return torch.rand(f.shape, dtype=f.dtype, device=device, generator=generator).to(f.device)


def _short(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():.4g}" if value.ndim == 0 else f"tensor{list(value.shape)}" if value.numel() > 6 else str(value.tolist())
    return repr(value)
