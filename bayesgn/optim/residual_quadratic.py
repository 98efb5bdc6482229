"""The quadratic of a least-squares problem: ½ ‖r̃ + J̃δ‖², with J̃ dense, sparse or by products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import FunctionLinearization
from bayesgn.optim.box import Box, boxed
from bayesgn.optim.quadratic import Quadratic
from bayesgn.optim.robust import RobustLoss, Squared
from bayesgn.optim.scaling import Scaling


class ResidualQuadratic(Quadratic):
    """½ ‖r̃ + J̃δ‖² around θ, for costs divided by twice the first one, so that a λ or a radius means the same for data in any unit.

        J̃ = W^½ J / √(2 cost₀),   r̃ = W^−½ ψ(r) / √(2 cost₀),   W = curvature of the loss

    Attributes:
        gradient: of entries that may move; 0 where one is pushed against its bound.
        slope: J̃ᵀr̃, of all entries.
        weight: W^½ / √(2 cost₀) [m].
    """

    gradient: Tensor
    scaling: Tensor

    def __init__(self, lin: FunctionLinearization, loss: RobustLoss, unit: float, box: Box | None) -> None:
        self.lin, self.loss, self.unit, self.box = lin, loss, unit, box
        if isinstance(loss, Squared):
            self.weight: Tensor | float = 1 / unit
            self.residual = lin.value / unit
        else:
            bend = loss.bend(lin.value)
            root = bend.curvature.sqrt()
            self.weight = root / unit
            self.residual = torch.where(root > 0, bend.slope / torch.where(root > 0, root, 1.0), 0.0) / unit

    def finish(self, scaling: Scaling) -> None:
        """Work out gradient and scaling, once J̃ is there."""
        self.slope = self.rmatvec(self.residual)
        self.held = torch.zeros_like(self.slope, dtype=torch.bool) if self.box is None else self.box.held(self.lin.θ, self.slope)
        self.gradient = torch.where(self.held, 0.0, self.slope)
        self.diagonal = self.column_squares()
        self.scaling = scaling(self.diagonal)
        self.free, self.damping = ~self.held, 0.0  # of the last solve

    # -- what a storage of J̃ answers -------------------------------------------------------------------------------

    @abstractmethod
    def matvec(self, δ: Tensor) -> Tensor:
        """J̃ δ [m]."""

    @abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """J̃ᵀ u [p]."""

    @abstractmethod
    def column_squares(self) -> Tensor:
        """diag(J̃ᵀJ̃) [p], or an estimate of it."""

    @abstractmethod
    def least_squares(self, rhs: Tensor, damping: float, free: Tensor) -> Tensor:
        """argmin ½ ‖rhs + J̃δ‖² + damping/2 ‖δ‖_D² over the free entries, 0 for the others."""

    def offset(self) -> float:
        """How far from the optimum, as the cosine of the residuals with what J can reach: 0 there, 1 at most.

            max_j |J̃_jᵀ r̃| / (‖J̃_j‖ ‖r̃‖)
        """
        size = self.diagonal.sqrt() * self.residual.norm()
        cosine = torch.where(size > 0, self.gradient.abs() / torch.where(size > 0, size, 1.0), 0.0)
        return float(cosine.max())

    def rank(self) -> int:
        """Of J̃ among the columns that may move; taken for full where that is not worked out."""
        return min(len(self.residual), int((~self.held).sum()))

    # -- what a damping asks ---------------------------------------------------------------------------------------

    def solve(self, damping: float) -> Tensor:
        self.damping = damping
        if self.box is None:
            return self.least_squares(self.residual, damping, self.free)
        low, high = self.box.lower - self.lin.θ, self.box.upper - self.lin.θ

        def solve(free: Tensor, fixed: Tensor) -> Tensor:
            rhs = self.residual + self.matvec(fixed) if bool(fixed.any()) else self.residual
            return self.least_squares(rhs, damping, free)

        def slope(δ: Tensor) -> Tensor:
            return self.rmatvec(self.residual + self.matvec(δ)) + damping * self.scaling * δ

        δ, self.free = boxed(solve, slope, low, high, self.held)
        return torch.minimum(torch.maximum(δ, low), high)

    def correction(self, rhs: Tensor) -> Tensor:
        """argmin ½ ‖rhs + J̃δ‖² + λ/2 ‖δ‖_D² for the λ and the free entries of the last solve; rhs [m] in the residuals' unit."""
        return self.least_squares(self.weight * rhs, self.damping, self.free)

    def unweighted(self, Jδ: Tensor) -> Tensor:
        """J δ in the residuals' unit, for J̃ δ; 0 for residuals without weight."""
        if not isinstance(self.weight, Tensor):
            return Jδ / self.weight
        return torch.where(self.weight > 0, Jδ / torch.where(self.weight > 0, self.weight, 1.0), 0.0)

    def curvature(self, δ: Tensor) -> float:
        return float(self.matvec(δ).square().sum())

    def smallest_eigenvalue(self) -> float:
        raise NotImplementedError(
            f"{type(self).__name__} has no smallest eigenvalue; choose optim.LevenbergMarquardt, TrustRegion, Dogleg or Constant as damping, "
            "or solver=optim.DenseQR()."
        )


