"""Is this still the net that the posterior was made at? Cheap signs first, a hash where they differ."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def versions(net: nn.Module) -> tuple:
    return tuple((id(t), t.data_ptr(), t._version) for t in (*net.parameters(), *net.buffers()) if not t.is_inference())


def marks(net: nn.Module) -> list[tuple]:
    """Modules and the hooks on them, as they are now."""
    return [(id(m), *m._forward_hooks, *m._forward_pre_hooks) for m in net.modules()]


def sums(net: nn.Module) -> list[float]:
    """Sums of values and of their sizes: a write through ``.data`` leaves no trace in versions, but here."""
    with torch.no_grad():
        groups: dict[tuple, list[Tensor]] = {}
        for t in (*net.parameters(), *net.buffers()):
            if t.is_floating_point() and t.numel() and not t.is_meta:
                groups.setdefault((t.device, t.dtype), []).append(t.detach())
        out = []
        for (_, dtype), ts in groups.items():
            wide = torch.float32 if dtype.itemsize < 4 else dtype
            sums = torch.stack([t.sum(dtype=wide) for t in ts])
            sizes = torch.stack(torch._foreach_norm(ts))
            out += [sums.tolist(), sizes.tolist()]
        return out


def fingerprint(net: nn.Module) -> str:
    """A hash of names, shapes, dtypes and values of a net's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, t in sorted({**dict(net.named_parameters()), **dict(net.named_buffers())}.items()):
        digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        if not t.is_meta:
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
