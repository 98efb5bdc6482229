"""Inner Gauss-Newton beside dense linearised models, closed forms, scipy and torch's own optimizers."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, jacrev

from bayesgn import likelihoods, optim, rules

FLOAT = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomized(net: nn.Module, seed: int = 0, scale: float = 0.6) -> nn.Module:
    """The net in float64 with weights from a seed of its own."""
    g = seeded(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=FLOAT))
    return net


def mlp(seed: int = 0, d: int = 3, h: int = 4, c: int = 3) -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, c)), seed)


def labels(count: int, n: int = 6, seed: int = 0, d: int = 3, c: int = 3) -> list:
    g = seeded(seed)
    return [(torch.randn(n, d, generator=g, dtype=FLOAT), torch.randint(c, (n,), generator=g)) for _ in range(count)]


class Recording(torch.optim.SGD):
    """SGD that keeps every iterate, gradient and rate."""

    log: list

    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        self.log.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params], self.param_groups[0]["lr"]))
        return super().step(closure)


def recorder(lr: float = 0.1, momentum: float = 0.0):
    """A recipe and the log of what it builds."""
    log: list = []

    def recipe(params):
        opt = Recording(params, lr=lr, momentum=momentum)
        opt.log = log
        return opt

    return recipe, log


# --- Jδ -------------------------------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Through the fused kernel, which has no forward mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embedding(x))))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.Linear(24, 2)

    def forward(self, x):
        return self.out(F.gelu(self.norm(self.conv(x))).flatten(1))


ENCODER = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
NETS = {"attention": Attention, "encoder": ENCODER, "tied": Tied, "convolution": Convolution, "lstm": lambda: nn.LSTM(8, 4, batch_first=True)}


def input_of(name: str) -> torch.Tensor:
    return torch.randint(7, (2, 5), generator=seeded(1)) if name == "tied" else torch.randn(2, 5, 8, generator=seeded(1), dtype=FLOAT)


def function_of(name: str, net: nn.Module, x):
    return lambda weights: (lambda f: f[0] if name == "lstm" else f)(functional_call(net, dict(weights), (x,)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # (the oracle's vmap)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("products, tolerance", [(optim.ForwardMode(), 1e-11), (optim.FiniteDifference(), 1e-5)])
def test_tangent_products_are_those_of_the_dense_jacobian(name, products, tolerance):
    net = randomized(NETS[name](), scale=0.4).eval()
    function = function_of(name, net, input_of(name))
    θ = {n: p.detach() for n, p in net.named_parameters()}
    g = seeded(2)
    δ = {n: torch.randn(p.shape, generator=g, dtype=FLOAT) for n, p in list(θ.items())[::2]}  # some weights stand still
    fast = torch.backends.mha.get_fastpath_enabled()
    Jδ = products(function, θ, function(θ), δ)
    J = jacrev(lambda part: function({**θ, **part}))({n: θ[n] for n in δ})
    dense = sum((J[n].flatten(-δ[n].dim()) @ δ[n].flatten()) for n in δ)
    torch.testing.assert_close(Jδ, dense, atol=tolerance * float(dense.abs().max()), rtol=0)
    assert not Jδ.requires_grad and torch.backends.mha.get_fastpath_enabled() == fast


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_an_operation_without_forward_mode_is_named_and_differences_do_without():
    net = mlp()
    x, y = labels(1)[0]
    wrapped = nn.Sequential(*net)
    wrapped.forward = lambda x: NoForwardMode.apply(net(x))
    batches, likelihood = [(x, y)] * 3, likelihoods.Categorical()
    recipe = lambda params: torch.optim.SGD(params, lr=0.1)
    with pytest.raises(NotImplementedError, match="products=FiniteDifference"):
        optim.GaussNewtonInner(wrapped, likelihood, recipe, products=optim.ForwardMode()).step(batches)
    opt = optim.GaussNewtonInner(wrapped, likelihood, recipe)
    opt.step(batches)
    assert opt.last is not None and opt.last.after < opt.last.before


def test_differences_refuse_sixteen_bits():
    w = {"w": torch.ones(3, dtype=torch.bfloat16)}
    with pytest.raises(TypeError, match="ForwardMode"):
        optim.FiniteDifference()(lambda v: v["w"] ** 2, w, torch.ones(3, dtype=torch.bfloat16), w)
    Jδ = optim.ForwardMode()(lambda v: v["w"] ** 2, w, torch.ones(3, dtype=torch.bfloat16), w)
    assert torch.equal(Jδ, torch.full((3,), 2.0, dtype=torch.bfloat16))


# --- objectives -----------------------------------------------------------------------------------------------------------------------------
def tokens(c: int, missing: bool):
    y = torch.randint(c, (3, 4), generator=seeded(3))
    return torch.where(torch.arange(12).reshape(3, 4) % 5 == 0, -100, y) if missing else y


WEIGHT = torch.tensor([1.0, 0.2, 3.0, 0.7])
LIKELIHOODS = {
    "softmax": (likelihoods.Categorical(), (3, 4, 4), tokens(4, False)),
    "softmax, smooth, weighted, missing": (likelihoods.Categorical(weight=WEIGHT, label_smoothing=0.2), (3, 4, 4), tokens(4, True)),
    "Gaussian": (likelihoods.Gaussian(0.3), (5, 2), torch.randn(5, 2, generator=seeded(4), dtype=FLOAT)),
    "Poisson": (likelihoods.Poisson(), (5, 1), torch.arange(5, dtype=FLOAT)[:, None]),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("objective", [optim.Convex(), optim.Quadratized()])
def test_objectives_are_what_their_formulas_say(name, objective):
    likelihood, shape, y = LIKELIHOODS[name]
    g = seeded(5)
    f, v = (torch.randn(shape, generator=g, dtype=FLOAT) for _ in range(2))
    rows, n = f.shape[:-1].numel(), int(likelihood.observed(f, y).sum())
    mean = lambda f: -likelihood.log_prob(f, y).sum() / n
    if isinstance(objective, optim.Convex):
        expected = mean(f + v)
    else:
        slope = torch.autograd.functional.jvp(mean, f, v)[1]
        Λ = torch.block_diag(*likelihood.ggn(f, y).reshape(rows, shape[-1], shape[-1]))
        expected = mean(f) + slope + v.flatten() @ Λ @ v.flatten() / (2 * n)
    torch.testing.assert_close(objective.value(likelihood, f, v, y), expected)
    at = v.clone().requires_grad_()
    (u,) = torch.autograd.grad(_value(objective, likelihood, f, at, y), at)
    torch.testing.assert_close(objective.gradient(likelihood, f, v, y), u)


@pytest.mark.parametrize("objective", [optim.Convex(), optim.Quadratized()])
def test_a_micro_batch_of_missing_rows_has_no_slope(objective):
    f, y = torch.randn(4, 3, dtype=FLOAT), torch.full((4,), -100)
    assert bool((objective.gradient(likelihoods.Categorical(), f, torch.ones_like(f), y) == 0).all())


def _value(objective, likelihood, f, v, y):
    """The value with Λ by explicit blocks, so that its gradient by autodiff shares no code with the objective's."""
    n = int(likelihood.observed(f, y).sum())
    if isinstance(objective, optim.Convex):
        return -likelihood.log_prob(f + v, y).sum() / n
    Λv = (likelihood.ggn(f, y) @ v.unsqueeze(-1)).squeeze(-1)
    return ((Λv / 2 - likelihood.gradient(f, y)) * v).sum() / n


