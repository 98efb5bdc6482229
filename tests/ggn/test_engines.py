"""The BackPACK engine: each module of CHAIN stands behind a layer with weights, against autograd in float64 and against our hooks.

BackPACK multiplies by an averaging pool with a kernel of float32, whatever the net's dtype: those are compared in float32, and in float64
the self-check hands them to the hooks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Linearizer
from bayesgn.ggn.backpack import CHAIN, chain_of
from tests.oracles import dense

# Shapes [d …] that go in, and the modules under test. Whatever they hand on is flattened and goes into a Linear layer with two outputs.
FLAT, LINE, IMAGE, VOLUME = (3,), (2, 9), (2, 7, 6), (2, 5, 4, 5)
BEFORE = {
    FLAT: lambda: nn.Linear(3, 4),
    LINE: lambda: nn.Conv1d(2, 4, 2),  # [4 8]
    IMAGE: lambda: nn.Conv2d(2, 4, 2),  # [4 6 5]
    VOLUME: lambda: nn.Conv3d(2, 4, 2),  # [4 4 3 4]
}
MODULES = [
    (FLAT, nn.Linear(4, 5)),
    (FLAT, nn.Linear(4, 5, bias=False)),
    (LINE, nn.Conv1d(4, 3, 3)),
    (LINE, nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)),
    (IMAGE, nn.Conv2d(4, 3, (3, 2), bias=False)),
    (IMAGE, nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), groups=2)),
    (VOLUME, nn.Conv3d(4, 3, 2, stride=2, padding=1)),
    (FLAT, nn.ReLU()),
    (IMAGE, nn.ReLU()),
    (FLAT, nn.Sigmoid()),
    (FLAT, nn.Tanh()),
    (FLAT, nn.LeakyReLU(0.3)),
    (FLAT, nn.LogSigmoid()),
    (FLAT, nn.ELU(1.5)),
    (FLAT, nn.SELU()),
    (LINE, nn.MaxPool1d(3, 2, padding=1)),
    (IMAGE, nn.MaxPool2d((2, 3), stride=1)),
    (VOLUME, nn.MaxPool3d(2)),
    (LINE, nn.AvgPool1d(3, 2, padding=1)),
    (IMAGE, nn.AvgPool2d((3, 2), stride=2)),
    (VOLUME, nn.AvgPool3d(2, 1)),
    (IMAGE, nn.Flatten()),
    (FLAT, nn.Dropout(0.4)),
    (FLAT, nn.Identity()),
]


def chain(shape: tuple[int, ...], module: nn.Module) -> tuple[nn.Sequential, Tensor]:
    """[a layer with weights, the module, Flatten, Linear] in float64 and eval mode, and 5 data."""
    generator = torch.Generator().manual_seed(0)
    first, module = BEFORE[shape](), copy.deepcopy(module).eval()
    with torch.no_grad():
        width = module.double()(first.double()(torch.zeros(1, *shape, dtype=torch.float64))).numel()
    net = nn.Sequential(first, module, nn.Flatten(), nn.Linear(width, 2)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net, torch.randn(5, *shape, generator=generator, dtype=torch.float64)


POOLS_OF_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def linearize(net: nn.Module, x: Tensor, use_backpack: bool):
    linearizer = Linearizer(net, ParameterVector.of(net), use_backpack=use_backpack)
    return linearizer, linearizer(x, lambda f: f)


def jacobian(lin, S: Tensor | None = None) -> Tensor:
    return torch.cat([f.jacobian() for f in lin.factors(S)], -1)


def test_every_module_of_the_chain_is_listed():
    assert {type(module) for _, module in MODULES} == set(CHAIN)


@pytest.mark.parametrize("shape, module", MODULES, ids=[str(m) for _, m in MODULES])
def test_backpack_is_autograd_and_our_hooks(shape, module):
    net, x = chain(shape, module)
    J, tolerance = dense.jacobian(net, x), {"rtol": 1e-11, "atol": 1e-12}
    if isinstance(module, POOLS_OF_AVERAGES):
        exact, x = linearize(net, x, True)[0], x.float()
        assert exact.engine is None, "BackPACK serves averaging pools in float64 now: compare them there"
        net, J, tolerance = net.float(), J.float(), {"rtol": 1e-4, "atol": 1e-5}
    before = {name: set(m.__dict__) for name, m in net.named_modules()}
    by_backpack, lin = linearize(net, x, True)
    by_hooks, other = linearize(net, x, False)
    assert by_backpack.engine is not None, "BackPACK was turned away"
    assert by_hooks.engine is None
    torch.testing.assert_close(jacobian(lin), J, **tolerance)
    torch.testing.assert_close(jacobian(other), J, **tolerance)
    S = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    found = jacobian(by_backpack(x, lambda f: f), S)
    torch.testing.assert_close(found, S.mT @ J, **tolerance)
    torch.testing.assert_close(found, jacobian(by_hooks(x, lambda f: f), S), **tolerance)
    assert {name: set(m.__dict__) for name, m in net.named_modules()} == before, "BackPACK left something on the net"


TURNED_AWAY = {
    "in place": (FLAT, nn.ReLU(inplace=True)),
    "ceil_mode": (IMAGE, nn.MaxPool2d(4, ceil_mode=True)),
    "padding not counted": (IMAGE, nn.AvgPool2d(2, padding=1, count_include_pad=False)),
    "circular": (IMAGE, nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "same": (LINE, nn.Conv1d(4, 3, 3, padding="same")),
    "not in CHAIN": (FLAT, nn.GELU()),
}


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_options_that_backpack_does_not_know_go_to_the_hooks(name):
    net, x = chain(*TURNED_AWAY[name])
    linearizer, lin = linearize(net, x, True)
    assert chain_of(net) is None and linearizer.engine is None
    torch.testing.assert_close(jacobian(lin), dense.jacobian(net, x), rtol=1e-9, atol=1e-10)
