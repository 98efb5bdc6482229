# %% [markdown]
# # 5. Noise that changes: two latent functions
#
# In the crash-test data of Silverman (1985) the helmet is still at first, then everything shakes. One function for the acceleration is not
# enough; its noise needs another,
#
#     y_n = m(t_n) + ε_n,     ε_n ~ N(0, e^{ρ(t_n)}),     m, ρ ~ two Gaussian processes
#
# and with that the likelihood stops being log-concave. With e = y − m and τ = e^{−ρ} the curvature of one datum in f = (m, ρ) is
#
#     −∂² log p = [[ τ,   τ e     ],        determinant −½ τ² e² < 0
#                  [ τ e, ½ τ e²  ]]
#
# indefinite for *every* datum that is off its mean, while a site needs a precision. Three rules, two ways out, one data set.

# %%
import math
from pathlib import Path

import gpytorch
import matplotlib.pyplot as plt
import torch

import bayesgn as bgn
from bayesgn import datasets, likelihoods, metrics, models, plots, rules

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)

data = datasets.motorcycle(torch.float64)
t, y = data.x, (data.y - data.y.mean()) / data.y.std()
print(f"{len(t)} accelerations, standardised, {t.min():.1f} to {t.max():.1f} ms after the impact; from {data.source}")


# %% [markdown]
# ## The model, with one function and with two
#
# Both processes are Matérn over time, so `MarkovGP` serves; the noise's has a constant mean that is learned. `HeteroscedasticGaussian` wants
# all means first, then all scales; its link is e^{ρ/2} unless told otherwise (`likelihoods.HeteroscedasticGaussian(likelihoods.Softplus())` is
# another).


# %%
def kernel(lengthscale: float) -> gpytorch.kernels.Kernel:
    out = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double()
    out.base_kernel.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
    return out


def one() -> models.MarkovGP:
    return models.MarkovGP(kernel(6.0))


def two() -> models.MarkovGP:
    return models.MarkovGP([kernel(6.0), kernel(10.0)], mean=[None, gpytorch.means.ConstantMean().double()])


constant = bgn.bayes_newton(one(), likelihoods.Gaussian(0.1), (t, y))
bgn.maximize_evidence(constant)
print(f"one function: log evidence {constant.log_evidence():.2f} nats, noise variance {constant.likelihood.noise.item():.3f} everywhere")

# %% [markdown]
# ## Five rules
#
# A rule is an *expansion* (around what is log p expanded?) and a *curvature* (which PSD matrix stands for the bend?). The gradient is always
# the true one.
#
# | curvature | Λ_n |
# |---|---|
# | `GaussNewton()` | the Fisher information of p(y \| f), diag(τ, ½): PSD by construction |
# | `Exact()` | −∂² log p (or its expectation) on the full block, negative eigenvalues set to zero |
#
# `trace.indefinite` counts the blocks that were indefinite in each turn.

# %%
RULES = {
    "Laplace, Gauss-Newton": rules.Laplace(),
    "Laplace, eigclip": rules.Laplace(rules.Exact()),
    "VI, Gauss-Newton": rules.Variational(),
    "VI, eigclip": rules.Variational(rules.Exact()),
    "power EP ½, Gauss-Newton": rules.PowerEP(0.5),
}
start = {name: bgn.bayes_newton(two(), likelihoods.HeteroscedasticGaussian(), (t, y), rule, steps=300) for name, rule in RULES.items()}
for name, posterior in start.items():
    trace = posterior.trace
    print(f"{name:26} {trace.steps:3} turns, log evidence {trace.energy[-1]:8.2f} nats, {trace.indefinite[-1]:3} of {len(t)} blocks indefinite")

# %% [markdown]
# A curvature decides how fast a rule gets there and how wide the posterior is. It does not decide where a slope is zero: under Laplace both
# curvatures end at the same mode. The variational mean does move a little with the curvature, since the expectation of the slope is taken over
# another width.

# %%
gap = {
    expansion: (start[f"{expansion}, Gauss-Newton"].marginals().mean - start[f"{expansion}, eigclip"].marginals().mean).abs().max().item()
    for expansion in ("Laplace", "VI")
}
print(", ".join(f"{k}: means of the two curvatures differ by at most {v:.1e}" for k, v in gap.items()))

# %% [markdown]
# ## Tuned, and judged
#
# Hyper-parameters by each rule's own evidence. Then four-fold cross-validation of the predictive density, with the hyper-parameters held: what
# one would get on accelerations that were not recorded.

