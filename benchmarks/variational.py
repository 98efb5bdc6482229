"""Variational inference over the weights of a net: ours beside mean-field Bayes-by-backprop, ivon-opt and Pyro's autoguides, in one run.

    python -m benchmarks.variational [--quick] [--no-peer] [--markdown] [--only bounds steps] [--seeds 3]

*bounds*: ELBO by 200 draws of the weights, by one piece of code for all contestants; test NLL of the mean predictive of the same draws; seconds of
training, in CPU and wall time. Contestants of a data set run in one process, in turns, seed by seed. Ours are trained by Adam to the MAP first, and
that is in their seconds. *steps*: a step of a diagonal Gaussian beside an ordinary training step.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._timing import answer, guarded, interleaved, machine, once, table

HIDDEN, PRIOR, NOISE, DRAWS = 50, 1.0, 0.05, 200
SETS = ("glass", "breast_cancer", "yacht")
MEMORY = 6.0  # GB a process may take


# -- the problem: one hidden layer, every weight N(0, 1/PRIOR) ---------------------------------------------------------------------


class Problem:
    """Data, net and log likelihood of one set, with nothing of this package in them."""

    def __init__(self, name: str) -> None:
        from bayesgn import datasets

        self.regression = name == "yacht"
        d = (datasets.uci_regression if self.regression else datasets.uci_classification)(name, dtype=torch.float64)
        self.x, self.y, self.x_test, self.y_test = d.x_train, d.y_train, d.x_test, d.y_test
        self.inputs, self.outputs = self.x.shape[1], 1 if self.regression else int(self.y.max()) + 1
        self.net(0)

    def net(self, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(self.inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, self.outputs)).double().eval()
        self.shapes = [p.shape for p in net.parameters()]
        self.weights = sum(p.numel() for p in net.parameters())
        return net

    def log_probs(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y|f) of every datum [... n] for outputs [... n c]."""
        if self.regression:
            return -0.5 * ((f - y).square().sum(-1) / NOISE + math.log(2 * math.pi * NOISE))
        return f.log_softmax(-1).gather(-1, y.expand(f.shape[:-1])[..., None])[..., 0]

    def outputs_at(self, θ: Tensor, x: Tensor) -> Tensor:
        """[s n c] at weights [s p]."""
        W, b, V, c = (t.reshape(len(θ), *s) for t, s in zip(θ.split([s.numel() for s in self.shapes], dim=-1), self.shapes, strict=True))
        return torch.baddbmm(c[:, None], torch.tanh(torch.baddbmm(b[:, None], x.expand(len(θ), *x.shape), W.mT)), V.mT)

    def loss(self, net: nn.Module) -> Tensor:
        """Mean negative log likelihood of the training data."""
        return -self.log_probs(net(self.x), self.y).mean()

    @torch.no_grad()
    def judged(self, draws: Tensor, kl: float) -> dict[str, float]:
        """ELBO and test NLL from draws of the weights [s p]."""
        expected = float(self.log_probs(self.outputs_at(draws, self.x), self.y).sum(-1).mean())
        test = self.log_probs(self.outputs_at(draws, self.x_test), self.y_test)
        return {"elbo": expected - kl, "nll": float(-(test.logsumexp(0) - math.log(len(draws))).mean())}

    def judged_gaussian(self, q: Any) -> dict[str, float]:
        """Of a torch distribution: KL(q ‖ prior) in closed form."""
        with torch.no_grad():
            torch.manual_seed(99)
            cross = 0.5 * (PRIOR * (q.mean.square() + q.variance)).sum() + 0.5 * self.weights * math.log(2 * math.pi / PRIOR)
            return self.judged(q.sample((DRAWS,)), float(cross - q.entropy()))


# -- peers -------------------------------------------------------------------------------------------------------------------------


