"""The module matrix: one tiny float64 net for every kind of module that a structure has to serve."""

# Which engine serves which member, measured with torch 2.14 (CPU) and BackPACK 1.7.1 against `dense.jacobian` to 1e-9: how many of 77
# members are exact, then the others. "raises" is an exception, "WRONG" another number without any exception.
#
# vmap(vjp_fn) over cotangents, whole batch     76  raises: checkpointed (torch.func knows no saved-tensor hooks)
# vmap(jacrev) over data, batches of one        71  raises: lstm, lstm_deep, gru, rnn (in-place on a fresh state), prelu, checkpointed
# autograd.grad(is_grads_batched=True)          77
# J v: torch.func.jvp, stock kernels            69  raises: multihead_attention, sdpa, transformer_encoder_layer, transformer_encoder, gpt
#   (the same: forward_ad duals, vmap(jvp))         (flash kernel; and as dual weights need no gradient, the fused fast paths of
#                                                   nn.MultiheadAttention and TransformerEncoderLayer), weight_norm, embedding_bag;
#                                                   WRONG: embedding_padding (forward mode forgets padding_idx)
#   under sdpa_kernel(MATH) and without the     74  raises: weight_norm, embedding_bag; WRONG: embedding_padding
#   fast path (torch.backends.mha.set_fastpath_enabled(False))
# J v: double backward, stock kernels           71  raises: the five attention nets above (flash kernel), embedding_bag
#   under sdpa_kernel(MATH)                     76  raises: embedding_bag (`_embedding_bag_backward` has no derivative)
# Hessian: double backward, MATH                75  raises: embedding_bag; WRONG: weight_norm (torch's `_weight_norm` has wrong second
#                                                   derivatives: gradgradcheck fails, the Hessian is asymmetric; J v, Jᵀ v are exact)
# forward under no_grad (fused paths)           77  equal to the forward with grad to 1e-10
# BackPACK: extend, MSE, SqrtGGNExact           16  exact: linear, mlp, mlp_no_bias, deep_linear, linear_per_position, linear_over_grid,
#                                                   conv1d, conv1d_groups, conv2d, conv2d_strides, conv2d_groups, conv3d,
#                                                   conv_transpose2d, segmentation, batchnorm1d, frozen_layer;
#                                                   WRONG: tied_linear, user_hook (a forward hook that changes the answer), conv2d_same
#                                                   (padding="same" with an even kernel, "reflect", "circular": each alone; odd "same" is
#                                                   exact); raises: all others
#   use_converter=True                          17  gains plain_class, residual_modules; loses linear (a bare layer gets no quantity, and
#                                                   no exception says so); the same three WRONG; functional calls, F.relu included, raise
#   By module, alone after a Conv2d in float64: exact MaxPool2d, Dropout, BatchNorm2d, ConvTranspose2d without output_padding, ZeroPad2d,
#   Identity, ELU, SELU, LeakyReLU, LogSigmoid, in-place ReLU with the converter only. Raises, alone or by name within a member: AvgPool2d (float32),
#   AdaptiveAvgPool2d, GroupNorm, InstanceNorm2d, LayerNorm, BatchNorm(affine=False), Dropout1d, Softplus, SiLU, GELU, PReLU, Unflatten,
#   Bilinear, EmbeddingBag, Embedding(padding_idx), LSTM, GRU, RNN, MultiheadAttention, TransformerEncoder(Layer).

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.oracles import dense


