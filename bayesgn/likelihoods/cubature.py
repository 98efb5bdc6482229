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
    """Nodes f_q and weights w_q with E[h(f)] ≈ Σ_q w_q h(f_q) for f ~ N(mean, cov).

    Attributes:
        shift [q n]: the logarithm of a further weight for each datum, where the nodes stand elsewhere than the Gaussian; None for zero.
    """

    shift: Tensor | None = None

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

    def rows(self, index) -> Cubature:
        """The rule for some of the data."""
        return self

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
    """Few nodes for many latents, exact for polynomials of a total degree; every weight is positive.

    | order | latents | nodes | |
    |---|---|---|---|
    | 3 | any | 2c | the axes at ±√c: the cubature Kalman filter's |
    | 5 | 1–4 | 2c² + 1 | the centre, the axes at ±√3 and their pairs |
    | 5 | from 5 | 2c + 2ᵏ | the axes at ±√(c/2 + 1), and 2ᵏ of the corners ±√((c + 2)/(c − 2)) in which any five signs are balanced |

    The centre-axes-pairs rule has negative weights from five latents on, which can turn the expectation of a positive function negative.

    Example:
        >>> Unscented(order=5)(torch.zeros(1, 4), torch.eye(4)[None])[0].shape
        torch.Size([33, 1, 4])

    Source: Arasaratnam and Haykin (2009), "Cubature Kalman filters"; McNamee and Stenger (1967), "Construction of fully symmetric numerical
    integration formulas"; Stroud (1971), "Approximate calculation of multiple integrals", axes and corners, here with a fraction of the corners.
    """

    def __init__(self, order: int = 5) -> None:
        if order not in (3, 5):
            raise ValueError(f"Unscented: order must be 3 or 5 but is {order}")
        self.order = order

    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        if self.order == 5 and c > 32:
            raise ValueError(f"Unscented(order=5) is for up to 32 latents, here are {c}; use MonteCarloCubature(1024) or Unscented(order=3)")
        return _unscented(self.order, c)


class MonteCarloCubature(Cubature):
    """Draws by a seed of their own: the same nodes at every call, so that a fixed point exists.

    Args:
        samples: nodes, in antithetic pairs so that odd moments vanish; scaled so that the covariance is exact where there are enough of them.
        seed: another one gives other nodes.

    Example:
        >>> nodes, w = MonteCarloCubature(64)(torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> round((w @ nodes.flatten() ** 2).item(), 4)  # E[f²] = 1
        1.0
    """

    def __init__(self, samples: int = 128, seed: int = 0) -> None:
        if samples < 2 or samples % 2:
            raise ValueError(f"MonteCarloCubature: samples={samples}; expected an even number from 2 on (antithetic pairs)")
        self.samples, self.seed = samples, seed

    def standard(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        z = np.random.default_rng(self.seed).standard_normal((self.samples // 2, c))
        if len(z) >= c:
            z = np.linalg.solve(np.linalg.cholesky(z.T @ z / len(z)), z.T).T
        return np.concatenate([z, -z]), np.full(self.samples, 1 / self.samples)


def cubature_for(c: int) -> Cubature:
    """The rule taken where none is given: Gauss-Hermite up to three latents, fifth-order unscented up to 16, Monte Carlo beyond."""
    if c <= 3:
        return GaussHermite({1: 20, 2: 20, 3: 10}[c])
    return Unscented(5) if c <= 16 else MonteCarloCubature(1024)


def root(cov: Tensor) -> Tensor:
    """L [... c c] with L Lᵀ = cov, a Cholesky factor where there is one."""
    if cov.shape[-1] == 1:
        positive = cov > 0  # √ has no slope at 0: the gradient there is 0, not infinite
        return torch.where(positive, torch.where(positive, cov, 1.0).sqrt(), 0.0)
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
    if c > 4:
        # Weights 4/(c+2)² on the axes and ((c−2)/(c+2))² on all corners match E z² = 1, E z⁴ = 3 and E z_i² z_j² = 1.
        corners = _balanced_signs(c)
        nodes = np.concatenate([eye * (c / 2 + 1) ** 0.5, -eye * (c / 2 + 1) ** 0.5, corners * ((c + 2) / (c - 2)) ** 0.5])
        return nodes, np.concatenate([np.full(2 * c, 4 / (c + 2) ** 2), np.full(len(corners), ((c - 2) / (c + 2)) ** 2 / len(corners))])
    pairs = [s * eye[i] + t * eye[j] for i, j in combinations(range(c), 2) for s, t in product((1, -1), repeat=2)]
    nodes = np.concatenate([np.zeros((1, c)), eye, -eye, np.array(pairs).reshape(-1, c)]) * 3**0.5
    centre, axis, diagonal = (c * c - 7 * c + 18) / 18, (4 - c) / 18, 1 / 36
    return nodes, np.concatenate([[centre], np.full(2 * c, axis), np.full(len(pairs), diagonal)])


def _balanced_signs(c: int) -> np.ndarray:
    """As few corners of the cube [2ᵏ c] as a fractional factorial needs so that all products of one to five different signs average to zero.

    The sign of a factor is the parity of its word with the run's number; no one to five words may cancel.
    """
    for k in range(5, c + 1):
        words: list[int] = []
        sums: list[set[int]] = [{0}, set(), set(), set(), set()]  # of so many words; a new word may be none of them
        for word in [*(1 << i for i in range(k)), *range(1, 1 << k)]:
            if len(words) < c and not any(word in s for s in sums):
                for size in (4, 3, 2, 1):
                    sums[size] |= {s ^ word for s in sums[size - 1]}
                words.append(word)
        if len(words) == c:
            parity = np.array([[(run & word).bit_count() & 1 for word in words] for run in range(1 << k)])
            return 1.0 - 2.0 * parity
    raise AssertionError("all corners always serve")
