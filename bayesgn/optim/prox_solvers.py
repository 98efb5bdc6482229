"""Inner solvers of the prox-linear step, each certified by a duality gap: exact on the dual, accelerated on the dual, incremental on the primal."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import grad

from bayesgn.optim.prox_subproblem import DenseJacobian, Solution, Subproblem, TermsJacobian


class InnerSolver(ABC):
    """How the convex subproblem of a prox-linear step is solved. It stops when the duality gap is ``tolerance`` of what the step gains in the model.

    Attributes:
        tolerance: that part. A quadratic phase of the outer method lives only down to tolerance times the loss.
    """

    tolerance: float

    @abstractmethod
    def solve(self, problem: Subproblem, multipliers: Tensor | None = None, generator: torch.Generator | None = None) -> Solution:
        """A step with its gap; ``multipliers`` [n k] of an earlier subproblem to start from."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in sorted(vars(self).items()))
        return f"{type(self).__name__}({options})"


class DualNewton(InnerSolver):
    """Proximal points on the dual, each by a semismooth Newton method: exact to rounding in a few small factorisations.

        δ ← argmin_δ (1/n) Σ_i M_ν(c_i + J_i δ + ν u_i) + ‖δ‖²/(2γ),     u ← (z − prox_νh(z))/ν at z = c + Jδ + νu,     ν ← ν/5

    with M_ν the Moreau envelope of h (the method of multipliers in the primal's words). Newton's matrix is I/γ + JᵀDJ/(nν) with
    D = I − ∂prox; where there are more unknowns than components, all happens in the row space of J, which holds the solution.

    Args:
        tolerance: of the gap, as a part of the model's decrease.
        max_iterations: Newton steps, over all proximal points together.

    Example:
        >>> from bayesgn.optim.outer import L2Norm
        >>> from bayesgn.optim.prox_subproblem import DenseJacobian, Subproblem
        >>> t = torch.tensor([[1.0], [2.0], [9.0]], dtype=torch.float64)
        >>> J = DenseJacobian(lambda x, t: x - t, torch.zeros(1, dtype=torch.float64), (t,))
        >>> DualNewton().solve(Subproblem(L2Norm(), J, gamma=1e3)).step  # least distances: the median, not the mean 4
        tensor([2.0000], dtype=torch.float64)

    Source: Rockafellar (1976) for multipliers as proximal points; Li, Sun and Toh (2018) for Newton's method inside.
    """

    def __init__(self, tolerance: float = 1e-12, max_iterations: int = 300) -> None:
        self.tolerance, self.max_iterations = _part("DualNewton", tolerance), _count("DualNewton", "max_iterations", max_iterations)

    def solve(self, problem: Subproblem, multipliers: Tensor | None = None, generator: torch.Generator | None = None) -> Solution:
        if not isinstance(problem.J, DenseJacobian):
            raise TypeError(
                f"DualNewton factorises JᵀDJ and needs J itself, but got {type(problem.J).__name__}; "
                "use jacobian=optim.DenseJacobian, or inner=optim.DualAscent() or optim.SVRG(), which take products."
            )
        wide = problem.J.widened()
        if wide is not problem.J:
            dtype, u = problem.c.dtype, None if multipliers is None else multipliers.to(wide.value.dtype)
            found = self.solve(Subproblem(problem.outer, wide, problem.gamma), u, generator)
            found.step, found.multipliers = found.step.to(dtype), found.multipliers.to(dtype)
            return found
        n, A, Q = problem.J.n, *problem.J.compact()
        c, outer, γ = problem.c, problem.outer, problem.gamma
        u, ν = _start(problem, multipliers)
        ν = 10 * ν  # most terms within the rounded kink, where the envelope is quadratic
        smallest = max(problem.J.square_norm() * γ / n * torch.finfo(c.dtype).eps, torch.finfo(c.dtype).tiny)  # beyond: JᵀDJ alone
        y, last = A.new_zeros(A.shape[1]), ν
        target, best, used = 0.0, None, 0
        stuck = 30  # so many Newton steps in one proximal point are a walk over many small pieces of h

        while used < self.max_iterations:
            found_y, steps = self._proximal_point(problem, A, y, u, ν, target, min(self.max_iterations - used, stuck))
            used += steps
            if steps == stuck and best is not None and ν < last:
                smallest = ν = last  # go on with the rounding that worked: its proximal points still converge
                continue
            y, last = found_y, ν
            moved = (A @ y).reshape(c.shape)
            z = c + moved + ν * u
            v = outer.prox(z, ν)
            u = (z - v) / ν
            found = problem.best(u, v, y if Q is None else Q @ y, iterations=used)
            if best is not None:
                found.bound = max(found.bound, best.bound)
                if best.value < found.value:
                    found.step, found.value = best.step, best.value
            if problem.solved(found, self.tolerance):
                return found
            if best is not None and found.gap > 0.99 * best.gap and ν <= smallest:
                return found  # rounding
            best = found
            target = 0.1 * max(self.tolerance * (problem.start - found.value), problem.rounding(found))
            ν = max(ν / 5, smallest)
        assert best is not None  # max_iterations ≥ 1
        return best

    def _proximal_point(self, problem: Subproblem, A: Tensor, y: Tensor, u: Tensor, ν: float, target: float, limit: int) -> tuple[Tensor, int]:
        """Semismooth Newton on the envelope until its error, at most (γ/2)‖gradient‖², is below the target."""
        n, k = problem.c.shape
        γ, outer = problem.gamma, problem.outer
        shifted = problem.c + ν * u
        identity = torch.eye(len(y), dtype=y.dtype, device=y.device)

        def envelope(y: Tensor) -> tuple[float, Tensor, Tensor]:
            z = shifted + (A @ y).reshape(n, k)
            v = outer.prox(z, ν)
            return problem.envelope(y, z, v, ν), y / γ + A.mT @ ((z - v) / (n * ν)).reshape(-1), z

        # z is a sum that may cancel: its error, by J, is in the gradient.
        rounding = torch.finfo(y.dtype).eps * problem.J.square_norm() ** 0.5 * float(torch.linalg.vector_norm(shifted)) / (n * ν)
        value, g, z = envelope(y)
        for used in range(1, limit + 1):
            square = float(g.square().sum())
            if 0.5 * γ * square <= max(target, 1e-14 * abs(value)) or square**0.5 <= rounding:
                return y, used
            D = outer.bend(z, ν)
            H = identity / γ + A.mT @ (D @ A.reshape(n, k, -1)).reshape(n * k, -1) / (n * ν)
            L, info = torch.linalg.cholesky_ex(H)
            if int(info):
                return y, used
            d = -torch.cholesky_solve(g[:, None], L)[:, 0]
            falls, length = float(g @ d), 1.0
            while True:
                trial = envelope(y + length * d)
                if trial[0] <= value + 1e-4 * length * falls or float(trial[1].square().sum()) < 0.25 * square:
                    break
                length /= 4  # a long way where the pieces of h are small and the proximal term is weak
                if length < 1e-20:
                    return y, used  # rounding
            y, (value, g, z) = y + length * d, trial
        return y, limit


