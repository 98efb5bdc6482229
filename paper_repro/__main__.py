"""python -m paper_repro list | run NAME … [--quick] [--no-check] [--figures FOLDER]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib

from bayesgn.datasets import DatasetUnavailable
from paper_repro import frame


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m paper_repro", description="Reproductions of the seed papers.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the reproductions")
    run = verbs.add_parser("run", help="run some of them and compare with their expected numbers")
    run.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(frame.names())}, or all")
    run.add_argument("--quick", action="store_true", help="a small version, under a minute each; its figures are thrown away unless --figures is given")
    run.add_argument("--no-check", action="store_true", help="do not compare with expected.json")
    run.add_argument("--figures", type=Path, help="where figures go; the reproduction's own folder unless given")
    arguments = parser.parse_args()
    if arguments.verb == "list":
        width = max(map(len, frame.names()))
        print("\n".join(f"{name:<{width}}  {frame.title(name)}" for name in frame.names()))
        return 0
    chosen = frame.names() if arguments.names == ["all"] else arguments.names
    unknown = [name for name in chosen if name not in frame.names()]
    if unknown:
        parser.error(f"no reproduction {', '.join(unknown)}; there are {', '.join(frame.names())}")
    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=UserWarning, module="bayesgn")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as thrown_away:
        for name in chosen:
            print(f"## {name}: {frame.title(name)}\n", flush=True)
            figures = arguments.figures or (Path(thrown_away) if arguments.quick else frame.HERE / name / "figures")
            try:
                found, seconds = frame.run(name, arguments.quick, figures)
            except DatasetUnavailable as error:
                print(f"left out: {error}\n")
                continue
            off = [] if arguments.no_check else frame.check(frame.expected(name, arguments.quick), found)
            wrong += [f"{name}: {line}" for line in off]
            verdict = "not compared" if arguments.no_check else "as expected" if not off else "; ".join(off)
            print(f"\n{name}: {seconds:.0f} s, {verdict}\n", flush=True)
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
