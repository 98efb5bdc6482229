"""What an inner step of GaussNewtonInner costs, in ordinary training steps of the same net, batch and optimizer.

An ordinary step is forward, backward and the optimizer; an inner step is one of the sixteen of an outer step without a line
search. All are run in turns and their medians compared, in CPU time on one thread.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesgn import likelihoods, optim
from benchmarks._timing import interleaved, machine, ratio

STEPS = 16


class Layer(nn.Module):
    """Pre-norm causal attention and an MLP."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = h + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, width))
        return h + self.mlp(self.norm2(h))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(context, width) / math.sqrt(width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.token(x) + self.position)))


def nets() -> dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]]:
    """Name: a net and a source of micro-batches."""

    def text(n: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (torch.randint(80, (n, 64)), torch.randint(80, (n, 64)))

    mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    return {
        "GPT 2 × 64, 8 × 64 tokens": (Decoder(80, 64, 64, 2), text(8)),
        "GPT 2 × 64, 32 × 64 tokens": (Decoder(80, 64, 64, 2), text(32)),
        "GPT 4 × 128, 16 × 64 tokens": (Decoder(80, 64, 128, 4), text(16)),
        "MLP 64-256-256-10, 1,024 data": (mlp, lambda: (torch.randn(1024, 64), torch.randint(10, (1024,)))),
    }


KINDS: dict[str, dict[str, Any]] = {
    "Gauss-Newton": {},
    "prox-linear": {"objective": optim.Convex()},
    "exact products": {"products": optim.ForwardMode()},
    "layerwise": {"blocks": optim.Layerwise()},
}


def measure(net: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], kinds: Iterable[str], adam: bool, repeats: int) -> dict[str, float]:
    """Multiples of an ordinary step, and of its gradient alone."""
    recipe = (lambda params: torch.optim.AdamW(params, lr=1e-5)) if adam else optim.MuonRecipe(net, lr=1e-5, adam_lr=1e-5)
    plain, batches = recipe(list(net.parameters())), [batch() for _ in range(STEPS)]

    def gradients() -> None:
        for x, y in batches:
            plain.zero_grad()
            F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()

    def train() -> None:
        for x, y in batches:
            plain.zero_grad()
            F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
            plain.step()

    outer = {
        kind: optim.GaussNewtonInner(net, likelihoods.Categorical(), recipe, line_search=None, **KINDS[kind]) for kind in kinds
    }
    functions: dict[str, Callable[[], Any]] = {"gradients": gradients, "train": train}
    functions |= {kind: (lambda opt=opt: opt.step(batches)) for kind, opt in outer.items()}
    seconds = interleaved(functions, repeats, budget=30)
    found = {f"{kind}": ratio(seconds[kind], seconds["train"]) for kind in outer}
    found |= {f"{kind}, of gradients": ratio(seconds[kind], seconds["gradients"]) for kind in outer}
    return found | {"ms": 1e3 * seconds["train"].cpu / STEPS}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the first net alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"{machine()}\n\n| net, micro-batch | inner optimizer | ordinary step (ms) | " + " | ".join(KINDS) + " |")
    print("|" + "---|" * (3 + len(KINDS)))
    for name, (net, batch) in list(nets().items())[: 1 if options.quick else None]:
        for adam in (False, True):
            found = measure(net, batch, KINDS, adam, 3 if options.quick else 9)
            cells = [f"{found[k]:.2f} ({found[f'{k}, of gradients']:.2f})" for k in KINDS]
            print(f"| {name} | {'AdamW' if adam else 'Muon + AdamW'} | {found['ms']:.1f} | " + " | ".join(cells) + " |", flush=True)
    print("\nin ordinary training steps (in brackets: in gradients, forward and backward without the optimizer)")


if __name__ == "__main__":
    main()
