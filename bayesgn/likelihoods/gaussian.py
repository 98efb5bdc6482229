"""Gaussian noise around the latents themselves: one variance, one for each output, or a full covariance."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import MultivariateNormal

from .._psd import safe_cholesky
from .gaussian_noise import GaussianNoise

__all__ = ["Gaussian"]


class Gaussian(GaussianNoise):
    """y = f + ε with ε ~ N(0, R), R = noise.

    log p(y | f) = −½ (y − f)ᵀ R⁻¹ (y − f) − ½ log |2π R|,   Λ = R⁻¹ for the Hessian and the GGN alike.

    Args:
        noise: a variance (units of y²): a scalar, [c] for one each output, or [c c] for a full covariance. It is learned; read and set
            it as `likelihood.noise`. Inside it is a logarithm, or the Cholesky factor with logarithms on its diagonal.
    Shapes: f [... c], y [... c] (or [...] for c = 1). NaN in y drops that output; under a full covariance it is integrated out.
    Sufficient statistics: the count and the scatter of the residuals, so that noise can be tuned without the data.
    Raises ValueError for a noise that is not positive (definite).

    >>> import torch
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
        super().__init__(noise)

    def _outputs(self, f):
        return f.shape[-1]

    def latents_for(self, d):
        return d

    def _mean(self, f):
        return f

    def _pull(self, f, v):
        return v

    def _bend(self, f, w):
        return None

    def expected(self, mean, cov, y):
        return self._expected_linear(mean, cov, y)

    def tilted(self, mean, cov, y, power):
        return self._tilted_linear(mean, cov, y, power)

    def predict(self, mean, cov):
        return MultivariateNormal(mean, scale_tril=safe_cholesky(cov + self._noise_matrix(mean)))

    def arguments(self):
        return {"noise": self.noise.detach()}