class DenseQuadratic(ResidualQuadratic):
    """J̃ as a matrix, by QR: JᵀJ, whose condition number is the square of J's, is never formed.

        J̃ = Q R;   δ = −argmin ‖ [R; √λ D^½] δ + [Qᵀr̃; 0] ‖ by a second, small QR for each λ

    Source: Moré (1978), sec. 3.
    """

    def __init__(self, lin: FunctionLinearization, loss: RobustLoss, unit: float, box: Box | None, J: Tensor) -> None:
        super().__init__(lin, loss, unit, box)
        self.J = self.weight[:, None] * J if isinstance(self.weight, Tensor) else J * self.weight
        self.Q, self.R = torch.linalg.qr(self.J)
        self._factor: tuple[float, Tensor, Tensor, Tensor, Tensor] | None = None

    def matvec(self, δ: Tensor) -> Tensor:
        return self.J @ δ

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.J.mT @ u

    def column_squares(self) -> Tensor:
        return self.J.square().sum(0)

    def offset(self) -> float:
        """‖Qᵀr̃‖ / ‖r̃‖ with Q the span of the columns that may move: the relative offset of Bates and Watts up to degrees of freedom."""
        if bool(self.held.all()):
            return 0.0
        Q = torch.linalg.qr(self.J[:, ~self.held])[0] if bool(self.held.any()) else self.Q
        size = float(self.residual.norm())
        return float((Q.mT @ self.residual).norm()) / size if size > 0 else 0.0

    def least_squares(self, rhs: Tensor, damping: float, free: Tensor) -> Tensor:
        δ = torch.zeros_like(self.slope)
        if not bool(free.any()):
            return δ
        c = self.Q.mT @ rhs
        q, R, size = self._triangular(damping, free)
        b = q[: len(c)].mT @ c
        pivots = R.diagonal().abs()
        if len(R) == R.shape[1] and bool((pivots > len(R) * torch.finfo(R.dtype).eps * pivots.max()).all()):
            step = torch.linalg.solve_triangular(R, b[:, None], upper=True)[:, 0]
        else:  # singular and not damped: the shortest of all minimisers
            step = torch.linalg.pinv(R, rtol=len(R) * torch.finfo(R.dtype).eps) @ b if bool(R.isfinite().all()) else torch.nan * b
        δ[free] = -step / size
        return δ

    def _triangular(self, damping: float, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, R and column sizes of [R; √λ D^½] with columns of unit size; that of the last λ is kept."""
        if self._factor is not None and self._factor[0] == damping and bool((self._factor[1] == free).all()):
            return self._factor[2:]
        R = self.R[:, free]
        if damping > 0:
            R = torch.cat([R, (damping * self.scaling[free]).sqrt().diag()])
        size = R.norm(dim=0)
        size = torch.where(size > 0, size, 1.0)
        self._factor = damping, free, *torch.linalg.qr(R / size), size
        return self._factor[2:]

    def rank(self) -> int:
        R = self.R[:, ~self.held]
        size = R.norm(dim=0)
        values = torch.linalg.svdvals(R / torch.where(size > 0, size, 1.0))
        return int((values > max(self.J.shape) * torch.finfo(R.dtype).eps * values.amax()).sum()) if values.numel() else 0

    def smallest_eigenvalue(self) -> float:
        m, p = self.J.shape
        return float(torch.linalg.svdvals(self.R)[min(m, p) - 1].square())


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], rmatvec: Callable[[Tensor], Tensor], b: Tensor, damping: float, tol: float, iterations: int
) -> Tensor:
    """argmin ‖A z − b‖² + damping ‖z‖² by conjugate gradients on the normal equations, which forms no AᵀA (CGLS).

    Args:
        matvec, rmatvec: products with A and Aᵀ; columns of A are about of unit size.
        tol: of the normal equations' residual, relative to where it began.
        iterations: at most this many products with A and Aᵀ.

    Source: Björck (1996), Numerical Methods for Least Squares Problems, alg. 7.4.1.
    """
    r, s = b, rmatvec(b)
    z = torch.zeros_like(s)
    direction, γ = s, float(s @ s)
    # Columns of A are of unit size, so that entries of Aᵀb are known to eps ‖b‖: below, a relative tolerance asks for rounding.
    enough = max(tol**2 * γ, torch.finfo(b.dtype).eps ** 2 * len(s) * float(b @ b))
    for _ in range(iterations):
        if γ <= enough:
            break
        q = matvec(direction)
        bend = float(q @ q) + damping * float(direction @ direction)
        if not bend > 0:
            break
        α = γ / bend
        z, r = z + α * direction, r - α * q
        s = rmatvec(r) - damping * z
        γ, old = float(s @ s), γ
        direction = s + γ / old * direction
    return z


class ResidualSolver(ABC):
    """How J of residuals is kept and steps are solved for: an argument of ``optim.least_squares``."""

    def check(self, lin: FunctionLinearization, generator: torch.Generator | None) -> None:  # noqa: B027 (most have nothing to check)
        """Raise where this storage cannot hold the J of this problem."""

    @abstractmethod
    def quadratic(
        self, lin: FunctionLinearization, loss: RobustLoss, unit: float, box: Box | None, scaling: Scaling, generator: torch.Generator | None
    ) -> ResidualQuadratic:
        """The quadratic at a linearization."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, (int, float)))
        return f"{type(self).__name__}({options})"


class DenseQR(ResidualSolver):
    """J [m p] as a matrix, solved by QR: exact also where J is close to singular. For up to a few thousand parameters.

    Example:
        >>> DenseQR()
        DenseQR()
    """

    def quadratic(self, lin, loss, unit, box, scaling, generator) -> DenseQuadratic:
        J = lin.dense()
        if not bool(J.isfinite().all()):
            i, j = (int(k) for k in (~J.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the derivative of residual {i} with respect to {lin.function.tree.name(j)} is {float(J[i, j])}")
        q = DenseQuadratic(lin, loss, unit, box, J)
        q.finish(scaling)
        return q