@dataclass(frozen=True)
class Case:
    """One member of the zoo.

    Attributes:
        name: unique; also the pytest id and the seed.
        make: () -> (net, x), float32 and untouched; called by `build` under a seeded, forked random state.
        marks: what is special about it:
            `linear`      only modules whose J is δ ⊗ a: Linear, Conv (each used once through its forward, nothing else trainable)
            `shared`      a weight meets several positions of one datum (conv, sequence)
            `positions`   the answer is [n, *positions, c];  `class_dim` [n, c, *positions]
            `tied`        one parameter under two names;  `twice` one module called more than once
            `outside`     a parameter of a module is used without that module's forward
            `raw`         a raw nn.Parameter;  `frozen` some parameters need no gradient;  `unused` some have J = 0
            `batchnorm`, `norm`, `embedding`, `recurrent`, `attention`, `inplace`, `functional`, `parametrized`, `hooked`
            `dict`, `tuple`   the input is one, spread over forward's arguments, or `whole` for its only one;  `structured` the output is not a tensor
            `tokens`      integer inputs (no derivative by x)
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    marks: frozenset[str]

    def build(self) -> tuple[nn.Module, Any, int]:
        """(net, x, r): the net in float64 and eval mode with every weight and buffer off its default, 3 to 5 data, r outputs of a datum.

        Each call gives the same numbers in new tensors; the global random state is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            net, x = self.make()
            net = _randomise(net.double()).eval()
            x = _double(x)
            r = dense.outputs(net, x).shape[1]
        return net, x, r

    def __str__(self) -> str:
        return self.name


def _randomise(net: nn.Module) -> nn.Module:
    """Moves norm weights, biases, running statistics (and everything else) off the 0s and 1s they are born with."""
    with torch.no_grad():
        for w in net.parameters():
            w.add_(0.3 * torch.randn_like(w))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.5 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    return net


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return {k: _double(v) for k, v in x.items()} if isinstance(x, dict) else tuple(_double(v) for v in x)


ZOO: list[Case] = []


def case(*marks: str) -> Callable[[Callable[[], tuple[nn.Module, Any]]], Callable[[], tuple[nn.Module, Any]]]:
    """Adds the maker below it to ZOO, under the maker's own name."""

    def add(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
        ZOO.append(Case(make.__name__, make, frozenset(marks)))
        return make

    return add


def named(name: str) -> Case:
    """The case called `name`."""
    return next(c for c in ZOO if c.name == name)


def having(*marks: str, without: tuple[str, ...] = ()) -> list[Case]:
    """The cases with all of `marks` and none of `without`."""
    return [c for c in ZOO if c.marks >= set(marks) and not c.marks & set(without)]


class Lambda(nn.Module):
    """A parameter-free function as a module."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --------------------------------------------------------------------------------------------------------------------- Linear


@case("linear")
def linear():
    return nn.Linear(3, 2), torch.randn(5, 3)


@case("linear")
def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 3)


@case("linear")
def mlp_no_bias():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2, bias=False)), torch.randn(4, 3)


@case("linear")
def deep_linear():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 3)


@case("linear")
def scalar_output():
    """Answers [n], not [n 1]."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), torch.randn(4, 3)


@case("linear")
def activations():
    layers: list[nn.Module] = [nn.Linear(2, 3)]
    for act in (nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.LeakyReLU(0.2), nn.Mish(), nn.GELU("tanh")):
        layers += [act, nn.Linear(3, 3)]
    return nn.Sequential(*layers), torch.randn(4, 2)


@case("linear")
def dropout():
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Dropout1d(0.5), nn.Linear(4, 2)), torch.randn(
        4, 3
    )


@case("linear", "shared")
def linear_over_sequence():
    """Linear layers over (batch, time, features), mean pooling before the head."""
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), Lambda(lambda h: h.mean(1)), nn.Linear(4, 2)
    )
    return net, torch.randn(4, 3, 3)


@case("linear", "shared")
def deep_linear_over_sequence():
    """Reduce is exact here under square loss."""
    return nn.Sequential(nn.Linear(3, 3), Lambda(lambda h: h.mean(1)), nn.Linear(3, 2)), torch.randn(4, 3, 3)


