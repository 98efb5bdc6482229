"""Gaussian noise around any mean: the promise of y = μ(f) + ε."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from .base import Integrals, Likelihood, _accumulator, _like, _randn
from .covariance import Covariance, Precision, cholesky_of, precision

__all__ = ["GaussianNoise"]


class GaussianNoise(Likelihood):
    """y = μ(f) + ε with ε ~ N(0, R), R = noise; an heir gives the mean μ and how its derivatives act.

    With r = y − μ, J = ∂μ/∂f [d c] and P = R⁻¹, in rows missing in part the inverse of what is left of R (the missing outputs integrated out):
    log p = −½ rᵀ P r − ½ log |2π R|,   ∂ = Jᵀ P r,   −∂² = Jᵀ P J − Σ_i (P r)_i ∂²μ_i,   Fisher = Jᵀ P J.

    Sufficient statistics in the noise: the count and the scatter of residuals; rows missing in part under a full noise enter with the log density
    they have at the present noise.
    """

    noise: Covariance = Covariance()
    raw_noise: nn.Parameter

    def __init__(self, noise: float | Tensor = 1.0):
        super().__init__()
        self.noise = noise

    @abstractmethod
    def _mean(self, f: Tensor) -> Tensor:
        """μ(f) [... d]."""

    @abstractmethod
    def _pull(self, f: Tensor, v: Tensor) -> Tensor:
        """Jᵀ v [... c k] of v [... d k]."""

    @abstractmethod
    def _bend(self, f: Tensor, w: Tensor) -> Tensor | None:
        """Σ_i w_i ∂²μ_i/∂f² [... c c] for w [... d]; None for a linear mean."""

    @abstractmethod
    def _outputs(self, f: Tensor) -> int:
        """d for these latents; raises where there is none."""

    # --- the contract ---------------------------------------------------------------------------------------------------------------
    def _check_width(self, f: Tensor) -> int:
        d = self._outputs(f)
        if self.raw_noise.ndim and self.raw_noise.shape[-1] != d:
            raise ValueError(f"{type(self).__name__}: noise has shape {list(self.raw_noise.shape)} but f has shape {list(f.shape)}, which gives "
                             f"{d} outputs; build {type(self).__name__} with one variance for each output, or a scalar")
        return d

    def target_shape(self, f):
        return f.shape[:-1] + (self._outputs(f),)

    def _validate_targets(self, f, y):
        self._check_width(f)
        self._refuse_infinite(y)

    def _precision(self, f: Tensor, observed: Tensor | None = None) -> Precision:
        d = self._check_width(f)
        if observed is None:
            observed = torch.ones(*f.shape[:-1], d, dtype=torch.bool, device=f.device)
        return precision(_like(self.raw_noise, f), observed)

    def _residual(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """y − μ(f), zero where missing, and what is observed, both [... d]."""
        self._check_width(f)
        y = self.targets(f, y)
        observed = ~y.isnan()
        return torch.where(observed, torch.where(observed, y, 0.0).to(f) - self._mean(f), 0.0), observed

    def _noise_cholesky(self, f: Tensor) -> Tensor:
        """L [d d] with L Lᵀ = R in f's dtype."""
        return cholesky_of(_like(self.raw_noise, f), self._check_width(f))

    def _noise_matrix(self, f: Tensor) -> Tensor:
        L = self._noise_cholesky(f)
        return L @ L.mT

    def conditional(self, f):
        mean = self._mean(f)
        return MultivariateNormal(mean, scale_tril=self._noise_cholesky(f).expand(*mean.shape, mean.shape[-1]))

    def log_prob(self, f, y):
        r, observed = self._residual(f, y)
        P = self._precision(f, observed)
        return -0.5 * (P.whiten(r).square().sum(-1) + P.log_det)

    def gradient(self, f, y):
        r, observed = self._residual(f, y)
        return self._pull(f, self._precision(f, observed).apply(r).unsqueeze(-1)).squeeze(-1)

    def neg_hessian(self, f, y):
        r, observed = self._residual(f, y)
        P = self._precision(f, observed)
        S = self._pull(f, P.root())
        bend = self._bend(f, P.apply(r))
        return S @ S.mT if bend is None else S @ S.mT - bend

    def ggn(self, f, y=None):
        S = self.ggn_root(f, y)
        return S @ S.mT

    def ggn_root(self, f, y=None):
        return self._pull(f, self._precision(f, None if y is None else ~self.targets(f, y).isnan()).root())

    def sample(self, f, generator=None):
        mean = self._mean(f)
        return mean + _randn(mean, generator) @ self._noise_cholesky(f).mT

    def moments(self, f):
        mean = self._mean(f)
        self._check_width(f)
        variance = self.noise.diagonal() if self.raw_noise.ndim == 2 else self.noise
        return mean, _like(variance, f).expand(mean.shape)

    def conditional_moments(self, f):
        mean = self._mean(f)
        return mean, self._noise_matrix(f).expand(*mean.shape, mean.shape[-1])

    def statistics(self, f, y):
        f = f.detach().to(_accumulator(f))
        r, observed = self._residual(f, y)
        r, observed = r.reshape(-1, r.shape[-1]), observed.reshape(-1, r.shape[-1])
        if self.raw_noise.ndim < 2:
            return {"count": observed.sum(0).to(r), "scatter": r.square().sum(0)}
        partly = observed.any(-1) & ~observed.all(-1)
        rest = self.log_prob(f, y).detach().reshape(-1)
        r = torch.where(partly.unsqueeze(-1), 0.0, r)
        return {"count": (observed & ~partly.unsqueeze(-1)).sum(0).to(r), "scatter": r.mT @ r, "log_prob": torch.where(partly, rest, 0.0).sum()}

    def log_prob_of(self, statistics):
        # Σ_n log N(y_n; μ_n, R) = −½ ( N log |2πR| + tr R⁻¹ Σ_n r_n r_nᵀ )
        count, scatter = statistics["count"], statistics["scatter"]
        raw = _like(self.raw_noise, scatter)
        if raw.ndim < 2:
            return -0.5 * (count * (raw + math.log(2 * math.pi)) + scatter * (-raw).exp()).sum()
        P = precision(raw, torch.ones(raw.shape[0], dtype=torch.bool, device=raw.device))
        S = P.root()
        return statistics.get("log_prob", 0.0) - 0.5 * (count[0] * P.log_det + (S * (scatter @ S)).sum())

    def ggn_scale(self):
        # A mean with parameters of its own bends the GGN in other ways than the noise does.
        if self.raw_noise.ndim < 2 and self.raw_noise.numel() == 1 and len(list(self.parameters())) == 1:
            return (-self.raw_noise).exp().reshape(())
        return torch.ones_like(self.raw_noise.detach().flatten()[0])

    # --- linear means: everything in closed form ------------------------------------------------------------------------------------
    def _expected_linear(self, mean: Tensor, cov: Tensor, y: Tensor) -> Integrals:
        # E[log p] = log p(y | m) − ½ tr(Jᵀ P J C)
        Λ = self.ggn(mean, y)
        return Integrals(self.log_prob(mean, y) - 0.5 * (Λ * cov).sum((-1, -2)), self.gradient(mean, y), Λ, Λ)

    def _tilted_linear(self, mean: Tensor, cov: Tensor, y: Tensor, power: float) -> Integrals:
        # p^α ∝ N(y; Jf, R/α): log E = log N(y; Jm, JCJᵀ + R/α) + ½ (1 − α) log |2πR| − ½ d log α. With P = S Sᵀ (zero for what is missing),
        # T = JᵀS and B = I + α TᵀCT, (JCJᵀ + R/α)⁻¹ = Q = α S B⁻¹ Sᵀ on what is observed.
        r, observed = self._residual(mean, y)
        P = self._precision(mean, observed)
        S = P.root()
        T = self._pull(mean, S)
        B = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + power * T.mT @ cov @ T
        L = torch.linalg.cholesky(B)
        V = power**0.5 * torch.linalg.solve_triangular(L, S.mT, upper=False)                      # Q = VᵀV
        Vr = (V @ r.unsqueeze(-1)).squeeze(-1)
        U = self._pull(mean, V.mT)
        value = -0.5 * (Vr.square().sum(-1) + power * P.log_det) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return Integrals(value, (U @ Vr.unsqueeze(-1)).squeeze(-1), U @ U.mT, T @ T.mT)
