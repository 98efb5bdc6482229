"""Gaussian processes over time: filter, smoother and training steps, ours beside peers and a JAX reference.

    python -m benchmarks.state_space [--quick] [--markdown] [--reference PYTHON] [--only FIGURE ...]

CPU milliseconds on one thread, medians of repeats that go in turns with what they are compared with; every row is a process of its own. The kernel is
Matern-5/2 (three states) in float64, with ten points a lengthscale, on a regular grid or at irregular times. The JAX reference is the toolkit
BayesNewton: ``--reference`` (or the variable BAYESGN_REFERENCE) names a Python that can import it; without it its column stays empty.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._bayesnewton import series
from benchmarks._timing import answer, guarded, interleaved, machine, table

SIZES = (1_000, 10_000, 100_000, 1_000_000)
DENSE = 1_000  # points of the dense models
MEMORY = 8.0  # GB a process may take


# -- models ------------------------------------------------------------------------------------------------------------


def kernel():
    import gpytorch

    k = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double()
    k.outputscale, k.base_kernel.lengthscale = 1.0, 1.0
    return k


def started(o: dict[str, Any]):
    """The prior belief, before any turn."""
    from bayesgn import likelihoods, models, rules

    t, y = (torch.from_numpy(a) for a in series(o["n"], o["grid"], o["likelihood"]))
    likelihood = {"poisson": likelihoods.Poisson, "bernoulli": likelihoods.Bernoulli}[o["likelihood"]]()
    return getattr(models, o["model"])(kernel()).start(likelihood, (t, y), rules.Variational())


def standing(o: dict[str, Any]):
    """Sites y, 1 of unit-noise regression: model, placed inputs, sites."""
    from bayesgn import models
    from bayesgn.rules import Sites

    t, y = (torch.from_numpy(a) for a in series(o["n"], o["grid"], "gaussian"))
    model = models.MarkovGP(kernel())
    return model, model.place(t[:, None]), Sites(y[:, None], torch.ones(o["n"], 1, 1, dtype=torch.float64))


# -- jobs: each runs in a process of its own and answers with numbers --------------------------------------------------


def smooth(o: dict[str, Any]) -> dict[str, Any]:
    """Filter and smoother of both engines over given transitions, with adjoints, and of the model with all that goes before."""
    from bayesgn import _kalman
    from bayesgn._kalman import scan

    model, inputs, sites = standing(o)
    with torch.no_grad():
        chain = model.chain(inputs)
    moving = chain._replace(A=chain.A.clone().requires_grad_(), Q=chain.Q.clone().requires_grad_())

    def value(engine):
        with torch.no_grad():
            engine.smooth(chain, *sites[:2])

    def whole() -> None:
        with torch.no_grad():
            model.solve(inputs, sites)

    functions: dict[str, Callable[[], Any]] = {
        "compiled": lambda: value(_kalman),
        "of log Z": lambda: _kalman.smooth(moving, *sites[:2])[0].backward(),
        "of all": lambda: sum(t.sum() for t in _kalman.smooth(moving, *sites[:2])).backward(),
        "whole": whole,
    }
    if o["scan"]:
        functions["scan"] = lambda: value(scan)
    log_Z, mean, _ = _kalman.smooth(chain, *sites[:2])
    y = sites.nat1
    answer = milliseconds(functions, o)
    # As the density of the targets under unit noise, which is what the reference says.
    answer["log_Z"] = float(log_Z) - 0.5 * float((y**2).sum()) - 0.5 * o["n"] * math.log(2 * math.pi)
    answer["mean"] = float(mean[o["n"] // 2])
    return answer


def train(o: dict[str, Any]) -> dict[str, Any]:
    """A turn of variational inference, then the bound and its gradient in the hyper-parameters; the bound after ten turns."""
    belief = started(o)
    for _ in range(10):
        belief, _ = belief.turn()

    def step() -> torch.Tensor:
        new, _ = belief.with_sites(belief.sites).turn()
        value = new.log_evidence()
        new.model.zero_grad()
        value.backward()
        return value

    def turn() -> None:
        belief.with_sites(belief.sites).turn()

    return milliseconds({"step": step, "turn": turn}, o) | {"evidence": float(belief.log_evidence().detach())}


def gaussian(o: dict[str, Any]) -> dict[str, Any]:
    """The log evidence of a regression with its gradient: ours, Pyro's Matern process (regular grids), gpytorch's exact GP (few data)."""
    import gpytorch
    from pyro.contrib.timeseries import IndependentMaternGP

    n = o["n"]
    t, y = (torch.from_numpy(a) for a in series(n, o["grid"], "gaussian"))
    model, inputs, sites = standing(o)

    def ours() -> None:
        model.zero_grad()
        model.solve(inputs, sites).log_Z.backward()

    functions: dict[str, Callable[[], Any]] = {"ours": ours}
    ones = torch.ones(1, dtype=torch.float64)
    pyro_model = IndependentMaternGP(2.5, 0.1, 1, ones, ones, ones).double()

    def pyro() -> None:
        pyro_model.zero_grad()
        pyro_model.log_prob(y[:, None]).sum().backward()

    if o["grid"] == "regular":
        functions["pyro"] = pyro

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(t, y, likelihood)
            self.mean, self.kernel = gpytorch.means.ZeroMean(), kernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 1.0
    exact = Exact(likelihood).train()

    def dense() -> None:
        exact.zero_grad()
        with gpytorch.settings.fast_computations(False, False, False):
            likelihood(exact(t)).log_prob(y).backward()

    if n <= 2 * DENSE:
        functions["gpytorch"] = dense
    return milliseconds(functions, o)


def gpytorch_variational(o: dict[str, Any]) -> dict[str, Any]:
    """gpytorch's nearest to a dense variational step: its bound with inducing points at the data, and the gradient in everything."""
    import gpytorch

    t, y = (torch.from_numpy(a) for a in series(o["n"], "irregular", "bernoulli"))
    t = t[:, None]

    class Approximate(gpytorch.models.ApproximateGP):
        def __init__(self):
            q = gpytorch.variational.NaturalVariationalDistribution(len(t))
            super().__init__(gpytorch.variational.UnwhitenedVariationalStrategy(self, t, q, learn_inducing_locations=False))
            self.mean, self.kernel = gpytorch.means.ZeroMean(), kernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    model, likelihood = Approximate().double().train(), gpytorch.likelihoods.BernoulliLikelihood().double()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, len(t))

    def step() -> None:
        model.zero_grad()
        with gpytorch.settings.fast_computations(False, False, False):
            bound(model(t), y).backward()

    return milliseconds({"step": step}, o)