@case("linear", "shared", "positions")
def linear_per_position():
    """Answers (batch, time, classes), every position by itself: expand is exact here under square loss for the last layer."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3, 3)


@case("linear", "shared", "positions")
def linear_over_grid():
    """Two position axes."""
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(3, 2, 3, 2)


@case()
def bilinear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear, self.head = nn.Bilinear(3, 2, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.bilinear(x[:, :3], x[:, 3:])))

    return Net(), torch.randn(4, 5)


@case()
def prelu():
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)), torch.randn(4, 3)


# ----------------------------------------------------------------------------------------------------------------- convolutions


def _conv(*layers: nn.Module, x: Tensor, c: int = 2) -> tuple[nn.Module, Tensor]:
    """Layers, tanh between them, then flatten and a Linear head with c outputs."""
    body = nn.Sequential(*[layer for pair in zip(layers, [nn.Tanh() for _ in layers], strict=True) for layer in pair])
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(body(x).flatten(1).shape[1], c)), x


@case("linear", "shared")
def conv1d():
    return _conv(
        nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Conv1d(3, 2, 2, dilation=2, bias=False), x=torch.randn(4, 2, 9)
    )


@case("linear", "shared")
def conv1d_groups():
    return _conv(
        nn.Conv1d(4, 4, 2, groups=2), nn.Conv1d(4, 2, 2, groups=2, stride=2, bias=False), x=torch.randn(3, 4, 6)
    )


@case("linear", "shared")
def conv2d():
    return _conv(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 2), x=torch.randn(4, 1, 4, 4))


@case("linear", "shared")
def conv2d_strides():
    """Unequal kernel, stride, padding and dilation; positions that the stride leaves out."""
    return _conv(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), x=torch.randn(3, 2, 6, 5))


@case("linear", "shared")
def conv2d_groups():
    """Grouped, then depthwise with a multiplier."""
    return _conv(nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 8, 2, groups=4), x=torch.randn(3, 4, 4, 4))


@case("linear", "shared")
def conv2d_same():
    """padding="same" with an even kernel (asymmetric padding), then reflected and circular padding."""
    return _conv(
        nn.Conv2d(1, 2, (2, 3), padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        x=torch.randn(3, 1, 4, 4),
    )


@case("linear", "shared")
def conv3d():
    return _conv(
        nn.Conv3d(1, 2, 2, padding=1, stride=2), nn.Conv3d(2, 2, (1, 2, 2), groups=2), x=torch.randn(3, 1, 3, 4, 4)
    )


@case("linear", "shared")
def conv_transpose1d():
    return _conv(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), x=torch.randn(3, 2, 4))


@case("linear", "shared")
def conv_transpose2d():
    return _conv(
        nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2),
        nn.ConvTranspose2d(4, 1, 2, dilation=2, bias=False),
        x=torch.randn(3, 2, 2, 2),
    )


@case("linear", "shared", "class_dim")
def segmentation():
    """Answers (batch, classes, height, width)."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )
    return net, torch.randn(3, 1, 3, 3)


@case("linear", "shared")
def pooling():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2, padding=1), nn.AvgPool2d(2, stride=1),
        nn.Tanh(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    return net, torch.randn(3, 1, 6, 6)


@case("linear", "shared")
def unflatten():
    net = nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(2, 2)
    )
    return net, torch.randn(4, 3)


@case("linear", "shared")
def view_batch():
    """The batch size stands in the forward; positions are folded into the batch axis on the way."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 3), nn.Linear(9, 2)

        def forward(self, x):
            n = x.size(0)
            h = torch.relu(self.inner(x.view(n * 3, 2)))
            return self.outer(h.view(n, -1))

    return Net(), torch.randn(4, 6)


# ------------------------------------------------------------------------------------------------------------------------ norms


@case("norm", "batchnorm")
def batchnorm1d():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 3)


@case("norm", "batchnorm", "shared")
def batchnorm2d():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False), nn.BatchNorm2d(2, affine=False),
        nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    return net, torch.randn(3, 1, 5, 5)


@case("norm")
def layernorm():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 2)
    )
    return net, torch.randn(4, 3)


@case("norm", "shared", "positions")
def layernorm_sequence():
    """LayerNorm over (time, features) and over features, with positions in the answer."""
    net = nn.Sequential(nn.LayerNorm((3, 2)), nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    return net, torch.randn(3, 3, 2)


@case("norm", "shared")
def groupnorm():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    return net, torch.randn(3, 1, 3, 3)


@case("norm")
def rmsnorm():
    return nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.SiLU(), nn.Linear(4, 2)), torch.randn(4, 3)


# ------------------------------------------------------------------------------------------------------------------- embeddings


@case("embedding", "tokens", "shared")
def embedding():
    net = nn.Sequential(nn.Embedding(6, 3), Lambda(lambda h: h.mean(1)), nn.Tanh(), nn.Linear(3, 2))
    return net, torch.randint(6, (4, 3))


@case("embedding", "tokens", "shared", "positions")
def embedding_padding():
    """padding_idx: the padding row has J = 0 although it is read."""
    x = torch.tensor([[1, 2, 0], [3, 0, 0], [1, 1, 4]])
    return nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 2)), x


@case("embedding", "tokens", "shared")
def embedding_bag():
    return nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 2)), torch.randint(6, (4, 3))


@case("embedding", "tokens", "dict")
def embedding_entity():
    """One categorical column beside numbers: an embedding with a single position."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 2), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, numbers, category):
            return self.head(torch.cat([numbers, self.embed(category)], -1))

    return Net(), {"numbers": torch.randn(4, 3), "category": torch.randint(4, (4,))}


