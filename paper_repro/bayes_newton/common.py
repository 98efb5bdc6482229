"""What all experiments share: the methods, one run of one method, and tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesgn import rules

HERE = Path(__file__).parent
FIGURES = HERE / "figures"


def methods(quasi_newton_damping: float = 0.5, cubature: rules.Cubature | None = None) -> dict[str, rules.Expansion]:
    """Every method of the paper's tables: a rule each. Rows are expansions, columns curvatures."""
    curvatures: dict[str, Callable[[], rules.Curvature]] = {
        "heuristic PSD": rules.Exact,  # the Hessian's full block, negative eigenvalues to zero
        "Gauss-Newton": rules.GaussNewton,
        "quasi-Newton": lambda: rules.QuasiNewton(damping=quasi_newton_damping),
        "Riemann": rules.Riemann,
    }
    expansions: dict[str, Callable[[rules.Curvature], rules.Expansion]] = {
        "Newton": rules.Laplace,
        "VI": lambda c: rules.Variational(c, cubature),
        "PEP": lambda c: rules.PowerEP(0.5, c, cubature),
        "PL2": lambda c: rules.PosteriorLinearization2(c, cubature),
    }
    out = {f"{e}, {c}": make(bend()) for e, make in expansions.items() for c, bend in curvatures.items()}
    out["PL"] = rules.PosteriorLinearization(cubature=cubature)
    out["Taylor (EKS)"] = rules.Taylor()
    return out


@dataclass
class Run:
    """One method on one fold, step by step.

    Attributes:
        energy: minus the rule's log evidence, in nats.
        nlpd: minus the mean log predictive density of the test data, in nats.
        indefinite: the share of curvature blocks that were indefinite before they were made PSD, over all steps.
        skipped: sites left as they were, over all steps.
        note: why it ended early, if it did.
    """

    steps: list[int] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    nlpd: list[float] = field(default_factory=list)
    indefinite: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def last(self) -> tuple[float, float]:
        return (self.energy[-1], self.nlpd[-1]) if not self.note else (math.nan, math.nan)


def run(belief: Any, steps: int, lr: float, nlpd: Callable[[Any], float], every: int = 10) -> tuple[Run, Any]:
    """``steps`` turns of a fixed size, as the paper does it: no line search, no early end."""
    record, began = Run(), time.perf_counter()
    blocks = 0
    for step in range(steps + 1):
        try:
            if step % every == 0 or step == steps:
                with torch.no_grad():
                    energy = -float(belief.log_evidence())
                    if not math.isfinite(energy):
                        raise ValueError(f"the log evidence is {-energy}")
                    record.nlpd.append(nlpd(belief))
                record.steps.append(step)
                record.energy.append(energy)
            if step == steps:
                break
            belief, turn = belief.turn(lr)
        except (ValueError, RuntimeError) as error:
            record.note = f"failed after {step} steps: {str(error)[:60]} …"
            break
        record.indefinite += turn.indefinite
        record.skipped += turn.skipped
        blocks += belief.num_data
    record.indefinite /= max(blocks, 1)
    record.seconds = time.perf_counter() - began
    return record, belief


def nlpd_of(x: Tensor, y: Tensor) -> Callable[[Any], float]:
    """Minus the mean log predictive density of test data."""

    def value(belief: Any) -> float:
        f = belief(x)
        targets = belief.likelihood.targets(f.mean.reshape(len(x), -1), y)
        return -float(belief.likelihood(f).log_prob(targets).mean())

    return value


def table(rows: dict[str, list[str]], head: list[str]) -> str:
    """A Markdown table with aligned columns."""
    lines = [["method", *head], *[[name, *cells] for name, cells in rows.items()]]
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


HEAD = ["−log evidence / nats", "NLPD / nats", "indefinite blocks", "sites left", "s / fold"]


def summary(runs: dict[str, list[Run]]) -> tuple[str, dict[str, float]]:
    """The table of all methods, mean ± standard deviation over folds, and the means by name for expected.json."""
    rows, found = {}, {}
    for name, several in runs.items():
        energy, nlpd = (np.array([r.last[i] for r in several]) for i in (0, 1))
        failed = next((r.note for r in several if r.note), "")
        rows[name] = [
            f"{energy.mean():.2f} ± {energy.std():.2f}" if not failed else "failed",
            f"{nlpd.mean():.3f} ± {nlpd.std():.3f}" if not failed else failed,
            f"{100 * np.mean([r.indefinite for r in several]):.0f} %",
            str(sum(r.skipped for r in several)),
            f"{np.mean([r.seconds for r in several]):.1f}",
        ]
        found |= {f"{name}: energy": float(energy.mean()), f"{name}: NLPD": float(nlpd.mean())}
    return table(rows, HEAD), found
