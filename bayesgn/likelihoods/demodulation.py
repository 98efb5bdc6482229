"""Carriers under positive amplitudes: products of functions, amplitude demodulation and nonnegative matrix factorisation."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .base import Positive, _like
from .gaussian_noise import GaussianNoise
from .links import PositiveLink, Softplus
from .predictives import mixture, nodes_of, regress, scalar_nodes

__all__ = ["AmplitudeDemodulation", "NonnegativeMatrixFactorisation"]


class _Demodulation(GaussianNoise):
    """y = sᵀ W g(a) + ε: carriers s [D] and modulators a [N], f = (s, a), W ≥ 0 [D N], g = link.

    ∂μ/∂s = W g,   ∂μ/∂a = g' ∘ Wᵀs,   ∂²μ/∂s∂a = W diag g',   ∂²μ/∂a² = diag(g'' ∘ Wᵀs).
    """

    def __init__(self, noise: float | Tensor, link: PositiveLink | None):
        super().__init__(noise)
        if self.raw_noise.numel() != 1:
            raise ValueError(f"{type(self).__name__}: noise has shape {list(self.raw_noise.shape)} but y is one number, so noise is a scalar")
        self.link = Softplus() if link is None else link
        if not isinstance(self.link, PositiveLink):
            raise TypeError(f"{type(self).__name__}: link is {self.link!r} but should be a positive one such as Softplus() or Exp()")

    @abstractmethod
    def _shape(self) -> tuple[int, int]:
        """D and N."""

    @abstractmethod
    def _weights(self, f: Tensor) -> Tensor:
        """W [D N]."""

    def _outputs(self, f):
        D, N = self._shape()
        if f.shape[-1] != D + N:
            self._refuse_latents(f, f"{f.shape[-1]} latents", D + N, f"{D} carriers, then {N} modulators")
        return 1

    def latents_for(self, d):
        return sum(self._shape()) if d == 1 else None

    def _parts(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s [... D], a [... N] and W."""
        self._outputs(f)
        s, a = f.split(self._shape(), -1)
        return s, a, self._weights(f)

    def _mean(self, f):
        s, a, W = self._parts(f)
        return (s * (self.link(a) @ W.mT)).sum(-1, keepdim=True)

    def _pull(self, f, v):
        s, a, W = self._parts(f)
        return torch.cat([self.link(a) @ W.mT, self.link.slope(a) * (s @ W)], -1).unsqueeze(-1) * v

    def _bend(self, f, w):
        s, a, W = self._parts(f)
        cross = W * self.link.slope(a).unsqueeze(-2)
        corner = cross.new_zeros(*s.shape, s.shape[-1])
        own = torch.diag_embed(self.link.bend(a) * (s @ W))
        return torch.cat([torch.cat([corner, cross], -1), torch.cat([cross.mT, own], -1)], -2) * w.unsqueeze(-1)

    def predict(self, mean, cov):
        # Given the modulators the mean is linear in the carriers: y | a ~ N(bᵀE[s|a], bᵀCov[s|a] b + R), b = W g(a).
        self._outputs(mean)
        D, N = self._shape()
        order = [*range(D, D + N), *range(D)]                                     # modulators first, as `regress` has it
        A, rest = regress(cov[..., order, :][..., order], N)
        a, log_weights = self._nodes(mean, cov, D)
        s = mean[..., None, :D] + (a - mean[..., None, D:]) @ A.mT
        b = self.link(a) @ self._weights(mean).mT                                 # [... q D]
        noise = (b * (b @ rest)).sum(-1) + _like(self.noise, mean).reshape(())
        y = (s * b).sum(-1, keepdim=True)
        return mixture(MultivariateNormal(y, scale_tril=noise.sqrt()[..., None, None]), log_weights)

    def _nodes(self, mean: Tensor, cov: Tensor, D: int) -> tuple[Tensor, Tensor]:
        """Nodes [... q N] of the modulators; of a single one close enough for the noise."""
        m, C = mean[..., D:], cov[..., D:, D:]
        if m.shape[-1] > 1:
            return nodes_of(m, C)
        width = C[..., 0].clamp_min(0).sqrt()
        with torch.no_grad():
            s = mean[..., :D].abs() + 2 * cov.diagonal(dim1=-2, dim2=-1)[..., :D].clamp_min(0).sqrt()
            slope = torch.stack([self.link.slope(m + k * width) for k in (-3, 0, 3)]).amax(0)
            spread = width * slope * (s @ self._weights(mean)).abs() / _like(self.noise, mean).reshape(()).sqrt()
        nodes, log_weights = scalar_nodes(m, width, spread)                       # [q ... 1], [... 1 q]
        return nodes.movedim(0, -2), log_weights.squeeze(-2)