def test_a_curvature_by_name_is_the_default_where_it_is_the_fisher_information():
    likelihood, shape, y = LIKELIHOODS["softmax"]
    f, v = (torch.randn(shape, generator=seeded(s), dtype=FLOAT) for s in (6, 7))
    named = optim.Quadratized(rules.GaussNewton()).gradient(likelihood, f, v, y)
    torch.testing.assert_close(named, optim.Quadratized().gradient(likelihood, f, v, y))
    drawn = [optim.Quadratized(rules.MonteCarloFisher(2000), seeded(8)).gradient(likelihood, f, v, y) for _ in range(2)]
    assert torch.equal(*drawn)
    torch.testing.assert_close(drawn[0], named, atol=0.05 * float(named.abs().max()), rtol=0)


# --- the inner problem ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [optim.Convex(), optim.Quadratized()])
@pytest.mark.parametrize("blocks", [optim.Whole(), optim.Layerwise(), optim.Layerwise(lambda name: str(int(name[0]) < 4))])
def test_inner_gradients_are_those_of_the_dense_linearised_net(objective, blocks):
    net, likelihood, data = mlp(1), likelihoods.Categorical(), labels(5)
    θ = {n: p.detach().clone() for n, p in net.named_parameters()}
    recipe, log = recorder(lr=0.5, momentum=0.9)
    optim.GaussNewtonInner(net, likelihood, recipe, objective=objective, blocks=blocks, products=optim.ForwardMode()).step(data)
    assert len(log) == 5
    for (x, y), (at, gradients, _) in zip(data, log):
        f = functional_call(net, θ, (x,))
        J = jacrev(lambda weights, x=x: functional_call(net, weights, (x,)))(θ)
        found = dict(zip(θ, gradients))
        for block in blocks(list(θ)):
            δ = {n: (p - θ[n]).requires_grad_() for n, p in zip(θ, at) if n in block}
            v = sum(J[n].flatten(2) @ d.flatten() for n, d in δ.items())
            dense = torch.autograd.grad(_value(objective, likelihood, f, v, y), list(δ.values()))
            for n, d in zip(δ, dense):
                torch.testing.assert_close(found[n], d, atol=1e-12, rtol=1e-9)


