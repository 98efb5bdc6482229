"""Likelihoods as JSON: a class name and its constructor's arguments, nothing that could run."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["describe", "from_config"]


def describe(value):
    """A JSON-able form of numbers, strings, tensors and of objects with `arguments()`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"tensor": value.detach().cpu().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if hasattr(value, "arguments"):
        return {"class": type(value).__name__, **{name: describe(item) for name, item in value.arguments().items()}}
    raise TypeError(f"{value!r} (a {type(value).__name__}) has no description in JSON; give it an `arguments()` method and export its class")


def from_config(config: dict):
    """The likelihood that `likelihood.to_config()` described.

    Only classes exported by `bayesgn.likelihoods` are built, so that a config from a stranger runs nothing.

    Raises:
        ValueError: an unknown class or an argument that its constructor does not take.

    >>> from bayesgn import likelihoods
    >>> likelihoods.from_config(likelihoods.Gaussian(0.25).to_config())
    Gaussian(noise=0.25)
    """
    from .. import likelihoods

    if not isinstance(config, dict) or "class" not in config:
        raise ValueError(f'a likelihood\'s config is a dict with a "class", but this came: {config!r}')
    name = config["class"]
    kind = getattr(likelihoods, name, None) if name in likelihoods.__all__ else None
    if not isinstance(kind, type) or not hasattr(kind, "arguments"):
        known = sorted(n for n in likelihoods.__all__ if hasattr(getattr(likelihoods, n), "arguments"))
        raise ValueError(f"no likelihood is called {name!r}; known are {', '.join(known)} (FromDistribution has to be rebuilt in code)")
    try:
        return kind(**{key: _restore(value) for key, value in config.items() if key != "class"})
    except TypeError as error:
        raise ValueError(f"the config of {name} does not fit its constructor: {error}; was it written by another version?") from error


def _restore(value):
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return from_config(value)
    return [_restore(item) for item in value] if isinstance(value, list) else value
