"""Laplace on a trained network: ours beside laplace-torch, in one run.

    python -m benchmarks.laplace [--quick] [--no-peer] [--markdown] [--device cuda]

Every figure is a multiple of a *unit*, one plain forward + backward epoch over the same batches with the same net
(prediction: of a plain forward of the same points), measured in the same process, in turns with what it is compared with.
Each row of the table is a process of its own with a limit on time and memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._timing import answer, forget_peak, guarded, interleaved, machine, once, peak, ratio, resident, table

BATCH, POINTS, CLASSES = 128, 360, 10
PEERS = ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN")  # the first is the peer's default backend
MEMORY = 8.0  # GB a process may take


# -- nets and data -----------------------------------------------------------------------------------------------------


class Batches:
    """(x, y) batches cut once: what a loader costs is in nobody's figure."""

    def __init__(self, x: Tensor, y: Tensor, size: int = BATCH) -> None:
        self.dataset = torch.utils.data.TensorDataset(x, y)
        self.parts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def mlp(sizes: tuple[int, ...], bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d, c in zip(sizes, sizes[1:]):
        layers += [nn.Linear(d, c, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 28, bias=bias), nn.ReLU(), nn.Linear(28, CLASSES, bias=bias),
    )  # fmt: skip


def build(net: str, bias: bool = True) -> nn.Sequential:
    """``mlp`` 26,122 weights, ``small`` 3,466, ``cnn`` 49,022."""
    torch.manual_seed(0)
    if net == "cnn":
        return cnn(bias)
    return mlp((64, 128, 128, CLASSES) if net == "mlp" else (64, 32, 32, CLASSES), bias)


def load(net: str, quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, y to fit on and 360 points to predict: digits for the MLPs, MNIST for the CNN (noise where it is not to be had)."""
    from bayesgn import datasets

    if net != "cnn":
        d = datasets.digits(test_fraction=0.2)
        x, y, points = d.x_train, d.y_train, d.x_test
    else:
        try:
            d = datasets.mnist(n=5000)
            x, y, points = d.x_train, d.y_train, d.x_test
            x, points = (t.reshape(-1, 1, 28, 28) for t in (x, points))
        except datasets.DatasetUnavailable:
            g = torch.Generator().manual_seed(0)
            x = torch.rand(4000, 1, 28, 28, generator=g)
            y, points = torch.randint(CLASSES, (4000,), generator=g), torch.rand(POINTS, 1, 28, 28, generator=g)
        if quick:
            x, y = x[:1024], y[:1024]
    return x, y, points[:POINTS]


def train(net: nn.Module, data: Batches, epochs: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.zero_grad()
    net.eval()


class Case:
    """A trained net with its data, as every process finds it."""

    def __init__(self, o: dict[str, Any]) -> None:
        self.device = o.get("device", "cpu")
        x, y, points = load(o["net"], o.get("quick", False))
        dtype = torch.float64 if o.get("double") else torch.float32
        count = o.get("data", len(x))
        self.net = build(o["net"], o.get("bias", True)).to(dtype)
        x, points = x.to(dtype), points.to(dtype)
        weights = Path(o["folder"]) / f"{o['net']}-{o.get('bias', True)}.pt"
        if weights.exists():
            self.net.load_state_dict({k: v.to(dtype) for k, v in torch.load(weights, weights_only=True).items()})
        else:
            train(self.net, Batches(x, y), 3 if o["net"] == "cnn" else 20)
            torch.save(self.net.state_dict(), weights)
        self.net = self.net.eval().to(self.device)
        self.points = points.to(self.device)
        self.data = Batches(x[:count].to(self.device), y[:count].to(self.device))

    def unit(self) -> None:
        """A plain forward + backward epoch."""
        for x, y in self.data:
            self.net.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
        self.net.zero_grad()

    def forward(self) -> None:
        """A plain forward of the points to predict."""
        with torch.no_grad():
            self.net(self.points)


# -- the two contestants -----------------------------------------------------------------------------------------------


def our_fit(case: Case, structure: Any, monte_carlo: bool = False, prior: Any = None):
    import bayesgn as bgn
    from bayesgn import ggn, likelihoods, models, rules

    rule = rules.Laplace(rules.MonteCarloFisher()) if monte_carlo else None
    structure = getattr(ggn, structure) if isinstance(structure, str) else structure
    model = models.Network(case.net, structure=structure, prior=prior)
    return bgn.laplace(model, likelihoods.Categorical(), case.data, rule=rule, progress=False)


def peer_fit(case: Case, who: str, structure: str, monte_carlo: bool = False):
    import laplace
    from laplace import curvature

    options: dict[str, Any] = {"subset_of_weights": "all", "hessian_structure": structure}
    if who != "default":
        options["backend"] = getattr(curvature, who)
    if monte_carlo:
        options["backend_kwargs"] = {"stochastic": True}
    # BackPACK extends a net in place: every fit takes a copy.
    la = laplace.Laplace(copy.deepcopy(case.net), "classification", **options)
    la.fit(case.data)
    return la


def fit_of(case: Case, o: dict[str, Any]) -> Callable[[], Any]:
    monte_carlo = o.get("monte_carlo", False)
    if o["who"] == "ours":
        return lambda: our_fit(case, o["structure"], monte_carlo)
    return lambda: peer_fit(case, o["who"], o["structure"].lower(), monte_carlo)


def predict_of(case: Case, posterior: Any, o: dict[str, Any]) -> Callable[[], Tensor]:
    """Marginal covariance [n c c] of the linearised net at the points, all at once or in batches."""
    size = o.get("size", POINTS)
    parts = case.points.split(size)
    if o["who"] == "ours":
        return lambda: torch.cat([posterior(x).marginals()[1] for x in parts])
    return lambda: torch.cat([posterior._glm_predictive_distribution(x)[1] for x in parts])


# -- jobs: each runs in a process of its own and answers with numbers --------------------------------------------------


def fit(o: dict[str, Any]) -> dict[str, Any]:
    """Units of a fit."""
    case = Case(o)
    found = interleaved({"it": fit_of(case, o), "unit": case.unit}, o["repeats"], o["budget"], case.device)
    return _answer(found, case, "unit")


def predict(o: dict[str, Any]) -> dict[str, Any]:
    """Forwards of a prediction with a fitted posterior; the first call, which settles the posterior, is the warm-up."""
    case = Case(o)
    posterior = fit_of(case, o)()
    several = 5  # one forward of a small net is too short to time

    def forwards() -> None:
        for _ in range(several):
            case.forward()

    first = once(predict_of(case, posterior, o), case.device)
    found = interleaved(
        {"it": predict_of(case, posterior, o), "unit": forwards}, o["repeats"], o["budget"], case.device
    )
    answer = _answer(found, case, "unit", several)
    answer["first"] = ratio(first, found["unit"], case.device) * several
    return answer


def _answer(found: dict, case: Case, unit: str, several: int = 1) -> dict[str, Any]:
    return {
        "ratio": ratio(found["it"], found[unit], case.device) * several,
        "wall_ratio": found["it"].wall / found[unit].wall * several,
        "seconds": found["it"].cpu if case.device == "cpu" else found["it"].wall,
    }


def memory(o: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a fit and a prediction of one batch, beyond imports, net and data."""
    case = Case(o)
    from bayesgn import ggn, models  # noqa: F401  (imports are not in the figure)

    if o["who"] != "ours":
        import laplace  # noqa: F401
    case.data = Batches(*case.data.dataset[: o["rows"]])
    case.points = case.points[:BATCH]
    unit = _peak(case.unit)  # also: what torch takes for itself at a first backward
    posterior: list[Any] = []
    answer = {"unit": unit, "fit": _peak(lambda: posterior.append(fit_of(case, o)()))}
    if o["predict"]:
        answer["predict"] = _peak(lambda: predict_of(case, posterior[0], o)())
    return answer


def _peak(function: Callable[[], Any]) -> float:
    """MB."""
    before = resident()
    forget_peak()
    function()
    return (peak() - before) / 1e6


def tune_ours(o: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the eigendecomposition, of 100 evaluations with gradient, and of ``maximize_evidence`` to convergence."""
    import bayesgn as bgn
    from bayesgn.inference import evidence

    case = Case(o)
    posterior = our_fit(case, o["structure"])
    decomposition = once(lambda: posterior.curvature.spectrum(), case.device).wall
    start = posterior.prior.precision.item()
    parameters = evidence.tunable(posterior)
    with evidence.in_double(parameters):
        objective = evidence.spectral_objective(posterior, parameters)
        z = evidence.read(parameters)

        def hundred() -> None:
            for i in range(100):
                objective(z + 0.01 * i)

        steps = interleaved({"it": hundred}, o["repeats"], o["budget"], case.device)["it"].wall

    def whole() -> None:
        posterior.prior.precision = start
        traces.append(bgn.maximize_evidence(posterior, steps=100, progress=False))

    traces: list[Any] = []
    converge = interleaved({"it": whole}, o["repeats"], o["budget"], case.device)["it"].wall
    return {
        "decomposition": decomposition, "hundred": steps, "converge": converge, "steps": traces[-1].steps,
        "precision": posterior.prior.precision.item(), "evidence": posterior.log_evidence().item(),
    }  # fmt: skip


def tune_peer(o: dict[str, Any]) -> dict[str, Any]:
    """Seconds of 100 steps of the peer's own tuning (``--quick``: of 5, times 20)."""
    case = Case(o)
    la = peer_fit(case, o["who"], o["structure"].lower())
    steps = 5 if o.get("quick") else 100
    wall = once(lambda: la.optimize_prior_precision(method="marglik", n_steps=steps)).wall
    return {
        "hundred": wall * 100 / steps,
        "precision": la.prior_precision.mean().item(),
        "evidence": la.log_marginal_likelihood().item(),
    }


def low_rank(o: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the rank-400 posterior of all weights, and its evidence beside the exact dual's at two prior precisions."""
    import bayesgn as bgn
    from bayesgn import ggn, models

    case = Case(o)
    found: list[Any] = []
    seconds = once(lambda: found.append(our_fit(case, ggn.LowRank(rank=o["rank"]))), case.device)
    posterior = found[0]
    at = [1.0]
    bgn.maximize_evidence(posterior, progress=False)
    at.append(posterior.prior.precision.item())
    # A prior per layer makes the dual take one Cholesky factor instead of an eigendecomposition of thousands of rows.
    exact = our_fit(case, "Gram", prior=models.WeightPrior.per_layer(case.net))
    gaps = []
    for precision in at:
        posterior.prior.precision = precision
        exact.prior.precision = precision
        with torch.no_grad():
            gaps.append(posterior.log_evidence().item() - exact.log_evidence().item())
    return {"cpu": seconds.cpu, "seconds": seconds.wall, "gaps": gaps, "precisions": at, "data": len(case.data.dataset)}


def low_rank_peer(o: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the peer's own low-rank posterior (of the Hessian: it has none of the GGN)."""
    case = Case(o)
    return {"seconds": once(lambda: peer_fit(case, "default", "lowrank")).wall}


def agree(o: dict[str, Any]) -> dict[str, Any]:
    """Largest relative difference of the function covariances of the same Kron posterior.

    In float64 and on nets without biases, where the definitions coincide: the peer keeps the bias as a block of its own.
    """
    case = Case(o)
    ours = predict_of(case, our_fit(case, "Kron"), o | {"who": "ours"})()
    theirs = predict_of(case, peer_fit(case, o["who"], "kron"), o)()
    return {"difference": ((ours - theirs).abs().amax() / ours.abs().amax()).item()}


def prepare(o: dict[str, Any]) -> dict[str, Any]:
    """Train a net once, for all."""
    case = Case(o)
    return {"weights": sum(p.numel() for p in case.net.parameters()), "data": len(case.data.dataset)}


JOBS = {f.__name__: f for f in (fit, predict, memory, tune_ours, tune_peer, low_rank, low_rank_peer, agree, prepare)}


# -- the table ---------------------------------------------------------------------------------------------------------


class Run:
    """Rows of the table, each from jobs in processes of their own."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.folder = options, folder
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.notes: list[str] = []
        self.raw: dict[str, Any] = {}

    def job(self, name: str, seconds: float = 300, memory: float = MEMORY, **o: Any) -> dict[str, Any]:
        """The answer of a job; an error is an answer too."""
        quick = self.options.quick
        o = {"name": name, "folder": self.folder, "device": self.options.device, "quick": quick} | o
        o = {"repeats": 3 if quick else 9, "budget": 15 if quick else 60} | o
        start = time.perf_counter()
        answer = guarded("benchmarks.laplace", o, seconds, memory)
        label = " ".join(
            str(o[k]) for k in ("name", "net", "structure", "who", "size", "monte_carlo", "bias") if k in o
        )
        self.raw[label] = answer
        print(f"  {label}: {_short(answer)}  ({time.perf_counter() - start:.0f} s)", flush=True)
        return answer

    def row(self, what: str, target: str, peer: str, ours: str, met: bool | None) -> None:
        self.rows.append((what, target, peer, ours, "–" if met is None else "yes" if met else "**no**"))

    def peers(self, variants: list[dict[str, Any]], key: str, digits: int, **o: Any) -> str:
        """best / default over the variants of the peer (the first is its default), with who was best and who failed."""
        if not self.options.peer:
            return "not run"
        found, default = {}, "–"
        for i, variant in enumerate(variants):
            answer = self.job(**(o | variant))
            name = variant["who"] + (f", batches of {variant['size']}" if "size" in variant else "")
            if key in answer:
                found[name] = answer[key]
            if i == 0:
                default = f"{answer[key]:,.{digits}f}" if key in answer else answer.get("error", "failed")
            if "error" in answer and i > 0:  # the default's is in the table
                self.notes.append(f"{o.get('title', o['name'])}, {name}: {answer['error']}")
        if not found:
            return f"none ran / {default}"
        best = min(found, key=found.__getitem__)
        return f"{found[best]:,.{digits}f} ({best}) / {default}"

    # One method a figure.

    def fits(self) -> None:
        figures = [
            ("Kron fit, exact GGN", "Kron", False, {"mlp": 8, "cnn": 9}),
            ("Diag fit", "Diag", False, {"mlp": 6, "cnn": 9}),
            ("Kron fit, MonteCarloFisher", "Kron", True, {"mlp": 3, "cnn": 3}),
        ]
        for title, structure, monte_carlo, targets in figures:
            for net, target in targets.items():
                o = {"net": net, "structure": structure, "monte_carlo": monte_carlo}
                ours = self.job("fit", who="ours", **o)
                peer = self.peers(
                    [{"who": w} for w in PEERS], "ratio", 1, name="fit", budget=30, title=f"{title}, {net.upper()}", **o
                )
                self.row(f"{title}, {net.upper()} (units)", f"≤ {target}", peer, *_judge(ours, "ratio", target))

    def predictions(self) -> None:
        for net, target in (("mlp", 60), ("cnn", 15)):
            o = {"net": net, "structure": "Kron"}
            ours = self.job("predict", who="ours", **o)
            variants: list[dict[str, Any]] = [{"who": PEERS[0]}, {"who": PEERS[1]}]
            variants += [v | {"size": 64 if net == "mlp" else 16} for v in variants]
            peer = self.peers(
                variants, "ratio", 0, name="predict", budget=30, title=f"Kron prediction, {net.upper()}", **o
            )
            shown, met = _judge(ours, "ratio", target)
            if "first" in ours:
                shown += f" (first call {ours['first']:.0f})"
            self.row(f"Kron prediction of {POINTS} points, {net.upper()} (forwards)", f"≤ {target}", peer, shown, met)

    def agreement(self) -> None:
        if not self.options.peer:
            return
        parts = []
        for net in ("mlp", "cnn"):
            for who in PEERS:
                answer = self.job(
                    "agree", net=net, who=who, bias=False, double=True, data=512, structure="Kron", size=16
                )
                shown = f"{answer['difference']:.1e}" if "difference" in answer else answer["error"]
                parts.append(f"{net.upper()} {who} {shown}")
        self.notes.append("Same Kron posterior (nets without biases, float64), largest relative difference of the covariances "
                          "of the outputs: " + "; ".join(parts) + ".")  # fmt: skip

    def tuning(self) -> None:
        for structure in ("Full", "Kron"):
            o = {"net": "small", "structure": structure}
            ours = self.job("tune_ours", **o)
            peer = self.peers(
                [{"who": "default"}], "hundred", 2, name="tune_peer", seconds=900, title=f"Tuning, {structure}", **o
            ).split(" / ")[-1]
            if "error" in ours:
                shown, met = ours["error"], False
            else:
                shown = (
                    f"{ours['decomposition']:.3g} s + {1e3 * ours['hundred']:.1f} ms (to convergence: {ours['steps']} steps, "
                    f"{1e3 * ours['converge']:.1f} ms)"
                )
                met = ours["hundred"] < (1 if structure == "Full" else 0.01)
            target = "one eigendecomposition + < 1 s" if structure == "Full" else "< 10 ms"
            self.row(f"100 steps of evidence tuning, {structure}, 3,466 weights (s)", target, peer, shown, met)

    def memories(self) -> None:
        o = {"net": "cnn", "structure": "Kron", "rows": 512, "size": BATCH}

        def both(who: str) -> tuple[dict[str, Any], str]:
            # In two processes: a prediction that runs out of memory must not hide what the fit took.
            a = self.job("memory", who=who, predict=True, **o)
            if "error" in a:
                alone = self.job("memory", who=who, predict=False, **o)
                return a, f"{alone['fit']:.0f} / {a['error']}" if "fit" in alone else alone["error"]
            return a, f"{a['fit']:.0f} / {a['predict']:.0f}"

        ours, text = both("ours")
        peers = [f"{who} {both(who)[1]}" for who in PEERS] if self.options.peer else ["not run"]
        met = "fit" in ours and max(ours["fit"], ours["predict"]) < 250
        if "unit" in ours:
            text += f" (plain epoch {ours['unit']:.0f})"
        self.row("Peak memory, CNN, batch 128, fit / predict (MB)", "< 250", "; ".join(peers), text, met)

    def ranks(self) -> None:
        o = {"net": "mlp", "rank": 100 if self.options.quick else 400}
        if self.options.quick:
            o["data"] = 300
        ours = self.job("low_rank", seconds=900, memory=1.75 * MEMORY, **o)  # the exact dual is large
        peer = "not run"
        if self.options.peer:
            answer = self.job("low_rank_peer", seconds=120, **o)
            peer = f"{answer['seconds']:.1f} s (Hessian)" if "seconds" in answer else answer["error"]
        if "error" in ours:
            shown, met = ours["error"], False
        else:
            gaps = " and ".join(f"{g:+.1f} at precision {p:.3g}" for g, p in zip(ours["gaps"], ours["precisions"]))
            shown = f"{ours['seconds']:.1f} s; {gaps}"
            met = ours["seconds"] < 60 and max(map(abs, ours["gaps"])) < 15
        what = f"LowRank, rank {o['rank']}, MLP 26k, {ours.get('data', '')} data: seconds; nats from the exact dual"
        self.row(what, "< 60 s, ≤ 15 nats", peer, shown, met)

    def all(self) -> None:
        for net in ("mlp", "cnn", "small"):
            self.job("prepare", net=net)
        if self.options.peer:
            for net in ("mlp", "cnn"):
                self.job("prepare", net=net, bias=False)
        only = self.options.only
        for figure in (self.fits, self.predictions, self.agreement, self.tuning, self.memories, self.ranks):
            if not only or figure.__name__ in only:
                figure()


def _judge(answer: dict[str, Any], key: str, target: float) -> tuple[str, bool]:
    if "error" in answer:
        return answer["error"], False
    return f"{answer[key]:.1f}", round(answer[key], 1) <= target


def _short(answer: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in answer.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laplace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and data: minutes less, rougher figures")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="run laplace-torch beside ours"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--device", default="cpu", help="cuda, where there is one (wall time instead of CPU time)")
    parser.add_argument("--only", nargs="+", metavar="FIGURE", help="fits predictions agreement tuning memories ranks")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.job:
        answer(options.job, JOBS)
        return
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: torch sees no CUDA device here; leave it out to run on the CPU.")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, folder)
        run.all()
    print(f"\n{machine()}; {(time.perf_counter() - start) / 60:.0f} minutes\n")
    print(table([("what", "target", "peer, best / default", "ours", "met?"), *run.rows], options.markdown, run.notes))


if __name__ == "__main__":
    main()
