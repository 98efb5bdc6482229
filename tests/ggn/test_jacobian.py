"""J of residual functions equals torch.func's, by both modes, where torch can batch them and where it cannot."""

from __future__ import annotations

import logging
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn.ggn import jacobian, linearize
from bayesgn.ggn.jacobian import Tree


class Line(NamedTuple):
    slope: torch.Tensor
    offsets: torch.Tensor


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(b):
    return torch.sin(b[0] * torch.linspace(0, 1, 7, dtype=b.dtype)) * b[1] + b[2:].square().sum()


def inner_gradient(b):
    """As a PDE residual has it: u' − u of a curve, with torch.autograd.grad inside."""
    t = torch.linspace(0, 1, 9, dtype=b.dtype).requires_grad_()
    u = b[0] * torch.exp(b[1] * t) + b[2:].sum() * t**2
    (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    return du - u


class Square(torch.autograd.Function):
    """Has no rule for vmap or forward mode."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def custom(b):
    return torch.cat([Square.apply(b), b, b.sum()[None]])


def branching(b):
    return torch.cat([b**2, b]) if b[0].item() > 0 else torch.cat([b**3, b])


def wide(b):
    return (b[:2] * b[2:].sum()).exp()


FUNCTIONS = [plain, inner_gradient, custom, branching, wide]


def by_rows(f, θ):
    """One backward for each residual: the reference."""
    θ = θ.clone().requires_grad_()
    r = f(θ)
    return torch.stack([torch.autograd.grad(ri, θ, retain_graph=True)[0] for ri in r])


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [4, 40])
def test_dense_and_products(f, p):
    θ = draw(p) / p**0.5
    J = by_rows(f, θ)
    r, found = jacobian(f, θ)
    torch.testing.assert_close(r, f(θ).detach())
    torch.testing.assert_close(found, J)
    lin = linearize(f, θ)
    m = len(r)
    for k in range(3):  # the first product is by another engine than later ones
        torch.testing.assert_close(lin.matvec(draw(p, seed=k)), J @ draw(p, seed=k))
        torch.testing.assert_close(lin.rmatvec(draw(m, seed=k)), J.T @ draw(m, seed=k))
    torch.testing.assert_close(lin.matvec(draw(p, 3)), J @ draw(p, 3))
    torch.testing.assert_close(lin.rmatvec(draw(m, 3)), J.T @ draw(m, 3))
    assert not found.requires_grad and not r.requires_grad and not θ.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(jacobian(f, θ)[1], J)
    with torch.inference_mode():
        torch.testing.assert_close(jacobian(f, θ.clone())[1], J)


def test_chunks_do_not_matter(monkeypatch):
    module = sys.modules["bayesgn.ggn.jacobian"]  # its name in the room is that of the function
    θ = draw(30)
    whole = jacobian(plain, θ)[1], jacobian(wide, θ)[1]
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 20)
    torch.testing.assert_close(jacobian(plain, θ)[1], whole[0])
    torch.testing.assert_close(jacobian(wide, θ)[1], whole[1])


def test_what_could_not_be_batched_is_logged(caplog):
    with caplog.at_level(logging.INFO, "bayesgn.ggn"):
        jacobian(plain, draw(4))
        assert not caplog.records
        jacobian(inner_gradient, draw(4))
    assert "by backward passes" in caplog.text


def test_trees_and_batches():
    t, y = draw(6, seed=1), draw(6, seed=2)
    params = {"line": Line(torch.tensor(2.0, dtype=torch.float64), draw(2)), "rest": [draw(2, 3)]}

    def residual(q, t, y):
        curve = q["line"].slope * t + q["line"].offsets.sum() - y
        return curve, q["rest"][0].square()  # two tensors, one after the other

    r, J = jacobian(residual, params, t, y)
    assert r.shape == (12,) and J.shape == (12, 9)
    assert [Tree(params).name(j) for j in (0, 1, 2, 3, 8)] == [
        "line.slope", "line.offsets[0]", "line.offsets[1]", "rest[0][0, 0]", "rest[0][1, 2]",
    ]  # fmt: skip
    torch.testing.assert_close(J[:6, 0], t)
    torch.testing.assert_close(J[:6, 1:3], torch.ones(6, 2, dtype=torch.float64))
    torch.testing.assert_close(J[6:, 3:], 2 * params["rest"][0].reshape(-1).diag())
    assert not J[:6, 3:].any() and not J[6:, :3].any()
    tree = Tree(params)
    again = tree.unflatten(tree.flatten(params))
    assert isinstance(again["line"], Line) and torch.equal(again["rest"][0], params["rest"][0])


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 12), p=st.integers(1, 12), seed=st.integers(0, 100))
def test_linear_functions_are_their_matrix(m, p, seed):
    A, b = draw(m, p, seed=seed), draw(m, seed=seed + 1)
    r, J = jacobian(lambda x: A @ x - b, draw(p, seed=seed + 2))
    torch.testing.assert_close(J, A)
    torch.testing.assert_close(r, A @ draw(p, seed=seed + 2) - b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    r, J = jacobian(plain, draw(4).to(dtype))
    assert r.dtype == J.dtype == dtype
    assert linearize(plain, draw(4).to(dtype)).matvec(draw(4).to(dtype)).dtype == dtype


def test_functions_may_work_in_place_and_answer_one_buffer():
    buffer = torch.zeros(3, dtype=torch.float64)

    def f(b):
        c = b.clone()
        c[0] *= 2
        if c.requires_grad or torch._C._functorch.maybe_current_level() is not None:
            return c**2
        b += 1  # spoils what it was given
        return buffer.copy_(c**2)

    θ = draw(3)
    before = θ.clone()
    lin = linearize(f, θ)
    first = lin.value.clone()
    linearize(f, θ + 1)
    assert torch.equal(lin.value, first) and torch.equal(lin.θ, before) and torch.equal(θ, before)


def test_a_network_is_left_alone():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    x = draw(5, 2)
    params = {name: p.detach() for name, p in net.named_parameters()}
    r, J = jacobian(lambda q: torch.func.functional_call(net, q, (x,)), params)
    expected = torch.func.jacrev(lambda q: torch.func.functional_call(net, q, (x,)).flatten())(params)
    torch.testing.assert_close(J, torch.cat([expected[name].reshape(5, -1) for name in params], 1))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


BAD = [
    (lambda b: b.detach() * 2, ValueError, "do not depend on the parameters"),
    (lambda b: torch.ones(3, dtype=torch.float64), ValueError, "do not depend on the parameters"),
    (lambda b: torch.ones(9, dtype=torch.float64), ValueError, "do not depend on the parameters"),
    (lambda b: 3.0, TypeError, "answered a float; expected a tensor"),
    (lambda b: torch.complex(b, b), TypeError, "view_as_real"),
    (lambda b: b[:0], ValueError, "no residuals"),
    (lambda b: b.long(), TypeError, "expected real floating point"),
]


@pytest.mark.parametrize("f, kind, message", BAD)
def test_bad_functions(f, kind, message):
    with pytest.raises(kind, match=message):
        jacobian(f, draw(4))


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"hold a float at x\[0\]; expected a tensor"):
        jacobian(plain, [1.0, 2.0])
    with pytest.raises(TypeError, match="parameter a has dtype torch.int64"):
        jacobian(plain, {"a": torch.arange(3)})
    with pytest.raises(ValueError, match="hold no numbers"):
        jacobian(plain, torch.zeros(0))
    with pytest.raises(TypeError, match="residual_fn is a Tensor"):
        jacobian(draw(3), draw(3))
    with pytest.raises(ValueError, match=r"expected \[p\] or \[p k\] with p = 4"):
        linearize(plain, draw(4)).matvec(draw(3))
