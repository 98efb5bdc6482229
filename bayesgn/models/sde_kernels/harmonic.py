"""Periodic functions: sums of oscillations with random amplitudes, which no noise disturbs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bayesgn.models.sde_kernels.space import StateSpace, identity


class Harmonics(StateSpace):
    """Σ_j a_j² cos(2π f_j τ): two states an oscillation that turn at its frequency, P = I, H made of the amplitudes.

    Args:
        amplitudes [J]: a_j, the root of an oscillation's variance.
        frequencies [J]: f_j in cycles per unit of time.
        constant: the root of the variance of a constant, one state more; none unless given.

    Source: Solin and Särkkä (2014), "Explicit link between periodic covariance functions and state space models".
    """

    def __init__(self, amplitudes: Tensor, frequencies: Tensor, constant: Tensor | None = None) -> None:
        self.frequencies = frequencies
        H = torch.stack([amplitudes, torch.zeros_like(amplitudes)], -1).reshape(-1)
        self.still = 0 if constant is None else 1
        super().__init__(H if constant is None else torch.cat([constant.reshape(1), H]))

    def transition(self, dt):
        cycles = dt.unsqueeze(-1) * self.frequencies
        angle = 2 * math.pi * (cycles - cycles.detach().round())  # whole turns do not cost digits
        cos, sin = angle.cos(), angle.sin()
        one, zero = torch.ones_like(dt).unsqueeze(-1)[:, : self.still], torch.zeros_like(dt).unsqueeze(-1)[:, : self.still]
        diagonal = torch.cat([one, cos.repeat_interleave(2, -1)], -1)
        above = torch.cat([zero, torch.stack([sin, torch.zeros_like(sin)], -1).flatten(-2)], -1)[:, :-1]
        return torch.diag_embed(diagonal) + torch.diag_embed(above, 1) - torch.diag_embed(above, -1)

    def covariance(self, t):
        return identity(self.d, t)

    def noise(self, t, dt):
        return torch.zeros_like(identity(self.d, dt))


class Cosine(Harmonics):
    """cos(2π f τ), one oscillation.

    Args:
        frequency: a positive scalar, in cycles per unit of time.
    """

    def __init__(self, frequency: Tensor) -> None:
        frequency = frequency.reshape(1)
        super().__init__(torch.ones_like(frequency), frequency)


class Periodic(Harmonics):
    """exp(−2 sin²(π τ / period) / ℓ) by its Fourier series: 2 J + 1 states for J harmonics.

    With 2 sin²(φ/2) = 1 − cos φ and modified Bessel functions I_j the variances of the harmonics are

        a_0² = e^{−1/ℓ} I_0(1/ℓ),   a_j² = 2 e^{−1/ℓ} I_j(1/ℓ),   Σ_j a_j² = 1

    and leaving out those beyond J changes no value of the kernel by more than Σ_{j>J} a_j² ≤ tol.

    Args:
        lengthscale: ℓ, with gpytorch's meaning (it is not squared; Mackay's and Solin's ℓ² is this one); no unit.
        period: in the unit of the times.
        tol: J is the smallest for which the kernel is that close. J grows as √(1/ℓ) for small ℓ.

    Example:
        >>> from bayesgn.models.sde_kernels import Periodic
        >>> process = Periodic(torch.tensor(1.0), torch.tensor(24.0), tol=1e-6)
        >>> process.d
        15

    Source: Solin and Särkkä (2014), "Explicit link between periodic covariance functions and state space models".
    """

    def __init__(self, lengthscale: Tensor, period: Tensor, tol: float = 1e-6) -> None:
        if not 0 < tol < 1:
            raise ValueError(f"Periodic: tol={tol}; expected a number in (0, 1), the largest error of the kernel.")
        x = 1 / lengthscale.reshape(())
        I = _scaled_bessel(float(x.detach()))
        slope = 0.5 * (np.concatenate([I[1:2], I[:-1]]) + np.concatenate([I[1:], [0.0]])) - I  # of e^{−x} I_j: I_j' = (I_{j−1} + I_{j+1}) / 2
        twice = np.where(np.arange(len(I)) == 0, 1.0, 2.0)
        beyond = np.cumsum((twice * I)[::-1])[::-1][1:]  # Σ_{j > J} a_j² for J = 0, 1, …
        J = max(1, int(np.argmax(beyond <= tol)))
        value, slope = (torch.as_tensor((twice * a)[: J + 1]).to(x) for a in (I, slope))
        a2 = value + slope * (x - x.detach())
        a = a2.sqrt()
        super().__init__(a[1:], torch.arange(1, J + 1, dtype=x.dtype, device=x.device) / period.reshape(()), a[0])


def _scaled_bessel(x: float) -> np.ndarray:
    """e^{−x} I_j(x) for j = 0, 1, … until they vanish, by ratios I_j / I_{j−1} = x / (2j + x I_{j+1} / I_j) from the far end (Miller)."""
    end = 40 + int(10 * math.sqrt(x))
    ratios, r = np.zeros(end + 1), 0.0
    for j in range(end, 0, -1):
        r = x / (2 * j + x * r)
        ratios[j] = r
    ratios[0] = 1.0
    I = np.cumprod(ratios)
    return I / (I[0] + 2 * I[1:].sum())