# -------------------------------------------------------------------------------------------------------------------- recurrent


class Recurrent(nn.Module):
    """A batch-first recurrent module and a head on its last state (or on all of them)."""

    def __init__(self, cell: nn.Module, width: int, positions: bool = False):
        super().__init__()
        self.cell, self.head, self.positions = cell, nn.Linear(width, 2), positions

    def forward(self, x):
        h, _ = self.cell(x)
        return self.head(h if self.positions else h[:, -1])


@case("recurrent", "shared")
def lstm():
    return Recurrent(nn.LSTM(2, 3, batch_first=True), 3), torch.randn(3, 4, 2)


@case("recurrent", "shared")
def lstm_deep():
    """Two layers, both directions, projected, no biases."""
    return Recurrent(nn.LSTM(2, 3, 2, batch_first=True, bidirectional=True, proj_size=2, bias=False), 4), torch.randn(
        3, 3, 2
    )


@case("recurrent", "shared", "positions")
def gru():
    return Recurrent(nn.GRU(2, 3, batch_first=True), 3, positions=True), torch.randn(3, 3, 2)


@case("recurrent", "shared")
def rnn():
    return Recurrent(nn.RNN(2, 3, nonlinearity="relu", batch_first=True), 3), torch.randn(3, 4, 2)


@case("recurrent", "shared", "twice")
def lstm_cell():
    """A cell called once per time step."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(2, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = c = x.new_zeros(len(x), 3)
            for t in range(x.shape[1]):
                h, c = self.cell(x[:, t], (h, c))
            return self.head(h)

    return Net(), torch.randn(3, 3, 2)


# -------------------------------------------------------------------------------------------------------------------- attention


@case("attention", "outside", "shared")
def multihead_attention():
    """nn.MultiheadAttention reads `out_proj.weight` without calling `out_proj`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    return Net(), torch.randn(3, 3, 4)


@case("attention", "outside", "raw", "shared", "positions")
def multihead_cross_attention():
    """Other key and value widths (raw q/k/v parameters), bias_kv, a causal mask, weights asked for."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            mask = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
            return self.head(self.attention(x, x[..., :3], x[..., 2:], attn_mask=mask)[0])

    return Net(), torch.randn(3, 3, 4)


class SelfAttention(nn.Module):
    """Causal self-attention as a GPT writes it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, d // self.heads).transpose(1, 2) for z in self.qkv(x).split(d, dim=2))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(h.transpose(1, 2).reshape(n, t, d))


@case("linear", "attention", "functional", "shared")
def sdpa():
    return nn.Sequential(SelfAttention(4, 2), nn.Tanh(), Lambda(lambda h: h.mean(1)), nn.Linear(4, 2)), torch.randn(
        3, 3, 4
    )


@case("attention", "outside", "norm", "shared")
def transformer_encoder_layer():
    """Post-norm ReLU; in eval under no_grad PyTorch takes a fused path that calls none of its modules."""
    net = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), Lambda(lambda h: h.mean(1)), nn.Linear(4, 2)
    )
    return net, torch.randn(3, 3, 4)


@case("attention", "outside", "norm", "shared", "positions")
def transformer_encoder():
    """Pre-norm GELU, two layers, final norm, with positions in the answer."""
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True, activation="gelu")
    net = nn.Sequential(
        nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False), nn.Linear(4, 2)
    )
    return net, torch.randn(3, 2, 4)


