"""Student's t noise: a Gaussian that forgives outliers, output by output or a whole row at a time."""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

from .._psd import safe_cholesky
from .base import Elementwise, Likelihood, Positive, _accumulator, _like, _randn
from .covariance import Covariance, Precision, cholesky_of, precision
from .predictives import ByLikelihood, mixture

__all__ = ["MultivariateStudentT", "StudentT", "gaussian_scales"]


class StudentT(Elementwise):
    """y = f + scale · t, t ~ Student's t with dof degrees of freedom, each output by itself.

    With e = y − f, ν = dof, s = scale:   ∂ = (ν + 1) e / (ν s² + e²),   −∂² = (ν + 1)(ν s² − e²) / (ν s² + e²)²  (negative for outliers),
    Fisher = (ν + 1) / ((ν + 3) s²).

    Args:
        dof: ν > 0, a scalar or [c], learned.
        scale: s > 0 in units of y, a scalar or [c], learned; the variance is s² ν / (ν − 2) for ν > 2.
    Shapes: f [... c], y [... c] (or [...] for c = 1). The predictive is a mixture over each output's marginal, event [c].

    >>> StudentT(dof=3.0, scale=1.0).ggn(torch.zeros(1, 1))
    tensor([[[0.6667]]], grad_fn=<DiagEmbedBackward0>)

    Source: Lange, Little & Taylor (1989); Rasmussen & Williams (2006), equation 9.5.
    """

    dof: Positive = Positive()
    scale: Positive = Positive()

    def __init__(self, dof: float | Tensor = 4.0, scale: float | Tensor = 1.0):
        super().__init__()
        self.dof = dof
        self.scale = scale

    def _validate_targets(self, f, y):
        self._refuse_infinite(y)

    def _parameters_like(self, f):
        return _like(self.dof, f), _like(self.scale, f).square()

    def _log_prob(self, f, y):
        nu, s2 = self._parameters_like(f)
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi * s2).log()
        return constant - (nu + 1) / 2 * torch.log1p((y - f).square() / (nu * s2))

    def _gradient(self, f, y):
        nu, s2 = self._parameters_like(f)
        e = y - f
        return (nu + 1) * e / (nu * s2 + e.square())

    def _neg_hessian(self, f, y):
        nu, s2 = self._parameters_like(f)
        e2 = (y - f).square()
        return (nu + 1) * (nu * s2 - e2) / (nu * s2 + e2).square()

    def _fisher(self, f):
        nu, s2 = self._parameters_like(f)
        return ((nu + 1) / ((nu + 3) * s2)).expand_as(f)

    def _family(self, f):
        return td.StudentT, {"df": _like(self.dof, f).expand_as(f), "loc": f, "scale": _like(self.scale, f).expand_as(f)}

    def sample(self, f, generator=None):
        half = (_like(self.dof, f) / 2).expand_as(f)
        gamma = torch._standard_gamma(half.to(generator.device if generator else f.device), generator=generator).to(f.device)
        return f + _like(self.scale, f) * _randn(f, generator) * (half / gamma).sqrt()

    def moments(self, f):
        return f, self.conditional(f).variance

    def arguments(self):
        return {"dof": self.dof.detach(), "scale": self.scale.detach()}


