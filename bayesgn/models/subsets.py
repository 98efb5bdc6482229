"""Which weights are uncertain: the last layer, named ones, or masks. Pass the answer as ``Network(net, parameters=…)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector, unwrap

Subset = dict[str, "Tensor | None"]


def last_layer(net: nn.Module) -> Subset:
    """The parameters of the last module that owns any, in the order they are *registered* (in ``__init__``), not called.

    The two differ where a head is defined before the body, or a norm layer closes the net: look at what came back, and name the
    layer by :func:`named` where it is another.

    Example:
        >>> from torch import nn
        >>> list(last_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['2.weight', '2.bias']
    """
    owners: dict[str, list[str]] = {}
    for name, p in unwrap(net).named_parameters():
        if p.is_floating_point():
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    if not owners:
        raise ValueError(f"{type(net).__name__} has no parameters, so no last layer.")
    return dict.fromkeys(owners[list(owners)[-1]])


def named(net: nn.Module, *prefixes: str) -> Subset:
    """All parameters whose name equals or lies under one of ``prefixes`` (``"encoder.layer.5"``).

    Raises:
        ValueError: when a prefix matches nothing.

    Example:
        >>> from torch import nn
        >>> list(named(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "0", "2.bias"))
        ['0.weight', '0.bias', '2.bias']
    """
    out: Subset = {}
    for prefix in prefixes:
        found = [n for n, _ in unwrap(net).named_parameters() if n == prefix or n.startswith(prefix + ".")]
        if not found:
            raise ValueError(f"no parameter is named {prefix!r} or lies under it; the net has {[n for n, _ in unwrap(net).named_parameters()]}.")
        out.update(dict.fromkeys(found))
    return out


def magnitude(net: nn.Module, count: int) -> Subset:
    """Masks of the ``count`` weights largest in absolute value.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]])), net.bias.data.fill_(1.0)
        >>> magnitude(net, 1)
        {'weight': tensor([[False,  True]])}
    """
    return _top(net, {n: p.detach().abs() for n, p in _trainable(net).items()}, count)


def largest_variance(net: nn.Module, variances: Tensor, count: int) -> Subset:
    """Masks of the ``count`` weights with the largest posterior variance.

    Args:
        variances: marginal variances [p] of all trainable weights, as ``posterior.weight_variance()`` of a cheap
            (``ggn.Diag``) posterior gives them.

    Example:
        >>> largest_variance(nn.Linear(2, 1), torch.tensor([0.1, 0.3, 0.2]), 2)
        {'weight': tensor([[False,  True]]), 'bias': tensor([True])}

    Source: Daxberger et al. (2021), "Bayesian deep learning via subnetwork inference".
    """
    vector = ParameterVector.of(net)
    scores = {n: part.reshape(s) for (n, part), s in zip(vector.split(variances).items(), vector.shapes, strict=True)}
    return _top(net, scores, count)


def random_subset(net: nn.Module, count: int, generator: torch.Generator | None = None) -> Subset:
    """Masks of ``count`` weights drawn at random.

    Example:
        >>> masks = random_subset(nn.Linear(3, 2), 4, torch.Generator().manual_seed(0))
        >>> sum(int(mask.sum()) for mask in masks.values())
        4
    """
    scores = {n: torch.rand(p.shape, generator=generator).to(p.device) for n, p in _trainable(net).items()}
    return _top(net, scores, count)


def _trainable(net: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in unwrap(net).named_parameters() if p.requires_grad and p.is_floating_point()}


def _top(net: nn.Module, scores: dict[str, Tensor], count: int) -> Subset:
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(flat):
        raise ValueError(f"count={count}; expected between 1 and the {len(flat)} trainable weights of the net.")
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(count).indices] = True
    parts: Sequence[Tensor] = chosen.split([s.numel() for s in scores.values()])
    masks = {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
    return {n: mask for n, mask in masks.items() if bool(mask.any())}


