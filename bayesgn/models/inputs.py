"""Inputs of Gaussian processes as they are worked with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesgn import _data


def tensors(data: Any) -> tuple[Tensor, Tensor]:
    """All inputs and targets of a pair, a Dataset or a DataLoader."""
    x, y = zip(*_data.batches(data, batch_size=2**62))
    return torch.cat(x), torch.cat(y)


def columns(x: Tensor) -> Tensor:
    """x as [n d] in the widest floating dtype of its device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"inputs are {_data.describe(x)}; expected a tensor [n] or [n d] (torch.as_tensor(x)).")
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.dim() != 2:
        raise ValueError(f"inputs have shape {tuple(x.shape)}; expected [n] or [n d].")
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    _data.check_finite(x, "the inputs x")
    return x