class DualAscent(InnerSolver):
    """Accelerated proximal gradient on the dual, with restarts: products Jδ and Jᵀu only.

        u ← prox_{s h*}(w + s (c + J δ(w))),    δ(w) = −(γ/n) Jᵀw,    s = n/(γ‖J‖²),    w the extrapolated multipliers

    Args:
        tolerance: of the gap, as a part of the model's decrease.
        max_iterations: each costs one product Jδ and one Jᵀu.

    Source: Beck and Teboulle (2009); on the dual of this subproblem, Drusvyatskiy and Paquette (2019), sec. 5; restarts, O'Donoghue and
    Candès (2015).
    """

    def __init__(self, tolerance: float = 1e-4, max_iterations: int = 2000) -> None:
        self.tolerance, self.max_iterations = _part("DualAscent", tolerance), _count("DualAscent", "max_iterations", max_iterations)

    def solve(self, problem: Subproblem, multipliers: Tensor | None = None, generator: torch.Generator | None = None) -> Solution:
        J, c, γ, n = problem.J, problem.c, problem.gamma, problem.J.n
        u, _ = _start(problem, multipliers)
        square = J.square_norm()
        if square == 0:  # nothing moves: any subgradient at c certifies δ = 0
            u = grad(lambda z: problem.outer(z).sum())(c)
            return problem.best(u, c)
        s = n / (γ * square)
        slope = problem.slope(u)
        moved = J.forward(-γ * slope)
        w, w_moved, momentum = u, moved, 1.0
        best: Solution | None = None
        last_bound = -float("inf")
        for used in range(1, self.max_iterations + 1):
            z = w / s + c + w_moved
            v = problem.outer.prox(z, 1 / s)
            new = s * (z - v)
            slope = problem.slope(new)
            step = -γ * slope
            new_moved = J.forward(step)
            value, bound = problem.primal(step, new_moved), problem.dual(new, v, slope)
            if best is None or value < best.value:
                best = Solution(step, value, bound if best is None else max(best.bound, bound), new)
            elif bound > best.bound:
                best.bound, best.multipliers = bound, new
            best.iterations = used
            if problem.solved(best, self.tolerance):
                break
            if bound < last_bound:  # overshot: forget the momentum
                if momentum == 1.0:
                    s /= 2  # ‖J‖ had been underestimated
                momentum, w, w_moved = 1.0, u, moved
                last_bound = -float("inf")
                continue
            following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
            β = (momentum - 1) / following
            w, w_moved = new + β * (new - u), new_moved + β * (new_moved - moved)
            u, moved, momentum, last_bound = new, new_moved, following, bound
        assert best is not None
        return best


