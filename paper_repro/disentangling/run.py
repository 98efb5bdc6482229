"""All experiments in one run: classification tables, toys, evidence against validation data, images."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

TITLE = "Immer (2020); Immer, Korzepa and Bauer (2021): what Gauss-Newton and what inference contribute to Bayesian networks"

PARTS = ("classification", "toys", "evidence", "images")


def run(quick: bool, figures: Path) -> dict[str, float]:
    """The numbers of all parts, each under a name that begins with its part's."""
    found: dict[str, float] = {}
    for part in PARTS:
        name = f"paper_repro.disentangling.{part}"
        if importlib.util.find_spec(name) is None:
            print(f"{part}: not there yet, left out")
            continue
        print(f"\n## {part}\n", flush=True)
        found |= importlib.import_module(name).run(quick, figures)
    return found