class MultivariateStudentT(Likelihood):
    """y = f + √(ν/χ²_ν) ε with ε ~ N(0, Σ): one outlier scales the noise of all outputs of its row.

    With e = y − f, P = Σ⁻¹, Δ = eᵀ P e, w = (ν + d)/(ν + Δ), d the outputs that the row has:
    log p = log Γ((ν + d)/2) − log Γ(ν/2) − ½ log |νπ Σ| − (ν + d)/2 log(1 + Δ/ν),   ∂ = w P e,
    −∂² = w P − 2 w/(ν + Δ) (P e)(P e)ᵀ  (indefinite for outliers),   Fisher = (ν + d)/(ν + d + 2) P.

    Args:
        dof: ν > 0, a scalar, learned.
        scale_matrix: Σ in units of y²: [d d], [d] for a diagonal, or a scalar, learned. The covariance is Σ ν / (ν − 2) for ν > 2.
    Shapes: f [... d], y [... d] (or [...] for d = 1). NaN in y drops that output: it is integrated out.
    The predictive is a mixture of MultivariateNormals over nodes of the gamma variable that makes a t of a normal; f is integrated exactly.

    >>> likelihood = MultivariateStudentT(4.0, torch.eye(2)).requires_grad_(False)
    >>> likelihood.gradient(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]))  # 6/6 (1, 1)
    tensor([[1., 1.]])

    Source: Lange, Little & Taylor (1989); Kotz & Nadarajah (2004), "Multivariate t distributions", chapter 1.
    """

    dof: Positive = Positive()
    scale_matrix: Covariance = Covariance()
    raw_scale_matrix: Tensor

    def __init__(self, dof: float | Tensor = 4.0, scale_matrix: float | Tensor = 1.0):
        super().__init__()
        self.dof = dof  # type: ignore[assignment]
        self.scale_matrix = scale_matrix  # type: ignore[assignment]
        if self.dof.numel() != 1:
            raise ValueError(f"MultivariateStudentT: dof has shape {list(self.dof.shape)} but a row has one, a scalar; "
                             "StudentT() has one each output")

    def target_shape(self, f):
        return f.shape

    def latents_for(self, d):
        return d

    def _check_width(self, f: Tensor) -> int:
        if self.raw_scale_matrix.ndim and self.raw_scale_matrix.shape[-1] != f.shape[-1]:
            raise ValueError(f"MultivariateStudentT: scale_matrix has shape {list(self.raw_scale_matrix.shape)} but f has shape {list(f.shape)}, "
                             f"{f.shape[-1]} outputs; give it one row for each output")
        return f.shape[-1]

    def _validate_targets(self, f, y):
        self._check_width(f)
        self._refuse_infinite(y)

    def _nu(self, f: Tensor) -> Tensor:
        return _like(self.dof, f).reshape(())

    def _matrix(self, f: Tensor) -> Tensor:
        L = cholesky_of(_like(self.raw_scale_matrix, f), self._check_width(f))
        return L @ L.mT

    def _parts(self, f: Tensor, y: Tensor) -> tuple[Tensor, Precision, Tensor, Tensor]:
        """e [... d], P, Δ [...] and the number of outputs that the row has [...]."""
        self._check_width(f)
        y = self.targets(f, y)
        observed = ~y.isnan()
        e = torch.where(observed, torch.where(observed, y, 0.0).to(f) - f, 0.0)
        P = precision(_like(self.raw_scale_matrix, f), observed)
        return e, P, P.whiten(e).square().sum(-1), observed.sum(-1).to(f)

    def conditional(self, f):
        self._check_width(f)
        return ByLikelihood(self, f)

    def log_prob(self, f, y):
        _, P, delta, d = self._parts(f, y)
        nu = self._nu(f)
        constant = torch.lgamma((nu + d) / 2) - torch.lgamma(nu / 2) - 0.5 * (P.log_det + d * (nu / 2).log())
        return constant - (nu + d) / 2 * torch.log1p(delta / nu)

    def gradient(self, f, y):
        e, P, delta, d = self._parts(f, y)
        nu = self._nu(f)
        return ((nu + d) / (nu + delta)).unsqueeze(-1) * P.apply(e)

    def neg_hessian(self, f, y):
        e, P, delta, d = self._parts(f, y)
        nu = self._nu(f)
        S, Pe = P.root(), P.apply(e)
        w = ((nu + d) / (nu + delta))[..., None, None]
        return w * (S @ S.mT) - (2 / (nu + delta))[..., None, None] * w * Pe.unsqueeze(-1) * Pe.unsqueeze(-2)

    def ggn(self, f, y=None):
        S = self.ggn_root(f, y)
        return S @ S.mT

    def ggn_root(self, f, y=None):
        self._check_width(f)
        observed = torch.ones_like(f, dtype=torch.bool) if y is None else ~self.targets(f, y).isnan()
        nu, d = self._nu(f), observed.sum(-1).to(f)[..., None, None]
        return ((nu + d) / (nu + d + 2)).sqrt() * precision(_like(self.raw_scale_matrix, f), observed).root()

    def sample(self, f, generator=None):
        half = (self._nu(f) / 2).expand(*f.shape[:-1], 1)
        gamma = torch._standard_gamma(half.to(generator.device if generator else f.device), generator=generator).to(f.device)
        L = cholesky_of(_like(self.raw_scale_matrix, f), self._check_width(f))
        return f + (half / gamma).sqrt() * (_randn(f, generator) @ L.mT)

    def conditional_moments(self, f):
        # torch's StudentT knows where mean and variance are infinite or missing.
        factor = td.StudentT(self._nu(f), 0.0, 1.0, validate_args=False).variance
        return f, (factor * self._matrix(f)).expand(*f.shape, f.shape[-1])

    def moments(self, f):
        mean, cov = self.conditional_moments(f)
        return mean, cov.diagonal(dim1=-2, dim2=-1)

    def predict(self, mean, cov):
        gamma, log_weights = gaussian_scales(self._nu(mean))                                          # [q]
        spread = cov.unsqueeze(-3) + self._matrix(mean) / gamma[:, None, None]
        normal = td.MultivariateNormal(mean.unsqueeze(-2).expand(*spread.shape[:-1]), scale_tril=safe_cholesky(spread))
        return mixture(normal, log_weights.expand(*mean.shape[:-1], -1))

    def arguments(self):
        return {"dof": self.dof.detach(), "scale_matrix": self.scale_matrix.detach()}


def gaussian_scales(nu: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes γ [... q] and log weights [... q] of the Gamma(ν/2, ν/2) variable for which N(0, 1/γ) is a Student's t of ν [...] degrees of freedom.

    The trapezoidal rule in u = log γ, where the density is e^{ν/2 (u − e^u)} up to a factor: exponentially exact, cut where it is below 1e-13 and
    where no residual of less than 100 scales would put its weight. Beyond that tails are a normal's.
    """
    wide = nu.detach().to(_accumulator(nu))
    half = wide / 2
    step = torch.minimum(torch.full_like(half, 0.33), 0.75 / half.sqrt())
    # ν/2 (e^u − 1 − u) = 30 on both sides of u = 0: below −1 − b the e^u hardly counts; above by Newton's method
    b = 30 / half
    low = torch.maximum((b + 1).where(b > 1, (2 * b).sqrt() + b / 2), (1e4 / wide).log1p() + 6 / half.sqrt())
    low = -low.clamp_max(-math.log(torch.finfo(nu.dtype).tiny) - 10)                                             # 1/γ stays finite
    high = (1 + b).log1p()
    for _ in range(20):
        high = high - (high.expm1() - high - b) / high.expm1()
    q = int(((high - low) / step).max().ceil()) + 1
    u = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * torch.linspace(0, 1, q, dtype=half.dtype, device=half.device)
    u = u.to(nu)
    log_w = (nu.unsqueeze(-1) / 2 * (u - u.exp())).log_softmax(-1)
    return u.exp(), log_w