def bayes_by_backprop(p: Problem, seed: int, lr: float, steps: int) -> Callable[[], dict[str, float]]:
    """Mean field by reparameterised gradients: Adam, cosine, one draw a step, σ from 0.018 (Blundell et al., 2015)."""
    net = p.net(seed)
    own = [t.detach() for t in net.parameters()]
    m, ρ = [t.clone().requires_grad_() for t in own], [torch.full_like(t, -4.0).requires_grad_() for t in own]
    optimizer, g = torch.optim.Adam([*m, *ρ], lr=lr), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    names = [n for n, _ in net.named_parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        σ = [nn.functional.softplus(r) for r in ρ]
        w = [a + s * torch.randn(a.shape, generator=g, dtype=a.dtype) for a, s in zip(m, σ, strict=True)]
        kl = sum((0.5 * PRIOR * (s.square() + a.square()) - s.log()).sum() for a, s in zip(m, σ, strict=True))
        f = torch.func.functional_call(net, dict(zip(names, w, strict=True)), (p.x,))
        (kl / len(p.x) - p.log_probs(f, p.y).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        mean, scale = (torch.cat([t.reshape(-1) for t in parts]) for parts in (m, [nn.functional.softplus(r) for r in ρ]))
    return lambda: p.judged_gaussian(torch.distributions.Independent(torch.distributions.Normal(mean, scale), 1))


def ivon_opt(p: Problem, seed: int, lr: float, steps: int) -> Callable[[], dict[str, float]]:
    import ivon

    net, N = p.net(seed), len(p.x)
    torch.manual_seed(seed)
    optimizer = ivon.IVON(net.parameters(), lr=lr, ess=N, weight_decay=PRIOR / N, hess_init=0.1, beta2=0.999)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            p.loss(net).backward()
        optimizer.step()
        schedule.step()
    mean = torch.cat([t.detach().reshape(-1) for t in net.parameters()])
    precision = N * (optimizer.param_groups[0]["hess"] + PRIOR / N)
    return lambda: p.judged_gaussian(torch.distributions.Independent(torch.distributions.Normal(mean, precision.rsqrt()), 1))


def pyro_guide(p: Problem, seed: int, lr: float, steps: int, guide: str) -> Callable[[], dict[str, float]]:
    import pyro
    from pyro import distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal, init_to_value
    from pyro.optim import CosineAnnealingLR  # type: ignore[attr-defined]

    pyro.clear_param_store()
    start = torch.cat([t.detach().reshape(-1) for t in p.net(seed).parameters()])
    pyro.set_rng_seed(seed)

    def likelihood(f: Tensor) -> Any:
        return dist.Normal(f[:, 0], math.sqrt(NOISE)) if p.regression else dist.Categorical(logits=f)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros_like(start), PRIOR**-0.5).to_event(1))
        with pyro.plate("data", len(p.x)):
            pyro.sample("y", likelihood(p.outputs_at(w[None], p.x)[0]), obs=p.y[:, 0] if p.regression else p.y)

    kind = {"normal": AutoNormal, "full": AutoMultivariateNormal, "low rank": AutoLowRankMultivariateNormal}[guide]
    q = kind(model, init_loc_fn=init_to_value(values={"w": start}), init_scale=0.02, **({"rank": 20} if guide == "low rank" else {}))  # type: ignore[operator]
    optimizer = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps})
    svi = SVI(model, q, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step()
        optimizer.step()
    if guide == "normal":
        found = torch.distributions.Independent(torch.distributions.Normal(q.locs.w.detach(), q.scales.w.detach()), 1)
    else:
        found = q.get_posterior()
    return lambda: p.judged_gaussian(found)


# -- ours --------------------------------------------------------------------------------------------------------------------------


class Ours(NamedTuple):
    """Arguments of ``bgn.variational``."""

    structure: str
    curvature: str = "MonteCarloFisher"
    epochs: int = 180
    lr: float = 0.12
    draws: int = 4
    every: int = 5
    momentum: float = 0.9
    rank: int = 20
    precision_lr: float | None = None


def ours(p: Problem, seed: int, o: Ours) -> Callable[[], dict[str, float]]:
    """200 steps of Adam to the MAP, then natural-gradient steps on all data."""
    import bayesgn as bgn
    from bayesgn import ggn, likelihoods, models, optim, rules

    net = p.net(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (p.loss(net) + 0.5 * PRIOR * sum(t.square().sum() for t in net.parameters()) / len(p.x)).backward()
        optimizer.step()
    stein = o.curvature == "Stein"
    structure = ggn.LowRankPlusDiagonal(rank=o.rank) if o.structure == "LowRankPlusDiagonal" else getattr(ggn, o.structure)
    model = models.Network(net, prior=models.WeightPrior(PRIOR), structure=structure)
    q = bgn.variational(
        model, likelihoods.Gaussian(NOISE) if p.regression else likelihoods.Categorical(), (p.x, p.y), batch_size=len(p.x), draws=100,
        expectation=optim.Reparameterized(o.draws) if stein else optim.Draws(o.draws), curvature=None if stein else getattr(rules, o.curvature)(),
        epochs=o.epochs, lr=o.lr, precision_lr=o.precision_lr, every=o.every, momentum=o.momentum, generator=torch.Generator().manual_seed(seed),
        scheduler=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, o.epochs, eta_min=0.05 * o.lr), progress=False,
    )  # fmt: skip

    def judge() -> dict[str, float]:
        θ = q.sample_weights(DRAWS, torch.Generator().manual_seed(99))
        return p.judged(θ, float((q.log_likelihood() - q.log_evidence()).detach()))

    return judge


OURS = {
    "VOGGN layerwise": Ours("Layerwise"),
    "VOGGN full": Ours("Full"),
    "VOGGN Kron": Ours("Kron"),
    "VOGGN diagonal": Ours("Diag"),
    "VOGN diagonal": Ours("Diag", "EmpiricalFisher"),
    "SLANG-like, rank 20": Ours("LowRankPlusDiagonal", "GaussNewton", epochs=100, lr=0.2, momentum=0.8),
    "IVON-like diagonal": Ours("Diag", "Stein", epochs=1500, lr=0.05, draws=1, every=1, precision_lr=0.01),
}
PEERS: dict[str, tuple[Callable[..., Callable[[], dict[str, float]]], tuple[float, ...], dict[str, Any]]] = {
    "Bayes-by-backprop, mean field": (bayes_by_backprop, (3e-3, 1e-2, 3e-2), {}),
    "ivon-opt": (ivon_opt, (0.03, 0.3, 0.1), {}),
    "Pyro AutoNormal": (pyro_guide, (1e-2, 3e-2), {"guide": "normal"}),
    "Pyro AutoLowRankMVN, rank 20": (pyro_guide, (1e-2, 3e-2), {"guide": "low rank"}),
    "Pyro AutoMultivariateNormal": (pyro_guide, (3e-3, 1e-2), {"guide": "full"}),
}


def bounds(o: dict[str, Any]) -> dict[str, Any]:
    """Every contestant on one set: medians over seeds of ELBO, NLL and seconds; a peer at the step size of its grid with the best ELBO on seed 0."""
    p, found = Problem(o["set"]), {}
    ours(p, 0, OURS["VOGGN layerwise"]._replace(epochs=3))  # (first uses import for seconds)
    contestants: dict[str, list[Callable[[int], Callable[[], dict[str, float]]]]] = {}
    for name, settings in OURS.items():
        contestants[name] = [lambda seed, s=settings: ours(p, seed, s)]
    for name, (function, grid, options) in PEERS.items() if o["peer"] else ():
        rates = grid if o["grid"] else grid[-1:]
        contestants[name] = [lambda seed, f=function, lr=lr, k=options: f(p, seed, lr=lr, steps=o["steps"], **k) for lr in rates]
    for seed in range(o["seeds"]):
        for name, choices in contestants.items():
            if o["few"] and seed and name not in o["few"]:
                continue
            print(f"    {o['set']}, seed {seed}: {name}", file=sys.stderr, flush=True)
            runs = [r for r in (_run(make, seed) for make in choices) if r is not None]
            if not runs:
                continue
            best = max(range(len(runs)), key=lambda i: runs[i]["elbo"])
            if len(choices) == len(runs):
                contestants[name] = [choices[best]]
            found.setdefault(name, []).append(runs[best])
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} | {"seeds": len(runs)} for n, runs in found.items()}
    return {"found": medians, "data": len(p.x), "weights": p.weights, "all": found}


