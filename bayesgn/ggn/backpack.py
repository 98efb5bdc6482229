"""The BackPACK engine: δ of every tapped module of a plain chain of modules, all columns in one sweep.

BackPACK's module derivatives multiply a whole matrix S [k n c] by the transposed Jacobian of each module
(``jac_t_mat_prod``; Dangel, Kunstner and Hennig, 2020, "BackPACK: Packing more into backprop"). We hand S over ourselves, so
every likelihood and rule is served, and keep δ and a instead of the weights' Jacobian. It runs on a copy of the net that
shares its storage, because BackPACK keeps inputs and outputs as attributes of modules.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn.ggn.blocks import Block
from bayesgn.ggn.hooks import Tap

# Modules whose BackPACK derivative tests/ggn/test_engines.py compares with autograd, in float64 but for the averaging pools: BackPACK's
# own kernel for those is float32, and a float64 net that has one goes to the hooks.
CHAIN = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Flatten, nn.Dropout, nn.Identity,
)  # fmt: skip


def chain_of(net: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The modules of a (nested) ``Sequential`` in order, or ``None`` if the net is not a plain chain BackPACK serves."""
    if type(net) is not nn.Sequential and type(net) not in CHAIN:
        return None

    def walk(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]] | None:
        if type(module) is not nn.Sequential:
            return [(prefix, module)] if _serves(module) else None
        out: list[tuple[str, nn.Module]] = []
        for name, child in module.named_children():
            part = walk(f"{prefix}.{name}" if prefix else name, child)
            if part is None:
                return None
            out += part
        return out

    chain = walk("", net)
    if chain is None or len({id(m) for _, m in chain}) < len(chain) or _children(net) != len(chain):
        return None  # a module used twice is listed once by named_children: count what the forward would run
    return chain


def _children(module: nn.Module) -> int:
    if type(module) is not nn.Sequential:
        return 1
    return sum(_children(child) for child in module)


def _serves(module: nn.Module) -> bool:
    if type(module) not in CHAIN or getattr(module, "inplace", False):
        return False
    if _hooked(module):
        return False
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
        return not module.return_indices and not module.ceil_mode
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return not module.ceil_mode and module.count_include_pad
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    return True


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class Engine:
    """BackPACK on one plain chain.

    Args:
        net: the network (untouched; a storage-sharing copy is worked on).
        blocks: the blocks to answer for; those with a module are tapped.
    """

    def __init__(self, net: nn.Module, blocks: list[Block]) -> None:
        chain = chain_of(net)
        if chain is None:
            raise ValueError("BackPACK serves plain chains of modules; this net is not one (see ggn.backpack.CHAIN).")
        from backpack.extensions import SqrtGGNExact

        shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
        twins = dict(copy.deepcopy(net, shared).named_modules())
        self.chain = [(name, twins[name]) for name, _ in chain]
        tapped = {b.name: i for i, b in enumerate(blocks) if b.module is not None}
        self.taps = [(position, tapped[name]) for position, (name, _) in enumerate(self.chain) if name in tapped]
        extensions = SqrtGGNExact()._BackpropExtension__module_extensions  # type: ignore[attr-defined]
        self.derivatives = [
            extensions[type(m)].derivatives if type(m) in extensions else None for _, m in self.chain
        ]  # Identity and Dropout in eval mode pass S through

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Raw output and the input of every module."""
        inputs = []
        with torch.no_grad():
            for _, m in self.chain:
                inputs.append(x)
                x = type(m).forward(m.eval(), x)
        return x, [*inputs, x]

    def pull(self, inputs: list[Tensor], S: Tensor) -> dict[int, tuple[list[Tap], list[Tensor]]]:
        """{block: ([tap], [δ [k n …]])} for S [k n c] at the raw output."""
        out: dict[int, tuple[list[Tap], list[Tensor]]] = {}
        tapped = dict(self.taps)
        first = min(tapped)
        try:
            with torch.no_grad():
                for position in range(len(self.chain) - 1, first - 1, -1):
                    _, module = self.chain[position]
                    if position in tapped:
                        a = inputs[position]
                        out[tapped[position]] = ([Tap(a, a._version, None, inputs[position + 1].shape)], [S])  # type: ignore[arg-type]
                    if position > first and not isinstance(module, (nn.Identity, nn.Dropout)):
                        module.input0, module.output = inputs[position], inputs[position + 1]  # type: ignore[assignment]
                        derivative = self.derivatives[position]
                        assert derivative is not None, f"BackPACK has no derivative for {type(module).__name__}"
                        S = derivative.jac_t_mat_prod(module, None, None, S)
        finally:
            for _, module in self.chain:
                module.__dict__.pop("input0", None)
                module.__dict__.pop("output", None)
        return out


def eligible(net: nn.Module, blocks: list[Block], x: Any, output: Tensor) -> bool:
    """Whether BackPACK can serve this net: a plain chain, every block tapped, one row of outputs for a datum."""
    return (
        isinstance(x, Tensor)
        and output.dim() == 2
        and all(b.module is not None for b in blocks)
        and not _hooked(net)
        and chain_of(net) is not None
    )
