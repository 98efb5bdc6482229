"""Dampings: how far the quadratic is trusted. Each proposes a step and learns from what became of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from bayesgn.optim.quadratic import Quadratic


class Proposal(NamedTuple):
    """A step.

    Attributes:
        δ: the step [p].
        bend: δᵀHδ.
        damping: the λ it was solved with (0 where it was not).
    """

    δ: Tensor
    bend: float
    damping: float


class Damping(ABC):
    """How far the quadratic is trusted.

    A damping holds its own state (``state_dict``, ``load_state_dict``: plain numbers), so give every optimizer one of its own.

    Attributes:
        eigenvalues: whether :meth:`Quadratic.smallest_eigenvalue` will be asked for.
        products: whether :meth:`Quadratic.curvature` will be asked for directions that were not solved for.
        tries: how often a step may be proposed anew before the optimizer gives up (the weights then stay).
        uphill: whether (> 0) a step may be accepted that raises the loss.
    """

    eigenvalues = False
    products = False
    tries = 1
    uphill = 0.0

    @abstractmethod
    def propose(self, quadratic: Quadratic) -> Proposal:
        """A step at the present trust."""

    def learn(self, proposal: Proposal, length: float, actual: float, predicted: float) -> None:  # noqa: B027 (a constant learns nothing)
        """Note how a tried step of ‖δ‖_D = ``length`` did: the loss fell by ``actual`` where ``predicted`` was promised (``actual`` = −inf for a
        loss that is not finite)."""

    def accepts(self, actual: float, predicted: float, cosine: float) -> bool:
        """Whether a step is taken that lowered the loss by ``actual``; ``cosine`` is its angle with the last step (0 where there was none)."""
        return actual > -math.inf

    def state_dict(self) -> dict[str, Any]:
        """What was learnt so far."""
        return {k: v for k, v in vars(self).items() if k.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what another of this kind has learnt."""
        unknown = set(state) ^ {k for k in vars(self) if k.startswith("_")}
        if unknown:
            raise ValueError(f"{type(self).__name__}: the saved state differs in {sorted(unknown)}; was it saved with another damping?")
        vars(self).update(state)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if not k.startswith("_") and isinstance(v, (int, float)))
        return f"{type(self).__name__}({options})"


def _positive(owner: str, zero: bool = False, **numbers: float) -> None:
    for name, value in numbers.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise ValueError(f"{owner}: {name}={value!r}; expected a {'non-negative' if zero else 'positive'} finite number.")


class Constant(Damping):
    """One λ for ever, every finite step taken: the natural gradient, and stochastic Gauss-Newton with a learning rate.

        δ = −(H + λD)⁻¹ g

    Args:
        value: λ ≥ 0, on the scale of the mean loss.

    Raises:
        ValueError: for a negative or infinite λ.

    Example:
        >>> Constant(1e-3)
        Constant(value=0.001)
    """

    def __init__(self, value: float = 1e-3) -> None:
        _positive("Constant", zero=True, value=value)
        self.value = float(value)

    def propose(self, quadratic: Quadratic) -> Proposal:
        δ = quadratic.solve(self.value)
        return Proposal(δ, quadratic.solved(δ, self.value), self.value)