@case("attention", "norm", "embedding", "tokens", "tied", "functional", "shared", "positions")
def gpt():
    """Token and position embeddings, one block, head tied to the token embedding; answers (batch, time, vocabulary)."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.ln1, self.attention = nn.LayerNorm(width), SelfAttention(width, 2)
            self.ln2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))

        def forward(self, x):
            x = x + self.attention(self.ln1(x))
            return x + self.mlp(self.ln2(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(5, 4), nn.Embedding(3, 4)
            self.block, self.norm, self.head = Block(4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x):
            h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
            return self.head(self.norm(self.block(h)))

    return Net(), torch.randint(5, (3, 3))


# ----------------------------------------------------------------------------------------------- ways to write a forward pass


@case("linear")
def plain_class():
    """A class of its own that chains modules only, as most people write a net."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    return Net(), torch.randn(4, 3)


@case("linear")
def residual_modules():
    """A residual block whose activation is a module."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.block, self.act, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x):
            h = self.enter(x)
            return self.head(h + self.act(self.block(h)))

    return Net(), torch.randn(4, 3)


@case("linear", "functional")
def residual():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.enter(x)
            return self.head(h + F.relu(self.block(h)))

    return Net(), torch.randn(4, 3)


@case("linear", "functional")
def functional_relu():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    return Net(), torch.randn(4, 3)


@case("linear", "inplace")
def inplace_relu():
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 2)
    ), torch.randn(4, 3)


@case("linear", "inplace", "functional")
def inplace_writes():
    """A layer's answer is written to afterwards, whole, by slice and as the residual stream; so is the net's own answer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.fc1(x)
            h.mul_(1.5)
            h[:, 1:] += 0.5
            h += torch.tanh(self.fc2(torch.tanh(h)))
            out = self.fc3(torch.sin(h))
            out *= 2.0
            return out

    return Net(), torch.randn(4, 3)


@case("embedding", "tokens", "tied", "shared")
def tied_embedding():
    """The embedding is the output head."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.hidden(self.embed(x).mean(1))))

    return Net(), torch.randint(5, (4, 2))


@case("tied")
def tied_linear():
    """Two Linear modules with one weight (and biases of their own)."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].weight = net[0].weight
    return net, torch.randn(4, 3)


@case("outside")
def transposed_tie():
    """An autoencoder that decodes with the transposed encoder weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.bias = nn.Linear(3, 2), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return F.linear(torch.tanh(self.encode(x)), self.encode.weight.T, self.bias)

    return Net(), torch.randn(4, 3)


@case("outside", "functional")
def weight_outside_module():
    """A weight that no forward of its module ever touches, and one that meets the data both inside and outside."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(F.linear(x, self.fc1.weight, self.fc1.bias))
            return self.head(torch.tanh(self.fc2(h))) + self.fc2.weight.square().mean() * h[:, :2]

    return Net(), torch.randn(4, 3)


@case("outside")
def direct_forward():
    """`layer.forward(x)`: no hook of the layer fires."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc2(torch.tanh(self.fc1.forward(x)))

    return Net(), torch.randn(4, 3)


@case("twice")
def module_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.block, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = torch.tanh(self.enter(x))
            return self.head(torch.tanh(self.block(torch.tanh(self.block(h)))))

    return Net(), torch.randn(4, 2)


@case("twice", "tuple", "shared")
def siamese():
    """Both inputs through one convolution, at different lengths."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(3, 2)

        def forward(self, left, right):
            return self.head(self.conv(left).mean(-1).tanh() - self.conv(right).mean(-1).tanh())

    return Net(), (torch.randn(3, 2, 4), torch.randn(3, 2, 5))


@case("frozen")
def frozen_layer():
    """A frozen trunk below and a frozen layer between trainable ones."""
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    for layer in (net[0], net[4]):
        layer.requires_grad_(False)
    return net, torch.randn(4, 3)


@case("frozen", "norm")
def frozen_bias():
    """Within one module only the weight, or only the bias, is trained."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    net[3].weight.requires_grad_(False)
    return net, torch.randn(4, 3)


@case("raw")
def raw_parameter():
    """A matrix, a scale, an additive token and a 0-dimensional temperature, all outside any layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.scale = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(4))
            self.token, self.temperature = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.tensor(1.0))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh((x @ self.matrix) * self.scale + self.token.expand(len(x), -1))
            return self.head(h) * self.temperature.exp()

    return Net(), torch.randn(4, 3)