# %%
folds = torch.randperm(len(t), generator=torch.Generator().manual_seed(0)).tensor_split(4)


def held_out(posterior) -> float:
    """Mean negative log predictive density of the folds, nats a datum."""
    scores = []
    for fold in folds:
        rest = torch.cat([f for f in folds if f is not fold])
        refitted = bgn.bayes_newton(posterior.model, posterior.likelihood, (t[rest], y[rest]), posterior.rule, steps=300)
        with torch.no_grad():
            predictive = refitted.likelihood(refitted(t[fold]))
            target = y[fold] if predictive.mean.dim() == 1 else y[fold, None]
            scores.append(metrics.nll(predictive, target).item() * len(fold))
    return sum(scores) / len(t)


results = {"one function": (constant, held_out(constant))}
for name, posterior in start.items():
    bgn.maximize_evidence(posterior, tol=1e-4, progress=False)
    results[name] = posterior, held_out(posterior)
print(f"{'':26} {'log evidence':>12} {'NLPD':>7}")
for name, (posterior, score) in results.items():
    print(f"{name:26} {posterior.log_evidence().item():12.2f} {score:7.3f}")

# %% [markdown]
# Evidences of different rules are different approximations of one number, so their order says little; NLPD says more. A second function for the
# noise is worth tens of nats of evidence. Laplace, whose Λ looks at one point, is too sure of the noise where it is small, and pays for it;
# averaging over q(f) does not have that fault.

# %%
at = torch.linspace(0, 60, 400, dtype=torch.float64)
best = results["VI, Gauss-Newton"][0]
laplace = results["Laplace, Gauss-Newton"][0]
figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
with torch.no_grad():
    for ax, posterior, title in ((axes[0, 0], constant, "one function"), (axes[0, 1], best, "two functions, VI with Gauss-Newton")):
        plots.posterior_band(posterior, at, xlabel="time after the impact / ms", ylabel="acceleration (standardised)", ax=ax)
        ax.set(title=title, ylim=(-3.6, 3.2))
    plots.latent_bands(at, best(at), names=("mean m", "log noise variance ρ"), xlabel="time after the impact / ms", ax=axes[1, 0])
    for posterior, name, colour in ((best, "VI", plots.BLUE), (laplace, "Laplace", plots.RED)):
        f = posterior(at)
        mean, std = f.mean[:, 1], f.stddev[:, 1]
        axes[1, 1].fill_between(at, mean - 1.96 * std, mean + 1.96 * std, color=colour, alpha=0.2, linewidth=0)
        axes[1, 1].plot(at, mean, color=colour, label=f"{name}, 95 %")
axes[1, 0].set_title("its latent functions")
axes[1, 1].set(title="the log noise variance by two expansions", xlabel="time after the impact / ms")
axes[1, 1].legend(frameon=False, fontsize="small")
figure.savefig(figures / "05_heteroscedastic_noise.png", dpi=110)

# %% [markdown]
# ## What must be true

# %%
evidence = {name: posterior.log_evidence().item() for name, (posterior, _) in results.items()}
nlpd = {name: score for name, (_, score) in results.items()}
# Raw Hessian blocks are indefinite all over, and Gauss-Newton's never are.
assert start["Laplace, eigclip"].trace.indefinite[-1] > 0.9 * len(t) and start["VI, Gauss-Newton"].trace.indefinite[-1] == 0
# The gradient is the true one: one mode, whichever curvature leads to it.
assert gap["Laplace"] < 1e-4 and gap["VI"] > 1e-3, gap
# Changing noise is there, by the evidence and on held-out data.
assert all(evidence[name] > evidence["one function"] + 20 for name in RULES), evidence
assert all(nlpd[name] < nlpd["one function"] for name in RULES), nlpd
# Averaging over the belief beats looking at its mode, under either curvature.
assert all(nlpd[f"VI, {c}"] < nlpd[f"Laplace, {c}"] - 0.05 for c in ("Gauss-Newton", "eigclip")), nlpd
# Still before the impact is felt, shaken after it: the noise's standard deviation grows tenfold.
with torch.no_grad():
    ρ = best(torch.tensor([8.0, 32.0], dtype=torch.float64)).mean[:, 1]
assert math.exp(0.5 * (ρ[1] - ρ[0])) > 10, ρ
print("all assertions hold; figures are in", figures.resolve())
