"""The engines by name, each with the same four functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from bayesgn._kalman import build, compiled, scan, small


def _smooth(chain, nat1, nat2):
    return compiled.Smooth.apply(chain.A, chain.Q, chain.P0, chain.H, nat1, nat2, chain.step)


_COMPILED = SimpleNamespace(smooth=_smooth, states=compiled.states, means=compiled.means, propagate=compiled.propagate)
ENGINES = {
    "compiled": _COMPILED,
    "compiled, workspace not kept": _COMPILED,
    "scan": scan,
    "scan on planes": scan,
}
NAMES = [name for name in ENGINES if "compiled" not in name or build.compiler() is not None]


@contextlib.contextmanager
def engine(name: str) -> Iterator:
    """An engine; "on planes" is the layout for many small matrices however few there are, "not kept" what long chains do."""
    before = small.ENTRIES, compiled.KEPT
    small.ENTRIES = 0 if "planes" in name else before[0]
    if "not kept" in name:
        compiled.KEPT = 0
        vars(compiled._own).clear()
    try:
        yield ENGINES[name]
    finally:
        small.ENTRIES, compiled.KEPT = before
