"""A Gaussian whose noise the net predicts too."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .._psd import safe_cholesky
from .base import Likelihood, _randn
from .predictives import mixture, nodes_of, scalar_nodes

__all__ = ["HeteroscedasticGaussian"]


class HeteroscedasticGaussian(Likelihood):
    """y = m + ε, ε ~ N(0, e^ρ), with latents f = (m [d], ρ [d]): all means first, then all log variances.

    With e = y − m, τ = e^−ρ:   log p = −½ (τ e² + ρ + log 2π),   ∂ = (τ e, ½ (τ e² − 1)),
    −∂² = [[τ, τ e], [τ e, ½ τ e²]]  (indefinite: its determinant is −½ τ² e²),   Fisher = diag(τ, ½).

    Shapes: f [... 2d], y [... d] (or [...] for d = 1); NaN drops that output alone.
    The predictive is a mixture of MultivariateNormals, event [d]: the means are integrated exactly given the log variances, and these by
    quadrature over their full covariance.

    >>> likelihood = HeteroscedasticGaussian()
    >>> likelihood.ggn(torch.tensor([[0.0, 0.0]]))
    tensor([[[1.0000, 0.0000],
             [0.0000, 0.5000]]])

    Source: Nix & Weigend (1994); the Fisher in this form, Immer et al. (2023), "Effective Bayesian heteroscedastic regression", section 3.
    """

    def target_shape(self, f):
        if f.shape[-1] % 2:
            raise ValueError(f"HeteroscedasticGaussian: f has shape {list(f.shape)}, an odd number of latents; the net needs two outputs "
                             "for each target: all means, then all log variances")
        return f.shape[:-1] + (f.shape[-1] // 2,)

    def _validate_targets(self, f, y):
        self._refuse(y, y.isinf(), "targets must be finite (NaN marks a missing one)", "clean the data or mark such targets as NaN")

    def _parts(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observed [... d], residual e, log variance ρ and precision τ (both zero where missing)."""
        y = self.targets(f, y)
        m, rho = f.chunk(2, -1)
        observed = ~y.isnan()
        e = torch.where(observed, torch.where(observed, y, 0.0).to(f) - m, 0.0)
        return observed, e, torch.where(observed, rho, 0.0), torch.where(observed, (-rho).exp(), 0.0)

    def conditional(self, f):
        m, rho = f.chunk(2, -1)
        return MultivariateNormal(m, scale_tril=torch.diag_embed((rho / 2).exp()))

    def log_prob(self, f, y):
        observed, e, rho, tau = self._parts(f, y)
        return -0.5 * (tau * e.square() + rho + torch.where(observed, torch.full_like(rho, math.log(2 * math.pi)), 0.0)).sum(-1)

    def gradient(self, f, y):
        observed, e, _, tau = self._parts(f, y)
        return torch.cat([tau * e, 0.5 * (tau * e.square() - observed.to(f.dtype))], -1)

    def neg_hessian(self, f, y):
        _, e, _, tau = self._parts(f, y)
        cross = torch.diag_embed(tau * e)
        return torch.cat([torch.cat([torch.diag_embed(tau), cross], -1),
                          torch.cat([cross, torch.diag_embed(0.5 * tau * e.square())], -1)], -2)

    def _fisher(self, f, y):
        tau = (-f.chunk(2, -1)[1]).exp()
        fisher = torch.cat([tau, torch.full_like(tau, 0.5)], -1)
        return fisher if y is None else torch.where(self.targets(f, y).isnan().tile(2), 0.0, fisher)

    def ggn(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y))

    def ggn_root(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y).sqrt())

    def sample(self, f, generator=None):
        m, rho = f.chunk(2, -1)
        return m + (rho / 2).exp() * _randn(m, generator)

    def moments(self, f):
        m, rho = f.chunk(2, -1)
        return m, rho.exp()

    def predict(self, mean, cov):
        # (m, ρ) ~ N:  ρ at nodes ρ_q, and m | ρ_q ~ N(m̄ + A (ρ_q − ρ̄), C_mm − A C_ρm) with A = C_mρ C_ρρ⁻¹.
        self.target_shape(mean)
        d = mean.shape[-1] // 2
        C_mm, C_mr, C_rr = cov[..., :d, :d], cov[..., :d, d:], cov[..., d:, d:]
        A = C_mr @ torch.linalg.pinv(C_rr, hermitian=True)
        rest = C_mm - A @ C_mr.mT
        rho, log_weights = self._nodes(mean[..., d:], C_rr, A, rest)                  # [... q d]
        m = mean[..., None, :d] + (rho - mean[..., None, d:]) @ A.mT
        return mixture(MultivariateNormal(m, scale_tril=safe_cholesky(rest.unsqueeze(-3) + torch.diag_embed(rho.exp()))), log_weights)

    @staticmethod
    def _nodes(rho: Tensor, C_rr: Tensor, A: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        if rho.shape[-1] > 1:
            return nodes_of(rho, C_rr)
        # One target: from node to node the mean moves by A, and must not step over a component's own width √(rest + e^ρ).
        width = C_rr[..., 0].clamp_min(0).sqrt()
        with torch.no_grad():
            narrowest = torch.stack([rest[..., 0].clamp_min(0) + (rho + k * width).exp() for k in (-4, -2, 0)]).amin(0).sqrt()
            spread = width * torch.maximum(A[..., 0].abs() / narrowest, torch.full_like(width, 0.5**0.5))
        nodes, log_weights = scalar_nodes(rho, width, spread)                         # [q ... 1], [... 1 q]
        return nodes.movedim(0, -2), log_weights.squeeze(-2)

    def arguments(self):
        return {}
