"""The experiments of Wilkinson et al. in one run; ``python -m paper_repro.bayes_newton`` runs them one by one."""

from __future__ import annotations

from pathlib import Path

from bayesgn import rules
from bayesgn.datasets import DatasetUnavailable
from paper_repro.bayes_newton import banana, coal, common, motorcycle, product, regression_network

TITLE = "Wilkinson, Särkkä and Solin (2023): Newton, VI, power EP and PL as one update, with PSD guarantees"

EXPERIMENTS = {"motorcycle": motorcycle, "coal": coal, "banana": banana, "product": product, "regression_network": regression_network}


def run(quick: bool, figures: Path) -> dict[str, float]:
    """All experiments (half an hour), or variational inference on one fold of the motorcycle data."""
    if quick:
        record, _ = motorcycle.fit(rules.Variational(), 0, 150)
        energy, nlpd = record.last
        print(f"motorcycle, fold 0, VI with Gauss-Newton, 150 steps: −log evidence {energy:.2f}, NLPD {nlpd:.3f}")
        return {"energy": energy, "NLPD": nlpd}
    common.FIGURES = figures
    found: dict[str, float] = {}
    for name, experiment in EXPERIMENTS.items():
        try:
            text, numbers = experiment.reproduce()
        except DatasetUnavailable as error:
            print(f"{name} left out: {error}")
            continue
        print(f"### {name}\n\n{text}\n", flush=True)
        found |= {f"{name}: {key}": value for key, value in numbers.items()}
    return found
