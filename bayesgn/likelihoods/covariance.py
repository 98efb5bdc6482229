"""A covariance among the outputs of a row, learned, and its precision over the outputs that a row has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import overload

import torch
from torch import Tensor, nn

from .base import _as_parameter

__all__ = ["Covariance", "Precision", "cholesky_of", "precision"]


class Covariance:
    """A covariance that a likelihood learns: `noise = Covariance()` keeps it in `raw_noise`, an nn.Parameter.

    A variance for all outputs [], one each [d] (kept as logarithms), or a full matrix [d d] (kept as its Cholesky factor with logarithms on
    the diagonal).
    """

    name: str
    raw_name: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.raw_name = name, f"raw_{name}"

    @overload
    def __get__(self, module: None, owner: type) -> Covariance: ...

    @overload
    def __get__(self, module: nn.Module, owner: type) -> Tensor: ...

    def __get__(self, module, owner=None):
        if module is None:
            return self
        raw = getattr(module, self.raw_name)
        if raw.ndim < 2:
            return raw.exp()
        L = cholesky_of(raw, raw.shape[0])
        return L @ L.mT

    def __set__(self, module: nn.Module, value: float | Tensor) -> None:
        raw = self._raw(module, value)
        old = module._parameters.get(self.raw_name)
        if old is None:
            module.register_parameter(self.raw_name, nn.Parameter(raw))
            return
        if raw.shape != old.shape and raw.ndim != 0:
            raise ValueError(f"{type(module).__name__}: {self.name} has shape {list(old.shape)} but the new value {list(raw.shape)}; "
                             "build a new likelihood for another shape")
        if raw.ndim == 0 and old.ndim == 2:
            raw = torch.diag_embed((raw / 2).expand(old.shape[0]))
        with torch.no_grad():
            old.copy_(raw)

    def _raw(self, module: nn.Module, value: float | Tensor) -> Tensor:
        value, who = _as_parameter(value), type(module).__name__
        if value.ndim > 2 or (value.ndim == 2 and value.shape[0] != value.shape[1]):
            raise ValueError(f"{who}: {self.name} has shape {list(value.shape)} but is a scalar, [d] or [d, d]")
        if value.ndim == 2:
            L, info = torch.linalg.cholesky_ex(value)
            if bool(info > 0) or not torch.allclose(value, value.mT) or not bool(value.isfinite().all()):
                raise ValueError(f"{who}: a full {self.name} must be symmetric positive definite but is {value.tolist()}")
            return L.tril(-1) + torch.diag_embed(L.diagonal().log())
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{who}: {self.name} must be positive and finite but is {value.tolist()}; it is a variance, not a logarithm")
        return value.log()


def cholesky_of(raw: Tensor, d: int) -> Tensor:
    """L [d d] with L Lᵀ the covariance of a raw parameter."""
    if raw.ndim == 2:
        return raw.tril(-1) + torch.diag_embed(raw.diagonal().exp())
    return torch.diag_embed((raw / 2).exp().expand(d))


class Precision(ABC):
    """P_n = S_n S_nᵀ [... d d], in each row the inverse covariance of the outputs that it has, and zeros for the others.

    Missing outputs are integrated out: P_n inverts R_oo, the covariance with rows and columns of what is missing taken away.

    Attributes:
        log_det: log |2π R_oo| [...].
    """

    log_det: Tensor

    @abstractmethod
    def whiten(self, r: Tensor) -> Tensor:
        """Sᵀ r for r [... d] that is zero where missing."""

    @abstractmethod
    def apply(self, r: Tensor) -> Tensor:
        """S Sᵀ r."""

    @abstractmethod
    def root(self) -> Tensor:
        """S [... d d]."""


def precision(raw: Tensor, observed: Tensor) -> Precision:
    """The precision of a raw parameter in the dtype it has, over what is observed [... d]."""
    return _Diagonal(raw, observed) if raw.ndim < 2 else _Full(raw, observed)


class _Diagonal(Precision):
    def __init__(self, raw: Tensor, observed: Tensor) -> None:
        self.raw, self.observed = raw, observed
        self.log_det = torch.where(observed, raw + math.log(2 * math.pi), 0.0).sum(-1)

    def whiten(self, r):
        return r * (-self.raw / 2).exp()

    def apply(self, r):
        return r * (-self.raw).exp()

    def root(self):
        return torch.diag_embed(torch.where(self.observed, (-self.raw / 2).exp(), 0.0))


class _Full(Precision):
    def __init__(self, raw: Tensor, observed: Tensor) -> None:
        L = cholesky_of(raw, raw.shape[0])
        whole = observed.all(-1)
        # R = L Lᵀ, so R⁻¹ = S Sᵀ with S = L⁻ᵀ, shared by all rows unless some are missing in part.
        if observed.device.type == "meta" or not bool((observed.any(-1) & ~whole).any()):
            S = torch.linalg.solve_triangular(L.mT, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=True)
            log_det = 2 * raw.diagonal().sum() + len(L) * math.log(2 * math.pi)
            self.log_det = torch.where(whole, log_det, 0.0)
            self.shared, self.S = S, torch.where(whole[..., None, None], S, 0.0)
        else:
            self.shared, (self.S, self.log_det) = None, _of_patterns(L @ L.mT, observed)

    def whiten(self, r):
        return r @ self.shared if self.shared is not None else (self.S.mT @ r.unsqueeze(-1)).squeeze(-1)

    def apply(self, r):
        return (self.S @ self.whiten(r).unsqueeze(-1)).squeeze(-1) if self.shared is None else self.whiten(r) @ self.shared.mT

    def root(self):
        return self.S


def _of_patterns(R: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """S [... d d] and log |2π R_oo| [...], one factorisation for each pattern of missing outputs."""
    d = R.shape[0]
    flat = observed.reshape(-1, d)
    if d <= 62:                                                                   # patterns as integers: sorted much faster than rows
        codes, which = (flat * 2 ** torch.arange(d, device=R.device)).sum(-1).unique(return_inverse=True)
        patterns = (codes.unsqueeze(-1) >> torch.arange(d, device=R.device)) % 2 == 1
    else:
        patterns, which = flat.unique(dim=0, return_inverse=True)
    here = patterns.to(R)                                                         # [k d]
    # R_oo with ones on the diagonal for what is missing: decoupled, and no part of S.
    L = torch.linalg.cholesky(R * here.unsqueeze(-1) * here.unsqueeze(-2) + torch.diag_embed(1 - here))
    S = torch.linalg.solve_triangular(L.mT, torch.eye(d, dtype=R.dtype, device=R.device), upper=True) * here.unsqueeze(-1)
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + here.sum(-1) * math.log(2 * math.pi)
    return S[which].reshape(*observed.shape, d), log_det[which].reshape(observed.shape[:-1])
