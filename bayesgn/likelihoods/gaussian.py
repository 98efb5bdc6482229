"""Gaussian noise: one variance, one for each output, or a full covariance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from .._psd import safe_cholesky
from .base import Integrals, Likelihood, _accumulator, _as_parameter, _like, _randn

__all__ = ["Gaussian"]


class Gaussian(Likelihood):
    """y = f + ε with ε ~ N(0, R), R = noise.

    log p(y | f) = −½ (y − f)ᵀ R⁻¹ (y − f) − ½ log |2π R|,   Λ = R⁻¹ for the Hessian and the GGN alike.

    Args:
        noise: a variance (units of y²): a scalar, [c] for one each output, or [c c] for a full covariance. It is learned; read and set
            it as `likelihood.noise`. Inside it is a logarithm, or the Cholesky factor with logarithms on its diagonal.
    Shapes: f [... c], y [... c] (or [...] for c = 1). NaN in y drops that output (the whole row has to be NaN under a full covariance).
    Sufficient statistics: the count and the scatter of the residuals, so that noise can be tuned without the data.
    Raises ValueError for a noise that is not positive (definite).

    >>> likelihood = Gaussian(0.5)
    >>> f, y = torch.zeros(3, 2), torch.ones(3, 2)
    >>> likelihood.gradient(f, y)[0]
    tensor([2., 2.], grad_fn=<SelectBackward0>)
    >>> likelihood.noise = 0.25
    >>> likelihood
    Gaussian(noise=0.25)

    Source: Rasmussen & Williams (2006), section 2.2; the noise as scale of a fixed GGN, Immer et al. (2021), "Scalable marginal likelihood".
    """

    def __init__(self, noise: float | Tensor = 1.0):
        super().__init__()
        raw = self._raw(noise)
        self.raw_noise = nn.Parameter(raw)

    def _raw(self, noise: float | Tensor) -> Tensor:
        noise = _as_parameter(noise)
        if noise.ndim > 2 or (noise.ndim == 2 and noise.shape[0] != noise.shape[1]):
            raise ValueError(f"Gaussian: noise has shape {list(noise.shape)} but is a scalar, [c] or [c, c]")
        if noise.ndim == 2:
            L, info = torch.linalg.cholesky_ex(noise)
            if bool(info > 0) or not torch.allclose(noise, noise.mT) or not bool(noise.isfinite().all()):
                raise ValueError(f"Gaussian: a full noise must be symmetric positive definite but is {noise.tolist()}")
            return L.tril(-1) + torch.diag_embed(L.diagonal().log())
        if not bool(((noise > 0) & noise.isfinite()).all()):
            raise ValueError(f"Gaussian: noise must be positive and finite but is {noise.tolist()}; it is a variance, not a logarithm")
        return noise.log()

    @property
    def noise(self) -> Tensor:
        """The noise variance: [], [c] or [c c]."""
        if self.raw_noise.ndim < 2:
            return self.raw_noise.exp()
        L = self._cholesky()
        return L @ L.mT

    @noise.setter
    def noise(self, value: float | Tensor) -> None:
        raw = self._raw(value)
        if raw.shape != self.raw_noise.shape and raw.ndim != 0:
            raise ValueError(f"Gaussian: noise has shape {list(self.raw_noise.shape)} but the new value {list(raw.shape)}; "
                             "build a new likelihood for another shape")
        if raw.ndim == 0 and self.raw_noise.ndim == 2:
            raw = torch.diag_embed((raw / 2).expand(self.raw_noise.shape[0]))
        with torch.no_grad():
            self.raw_noise.copy_(raw)

    def _cholesky(self) -> Tensor:
        return self.raw_noise.tril(-1) + torch.diag_embed(self.raw_noise.diagonal().exp())

    def _noise_cholesky(self, f: Tensor) -> Tensor:
        """L [c c] with L Lᵀ = R in f's dtype."""
        self._check_width(f)
        if self.raw_noise.ndim == 2:
            return _like(self._cholesky(), f)
        return torch.diag_embed((_like(self.raw_noise, f) / 2).exp().expand(f.shape[-1]))

    def _check_width(self, f: Tensor) -> None:
        if self.raw_noise.ndim and self.raw_noise.shape[-1] != f.shape[-1]:
            raise ValueError(f"Gaussian: noise has shape {list(self.raw_noise.shape)} but f has shape {list(f.shape)}, "
                             f"{f.shape[-1]} outputs; build Gaussian(noise) with one variance for each output, or a scalar")

    def target_shape(self, f):
        return f.shape

    def _validate_targets(self, f, y):
        self._check_width(f)
        self._refuse(y, y.isinf(), "targets must be finite (NaN marks a missing one)", "clean the data or mark such targets as NaN")
        self._observed(f, y)

    def _observed(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is observed, [... c] ([... 1] under a full covariance), and y with zeros for the rest."""
        self._check_width(f)
        y = self.targets(f, y)
        observed = ~y.isnan()
        y = torch.where(observed, y, 0.0).to(f)
        if self.raw_noise.ndim == 2:
            whole = observed.all(-1, keepdim=True)
            if y.device.type != "meta" and bool((observed.any(-1, keepdim=True) & ~whole).any()):
                raise ValueError("Gaussian: a row of y is missing in part, which a full noise covariance does not support; "
                                 "make the whole row NaN, or use one variance for each output: Gaussian(noise.diagonal())")
            observed = whole
        return observed, y

    def conditional(self, f):
        return MultivariateNormal(f, scale_tril=self._noise_cholesky(f).expand(*f.shape, f.shape[-1]))

    def _precise(self, residual: Tensor) -> Tensor:
        """R⁻¹ residual."""
        if self.raw_noise.ndim < 2:
            return residual * (-_like(self.raw_noise, residual)).exp()
        return torch.cholesky_solve(residual.unsqueeze(-1), self._noise_cholesky(residual)).squeeze(-1)

    def log_prob(self, f, y):
        observed, y = self._observed(f, y)
        residual = torch.where(observed, y - f, 0.0)
        quadratic = residual * self._precise(residual)
        if self.raw_noise.ndim == 2:
            log_det = 2 * _like(self.raw_noise, f).diagonal().sum() + f.shape[-1] * math.log(2 * math.pi)
            return -0.5 * (quadratic.sum(-1) + torch.where(observed[..., 0], log_det, 0.0))
        return -0.5 * (quadratic + torch.where(observed, _like(self.raw_noise, f) + math.log(2 * math.pi), 0.0)).sum(-1)

    def gradient(self, f, y):
        observed, y = self._observed(f, y)
        return self._precise(torch.where(observed, y - f, 0.0))

    def neg_hessian(self, f, y):
        return self.ggn(f, y)

    def ggn(self, f, y=None):
        S = self.ggn_root(f, y)
        return S @ S.mT

    def ggn_root(self, f, y=None):
        # R = L Lᵀ, so R⁻¹ = S Sᵀ with S = L⁻ᵀ.
        c = f.shape[-1]
        if self.raw_noise.ndim < 2:
            self._check_width(f)
            S = torch.diag_embed((-_like(self.raw_noise, f) / 2).exp().expand(c))
        else:
            S = torch.linalg.solve_triangular(self._noise_cholesky(f).mT, torch.eye(c, dtype=f.dtype, device=f.device), upper=True)
        S = S.expand(*f.shape, c)
        return S if y is None else torch.where(self._observed(f, y)[0].unsqueeze(-1), S, 0.0)

    def sample(self, f, generator=None):
        return f + _randn(f, generator) @ self._noise_cholesky(f).mT

    def moments(self, f):
        variance = self.noise.diagonal() if self.raw_noise.ndim == 2 else self.noise
        return f, _like(variance, f).expand(f.shape)

    def conditional_moments(self, f):
        L = self._noise_cholesky(f)
        return f, (L @ L.mT).expand(*f.shape, f.shape[-1])

    def expected(self, mean, cov, y):
        # E[log p] = log p(y | m) − ½ tr(R⁻¹ C)
        precision = self.ggn(mean, y)
        value = self.log_prob(mean, y) - 0.5 * (precision * cov).sum((-1, -2))
        return Integrals(value, self.gradient(mean, y), precision, precision)

    def tilted(self, mean, cov, y, power):
        # p^α ∝ N(y; f, R/α): log E = log N(y; m, C + R/α) + ½ (1 − α) log |2πR| − ½ c log α. With S = R⁻ᐟ² (zero for what is missing)
        # B = I + α Sᵀ C S, so that (C + R/α)⁻¹ = α S B⁻¹ Sᵀ on what is observed.
        S = self.ggn_root(mean, y)
        B = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + power * S.mT @ cov @ S
        L = torch.linalg.cholesky(B)
        V = torch.linalg.solve_triangular(L, S.mT, upper=False)
        precision = power * V.mT @ V
        g = self.gradient(mean, y)                                                   # R⁻¹ (y − m)
        observed, z = self._observed(mean, y)
        residual = torch.where(observed, z - mean, 0.0)
        gradient = (precision @ residual.unsqueeze(-1)).squeeze(-1)
        # α log p(y | m) = −α/2 rᵀR⁻¹r + …: exchange the quadratic, subtract ½ log |B|.
        value = power * self.log_prob(mean, y) + 0.5 * power * (g * residual).sum(-1) - 0.5 * (gradient * residual).sum(-1)
        value = value - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return Integrals(value, gradient, precision, S @ S.mT)

    def statistics(self, f, y):
        f = f.detach().to(_accumulator(f))
        observed, y = self._observed(f, y)
        residual = torch.where(observed, y - f, 0.0).reshape(-1, f.shape[-1])
        count = observed.expand(f.shape).reshape(-1, f.shape[-1]).sum(0).to(f)
        return {"count": count, "scatter": residual.mT @ residual if self.raw_noise.ndim == 2 else residual.square().sum(0)}

    def log_prob_of(self, statistics):
        # Σ_n log N(y_n; f_n, R) = −½ ( N log |2πR| + tr R⁻¹ Σ_n r_n r_nᵀ )
        count, scatter = statistics["count"], statistics["scatter"]
        raw = _like(self.raw_noise, scatter)
        if raw.ndim < 2:
            return -0.5 * (count * (raw + math.log(2 * math.pi)) + scatter * (-raw).exp()).sum()
        L = _like(self._cholesky(), scatter)
        log_det = (2 * raw.diagonal() + math.log(2 * math.pi)) * count
        return -0.5 * (log_det.sum() + torch.cholesky_solve(scatter, L).diagonal().sum())

    def ggn_scale(self):
        if self.raw_noise.ndim < 2 and self.raw_noise.numel() == 1:
            return (-self.raw_noise).exp().reshape(())
        return torch.ones_like(self.raw_noise.detach().flatten()[0])

    def predict(self, mean, cov):
        # f ~ N(mean, cov) and y | f ~ N(f, R) give y ~ N(mean, cov + R), exactly.
        L = self._noise_cholesky(mean)
        return MultivariateNormal(mean, scale_tril=safe_cholesky(cov + L @ L.mT))

    def arguments(self):
        return {"noise": self.noise.detach()}
