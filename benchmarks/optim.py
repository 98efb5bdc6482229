"""Gauss-Newton as an optimizer: products, Gram matrices, steps of every structure, and wall time to a target, beside peers in one run.

    python -m benchmarks.optim [--quick] [--no-peer] [--markdown] [--only products grams steps targets]

Products and steps are multiples of a *unit*, one gradient of the same net on the same batch, measured in the same process and in turns with it.
Each row is a process of its own with a limit on time and memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks._timing import answer, forget_peak, guarded, interleaved, machine, peak, ratio, resident, table

CLASSES, COLUMNS = 10, 16
MEMORY = 8.0  # GB a process may take


# -- nets and data -----------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Two encoder layers of width 64 over the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.out = nn.Linear(8, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(x)).mean(1))


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


SIZES = {
    "MLP": (64, 128, 128, CLASSES), "MLP 1k": (64, 16, CLASSES), "MLP 68k": (64, 216, 216, 32, CLASSES), "MLP 400k": (64, 584, 584, 32, CLASSES),
}  # fmt: skip


def build(net: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The net and the shape of a datum."""
    torch.manual_seed(0)
    if net == "Transformer":
        return Transformer().eval(), (8, 8)
    if net == "CNN":
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 28), nn.ReLU(), nn.Linear(28, CLASSES),
        ), (1, 28, 28)  # fmt: skip
    return mlp(*SIZES[net]), (64,)


class Case:
    """A net and one batch of noise: what a product costs does not depend on the data."""

    def __init__(self, o: dict[str, Any]) -> None:
        self.net, shape = build(o["net"])
        g = torch.Generator().manual_seed(0)
        self.x = torch.rand(o["rows"], *shape, generator=g)
        self.y = torch.randint(CLASSES, (o["rows"],), generator=g)
        self.weights = sum(p.numel() for p in self.net.parameters())

    def unit(self) -> None:
        """One gradient."""
        self.net.zero_grad()
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()

    def units(self, several: int) -> Callable[[], None]:
        """Several: one of a small net is too short to time."""
        return repeated(self.unit, several)


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function()

    return run


# -- jobs --------------------------------------------------------------------------------------------------------------


def _linearized(case: Case) -> tuple[Any, Any, Any, Any]:
    from bayesgn import likelihoods, rules
    from bayesgn._parameters import ParameterVector
    from bayesgn.ggn.linearization import Linearizer

    likelihood = likelihoods.Categorical()
    linearizer = Linearizer(case.net, ParameterVector.of(case.net, None))
    linearizer.prepare(case.x, likelihood.rows)
    lin = linearizer(case.x, likelihood.rows)
    with torch.no_grad():
        S = rules.GaussNewton().root(likelihood, lin.output, case.y, None)  # type: ignore[arg-type]
    return likelihood, linearizer, lin, S


def products(o: dict[str, Any]) -> dict[str, Any]:
    """H v in gradients, once all is prepared: ours by both engines, one column and many; the peers' ways."""
    from bayesgn.ggn.keeping import compact
    from bayesgn.ggn.products import FactorProducts, GraphProducts

    torch.backends.mha.set_fastpath_enabled(False)  # (the fused encoder has no forward mode: the peers would fail)
    case, several = Case(o), 4
    likelihood, linearizer, lin, S = _linearized(case)
    g = torch.Generator().manual_seed(1)
    v, V = torch.randn(case.weights, 1, generator=g), torch.randn(case.weights, COLUMNS, generator=g)
    graph = GraphProducts(linearizer, case.x, likelihood.rows, S, torch.float32)
    factors = FactorProducts(lin.blocks, [compact(f) for f in lin.factors(S)], torch.float32)

    contestants = {
        "unit": case.units(several),
        "graph": repeated(lambda: graph.rmatvec(graph.matvec(v)), several),
        "factors": repeated(lambda: factors.rmatvec(factors.matvec(v)), several),
        "factors, many": repeated(lambda: factors.rmatvec(factors.matvec(V)), several),
    }
    expected = graph.rmatvec(graph.matvec(v))
    gap = float((factors.rmatvec(factors.matvec(v)) - expected).abs().max() / expected.abs().max())
    failed = {}
    for name, make in PEERS.items() if o["peer"] else ():
        try:
            product = make(case, v)
            gap = max(gap, float((product() - expected[:, 0]).abs().max() / expected.abs().max()))
            contestants[name] = repeated(product, several)
        except Exception as error:  # a peer that cannot is a cell of the table
            failed[name] = str(error).splitlines()[0][:80]
    found = interleaved(contestants, o["repeats"], 120)
    costs = {name: ratio(s, found["unit"]) for name, s in found.items() if name != "unit"}
    costs["factors, many"] /= COLUMNS
    return {"costs": costs, "gap": gap, "weights": case.weights, "failed": failed}


