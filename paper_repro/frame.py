"""What all reproductions share: how they are found, run, and compared with their expected numbers.

A reproduction is a folder with ``run.py`` (``TITLE``, and ``run(quick, figures) -> {name: number}``), ``expected.json``, a README and its figures.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names() -> list[str]:
    """The folders that hold a reproduction."""
    return sorted(path.parent.name for path in HERE.glob("*/run.py"))


def title(name: str) -> str:
    """The one line a reproduction says of itself, read without running it."""
    for node in ast.parse((HERE / name / "run.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TITLE":
            return ast.literal_eval(node.value)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TITLE" and node.value is not None:
            return ast.literal_eval(node.value)
    raise ValueError(f"paper_repro/{name}/run.py has no TITLE = '…' at its top level.")


def expected(name: str, quick: bool) -> dict[str, dict[str, float]]:
    """What a run should find: ``{"full": {number: rule}, "quick": {…}}`` with rules ``value`` and ``rtol`` or ``atol``, ``min``, ``max``."""
    return json.loads((HERE / name / "expected.json").read_text()).get("quick" if quick else "full", {})


def check(rules: Mapping[str, Mapping[str, float]], found: Mapping[str, float]) -> list[str]:
    """One line for every number that is not as expected."""
    wrong = []
    for key, rule in rules.items():
        unknown = set(rule) - {"value", "rtol", "atol", "min", "max"}
        if unknown or not rule or ("value" in rule) != bool({"rtol", "atol"} & set(rule)):
            raise ValueError(f"expected.json says {dict(rule)} of {key!r}; it knows value with rtol or atol, min and max.")
        value = found.get(key, math.nan)
        if key not in found:
            wrong.append(f"{key} was not computed")
        elif "value" in rule and not abs(value - rule["value"]) <= rule.get("atol", 0.0) + rule.get("rtol", 0.0) * abs(rule["value"]):
            off = " ± ".join([f"{rule['value']:g}", *(f"{rule[k]:g}" for k in ("atol",) if k in rule), *(f"{100 * rule[k]:g} %" for k in ("rtol",) if k in rule)])
            wrong.append(f"{key} is {value:.5g}, expected {off}")
        elif "min" in rule and not value >= rule["min"]:
            wrong.append(f"{key} is {value:.5g}, expected at least {rule['min']:g}")
        elif "max" in rule and not value <= rule["max"]:
            wrong.append(f"{key} is {value:.5g}, expected at most {rule['max']:g}")
    return wrong


def run(name: str, quick: bool, figures: Path) -> tuple[dict[str, float], float]:
    """The numbers of one reproduction, and its seconds."""
    if name not in names():
        raise ValueError(f"there is no reproduction {name!r}; there are {', '.join(names())}.")
    module: Any = importlib.import_module(f"paper_repro.{name}.run")
    figures.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = module.run(quick, figures)
    return {k: float(v) for k, v in found.items()}, time.perf_counter() - began