class LevenbergMarquardt(Damping):
    """λ by the gain ratio: less after a step that did as promised, more after one that did not, which is taken back and tried anew.

        ρ = (loss(θ) − loss(θ + δ)) / −m(δ),   λ ← λ · max(⅓, 1 − (2ρ − 1)³) for ρ > 0,   λ ← λ · ν, ν ← 2ν otherwise

    Args:
        value: λ to begin with, on the scale of the mean loss.
        smallest, largest: λ stays between them.
        uphill: b ≥ 0; with b > 0 a step may raise the loss where it goes on in the direction of the last one:
            loss(θ + δ) − loss(θ) ≤ b · max(0, cos(δ, δ_last)) · −m(δ). A log loss has no natural zero, so the rise is measured by the
            model's promise; Transtrum and Sethna measure it by the loss itself.
        tries: proposals in one step.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> damping = LevenbergMarquardt(1e-2)
        >>> damping.learn(None, 1.0, actual=-1.0, predicted=2.0)  # the loss rose
        >>> damping.λ
        0.02

    Source: Nielsen (1999), "Damping parameter in Marquardt's method", eq. 2.5; Transtrum and Sethna (2012), sec. 4, for uphill steps.
    """

    def __init__(self, value: float = 1e-2, smallest: float = 1e-12, largest: float = 1e12, uphill: float = 0.0, tries: int = 10) -> None:
        _positive("LevenbergMarquardt", value=value, smallest=smallest, largest=largest, tries=tries)
        _positive("LevenbergMarquardt", zero=True, uphill=uphill)
        self.value, self.smallest, self.largest, self.uphill, self.tries = float(value), smallest, largest, uphill, tries
        self._λ, self._ν = float(value), 2.0

    @property
    def λ(self) -> float:
        """The present damping."""
        return self._λ

    def propose(self, quadratic: Quadratic) -> Proposal:
        δ = quadratic.solve(self._λ)
        return Proposal(δ, quadratic.solved(δ, self._λ), self._λ)

    def learn(self, proposal: Proposal, length: float, actual: float, predicted: float) -> None:
        ρ = actual / predicted if predicted > 0 else -math.inf
        if ρ > 0:
            self._λ, self._ν = max(self.smallest, self._λ * max(1 / 3, 1 - (2 * min(ρ, 1.5) - 1) ** 3)), 2.0
        else:
            self._λ, self._ν = min(self.largest, self._λ * self._ν), 2 * self._ν

    def accepts(self, actual: float, predicted: float, cosine: float) -> bool:
        return actual > 0 or (self.uphill > 0 and actual > -self.uphill * max(0.0, cosine) * predicted)


class SmallestEigenvalue(Damping):
    """λ proportional to the smallest eigenvalue of the Gram matrix, measured anew at each step: every finite step taken.

        λ = factor · λ_min(J̃ J̃ᵀ / N)

    With more weights than data this keeps the contraction of Gauss-Newton independent of the conditioning of the Gram matrix, while the step
    stays bounded.

    Args:
        factor: of the smallest eigenvalue.
        smallest: λ where the Gram matrix is singular.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> SmallestEigenvalue(1.0)
        SmallestEigenvalue(factor=1, smallest=1e-12)

    Source: Cayci (2024), "Gauss-Newton dynamics for neural networks: a Riemannian optimization perspective", for the schedule.
    """

    eigenvalues = True

    def __init__(self, factor: float = 1.0, smallest: float = 1e-12) -> None:
        _positive("SmallestEigenvalue", factor=factor, smallest=smallest)
        self.factor, self.smallest = float(factor), float(smallest)

    def propose(self, quadratic: Quadratic) -> Proposal:
        λ = max(self.smallest, self.factor * quadratic.smallest_eigenvalue())
        δ = quadratic.solve(λ)
        return Proposal(δ, quadratic.solved(δ, λ), λ)


class _Region(Damping):
    """A radius that grows where the quadratic is good up to the border, and shrinks where it is not."""

    def __init__(self, radius: float, largest: float, tries: int) -> None:
        _positive(type(self).__name__, radius=radius, largest=largest, tries=tries)
        self.radius, self.largest, self.tries = float(radius), float(largest), tries
        self._radius = float(radius)

    def learn(self, proposal: Proposal, length: float, actual: float, predicted: float) -> None:
        ρ = actual / predicted if predicted > 0 else -math.inf
        if ρ < 0.25:
            self._radius = 0.25 * min(length, self._radius)
        elif ρ > 0.75 and length > 0.9 * self._radius:
            self._radius = min(self.largest, 2 * self._radius)

    def accepts(self, actual: float, predicted: float, cosine: float) -> bool:
        return actual > 0


