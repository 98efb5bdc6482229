"""The steps of optim.Reparameterized in the net's own dtype: beside float64, on parts of weights, and what is left after a failure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, models, optim


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    x = torch.randn(12, 2, generator=gen(1), dtype=torch.float64)
    return net.to(dtype), x.to(dtype), torch.arange(12) % 3


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def dense(net: nn.Module, θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """∂ Σ −log p(y|θ)."""
    own = dict(net.named_parameters())

    def loss(v: Tensor) -> Tensor:
        parts = zip(own.items(), v.split([p.numel() for p in own.values()]), strict=True)
        f = torch.func.functional_call(net, {k: a.reshape(p.shape) for (k, p), a in parts}, (x,))
        return nn.functional.cross_entropy(f, y, reduction="sum")

    return torch.func.grad(loss)(θ)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_steps_are_the_published_ones_with_momentum_and_damping(dtype, tol, n):
    net, x, y = problem(dtype)
    N, P, ρ, lr, β, damping, T = 36, 1.7, 0.2, 0.1, 0.8, 0.5, 0.6
    model = models.Network(net, prior=models.WeightPrior(P, mean=0.1), structure=ggn.Diag)
    opt = optim.Variational(model, likelihoods.Categorical(), N, expectation=optim.Reparameterized(n, initial=0.4), lr=lr, precision_lr=ρ, momentum=β,
                            damping=damping, temperature=T, generator=gen(3))  # fmt: skip
    mirror, g64 = copy.deepcopy(net).double(), gen(3)
    m, h, v = flat(mirror), torch.full((flat(net).numel(),), 0.4 * N, dtype=torch.float64), 0.0
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (net[0], net[2])]
    for t in range(1, 4):
        total, slope, moment, ε = h / T + P, 0.0, 0.0, torch.zeros_like(m)
        for s in range(n):
            if s % 2 == 0:  # (in the dtype of the net, as it draws)
                ε = torch.cat([torch.randn(size, generator=g64, dtype=dtype) for size in sizes]).double() / total.sqrt()
            else:
                ε = -ε
            g = dense(mirror, m + ε, x.double(), y)
            slope, moment = slope + g / n, moment + g * ε / n
        opt.step(x, y)
        new = moment * total * N / len(x)
        h = (1 - ρ) * h + ρ * new + 0.5 * ρ**2 * (h - new) ** 2 / (h + T * P)
        v = β * v + (1 - β) * (N / len(x) * slope / T + P * (m - 0.1))
        m = m - lr * v / (1 - β**t) / (h / T + P + damping)
        torch.testing.assert_close(flat(net).double(), m, rtol=tol, atol=tol)
        torch.testing.assert_close(1 / opt.precision().diagonal(), h / T + P, rtol=tol, atol=tol)
        assert opt.precision().diagonal().dtype == torch.float64


def test_weights_that_are_not_selected_stay():
    net, x, y = problem()
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1:, :2] = True
    model = models.Network(net, structure=ggn.Diag, parameters={"2.weight": mask, "0.bias": None})
    opt = optim.Variational(model, likelihoods.Categorical(), 12, expectation=optim.Reparameterized(2), lr=0.1, generator=gen())
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    for _ in range(3):
        opt.step(x, y)
    for k, p in net.named_parameters():
        moved = mask if k == "2.weight" else torch.full_like(p, k == "0.bias", dtype=torch.bool)
        assert torch.equal(p.detach() != before[k], moved), k


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.at = nn.Linear(2, 3).double(), 0, 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= self.at:
            raise OSError("the forward pass failed")
        return self.inner(x)


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_failed_forward_leaves_the_net_at_the_mean_and_h_as_it_was(late):
    net, (_, x, y) = Breaks().eval(), problem()
    opt = optim.Variational(models.Network(net, structure=ggn.Diag), likelihoods.Categorical(), 12, expectation=optim.Reparameterized(3), lr=0.1,
                            momentum=0.5, generator=gen())  # fmt: skip
    opt.step(x, y)
    mean, variance, steps = opt.mean, opt.precision().diagonal(), opt.steps
    net.at = net.calls + late
    with pytest.raises(OSError):
        opt.step(x, y)
    assert opt.steps == steps
    torch.testing.assert_close((opt.mean, opt.precision().diagonal()), (mean, variance), rtol=0, atol=0)


def test_a_step_that_is_not_finite_is_not_taken():
    net, x, y = problem(torch.float32)
    model = models.Network(net, structure=ggn.Diag)
    opt = optim.Variational(model, likelihoods.Categorical(), 12, expectation=optim.Reparameterized(1), lr=0.1, generator=gen())
    opt.step(x, y)
    mean, variance = opt.mean, opt.precision().diagonal()
    opt.num_data = 10**39  # whole · gradient overflows float32
    with pytest.raises(FloatingPointError):
        opt.step(x, y)
    torch.testing.assert_close((opt.mean, opt.precision().diagonal()), (mean, variance), rtol=0, atol=0)


def test_a_snapshot_is_not_moved_by_later_steps():
    net, x, y = problem()
    opt = optim.Variational(models.Network(net, structure=ggn.Diag), likelihoods.Categorical(), 12, expectation=optim.Reparameterized(2), lr=0.1,
                            momentum=0.9, generator=gen())  # fmt: skip
    opt.step(x, y)
    assert opt.generator is not None
    kept, state = opt.snapshot(), opt.generator.get_state()
    futures = []
    for _ in range(2):
        for _ in range(3):
            opt.step(x, y)
        futures.append((opt.mean, opt.precision().diagonal()))
        opt.restore(kept)
        opt.generator.set_state(state)
    torch.testing.assert_close(futures[0], futures[1], rtol=0, atol=0)
