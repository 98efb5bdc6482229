"""Several outputs mixed from latent functions: linear coregionalisation (fixed weights) and the regression network (weights that vary too)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from .._psd import safe_cholesky
from .base import Integrals, _constant, _like
from .gaussian_noise import GaussianNoise
from .predictives import mixture, nodes_of, regress

__all__ = ["LinearCoregionalisation", "RegressionNetwork"]


class LinearCoregionalisation(GaussianNoise):
    """y = W f + ε with ε ~ N(0, R): outputs that share latent functions, W = weights [d c], R = noise.

    With P = R⁻¹:   ∂ = Wᵀ P (y − W f),   Λ = Wᵀ P W for the Hessian and the GGN alike. Expectations under a Gaussian are in closed form.

    Args:
        weights: W [d c], learned; `likelihood.weights.requires_grad_(False)` keeps it.
        noise: a variance (units of y²): a scalar, [d], or [d d] for a full covariance, learned.
    Shapes: f [... c], y [... d] (or [...] for d = 1). NaN in y drops that output; under a full covariance it is integrated out.
    The predictive is an exact MultivariateNormal, event [d].
    Raises ValueError for a latent that no output uses, which the data could not inform.

    >>> likelihood = LinearCoregionalisation([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], noise=0.1)
    >>> likelihood.moments(torch.ones(1, 2))[0]
    tensor([[1., 2., 2.]], grad_fn=<SqueezeBackward1>)

    Source: Goovaerts (1997), "Geostatistics for natural resources evaluation"; Álvarez, Rosasco & Lawrence (2012), section 4.2.
    """

    def __init__(self, weights: Tensor | list[list[float]], noise: float | Tensor = 1.0):
        super().__init__(noise)
        weights = _constant(weights)
        if weights.ndim != 2 or not bool(weights.isfinite().all()):
            raise ValueError(f"LinearCoregionalisation: weights have shape {list(weights.shape)} but should be finite and [outputs, latents]")
        if bool((weights == 0).all(0).any()):
            raise ValueError("LinearCoregionalisation: a column of the weights is zero, so no output uses that latent; leave it out")
        self.weights = nn.Parameter(weights)

    def _outputs(self, f):
        d, c = self.weights.shape
        if f.shape[-1] != c:
            self._refuse_latents(f, f"but the weights [{d} {c}] mix {c} latents", c, f"one latent for each column of the weights, {c}")
        return d

    def latents_for(self, d):
        return self.weights.shape[1]

    def _mean(self, f):
        self._outputs(f)
        return (_like(self.weights, f) @ f.unsqueeze(-1)).squeeze(-1)

    def _pull(self, f, v):
        return _like(self.weights, f).mT @ v

    def _bend(self, f, w):
        return None

    def expected(self, mean, cov, y):
        return self._expected_linear(mean, cov, y)

    def tilted(self, mean, cov, y, power):
        return self._tilted_linear(mean, cov, y, power)

    def predict(self, mean, cov):
        # f ~ N(m, C) and y | f ~ N(W f, R) give y ~ N(W m, W C Wᵀ + R), exactly.
        W = _like(self.weights, mean)
        return MultivariateNormal(self._mean(mean), scale_tril=safe_cholesky(W @ cov @ W.mT + self._noise_matrix(mean)))

    def arguments(self):
        return {"weights": self.weights.detach(), "noise": self.noise.detach()}


class RegressionNetwork(GaussianNoise):
    """y = W h + ε with ε ~ N(0, R), where the functions h [k] and the weights W [d k] that mix them are both latent: correlations that vary.

    The latents of a row are f = (h, vec W), first the k functions, then the weights row by row; a constant offset is added to the weights.
    ∂μ_i/∂h = W_i + offset_i,  ∂μ_i/∂W_i = h,  ∂²μ_i/∂h∂W_i = I. E[log p] under a Gaussian is in closed form (μ is quadratic in f).

    Args:
        latents: k, the functions that are mixed.
        outputs: d.
        noise: a variance (units of y²): a scalar, [d], or [d d] for a full covariance, learned.
        offset: added to W, a scalar or [d k], fixed. At W = h = 0 all gradients vanish: an offset lets inference leave that point.
    Shapes: f [... k (1 + d)], y [... d]. NaN in y drops that output; under a full covariance it is integrated out.
    The predictive is a mixture of MultivariateNormals: h at nodes, the weights integrated exactly given h.

    >>> likelihood = RegressionNetwork(latents=1, outputs=2, noise=0.1)
    >>> likelihood.moments(torch.tensor([[2.0, 1.0, 3.0]]))[0]  # 2 · (1, 3)
    tensor([[2., 6.]])

    Source: Wilson, Knowles & Ghahramani (2012), "Gaussian process regression networks", equations 1-3 (without their noise on h).
    """

    offset: Tensor

    def __init__(self, latents: int, outputs: int, noise: float | Tensor = 1.0, offset: float | Tensor = 0.0):
        super().__init__(noise)
        if latents < 1 or outputs < 1:
            raise ValueError(f"RegressionNetwork: latents={latents}, outputs={outputs}; expected at least one of each")
        self.latents, self.outputs = int(latents), int(outputs)
        offset = _constant(offset)
        if offset.ndim and offset.shape != (outputs, latents):
            raise ValueError(f"RegressionNetwork: offset has shape {list(offset.shape)} but is a scalar or [{outputs}, {latents}], as the weights")
        self.register_buffer("offset", offset)

    def _outputs(self, f):
        k, d = self.latents, self.outputs
        if f.shape[-1] != k * (1 + d):
            self._refuse_latents(f, f"{f.shape[-1]} latents", k * (1 + d), f"{k} functions, then {d} × {k} weights")
        return d

    def latents_for(self, d):
        return self.latents * (1 + self.outputs) if d == self.outputs else None

    def _parts(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """h [... k] and W [... d k], with the offset."""
        self._outputs(f)
        h, w = f.split([self.latents, self.latents * self.outputs], -1)
        return h, w.reshape(*f.shape[:-1], self.outputs, self.latents) + _like(self.offset, f)

    def _mean(self, f):
        h, W = self._parts(f)
        return (W @ h.unsqueeze(-1)).squeeze(-1)

    def _pull(self, f, v):
        h, W = self._parts(f)
        weights = v.unsqueeze(-2) * h[..., None, :, None]                         # [... d k m]
        return torch.cat([W.mT @ v, weights.flatten(-3, -2)], -2)

    def _bend(self, f, w):
        # ∂²μ_i / ∂h_j ∂W_ij = 1
        k, d = self.latents, self.outputs
        cross = torch.einsum("...i,jl->...jil", w, torch.eye(k, dtype=w.dtype, device=w.device)).flatten(-2)     # [... k dk]
        top = torch.cat([cross.new_zeros(*w.shape[:-1], k, k), cross], -1)
        return torch.cat([top, torch.cat([cross.mT, cross.new_zeros(*w.shape[:-1], d * k, d * k)], -1)], -2)

    def expected(self, mean, cov, y):
        # μ_i = μ_i(m) + g_iᵀε + ½ εᵀA_iε with ε ~ N(0, C), so that E μ_i = μ_i(m) + ½ tr A_iC and Cov(μ_i, μ_j) = g_iᵀCg_j + ½ tr A_iCA_jC.
        d = self.outputs
        A = self._bend(mean[..., :1], torch.eye(d, dtype=mean.dtype, device=mean.device))                         # [d c c]
        r, observed = self._residual(mean, y)
        precise = self._precision(mean, observed)
        S = precise.root()
        P = S @ S.mT
        AC = torch.einsum("iab,nbc->niac", A, cov)
        r = torch.where(observed, r - 0.5 * AC.diagonal(dim1=-2, dim2=-1).sum(-1), 0.0)
        G = self._pull(mean, torch.eye(d, dtype=mean.dtype, device=mean.device).expand(*mean.shape[:-1], d, d))   # g_i in the columns
        spread = G.mT @ cov @ G + 0.5 * torch.einsum("niac,njca->nij", AC, AC)
        Pr = precise.apply(r)
        value = -0.5 * ((Pr * r).sum(-1) + (P * spread).sum((-1, -2)) + precise.log_det)
        GP = G @ P                                                                                               # Σ_j g_j P_ji
        gradient = (G @ Pr.unsqueeze(-1)).squeeze(-1) - torch.einsum("niac,nci->na", AC, GP)
        fisher = GP @ G.mT + torch.einsum("nij,niac,jcd->nad", P, AC, A)
        return Integrals(value, gradient, fisher - torch.einsum("ni,iab->nab", Pr, A), fisher)

    def predict(self, mean, cov):
        # Given h the mean is linear in the weights: y | h ~ N((E[W|h] + offset) h, H Cov[vec W|h] Hᵀ + R), H = I ⊗ hᵀ.
        self._check_width(mean)
        k, d = self.latents, self.outputs
        A, rest = regress(cov, k)                                                                                # of vec W on h
        h, log_weights = nodes_of(mean[..., :k], cov[..., :k, :k])                                               # [... q k]
        w = mean[..., None, k:] + (h - mean[..., None, :k]) @ A.mT
        y = self._mean(torch.cat([h, w], -1))
        blocks = rest.reshape(*rest.shape[:-2], d, k, d, k)
        noise = torch.einsum("...qk,...ikjl,...ql->...qij", h, blocks, h) + self._noise_matrix(mean)
        return mixture(MultivariateNormal(y, scale_tril=safe_cholesky(noise)), log_weights)

    def arguments(self):
        return {"latents": self.latents, "outputs": self.outputs, "noise": self.noise.detach(), "offset": self.offset}
