"""A character-level GPT and its data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesgn import datasets


class Block(nn.Module):
    """Pre-norm causal attention and a GELU MLP, no biases in matrices."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)
        for linear in (self.qkv, self.widen):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(width))
        for linear in (self.project, self.narrow):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(2 * depth * linear.in_features))

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = h + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, width))
        return h + self.narrow(F.gelu(self.widen(self.norm2(h))))


class GPT(nn.Module):
    """Logits [n t vocabulary] for characters [n t]."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.3 / math.sqrt(width))  # not zero: features would not see the loss in the first linearisation

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Corpus:
    """A text as characters, the last tenth for validation.

    Args:
        context: characters of a sequence.
        characters: at most so many of the text.
    """

    def __init__(self, context: int, characters: int | None = None) -> None:
        found = datasets.text()
        text = found.text[:characters]
        alphabet = sorted(set(text))
        code = {c: i for i, c in enumerate(alphabet)}
        numbers = torch.tensor([code[c] for c in text])
        split = int(0.9 * len(numbers))
        self.name, self.vocabulary, self.context = found.name, len(alphabet), context
        self.train, self.validation = numbers[:split], numbers[split:]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sequences of the training part: x, y [size context], y one character on."""
        start = torch.randint(len(self.train) - self.context - 1, (size, 1), generator=generator)
        at = start + torch.arange(self.context + 1)
        return self.train[at[:, :-1]], self.train[at[:, 1:]]

    def stream(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches for ever, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(size, generator)

    def held_out(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Sequences of the validation part, evenly spread."""
        start = torch.linspace(0, len(self.validation) - self.context - 1, sequences).long()[:, None]
        at = start + torch.arange(self.context + 1)
        return self.validation[at[:, :-1]], self.validation[at[:, 1:]]