def _by_torch_func(case: Case, v: Tensor) -> Callable[[], Tensor]:
    """jvp, Λ, vjp anew for each product."""
    from torch.func import functional_call, jvp, vjp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = {k: p.detach() for k, p in case.net.named_parameters()}
    tangent = _shaped(v, weights)

    def f(w: dict[str, Tensor]) -> Tensor:
        return functional_call(case.net, w, (case.x,))

    def product() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out, Jv = cast(Any, jvp(f, (weights,), (tangent,)))
            _, back = cast(Any, vjp(f, weights))
            return torch.cat([t.reshape(-1) for t in back(_softmax_curvature(out, Jv))[0].values()])

    return product


def _by_linearize(case: Case, v: Tensor) -> Callable[[], Tensor]:
    """torch.func.linearize and one vjp, both kept."""
    from torch.func import functional_call, linearize, vjp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = {k: p.detach() for k, p in case.net.named_parameters()}
    tangent = _shaped(v, weights)
    with sdpa_kernel(SDPBackend.MATH):
        out, push = linearize(lambda w: functional_call(case.net, w, (case.x,)), weights)
        _, back = cast(Any, vjp)(lambda w: functional_call(case.net, w, (case.x,)), weights)
    return lambda: torch.cat([t.reshape(-1) for t in back(_softmax_curvature(out, push(tangent)))[0].values()])


def _by_curvlinops(case: Case, v: Tensor) -> Callable[[], Tensor]:
    from curvlinops import GGNLinearOperator
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights: Any = dict(case.net.named_parameters())
    loss, data = nn.CrossEntropyLoss(reduction="sum"), [(case.x, case.y)]

    def product() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return operator @ v[:, 0]

    try:
        operator: Any = GGNLinearOperator(case.net, loss, weights, data, check_deterministic=False)
        product()
    except (TypeError, AttributeError):  # the interface of earlier versions
        operator = GGNLinearOperator(case.net, loss, list(weights.values()), data, check_deterministic=False)
    return product


PEERS: dict[str, Callable[[Case, Tensor], Callable[[], Tensor]]] = {
    "torch.func jvp + vjp": _by_torch_func, "torch.func linearize + vjp, kept": _by_linearize, "curvlinops": _by_curvlinops,
}  # fmt: skip


def _softmax_curvature(out: Tensor, u: Tensor) -> Tensor:
    p = out.softmax(-1)
    return p * u - p * (p * u).sum(-1, keepdim=True)