@case("raw")
def parameter_list():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])
            self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
            self.more = nn.ParameterDict({"head": torch.randn(2, 4)})

        def forward(self, x):
            for layer, scale in zip(self.layers, self.scales, strict=True):
                x = torch.tanh(layer(x)) * scale
            return torch.einsum("nd,cd->nc", x, self.more["head"])

    return Net(), torch.randn(4, 3)


@case("linear", "unused")
def unused_parameter():
    """A head that the forward leaves out: J = 0 there, and no gradient arrives."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)))

    return Net(), torch.randn(4, 3)


@case("linear", "unused")
def detached():
    """A trainable trunk behind `detach`: it runs, but J = 0 there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.trunk(x)).detach())

    return Net(), torch.randn(4, 3)


@case("dict", "linear")
def dict_keywords():
    """A dict whose keys are forward's parameters (Hugging Face style)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, a, b=None):
            return self.head(torch.tanh(self.left(a)) * torch.tanh(self.right(b)))

    return Net(), {"a": torch.randn(4, 2), "b": torch.randn(4, 3)}


@case("dict", "linear", "whole")
def dict_whole():
    """A dict handed over whole: forward(batch)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, batch):
            return self.head(torch.tanh(self.left(batch["a"])) + batch["b"])

    return Net(), {"a": torch.randn(4, 2), "b": torch.randn(4, 3)}


@case("tuple", "linear")
def tuple_arguments():
    """A tuple spread over forward's parameters."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, a, b):
            return self.head(torch.tanh(self.left(a) + self.right(b)))

    return Net(), (torch.randn(4, 2), torch.randn(4, 3))


@case("tuple", "linear", "whole")
def tuple_whole():
    """A tuple handed over whole: forward(pair)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, pair):
            a, b = pair
            return self.head(torch.tanh(self.left(a)) + b)

    return Net(), (torch.randn(4, 2), torch.randn(4, 3))


@dataclass
class Answer:
    """A structured answer; only `logits` is the function."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class MappingAnswer(OrderedDict):
    """A mapping with attributes, as Hugging Face's ModelOutput is."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@case("structured", "linear")
def answer_dataclass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.fc(x))
            return Answer(self.head(h), h)

    return Net(), torch.randn(4, 3)


@case("structured", "linear", "dict", "embedding", "tokens", "shared")
def answer_mapping():
    """A text classifier with an attention mask, keyword dict in, ModelOutput-like mapping out."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            weight = attention_mask.unsqueeze(-1).to(self.head.weight.dtype)
            h = torch.tanh(self.fc(self.embed(input_ids)))
            pooled = (h * weight).sum(1) / weight.sum(1)
            return MappingAnswer(loss=None, logits=self.head(pooled), hidden_states=h)

    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    return Net(), {"input_ids": torch.randint(6, (3, 3)), "attention_mask": mask}


@case("parametrized")
def weight_norm():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(4, 3)),
        nn.Tanh(),
        nn.Linear(3, 2),
    )
    return net, torch.randn(4, 3)


@case("parametrized")
def orthogonal():
    """A matrix exponential stands between the parameter and the weight."""
    layer = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2)), torch.randn(4, 3)


def _halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


@case("linear", "hooked")
def user_hook():
    """The user's own forward hook changes a layer's answer; it must still be there, and once, afterwards."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].register_forward_hook(_halve)
    return net, torch.randn(4, 3)


@case("linear", "twice")
def checkpointed():
    """Activation checkpointing: the inner forward runs again during every backward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(checkpoint(self.inner, x, use_reentrant=False)))

    return Net(), torch.randn(4, 3)


@case("norm", "batchnorm", "inplace", "shared")
def resnet():
    """Two residual blocks with BatchNorm, in-place ReLU and a strided 1 × 1 downsample."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
            self.relu, self.downsample = nn.ReLU(inplace=True), None
            if stride != 1 or i != o:
                self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += identity
            return self.relu(out)

    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), Block(2, 2, 1), Block(2, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    return net, torch.randn(3, 1, 4, 4)
