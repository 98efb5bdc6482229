"""python -m paper_repro.bayes_newton [experiments …] [--check] [--folds N] [--steps N]"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings

import matplotlib

from bayesgn.datasets import DatasetUnavailable
from paper_repro import frame

EXPERIMENTS = ("motorcycle", "coal", "banana", "product", "regression_network")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], default=[], help="all unless given")
    parser.add_argument("--check", action="store_true", help="compare with expected.json; exit 1 where a number is off")
    parser.add_argument("--folds", type=int, help="folds; the experiment's own number unless given")
    parser.add_argument("--steps", type=int, help="steps; the experiment's own number unless given")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=UserWarning, module="bayesgn")
    options = {k: v for k in ("folds", "steps") if (v := getattr(arguments, k)) is not None}
    wrong = []
    for name in arguments.experiments or EXPERIMENTS:
        began = time.perf_counter()
        try:
            text, found = importlib.import_module(f"paper_repro.bayes_newton.{name}").reproduce(**options)
        except DatasetUnavailable as error:
            print(f"## {name}\n\nleft out: {error}\n")
            continue
        print(f"## {name}\n\n{text}\n\n{time.perf_counter() - began:.0f} s\n", flush=True)
        if arguments.check:
            rules = frame.expected("bayes_newton", quick=False)
            wrong += frame.check({k: r for k, r in rules.items() if k.startswith(f"{name}: ")}, {f"{name}: {k}": v for k, v in found.items()})
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