def milliseconds(functions: dict[str, Callable[[], Any]], o: dict[str, Any]) -> dict[str, Any]:
    return {name: 1e3 * s.cpu for name, s in interleaved(functions, o["repeats"], o["budget"]).items()}


JOBS = {f.__name__: f for f in (smooth, train, gaussian, gpytorch_variational)}


# -- the table ---------------------------------------------------------------------------------------------------------


class Run:
    """Rows of the table, each from jobs in processes of their own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[tuple[str, ...]] = []
        self.notes: list[str] = []
        self.sizes = SIZES[:-1] if options.quick else SIZES

    def job(self, name: str, **o: Any) -> dict[str, Any]:
        quick = self.options.quick
        o = {"name": name, "repeats": 5 if quick else 15, "budget": 20 if quick else 60} | o
        answer = guarded("benchmarks.state_space", o, 600, MEMORY)
        return self.said(name, o, answer)

    def reference(self, name: str, **o: Any) -> dict[str, Any]:
        """The same by the JAX reference."""
        if not self.options.reference:
            return {"error": "not run"}
        o = {"name": name, "repeats": 5 if self.options.quick else 11} | o
        script = str(Path(__file__).with_name("_bayesnewton.py"))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                [self.options.reference, script, json.dumps(o)], capture_output=True, text=True, env=environment, timeout=900
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": str(error)[:80]}
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:80]}
        return self.said("reference " + name, o, json.loads(lines[-1]))

    def said(self, name: str, o: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        label = " ".join(str(o[k]) for k in ("model", "likelihood", "grid", "n") if k in o)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in answer.items())
        print(f"  {name} {label}: {shown}", flush=True)
        return answer

    def row(self, what: str, target: str, other: str, ours: str, met: bool | None) -> None:
        self.rows.append((what, target, other, ours, "–" if met is None else "yes" if met else "**no**"))

    # One method a figure.

    def filters(self) -> None:
        per_point = {}
        for grid in ("regular", "irregular"):
            for n in self.sizes:
                ours = self.job("smooth", n=n, grid=grid, scan=n <= 100_000)
                if "error" in ours:
                    self.row(f"filter + smoother, {grid}, n = {n:,}", "", "", ours["error"], False)
                    continue
                other = self.reference("smooth", n=n, grid=grid) if n <= 100_000 else {"error": "not run"}
                per_point[grid, n] = ours["compiled"] / n
                shown = f"{ours['compiled']:.2f}; with transitions {ours['whole']:.2f}; scan " + _ms(ours, "scan")
                self.row(
                    f"filter + smoother, {grid}, n = {n:,}", "≥ 5× the reference", _of(other), shown,
                    5 * ours["compiled"] <= 1e3 * other["seconds"] if "seconds" in other else None,
                )  # fmt: skip
                self.row(
                    f"… with its adjoint, of log Z / of all, n = {n:,}", "", "", f"{ours['of log Z']:.2f} / {ours['of all']:.2f}", None
                )
                if "log_Z" in other:
                    self.agree(f"log Z, {grid}, n = {n:,}", ours["log_Z"], other["log_Z"])
        for grid in ("regular", "irregular"):
            if (grid, 10_000) in per_point and (grid, self.sizes[-1]) in per_point:
                growth = per_point[grid, self.sizes[-1]] / per_point[grid, 10_000]
                what = f"time a point, n = {self.sizes[-1]:,} against 10,000, {grid}"
                self.row(what, "linear: ≤ 1.5×", "", f"{growth:.2f}×", growth <= 1.5)

    def training(self) -> None:
        for likelihood in ("poisson", "bernoulli"):
            for grid in ("regular", "irregular"):
                for n in self.sizes[:3]:
                    o = {"n": n, "grid": grid, "likelihood": likelihood}
                    self.compare("variational step", o, "MarkovGP", "MarkovVariationalGP", "≥ 2× the reference")

    def dense(self) -> None:
        o = {"n": DENSE, "grid": "irregular", "likelihood": "poisson"}
        self.compare("dense variational step", o, "GP", "VariationalGP", "≥ 2× the reference")
        peer = self.job("gpytorch_variational", n=DENSE)
        ours = self.job("train", model="GP", **(o | {"likelihood": "bernoulli"}))
        met = ours["step"] <= peer["step"] if "step" in ours and "step" in peer else None
        self.row(f"dense variational step, bernoulli, n = {DENSE:,}, gpytorch", "faster", _ms(peer, "step"), _ms(ours, "step"), met)

    def compare(self, what: str, o: dict[str, Any], model: str, reference: str, target: str) -> None:
        ours, other = self.job("train", model=model, **o), self.reference("train", model=reference, **o)
        met = 2 * ours["step"] <= 1e3 * other["seconds"] if "step" in ours and "seconds" in other else None
        shown = f"{ours['step']:.2f} (the turn alone {ours['turn']:.2f})" if "step" in ours else ours["error"]
        title = f"{what}, {o['likelihood']}, {o['grid']}, n = {o['n']:,}"
        self.row(title, target, _of(other), shown, met)
        if "evidence" in ours and "evidence" in other:
            self.agree(f"bound, {title}", ours["evidence"], other["evidence"])

    def regression(self) -> None:
        for grid in ("regular", "irregular"):
            for n in (DENSE, 2 * DENSE, 10_000, 100_000):
                found = self.job("gaussian", n=n, grid=grid)
                peers = [f"{name} {found[name]:.1f}" for name in ("pyro", "gpytorch") if name in found]
                met = None
                if peers:
                    met = all(found["ours"] <= found[name] for name in ("pyro", "gpytorch") if name in found)
                self.row(
                    f"log evidence of a regression with gradient, {grid}, n = {n:,}", "faster", ", ".join(peers), _ms(found, "ours"), met
                )

    def agree(self, what: str, ours: float, other: float) -> None:
        self.notes.append(f"{what}: {ours:.6f} and {other:.6f}, relative difference {abs(ours - other) / abs(other):.1e}")

    def all(self) -> None:
        for figure in (self.filters, self.training, self.dense, self.regression):
            if not self.options.only or figure.__name__ in self.options.only:
                figure()


def _ms(answer: dict[str, Any], key: str) -> str:
    return f"{answer[key]:.2f}" if key in answer else answer.get("error", "–")


def _of(answer: dict[str, Any]) -> str:
    return f"{1e3 * answer['seconds']:.2f}" if "seconds" in answer else answer["error"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.state_space", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no million points")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument(
        "--reference", default=os.environ.get("BAYESGN_REFERENCE"), metavar="PYTHON", help="a Python that can import BayesNewton"
    )
    parser.add_argument("--only", nargs="+", metavar="FIGURE", help="filters training dense regression")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.job:
        answer(options.job, JOBS)
        return
    start = time.perf_counter()
    run = Run(options)
    run.all()
    print(f"\n{machine()}; {(time.perf_counter() - start) / 60:.0f} minutes\n")
    print(table([("what (ms)", "target", "reference / peers", "ours", "met?"), *run.rows], options.markdown, run.notes))


if __name__ == "__main__":
    main()
