"""Blocks: how the selected weights of a net fall into units that share one curvature block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # J = δ ⊗ a
SCALES = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU,
)  # J = δ ∘ z with z the normalised input (PReLU: its negative part)  # fmt: skip
TAPPED = (*PRODUCTS, *SCALES)


@dataclass(frozen=True)
class Block:
    """One unit of the weight vector: a Linear / Conv / Embedding module with its bias, or a small explicit block.

    Attributes:
        name: the owning module's path ("" for the net itself).
        parameters: its selected parameters, in the net's order.
        where: its place in the flat vector θ.
        module: the module whose inputs and outputs are tapped, or ``None`` for an explicit Jacobian.
        mask: positions within the block's full weight order, when only some entries are selected.
        layout: how the tapped input's first dimensions map to data (see :data:`bayesgn.ggn.hooks.LAYOUTS`).
    """

    name: str
    parameters: tuple[str, ...]
    where: slice
    module: nn.Module | None = field(default=None, compare=False)
    mask: Tensor | None = field(default=None, compare=False)
    layout: str = "datum-first"

    @property
    def numel(self) -> int:
        """p of the block."""
        return self.where.stop - self.where.start

    @property
    def factored(self) -> bool:
        """Whether J = δ ⊗ a holds (so that Kronecker factors exist)."""
        return self.module is not None and self.mask is None and isinstance(self.module, PRODUCTS)

    @property
    def has_weight(self) -> bool:
        """Whether the block holds the module's weight."""
        return any(n.rpartition(".")[2] == "weight" for n in self.parameters)

    @property
    def has_bias(self) -> bool:
        """Whether the block holds the module's bias."""
        return any(n.rpartition(".")[2] == "bias" for n in self.parameters)


def find_blocks(net: nn.Module, vector: ParameterVector) -> list[Block]:
    """Group ``vector``'s parameters by owning module; tappable modules get their module, others an explicit block.

    A parameter that several modules hold (tied weights) makes its block explicit: J of the one use is not J of the net.
    """
    modules = dict(net.named_modules())
    uses: dict[int, int] = {}
    for module in modules.values():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    groups: dict[str, list[str]] = {}
    for name in vector.names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    own, slices, blocks = vector.tensors(net), vector.slices, []
    for owner, names in groups.items():
        module = modules[owner]
        tied = any(uses[id(own[n])] > 1 for n in names)
        tap = module if isinstance(module, TAPPED) and not tied and _plain(module) else None
        where = slice(slices[names[0]].start, slices[names[-1]].stop)
        blocks.append(Block(owner, tuple(names), where, tap, _local_mask(names, vector)))
    return blocks


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None  # else it couples the data of a batch, in eval mode too
    return True


def _local_mask(names: list[str], vector: ParameterVector) -> Tensor | None:
    if not any(n in vector.masks for n in names):
        return None
    shapes, parts, start = dict(zip(vector.names, vector.shapes, strict=True)), [], 0
    device = next(vector.masks[n].device for n in names if n in vector.masks)
    for n in names:
        size = shapes[n].numel()
        index = vector.masks.get(n)
        parts.append(start + (torch.arange(size, device=device) if index is None else index))
        start += size
    return torch.cat(parts)
