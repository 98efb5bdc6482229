"""Small trained-looking nets with data: a regression and a classification, in float64."""

from __future__ import annotations

import torch
from torch import nn

import bayesgn as bgn
from bayesgn import likelihoods, models


def regression(n: int = 40, c: int = 2, seed: int = 0):
    """net, x, y: a tanh MLP of 3-5-c near a noisy version of itself."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, c)).double().eval()
        x = torch.randn(n, 3, dtype=torch.float64)
        y = net(x).detach() + 0.3 * torch.randn(n, c, dtype=torch.float64)
    return net, x, y


def classification(n: int = 60, c: int = 3, seed: int = 0, steps: int = 60):
    """net, x, y: an MLP 2-6-c trained a little on Gaussian blobs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        y = torch.arange(n) % c
        angle = 2 * torch.pi * y / c
        x = torch.stack([angle.cos(), angle.sin()], -1).double() + 0.6 * torch.randn(n, 2, dtype=torch.float64)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, c)).double()
        opt = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(steps):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        net.zero_grad(set_to_none=True)
    return net.eval(), x, y


def fit(net, x, y, structure, prior=None, likelihood=None, **options):
    """The Laplace posterior of one of these."""
    if likelihood is None:
        likelihood = likelihoods.Gaussian(torch.tensor(0.2, dtype=torch.float64)) if y.is_floating_point() else likelihoods.Categorical()
    return bgn.laplace(models.Network(net, prior=prior, structure=structure), likelihood, (x, y), progress=False, **options)


def snapshot(net: nn.Module):
    """Everything about a net that a call must leave as it was."""
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [m.training for m in net.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
    )


def assert_same(before, after) -> None:
    """Bit for bit."""
    for k, v in before[0].items():
        assert torch.equal(v, after[0][k]), k
    assert before[1] == after[1] and before[3] == after[3]
    for (flag, grad), (flag_, grad_) in zip(before[2], after[2], strict=True):
        assert flag == flag_
        assert (grad is None) == (grad_ is None) and (grad is None or torch.equal(grad, grad_))
