"""Explicit per-datum Jacobians by torch.func, for weights whose module has no compact factors.

Used for norms, recurrent cells, attention's packed projections, raw and tied parameters. ``vmap`` over data where the
net allows it; a loop over data otherwise (data-dependent control flow, fused kernels without a batching rule).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from bayesgn import _data

logger = logging.getLogger("bayesgn.ggn")


def jacobians_vmap(net: nn.Module, names: list[str], call: Callable, x: Any, S: Tensor) -> dict[str, Tensor]:
    """Jᵀ S of each datum {name: [n k size]} with both data and columns vectorised."""
    weights = {n: p.detach() for n, p in net.named_parameters() if n in set(names)}
    n = _data.len_of(x)
    axes = _data.apply(x, lambda t: 0 if t.dim() > 0 and t.shape[0] == n else None)

    def per_datum(datum: Any, s: Tensor) -> dict[str, Tensor]:
        one = _data.apply(datum, lambda t: t)
        one = _unsqueeze(one, axes)

        def f(w: dict[str, Tensor]) -> Tensor:
            return call(net, one, w).reshape(-1)

        _, pull = vjp(f, weights)  # pyright: ignore[reportAssignmentType]
        (J,) = vmap(pull, in_dims=1)(s)
        return {name: j.reshape(len(j), -1) for name, j in J.items()}

    return vmap(per_datum, in_dims=(axes, 0), randomness="different")(x, S)


def _unsqueeze(x: Any, axes: Any) -> Any:
    if isinstance(x, Tensor):
        return x[None] if axes == 0 else x
    if isinstance(x, dict):
        return {k: _unsqueeze(v, axes[k]) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(_unsqueeze(v, a) for v, a in zip(x, axes, strict=True))
    return x


def jacobians_loop(net: nn.Module, names: list[str], call: Callable, x: Any, S: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
    """The same by one small forward per datum and one backward per column: slow, and always right."""
    own = dict(net.named_parameters())
    # New leaves on the same storage: with a graph kept, a later backward must not reach the net's own .grad.
    replaced = {name: own[name].detach().requires_grad_() for name in names} if create_graph else None
    weights = [own[name] for name in names] if replaced is None else list(replaced.values())
    rows: list[list[Tensor]] = []
    for start, one in _data.split(x, 1):
        f = call(net, one, replaced).reshape(-1)
        columns = []
        for s in S[start].unbind(1):
            grads = torch.autograd.grad(
                f, weights, s, retain_graph=True, allow_unused=True, create_graph=create_graph, materialize_grads=True
            )
            columns.append(torch.cat([g.reshape(-1) for g in grads]))
        rows.append(columns)
    J = torch.stack([torch.stack(columns) for columns in rows])
    return dict(zip(names, J.split([w.numel() for w in weights], dim=-1), strict=True))
