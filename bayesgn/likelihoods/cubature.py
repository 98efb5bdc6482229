"""Cubature: expectations under N(mean, cov) of a few latents as weighted sums over nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

from .._psd import psd_root

__all__ = ["Cubature", "GaussHermite", "MonteCarloCubature", "Unscented", "cubature_for"]


class Cubature(ABC):
    """Nodes f_q and weights w_q with E[h(f)] ≈ Σ_q w_q h(f_q) for f ~ N(mean, cov)."""

    @abstractmethod
    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes z [q c] and weights [q] of N(0, I)."""

    def unit(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The standard rule for means [... c] in their device and dtype: z [q c] and w [q]."""
        z, w = self.standard(like.shape[-1])
        return torch.as_tensor(z).to(like), torch.as_tensor(w).to(like)

    def __call__(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes [q n c], f_q = mean + L z_q with L Lᵀ = cov, and weights [q]; mean [n c], cov [n c c], of any rank."""
        z, w = self.unit(mean)
        return mean + torch.einsum("qj,...ij->q...i", z, root(cov)), w

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(vars(self).items()))})"


class GaussHermite(Cubature):
    """The product of Gauss-Hermite rules: exact for polynomials of degree 2·points − 1 in each latent, at points^c nodes.

    Example:
        >>> nodes, w = GaussHermite(3)(torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> (w @ nodes.flatten() ** 4).item()  # E[f⁴] = 3
        3.0
    """

    def __init__(self, points: int = 20) -> None:
        if points < 1:
            raise ValueError(f"GaussHermite: points must be at least 1 but is {points}")
        self.points = points

    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        if self.points**c > 200_000:
            raise ValueError(f"GaussHermite({self.points}) has {self.points}^{c} nodes for {c} latents; use Unscented(order=5), or fewer points")
        return _gauss_hermite(self.points, c)


class Unscented(Cubature):
    """Few nodes for many latents: exact for polynomials of total degree 3 (2c nodes) or 5 (2c² + 1 nodes).

    For more than four latents some weights of order 5 are negative: expectations of positive functions may then come out negative.

    Source: McNamee and Stenger (1967), "Construction of fully symmetric numerical integration formulas"; Kokkala, Solin and Särkkä (2016).

    Example:
        >>> Unscented(order=5)(torch.zeros(1, 4), torch.eye(4)[None])[0].shape
        torch.Size([33, 1, 4])
    """

    def __init__(self, order: int = 5) -> None:
        if order not in (3, 5):
            raise ValueError(f"Unscented: order must be 3 or 5 but is {order}")
        self.order = order

    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        return _unscented(self.order, c)


class MonteCarloCubature(Cubature):
    """Draws by a seed of their own: the same nodes at every call, so that a fixed point exists.

    Args:
        samples: nodes; antithetic pairs, so that odd moments vanish.
    """

    def __init__(self, samples: int = 128, seed: int = 0) -> None:
        if samples < 2 or samples % 2:
            raise ValueError(f"MonteCarloCubature: samples={samples}; expected an even number from 2 on (antithetic pairs)")
        self.samples, self.seed = samples, seed

    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        z = np.random.default_rng(self.seed).standard_normal((self.samples // 2, c))
        return np.concatenate([z, -z]), np.full(self.samples, 1 / self.samples)


def cubature_for(c: int) -> Cubature:
    """The rule taken where none is given: Gauss-Hermite up to three latents, the fifth-order unscented rule beyond."""
    return GaussHermite({1: 20, 2: 20, 3: 10}[c]) if c <= 3 else Unscented(5)


def root(cov: Tensor) -> Tensor:
    """L [... c c] with L Lᵀ = cov, a Cholesky factor where there is one."""
    if cov.shape[-1] == 1:
        return cov.clamp_min(0).sqrt()
    L, info = torch.linalg.cholesky_ex(cov)
    return psd_root(cov) if cov.device.type != "meta" and bool(info.any()) else L


@lru_cache(maxsize=64)
def _gauss_hermite(points: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.hermite_e.hermegauss(points)
    w = w / w.sum()
    return np.array(list(product(x, repeat=c))), np.prod(np.array(list(product(w, repeat=c))), -1)


@lru_cache(maxsize=64)
def _unscented(order: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    eye = np.eye(c)
    if order == 3:
        return np.concatenate([eye, -eye]) * c**0.5, np.full(2 * c, 0.5 / c)
    pairs = [s * eye[i] + t * eye[j] for i, j in combinations(range(c), 2) for s, t in product((1, -1), repeat=2)]
    nodes = np.concatenate([np.zeros((1, c)), eye, -eye, np.array(pairs).reshape(-1, c)]) * 3**0.5
    centre, axis, diagonal = (c * c - 7 * c + 18) / 18, (4 - c) / 18, 1 / 36
    return nodes, np.concatenate([[centre], np.full(2 * c, axis), np.full(len(pairs), diagonal)])
