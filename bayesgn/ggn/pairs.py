"""Σ JᵀJ of two layers with J = δ ⊗ a, as one product over pairs: no J is formed, and its k columns cost nothing more.

    Σ_n Σ_k (δ_nk ⊗ a_n)(δ'_nk ⊗ a'_n)ᵀ = Σ_n (Σ_k δ_nk δ'_nkᵀ) ⊗ (a_n a'_nᵀ)
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES = 2**21  # of pairs of one slice of data


def across(a: Tensor, δ: Tensor, a_: Tensor, δ_: Tensor) -> Tensor:
    """[o i o' i'] for a [n i], δ [n k o] of one layer and a' [n i'], δ' [n k o'] of another."""
    o, i, q, j = δ.shape[2], a.shape[1], δ_.shape[2], a_.shape[1]
    size = max(1, ENTRIES // (o * q + i * j))
    M = a.new_zeros(o * q, i * j)
    for s in range(0, len(a), size):
        part = slice(s, s + size)
        D = (δ[part].mT @ δ_[part]).flatten(1)
        A = (a[part, :, None] * a_[part, None, :]).flatten(1)
        M.addmm_(D.mT, A)
    return M.view(o, q, i, j).transpose(1, 2)


def within(a: Tensor, δ: Tensor) -> Tensor:
    """[o i o i] of one layer: of each symmetric pair one half, a quarter of the work."""
    o, i = δ.shape[2], a.shape[1]
    (o1, o2), (i1, i2) = torch.triu_indices(o, o, device=a.device), torch.triu_indices(i, i, device=a.device)
    size = max(1, ENTRIES // (o * o + len(i1)))
    M = a.new_zeros(len(o1), len(i1))
    for s in range(0, len(a), size):
        part = slice(s, s + size)
        D = (δ[part].mT @ δ[part])[:, o1, o2]
        M.addmm_(D.mT, a[part][:, i1] * a[part][:, i2])
    rows, columns = _places(o, o1, o2), _places(i, i1, i2)
    return M[rows.flatten()][:, columns.flatten()].view(o, o, i, i).transpose(1, 2)


def _places(n: int, first: Tensor, second: Tensor) -> Tensor:
    """Where the pair (x, y) stands in the list of x ≤ y [n n]."""
    where = torch.empty(n, n, dtype=torch.long, device=first.device)
    place = torch.arange(len(first), device=first.device)
    where[first, second] = place
    where[second, first] = place
    return where
