"""Draws of whole functions from a Gaussian process, value by value as they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.models.belief import Belief


class FunctionDraws:
    """n functions drawn from a belief; see ``GaussianProcessPosterior.sample_functions``.

    With L Lᵀ the joint covariance of all values drawn so far, these are mean + L ε. New inputs add rows to L and entries to ε, and move none:

        f_new | f_old = mean_new + Gᵀ ε_old + root(Σ_new − GᵀG) ε_new,   G = L⁻¹ Σ_old,new
    """

    def __init__(self, belief: Belief, columns: Callable[[Tensor], Tensor], dtype: torch.dtype, n: int, generator: torch.Generator | None) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r}; expected how many functions to draw, at least 1.")
        self.n, self._belief, self._columns, self._dtype = n, belief, columns, dtype
        like, c = belief.inputs.x, belief.sites.nat1.shape[-1]
        device = like.device if generator is None else generator.device
        seed = torch.randint(2**62, (), device=device, generator=generator)
        self._generator = torch.Generator(device).manual_seed(int(seed))
        self._x = like[:0]
        self._ε, self._L = like.new_zeros(n, 0), like.new_zeros(0, 0)
        self._values = like.new_zeros(n, 0, c)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The functions at x [m] or [m d]: [n m c]."""
        wide = self._columns(x)
        k = len(self._x)
        points, which = torch.unique(torch.cat([self._x, wide]), dim=0, return_inverse=True)
        if k + len(wide) and len(points) > k:
            first = torch.full((len(points),), k + len(wide), device=which.device)
            first = first.scatter_reduce(0, which, torch.arange(len(which), device=which.device), "amin")
            self._extend(wide[first[first >= k].sort().values - k])
            points, which = torch.unique(torch.cat([self._x, wide]), dim=0, return_inverse=True)
        place = torch.empty(len(points), dtype=torch.long, device=which.device)
        k = len(self._x)
        place[which[:k]] = torch.arange(k, device=which.device)
        return self._values[:, place[which[k:]]].to(self._dtype)

    def _extend(self, x: Tensor) -> None:
        """Draw at inputs none of which was seen before."""
        old, both, c = self._L.shape[0], torch.cat([self._x, x]), self._values.shape[-1]
        Σ = self._belief.joint(both)
        G = torch.linalg.solve_triangular(self._L, Σ[:old, old:], upper=False)
        left = Σ[old:, old:] - G.mT @ G
        # Next to an old input nothing is left open but rounding.
        root = safe_cholesky(0.5 * (left + left.mT) + torch.diag_embed(1e-12 * Σ.diagonal()[old:]))
        ε = torch.randn(self.n, len(left), dtype=Σ.dtype, device=self._generator.device, generator=self._generator).to(Σ.device)
        move = self._ε @ G + ε @ root.mT
        mean = self._belief.predict(x).mean
        self._values = torch.cat([self._values, mean + move.reshape(self.n, len(x), c)], 1)
        L = Σ.new_zeros(old + len(left), old + len(left))
        L[:old, :old], L[old:, :old], L[old:, old:] = self._L, G.mT, root
        self._x, self._L, self._ε = both, L, torch.cat([self._ε, ε], -1)

    def __repr__(self) -> str:
        return f"FunctionDraws({self.n} functions, {len(self._x)} inputs so far)"
