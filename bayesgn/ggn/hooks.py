"""The hook engine: inputs a and output gradients δ of every tapped module, whatever the net does around them.

A forward hook notes a module's input and the *gradient edge* of its output (the node in autograd's graph), so that an
in-place activation after the module does no harm. One backward pass per column of S then gives δ at every edge at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bayesgn.ggn.blocks import PRODUCTS, Block
from bayesgn.ggn.factors import Dense, Embedding, Factors, Linear, Masked

# At the tapped module: [(n t) … i], [t n … i], and no data at all: one answer ([1 …] or […]) that the net broadcasts.
LAYOUTS = ("datum-first", "datum-second", "broadcast")


@dataclass
class Tap:
    """One call of a tapped module."""

    input: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size


@contextlib.contextmanager
def tapping(blocks: list[Block], n: int, differentiable: bool = False) -> Iterator[dict[int, list[Tap]]]:
    """Record the calls of each block's module while the context is open; the net is clean afterwards.

    A block of layout "broadcast" (a position embedding) has its answer handed on n-fold, so that its δ is known by datum.
    """
    taps: dict[int, list[Tap]] = {i: [] for i, b in enumerate(blocks) if b.module is not None}
    handles = []

    def hook(i: int):
        def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:
                return None
            x = x if differentiable else x.detach()
            spread = blocks[i].layout == "broadcast"
            if spread:
                x, output = _spread(x, n), _spread(output, n)
            taps[i].append(Tap(x, x._version, get_gradient_edge(output), output.shape))
            return output if spread else None

        return note

    try:
        for i in taps:
            handles.append(blocks[i].module.register_forward_hook(hook(i), with_kwargs=True))  # type: ignore[union-attr]
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _spread(t: Tensor, n: int) -> Tensor:
    return (t if t.shape[0] == 1 else t[None]).expand(n, *t.shape[t.shape[0] == 1 :])


def stale(taps: dict[int, list[Tap]]) -> bool:
    """Whether a tapped input was overwritten in place after it was noted."""
    return any(tap.input._version != tap.version for calls in taps.values() for tap in calls)


def factors(block: Block, calls: list[Tap], deltas: list[Tensor], n: int) -> Factors:
    """Factors of one block from its calls and their output gradients [k *output shape]."""
    pieces = [_factors_of_call(block, _module(block), tap, δ, n) for tap, δ in zip(calls, deltas, strict=True)]
    joined = pieces[0].with_uses(pieces[1:]) if len(pieces) > 1 else pieces[0]
    return joined if block.mask is None else Masked(joined, block.mask)


def _module(block: Block) -> nn.Module:
    if block.module is None:
        raise ValueError(f"block {block.name!r} is explicit: it has no module to tap.")
    return block.module


def zero_factors(block: Block, n: int, k: int, like: Tensor) -> Factors:
    """Factors of a block that the outputs do not depend on."""
    module = _module(block)
    if not isinstance(module, PRODUCTS):
        f: Factors = Dense(like.new_zeros(n, k, block.numel if block.mask is None else _size(module)))
    elif isinstance(module, nn.Embedding):
        ids = torch.zeros(n, 1, dtype=torch.long, device=like.device)
        f = Embedding(ids, like.new_zeros(n, 1, k, module.embedding_dim), module.num_embeddings)
    else:
        groups = getattr(module, "groups", 1)
        weight = module.weight  # type: ignore[union-attr]
        i = (weight[0].numel() if block.has_weight else 0) + int(block.has_bias)
        a = like.new_zeros(n, groups, 1, i)
        f = Linear(a, like.new_zeros(n, groups, 1, k, weight.shape[0] // groups), block.has_weight, block.has_bias)
    return f if block.mask is None else Masked(f, block.mask)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _factors_of_call(block: Block, module: nn.Module, tap: Tap, δ: Tensor, n: int) -> Factors:
    a = tap.input
    if not isinstance(module, PRODUCTS):
        return _scale(block, module, a, δ, n)
    if isinstance(module, nn.Embedding):
        if block.layout == "datum-second":
            a, δ = a.transpose(0, 1), δ.transpose(1, 2)
        ids = a.reshape(n, -1)
        δ = δ.reshape(len(δ), n, -1, module.embedding_dim).permute(1, 2, 0, 3)
        if module.padding_idx is not None:
            δ = δ * (ids != module.padding_idx)[:, :, None, None]
        return Embedding(ids, δ, module.num_embeddings)
    if isinstance(module, nn.Linear):
        if block.layout == "datum-second":
            a, δ = a.transpose(0, 1), δ.transpose(1, 2)
        a = a.reshape(n, 1, -1, module.in_features)
        δ = δ.reshape(len(δ), n, 1, -1, module.out_features).permute(1, 2, 3, 0, 4)
        a = _homogeneous(a, block)
        return Linear(a, δ, block.has_weight, block.has_bias)
    if a.dim() == len(module.kernel_size) + 1:  # an unbatched call  # type: ignore[arg-type]
        a, δ = a[None], δ[:, None]
    if block.has_weight:
        columns = unfold(module, a, block.has_bias)
    else:
        columns = a.new_ones(a.shape[0], module.groups, δ[0, 0, 0].numel(), 1)  # type: ignore[arg-type]
    δ = δ.flatten(3).unflatten(2, (columns.shape[1], -1))  # [k b g o t]
    if columns.shape[0] != n:  # [(n t') g t i]: the net folded positions into the batch
        columns = columns.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3)
        δ = δ.unflatten(1, (n, -1)).movedim(2, 4).flatten(4, 5)
    return Linear(columns, δ.permute(1, 2, 4, 0, 3), block.has_weight, block.has_bias)


def _scale(block: Block, module: nn.Module, x: Tensor, δ: Tensor, n: int) -> Dense:
    """y = w ∘ z + b with z the normalised input: J_w = Σ_t δ ∘ z and J_b = Σ_t δ."""
    z = normalised(module, x)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        dims = len(module.normalized_shape)
        if block.layout == "datum-second":
            z, δ = z.transpose(0, 1), δ.transpose(1, 2)
        z, δ = z.flatten(-dims), δ.flatten(-dims)
    elif isinstance(module, nn.PReLU) and module.num_parameters == 1:
        z, δ = z[..., None], δ[..., None]
    else:
        z, δ = z.movedim(1, -1), δ.movedim(2, -1)
    d = z.shape[-1]
    z, δ = z.reshape(n, -1, d), δ.reshape(len(δ), n, -1, d)
    parts = []
    for name in block.parameters:
        parts.append((δ * z if name.rpartition(".")[2] == "weight" else δ).sum(2))
    return Dense(torch.cat(parts, dim=-1).transpose(0, 1))


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input after normalisation, before scale and shift."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.PReLU):
        return x.clamp(max=0)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    own = module.running_mean is None  # InstanceNorm  # type: ignore[union-attr]
    return F.instance_norm(x, module.running_mean, module.running_var, None, None, own, 0.0, module.eps)  # type: ignore[union-attr]


def _homogeneous(a: Tensor, block: Block) -> Tensor:
    """The bias is a weight on a constant input: append a ≡ 1."""
    if not block.has_weight:
        return a.new_ones(*a.shape[:-1], 1)
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) if block.has_bias else a


def unfold(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, bias: bool = False) -> Tensor:
    """Patches [n g t i] that a convolution multiplies its weights [g o i] with, in the weights' order; with ``bias`` a 1 at the end.

    Written once, into memory laid out [n g i t] (positions innermost, as the input has them), and viewed as [n g t i].
    """
    dims = len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    elif conv.padding == "same":
        x = F.pad(x, conv._reversed_padding_repeated_twice)
    elif conv.padding != "valid" and any(conv.padding):
        x = F.pad(x, [p for pad in reversed(conv.padding) for p in (pad, pad)])  # type: ignore[misc]
    for d in range(dims):
        reach = conv.dilation[d] * (conv.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, reach, conv.stride[d])[..., :: conv.dilation[d]]
    n, positions = x.shape[0], x.shape[2 : 2 + dims]  # x [n, C, L…, K…]
    patches = x.movedim(tuple(range(2, 2 + dims)), tuple(range(-dims, 0)))  # [n, C, K…, L…]
    patches = patches.unflatten(1, (conv.groups, -1))
    t, i = positions.numel(), patches.shape[2 : 3 + dims].numel()
    if x.requires_grad:  # a graph back to the input: no writing into a buffer
        out = patches.reshape(n, conv.groups, i, t)
        out = torch.cat([out, out.new_ones(n, conv.groups, 1, t)], dim=2) if bias else out
        return out.mT
    out = x.new_empty(n, conv.groups, i + bias, t)
    if bias:
        out[:, :, -1] = 1
    for group in range(conv.groups):  # [:, group, :i] is contiguous within a datum, so that it can be viewed as patches
        out[:, group, :i].unflatten(1, patches.shape[2 : 3 + dims]).unflatten(-1, positions).copy_(patches[:, group])
    return out.mT
