# %% [markdown]
# # 12. Checking an approximation against NUTS
#
# Laplace's method puts a Gaussian in the place of a posterior, and a linear model in the place of a net. How much do these two steps cost? On a
# small net it can be measured: Hamiltonian Monte Carlo draws from the posterior itself,
#
#     p(θ | y) ∝ N(θ; μ, P⁻¹) Π_n p(y_n | f(x_n; θ)),
#
# with no approximation but the finite number of draws, and that number's worth is measured too (R-hat, effective sample size). There are two
# references, one for each question:
#
# | reference | the model sampled | judges |
# |---|---|---|
# | NUTS of the net | f(x; θ) | everything: Gaussian and linearisation |
# | NUTS of the linearised net | f(x; θ*) + J (θ − θ*) | the Gaussian alone, which is what refinement repairs |

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, plots, rules
from bayesgn.inference.hmc import hmc

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)
PRECISION = 0.7

# %% [markdown]
# ## A small net
#
# Sixteen labels on a line, with a gap, and ten weights trained to the mode of their posterior.

# %%
generator = torch.Generator().manual_seed(2)
x = torch.cat([torch.linspace(-3, -1, 8), torch.linspace(0.5, 2.5, 8)]).double()[:, None]
y = (torch.sin(x[:, 0]) + 0.5 * torch.randn(16, generator=generator, dtype=torch.float64) > 0).double()
likelihood = likelihoods.Bernoulli()
with torch.random.fork_rng([]):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def loss() -> torch.Tensor:
    """−log p(y, θ) up to a constant."""
    return -likelihood.log_prob(net(x), y).sum() + 0.5 * PRECISION * sum(p.square().sum() for p in net.parameters())


optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")


def closure() -> torch.Tensor:
    optimizer.zero_grad()
    value = loss()
    value.backward()
    return value


optimizer.step(closure)
net.zero_grad()
net.eval()
network = models.Network(net, models.WeightPrior(PRECISION), structure=ggn.Full)

# %% [markdown]
# ## Three approximations
#
# Laplace's Gaussian, with predictions of the linearised net (GLM) or of the net at draws of the weights (MC); and the Gaussian that variational
# inference finds in the linearised model.

# %%
laplace = bgn.laplace(network, likelihood, (x, y))
refined = bgn.bayes_newton(network, likelihood, (x, y), rules.Variational(), progress=False)
print(laplace, refined.trace, sep="\n")

# %% [markdown]
# ## Two references
#
# `start=laplace` lets the chains begin at draws of it and run in coordinates in which it is round, with the same answer. A
# linearised posterior brings likelihood, data and coordinates of its own.

# %%
exact = hmc(network, likelihood, (x, y), samples=200, warmup=100, chains=2, start=laplace, generator=generator, progress=False)
exact_linear = hmc(refined, samples=200, warmup=60, chains=2, generator=generator, progress=False)
for name, samples in {"net": exact, "linearised net": exact_linear}.items():
    r_hat, ess = samples.diagnose(x)
    print(f"{name}: {samples.evaluations} evaluations for {len(samples)} draws")
    print(f"    functions: R-hat ≤ {r_hat.max():.3f}, effective draws ≥ {ess.min():.0f}")
    print(f"    weights:   R-hat ≤ {samples.r_hat.max():.3f}, effective draws ≥ {samples.ess.min():.0f}")

# %% [markdown]
# Functions are what counts. A net is the same function when two hidden units change places, so weights may mix badly, or not at all, while
# functions are known well.
#
# ## How far apart
#
# The total variation of two predictive distributions, ½ Σ_y |p(y|x) − q(y|x)|, is the largest difference in any probability: for labels simply
# |p(y = 1) − q(y = 1)|. Here its mean and its largest value on a grid that goes beyond the data.

# %%
grid = torch.linspace(-5, 5, 81, dtype=torch.float64)[:, None]
with torch.no_grad():
    many = laplace.sample_outputs(grid, 2000, generator=generator)
    probability = {
        "MAP": net(grid).sigmoid()[:, 0],
        "Laplace, MC": likelihood(many).probs[:, 0],
        "Laplace, GLM": laplace.likelihood(laplace(grid)).probs[:, 0],
        "refined, GLM": refined.likelihood(refined(grid)).probs[:, 0],
    }
    truth = likelihood(exact(grid)).probs[:, 0]
    truth_linear = likelihood(exact_linear(grid)).probs[:, 0]
probability["NUTS, linear"] = truth_linear
print(f"{'total variation from':20}   NUTS of the net   NUTS of the linearised net      (mean, largest)")
distance = {}
for name, p in probability.items():
    distance[name] = [(p - q).abs() for q in (truth, truth_linear)]
    print(f"{name:20}", "".join(f"{d.mean():11.3f} {d.max():7.3f}" for d in distance[name]))

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
colours = {"MAP": "0.6", "Laplace, MC": plots.RED, "Laplace, GLM": plots.GREEN, "refined, GLM": plots.BLUE}
for ax, q, title in zip(axes, (truth, truth_linear), ("beside NUTS of the net", "beside NUTS of the linearised net")):
    for name, colour in colours.items():
        ax.plot(grid[:, 0], probability[name], color=colour, label=name)
    ax.plot(grid[:, 0], q, "k--", label="NUTS")
    ax.plot(x[:, 0], y, "k|", markersize=8)
    ax.set(xlabel="x", title=title)
axes[0].set_ylabel("p(y = 1)")
axes[1].legend(frameon=False, fontsize="small", loc="center right")
figure.savefig(figures / "12_against_nuts.png", dpi=100)

# %% [markdown]
# ## What must be true

# %%
mean = {name: [d.mean().item() for d in both] for name, both in distance.items()}
assert exact.diagnose(x).r_hat.max() < 1.05 and exact_linear.diagnose(x).r_hat.max() < 1.05
# The Gaussian by variational inference predicts as the linearised model's own posterior does, nearer than Laplace's.
assert mean["refined, GLM"][1] < 0.02 and mean["refined, GLM"][1] < mean["Laplace, GLM"][1], mean
# Draws of Laplace's weights put into the net itself are the worst of the three by either reference (Immer et al. 2021).
assert mean["Laplace, MC"][0] > max(mean["Laplace, GLM"][0], mean["refined, GLM"][0]), mean
print("all assertions hold; figures are in", figures.resolve())
