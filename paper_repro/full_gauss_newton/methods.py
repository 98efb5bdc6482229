"""The optimizers compared, each as a course of validation losses against steps, sequential gradients, tokens and seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesgn import likelihoods, optim
from paper_repro.full_gauss_newton.gpt import GPT, Corpus


@dataclass
class Setting:
    """Sizes of a comparison.

    Attributes:
        sequences: of a micro-batch.
        micro: micro-batches of a batch, so that a batch has micro · sequences · context tokens.
        target: validation loss in nats a character, at which a run ends.
        limit: steps at most.
    """

    corpus: Corpus
    width: int
    heads: int
    depth: int
    sequences: int
    micro: int
    target: float
    limit: int
    held_out: int = 64
    seed: int = 0

    def net(self) -> GPT:
        state = torch.random.get_rng_state()
        torch.manual_seed(self.seed)
        net = GPT(self.corpus.vocabulary, self.corpus.context, self.width, self.heads, self.depth)
        torch.random.set_rng_state(state)
        return net

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.micro * self.sequences * self.corpus.context


@dataclass
class Curve:
    """A run: after each step the loss (nats a character) and what had been spent."""

    name: str
    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)  # sequential: those that waited for one another
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def append(self, loss: float, steps: int, gradients: int, tokens: int, seconds: float) -> None:
        self.loss.append(loss)
        self.steps.append(steps)
        self.gradients.append(gradients)
        self.tokens.append(tokens)
        self.seconds.append(seconds)

    def at(self, target: float) -> dict[str, float]:
        """What it took to get to the target, between the two steps around it by interpolation; infinite where it never got there."""
        for i, loss in enumerate(self.loss):
            if loss <= target:
                if i == 0:
                    share, before = 1.0, 0
                else:
                    share, before = (self.loss[i - 1] - target) / (self.loss[i - 1] - loss), i - 1
                names = ("steps", "gradients", "tokens", "seconds")
                return {n: (1 - share) * getattr(self, n)[before] + share * getattr(self, n)[i] for n in names}
        return dict.fromkeys(("steps", "gradients", "tokens", "seconds"), float("inf"))

    def __str__(self) -> str:
        return f"{self.name:28} loss {self.loss[-1]:.4f} after {self.steps[-1]:5d} steps, {self.gradients[-1]:6d} sequential gradients, {self.seconds[-1]:6.1f} s"


def run(name: str, setting: Setting, start: Callable[[GPT, Any], Callable[[], int]], **options: Any) -> Curve:
    """Steps until the target: ``start(net, stream)`` gives a function that makes one step and says how many gradients had to wait for one another."""
    net, curve = setting.net(), Curve(name, options=options)
    stream = setting.corpus.stream(setting.sequences, seed=setting.seed + 1)
    x, y = setting.corpus.held_out(setting.held_out)
    step, spent, gradients = start(net, stream), 0.0, 0
    for k in range(setting.limit + 1):
        if k:
            begun = time.process_time()
            gradients += step()
            spent += time.process_time() - begun
        with torch.no_grad():
            loss = cross_entropy(net, x, y).item()
        curve.append(loss, k, gradients, k * setting.tokens, spent)
        if loss <= setting.target or not loss < 20:
            break
    return curve


def cross_entropy(net: GPT, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


def first_order(name: str, setting: Setting, build: Callable[[GPT], torch.optim.Optimizer], warmup: int = 10, **options: Any) -> Curve:
    """A step is one gradient of the whole batch (in pieces, which do not wait for one another)."""

    def start(net: GPT, stream: Any) -> Callable[[], int]:
        opt = build(net)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, (k + 1) / warmup))

        def step() -> int:
            opt.zero_grad()
            for x, y in itertools.islice(stream, setting.micro):
                (cross_entropy(net, x, y) / setting.micro).backward()
            opt.step()
            schedule.step()
            return 1

        return step

    return run(name, setting, start, **options)


def gauss_newton(name: str, setting: Setting, lr: float, adam_lr: float, **options: Any) -> Curve:
    """A step is an inner path over the batch's micro-batches; the line search looks at the last eighth of them."""
    held = max(1, setting.micro // 8)

    def start(net: GPT, stream: Any) -> Callable[[], int]:
        recipe = optim.MuonRecipe(net, lr=lr, adam_lr=adam_lr)
        opt = optim.GaussNewtonInner(net, likelihoods.Categorical(), recipe, steps=setting.micro, **options)

        def step() -> int:
            batches = list(itertools.islice(stream, setting.micro))
            opt.step(batches, held_out=batches[-held:])
            return setting.micro

        return step

    return run(name, setting, start, lr=lr, adam_lr=adam_lr, **{k: repr(v) for k, v in options.items()})


def control(name: str, setting: Setting, lr: float, adam_lr: float) -> Curve:
    """As many sequential Muon steps on the same micro-batches, with the same cosine over each batch, on the true loss: no linearisation, no line search."""

    def start(net: GPT, stream: Any) -> Callable[[], int]:
        opt = optim.MuonRecipe(net, lr=lr, adam_lr=adam_lr)(list(net.parameters()))
        base = [group["lr"] for group in opt.param_groups]

        def step() -> int:
            for k, (x, y) in enumerate(itertools.islice(stream, setting.micro)):
                for group, own in zip(opt.param_groups, base, strict=True):
                    group["lr"] = own * optim.cosine(k / setting.micro)
                opt.zero_grad()
                cross_entropy(net, x, y).backward()
                opt.step()
            return setting.micro

        return step

    return run(name, setting, start, lr=lr, adam_lr=adam_lr)


def conjugate_gradients(name: str, setting: Setting, iterations: int = 20, damping: float = 1e-2, curvature: int = 8) -> Curve:
    """Gauss-Newton by truncated CG: g over the batch, H over ``curvature`` of its micro-batches, λ by Levenberg and Marquardt's gain ratio, the
    last step (times 0.95) as warm start. No inner step on fresh data: products with one H."""

    def start(net: GPT, stream: Any) -> Callable[[], int]:
        weights = dict(net.named_parameters())
        likelihood, forward = likelihoods.Categorical(), optim.ForwardMode()
        state = {"λ": damping, "δ": [torch.zeros_like(p) for p in weights.values()]}

        def outputs(w: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(net, w, (x,))

        def step() -> int:
            batches = list(itertools.islice(stream, setting.micro))
            net.zero_grad()
            for x, y in batches:
                (cross_entropy(net, x, y) / len(batches)).backward()
            g = [p.grad.clone() for p in weights.values()]  # type: ignore[union-attr]
            x = torch.cat([x for x, _ in batches[:curvature]])
            y = torch.cat([y for _, y in batches[:curvature]])
            f = outputs(weights, x)
            at, zero = f.detach(), torch.zeros_like(f)
            gradient = optim.Quadratized().gradient(likelihood, at, zero, y)

            def product(v: list[Tensor]) -> list[Tensor]:
                Jv = forward(lambda w: outputs(w, x), weights, at, dict(zip(weights, v, strict=True)))
                u = optim.Quadratized().gradient(likelihood, at, Jv, y) - gradient  # Λ J v / n
                Hv = torch.autograd.grad(f, list(weights.values()), u, retain_graph=True)
                return [h + state["λ"] * w for h, w in zip(Hv, v, strict=True)]

            δ, products, Hδ = _cg(product, [-t for t in g], [0.95 * t for t in state["δ"]], iterations)
            predicted = -_dot(g, δ) - 0.5 * _dot(δ, Hδ)
            before = _loss(net, batches)
            α, after = optim.Grid(1.0, 0.5, 8)(lambda α: _moved(net, weights, δ, α, batches[: setting.micro // 4]), _loss(net, batches[: setting.micro // 4]), 0.0)
            with torch.no_grad():
                for p, d in zip(weights.values(), δ, strict=True):
                    p.add_(d, alpha=α)
            ratio = (before - _loss(net, batches)) / predicted if predicted > 0 else -1.0
            state["λ"] *= 2 / 3 if ratio > 0.75 else 1.5 if ratio < 0.25 else 1.0
            state["δ"] = [α * d for d in δ]
            return 1 + products

        return step

    return run(name, setting, start, iterations=iterations, damping=damping)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((s * t).sum() for s, t in zip(a, b, strict=True)))


def _cg(product: Callable[[list[Tensor]], list[Tensor]], b: list[Tensor], x: list[Tensor], iterations: int) -> tuple[list[Tensor], int, list[Tensor]]:
    """(x, products, A x) after so many iterations from x on A x = b."""
    Ax = product(x)
    r = [s - t for s, t in zip(b, Ax, strict=True)]
    p, rr, used = list(r), _dot(r, r), 1
    stop = 1e-6 * _dot(b, b)
    for _ in range(iterations):
        Ap = product(p)
        used += 1
        α = rr / _dot(p, Ap)
        x = [s + α * t for s, t in zip(x, p, strict=True)]
        Ax = [s + α * t for s, t in zip(Ax, Ap, strict=True)]
        r = [s - α * t for s, t in zip(r, Ap, strict=True)]
        new = _dot(r, r)
        if new < stop:
            break
        p = [s + new / rr * t for s, t in zip(r, p, strict=True)]
        rr = new
    return x, used, Ax


@torch.no_grad()
def _loss(net: GPT, batches: list) -> float:
    return sum(cross_entropy(net, x, y).item() for x, y in batches) / len(batches)


@torch.no_grad()
def _moved(net: GPT, weights: Mapping[str, Tensor], δ: list[Tensor], α: float, batches: list) -> float:
    moved = {n: torch.add(p, d, alpha=α) for (n, p), d in zip(weights.items(), δ, strict=True)}
    losses = [F.cross_entropy(torch.func.functional_call(net, moved, (x,)).flatten(0, 1), y.flatten()).item() for x, y in batches]
    return sum(losses) / len(losses)


def layer(name: str) -> str:
    """The block of a weight: embeddings, each layer, head."""
    parts = name.split(".")
    if parts[0] in ("token", "position"):
        return "embeddings"
    return f"layer {parts[1]}" if parts[0] == "blocks" else "head"


def sublayer(name: str) -> str:
    """As `layer`, with attention and MLP of a layer apart; norms go with the matrices they feed."""
    block = layer(name)
    return block if block in ("embeddings", "head") else block + (" attention" if name.split(".")[2] in ("norm1", "qkv", "project") else " MLP")