def constant(progress: float) -> float:
    return 1.0


def test_one_step_solves_linear_least_squares():
    g = seeded(0)
    x, y = torch.randn(40, 3, generator=g, dtype=FLOAT), torch.randn(40, 2, generator=g, dtype=FLOAT)
    net = randomized(nn.Linear(3, 2))
    opt = optim.GaussNewtonInner(
        net, likelihoods.Gaussian(1.0), lambda p: torch.optim.SGD(p, lr=0.4, momentum=0.5), products=optim.ForwardMode(), schedule=constant
    )
    opt.step([(x, y)] * 150)
    X = torch.cat([x, torch.ones(40, 1, dtype=FLOAT)], 1)
    solution = torch.linalg.lstsq(X, y).solution
    torch.testing.assert_close(torch.cat([net.weight.mT, net.bias[None]]), solution, atol=1e-9, rtol=0)
    assert opt.last is not None and opt.last.rate == 1.0


def test_one_prox_linear_step_solves_logistic_regression():
    x, y = labels(1, n=60, seed=3)[0]
    net = randomized(nn.Linear(3, 3, bias=False), scale=0.1)
    opt = optim.GaussNewtonInner(
        net, likelihoods.Categorical(), lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.8), objective=optim.Convex(),
        products=optim.ForwardMode(), schedule=constant,
    )  # fmt: skip
    opt.step([(x, y)] * 200)

    def loss(w):
        at = torch.tensor(w, dtype=FLOAT, requires_grad=True)
        value = F.cross_entropy(x @ at.reshape(3, 3).mT, y)
        return value.item(), torch.autograd.grad(value, at)[0].numpy()

    best = minimize(loss, [0.0] * 9, jac=True, method="BFGS", options={"gtol": 1e-10})
    assert F.cross_entropy(net(x), y).item() == pytest.approx(best.fun, abs=1e-10)


