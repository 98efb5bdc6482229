"""The loss squares at every step in a wide net; a regression on images by mini-batches, beside SGD and Adam."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from bayesgn.datasets import DatasetUnavailable
from paper_repro.gram_gauss_newton import images, wide

TITLE = "Cai et al. (2019): Gram-Gauss-Newton converges quadratically in wide nets, and trains image regressors in few epochs"

LR = {"GGN": 0.5, "SGD": 0.1, "Adam": 0.01}  # the best of a grid on seed 0


def run(quick: bool, figures: Path) -> dict[str, float]:
    """Widths from 50 to 4,000 and three seeds of the regression (three minutes); quick: two widths, one short training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = full_batch((200, 1000) if quick else (50, 200, 1000, 4000), range(2 if quick else 5), figures, draw=not quick)
        try:
            found |= mini_batches(figures, quick)
        except DatasetUnavailable as error:
            print(f"the regression on images is left out: {error}")
        return found
    finally:
        torch.set_num_threads(threads)


def full_batch(widths: tuple[int, ...], seeds: range, figures: Path, draw: bool) -> dict[str, float]:
    """Orders and constants of convergence by width."""
    print(f"### Full batch: {wide.DATA} random labels, float64\n")
    print("| width | loss after 0, 1, 2, 3 steps | order | C | weights moved by |\n|---|---|---|---|---|")
    found, shown = {}, {}
    for width in widths:
        runs = [wide.gram_gauss_newton(width, seed) for seed in seeds]
        order, C, moved = (statistics.median(v) for v in ([r.order() for r in runs], [r.constant() for r in runs], [r.moved for r in runs]))
        losses = [statistics.median(column) for column in zip(*(r.losses for r in runs))]
        shown[f"GGN, {width} wide"] = losses
        print(f"| {width} | {', '.join(f'{v:.1e}' for v in losses[:4])} | {order:.2f} | {C:.2g} | {100 * moved:.2g} % |")
        found |= {f"width {width}: order": order, f"width {width}: C": C, f"width {width}: moved": moved, f"width {width}: loss after 3 steps": losses[3]}
    width = 1000
    for λ in (1e-4, 1e-3):
        losses = [statistics.median(column) for column in zip(*(wide.gram_gauss_newton(width, seed, damping=λ).losses for seed in seeds))]
        shown[f"GGN, {width} wide, damping {λ:g}"] = losses
        found[f"width {width}, damping {λ:g}: loss after 8 steps"] = losses[8]
    steps = 1000
    descent = [statistics.median(column) for column in zip(*(wide.gradient_descent(width, seed, steps).losses for seed in seeds))]
    found[f"width {width}: loss after {steps} steps of gradient descent"] = descent[-1]
    print(f"\ngradient descent with steps of 1/λ_max, width {width}: {descent[8]:.1e} after 8 steps, {descent[-1]:.1e} after {steps}\n", flush=True)
    shown["gradient descent"] = descent[:9]
    if draw:
        from paper_repro.gram_gauss_newton import drawing

        drawing.full_batch(shown, wide.ROUNDING, figures / "quadratic.png")
    return found


def mini_batches(figures: Path, quick: bool) -> dict[str, float]:
    """Held-out errors at equal epochs, and at equal time."""
    data = images.turned(1000 if quick else 4000)
    short, long = (3, 10) if quick else (6, 24)
    contestants = [("GGN", short), ("SGD", short), ("Adam", short), ("SGD", long), ("Adam", long)] + ([] if quick else [("GGN", 2 * short)])
    runs: dict[tuple[str, int], list[images.Training]] = {c: [] for c in contestants}
    for seed in range(1 if quick else 3):
        for method, epochs in contestants:
            runs[method, epochs].append(images.train(method, data, seed, epochs, LR[method]))
    print(f"### Turned digits: {len(data[0])} images, batches of 128\n")
    print("| method | epochs | CPU seconds | training error | held-out error |\n|---|---|---|---|---|")
    found = {}
    for (method, epochs), several in runs.items():
        seconds, train, test = (statistics.median(getattr(r, key)[-1] for r in several) for key in ("seconds", "train", "test"))
        print(f"| {method} | {epochs} | {seconds:.1f} | {train:.1f}° | {test:.1f}° |")
        found |= {f"{method}, {epochs} epochs: held-out degrees": test, f"{method}, {epochs} epochs: seconds": seconds}
    found["seconds of an epoch, GGN over SGD"] = found[f"GGN, {short} epochs: seconds"] / found[f"SGD, {short} epochs: seconds"]
    print(f"\nan epoch of GGN costs {found['seconds of an epoch, GGN over SGD']:.1f} of SGD's\n", flush=True)
    if not quick:
        from paper_repro.gram_gauss_newton import drawing

        drawing.mini_batches(runs, figures / "images.png")
    return found
