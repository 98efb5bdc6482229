"""Arguments that cannot be right: what came, what was expected."""

from __future__ import annotations

from typing import Any


def check_kind(name: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError for a value of another kind, and for a class where an object is meant."""
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{name} is the class {value.__name__}; pass an object: {value.__name__}(...).")
    raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected a {expected}.")