class Apart(nn.Module):
    """Two nets side by side: no output depends on both, so H has no cross-block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(3, c=1), mlp(4, c=2)

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], -1)


def test_layerwise_is_full_where_blocks_share_no_output():
    data = [(x, torch.randn(len(x), 3, generator=seeded(9), dtype=FLOAT)) for x, _ in labels(12)]
    found = []
    for blocks in (optim.Whole(), optim.Layerwise(lambda name: name.split(".")[0])):
        net = randomized(Apart(), 5)
        recipe = lambda params: torch.optim.Adam(params, lr=0.05)
        opt = optim.GaussNewtonInner(net, likelihoods.Gaussian(0.1), recipe, blocks=blocks, products=optim.ForwardMode())
        for _ in range(2):
            opt.step(data)
        found.append(torch.nn.utils.parameters_to_vector(net.parameters()))
    torch.testing.assert_close(*found, atol=1e-11, rtol=0)
    assert optim.Layerwise()(["a.weight", "a.bias", "scale"]) == [["a.weight", "a.bias"], ["scale"]]


def test_weight_decay_of_the_inner_optimizer_is_on_the_weights():
    net, data = mlp(2), labels(1)
    θ = [p.detach().clone() for p in net.parameters()]
    recipe = lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.5)
    optim.GaussNewtonInner(net, likelihoods.Categorical(), recipe, line_search=None).step(data)
    loss = F.cross_entropy(functional_call(net, dict(zip(dict(net.named_parameters()), [p.requires_grad_() for p in θ])), (data[0][0],)), data[0][1])
    for p, before, g in zip(net.parameters(), θ, torch.autograd.grad(loss, θ)):
        torch.testing.assert_close(p, before - 0.1 * (g + 0.5 * before))


# --- which point of the path ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "averaging, share",
    [(optim.LastIterate(), [0, 0, 0, 0, 1]), (optim.TailAverage(0.6), [0, 0, 1, 1, 1]), (optim.TailAverage(1.0), [1] * 5),
     (optim.ExponentialAverage(0.5), [1, 2, 4, 8, 16])],
)  # fmt: skip
def test_averages_of_the_path(averaging, share):
    net, data = mlp(6), labels(5)
    θ = [p.detach().clone() for p in net.parameters()]
    recipe, log = recorder(lr=0.1)
    optim.GaussNewtonInner(net, likelihoods.Categorical(), recipe, averaging=averaging, line_search=None).step(data)
    after = [[p - rate * g for p, g in zip(at, gradients)] for at, gradients, rate in log]
    for i, p in enumerate(net.parameters()):
        torch.testing.assert_close(p - θ[i], sum(s * path[i] for s, path in zip(share, after)) / sum(share) - θ[i], atol=1e-12, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:the step was not taken")
def test_rates_are_the_product_of_the_recipe_the_cosine_and_the_scheduler():
    net, data = mlp(), labels(4)
    recipe, log = recorder(lr=0.2)
    opt = optim.GaussNewtonInner(net, likelihoods.Categorical(), recipe)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.1)
    for _ in range(2):
        opt.step(data)
        scheduler.step()
    expected = [0.2 * 0.1**outer * optim.cosine(k / 4) for outer in range(2) for k in range(4)]
    assert [rate for *_, rate in log] == pytest.approx(expected)


# --- acceptance -----------------------------------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), lr=st.floats(0.01, 300.0), search=st.sampled_from([optim.Grid(1.0, 0.5, 4), optim.Backtracking(tries=3)]))
def test_no_rise_is_ever_taken(seed, lr, search):
    net, data = mlp(seed), labels(3, seed=seed)
    x, y = labels(1, seed=seed + 1)[0]
    θ = [p.detach().clone() for p in net.parameters()]
    before = F.cross_entropy(net(x), y).item()
    opt = optim.GaussNewtonInner(net, likelihoods.Categorical(), lambda p: torch.optim.SGD(p, lr=lr), line_search=search)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(data, held_out=[(x, y)])
    after, last = F.cross_entropy(net(x), y).item(), opt.last
    assert last is not None and last.before == pytest.approx(before) and last.after == pytest.approx(after)
    if last.rate > 0:
        assert after < before
    else:
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), θ))
        assert any("the step was not taken" in str(w.message) for w in caught)


def test_a_diverged_path_is_not_taken():
    net, data = mlp(), labels(200)
    θ = copy.deepcopy(net.state_dict())
    opt = optim.GaussNewtonInner(net, likelihoods.Gaussian(1e-3), lambda p: torch.optim.SGD(p, lr=1e8), line_search=None)
    with pytest.warns(RuntimeWarning, match="not finite; lower the inner learning rate"):
        opt.step([(x, F.one_hot(y, 3).double()) for x, y in data])
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), θ.values()))


class Noisy(nn.Module):
    """With everything that a forward pass in train mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.body(x) * self.frozen