class TrustRegion(_Region):
    """The minimiser of the quadratic within a radius: λ follows from it.

        min m(δ) over ‖δ‖_D ≤ Δ:   δ = −(H + λD)⁻¹ g with λ = 0 inside, and ‖δ‖_D = Δ to 10 % otherwise

    λ is found by a safeguarded secant method on 1/‖δ(λ)‖ − 1/Δ, almost linear in λ: two to five solves.

    Args:
        radius: Δ to begin with.
        largest: Δ never grows beyond.
        tries: proposals in one step.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> TrustRegion(0.5)
        TrustRegion(radius=0.5, largest=1e+06, tries=10)

    Source: Moré (1978), "The Levenberg-Marquardt algorithm: implementation and theory", sec. 5.
    """

    def __init__(self, radius: float = 1.0, largest: float = 1e6, tries: int = 10) -> None:
        super().__init__(radius, largest, tries)

    def propose(self, quadratic: Quadratic) -> Proposal:
        Δ = self._radius
        steepest = quadratic.steepest()
        top = quadratic.size(steepest) / Δ  # ‖δ(λ)‖ ≤ ‖D⁻¹g‖_D / λ, so that λ ≤ top
        if top == 0 or not math.isfinite(top):
            return Proposal(0 * steepest if top == 0 else steepest, 0.0, 0.0)
        low, high, λ = 1e-10 * top, top, 1e-10 * top
        last: tuple[float, float] | None = None
        for _ in range(20):
            δ = quadratic.solve(λ)
            length = quadratic.size(δ)
            if (length <= 1.1 * Δ and λ == 1e-10 * top) or abs(length - Δ) <= 0.1 * Δ:
                break
            low, high = (λ, high) if length > Δ else (low, λ)
            φ = 1 / length - 1 / Δ
            new = math.sqrt(low * high)
            if last is not None and φ != last[1]:
                secant = λ - φ * (λ - last[0]) / (φ - last[1])
                if low < secant < high:
                    new = secant
            last, λ = (λ, φ), new
        return Proposal(δ, quadratic.solved(δ, λ), λ)


class Dogleg(_Region):
    """The path from the steepest descent's minimum to the Gauss-Newton step, as far as the radius: one solve, whatever the radius.

    Args:
        radius: Δ to begin with.
        largest: Δ never grows beyond.
        floor: damping of the Gauss-Newton step, relative to what would keep it within the radius: without one flat directions swallow the step.
        tries: proposals in one step.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> Dogleg(0.5)
        Dogleg(radius=0.5, largest=1e+06, tries=10, floor=0.001)

    Source: Powell (1970), "A new algorithm for unconstrained optimization".
    """

    products = True

    def __init__(self, radius: float = 1.0, largest: float = 1e6, tries: int = 10, floor: float = 1e-3) -> None:
        super().__init__(radius, largest, tries)
        _positive("Dogleg", floor=floor)
        self.floor = floor

    def propose(self, quadratic: Quadratic) -> Proposal:
        Δ = self._radius
        steepest = quadratic.steepest()
        slope, bend = -float(quadratic.gradient @ steepest), quadratic.curvature(steepest)
        length = quadratic.size(steepest)
        if length == 0:
            return Proposal(steepest, 0.0, 0.0)
        t = slope / bend if bend > 0 else math.inf  # along the steepest descent, the model's minimum
        if t * length >= Δ:
            t = Δ / length
            return Proposal(t * steepest, t * t * bend, 0.0)
        λ = self.floor * length / Δ
        cauchy, newton = t * steepest, quadratic.solve(λ)
        if quadratic.size(newton) <= Δ:
            return Proposal(newton, quadratic.solved(newton, λ), λ)
        # ‖cauchy + s (newton − cauchy)‖_D = Δ: the positive root of a s² + 2 b s + c = 0.
        way = newton - cauchy
        weight = way if quadratic.scaling is None else quadratic.scaling * way
        a, b, c = float(weight @ way), float(weight @ cauchy), quadratic.size(cauchy) ** 2 - Δ**2
        s = (-b + math.sqrt(max(0.0, b * b - a * c))) / a
        δ = cauchy + s * way
        return Proposal(δ, quadratic.curvature(δ), 0.0)