def _run(make: Callable[[int], Callable[[], dict[str, float]]], seed: int) -> dict[str, float] | None:
    kept: list[Callable[[], dict[str, float]]] = []
    try:
        seconds = once(lambda: kept.append(make(seed)))
    except Exception as error:
        warnings.warn(str(error)[:200], stacklevel=2)
        return None
    return kept[0]() | {"cpu": seconds.cpu, "wall": seconds.wall}


# -- one step ----------------------------------------------------------------------------------------------------------------------


def step(o: dict[str, Any]) -> dict[str, Any]:
    """A step of a diagonal Gaussian beside one of Adam, forward and backward pass included, in float32."""
    from bayesgn import ggn, likelihoods, models, optim

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        if o["net"] == "CNN":
            return nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
            )  # fmt: skip
        return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    g = torch.Generator().manual_seed(0)
    x = torch.rand(o["rows"], *((1, 28, 28) if o["net"] == "CNN" else (784,)), generator=g)
    y, N = torch.randint(10, (o["rows"],), generator=g), 60_000
    plain, own, theirs = net(), net().eval(), net()
    adam = torch.optim.Adam(plain.parameters())
    model = models.Network(own, structure=ggn.Diag)
    opt = optim.Variational(model, likelihoods.Categorical(), N, expectation=optim.Reparameterized(1), lr=0.1, precision_lr=1e-4, momentum=0.9)

    def ordinary() -> None:
        adam.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        adam.step()

    contestants: dict[str, Callable[[], Any]] = {"ordinary": ordinary, "ours": lambda: opt.step(x, y)}
    if o["peer"]:
        import ivon

        optimizer = ivon.IVON(theirs.parameters(), lr=0.1, ess=N)

        def ivon_step() -> None:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(theirs(x), y).backward()
            optimizer.step()

        contestants["ivon"] = ivon_step
    interleaved(contestants, 3)
    found = interleaved(contestants, o["repeats"], budget=100)
    weights = sum(t.numel() for t in plain.parameters())
    return {"weights": weights, "ms": 1e3 * found["ordinary"].cpu} | {n: s.cpu / found["ordinary"].cpu for n, s in found.items()}


