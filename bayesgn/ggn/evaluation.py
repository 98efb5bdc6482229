"""Calling a net and leaving it as it came: whatever its input and output are, at rest, at its own or other weights."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesgn import _data


def call(net: nn.Module, x: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensor (or ``.logits``) that the net answers to x, at its own or at other ``weights``.

    A tuple or a mapping is spread over forward's arguments where forward takes them so, and handed over whole otherwise.
    """
    if isinstance(x, Mapping) and _binds(net, **x):
        args, kwargs = (), dict(x)
    elif isinstance(x, tuple) and _binds(net, *x):
        args, kwargs = x, {}
    else:
        args, kwargs = (x,), {}
    try:
        output = net(*args, **kwargs) if weights is None else functional_call(net, dict(weights), args, kwargs)
    except RuntimeError as error:
        p = next(net.parameters(), None)
        if type(error) is not RuntimeError or p is None:  # (running out of memory has a type of its own)
            raise
        raise RuntimeError(
            f"{type(net).__name__} (weights {p.dtype} on {p.device}) failed on {_data.describe(x)}: {error}"
        ) from error
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"the net returned {_data.describe(output)}; expected a tensor or an object with tensor `.logits`. "
        "Wrap the net in a module that returns its output tensor."
    )


def _binds(net: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the net's forward takes these arguments spread out."""
    try:
        inspect.signature(net.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def aliases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New leaves on the same storage: gradients that reach them are not the net's."""
    return {name: p.detach().requires_grad_() for name, p in weights.items()}


@contextlib.contextmanager
def at_rest(net: nn.Module, selected: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The net in eval mode with exactly the ``selected`` parameters requiring grad; as it came afterwards."""
    modes = [(m, m.training) for m in net.modules()]
    flags = [(p, p.requires_grad) for p in net.parameters()]
    buffers = [(m._buffers, dict(m._buffers)) for m in net.modules() if m._buffers]
    values = [(b, b._version, b.clone()) for _, own in buffers for b in own.values() if b is not None and _may_move(net, b)]
    chosen = {id(p) for p in selected.values()}
    try:
        for m, _ in modes:
            m.training = False
        for p, _ in flags:
            if p.requires_grad != (id(p) in chosen):
                p.requires_grad_(id(p) in chosen)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        for now, before in buffers:
            now.update(before)
        moved = set()
        for b, version, value in values:
            if b._version != version:
                moved.add(id(b))
                with torch.no_grad():
                    b.copy_(value)
        _MOVING[net] = moved | _MOVING.get(net, set())


# Which buffers a net's forward writes to (a counter, say), known after its first run: those are put back, the others not copied.
_MOVING: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def _may_move(net: nn.Module, buffer: Tensor) -> bool:
    return net not in _MOVING or id(buffer) in _MOVING[net]


def per_datum(output: Tensor, n: int) -> Tensor:
    """The output, if its first dimension runs over the n data."""
    if output.dim() == 0 or output.shape[0] != n:
        raise ValueError(
            f"the net answered {output.shape[0] if output.dim() else 'a single number'}{' rows' if output.dim() else ''} for {n} data "
            f"(output {tuple(output.shape)}); the first dimension of its output must run over data."
        )
    return output


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding of their dtype."""
    if a.shape != b.shape:
        return False
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(a.dtype, 5e-2)
    return bool((a - b).norm() <= tolerance * b.norm().clamp_min(torch.finfo(b.dtype).tiny))
