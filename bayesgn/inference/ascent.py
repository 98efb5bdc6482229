"""Ascent: projected Newton or L-BFGS steps with a backtracking line search, for a handful to thousands of hyper-parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

LONGEST = 3.0  # of one step in any log hyper-parameter: a factor of 20


def maximize(
    objective: Callable,
    z: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    steps: int,
    tol: float,
    note: Callable[[tuple[np.ndarray, float]], None],
    progress: bool | None = None,
    noise: float = 0.0,
) -> tuple[np.ndarray, str, bool]:
    """Projected Newton (where ``objective`` gives a Hessian) or L-BFGS with a backtracking line search; never goes down.

    ``noise`` is the relative accuracy of the objective: where no step gains and no more than that was to be expected, the search is over.

    Returns:
        z, why it stopped, whether it converged.
    """
    lower, upper = np.minimum(lower, z), np.maximum(upper, z)  # a start outside its bounds may stay
    value, gradient, hessian = objective(z)
    if not math.isfinite(value):
        raise ValueError(f"the log evidence is {value} at the start; look for NaN in the fit or a precision that is 0 or infinite.")
    note((z, value))
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    with Bar(steps, progress) as bar:
        for _ in range(steps):
            free = ~(((z <= lower) & (gradient < 0)) | ((z >= upper) & (gradient > 0)))
            if not free.any() or np.abs(gradient[free]).max(initial=0.0) == 0.0:
                return z, "the gradient is zero", True
            g = np.where(free, gradient, 0.0)
            direction = newton(g, hessian, free) if hessian is not None else lbfgs(g, pairs, free)
            direction *= min(1.0, LONGEST / max(np.abs(direction).max(), 1e-300))
            step = 1.0
            while True:
                new = np.clip(z + step * direction, lower, upper)
                new_value, new_gradient, new_hessian = objective(new)
                if math.isfinite(new_value) and new_value >= value + 1e-4 * float(g @ (new - z)):
                    break
                step *= 0.5
                expected = step * float(g @ direction)
                if step < 1e-8 or np.abs(step * direction).max() < min(tol, 1e-9) or expected < noise * (1 + abs(value)):
                    return z, "no further gain within rounding", True
            s, y = new - z, gradient - new_gradient
            if s @ y > 1e-12 * np.linalg.norm(s) * np.linalg.norm(y):
                pairs = [*pairs[-29:], (s, y)]
            moved = np.abs(s).max()
            z, value, gradient, hessian = new, new_value, new_gradient, new_hessian
            note((z, value))
            bar.update()
            if moved <= tol and step == 1.0:
                return z, f"no log hyper-parameter moved by more than {tol:g}", True
    return z, f"all {steps} steps were taken", False


def newton(g: np.ndarray, hessian: tuple[np.ndarray, np.ndarray, np.ndarray], free: np.ndarray) -> np.ndarray:
    """−H⁻¹ g for the arrowhead H = [[diag D, B], [Bᵀ, C]], within the free variables."""
    D, B, C = hessian
    G = len(D)
    a = np.where(free[:G] & (D < 0), -D, 1.0)  # −H, positive; a precision that no weight has keeps its place (g = 0)
    B = B * free[:G, None] * free[None, G:]
    inner = -C * np.outer(free[G:], free[G:]) + np.diag((~free[G:]).astype(float))
    schur = inner - B.T @ (B / a[:, None])
    if len(schur):
        eigenvalues, Q = np.linalg.eigh(schur)
        floor = 1e-8 * max(np.abs(eigenvalues).max(), 1e-8)  # a likelihood need not be concave in its parameters
        x = Q @ ((Q.T @ (g[G:] + B.T @ (g[:G] / a))) / np.maximum(np.abs(eigenvalues), floor))
    else:
        x = np.zeros(0)
    return np.concatenate([(g[:G] + B @ x) / a, x])


def lbfgs(g: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], free: np.ndarray) -> np.ndarray:
    """The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), for a maximum, within the free variables."""
    d, kept = g.copy(), []
    for s, y in reversed(pairs):
        s, y = s * free, y * free
        if s @ y > 0:
            α = (s @ d) / (s @ y)
            d -= α * y
            kept.append((s, y, α))
    d *= (kept[0][0] @ kept[0][1]) / (kept[0][1] @ kept[0][1]) if kept else 1.0 / max(np.abs(g).max(), 1e-300)
    for s, y, α in reversed(kept):
        d += (α - (y @ d) / (s @ y)) * s
    return d if d @ g > 0 else g / max(np.abs(g).max(), 1e-300)


class Bar:
    """A progress bar that is only made when there is time to see it."""

    def __init__(self, steps: int, progress: bool | None) -> None:
        self.steps, self.progress, self.bar, self.done, self.began = steps, progress, None, 0, time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def update(self) -> None:
        self.done += 1
        if self.bar is None and (self.progress or (self.progress is None and time.monotonic() - self.began > 2)):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.steps, initial=self.done - 1, desc="evidence", unit="step", leave=False)
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