def picture(net: nn.Module, opt: optim.GaussNewtonInner) -> tuple:
    modes = [(m.training, len(m._forward_hooks)) for m in net.modules()]
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    return {k: v.clone() for k, v in net.state_dict().items()}, modes, flags, copy.deepcopy(opt.state_dict())


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(s, t) for s, t in zip(a, b))
    return a == b


def test_the_net_and_the_optimizer_are_untouched_when_data_raise_in_the_middle():
    net = randomized(Noisy(), 2)
    net.train()
    opt = optim.GaussNewtonInner(net, likelihoods.Categorical(), carry=0.5)
    good = labels(6)
    opt.step(good)
    state = torch.random.get_rng_state()
    before = picture(net, opt)

    def broken():
        yield from good[:3]
        raise OSError("the disk is gone")

    opt.steps = 6
    with pytest.raises(OSError, match="the disk is gone"):
        opt.step(broken())
    assert same(picture(net, opt), before)
    opt.steps = None
    x, y = good[0]
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        opt.step([(x, y + 7)])
    with pytest.raises(ValueError, match="NaN or infinite"):
        opt.step([(x * float("nan"), y)])
    assert same(picture(net, opt), before)
    opt.step(good)
    after = picture(net, opt)
    assert same(after[1:3], before[1:3]) and not same(after[0], before[0]), "a step changes weights alone"
    changed = {k for k in after[0] if not torch.equal(after[0][k], before[0][k])}
    assert changed == {n for n, p in net.named_parameters() if p.requires_grad}
    assert torch.equal(torch.random.get_rng_state(), state), "no dropout was drawn"


def test_a_saved_optimizer_goes_on_as_the_first():
    data = labels(8)
    nets = [mlp(7), mlp(7)]
    build = lambda net: optim.GaussNewtonInner(net, likelihoods.Categorical(), carry=0.5, averaging=optim.TailAverage(0.5), lr=0.5)
    one = build(nets[0])
    one.step(data[:4])
    saved = {"net": copy.deepcopy(nets[0].state_dict()), "opt": copy.deepcopy(one.state_dict())}
    one.step(data[4:])
    other = build(nets[1])
    nets[1].load_state_dict(saved["net"])
    other.param_groups[0]["lr"] = 3.0
    other.load_state_dict(saved["opt"])
    other.step(data[4:])
    assert other.param_groups[0]["lr"] == 0.5
    assert same(nets[0].state_dict(), nets[1].state_dict()) and same(one.state_dict(), other.state_dict())
    cold = build(nets[1])
    nets[1].load_state_dict(saved["net"])
    cold.step(data[4:])
    assert not same(nets[0].state_dict(), nets[1].state_dict()), "momenta and the last step matter"
    with pytest.raises(ValueError, match=r"has no \['inner', 'step'\]"):
        one.load_state_dict(torch.optim.SGD(nets[0].parameters(), lr=1.0).state_dict())


