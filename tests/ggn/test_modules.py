"""The module matrix: J by our engines equals brute force, for every module of the zoo, and the net comes back as it came."""

import copy

import pytest
import torch
from torch import nn

from bayesgn import _data
from bayesgn._parameters import ParameterVector
from bayesgn.ggn import Diag, Full, Kron, Layerwise
from bayesgn.ggn.linearization import Linearizer
from tests.oracles import dense
from tests.zoo.modules import ZOO


def rows_of(case):
    if "class_dim" in case.marks:
        return lambda output: output.movedim(1, -1)
    return lambda output: output.unsqueeze(-1) if output.dim() == 1 else output


def snapshot(net: nn.Module):
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [(p.requires_grad, p.grad) for p in net.parameters()],
        [m.training for m in net.modules()],
        [[len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)] for m in net.modules()],
        [set(m.__dict__) for m in net.modules()],
    )


def assert_same(before, after):
    for k, v in before[0].items():
        assert torch.equal(v, after[0][k]), k
    assert before[1:] == after[1:]


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_factors_are_the_jacobian(case):
    net, x, r = case.build()
    rows = rows_of(case)
    J = dense.jacobian(net, x, rows=rows)
    before = snapshot(net)
    linearizer = Linearizer(net, ParameterVector.of(net))
    lin = linearizer(x, rows)
    found = torch.cat([f.jacobian() for f in lin.factors()], -1)
    torch.testing.assert_close(found, J, rtol=1e-9, atol=1e-10)
    assert_same(before, snapshot(net))
    # a second batch of another size and order goes through the settled plan
    part = _data.rows(x, [2, 0, 1])
    again = torch.cat([f.jacobian() for f in linearizer(part, rows).factors()], -1)
    torch.testing.assert_close(again, J[[2, 0, 1]], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ZOO, ids=str)
@pytest.mark.parametrize("structure", [Full, Layerwise, Kron, Diag], ids=lambda s: s.__name__)
def test_every_structure_serves_every_module(structure, case):
    net, x, r = case.build()
    rows = rows_of(case)
    linearizer = Linearizer(net, ParameterVector.of(net))
    linearizer.prepare(x, rows)
    p = linearizer.vector.numel
    like = next(net.parameters())
    generator = torch.Generator().manual_seed(1)
    S = torch.randn(_data.len_of(x), r, 2, generator=generator, dtype=torch.float64)
    curvature = structure().start(linearizer.blocks, like)
    curvature.add(linearizer(x, rows).factors(S))
    J = dense.jacobian(net, x, rows=rows)
    H = dense.ggn(J, S @ S.mT)
    prior, scale = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    precision = curvature.with_prior([prior] * len(linearizer.blocks), scale)
    # What the structure claims to keep, written out densely by itself: M = (s H + P) through solve.
    Σ = precision.solve(torch.eye(p, dtype=torch.float64))
    torch.testing.assert_close(Σ, Σ.mT, rtol=1e-8, atol=1e-10)
    lin = linearizer(x, rows)
    torch.testing.assert_close(precision.covariance(lin.factors()), dense.function_cov(J, Σ), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(precision.logdet(), -torch.linalg.slogdet(Σ)[1], rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(precision.diagonal(), Σ.diagonal(), rtol=1e-8, atol=1e-10)
    M = torch.linalg.inv(Σ)
    if structure is Full:
        torch.testing.assert_close(M, 1.3 * H + 0.7 * torch.eye(p, dtype=torch.float64), rtol=1e-7, atol=1e-8)
    if structure is Diag:
        torch.testing.assert_close(M.diagonal(), 1.3 * H.diagonal() + 0.7, rtol=1e-7, atol=1e-8)
    if structure is Layerwise:
        for b in linearizer.blocks:
            wanted = 1.3 * H[b.where, b.where] + 0.7 * torch.eye(b.numel, dtype=torch.float64)
            torch.testing.assert_close(M[b.where, b.where], wanted, rtol=1e-7, atol=1e-8)


def test_net_is_restored_when_its_forward_raises():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(2, 2), nn.Linear(2, 1), 0
            self.b.weight.requires_grad_(False)

        def forward(self, x):
            h = self.a(x)
            if len(x) > 2:
                raise RuntimeError("out of memory")
            return self.b(h)

    net = Fails().train()
    before = snapshot(net)
    linearizer = Linearizer(net, ParameterVector.of(net))
    with pytest.raises(RuntimeError, match="out of memory"):
        linearizer(torch.randn(4, 2), lambda f: f)
    assert_same(before, snapshot(net))


def test_engines_agree_and_say_which_was_taken(caplog):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("INFO", logger="bayesgn.ggn"):
        by_backpack = Linearizer(net, ParameterVector.of(net), use_backpack=True)(x, lambda f: f).factors()
        by_hooks = Linearizer(net, ParameterVector.of(net), use_backpack=False)(x, lambda f: f).factors()
    assert "engine BackPACK" in caplog.text and "engine hooks" in caplog.text
    for a, b in zip(by_backpack, by_hooks, strict=True):
        torch.testing.assert_close(a.jacobian(), b.jacobian(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in ZOO if "dict" not in c.marks and "tuple" not in c.marks], ids=str)
def test_backpack_is_right_or_not_used(case):
    """With BackPACK wanted wherever it can serve, the Jacobian is still exact: the self-check turns it away elsewhere."""
    net, x, r = case.build()
    lin = Linearizer(net, ParameterVector.of(net), use_backpack=True)(x, rows_of(case))
    found = torch.cat([f.jacobian() for f in lin.factors()], -1)
    torch.testing.assert_close(found, dense.jacobian(net, x, rows=rows_of(case)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in ZOO if "tokens" not in c.marks], ids=str)
def test_gradients_of_mean_and_variance_by_x(case):
    """d variance / dx by our differentiable factors equals finite differences of our own (checked above) variance."""
    net, x, r = case.build()
    rows = rows_of(case)
    if {"recurrent", "attention"} & set(case.marks):
        pytest.skip("second derivatives of fused kernels are torch's own matter; see the zoo's table")
    if case.name == "detached":
        pytest.skip("the net itself cuts the path from x to its features: autograd's slope is zero by its author's wish")
    tensors = [t for t in _data.tensors(x) if t.is_floating_point()]
    if not tensors:
        pytest.skip("integer inputs have no derivative")
    direction = copy.copy(tensors[0]).normal_(generator=torch.Generator().manual_seed(2))
    linearizer = Linearizer(net, ParameterVector.of(net))

    def moved(t):
        return _data.apply(x, lambda v: v + t * direction if v is tensors[0] else v)

    def total(t, differentiable):
        lin = linearizer(moved(t), rows, differentiable)
        return sum(f.jacobian().square().sum() for f in lin.factors()) + lin.output.sum()

    linearizer.prepare(x, rows)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(t, True), t)
    h = 1e-5
    with torch.no_grad():
        wanted = (total(torch.tensor(h).double(), False) - total(torch.tensor(-h).double(), False)) / (2 * h)
    torch.testing.assert_close(slope, wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_callers_gradient_mode_does_not_matter(mode):
    net, x, r = ZOO[0].build()
    J = dense.jacobian(net, x)
    with mode():
        lin = Linearizer(net, ParameterVector.of(net))(x + 0.0, rows_of(ZOO[0]))
        found = torch.cat([f.jacobian() for f in lin.factors()], -1)
    torch.testing.assert_close(found, J, rtol=1e-9, atol=1e-10)