class AmplitudeDemodulation(_Demodulation):
    """y = Σ_i s_i g(a_i) + ε with ε ~ N(0, noise): a signal as carriers s under positive amplitudes g(a). One component is the product model.

    With b = g(a), r = y − Σ_i s_i b_i:   ∂ = (b, s ∘ g'(a)) r / noise,   Fisher = (b, s ∘ g')(b, s ∘ g')ᵀ / noise, of rank one.

    Args:
        components: D, carriers and as many modulators.
        noise: variance of ε (units of y²), learned.
        link: g; `Softplus()` unless given.
    Shapes: f [... 2D], first the carriers, then the modulators; y [... 1] (or [...]), NaN is missing.
    The predictive is a mixture of normals: modulators at nodes, carriers integrated exactly given these.

    >>> likelihood = AmplitudeDemodulation(components=1, noise=0.1)
    >>> likelihood.moments(torch.tensor([[2.0, 0.0]]))[0]  # 2 log 2
    tensor([[1.3863]])

    Source: Turner & Sahani (2011), "Demodulation as probabilistic inference"; Wilkinson et al. (2019), "End-to-end probabilistic inference for
    nonstationary audio analysis".
    """

    def __init__(self, components: int = 1, noise: float | Tensor = 1.0, link: PositiveLink | None = None):
        if components < 1:
            raise ValueError(f"AmplitudeDemodulation: components={components}; expected at least one")
        super().__init__(noise, link)
        self.components = int(components)

    def _shape(self):
        return self.components, self.components

    def _weights(self, f):
        return torch.eye(self.components, dtype=f.dtype, device=f.device)

    def arguments(self):
        return {"components": self.components, "noise": self.noise.detach(), "link": self.link}


class NonnegativeMatrixFactorisation(_Demodulation):
    """y = Σ_i s_i (W g(a))_i + ε with ε ~ N(0, noise): subbands s whose amplitudes share a few positive modulators g(a) through W > 0.

    With b = W g(a), r = y − sᵀb:   ∂ = (b, g'(a) ∘ Wᵀs) r / noise,   Fisher = (b, g' ∘ Wᵀs)(b, g' ∘ Wᵀs)ᵀ / noise, of rank one.

    Args:
        weights: W [D N], D subbands and N modulators, positive, learned (`likelihood.log_weights.requires_grad_(False)` keeps it).
        noise: variance of ε (units of y²), learned.
        link: g; `Softplus()` unless given.
    Shapes: f [... D + N], first the subbands, then the modulators; y [... 1] (or [...]), NaN is missing.
    The predictive is a mixture of normals: modulators at nodes, subbands integrated exactly given these.

    >>> likelihood = NonnegativeMatrixFactorisation([[1.0], [2.0]], noise=0.1)
    >>> likelihood.moments(torch.tensor([[1.0, 1.0, 0.0]]))[0]  # 3 log 2
    tensor([[2.0794]], grad_fn=<SumBackward1>)

    Source: Wilkinson, Andersen, Reiss, Stowell & Solin (2019), "End-to-end probabilistic inference for nonstationary audio analysis".
    """

    weights: Positive = Positive()
    log_weights: Tensor

    def __init__(self, weights: Tensor | list[list[float]], noise: float | Tensor = 1.0, link: PositiveLink | None = None):
        super().__init__(noise, link)
        self.weights = weights  # type: ignore[assignment]
        if self.log_weights.ndim != 2:
            raise ValueError(f"NonnegativeMatrixFactorisation: weights have shape {list(self.log_weights.shape)} but should be "
                             "[subbands, modulators]")

    def _shape(self):
        return self.log_weights.shape[0], self.log_weights.shape[1]

    def _weights(self, f):
        return _like(self.weights, f)

    def arguments(self):
        return {"weights": self.weights.detach(), "noise": self.noise.detach(), "link": self.link}