def _shaped(v: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = v[:, 0].split([w.numel() for w in weights.values()])
    return {k: part.view_as(w) for (k, w), part in zip(weights.items(), parts, strict=True)}


def gram(o: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of J Jᵀ [n c, n c]: from a and δ, or through J by jacrev."""
    from bayesgn.ggn.dual import FactorRows

    case = Case(o)
    case.unit()

    def ours() -> Tensor:
        _, linearizer, lin, _ = _linearized(case)
        rows = FactorRows(lin.blocks, lin.factors(None), torch.float32)
        one = torch.ones(())
        return sum(rows.gram(i, one) for i in range(len(lin.blocks)))  # type: ignore[return-value]

    def through_J() -> Tensor:
        from torch.func import functional_call, jacrev

        weights = {k: p.detach() for k, p in case.net.named_parameters()}
        J = jacrev(lambda w: functional_call(case.net, w, (case.x,)))(weights)
        J = torch.cat([t.flatten(0, 1).flatten(1) for t in J.values()], 1)  # type: ignore[union-attr]
        return J @ J.mT

    chosen = ours if o["who"] == "ours" else through_J
    if o["who"] == "ours":
        small = Case({**o, "rows": 4})
        case, keep = small, case
        difference = float((ours() - through_J()).abs().max() / ours().abs().max())
        case = keep
    else:
        difference = 0.0
        from torch import func  # noqa: F401
    before = resident()
    forget_peak()
    chosen()
    memory = (peak() - before) / 1e6
    found = interleaved({"it": chosen}, o["repeats"], 20)
    return {"seconds": found["it"].cpu, "memory": memory, "difference": difference, "weights": case.weights}


def step(o: dict[str, Any]) -> dict[str, Any]:
    """One step of GaussNewton in gradients: linearise, keep H, solve, try."""
    from bayesgn import ggn, likelihoods, optim

    case, several = Case(o), 8
    structure = ggn.MatrixFree(tol=1e-9, iterations=10) if o["structure"] == "MatrixFree" else getattr(ggn, o["structure"])
    # A damping so high that the weights hardly move: all steps cost the same.
    opt = optim.GaussNewton(case.net, likelihoods.Categorical(), structure=structure, damping=optim.Constant(1e3))
    found = interleaved({"it": lambda: opt.step(case.x, case.y), "unit": case.units(several)}, o["repeats"], 60)
    return {"ratio": ratio(found["it"], found["unit"]) * several, "milliseconds": 1e3 * found["it"].cpu, "weights": case.weights}


def target(o: dict[str, Any]) -> dict[str, Any]:
    """Median seconds to the target of one problem, methods in turns, and how many seeds reached it."""
    from paper_repro.levenberg_marquardt import problems
    from paper_repro.levenberg_marquardt.methods import METHODS, train

    make = {
        "sine": problems.sine,
        "yacht": lambda: problems.table("yacht", 5e-4, sgd=0.3),
        "energy": lambda: problems.table("energy", 2e-3, sgd=0.1),
        "vehicle": lambda: problems.classes("vehicle", 0.05),
        "digits MLP": lambda: problems.digits("MLP"),
        "digits CNN": lambda: problems.digits("CNN"),
    }[o["problem"]]
    problem = make()
    slow = {"LM", "LM, improved"} if o["problem"] == "digits MLP" else set()  # ten seconds a run: see paper_repro
    names = [n for n in ("Adam", "L-BFGS", "L-BFGS, strong Wolfe", "Hessian-free", "LM", "LM, improved") if n not in slow]
    runs: dict[str, list[Any]] = {n: [] for n in names}
    for seed in range(o["seeds"]):
        for name in names:
            runs[name].append(train(METHODS[name], problem, seed, o["budget"]))
    return {
        "seconds": {n: statistics.median(r.time for r in several) for n, several in runs.items()},
        "reached": {n: sum(r.reached is not None for r in several) for n, several in runs.items()},
        "target": problem.target,
        "data": len(problem.x),
    }


JOBS = {"products": products, "gram": gram, "step": step, "target": target}


# -- the tables --------------------------------------------------------------------------------------------------------


class Run:
    """Runs the jobs and collects tables."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.repeats = options, 5 if options.quick else 15
        self.tables: list[tuple[str, list[tuple[str, ...]]]] = []

    def job(self, name: str, **o: Any) -> dict[str, Any]:
        o = {"name": name, "repeats": self.repeats, "peer": self.options.peer, **o}
        answer = guarded("benchmarks.optim", o, seconds=600, gigabytes=MEMORY)
        print(f"  {name} {o.get('net', o.get('problem', ''))} {o.get('structure', o.get('who', ''))}: {answer}", flush=True)
        return answer

    def products(self) -> None:
        ours = ("double backward", "factors", f"factors, {COLUMNS} columns at once")
        rows: list[tuple[str, ...]] = [("net", "weights, rows", "target", *ours, *PEERS, "met?")]
        for net, count, limit in (("MLP", 512, 1.1), ("CNN", 128, 1.1), ("Transformer", 128, 1.6)):
            a = self.job("products", net=net, rows=count)
            if "error" in a:
                rows.append((net, f"{count}", f"≤ {limit}", a["error"]))
                continue
            c = a["costs"]
            peers = [f"{c[p]:.2f}" if p in c else a["failed"].get(p, "not run") for p in PEERS]
            best = min(c["graph"], c["factors"])
            rows.append(
                (net, f"{a['weights']:,}, {count}", f"≤ {limit}", *(f"{c[k]:.2f}" for k in ("graph", "factors", "factors, many")), *peers,
                 "yes" if best <= limit else "**no**")
            )  # fmt: skip
        self.tables.append(("Products H v, repeated at one point (gradients)", rows))

    def grams(self) -> None:
        rows: list[tuple[str, ...]] = [("net", "weights", "rows × outputs", "through J: seconds, MB", "ours: seconds, MB", "faster, leaner", "met?")]
        for net, count in (("MLP 68k", 128), ("MLP 400k", 128)):
            ours, theirs = (self.job("gram", net=net, rows=count, who=who) for who in ("ours", "J"))
            if "error" in ours or "error" in theirs:
                rows.append((net, "", f"{count} × {CLASSES}", theirs.get("error", ""), ours.get("error", ""), "", "**no**"))
                continue
            fast, lean = theirs["seconds"] / ours["seconds"], theirs["memory"] / max(ours["memory"], 0.1)
            rows.append(
                (net, f"{ours['weights']:,}", f"{count} × {CLASSES}", f"{theirs['seconds']:.2f}, {theirs['memory']:,.0f}",
                 f"{ours['seconds']:.3f}, {ours['memory']:,.0f}", f"{fast:.0f}×, {lean:.0f}×", "yes" if min(fast, lean) >= 10 else "**no**")
            )  # fmt: skip
        self.tables.append(("Gram matrix J Jᵀ of all outputs", rows))

    def steps(self) -> None:
        structures = ("Identity", "Diag", "Kron", "Layerwise", "Full", "Gram", "MatrixFree")
        rows: list[tuple[str, ...]] = [("net, batch", "weights", *(s + (" (10 products)" if s == "MatrixFree" else "") for s in structures))]
        for net, count, left_out in (("MLP 1k", 64, ()), ("MLP", 64, ("Layerwise", "Full")), ("CNN", 64, ("Layerwise", "Full"))):
            answers = {s: self.job("step", net=net, rows=count, structure=s) for s in structures if s not in left_out}
            weights = max(a.get("weights", 0) for a in answers.values())
            found = [answers.get(s, {"error": "–"}) for s in structures]
            cells = [a.get("error") or f"{a['ratio']:.0f} ({a['milliseconds']:.1f} ms)" for a in found]
            rows.append((f"{net}, {count}", f"{weights:,}", *cells))
        self.tables.append(("A step of GaussNewton (gradients, and CPU milliseconds)", rows))

    def targets(self) -> None:
        names = ("Adam", "L-BFGS", "L-BFGS, strong Wolfe", "Hessian-free", "LM", "LM, improved")
        rows: list[tuple[str, ...]] = [("problem, target", *names, "best of the last three over best L-BFGS")]
        for problem in ("sine", "yacht", "energy", "vehicle", "digits MLP", "digits CNN"):
            seeds, budget = (3, 12.0) if problem.startswith("digits") else (3 if self.options.quick else 5, 3.0)
            a = self.job("target", problem=problem, seeds=seeds, budget=budget)
            if "error" in a:
                rows.append((problem, a["error"]))
                continue
            s = a["seconds"]
            cells = [f"{s[n]:.3f}" if n in s and math.isfinite(s[n]) else f"{a['reached'][n]} of {seeds} seeds" if n in s else "–" for n in names]
            ours, theirs = (min(s.get(n, math.inf) for n in part) for part in (names[3:], names[1:3]))
            verdict = "**not reached**" if math.isinf(ours) else "only ours" if math.isinf(theirs) else f"{ours / theirs:.2f}"
            rows.append((f"{problem}, {a['target']:g}", *cells, verdict))
        self.tables.append(("Seconds to a target, all data at once (medians over seeds)", rows))

    def all(self) -> None:
        for figure in (self.products, self.grams, self.steps, self.targets):
            if not self.options.only or figure.__name__ in self.options.only:
                figure()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optim", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and seeds")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="run torch.func and curvlinops beside ours")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--only", nargs="+", metavar="FIGURE", help="products grams steps targets")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.job:
        answer(options.job, JOBS)
        return
    start = time.perf_counter()
    run = Run(options)
    run.all()
    print(f"\n{machine()}; {(time.perf_counter() - start) / 60:.0f} minutes")
    for title, rows in run.tables:
        print(f"\n### {title}\n\n{table(rows, options.markdown)}")


if __name__ == "__main__":
    main()