class SVRG(InnerSolver):
    """Incremental: variance-reduced steps from a few data at a time on the smoothed subproblem, the smoothing undone by multipliers.

        δ ← (δ − η [J_Bᵀ(u_B(δ) − u_B(δ̃))/|B| + Jᵀu(δ̃)/n]) / (1 + η/γ),      u(δ) = ∇M_ν(c + Jδ + νu)

    An epoch takes a full gradient at its snapshot δ̃, which also yields the duality gap, and then goes once through the data in random
    batches. As the model is linear inside, a step costs one product Jδ and one Jᵀu of its batch. When a snapshot solves the smoothed problem
    better than the gap of the subproblem, or after five epochs, its u become the multipliers; so the smoothing ν need not vanish.

    Args:
        tolerance: of the gap, as a part of the model's decrease.
        epochs: at most.
        batch_size: data a step.
        smoothing: ν of the Moreau envelope; by default from the size of c and of h's slope.
        lr: η; by default ν / (3 max_i ‖J_i‖²). It is halved whenever an epoch leads uphill.

    Source: Xiao and Zhang (2014); smoothing and incremental inner loops, Pillutla, Roulet, Kakade and Harchaoui (2018; 2023, sec. 2).
    """

    def __init__(
        self, tolerance: float = 0.1, epochs: int = 50, batch_size: int = 16, smoothing: float | None = None, lr: float | None = None
    ) -> None:
        self.tolerance, self.epochs = _part("SVRG", tolerance), _count("SVRG", "epochs", epochs)
        self.batch_size = _count("SVRG", "batch_size", batch_size)
        for name, number in (("smoothing", smoothing), ("lr", lr)):
            if number is not None and not number > 0:
                raise ValueError(f"SVRG: {name}={number}; expected a positive number, or None to have it chosen.")
        self.smoothing, self.lr = smoothing, lr

    def solve(self, problem: Subproblem, multipliers: Tensor | None = None, generator: torch.Generator | None = None) -> Solution:
        J, c, γ, n, outer = problem.J, problem.c, problem.gamma, problem.J.n, problem.outer
        u, ν = _start(problem, multipliers)
        ν = self.smoothing or ν
        batch = min(self.batch_size, n)
        η = ν / max(3 * _smoothness(J, batch), torch.finfo(c.dtype).tiny) if self.lr is None else self.lr
        snapshot = start = c.new_zeros(J.p)
        best: Solution | None = None
        merit = float("inf")
        since = 0
        for epoch in range(self.epochs + 1):
            moved = J.forward(snapshot)
            z = c + moved + ν * u
            v = outer.prox(z, ν)
            there = (z - v) / ν
            slope = problem.slope(there)
            smooth = problem.envelope(snapshot, z, v, ν)
            value, bound = problem.primal(snapshot, moved), problem.dual(there, v, slope)
            if best is None or value < best.value:
                best = Solution(snapshot, value, bound if best is None else max(best.bound, bound), there)
            elif bound > best.bound:
                best.bound, best.multipliers = bound, there
            best.iterations = epoch
            if problem.solved(best, self.tolerance) or epoch == self.epochs:
                break
            if not smooth <= merit + problem.rounding(best):  # uphill, or not finite: once more from the last snapshot, by half the step
                snapshot, η = start, η / 2
                continue
            error = 0.5 * γ * float((snapshot / γ + slope).square().sum())
            since += 1
            if error < 0.3 * best.gap or since == 5:
                # New multipliers make another envelope, with another gradient at the snapshot.
                u, since = there, 0
                z = c + moved + ν * u
                v = outer.prox(z, ν)
                there = (z - v) / ν
                slope = problem.slope(there)
                smooth = problem.envelope(snapshot, z, v, ν)
            merit, start = smooth, snapshot
            δ = snapshot
            for rows in torch.randperm(n, generator=generator, device="cpu" if generator is None else generator.device).to(c.device).split(batch):
                z = c[rows] + J.forward(δ, rows) + ν * u[rows]
                change = (z - outer.prox(z, ν)) / ν - there[rows]
                δ = (δ - η * (J.adjoint(change, rows) / len(rows) + slope)) / (1 + η / γ)
            snapshot = δ
        assert best is not None
        return best


