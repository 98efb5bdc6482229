"""Packages that are imported where they are first used: heavy ones quietly, optional ones with advice when they are missing."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quiet_import() -> Iterator[None]:
    """Silence the one warning that importing gpytorch or torchmetrics raises: what they import still decorates with `torch.jit.script`.

    Example:
        >>> with quiet_import():
        ...     import gpytorch
    """
    with warnings.catch_warnings():
        # torch words it "is deprecated", and "is not supported in Python 3.14+" there.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script(_method)?` is ", FutureWarning)
        yield


@functools.cache
def load_forward_mode() -> None:
    """Let torch compile its rules of forward mode, which it does at the first use in a process, warning of its own ``torch.jit.script``."""
    import torch
    from torch.autograd import forward_ad

    with quiet_import(), forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def require(name: str, extra: str) -> ModuleType:
    """The module `name`, or an ImportError that says which extra brings it.

    Example:
        >>> require("json", extra="demo").dumps([1])
        '[1]'
        >>> require("no_such_package.part", extra="demo")
        Traceback (most recent call last):
        ImportError: this needs the package no_such_package, which is not installed; `pip install 'bayesgn[demo]'` brings it
    """
    try:
        with quiet_import():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there; something that it needs is not
        raise ImportError(
            f"this needs the package {package}, which is not installed; `pip install 'bayesgn[{extra}]'` brings it",
            name=package,
        ) from error


def load_arviz() -> ModuleType:
    """arviz, without what it says of its next version at import; :func:`require` s it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        return require("arviz", extra="diagnostics")
