"""Convex outer functions h of min_x (1/n) Σ_i h(c_i(x)): their values, proximal maps, and how their Moreau envelopes bend."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import jacrev, vmap


class Outer(ABC):
    """A convex function of the k components of one term. Your own needs a value and a proximal map; both act on all n terms at once.

    Written with torch operations that ``torch.func.vmap`` knows, :meth:`bend` comes by itself.

    Example:
        >>> class Hinge(Outer):  # h(z) = max(0, z) of a single component
        ...     def __call__(self, z):
        ...         return z.clamp(min=0)[:, 0]
        ...     def prox(self, z, step):
        ...         return torch.where(z > step, z - step, z.clamp(max=0))
        >>> z = torch.tensor([[3.0], [0.5], [-1.0]])
        >>> Hinge().prox(z, 1.0).flatten(), Hinge().envelope(z, 1.0)
        (tensor([ 2.,  0., -1.]), tensor([2.5000, 0.1250, 0.0000]))
    """

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """h(z_i) of every term: z [n k] → [n]. Autograd through it must give a subgradient."""

    @abstractmethod
    def prox(self, z: Tensor, step: float) -> Tensor:
        """argmin_v h(v) + ‖v − z_i‖²/(2 step) of every term [n k]."""

    def bend(self, z: Tensor, step: float) -> Tensor:
        """I − ∂prox(z_i), symmetric with eigenvalues in [0, 1]: the Hessian of the Moreau envelope times step [n k k]."""
        identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        return identity - vmap(jacrev(lambda one: self.prox(one[None], step)[0]))(z)

    def envelope(self, z: Tensor, step: float) -> Tensor:
        """The Moreau envelope min_v h(v) + ‖v − z_i‖²/(2 step) [n]: h with its kinks rounded off; its gradient is (z − prox(z))/step."""
        v = self.prox(z, step)
        return self(v) + (z - v).square().sum(-1) / (2 * step)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in sorted(vars(self).items()))
        return f"{type(self).__name__}({options})"


class L2Norm(Outer):
    """h(z) = ‖z‖₂, not squared: least distances, robust to outliers; |z| for a single component.

    Example:
        >>> L2Norm().prox(torch.tensor([[3.0, 4.0]]), 1.0)  # shrinks the length by one
        tensor([[2.4000, 3.2000]])
    """

    def __call__(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z, dim=-1)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z * (1 - step / _length(z)).clamp(min=0)

    def bend(self, z: Tensor, step: float) -> Tensor:
        return _bend_of_length(z, step, z.new_tensor(1.0), z.new_tensor(float(step)))


class Huber(Outer):
    """h(z) = ½‖z‖² within ‖z‖ ≤ delta and delta (‖z‖ − ½ delta) beyond: of the length of all k components together.

    Not a robust loss ρ of a squared residual as :func:`optim.least_squares` takes them, but a convex function with a proximal map.

    Args:
        delta: length at which the square turns into a cone.

    Example:
        >>> Huber(1.0)(torch.tensor([[0.5], [3.0]]))
        tensor([0.1250, 2.5000])
    """

    def __init__(self, delta: float = 1.0) -> None:
        if not delta > 0:
            raise ValueError(f"outer.Huber: delta={delta}; expected a positive length.")
        self.delta = float(delta)

    def __call__(self, z: Tensor) -> Tensor:
        square = z.square().sum(-1)
        return torch.where(square <= self.delta**2, 0.5 * square, self.delta * (_length(z)[:, 0] - 0.5 * self.delta))

    def prox(self, z: Tensor, step: float) -> Tensor:
        length = _length(z)
        return torch.where(length <= self.delta * (1 + step), z / (1 + step), z * (1 - step * self.delta / length))

    def bend(self, z: Tensor, step: float) -> Tensor:
        return _bend_of_length(z, self.delta * step, z.new_tensor(step / (1 + step)), z.new_tensor(self.delta * (1 + step)))


class L1Norm(Outer):
    """h(z) = Σ_j |z_j|.

    Example:
        >>> L1Norm().prox(torch.tensor([[3.0, -0.5]]), 1.0)
        tensor([[2., -0.]])
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().sum(-1)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z.sign() * (z.abs() - step).clamp(min=0)

    def bend(self, z: Tensor, step: float) -> Tensor:
        return torch.diag_embed((z.abs() <= step).to(z))


class Max(Outer):
    """h(z) = max_j z_j: minimax fits (with ±residuals as components of one term), and hinges of structured prediction.

    Its proximal map is z less step times the projection of z/step onto the probability simplex.

    Example:
        >>> Max().prox(torch.tensor([[3.0, 2.5, 0.0]]), 1.0)  # the highest are levelled, by one together
        tensor([[2.2500, 2.2500, 0.0000]])
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.amax(-1)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return torch.minimum(z, self._level(z, step))

    def bend(self, z: Tensor, step: float) -> Tensor:
        above = (z > self._level(z, step)).to(z)
        # ∂P = I_S − 1_S 1_Sᵀ/|S| over the components S above the water level
        return torch.diag_embed(above) - above[:, :, None] * above[:, None, :] / above.sum(-1)[:, None, None]

    def _level(self, z: Tensor, step: float) -> Tensor:
        """The level ℓ [n 1] with Σ_j (z_j − ℓ)₊ = step."""
        falling = z.sort(dim=-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        levels = (falling.cumsum(-1) - step) / count  # if the highest j were above it
        last = (falling > levels).sum(-1, keepdim=True).clamp(min=1) - 1
        return levels.gather(-1, last)


class HalfSquare(Outer):
    """h(z) = ½‖z‖²: with it the method is Levenberg-Marquardt with damping 1/γ on the mean loss.

    Example:
        >>> HalfSquare()(torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
    """

    def __call__(self, z: Tensor) -> Tensor:
        return 0.5 * z.square().sum(-1)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z / (1 + step)

    def bend(self, z: Tensor, step: float) -> Tensor:
        return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1) * (step / (1 + step))


def _length(z: Tensor) -> Tensor:
    """‖z_i‖ [n 1], with the smallest positive number for zero, so that one may divide by it."""
    return torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)


def _bend_of_length(z: Tensor, shrink: float, inside: Tensor, radius: Tensor) -> Tensor:
    """I − ∂prox where prox is z · (1 − shrink/‖z‖) beyond ``radius``, and inside · I within it."""
    k = z.shape[-1]
    identity = torch.eye(k, dtype=z.dtype, device=z.device)
    length = _length(z)
    direction = z / length
    outside = (shrink / length)[..., None] * (identity - direction[:, :, None] * direction[:, None, :])
    return torch.where((length <= radius)[..., None], inside * identity, outside)
