"""Hyper-parameters of a model and its likelihood: names, values in natural units, and coordinates in which a step is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bayesgn.ggn.structure import accumulator


class Hyperparameter(NamedTuple):
    """One free parameter.

    Attributes:
        name: such as ``kernels.0.base_kernel.lengthscale`` or ``likelihood.noise``.
        parameter: as it is stored (gpytorch's raw parameter, a likelihood's logarithm).
        value: a function of nothing that gives it in natural units.
        constraint: gpytorch's constraint, or None.
        scale: of a free parameter: the size of a step.
    """

    name: str
    parameter: nn.Parameter
    value: Callable[[], Tensor]
    constraint: Any = None
    scale: float = 1.0

    # -- z: log(value − lower) of what has a lower bound, the logit of what has two, the parameter itself otherwise ------------------------

    def read(self) -> Tensor:
        """z, flat."""
        p = self.parameter.detach()
        if not self._constrained:
            return (p / self.scale).reshape(-1)
        value = self.constraint.transform(p)
        low, high = self._bounds()
        above: Any = 0.0 if low is None else (value - low).log()
        below: Any = 0.0 if high is None else (high - value).log()
        return (above - below).reshape(-1)

    def raw(self, z: Tensor) -> Tensor:
        """The parameter at z, differentiable."""
        z = z.reshape(self.parameter.shape)
        if not self._constrained:
            return z * self.scale
        low, high = self._bounds()
        if low is None:
            assert high is not None
            value = high - (-z).exp()
        elif high is None:
            value = low + z.exp()
        else:
            value = low + (high - low) * z.sigmoid()
        return self.constraint.inverse_transform(value)

    def limits(self) -> tuple[float, float]:
        """Bounds of z: a constraint that gpytorch does not enforce by a transform is a box."""
        if self.constraint is None or self._constrained:
            return -np.inf, np.inf
        return float(self.constraint.lower_bound.max()) / self.scale, float(self.constraint.upper_bound.min()) / self.scale

    @property
    def _constrained(self) -> bool:
        return self.constraint is not None and self.constraint.enforced and any(b is not None for b in self._bounds())

    def _bounds(self) -> tuple[Tensor | None, Tensor | None]:
        low, high = (torch.as_tensor(b).to(self.parameter) for b in (self.constraint.lower_bound, self.constraint.upper_bound))
        return low if bool(low.isfinite().all()) else None, high if bool(high.isfinite().all()) else None


class Hyperparameters:
    """The free parameters of several modules as one vector z; those with ``requires_grad_(False)`` are left out.

    Args:
        modules: by the prefix of their parameters' names.
        spread: of the latent functions, the scale of a step in a mean function's parameters.
    """

    def __init__(self, modules: dict[str, nn.Module], spread: float = 1.0) -> None:
        self.all: list[Hyperparameter] = []
        seen: set[int] = set()
        for prefix, module in modules.items():
            for path, owner in module.named_modules():
                for name, p in owner.named_parameters(recurse=False):
                    if p.requires_grad and id(p) not in seen:
                        seen.add(id(p))
                        self.all.append(_described(".".join(part for part in (prefix, path) if part), owner, name, p, spread))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [h.parameter for h in self.all]

    def __len__(self) -> int:
        return sum(h.parameter.numel() for h in self.all)

    def names(self) -> list[str]:
        """A name for each entry of z."""
        return [h.name if h.parameter.numel() == 1 else f"{h.name}[{i}]" for h in self.all for i in range(h.parameter.numel())]

    def values(self, most: int = 50) -> dict[str, Any]:
        """In natural units, numbers or lists; tensors of more than so many entries (inducing inputs) are left out."""
        with torch.no_grad():
            values = {h.name: h.value() for h in self.all if h.parameter.numel() <= most}
        return {name: v.item() if v.numel() == 1 else v.tolist() for name, v in values.items()}

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = zip(*[h.limits() for h in self.all for _ in range(h.parameter.numel())], strict=True)
        return np.array(low), np.array(high)

    def read(self) -> np.ndarray:
        return np.concatenate([h.read().double().cpu().numpy() for h in self.all])

    def write(self, z: np.ndarray) -> None:
        with torch.no_grad():
            for h, part in self._parts(z):
                h.parameter.copy_(h.raw(part))

    def chain(self, z: np.ndarray, gradient: list[Tensor]) -> np.ndarray:
        """The gradient in z, from that in the parameters."""
        out = []
        for (h, part), g in zip(self._parts(z), gradient, strict=True):
            part.requires_grad_()
            with torch.enable_grad():
                raw = h.raw(part)
            out.append(torch.autograd.grad(raw, part, g.to(raw))[0].double().cpu().numpy())
        return np.concatenate(out)

    def _parts(self, z: np.ndarray) -> list[tuple[Hyperparameter, Tensor]]:
        out, start = [], 0
        for h in self.all:
            stop = start + h.parameter.numel()
            out.append((h, torch.from_numpy(z[start:stop].copy()).to(h.parameter.device, accumulator(h.parameter))))
            start = stop
        return out


def _described(prefix: str, owner: nn.Module, name: str, p: nn.Parameter, spread: float) -> Hyperparameter:
    find: Any = getattr(owner, "constraint_for_parameter_name", None)  # gpytorch's
    constraint = find(name) if find is not None else None
    plain = name.removeprefix("raw_").removeprefix("log_")
    natural = getattr(owner, plain, None) if plain != name else None
    value: Callable[[], Tensor]
    if constraint is not None:
        value = lambda: constraint.transform(p)
    elif isinstance(natural, Tensor) and natural.numel() == p.numel():
        value = lambda: getattr(owner, plain)
    else:
        plain, value = name, lambda: p
    # A point among m is moved in units of their spread.
    scale = float(p.detach().std(0).mean()) if p.dim() == 2 and len(p) > 1 else 1.0
    scale = max(1.0, spread) if ".means." in f".{prefix}." else scale
    return Hyperparameter(f"{prefix}.{plain}" if prefix else plain, p, value, constraint, scale if scale > 0 else 1.0)


@contextmanager
def in_double(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, the parameters are float64 where the device has it: rounding to float32 would make stairs of a smooth function."""
    before = [p.dtype for p in parameters]
    try:
        for p in parameters:
            p.data = p.data.to(accumulator(p))
        yield
    finally:
        for p, dtype in zip(parameters, before, strict=True):
            p.data = p.data.to(dtype)


def log_prior(modules: dict[str, nn.Module]) -> Tensor | None:
    """Σ log p(hyper-parameter) over the priors registered with gpytorch, in nats; None where there are none."""
    terms, seen = [], set()
    for module in modules.values():
        for part in module.modules():
            named_priors: Any = getattr(part, "named_priors", None)
            if named_priors is not None:
                for _, owner, prior, closure, _ in named_priors():
                    if (id(owner), id(prior), id(closure)) not in seen:
                        seen.add((id(owner), id(prior), id(closure)))
                        terms.append(prior.log_prob(closure(owner)).sum())
    return sum(terms) if terms else None  # type: ignore[return-value]