JOBS = {"bounds": bounds, "step": step}


# -- the run -----------------------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tables = options, []

    def job(self, name: str, **options: Any) -> dict[str, Any]:
        found = guarded("benchmarks.variational", {"name": name, "peer": self.options.peer} | options, 7200, MEMORY)
        print(f"  {name} {options}: {found.get('error', 'done')}", flush=True)
        return found

    def bounds(self) -> None:
        quick = self.options.quick
        for name in self.options.sets:
            few = ["VOGGN layerwise", "Bayes-by-backprop, mean field"] if quick else []
            a = self.job("bounds", set=name, seeds=self.options.seeds, steps=3000, grid=not quick, few=few)
            rows: list[tuple[str, ...]] = [("", "ELBO", "test NLL", "CPU s", "wall s", "seeds")]
            for n, m in a.get("found", {}).items():
                rows.append((n, f"{m['elbo']:.1f}", f"{m['nll']:.3f}", f"{m['cpu']:.1f}", f"{m['wall']:.1f}", f"{m['seeds']:.0f}"))
            title = f"{name}: {a['data']} data, {a['weights']} weights" if "data" in a else f"{name}: {a.get('error')}"
            self.tables.append((title, rows))
            print(table(rows, False), flush=True)

    def steps(self) -> None:
        rows: list[tuple[str, ...]] = [("net, batch", "weights", "ordinary step, ms", "ours", "ivon-opt", "≤ 1.3?")]
        for net, count in (("MLP", 128), ("MLP", 1024), ("CNN", 128)):
            a = self.job("step", net=net, rows=count, repeats=20 if self.options.quick else 60)
            if "error" in a:
                rows.append((f"{net}, {count}", a["error"]))
                continue
            verdict = "yes" if a["ours"] <= 1.3 else "**no**"
            rows.append((f"{net}, {count}", f"{a['weights']:,}", f"{a['ms']:.1f}", f"{a['ours']:.2f}", f"{a.get('ivon', math.nan):.2f}", verdict))
        self.tables.append(("A step of a diagonal Gaussian, in ordinary steps (Adam, forward + backward)", rows))

    def all(self) -> None:
        for figure in (self.steps, self.bounds):
            if not self.options.only or figure.__name__ in self.options.only:
                figure()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variational", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one step size a peer, further seeds for the two of the headline only")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="run ivon-opt, Pyro and Bayes-by-backprop beside ours")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--only", nargs="+", metavar="FIGURE", help="bounds steps")
    parser.add_argument("--sets", nargs="+", default=SETS, metavar="SET", help="data sets of bounds")
    parser.add_argument("--seeds", type=int, default=3)
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
