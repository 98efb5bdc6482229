# %% [markdown]
# # 11. The linearised network as a Gaussian process
#
# A net linearised at its weights θ\*, with a Gaussian prior over them, is a Gaussian process. Its mean and its kernel are
#
#     m(x) = f(x; θ*) + J(x) (μ − θ*),     k(x, x') = J(x) P⁻¹ J(x')ᵀ,     θ ~ N(μ, P⁻¹)
#
# `models.JacobianKernel` is that kernel as one of gpytorch's, `models.LinearizedMean` the mean. So a trained net may be put wherever a kernel may:
# into gpytorch's `ExactGP`, into `models.GP` under any likelihood, into `models.SparseGP` with inducing points, into sums with other kernels. This
# tutorial does all of that, and checks that nothing changes: the answers are those of weight space.

# %%
from pathlib import Path

import gpytorch
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, metrics, models, plots, rules

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)
seed = lambda k: torch.Generator().manual_seed(k)


def tanh_net(*sizes: int) -> nn.Sequential:
    """A tanh net in float64, initialised from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for a, b in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1]).double().eval()


def train_to_map(net: nn.Module, likelihood, data, precision: float, steps: int) -> nn.Module:
    """θ* = argmin −Σ_n log p(y_n | f(x_n; θ)) + ½ precision |θ|², by L-BFGS."""
    x, y = data
    weights = list(net.parameters())
    optimizer = torch.optim.LBFGS(weights, max_iter=steps, history_size=50, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood.log_prob(likelihood.rows(net(x)), y).sum() + 0.5 * precision * sum(w.square().sum() for w in weights)
        value.backward()
        return value

    optimizer.step(loss)
    return net


# %% [markdown]
# ## A net on the motorcycle data
#
# Head acceleration after the impact, 133 points, both axes scaled. The net has 12 tanh units.

# %%
motorcycle = datasets.motorcycle(dtype=torch.float64)
x = ((motorcycle.x - motorcycle.x.mean()) / motorcycle.x.std()).reshape(-1, 1)
y = ((motorcycle.y - motorcycle.y.mean()) / motorcycle.y.std()).reshape(-1)
NOISE, PRECISION = 0.2, 0.1
gaussian = likelihoods.Gaussian(torch.tensor(NOISE, dtype=torch.float64))
net = train_to_map(tanh_net(1, 12, 1), gaussian, (x, y.unsqueeze(-1)), PRECISION, steps=600)
network = models.Network(net, models.WeightPrior(PRECISION), ggn.Full)
print(network)

# %% [markdown]
# ## gpytorch's process and weight space
#
# On one side `bgn.laplace`: a Gaussian over 37 weights. On the other a plain `gpytorch.models.ExactGP`, which knows nothing of weights.
#
# (Beyond 800 rows `linear_operator` turns to conjugate gradients, which is far from exact for this kernel, unless one says
# `with gpytorch.settings.max_cholesky_size(10**9):`. Here are 133.)


# %%
class LinearizedNet(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood, network: models.Network) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = models.LinearizedMean(network), models.JacobianKernel(network)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


noise_model = gpytorch.likelihoods.GaussianLikelihood().double()
noise_model.noise = torch.tensor(NOISE, dtype=torch.float64)
gp = LinearizedNet(x, y, noise_model, network)
mll = gpytorch.mlls.ExactMarginalLogLikelihood(noise_model, gp)

laplace = bgn.laplace(network, gaussian, (x, y.unsqueeze(-1)))
refined = bgn.bayes_newton(network, gaussian, (x, y.unsqueeze(-1)))  # the exact mean of the linearised model, however well the net was trained
grid = torch.linspace(-2.2, 2.6, 200, dtype=torch.float64)[:, None]


def differences(weight_space, gp) -> dict[str, float]:
    """Weight space against gpytorch: mean, joint covariance over the grid, log evidence."""
    with torch.no_grad():
        gp.train()
        evidence = (mll(gp(x), y) * len(y)).item()
        gp.eval()
        f, g = gp(grid), weight_space(grid)
        return {
            "mean": (f.mean - g.mean[:, 0]).abs().max().item(),
            "covariance": (f.covariance_matrix - g.covariance_matrix).abs().max().item(),
            "log evidence": abs(evidence - weight_space.log_evidence().item()),
        }


for name, posterior in (("laplace", laplace), ("bayes_newton", refined)):
    print(f"{name:13}", {what: f"{value:.0e}" for what, value in differences(posterior, gp).items()})
agreement, at_map = differences(refined, gp), differences(laplace, gp)

# %% [markdown]
# Both are the process; the mean of `laplace` is the net's own answer, and so misses what training has left of the gradient.
#
# ## Functions drawn from a network
#
# Before the data and after them. The kernel is that of a net which has *seen* the data: it wiggles where the net has learnt to.

# %%
figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
with torch.no_grad():
    prior = gpytorch.distributions.MultivariateNormal(gp.mean_module(grid), gp.covar_module(grid))
    posterior = bgn.bayes_newton(models.GP(models.JacobianKernel(network), models.LinearizedMean(network)), gaussian, (x, y))
    before = prior.mean + torch.randn(8, 200, generator=seed(0), dtype=torch.float64) @ torch.linalg.cholesky(
        prior.covariance_matrix + 1e-8 * torch.eye(200).double()
    ).mT
    after = posterior.sample_outputs(grid, 8, seed(0))[..., 0]
    plots.kernel_matrix(gp.covar_module(grid), label="k(x, x')", ax=axes[0])
    axes[0].set(title="the kernel over a grid of times", xlabel="point of the grid", ylabel="point of the grid")
    axes[1].plot(grid[:, 0], before.T, linewidth=0.7, color=plots.BLUE)
    axes[1].set(title="draws before the data", xlabel="time (scaled)", ylabel="acceleration (scaled)")
    plots.predictive_band(grid, posterior(grid), gaussian(posterior(grid)), (x, y), ax=axes[2])
    axes[2].plot(grid[:, 0], after.T, linewidth=0.5, color="black")
    axes[2].set(title="draws after the data", xlabel="time (scaled)", ylabel="acceleration (scaled)")
figure.savefig(figures / "11_draws.png", dpi=100)

# %% [markdown]
# ## Hyper-parameters, by gpytorch and by the evidence
#
# The prior precision is the kernel's hyper-parameter, so that gpytorch's own training tunes the prior of a neural network. `bgn.maximize_evidence`
# does the same in weight space.

# %%
gp.train()
optimizer = torch.optim.LBFGS(gp.parameters(), max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe")


def loss() -> Tensor:
    optimizer.zero_grad()
    value = -mll(gp(x), y)
    value.backward()
    return value


optimizer.step(loss)
trace = bgn.maximize_evidence(refined, tol=1e-9, progress=False)
tuned = {
    "gpytorch": (gp.covar_module.prior.precision.item(), noise_model.noise.item(), -loss().item() * len(y)),
    "bayesgn": (refined.prior.precision.item(), refined.likelihood.noise.item(), refined.log_evidence().item()),
}
print(f"{'':9} {'precision':>10} {'noise':>8} {'log evidence':>13}")
for name, (precision, noise, evidence) in tuned.items():
    print(f"{name:9} {precision:10.5f} {noise:8.5f} {evidence:13.6f}")

# %% [markdown]
# ## A classifier's kernel
#
# Ten digits, 64 pixels, a net of 16 units and ten outputs. Its kernel has a 10 × 10 block for every pair of images; the sum of the blocks' diagonals
# is drawn, images in the order of their labels, before training and after it. Below is what the posterior says of each image: ten means and ten
# standard deviations.

# %%
digits = datasets.digits(seed=0, dtype=torch.float64)
categorical = likelihoods.Categorical()
train = digits.x_train[:400], digits.y_train[:400]
young = tanh_net(64, 16, 10)
classifier = train_to_map(tanh_net(64, 16, 10), categorical, train, precision=0.3, steps=150)
shown, labels = digits.x_test[:150], digits.y_test[:150]


def sum_of_kernels(net: nn.Module) -> Tensor:
    """Σ_j k_jj(x, x') [n n]"""
    with torch.no_grad():
        K = models.JacobianKernel(models.Network(net, models.WeightPrior(0.3)))(shown).to_dense()
    return K.view(150, 10, 150, 10).diagonal(dim1=1, dim2=3).sum(-1)


def contrast(K: Tensor) -> float:
    """The mean over pairs of one digit, over that of pairs of different digits."""
    same, other = labels[:, None] == labels, ~torch.eye(len(K), dtype=torch.bool)
    return (K[same & other].mean() / K[~same].mean()).item()


def alignment(K: Tensor) -> float:
    """The cosine between the kernel and that of the labels (1 for a pair of one digit, else 0), both centred."""
    centred = lambda M: M - M.mean(0) - M.mean(1, keepdim=True) + M.mean()
    K, L = centred(K), centred((labels[:, None] == labels).double())
    return ((K * L).sum() / K.norm() / L.norm()).item()


kernels = {"untrained": sum_of_kernels(young), "trained": sum_of_kernels(classifier)}
contrasts = {name: contrast(K) for name, K in kernels.items()}
for name, K in kernels.items():
    print(f"{name:9} one digit : different digits = {contrasts[name]:.2f} : 1; alignment of the centred kernel with the labels {alignment(K):.2f}")

# %%
classes = bgn.laplace(models.Network(classifier, models.WeightPrior(0.3), ggn.Full), categorical, train, progress=False)
with torch.no_grad():
    f = classes(digits.x_test)
    accuracy = metrics.accuracy(categorical(f), digits.y_test).item()
    wrong = f.mean.argmax(-1) != digits.y_test
    doubt = {"right": f.stddev[~wrong].mean().item(), "wrong": f.stddev[wrong].mean().item()}
print(f"accuracy {accuracy:.3f} ({int(wrong.sum())} wrong); mean standard deviation of f where it is", {k: round(v, 2) for k, v in doubt.items()})
figure = plt.figure(figsize=(13, 7.5), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=(1.4, 1))
for ax, (name, K) in zip(top.subplots(1, 2), kernels.items()):
    plots.kernel_matrix(K, labels, label="sum of kernels", ax=ax)
    ax.set_title(f"kernel, {name}: {contrasts[name]:.2f} : 1")
for ax, (label, values) in zip(bottom.subplots(1, 2), (("posterior mean", f.mean), ("standard deviation", f.stddev))):
    plots.gp_image(values[:150], labels, label=label, ax=ax)
figure.savefig(figures / "11_digits.png", dpi=80)

# %% [markdown]
# Images of one digit look alike to any net, so that blocks are there before training. Training takes away what all images have in common, which
# raises the contrast; the pattern that is left is hardly more like the labels than it was. What the net knows of labels is in the mean.
#
# ## Fewer data, or inducing points
#
# An exact process costs n³. `models.SparseGP` sees the data through the function's values at M inducing points, here chosen greedily from the data by
# the kernel itself, and its evidence is a bound that rises with M. Odd against even digits, one logit, 300 images, variational inference; beside it
# the exact process, and weight space.

# %%
odd = (train[1][:300] % 2).double()
images = train[0][:300]
bernoulli = likelihoods.Bernoulli()
parity = train_to_map(tanh_net(64, 8, 1), bernoulli, (images, odd), precision=0.5, steps=100)
parity_network = models.Network(parity, models.WeightPrior(0.5), ggn.Full)
kernel, mean = models.JacobianKernel(parity_network), models.LinearizedMean(parity_network)
infer = lambda model: bgn.bayes_newton(model, bernoulli, (images, odd), rule=rules.Variational(), tol=1e-10, progress=False)
weight_space, exact = infer(parity_network), infer(models.GP(kernel, mean))
with torch.no_grad():
    new = digits.x_test
    parity_error = {
        "mean": (exact(new).mean - weight_space(new).mean[:, 0]).abs().max().item(),
        "variance": (exact(new).variance - weight_space(new).variance[:, 0]).abs().max().item(),
        "log evidence": abs(exact.log_evidence().item() - weight_space.log_evidence().item()),
    }
print("Bernoulli, process against weight space:", {what: f"{value:.0e}" for what, value in parity_error.items()})

# %%
order = models.inducing_points(kernel, images, 200)
sizes = (5, 10, 20, 40, 80, 140, 200)
target = (digits.y_test % 2).double().unsqueeze(-1)
bound, loss_new = {}, {}
for M in sizes:
    sparse = infer(models.SparseGP(kernel, order[:M], mean))
    with torch.no_grad():
        bound[M], loss_new[M] = sparse.log_evidence().item(), metrics.nll(bernoulli(sparse(new)), target).item()
    print(f"M = {M:3}: bound {bound[M]:9.3f} nats, test NLL {loss_new[M]:.4f}")
best = exact.log_evidence().item()
with torch.no_grad():
    exact_nll = metrics.nll(bernoulli(exact(new)), target).item()
print(f"exact  : bound {best:9.3f} nats, test NLL {exact_nll:.4f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
axes[0].plot(list(bound), list(bound.values()), ".-", color=plots.BLUE)
axes[0].axhline(best, color=plots.GREY, linestyle="--", linewidth=1)
axes[0].text(sizes[0], best - 20, "exact process, n = 300", va="top", color=plots.GREY)
axes[0].set(xlabel="inducing points M", ylabel="bound / nats", xscale="log")
with torch.no_grad():
    plots.gp_bars(exact(new[:120]), digits.y_test[:120] % 2, names=("even", "odd"), ylabel="logit", ax=axes[1])
figure.savefig(figures / "11_inducing.png", dpi=100)

# %% [markdown]
# For several classes there is one kernel for each output, `[kernel.output(j) for j in range(c)]`. That leaves out what outputs share before the data;
# `models.Network(net, structure=ggn.Gram)` keeps it, and is the same process in the dual, with `Gram(subset=m)` and `Gram(inducing=m)` for many data.

# %% [markdown]
# ## What must be true

# %%
# One posterior in two spaces, in gpytorch's own algebra; laplace's mean is the net's answer, at a MAP that training reached to its tolerance.
assert max(agreement.values()) < 1e-8, agreement
assert at_map["covariance"] < 1e-8 and at_map["log evidence"] < 1e-6 and at_map["mean"] < 1e-3, at_map
# Both ways of tuning end at one optimum.
for a, b in zip(tuned["gpytorch"], tuned["bayesgn"]):
    assert abs(a - b) < 1e-4 * (1 + abs(b)), tuned
# Training raises a kernel's contrast between classes, and the process is less sure where it is wrong.
assert contrasts["trained"] > contrasts["untrained"] + 0.2, contrasts
assert doubt["wrong"] > doubt["right"], doubt
# With labels, too; more inducing points never lower the bound, which stays below the exact one and comes within a nat of it.
assert max(parity_error.values()) < 1e-8, parity_error
values = [*bound.values(), best]
assert all(a <= b + 1e-6 for a, b in zip(values, values[1:])), values
assert best - bound[200] < 1.0, values
print("all assertions hold; figures are in", figures.resolve())
