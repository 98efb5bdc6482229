"""Named parameters of a network ↔ one flat vector, and subsets of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Selection = Mapping[str, "Tensor | None"]


def unwrap(net: nn.Module) -> nn.Module:
    """The net inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if hasattr(net, "_orig_mod"):
            net = net._orig_mod  # type: ignore[assignment]
        elif isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        else:
            return net


@dataclass(frozen=True)
class ParameterVector:
    """Where each selected parameter of a net lies in the flat weight vector θ [p].

    Order is that of ``net.named_parameters()``; a tied parameter counts once, under its first name. ``masks`` holds,
    for a parameter of which only some entries are selected, their flat indices.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(net: nn.Module, parameters: Iterable[str] | Selection | None = None) -> ParameterVector:
        """Select ``parameters`` of ``net``: ``None`` (all that require grad), names, or ``{name: mask or None}``.

        Raises:
            ValueError: when nothing is left to be uncertain about, or a name or mask does not fit the net.
        """
        net = unwrap(net)
        own = dict(net.named_parameters())
        if parameters is None:
            chosen: dict[str, Tensor | None] = {name: None for name, p in own.items() if p.requires_grad}
            if not chosen:
                raise ValueError(
                    f"{type(net).__name__} has no parameter with requires_grad=True ({len(own)} parameters, all frozen); "
                    "unfreeze some, or name those to treat as uncertain: Network(net, parameters=[...])."
                )
        elif isinstance(parameters, Mapping):
            chosen = dict(parameters)
        elif isinstance(parameters, str):
            raise TypeError(f"parameters={parameters!r} is a str; pass a list of names, e.g. [{parameters!r}].")
        else:
            chosen = dict.fromkeys(parameters)
        odd = next((name for name in chosen if not isinstance(name, str)), None)
        if odd is not None:
            raise TypeError(
                f"parameters holds {type(odd).__name__} objects; expected names, e.g. {list(own)[:2]}, or masks by name."
            )
        # A tied parameter is listed once by named_parameters(); accept any of its names.
        aliases = {}
        for name, p in net.named_parameters(remove_duplicate=False):
            aliases[name] = next(first for first, q in own.items() if q is p)
        unknown = [name for name in chosen if name not in aliases]
        if unknown:
            raise ValueError(f"parameters {unknown} are not in the net; it has {list(own)}.")
        chosen = {aliases[name]: mask for name, mask in chosen.items()}
        masks = {}
        for name, mask in chosen.items():
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask for {name} is a {type(mask).__name__}; expected a bool tensor {tuple(own[name].shape)} or None.")
            if mask.dtype != torch.bool or mask.shape != own[name].shape:
                raise ValueError(
                    f"mask for {name} is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(own[name].shape)}."
                )
            index = mask.reshape(-1).nonzero()[:, 0]
            if len(index) < mask.numel():
                masks[name] = index.to(own[name].device)
        names = tuple(n for n in own if n in chosen and not (n in masks and len(masks[n]) == 0))
        if not names:
            raise ValueError("the selected subset of parameters is empty; select at least one weight.")
        not_float = [n for n in names if not own[n].is_floating_point()]
        if not_float:
            raise ValueError(f"parameters {not_float} are not floating point ({own[not_float[0]].dtype}).")
        return ParameterVector(names, tuple(own[n].shape for n in names), {n: m for n, m in masks.items() if n in names})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of selected entries of each parameter."""
        return tuple(
            len(self.masks[n]) if n in self.masks else s.numel() for n, s in zip(self.names, self.shapes, strict=True)
        )

    @property
    def numel(self) -> int:
        """p, the number of selected weights."""
        return sum(self.sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in the flat vector."""
        out, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            out[name] = slice(start, start + size)
            start += size
        return out

    def tensors(self, net: nn.Module) -> dict[str, nn.Parameter]:
        """The selected parameters themselves."""
        own = dict(net.named_parameters())
        return {name: own[name] for name in self.names}

    def flatten(self, net: nn.Module) -> Tensor:
        """θ [p] of the net as it stands (a copy)."""
        parts = []
        for name, p in self.tensors(net).items():
            flat = p.detach().reshape(-1)
            parts.append(flat[self.masks[name]] if name in self.masks else flat)
        return torch.cat(parts).clone()

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """[... p] -> {name: [... size]}."""
        if vector.shape[-1] != self.numel:
            raise ValueError(f"vector has {vector.shape[-1]} entries, the selected weights are {self.numel}.")
        return {name: vector[..., s] for name, s in self.slices.items()}

    def unflatten(self, vector: Tensor, net: nn.Module) -> dict[str, Tensor]:
        """[p] -> {name: tensor of the parameter's shape}, unselected entries as they stand in ``net``."""
        own, out = self.tensors(net), {}
        for (name, part), shape in zip(self.split(vector).items(), self.shapes, strict=True):
            if name in self.masks:
                part = own[name].detach().to(part).reshape(-1).index_copy(0, self.masks[name], part)
            out[name] = part.reshape(shape)
        return out
