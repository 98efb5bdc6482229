"""Batches: whatever a user hands over (loader, dataset, tensors, dicts) as checked (x, y) pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

LABEL_KEYS = ("labels", "label", "y", "target", "targets")


def batches(data: Any, batch_size: int = 256) -> Iterable[tuple[Any, Tensor]]:
    """A re-iterable of (x, y) batches from a DataLoader, a Dataset, a pair of tensors, or an iterable of batches.

    A batch is ``(x, y)`` or a mapping with one of the keys ``labels, label, y, target, targets``; x may be a tensor, a
    tuple or a mapping of tensors. An iterator (that can be walked once) is passed on as it is.

    Raises:
        TypeError, ValueError: with what came and what was expected.
    """
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        data = torch.utils.data.DataLoader(data, batch_size=batch_size)
    if isinstance(data, Tensor) or data is None or hasattr(data, "__array__"):
        raise TypeError(f"data is {describe(data)}; expected a DataLoader, a pair (x, y), or batches of such pairs.")
    if isinstance(data, Mapping) or _is_pair_of_arrays(data):
        x, y = _as_pair(data)
        _check_length(x, y)
        if len_of(x) == 0:
            raise ValueError("the data are empty (0 rows); there is nothing to condition on.")
        return [(part, y[start : start + len_of(part)]) for start, part in split(x, batch_size)]
    if isinstance(data, (tuple, list)) and len(data) == 2 and any(_is_array(v) for v in data) and all(_is_array(v) or tensors(v) for v in data):
        raise TypeError(
            f"data is a pair of {describe(data[0])} and {describe(data[1])}; expected tensors: (torch.from_numpy(x), torch.from_numpy(y)), x in "
            "the dtype of the net's weights (.float())."
        )
    if isinstance(data, Iterator):
        return map(_as_pair, data)
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}; expected a DataLoader, a pair (x, y), or batches of such pairs.")
    return _Pairs(data)


class _Pairs:
    def __init__(self, data: Iterable) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return map(_as_pair, iter(self.data))

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]


def _is_pair_of_arrays(data: Any) -> bool:
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and isinstance(data[1], Tensor)
        and len(tensors(data[0])) > 0
    )


def _is_array(value: Any) -> bool:
    """A numpy array, or what can be made one, that is no tensor."""
    return hasattr(value, "__array__") and hasattr(value, "shape") and not isinstance(value, Tensor)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(v, Tensor) for v in value)


def _as_pair(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        key = next((k for k in LABEL_KEYS if k in batch), None)
        if key is None:
            raise ValueError(f"a batch with keys {list(batch)} has no targets; expected one of {list(LABEL_KEYS)}.")
        x, y = {k: v for k, v in batch.items() if k != key}, batch[key]
        if not isinstance(y, Tensor):
            raise TypeError(f"the targets {key!r} of a batch are {describe(y)}; expected a tensor.")
        _check_length(x, y)
        return x, y
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        if isinstance(x, list) and _is_tensors(x):
            x = tuple(x)
        if not isinstance(y, Tensor):
            hint = "torch.from_numpy(y)" if hasattr(y, "__array__") else "a collate_fn that stacks them"
            raise TypeError(f"targets are {describe(y)}; expected a tensor. Use {hint}.")
        _check_length(x, y)
        return x, y
    if isinstance(batch, (tuple, list)) and len(batch) > 2 and _is_tensors(batch):
        return tuple(batch[:-1]), batch[-1]
    raise TypeError(f"a batch is {describe(batch)}; expected a pair (x, y) or a mapping with a key of {list(LABEL_KEYS)}.")


def _check_length(x: Any, y: Tensor) -> None:
    if y.dim() == 0:
        raise ValueError(f"targets are a single number ({y!r}); expected one for each of the {len_of(x)} data, [n] or [n c].")
    if len_of(x) != y.shape[0]:
        raise ValueError(f"x has {len_of(x)} rows but y has {y.shape[0]} (shape {tuple(y.shape)}); they must match.")


def tensors(x: Any) -> list[Tensor]:
    """The tensors of an input, whatever holds them."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        return [t for v in x.values() for t in tensors(v)]
    if isinstance(x, (tuple, list)):
        return [t for v in x for t in tensors(v)]
    return []


def len_of(x: Any) -> int:
    """Number of data in an input: the first dimension of its tensors."""
    parts = [t for t in tensors(x) if t.dim() > 0]
    if not parts:
        hint = " (torch.from_numpy(x))" if hasattr(x, "__array__") and not isinstance(x, Tensor) else ""
        raise TypeError(f"an input is {describe(x)}; expected a tensor{hint}, or a tuple or mapping of tensors, data first.")
    return parts[0].shape[0]


def apply(x: Any, function) -> Any:
    """``function`` on every tensor of an input, in the same container."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {k: apply(v, function) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(apply(v, function) for v in x)
    return x


def rows(x: Any, index: Any) -> Any:
    """Some data of an input (a slice or index along the first dimension of each tensor)."""
    n = len_of(x)
    return apply(x, lambda t: t[index] if t.dim() > 0 and t.shape[0] == n else t)


def split(x: Any, size: int) -> Iterator[tuple[int, Any]]:
    """(start, part) with at most ``size`` data each."""
    n = len_of(x)
    for start in range(0, n, size):
        yield start, (x if size >= n else rows(x, slice(start, start + size)))


def to(x: Any, device: torch.device) -> Any:
    """An input on ``device`` (dtypes are kept)."""
    on_meta = next((t for t in tensors(x) if t.is_meta), None)
    if on_meta is not None and device.type != "meta":
        raise ValueError(f"an input is {describe(on_meta)} on the meta device, which holds no numbers; pass real data (the net is on {device}).")
    return apply(x, lambda t: t.to(device, non_blocking=True))


@contextlib.contextmanager
def advice(x: Any, like: Tensor) -> Iterator[None]:
    """Where the net fails on an x of another floating dtype than its weights ``like``, say how to change that."""
    try:
        yield
    except RuntimeError as error:
        odd = next((t.dtype for t in tensors(x) if t.is_floating_point() and t.dtype != like.dtype), None)
        if type(error) is not RuntimeError or odd is None:
            raise
        cast = {torch.float32: "x.float()", torch.float64: "x.double()"}.get(like.dtype, f"x.to({like.dtype})")
        raise RuntimeError(f"{error}\nx is {odd} but the net's weights are {like.dtype}; pass {cast}.") from error


def check_finite(value: Any, what: str) -> None:
    """Raise when a floating tensor holds NaN or inf, saying where and what to do."""
    for t in tensors(value):
        if not t.is_floating_point() or t.is_meta or bool(torch.isfinite(t).all()):
            continue
        bad = (~torch.isfinite(t)).nonzero()
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"{what} holds {len(bad)} non-finite value(s), the first {t[first].item()} at index {first} of shape "
            f"{tuple(t.shape)}; clean the data (or check the net's scale and dtype) before conditioning on it."
        )


def describe(value: Any) -> str:
    """A short description for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a mapping with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        inside = f": {', '.join(describe(v) for v in value)}" if 0 < len(value) <= 4 and _is_tensors(value) else ""
        return f"a {type(value).__name__} of {len(value)}{inside}"
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return f"a {type(value).__module__.partition('.')[0]} {type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    return f"{shown if len(shown) <= 80 else shown[:77] + '...'} ({type(value).__name__})"