# --- bad input ------------------------------------------------------------------------------------------------------------------------------
def test_what_cannot_be_right_is_refused():
    net, likelihood, data = mlp(), likelihoods.Categorical(), labels(3)
    with pytest.raises(ValueError, match="unknown length; pass steps="):
        optim.GaussNewtonInner(net, likelihood).step(iter(data))
    with pytest.raises(ValueError, match="3 micro-batches came for 5 inner steps"):
        optim.GaussNewtonInner(net, likelihood, steps=5).step(data)
    with pytest.raises(ValueError, match="0 micro-batches came"):
        optim.GaussNewtonInner(net, likelihood, steps=5).step([])
    with pytest.raises(ValueError, match="steps=0"):
        optim.GaussNewtonInner(net, likelihood, steps=0)
    with pytest.raises(ValueError, match="carry=2"):
        optim.GaussNewtonInner(net, likelihood, carry=2)
    with pytest.raises(ValueError, match="unfreeze some"):
        optim.GaussNewtonInner(copy.deepcopy(net).requires_grad_(False), likelihood)
    stream = itertools.cycle(data)
    optim.GaussNewtonInner(net, likelihood, steps=4).step(stream, held_out=data)  # an endless iterator is fine with steps
    assert torch.equal(next(stream)[0], data[1][0]), "four were taken, no more"


# --- Muon -----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_orthogonalized_keeps_singular_vectors_and_levels_their_values(shape):
    from bayesgn.optim.muon import orthogonalized

    G = torch.randn(3, *shape, generator=seeded(0), dtype=FLOAT)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ orthogonalized(G) @ Vh.mT
    torch.testing.assert_close(core - torch.diag_embed(core.diagonal(dim1=1, dim2=2)), torch.zeros_like(core), atol=1e-10, rtol=0)
    big = S / S.norm(dim=-1, keepdim=True) > 0.02
    assert ((core.diagonal(dim1=1, dim2=2)[big] - 1).abs() < 0.35).all()


def test_muon_is_torchs(monkeypatch):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t)  # theirs rounds to bfloat16 before it multiplies
    ours, theirs = (randomized(nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)), 1) for _ in range(2))
    one = optim.MuonAdamW(ours.parameters(), [], lr=0.03, weight_decay=0.1)
    other = torch.optim.Muon(theirs.parameters(), lr=0.03, weight_decay=0.1)
    x = torch.randn(20, 6, generator=seeded(2), dtype=FLOAT)
    for _ in range(4):
        for net, opt in ((ours, one), (theirs, other)):
            net.zero_grad()
            (net(x) ** 2 / 2 - net(x).sin()).sum().backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0)


def test_the_adam_part_is_exactly_adamw():
    ours, theirs = mlp(8), mlp(8)
    one = optim.MuonAdamW([], ours.parameters(), adam_lr=0.02, weight_decay=0.1, eps=1e-8)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for x, y in labels(5):
        for net, opt in ((ours, one), (theirs, other)):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_hidden_matrices_are_found():
    assert optim.MuonRecipe(mlp()).hidden == ("0.weight", "2.weight")
    assert optim.MuonRecipe(Tied()).hidden == ("body.weight",)
    assert optim.MuonRecipe(Convolution()).hidden == ("conv.weight",)
    assert optim.MuonRecipe(mlp(), hidden=["2.weight"]).hidden == ("2.weight",)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert optim.MuonRecipe(frozen).hidden == ("2.weight",)
    with pytest.raises(ValueError, match=r"the weights \['9'\] are not in the net"):
        optim.MuonRecipe(mlp(), hidden=["9"])
    with pytest.raises(ValueError, match="got 1 weights but the net has 6"):
        optim.MuonRecipe(mlp())([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"shape \[3\]; only matrices"):
        optim.MuonAdamW([torch.zeros(3)], [])
