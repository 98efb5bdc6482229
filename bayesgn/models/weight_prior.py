"""Gaussian priors over weights: θ ~ N(mean, diag(precision)⁻¹)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector, unwrap

if TYPE_CHECKING:
    from bayesgn.ggn import Block


class WeightPrior(nn.Module):
    """A Gaussian over weights with one precision for all, for each layer, or for each weight.

        θ ~ N(mean, diag(precision)⁻¹)

    A layer is a module that owns parameters, weight and bias together: a bias alone cannot run away when tuned.

    Args:
        precision: inverse variance, positive; a number here, a vector through :meth:`per_layer` and :meth:`per_weight`.
        mean: where the prior is centred: a number, or ``{parameter name: tensor}`` (others 0).

    Raises:
        ValueError: for a precision that is not positive and finite.

    Example:
        >>> from torch import nn
        >>> WeightPrior(2.0)
        WeightPrior(precision=2)
        >>> WeightPrior.per_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))).precision.shape
        torch.Size([2])

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation networks".
    """

    def __init__(self, precision: float | Tensor = 1.0, mean: float | Mapping[str, Tensor] = 0.0) -> None:
        super().__init__()
        value = _as_precision(precision)
        _check_positive(value)
        self.log_precision = nn.Parameter(value.detach().clone().log())
        if not isinstance(mean, (int, float, Mapping)):
            raise TypeError(f"mean is a {type(mean).__name__}; expected a number, or tensors by parameter name: {{'0.weight': ...}}.")
        self.mean = float(mean) if not isinstance(mean, Mapping) else {k: v.detach().clone() for k, v in mean.items()}
        for name, part in self.mean.items() if isinstance(self.mean, dict) else [("all weights", torch.tensor(self.mean))]:
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"the prior mean of {name} holds {part[~torch.isfinite(part)].reshape(-1)[0].item()}; expected finite numbers.")
        self.groups: dict[str, int] | None = None  # layer name -> entry of the precision vector

    @staticmethod
    def per_layer(net: nn.Module, precision: float | Tensor = 1.0, mean: float | Mapping[str, Tensor] = 0.0) -> WeightPrior:
        """One precision for each module of ``net`` that owns parameters."""
        layers = [name for name, m in unwrap(net).named_modules() if any(True for _ in m.parameters(recurse=False))]
        value = _as_precision(precision)
        if value.dim() > 0 and value.shape != (len(layers),):
            raise ValueError(f"precision has shape {tuple(value.shape)}; expected a number or one for each of {layers}.")
        prior = WeightPrior(value.expand(len(layers)), mean)
        prior.groups = {name: i for i, name in enumerate(layers)}
        return prior

    @staticmethod
    def per_weight(
        net: nn.Module, precision: float | Tensor = 1.0, mean: float | Mapping[str, Tensor] = 0.0, parameters=None
    ) -> WeightPrior:
        """One precision for each selected weight of ``net``, in the order of its parameters."""
        p = ParameterVector.of(net, parameters).numel
        value = _as_precision(precision)
        if value.dim() > 0 and value.shape != (p,):
            raise ValueError(f"precision has shape {tuple(value.shape)}; expected a number or one for each of the {p} weights.")
        return WeightPrior(value.expand(p), mean)

    @property
    def precision(self) -> Tensor:
        """Inverse variance(s), differentiable in ``log_precision``."""
        return self.log_precision.exp()

    @precision.setter
    def precision(self, value: float | Tensor) -> None:
        new = _as_precision(value).to(self.log_precision)
        _check_positive(new)
        if new.dim() > 0 and new.shape != self.log_precision.shape:
            raise ValueError(f"the prior's precision has shape {tuple(self.log_precision.shape)} but the new value {tuple(new.shape)}.")
        with torch.no_grad():
            self.log_precision.copy_(new.log().expand_as(self.log_precision))

    def of(self, blocks: list[Block]) -> list[Tensor]:
        """The precision of every block: a scalar, or [p_block]. A scalar prior answers with one and the same tensor."""
        precision = self.precision
        if precision.dim() == 0:
            return [precision] * len(blocks)
        if self.groups is not None:
            missing = [b.name for b in blocks if b.name not in self.groups]
            if missing:
                raise ValueError(f"the prior has layers {list(self.groups)} but the net has {missing}; was it made for another net?")
            return [precision[self.groups[b.name]] for b in blocks]
        p = blocks[-1].where.stop
        if precision.shape != (p,):
            raise ValueError(
                f"the prior has {len(precision)} precisions but {p} weights are selected; was a layer frozen after it was made?"
            )
        return [precision[b.where] for b in blocks]

    def mean_vector(self, vector: ParameterVector, like: Tensor) -> Tensor:
        """The prior mean [p] of the selected weights."""
        if not isinstance(self.mean, Mapping):
            return like.new_full((vector.numel,), self.mean)
        unknown = set(self.mean) - set(vector.names)
        if unknown:
            raise ValueError(f"the prior mean names {sorted(unknown)}, which are not among the selected parameters.")
        parts = []
        for name, shape, size in zip(vector.names, vector.shapes, vector.sizes, strict=True):
            value = self.mean.get(name)
            if value is None:
                parts.append(like.new_zeros(size))
                continue
            if value.shape != shape:
                raise ValueError(f"the prior mean of {name} has shape {tuple(value.shape)}; expected {tuple(shape)}.")
            flat = value.reshape(-1).to(like)
            parts.append(flat[vector.masks[name]] if name in vector.masks else flat)
        return torch.cat(parts)

    def extra_repr(self) -> str:
        precision = self.precision.detach()
        return f"precision={precision.item():.4g}" if precision.dim() == 0 else f"precisions={len(precision)}"


def _as_precision(value: Any) -> Tensor:
    if isinstance(value, str) or value is None:
        raise TypeError(f"prior precision is {value!r}; expected a positive number or a tensor of them, e.g. 1.0.")
    return torch.as_tensor(value, dtype=torch.float64)


def _check_positive(value: Tensor) -> None:
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        bad = value[~(torch.isfinite(value) & (value > 0))].reshape(-1)[0].item() if value.numel() else value
        raise ValueError(f"prior precision {bad} is not positive and finite; a precision is an inverse variance, e.g. 1.0.")
