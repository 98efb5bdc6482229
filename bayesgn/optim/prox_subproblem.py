"""The convex subproblem of a prox-linear step, its dual, and the two ways to hold its Jacobian."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesgn.ggn.jacobian import FunctionLinearization, linearize
from bayesgn.ggn.structure import accumulator
from bayesgn.optim.outer import Outer

Inner = Callable[..., Tensor]  # (flat x [p], *batch) → c [n k]


class TermsJacobian(ABC):
    """J = ∂c/∂x of n terms of k components at one point, as a linear map of steps.

    Attributes:
        value: c [n k] at that point.
        p: number of unknowns.
        visits: data times derivative products so far: a product Jδ or Jᵀu over all n counts n, a row of J itself counts one for its datum.
    """

    value: Tensor
    p: int
    visits: int

    @abstractmethod
    def forward(self, step: Tensor, rows: Tensor | None = None) -> Tensor:
        """J_i δ of all terms, or of the given ones [m k]."""

    @abstractmethod
    def adjoint(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        """Σ_i J_iᵀ u_i over all terms, or over the given ones [p]."""

    @abstractmethod
    def square_norm(self) -> float:
        """An upper bound, or a close estimate from above, of ‖J‖₂²."""

    @abstractmethod
    def row_square_norm(self) -> float:
        """The same of max_i ‖J_i‖₂²."""

    @property
    def n(self) -> int:
        """Number of terms."""
        return self.value.shape[0]


class DenseJacobian(TermsJacobian):
    """J [n k p] in memory: products are then free of autograd, and exact inner solvers possible."""

    def __init__(self, c: Inner, x: Tensor, batch: tuple[Tensor, ...] = (), value: Tensor | None = None) -> None:
        self.value = (c(x, *batch) if value is None else value).detach()
        n, k = self.value.shape
        self.p = x.numel()
        self.J = linearize(c, x, *batch).dense().detach().reshape(n, k, self.p)
        self.visits = n * min(k, self.p)
        self._compact: tuple[Tensor, Tensor | None] | None = None
        self._square: float | None = None
        self._wide: DenseJacobian | None = None

    def widened(self) -> DenseJacobian:
        """The same in float64 where the device has it: what is factorised wants its digits."""
        wide = accumulator(self.value)
        if self.value.dtype == wide:
            return self
        if self._wide is None:
            self._wide = copy.copy(self)
            self._wide.value, self._wide.J = self.value.to(wide), self.J.to(wide)
            self._wide._compact = self._wide._square = None
        return self._wide

    def compact(self) -> tuple[Tensor, Tensor | None]:
        """A [nk r] and Q [p r] with orthonormal columns, J = A Qᵀ and r = min(p, nk); Q is None where r = p. A minimiser is δ = Q y."""
        if self._compact is None:
            J = self.J.reshape(-1, self.p)
            if len(J) < self.p:
                Q, R = torch.linalg.qr(J.mT)
                self._compact = R.mT.contiguous(), Q
            else:
                self._compact = J, None
        return self._compact

    def forward(self, step: Tensor, rows: Tensor | None = None) -> Tensor:
        return (self.J if rows is None else self.J[rows]) @ step

    def adjoint(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        J = self.J if rows is None else self.J[rows]
        return J.reshape(-1, self.p).mT @ u.reshape(-1)

    def square_norm(self) -> float:
        if self._square is None:
            A = self.compact()[0]
            gram = A @ A.mT if len(A) < A.shape[1] else A.mT @ A
            self._square = max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0) * (1 + 1e-6)
        return self._square

    def row_square_norm(self) -> float:
        return float(torch.linalg.matrix_norm(self.J, ord=2).amax() ** 2)


class JacobianProducts(TermsJacobian):
    """J by products only (forward and reverse mode), a few data at a time: for networks, whose J is too large to hold.

    Terms must not mix data: c(x, *rows of the batch) are the rows of c(x, *batch). So a normalisation over the batch has no place here.
    """

    def __init__(self, c: Inner, x: Tensor, batch: tuple[Tensor, ...] = (), value: Tensor | None = None) -> None:
        self.c, self.x, self.batch = c, x.detach(), batch
        self.value = (c(x, *batch) if value is None else value).detach()
        self.p, self.visits = x.numel(), 0
        self._square: float | None = None
        self._row_square: float | None = None
        self._all: FunctionLinearization | None = None
        self._some: tuple[Tensor, FunctionLinearization] | None = None
        n = self.value.shape[0]
        if not batch or any(b.shape[0] != n for b in batch):
            raise ValueError(
                f"JacobianProducts: batch holds tensors of {[tuple(b.shape) for b in batch]} for {n} terms; expected at least one tensor and n rows "
                "in each, so that some data can be taken alone. Give the data as batch=(...), or keep jacobian=optim.DenseJacobian."
            )

    def _at(self, rows: Tensor | None) -> FunctionLinearization:
        """The linearisation of all terms, kept, or of the given ones, kept until others are asked for."""
        self.visits += self.n if rows is None else len(rows)
        if rows is None:
            if self._all is None:
                self._all = linearize(self.c, self.x, *self.batch)
            return self._all
        if self._some is None or self._some[0] is not rows:
            self._some = rows, linearize(self.c, self.x, *(b[rows] for b in self.batch))
        return self._some[1]

    def forward(self, step: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._at(rows).matvec(step).detach().reshape(-1, self.value.shape[1])

    def adjoint(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._at(rows).rmatvec(u.reshape(-1)).detach()

    def square_norm(self) -> float:
        if self._square is not None:
            return self._square
        # Power iteration from a start that does not depend on chance; it comes from below, so the estimate is widened.
        v = self.adjoint(torch.ones_like(self.value)) + torch.linspace(1, 2, self.p, dtype=self.x.dtype, device=self.x.device)
        largest = 0.0
        for _ in range(8):
            v = self.adjoint(self.forward(v / torch.linalg.vector_norm(v)))
            previous, largest = largest, float(torch.linalg.vector_norm(v))
            if largest == 0 or abs(largest - previous) < 0.05 * largest:
                break
        self._square = 1.3 * largest
        return self._square

    def row_square_norm(self) -> float:
        if self._row_square is not None:
            return self._row_square
        # Of a few data spread over all, by the k columns of each J_iᵀ; widened, since the largest may not be among them.
        rows = torch.linspace(0, self.n - 1, min(self.n, 16), device=self.x.device).long().unique()
        largest = 0.0
        for row in rows:
            columns = [self.adjoint(e[None], row[None]) for e in torch.eye(self.value.shape[1], dtype=self.x.dtype, device=self.x.device)]
            largest = max(largest, float(torch.linalg.matrix_norm(torch.stack(columns), ord=2) ** 2))
        self._row_square = 2 * largest
        return self._row_square


@dataclass
class Solution:
    """What an inner solver found.

    Attributes:
        step: δ [p].
        value: P(δ), of the model with its proximal term.
        bound: D(u) ≤ min P, by a dual point.
        multipliers: that dual point u [n k], from which the next subproblem starts.
        iterations: of the inner solver, in its own unit.
    """

    step: Tensor
    value: float
    bound: float
    multipliers: Tensor
    iterations: int = 0

    @property
    def gap(self) -> float:
        """P(δ) − D(u) ≥ P(δ) − min P."""
        return max(self.value - self.bound, 0.0)


class Subproblem:
    """The model of the loss around a point, and its dual.

        P(δ) = (1/n) Σ_i h(c_i + J_i δ) + ‖δ‖²/(2γ)
        D(u) = (1/n) Σ_i [u_iᵀ c_i − h*(u_i)] − (γ/2) ‖(1/n) Σ_i J_iᵀ u_i‖²,      δ(u) = −(γ/n) Σ_i J_iᵀ u_i

    No conjugate h* is asked for: dual points here are u = (z − v)/ν with v = prox_νh(z), thus subgradients of h at v, where h*(u) = uᵀv − h(v)
    (Fenchel and Young).

    Args:
        outer: h.
        jacobian: c and J.
        gamma: γ, the proximal step.
    """

    def __init__(self, outer: Outer, jacobian: TermsJacobian, gamma: float) -> None:
        self.outer, self.J, self.gamma = outer, jacobian, gamma
        self.c = jacobian.value
        self.start = float(outer(self.c).mean())  # P(0), the loss where we stand

    def primal(self, step: Tensor, moved: Tensor | None = None) -> float:
        """P(δ); ``moved`` is Jδ where it is known."""
        moved = self.J.forward(step) if moved is None else moved
        return float(self.outer(self.c + moved).mean() + step.square().sum() / (2 * self.gamma))

    def envelope(self, step: Tensor, z: Tensor, v: Tensor, smoothing: float) -> float:
        """P with h replaced by its Moreau envelope at z, given v = prox(z)."""
        smooth = self.outer(v) + (z - v).square().sum(-1) / (2 * smoothing)
        return float(smooth.mean() + step.square().sum() / (2 * self.gamma))

    def slope(self, u: Tensor) -> Tensor:
        """(1/n) Σ_i J_iᵀ u_i."""
        return self.J.adjoint(u) / self.J.n

    def dual(self, u: Tensor, v: Tensor, slope: Tensor) -> float:
        """D(u) for a subgradient u of h at v."""
        linear = (u * (self.c - v)).sum(-1) + self.outer(v)
        return float(linear.mean() - 0.5 * self.gamma * slope.square().sum())

    def best(self, u: Tensor, v: Tensor, step: Tensor | None = None, iterations: int = 0) -> Solution:
        """The better of δ(u) and a step at hand, with D(u) as the bound."""
        slope = self.slope(u)
        chosen = -self.gamma * slope
        value, bound = self.primal(chosen), self.dual(u, v, slope)
        if step is not None:
            other = self.primal(step)
            if other < value:
                chosen, value = step, other
        return Solution(chosen, value, bound, u, iterations)

    def rounding(self, solution: Solution) -> float:
        """What the gap cannot be told from zero below: differences of numbers of this size."""
        size = abs(self.start) + abs(solution.value) + float((solution.multipliers * self.c).sum(-1).abs().mean())
        return 4 * torch.finfo(self.c.dtype).eps * size

    def solved(self, solution: Solution, tolerance: float) -> bool:
        """Whether the gap is a small part of what the step gains."""
        return solution.gap <= max(tolerance * (self.start - solution.value), self.rounding(solution))
