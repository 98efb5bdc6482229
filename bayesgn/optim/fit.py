"""What a least-squares fit answers: parameters, their uncertainty, and how it ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import FunctionLinearization, linearize
from bayesgn.optim.robust import RobustLoss, Squared

LARGEST_COVARIANCE = 5000  # parameters; 200 MB in float64
ROWS_SHOWN = 20


class Attempt(NamedTuple):
    """One run from one start with one choice of damping and scaling: its final cost, and how it ended."""

    cost: float
    iterations: int
    success: bool
    message: str


class Spread(NamedTuple):
    """J's singular value decomposition with columns of unit size: what the data determine, and what not."""

    V: Tensor  # [p k] columns of directions that are determined, in the parameters' units
    singular: Tensor  # [k]
    lost: Tensor  # [p l] directions that are not determined, in the parameters' units, largest entry 1
    doubtful: Tensor  # [p] parameters that take part in these


@dataclass(repr=False)
class Fit:
    """The answer of :func:`least_squares`.

    Attributes:
        x: the parameters, as x0 was given.
        cost: ½ Σ C² ρ((r/C)²) there.
        residual: r [m].
        gradient: of the cost [p].
        iterations: linearizations (steps taken); evaluations: of the residuals alone.
        success: whether it converged; message: how it ended.
        active: −1, 0, 1 for parameters at the lower bound, free, at the upper bound [p].
        rank: directions of the parameters that the residuals determine, parameters at a bound left out.
        noise: variance of the residuals: given, or estimated as 2 cost / (m − rank); NaN where there are too few residuals.
        attempts: of :class:`Restarts`, this one included.
        linearization: of the residuals at x, for products with J.
    """

    x: Any
    cost: float
    residual: Tensor
    gradient: Tensor
    iterations: int
    evaluations: int
    success: bool
    message: str
    active: Tensor
    linearization: FunctionLinearization
    rank: int
    loss: RobustLoss = field(default_factory=Squared)
    given_noise: float | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def vector(self) -> Tensor:
        """x as one vector θ [p]."""
        return self.linearization.θ

    @property
    def names(self) -> list[str]:
        """What each entry of θ is called."""
        tree = self.linearization.function.tree
        return [tree.name(j) for j in range(tree.numel)]

    @property
    def noise(self) -> float:
        """Variance of the residuals."""
        if self.given_noise is not None:
            return self.given_noise
        degrees = len(self.residual) - self.rank
        return 2 * self.cost / degrees if degrees > 0 else float("nan")

    @cached_property
    def jacobian(self) -> Tensor:
        """J [m p] at x, worked out when first asked for."""
        return self.linearization.dense()

    @cached_property
    def _spread(self) -> Spread:
        p = len(self.vector)
        if p > LARGEST_COVARIANCE:
            raise ValueError(
                f"the covariance of {p} parameters is a matrix of {p * p * 8 / 1e9:.1f} GB, and is made for {LARGEST_COVARIANCE} at most; "
                "work with fit.linearization.matvec and .rmatvec, or fit the few parameters of interest."
            )
        J = self.jacobian
        if self.given_noise is not None:
            J = self.loss.bend(self.residual).curvature.sqrt()[:, None] * J
        free = self.active == 0
        J = J[:, free]
        size = J.norm(dim=0)
        size = torch.where(size > 0, size, 1.0)
        _, S, Vh = torch.linalg.svd(torch.linalg.qr(J / size)[1], full_matrices=True)
        rank = int((S > max(J.shape) * torch.finfo(J.dtype).eps * S.max()).sum()) if len(S) else 0
        spread = torch.zeros(p, Vh.shape[0], dtype=J.dtype, device=J.device)
        spread[free] = Vh.mT / size[:, None]
        lost = spread[:, rank:]
        doubtful = torch.zeros(p, dtype=torch.bool, device=J.device)
        doubtful[free] = (Vh[rank:].abs() > 1e-6).any(0)
        return Spread(spread[:, :rank], S[:rank], lost / lost.abs().amax(0, keepdim=True), doubtful)

    @property
    def covariance(self) -> Tensor:
        """Covariance [p p] of the parameters, in the order of ``names``.

            Σ = κ (JᵀJ)⁻¹,   κ = noise for squares

        For a robust loss with slope ψ and no noise given, κ = K² [Σ ψ²/(m − p)] / [mean ψ']² with K = 1 + p/m · var(ψ')/(mean ψ')²: right for
        errors of any symmetric law. With noise given, Σ = noise · (JᵀWJ)⁻¹, Laplace's approximation of the density exp(−cost/noise).

        Where the residuals do not determine some directions, a warning names them, this is a pseudo-inverse (right for whatever the
        residuals do determine), and ``standard_errors`` are infinite for the parameters concerned. A parameter at a bound is held there: 0.

        Source: Huber (1981), Robust Statistics, sec. 7.6, eq. 6.5.
        """
        if self._spread.lost.shape[1]:
            warnings.warn(f"the covariance is a pseudo-inverse: {self._undetermined()}.", RuntimeWarning, stacklevel=2)
        return self._covariance

    @cached_property
    def _covariance(self) -> Tensor:
        root = self._spread.V / self._spread.singular
        return self._factor() * (root @ root.mT)

    def _factor(self) -> float:
        if self.given_noise is not None or isinstance(self.loss, Squared):
            return self.noise
        m, p = len(self.residual), self.rank
        if m <= p:
            return float("nan")
        bend, second = self.loss.bend(self.residual), self.loss.second(self.residual)
        mean = float(second.mean())
        if mean <= 0:
            return float("nan")  # most residuals are outliers: there is no such estimate
        K = 1 + p / m * float(second.var(correction=0)) / mean**2
        return K**2 * float(bend.slope.square().sum()) / (m - p) / mean**2

    def _undetermined(self) -> str:
        lost, names = self._spread.lost, self.names
        m, p = len(self.residual), len(self.vector)
        if m < p - 3:
            return f"{m} residuals cannot determine {p} parameters"
        said = []
        for direction in lost.unbind(1)[:3]:
            terms = sorted(((abs(v), v, n) for v, n in zip(direction.tolist(), names) if abs(v) > 1e-3), reverse=True)[:4]
            said.append(" ".join(f"{v:+.3g} {n}" for _, v, n in terms))
        return f"the residuals do not determine {lost.shape[1]} of {p} directions: {'; '.join(said)}{' …' if lost.shape[1] > 3 else ''}"

    @property
    def standard_errors(self) -> Any:
        """√diag(covariance), as x0 was given; infinite for parameters that the residuals do not determine, 0 at a bound."""
        if self._spread.lost.shape[1]:
            warnings.warn(f"some standard errors are infinite: {self._undetermined()}.", RuntimeWarning, stacklevel=2)
        return self.linearization.function.tree.unflatten(self._errors)

    @cached_property
    def _errors(self) -> Tensor:
        return torch.where(self._spread.doubtful, torch.inf, self._covariance.diagonal().clamp_min(0).sqrt())

    def propagate(self, function: Callable[..., Any], *batch: Any) -> tuple[Tensor, Tensor]:
        """Value and standard error [k] of any torch function of the parameters, to first order: a band around a fitted curve, a derived quantity.

            Var f(x) ≈ J_f Σ J_fᵀ

        Args:
            function: answers a tensor, for (x, *batch).

        Example:
            >>> from bayesgn.optim import least_squares
            >>> t, y = torch.linspace(0, 1, 5, dtype=torch.float64), torch.tensor([1.0, 1.4, 2.1, 2.6, 2.9], dtype=torch.float64)
            >>> fit = least_squares(lambda b: b[0] + b[1] * t - y, torch.zeros(2, dtype=torch.float64))
            >>> mean, error = fit.propagate(lambda b: b[0] + b[1] * 2)  # at t = 2, beyond the data
            >>> print(f"{mean.item():.2f} ± {error.item():.2f}")
            5.00 ± 0.23
        """
        lin = linearize(function, self.x, *batch)
        J = lin.dense()
        return lin.value, ((J @ self._covariance) * J).sum(1).clamp_min(0).sqrt()

    def __repr__(self) -> str:
        m, p = len(self.residual), len(self.vector)
        how = "converged" if self.success else "NOT converged"
        lines = [
            f"Fit: {how} ({self.message}) after {self.iterations} iterations, {self.evaluations} evaluations",
            f"cost {self.cost:.10g}, {m} residuals, {p} parameters, residual standard deviation {self.noise**0.5:.6g}",
        ]
        tree, values = self.linearization.function.tree, self.vector
        names = [tree.name(j) for j in range(min(p, ROWS_SHOWN))]
        width = max(9, *(len(n) for n in names))
        errors = self._errors if p <= ROWS_SHOWN else None
        lines.append(f"{'parameter':>{width}} {'value':>16}" + (f" {'standard error':>16}" if errors is not None else ""))
        for j, name in enumerate(names):
            line = f"{name:>{width}} {float(values[j]):16.9g}" + (f" {float(errors[j]):16.4g}" if errors is not None else "")
            lines.append(line + ("  at its bound" if int(self.active[j]) else ""))
        if p > ROWS_SHOWN:
            lines.append(f"{'…':>{width}} ({p - ROWS_SHOWN} more)")
        if errors is not None and self._spread.lost.shape[1]:
            lines.append(self._undetermined())
        return "\n".join(lines)
