"""The trained weights of a network as one vector, in torch's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector
from bayesgn.ggn.structure import accumulator


class Weights:
    """θ [p] ↔ the parameters of a net, their gradients, and numbers that each parameter group has (lr, weight decay).

    Args:
        net: the network.
        parameters: names, ``{name: mask}``, or a list of groups ``{"parameters": names, "lr": …, "weight_decay": …}``; None for all.

    Attributes:
        vector: where each parameter lies in θ.
        groups: for ``torch.optim.Optimizer``: ``{"params": tensors, …}``.
    """

    def __init__(self, net: nn.Module, parameters: Any) -> None:
        self.net = net
        chosen = _groups(parameters)
        self.vector = ParameterVector.of(net, _joined(chosen))
        self._own = self.vector.tensors(net)
        own, first = self.own(), _first_names(net)
        members = [set(own) if g["parameters"] is None else {first[n] for n in g["parameters"]} for g in chosen]
        self.groups = [
            {"params": [p for n, p in own.items() if n in names], **{k: v for k, v in g.items() if k != "parameters"}}
            for g, names in zip(chosen, members, strict=True)
        ]
        self._places = [[s for n, s in self.vector.slices.items() if n in names] for names in members]

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, by name."""
        return self._own

    def check(self) -> None:
        """Raise where the net's parameters are no longer those that are trained."""
        replaced = [name for name, p in self.vector.tensors(self.net).items() if p is not self._own[name]]
        if replaced:
            raise RuntimeError(
                f"{replaced[0]} of the net was replaced after the optimizer was made (load_state_dict with assign=True?); build a new optimizer."
            )

    @property
    def first(self) -> nn.Parameter:
        """One of them: it tells device and dtype."""
        return next(iter(self.own().values()))

    @property
    def zero(self) -> Tensor:
        """0 on the weights' device, in the dtype of sums over data."""
        return torch.zeros((), dtype=accumulator(self.first), device=self.first.device)

    def flat(self) -> Tensor:
        """θ [p], in the dtype of sums."""
        return self.vector.flatten(self.net).to(self.zero)

    def shaped(self, θ: Tensor) -> dict[str, Tensor]:
        """θ [p] as tensors of the parameters' shapes and dtype."""
        return {name: t.to(self._own[name].dtype) for name, t in self.vector.unflatten(θ, self.net).items()}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Write into the net."""
        for name, p in self.own().items():
            p.copy_(values[name])

    @torch.no_grad()
    def set_grad(self, gradient: Tensor, add: bool = False) -> None:
        """Write a gradient [p] into ``.grad`` (or add it); entries that are not trained have 0."""
        for name, p in self.own().items():
            part = gradient[self.vector.slices[name]].to(p)
            if name in self.vector.masks:
                part = torch.zeros_like(p).reshape(-1).index_copy(0, self.vector.masks[name], part)
            part = part.reshape(p.shape)
            p.grad = p.grad + part if add and p.grad is not None else part.clone()

    def gradient(self) -> Tensor:
        """``.grad`` as it stands [p]; 0 where there is none."""
        parts = []
        for name, p in self.own().items():
            flat = torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)
            parts.append(flat[self.vector.masks[name]] if name in self.vector.masks else flat)
        return torch.cat(parts).detach().to(self.zero)

    def spread(self, groups: list[dict[str, Any]], key: str) -> Tensor:
        """A number of each parameter group as a vector [p]."""
        if len({group[key] for group in groups}) == 1:
            return self.zero.new_full((self.vector.numel,), groups[0][key])
        out = self.zero.new_zeros(self.vector.numel)
        for group, places in zip(groups, self._places, strict=True):
            for where in places:
                out[where] = group[key]
        return out


def _groups(parameters: Any) -> list[dict[str, Any]]:
    if isinstance(parameters, Iterator):
        parameters = list(parameters)
    if not (isinstance(parameters, list) and parameters and all(isinstance(g, Mapping) for g in parameters)):
        if isinstance(parameters, Iterable) and not isinstance(parameters, (str, Mapping)) and any(isinstance(p, Tensor) for p in parameters):
            raise TypeError("parameters holds tensors; expected names of the net's parameters, e.g. ['0.weight'] (the net is linearised by name).")
        return [{"parameters": parameters}]
    for g in parameters:
        if "parameters" not in g:
            raise ValueError(f"a parameter group has {sorted(g)}; expected 'parameters' (names), and 'lr' or 'weight_decay' where they differ.")
        unknown = set(g) - {"parameters", "lr", "weight_decay"}
        if unknown:
            raise ValueError(f"a parameter group has {sorted(unknown)}; it may have 'lr' and 'weight_decay', all else is shared.")
    return [dict(g) for g in parameters]


def _joined(groups: list[dict[str, Any]]) -> Any:
    """The selections of all groups as one."""
    if len(groups) == 1:
        return groups[0]["parameters"]
    names: dict[str, Tensor | None] = {}
    for g in groups:
        part = g["parameters"]
        for n in part:
            if n in names:
                raise ValueError(f"{n} is in two parameter groups.")
            names[n] = part[n] if isinstance(part, Mapping) else None
    return names


def _first_names(net: nn.Module) -> dict[str, str]:
    """Every name of a parameter to the first one: a tied parameter counts once."""
    firsts = {id(p): n for n, p in net.named_parameters()}
    return {n: firsts[id(p)] for n, p in net.named_parameters(remove_duplicate=False)}
