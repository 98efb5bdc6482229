"""Noise whose scale is latent too: a Gaussian, and a Student's t that forgives outliers."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import MultivariateNormal

from .._psd import safe_cholesky
from .base import Integrals, Likelihood, Positive, _like, _randn
from .links import Exp, PositiveLink
from .predictives import PerRow, mixture, nodes_of, regress, scalar_nodes
from .student_t import gaussian_scales

__all__ = ["HeteroscedasticGaussian", "HeteroscedasticStudentT"]


class _Parts(NamedTuple):
    """Of each target [... d], zeros where it is missing: what is observed, residual e, log s with its two derivatives, τ = 1/s²."""

    observed: Tensor
    e: Tensor
    log_scale: Tensor
    slope: Tensor
    bend: Tensor
    tau: Tensor


class _LatentScale(Likelihood):
    """y = m + s ε, s = g(ρ), with latents f = (m [d], ρ [d]): all means first, then all scales.

    With h = log s, a = h'(ρ), b = h''(ρ), and the derivatives of log p in (m, h) from an heir:
    ∂ρ = a ∂h,   −∂²(m, ρ) = a (−∂²(m, h)),   −∂²(ρ, ρ) = a² (−∂²(h, h)) − b ∂h.
    """

    def __init__(self, link: PositiveLink | None = None):
        super().__init__()
        self.link = Exp(0.5) if link is None else link
        if not isinstance(self.link, PositiveLink):
            raise TypeError(f"{type(self).__name__}: link is {self.link!r} but should be a positive one such as Exp(0.5) (a latent log variance) "
                            "or Softplus()")

    @abstractmethod
    def _log_density(self, p: _Parts) -> Tensor:
        """log p(y | m, h) of each target, without the − log s."""

    @abstractmethod
    def _slopes(self, p: _Parts) -> tuple[Tensor, Tensor]:
        """∂/∂m and ∂/∂h; ∂/∂h without the −1 of − log s."""

    @abstractmethod
    def _bends(self, p: _Parts) -> tuple[Tensor, Tensor, Tensor]:
        """−∂²(m, m), −∂²(m, h), −∂²(h, h)."""

    @abstractmethod
    def _informations(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Fisher information in m in units of 1/s², and in h."""

    def target_shape(self, f):
        if f.shape[-1] % 2:
            self._refuse_latents(f, "an odd number of latents", 2, "two latents for each target, all means, then all scales; for one target")
        return f.shape[:-1] + (f.shape[-1] // 2,)

    def latents_for(self, d):
        return 2 * d

    def _validate_targets(self, f, y):
        self._refuse_infinite(y)

    def _parts(self, f: Tensor, y: Tensor) -> _Parts:
        y = self.targets(f, y)
        m, rho = f.chunk(2, -1)
        observed = ~y.isnan()
        keep = lambda value: torch.where(observed, value, 0.0)
        log_scale = self.link.log(rho)
        return _Parts(observed, keep(keep(y).to(f) - m), keep(log_scale), keep(self.link.log_slope(rho)), keep(self.link.log_bend(rho)),
                      keep((-2 * log_scale).exp()))

    def log_prob(self, f, y):
        p = self._parts(f, y)
        return (torch.where(p.observed, self._log_density(p), 0.0) - p.log_scale).sum(-1)

    def gradient(self, f, y):
        p = self._parts(f, y)
        mean, scale = self._slopes(p)
        return torch.cat([mean, p.slope * (scale - 1)], -1)

    def neg_hessian(self, f, y):
        p = self._parts(f, y)
        mm, mh, hh = self._bends(p)
        cross = torch.diag_embed(p.slope * mh)
        corner = torch.diag_embed(p.slope.square() * hh - p.bend * (self._slopes(p)[1] - 1))
        return torch.cat([torch.cat([torch.diag_embed(mm), cross], -1), torch.cat([cross, corner], -1)], -2)

    def _fisher(self, f: Tensor, y: Tensor | None) -> Tensor:
        self.target_shape(f)
        rho = f.chunk(2, -1)[1]
        of_mean, of_scale = self._informations(f)
        fisher = torch.cat([of_mean * (-2 * self.link.log(rho)).exp(), of_scale * self.link.log_slope(rho).square()], -1)
        return fisher if y is None else torch.where(self.targets(f, y).isnan().tile(2), 0.0, fisher)

    def ggn(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y))

    def ggn_root(self, f, y=None):
        return torch.diag_embed(self._fisher(f, y).sqrt())

    def _rho_nodes(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m, ρ) as nodes ρ_q and m | ρ_q: nodes [... q d], log weights [... q], means [... q d] of m, and its rest of the covariance [... d d]."""
        d = mean.shape[-1] // 2
        order = [*range(d, 2 * d), *range(d)]                                             # ρ first, as `regress` has it
        A, rest = regress(cov[..., order, :][..., order], d)
        rho, C_rr = mean[..., d:], cov[..., d:, d:]
        if d > 1:
            nodes, log_weights = nodes_of(rho, C_rr)
        else:
            # One target: from node to node the mean moves by A, and must not step over a component's own width √(rest + s²).
            width = C_rr[..., 0].clamp_min(0).sqrt()
            with torch.no_grad():
                around = torch.stack([rho + k * width for k in (-4, -2, 0, 2)])
                narrowest = (rest[..., 0].clamp_min(0) + (2 * self.link.log(around)).exp()).amin(0).sqrt()
                own = 2**0.5 * self.link.log_slope(around).amax(0)
                spread = width * torch.maximum(A[..., 0].abs() / narrowest, own)
            nodes, log_weights = scalar_nodes(rho, width, spread)                         # [q ... 1], [... 1 q]
            nodes, log_weights = nodes.movedim(0, -2), log_weights.squeeze(-2)
        return nodes, log_weights, mean[..., None, :d] + (nodes - rho.unsqueeze(-2)) @ A.mT, rest


class HeteroscedasticGaussian(_LatentScale):
    """y = m + ε, ε ~ N(0, s²), s = g(ρ), with latents f = (m [d], ρ [d]): all means first, then all scales.

    With e = y − m, τ = 1/s², a = (log s)', b = (log s)'':   log p = −½ (τ e² + log 2π) − log s,   ∂ = (τ e, a (τ e² − 1)),
    −∂² = [[τ, 2 a τ e], [2 a τ e, 2 a² τ e² − b (τ e² − 1)]]  (indefinite),   Fisher = diag(τ, 2 a²).

    Args:
        link: g, from ρ to the standard deviation s: `Exp(0.5)` (s² = e^ρ, so ρ is a log variance) unless given, `Softplus()`, `Exp()` …
    Shapes: f [... 2d], y [... d] (or [...] for d = 1); NaN drops that output alone.
    The predictive is a mixture of MultivariateNormals, event [d]: the means are integrated exactly given the scales, and these by
    quadrature over their full covariance. Under an exponential link E[log p] is in closed form.

    >>> likelihood = HeteroscedasticGaussian()
    >>> likelihood.ggn(torch.tensor([[0.0, 0.0]]))
    tensor([[[1.0000, 0.0000],
             [0.0000, 0.5000]]])

    Source: Nix & Weigend (1994); the Fisher in this form, Immer et al. (2023), "Effective Bayesian heteroscedastic regression", section 3; with a
    softplus, Wilkinson, Särkkä & Solin (2023), section 6.1.
    """

    def _log_density(self, p):
        return -0.5 * (p.tau * p.e.square() + math.log(2 * math.pi))

    def _slopes(self, p):
        return p.tau * p.e, p.tau * p.e.square()

    def _bends(self, p):
        return p.tau, 2 * p.tau * p.e, 2 * p.tau * p.e.square()

    def _informations(self, like):
        return like.new_ones(()), like.new_full((), 2.0)

    def conditional(self, f):
        self.target_shape(f)
        m, rho = f.chunk(2, -1)
        return MultivariateNormal(m, scale_tril=torch.diag_embed(self.link(rho)))

    def sample(self, f, generator=None):
        m, rho = f.chunk(2, -1)
        return m + self.link(rho) * _randn(m, generator)

    def moments(self, f):
        m, rho = f.chunk(2, -1)
        return m, self.link(rho).square()

    def expected(self, mean, cov, y):
        k = self.link.exponent
        if k is None:
            return None
        # s = e^{kρ}: e^{−2kρ} tilts the Gaussian, so that E[e² e^{−2kρ}] = T (e'² + C_mm), e' = y − m̄ + 2k C_mρ, T = e^{−2kρ̄ + 2k² C_ρρ}.
        y = self.targets(mean, y)
        observed = ~y.isnan()
        keep = lambda value: torch.where(observed, value, 0.0)
        m, rho = mean.chunk(2, -1)
        d = m.shape[-1]
        diagonal = lambda i, j: cov[..., i * d : (i + 1) * d, j * d : (j + 1) * d].diagonal(dim1=-2, dim2=-1)
        T = keep((-2 * k * rho + 2 * k**2 * diagonal(1, 1)).exp())
        e = keep(keep(y).to(mean) - m + 2 * k * diagonal(0, 1))
        square = T * (e.square() + diagonal(0, 0))
        value = -0.5 * (square + keep(math.log(2 * math.pi) + 2 * k * rho)).sum(-1)
        gradient = torch.cat([T * e, k * (square - observed.to(square))], -1)
        cross, corner = torch.diag_embed(2 * k * T * e), torch.diag_embed(2 * k**2 * square)
        bend = torch.cat([torch.cat([torch.diag_embed(T), cross], -1), torch.cat([cross, corner], -1)], -2)
        return Integrals(value, gradient, bend, torch.diag_embed(torch.cat([T, 2 * k**2 * observed.to(T)], -1)))

    def predict(self, mean, cov):
        # (m, ρ) ~ N:  ρ at nodes ρ_q, and m | ρ_q ~ N(m̄ + A (ρ_q − ρ̄), C_mm − A C_ρm) with A = C_mρ C_ρρ⁻¹.
        self.target_shape(mean)
        rho, log_weights, m, rest = self._rho_nodes(mean, cov)
        spread = rest.unsqueeze(-3) + torch.diag_embed(self.link(rho).square())
        return mixture(MultivariateNormal(m, scale_tril=safe_cholesky(spread)), log_weights)

    def arguments(self):
        return {"link": self.link}


class HeteroscedasticStudentT(_LatentScale):
    """y = m + s t, s = g(ρ), t ~ Student's t, with latents f = (m [d], ρ [d]): all means first, then all scales.

    With e = y − m, u = e²/s², ν = dof, w = (ν + 1)/(ν + u), v = ν/(ν + u), a = (log s)', b = (log s)'':
    ∂ = (w e / s², a (w u − 1)),   −∂² = [[w (2 v − 1) / s², 2 a w v e / s²], [2 a w v e / s², 2 a² w v u − b (w u − 1)]],
    Fisher = diag((ν + 1)/(ν + 3) / s², 2 a² ν/(ν + 3)).

    Args:
        dof: ν > 0, a scalar or [d], learned.
        link: g, from ρ to the scale s: `Exp(0.5)` unless given, `Softplus()`, `Exp()` … The variance is s² ν / (ν − 2) for ν > 2.
    Shapes: f [... 2d], y [... d] (or [...] for d = 1); NaN drops that output alone.
    The predictive is, for each output by itself, a mixture of normals over nodes of ρ and of the gamma variable that makes a t of a normal.

    >>> HeteroscedasticStudentT(dof=3.0).ggn(torch.zeros(1, 2)).diagonal(dim1=-2, dim2=-1)
    tensor([[0.6667, 0.2500]], grad_fn=<DiagonalBackward0>)

    Source: Lange, Little & Taylor (1989), "Robust statistical modeling using the t distribution", section 3.
    """

    dof: Positive = Positive()

    def __init__(self, dof: float | Tensor = 4.0, link: PositiveLink | None = None):
        super().__init__(link)
        self.dof = dof  # type: ignore[assignment]

    def _weights(self, p: _Parts) -> tuple[Tensor, Tensor, Tensor]:
        """u = e²/s², w and v."""
        nu = _like(self.dof, p.e)
        u = p.tau * p.e.square()
        return u, (nu + 1) / (nu + u), nu / (nu + u)

    def _log_density(self, p):
        nu = _like(self.dof, p.e)
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi).log()
        return constant - (nu + 1) / 2 * torch.log1p(p.tau * p.e.square() / nu)

    def _slopes(self, p):
        u, w, _ = self._weights(p)
        return w * p.tau * p.e, w * u

    def _bends(self, p):
        u, w, v = self._weights(p)
        return w * (2 * v - 1) * p.tau, 2 * w * v * p.tau * p.e, 2 * w * v * u

    def _informations(self, like):
        nu = _like(self.dof, like)
        return (nu + 1) / (nu + 3), 2 * nu / (nu + 3)

    def _outputs(self, f: Tensor) -> td.StudentT:
        self.target_shape(f)
        m, rho = f.chunk(2, -1)
        return td.StudentT(_like(self.dof, f).expand_as(m), m, self.link(rho), validate_args=False)

    def conditional(self, f):
        return PerRow(self._outputs(f))

    def sample(self, f, generator=None):
        m, rho = f.chunk(2, -1)
        half = (_like(self.dof, f) / 2).expand_as(m)
        gamma = torch._standard_gamma(half.to(generator.device if generator else f.device), generator=generator).to(f.device)
        return m + self.link(rho) * _randn(m, generator) * (half / gamma).sqrt()

    def moments(self, f):
        return f.chunk(2, -1)[0], self._outputs(f).variance

    def predict(self, mean, cov):
        # t = normal / √γ: given ρ and γ, y ~ N(m̄ + A (ρ − ρ̄), rest + s²/γ). Each output by itself, its pair (m, ρ) as a row of its own.
        self.target_shape(mean)
        d = mean.shape[-1] // 2
        pair = torch.tensor([[k, d + k] for k in range(d)], device=mean.device)                       # [d 2]
        C = cov[..., pair.unsqueeze(-1), pair.unsqueeze(-2)]                                          # [... d 2 2]
        rho, log_w, m, rest = self._rho_nodes(mean[..., pair], C)                                     # [... d q 1]
        gamma, log_g = gaussian_scales(_like(self.dof, mean).expand(d))                               # [d r]
        variance = rest.clamp_min(0) + self.link(rho).square() / gamma.unsqueeze(-2)                  # [... d q r]
        log_weights = log_w.unsqueeze(-1) + log_g.unsqueeze(-2)
        return PerRow(mixture(td.Normal(m.expand_as(variance).flatten(-2), variance.sqrt().flatten(-2), validate_args=False),
                              log_weights.flatten(-2)))

    def arguments(self):
        return {"dof": self.dof.detach(), "link": self.link}