def _smoothness(J: TermsJacobian, batch: int) -> float:
    """Smoothness of a mean over ``batch`` data in expectation, between max_i ‖J_i‖² for one and ‖J‖²/n for all (Gower et al. 2019, prop. 3.8)."""
    n = J.n
    if n == 1:
        return J.square_norm()
    return (n * (batch - 1) * J.square_norm() / n + (n - batch) * J.row_square_norm()) / (batch * (n - 1))


def _start(problem: Subproblem, multipliers: Tensor | None) -> tuple[Tensor, float]:
    """Multipliers to begin with and a ν of the scale of the problem, ‖c‖ over the slope of h."""
    c = problem.c
    u = grad(lambda z: problem.outer(z).sum())(c)
    size, slope = float(torch.linalg.vector_norm(c)), float(torch.linalg.vector_norm(u))
    ν = size / slope if size > 0 and slope > 0 else 1.0
    return (u if multipliers is None or multipliers.shape != c.shape else multipliers), ν


def _part(owner: str, tolerance: float) -> float:
    if not 0 < tolerance < 1:
        raise ValueError(f"{owner}: tolerance={tolerance}; expected a part of the model's decrease, between 0 and 1.")
    return float(tolerance)


def _count(owner: str, name: str, count: int) -> int:
    if isinstance(count, bool) or int(count) != count or count < 1:
        raise ValueError(f"{owner}: {name}={count}; expected a whole number of at least 1.")
    return int(count)
