# %% [markdown]
# # 1. Quick start: uncertainty for a trained network
#
# You have a trained network with weights θ\*. Everything below follows from two approximations and one solve:
#
#     f(x; θ) ≈ f(x; θ*) + J(x) (θ − θ*)       the net, linear around its trained weights
#     H = Σ_n JᵀΛJ                             the loss, a quadratic: Λ_n is how it bends at datum n
#     q(θ) = N(θ*, (H + P)⁻¹)                  the posterior, with P the prior precision
#
# so a prediction is Gaussian before the last nonlinearity, f(x) ~ N(f(x; θ\*), J (H + P)⁻¹ Jᵀ). It takes four lines: wrap the net,
# `bgn.laplace`, `bgn.maximize_evidence`, and call the posterior.
#
# This tutorial does it twice, for a classifier of hand-written digits and for a regression, and asks each time whether it helped.

# %%
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesgn as bgn
from bayesgn import datasets, ggn, likelihoods, metrics, models, plots

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)


def seeded(build, seed: int) -> nn.Module:
    """A net whose initial weights depend on `seed` alone; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


# %% [markdown]
# ## A classifier, trained as anywhere
#
# A small net learns the digits 0 to 7 from noisy scans and, trained to the end without weight decay, grows too sure of itself. The digits 8 and 9 are
# kept from it: they will stand for inputs of a kind it has never seen. Nothing in this cell knows of bayesgn.

# %%
digits = datasets.digits(seed=0)
generator = torch.Generator().manual_seed(0)
scan = lambda x: x + 0.3 * torch.randn(x.shape, generator=generator)  # [n 64], black is 1 and white is 0
x_train, x_test = scan(digits.x_train), scan(digits.x_test)
known, known_test = digits.y_train < 8, digits.y_test < 8
train = TensorDataset(x_train[known], digits.y_train[known])
x, y = x_test[known_test], digits.y_test[known_test]
x_other = torch.cat([x_train[~known], x_test[~known_test]])
train_loader = DataLoader(train, batch_size=64, shuffle=True, generator=generator)

net = seeded(lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), seed=0)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(100):
    for inputs, labels in train_loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
net.eval()
weights = sum(p.numel() for p in net.parameters())
print(f"{weights:,} weights; {len(train)} images of 0 to 7 to train, {len(x)} to test; {len(x_other)} of 8 and 9")

# %% [markdown]
# ## Laplace, tuned by the evidence
#
# `ggn.Kron` keeps one Kronecker product a layer, H ≈ A ⊗ B, which is what larger nets can afford. The prior precision is then set by the evidence
#
#     log p(y | P) ≈ log p(y | θ*) − ½ θ*ᵀP θ* + ½ log det P − ½ log det(H + P)
#
# over the same H: no refit, and no validation data. Which weights are uncertain is an argument. Both choices are worth a look: the last
# layer alone (the rest of the net is then a fixed feature map), and all of them.

# %%
posteriors = {}
for name, parameters in {"last layer": bgn.last_layer(net), "all weights": None}.items():
    start = time.perf_counter()
    model = models.Network(net, prior=models.WeightPrior(1.0), structure=ggn.Kron, parameters=parameters)
    posterior = bgn.laplace(model, likelihoods.Categorical(), train_loader)
    fitted = time.perf_counter()
    trace = bgn.maximize_evidence(posterior)
    posteriors[name] = posterior
    print(
        f"{name}: fitted in {fitted - start:.2f} s, tuned in {time.perf_counter() - fitted:.3f} s; log evidence "
        f"{trace.evidence[0]:.1f} → {trace.evidence[-1]:.1f} nats at a prior precision of {posterior.prior.precision.item():.2f}"
    )

# %% [markdown]
# ## Predict
#
# `posterior(x)` is a Gaussian over the logits, `likelihood(f)` the predictive p(y | x) = ∫ p(y | f) q(f) df: both are distributions,
# nothing else needs to be learnt. The trained net itself ("MAP") gives `likelihood.conditional(net(x))`.

# %%
f = posteriors["all weights"](x)
print(type(f).__name__, tuple(f.mean.shape), tuple(f.variance.shape), "→", tuple(posteriors["all weights"].likelihood(f).probs.shape))

predictives = {}  # name → predictives for known and for unknown digits
with torch.no_grad():
    likelihood = likelihoods.Categorical()
    predictives["MAP"] = likelihood.conditional(net(x)), likelihood.conditional(net(x_other))
    for name, posterior in posteriors.items():
        predictives[name] = posterior.likelihood(posterior(x)), posterior.likelihood(posterior(x_other))

scores = {name: metrics.summary([(inside, y)], ood=[outside]) for name, (inside, outside) in predictives.items()}
print(f"\n{'':12} {'accuracy':>9} {'NLL/nats':>9} {'ECE':>7} {'AUROC, 0–7 against 8 and 9':>27}")
for name, s in scores.items():
    print(f"{name:12} {s['accuracy']:9.3f} {s['nll']:9.3f} {s['ece']:7.3f} {s['auroc_ood']:27.3f}")

# %% [markdown]
# NLL (negative log likelihood) and ECE (calibration error) are better when lower; the AUROC of the predictive entropy says how well unknown
# digits are told from known ones, ½ for not at all.
#
# Probabilities change and decisions hardly do: accuracy stays. The last layer repairs the calibration of known digits; all weights are too modest
# about them and best at noticing unknown ones. That trade is common, and so is a net with nothing to repair: when we trained a small convolutional
# net on the same scans for 80 epochs, MAP had an NLL of 0.27 and the last layer 0.27 too. So ask held-out data, here by `metrics.summary`; tutorial 3
# shows the alternatives.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
plots.reliability_diagram({name: inside for name, (inside, _) in predictives.items()}, y, ax=axes[0])
axes[0].set_title("test digits 0 to 7")
plots.confidence_histogram(*predictives["MAP"], title="MAP", ax=axes[1])
plots.confidence_histogram(*predictives["all weights"], title="Laplace, all weights", ax=axes[2])
top = max(ax.get_ylim()[1] for ax in axes[1:])
for ax in axes[1:]:
    ax.set_ylim(0, top)
figure.savefig(figures / "01_classification.png", dpi=110)

# %% [markdown]
# ## Save and load
#
# The file is safetensors: tensors and JSON, nothing is unpickled. It holds H, the hyper-parameters and a fingerprint of the net; the net stays with
# you (`torch.save(net.state_dict(), …)`). Another net, or the same one trained further, is refused.

# %%
path = posteriors["all weights"].save(figures / "01_digits.safetensors")
loaded = bgn.load(path, net)
print(f"{path}: {path.stat().st_size / 1024:.0f} KiB; {loaded}")

other = seeded(lambda: nn.Sequential(nn.Linear(64, 8)), seed=0)
try:
    bgn.load(path, other)
    refusal = None
except ValueError as error:
    refusal = str(error)
print("another net:", refusal)

# %% [markdown]
# ## The same for a regression
#
#     y = f(x; θ) + ε,   ε ~ N(0, σ²)
#
# `likelihoods.Gaussian(noise)` holds the variance σ² as a parameter; `maximize_evidence` tunes it with the prior precision. The data are 60 points of
# a sinusoid with a gap between −1 and 1, σ² = 0.09.

# %%
data = datasets.sinusoid(n=60, seed=0)
regressor = seeded(lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), seed=0)
optimizer = torch.optim.Adam(regressor.parameters(), lr=1e-2, weight_decay=1e-3)
for _ in range(2000):
    optimizer.zero_grad()
    nn.functional.mse_loss(regressor(data.x_train), data.y_train).backward()
    optimizer.step()
regressor.eval()

band = bgn.laplace(models.Network(regressor, structure=ggn.Full), likelihoods.Gaussian(1.0), data.train)
bgn.maximize_evidence(band)
noise = band.likelihood.noise.item()
print(f"noise variance {noise:.3f} (true 0.090), prior precision {band.prior.precision.item():.3f}")

# %% [markdown]
# `predictive_band` draws both uncertainties: of the function (more data would remove it) inside that of the observations (nothing would).

# %%
f = band(data.x_test)
ax = plots.predictive_band(data.x_test, f, band.likelihood(f), data=data.train, truth=data.y_test, xlabel="x", ylabel="y = sin 2x + x/4 + ε")
ax.set_ylim(-3.5, 3.5)
ax.figure.set_size_inches(7, 4)
ax.figure.savefig(figures / "01_regression.png")

fresh = datasets.sinusoid(n=1000, seed=1).train  # new observations where the training data lay
covered = metrics.coverage(band.likelihood(band(fresh[0])), fresh[1], level=0.95).item()
grid = data.x_test[:, 0]
std = f.stddev[:, 0].detach()
at_data, in_gap = std[(grid.abs() > 1.5) & (grid.abs() < 2.5)].mean().item(), std[grid.abs() < 0.5].max().item()
print(f"the 95 % interval holds {covered:.1%} of new observations; std of f {at_data:.3f} at the data, {in_gap:.3f} in the gap")

# %% [markdown]
# ## What must be true
#
# If any of this failed, the tutorial would, and so would our continuous integration.

# %%
# Held-out digits: the tuned last layer repairs the calibration, and no posterior costs accuracy.
assert scores["last layer"]["nll"] < scores["MAP"]["nll"] - 0.05, scores
assert scores["last layer"]["ece"] < scores["MAP"]["ece"], scores
assert all(abs(s["accuracy"] - scores["MAP"]["accuracy"]) < 0.01 for s in scores.values()), scores
# Unknown digits: all weights notice them better than the net itself does.
assert scores["all weights"]["auroc_ood"] > scores["MAP"]["auroc_ood"] + 0.01, scores
# What was saved is what was fitted, and it fits no other net.
assert torch.equal(loaded(x).variance, posteriors["all weights"](x).variance) and loaded.log_evidence() == posteriors["all weights"].log_evidence()
assert refusal is not None
# Regression: the noise is found without being told, its intervals are honest, and the function is uncertain where data lack.
assert math.isclose(noise, 0.09, rel_tol=0.3), noise
assert 0.92 < covered < 0.98, covered
assert in_gap > 3 * at_data, (in_gap, at_data)
print("all assertions hold; figures are in", figures.resolve())
