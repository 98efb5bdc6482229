"""Levenberg-Marquardt beside first-order methods, L-BFGS, Hessian-free and KFAC; what each of its improvements is worth; wall time to a target."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch

from bayesgn.datasets import DatasetUnavailable
from paper_repro.levenberg_marquardt.methods import ABLATIONS, METHODS, Method, Trace, train
from paper_repro.levenberg_marquardt.problems import NOISE, Problem, classes, digits, sine, table

TITLE = "Pooladzandi and Zhou (2022): Levenberg-Marquardt with momentum, scaling, line search and uphill steps, beside L-BFGS, HF, KFAC, Adam"

OURS, LBFGS = ("LM", "LM, improved", "Hessian-free"), ("L-BFGS", "L-BFGS, strong Wolfe")
Runs = dict[str, list[Trace]]


def compare(problem: Problem, methods: dict[str, Method], seeds: range, budget: float) -> Runs:
    """All methods from the same initial weights, in turns, so that what disturbs the machine disturbs all."""
    runs: Runs = {name: [] for name in methods}
    for seed in seeds:
        for name, method in methods.items():
            runs[name].append(train(method, problem, seed, budget))
    return runs


def median_time(runs: list[Trace]) -> float:
    """Median seconds to the target; a run that did not reach it counts as ∞."""
    return statistics.median(r.time for r in runs)


def table_of(problem: Problem, runs: Runs) -> str:
    """A Markdown table of one problem."""
    weights = sum(p.numel() for p in problem.net(0).parameters())
    lines = [f"### {problem.name}: {len(problem.x)} data, {weights} weights, to a loss of {problem.target:g}", ""]
    extra = (" held-out accuracy |", "---|") if problem.classes else ("", "")
    lines += ["| method | reached | iterations | seconds | loss at the end |" + extra[0], "|---|---|---|---|---|" + extra[1]]
    for name, several in runs.items():
        reached = [r for r in several if r.reached is not None]
        steps = statistics.median(r.steps for r in reached) if reached else math.nan
        seconds = statistics.median(r.time for r in reached) if reached else math.nan
        loss = statistics.median(r.losses[-1] for r in several)
        cells = [name, f"{len(reached)} of {len(several)}", f"{steps:.0f}" if reached else "–", f"{seconds:.3f}" if reached else "–", f"{loss:.4g}"]
        if problem.classes:
            cells.append(f"{100 * statistics.median(r.accuracy for r in several):.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdict(runs: Runs) -> tuple[float, str]:
    """Best of ours over best of L-BFGS, in median seconds to the target (0 where only ours reaches it), and which of ours."""
    best = min(OURS, key=lambda name: median_time(runs[name]))
    ours, theirs = median_time(runs[best]), min(median_time(runs[name]) for name in LBFGS)
    return (math.inf if math.isinf(ours) else ours / theirs), best


def sine_numbers(runs: list[Trace]) -> dict[str, float]:
    """How many seeds fall below .1 within 50 iterations, and when they reach the floor."""
    below = [next((i for i, loss in enumerate(r.losses) if loss < 0.1), math.inf) for r in runs]
    return {
        "sine: seeds below .1 within 50 iterations": sum(i <= 50 for i in below),
        "sine: most iterations to below .1": max(below),
        "sine: seeds at the noise floor": sum(r.reached is not None for r in runs),
        "sine: median iterations to the floor": statistics.median(r.steps for r in runs),
    }


def ablation(problem: Problem, seeds: range) -> tuple[str, dict[str, float]]:
    """The improvements, one left out at a time: iterations to the target."""
    runs = {name: [train(method, problem, seed, budget=5.0, most=150) for seed in seeds] for name, method in ABLATIONS.items()}
    lines = [f"### {problem.name}: what each improvement is worth, iterations to {problem.target:g} on {len(seeds)} seeds", ""]
    lines += ["| method | reached | median | worst |", "|---|---|---|---|"]
    found = {}
    for name, several in runs.items():
        steps = [r.steps for r in several]
        found[f"{problem.name}, {name}: median iterations"] = statistics.median(steps)
        lines.append(f"| {name} | {sum(map(math.isfinite, steps))} of {len(steps)} | {statistics.median(steps):.0f} | {max(steps):.0f} |")
    return "\n".join(lines) + "\n", found


def run(quick: bool, figures: Path) -> dict[str, float]:
    """All problems, five seeds each (a quarter of an hour); quick: the sine, one table and the digits, in half a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _quick() if quick else _full(figures)
    finally:
        torch.set_num_threads(threads)


def _quick() -> dict[str, float]:
    problem, few = sine(), {name: METHODS[name] for name in ("Adam", "L-BFGS", "LM", "LM, improved")}
    runs = compare(problem, few, range(5), budget=1.0)
    print(table_of(problem, runs))
    found = sine_numbers(runs["LM, improved"])
    problem = digits("MLP", 400)
    runs = compare(problem, {name: METHODS[name] for name in ("L-BFGS", "Hessian-free", "LM")}, range(1), budget=15.0)
    print(table_of(problem, runs))
    return found | {"digits MLP: iterations of LM": runs["LM"][0].steps, "digits MLP: iterations of Hessian-free": runs["Hessian-free"][0].steps}


def _full(figures: Path) -> dict[str, float]:
    from paper_repro.levenberg_marquardt import drawing

    found: dict[str, float] = {}
    makers = {
        "sine": (sine, 5, 3.0),
        "yacht": (lambda: table("yacht", 5e-4, sgd=0.3), 5, 3.0),
        "energy": (lambda: table("energy", 2e-3, sgd=0.1), 5, 3.0),
        "vehicle": (lambda: classes("vehicle", 0.1), 5, 3.0),
        "digits MLP": (lambda: digits("MLP"), 3, 20.0),
        "digits CNN": (lambda: digits("CNN"), 3, 12.0),
    }
    everything: dict[str, Runs] = {}
    for name, (make, seeds, budget) in makers.items():
        try:
            problem = make()
        except DatasetUnavailable as error:
            print(f"{name} left out: {error}\n")
            continue
        runs = everything[name] = compare(problem, METHODS, range(seeds), budget)
        print(table_of(problem, runs), flush=True)
        factor, best = verdict(runs)
        found[f"{name}: seconds, best of ours over best L-BFGS"] = factor
        print(f"wall time to the target, {best} over the better L-BFGS: {factor:.2f}\n", flush=True)
        if name == "sine":
            found |= sine_numbers(runs["LM, improved"])
            drawing.convergence(problem, runs, NOISE, figures / "sine.png")
        else:
            found[f"{name}: iterations of LM"] = statistics.median(r.steps for r in runs["LM"])
            found[f"{name}: iterations of improved LM"] = statistics.median(r.steps for r in runs["LM, improved"])
    for problem in (sine(), digits("CNN", 400)):
        text, numbers = ablation(problem, range(5 if problem.name == "sine" else 3))
        print(text, flush=True)
        found |= numbers
    drawing.times(everything, figures / "times.png")
    found["problems where ours is no slower than L-BFGS"] = sum(v <= 1 for k, v in found.items() if k.endswith("best L-BFGS"))
    return found
