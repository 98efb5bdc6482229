# %% [markdown]
# # 8. Training a net by Levenberg-Marquardt
#
# Adam steps along a gradient, rescaled weight by weight. Gauss-Newton solves the linearised problem instead: with f(θ + δ) ≈ f + Jδ the loss
# becomes a quadratic,
#
# $$ m(\delta) = g^\top \delta + \tfrac12 \delta^\top (H + \lambda D)\, \delta, \qquad H = \tfrac1N \sum_n J_n^\top \Lambda_n J_n , $$
#
# and its minimum is the step. Λ is how the loss bends in the outputs: 1 for squared errors, diag(p) − ppᵀ for cross-entropy. λ says how far the
# quadratic is trusted; Levenberg and Marquardt lower it when a step does as promised and raise it when it does not. It is the precision of a
# Gaussian prior around the present weights, which is why the optimizer takes the same structures of H as `bgn.laplace` does.

# %%
import math
import time

import torch
from torch import nn

from bayesgn import datasets, ggn, likelihoods, optim

torch.set_num_threads(1)

# %% [markdown]
# ## A curve: 31 weights
# A sine of two periods under noise of variance 0.0033, which is then the least squared error that a fit should have.

# %%
NOISE = 0.0033
x = torch.linspace(-1, 1, 200)[:, None]
y = torch.sin(2 * math.pi * x) + math.sqrt(NOISE) * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))


def curve() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))


def mse(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net(x) - y).square().mean())


# %% [markdown]
# One call of `step(x, y)` is all: the likelihood knows the loss, its gradient and Λ. `Gaussian(1.0)` is half the squared error (plus a constant).

# %%
net = curve()
opt = optim.GaussNewton(net, likelihoods.Gaussian(1.0), structure=ggn.Full, damping=optim.LevenbergMarquardt(1e-2))
by_lm = [mse(net)]
for _ in range(30):
    opt.step(x, y)
    by_lm.append(mse(net))

# %%
net = curve()
adam = torch.optim.Adam(net.parameters(), lr=0.03)
by_adam = [mse(net)]
for _ in range(300):
    adam.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    adam.step()
    by_adam.append(mse(net))

print("steps   LM       Adam")
for i in (0, 5, 10, 15, 20, 30, 100, 300):
    print(f"{i:5d}   {by_lm[i]:.4f}   {by_adam[i]:.4f}" if i < len(by_lm) else f"{i:5d}            {by_adam[i]:.4f}")

# %% [markdown]
# What became of a step is in `opt.last`: the damping it was solved with, and the gain ratio of what the loss lost over what the quadratic had
# promised.

# %%
print(opt.last)

# %% [markdown]
# ## Digits: cross-entropy
# The generalised Gauss-Newton of a softmax needs no squared errors. With 1,210 weights H could be kept whole; products Hv and conjugate gradients
# are cheaper here, and begin each step at the last one's solution.

# %%
data = datasets.digits(test_fraction=0.2)


def digits_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def cross_entropy(net: nn.Module) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(data.x_train), data.y_train))


net, steps, start = digits_net(), 0, time.process_time()
opt = optim.GaussNewton(net, likelihoods.Categorical(), structure=ggn.MatrixFree(tol=0.1, iterations=20), damping=optim.LevenbergMarquardt(1e-2))
while cross_entropy(net) > 1e-3 and steps < 30:
    opt.step(data.x_train, data.y_train)
    steps += 1
lm_steps, lm_seconds, lm_net = steps, time.process_time() - start, net

net, steps, start = digits_net(), 0, time.process_time()
adam = torch.optim.Adam(net.parameters(), lr=0.03)
while cross_entropy(net) > 1e-3 and steps < 3000:
    adam.zero_grad()
    nn.functional.cross_entropy(net(data.x_train), data.y_train).backward()
    adam.step()
    steps += 1
adam_steps, adam_seconds = steps, time.process_time() - start


def right(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net(data.x_test).argmax(-1) == data.y_test).float().mean())


print(f"cross-entropy 1e-3 by LM:   {lm_steps:3d} steps, {lm_seconds:.2f} s, {right(lm_net):.1%} of the held-out digits are right")
print(f"                   by Adam: {adam_steps:3d} steps, {adam_seconds:.2f} s, {right(net):.1%}")

# %% [markdown]
# Steps are not seconds: a step by twenty products costs what some fifty gradients do. On smooth, badly conditioned fits (the sine, tables of a
# few hundred rows) LM wins in time as well; on an easy classifier like this one Adam comes near, and L-BFGS is far ahead. `benchmarks/` has the
# figures.
#
# ## What else can be chosen
# Each of these is one argument; together they are the method of Pooladzandi and Zhou.

# %%
net = curve()
opt = optim.GaussNewton(
    net, likelihoods.Gaussian(1.0),
    damping=optim.LevenbergMarquardt(1e-2, uphill=1.0),  # may climb while it keeps its direction
    scaling=optim.RunningMax(),  # λ in the units of each weight's curvature
    momentum=optim.Adaptive(),  # most conjugate to the last step, at a given descent
    line_search=optim.Backtracking(),
)  # fmt: skip
for _ in range(30):
    opt.step(x, y)
print(f"LM, improved: {mse(net):.4f} after 30 steps")

# %% [markdown]
# ## What we can rely on
# Ten times fewer steps than Adam to the noise floor, which neither undercuts by more than its 31 weights allow; and a classifier in a dozen
# steps.

# %%
assert min(by_lm) < 1.1 * NOISE < min(by_adam[:100])
assert min(by_lm) > 0.8 * NOISE
assert lm_steps <= 12 and adam_steps >= 10 * lm_steps
assert right(lm_net) > 0.93
print("ok")
