"""The Gaussian process with all its data: exact algebra in the sites, O((n c)³)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._psd import psd_root, safe_cholesky
from bayesgn.models.gaussian_process import GaussianProcess, Solution
from bayesgn.rules import Marginals


class Placed(NamedTuple):
    """Inputs as they came, [n d]."""

    x: Tensor


class GP(GaussianProcess):
    """p(f) of a Gaussian process with any gpytorch kernel; dense.

    With R Rᵀ the block-diagonal site precision, B = I + RᵀKR is well conditioned whatever the sites:

        log Z = −½ log |B| + ½ hᵀ Σ h,   Σ = K − K R B⁻¹ RᵀK,   mean = Σ h,   h = nat1

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> x = torch.linspace(0, 6, 40, dtype=torch.float64); y = torch.sin(x)
        >>> model = bgn.models.GP(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()))
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Gaussian(0.01), (x, y))
        >>> posterior(x).mean.shape
        torch.Size([40])

    Source: Rasmussen and Williams (2006), sec. 3.4.
    """

    def place(self, x: Tensor) -> Placed:
        return Placed(x)

    def cross(self, a: Tensor, b: Tensor) -> Tensor:
        """Prior covariance [a c, b c] between inputs, data first, then latents."""
        K = torch.stack([k(a, b).to_dense().to(a) for k in self.kernels], -1)
        return torch.diag_embed(K).permute(0, 2, 1, 3).reshape(len(a) * self.latents, len(b) * self.latents)

    def blocks(self, x: Tensor) -> Tensor:
        """Prior covariance of the latents at each input [n c c]."""
        return torch.diag_embed(torch.stack([k(x, diag=True).to(x) for k in self.kernels], -1))

    def _factors(self, x: Tensor, nat2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K, K R and the Cholesky factor of B."""
        n, c = nat2.shape[:2]
        K = self.cross(x, x)
        R = psd_root(nat2)
        KR = torch.einsum("anc,ncd->and", K.reshape(n * c, n, c), R).reshape(n * c, n * c)
        B = torch.einsum("nca,ncb->nab", R, KR.reshape(n, c, n * c)).reshape(n * c, n * c)
        return K, KR, safe_cholesky(B + torch.eye(n * c, dtype=B.dtype, device=B.device))

    def _solve(self, inputs, nat1, nat2):
        n, c = nat1.shape
        K, KR, L = self._factors(inputs.x, nat2)
        V = torch.linalg.solve_triangular(L, KR.mT, upper=False)  # Σ = K − VᵀV
        h = nat1.reshape(-1)
        mean = K @ h - V.mT @ (V @ h)
        log_Z = 0.5 * h @ mean - L.diagonal().log().sum()
        V = V.reshape(n * c, n, c)
        cov = self.blocks(inputs.x) - torch.einsum("vna,vnb->nab", V, V)
        return Solution(log_Z, Marginals(mean.reshape(n, c), cov))

    def _predict(self, inputs, nat1, nat2, x):
        m, c = len(x), self.latents
        Ks, V, mean = self._towards(inputs, nat1, nat2, x)
        V = V.reshape(-1, m, c)
        return Marginals(mean.reshape(m, c), self.blocks(x) - torch.einsum("vna,vnb->nab", V, V))

    def _joint(self, inputs, nat1, nat2, x):
        _, V, _ = self._towards(inputs, nat1, nat2, x)
        return self.cross(x, x) - V.mT @ V

    def _towards(self, inputs, nat1, nat2, x):
        """K_*x, V with Σ_** = K_** − VᵀV, and the mean at x."""
        n, c = nat2.shape[:2]
        Ks = self.cross(x, inputs.x)
        K, KR, L = self._factors(inputs.x, nat2)
        KsR = torch.einsum("anc,ncd->and", Ks.reshape(-1, n, c), psd_root(nat2)).reshape(-1, n * c)
        V = torch.linalg.solve_triangular(L, KsR.mT, upper=False)
        h = nat1.reshape(-1)
        # mean = K_* h − K_* R B⁻¹ Rᵀ K h
        w = torch.cholesky_solve((KR.mT @ h).unsqueeze(-1), L)
        return Ks, V, Ks @ h - (KsR @ w).squeeze(-1)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        mean = self._predict(inputs, nat1, nat2, x).mean
        L = safe_cholesky(self._joint(inputs, nat1, nat2, x))
        device = L.device if generator is None else generator.device
        ε = torch.randn(n, len(L), dtype=L.dtype, device=device, generator=generator).to(L.device)
        return mean + (ε @ L.mT).reshape(n, *mean.shape)
