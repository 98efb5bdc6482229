# %% [markdown]
# # 7. Fitting a curve, with error bars
#
# No network here: a formula with a few parameters, data with noise, and the question what the data say about the parameters,
#
#     x̂ = argmin ½ Σ_i r_i(x)²,     Cov x̂ ≈ σ̂² (JᵀJ)⁻¹,     σ̂² = Σ r_i² / (m − p)
#
# `optim.least_squares` takes any torch function of the parameters; derivatives are torch's. The covariance is the Laplace approximation of the
# first tutorial, with J the Jacobian of the formula in place of a network's.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bayesgn import datasets, optim, plots
from bayesgn.optim import robust

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)

# %% [markdown]
# ## A problem with a certified answer
#
# BoxBOD, from NIST's reference datasets: biochemical oxygen demand over ten days, six points, two parameters,
#
#     y = b₁ (1 − e^{−b₂ t})
#
# It counts as hard: from the first of its two starts, (1, 1), an undamped step leaps to a place where the curve is a constant.

# %%
data = datasets.nist("BoxBOD")
fit = optim.least_squares(data.residuals, data.starts[0])
print(fit)
print("certified:", [f"{b:.10g} ± {s:.5g}" for b, s in zip(data.certified.tolist(), data.standard_errors.tolist())])

# %% [markdown]
# ## A curve with a band
#
# A decaying oscillation, 40 noisy points. Parameters may come as a dictionary, and so they go back.

# %%
def numbers(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


t = torch.linspace(0, 6, 40, dtype=torch.float64)
truth = numbers(size=2.0, decay=0.4, frequency=0.7, offset=0.5)


def curve(b: dict, t: torch.Tensor) -> torch.Tensor:
    return b["offset"] + b["size"] * torch.exp(-b["decay"] * t) * torch.cos(2 * math.pi * b["frequency"] * t)


def residuals(b: dict, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return curve(b, t) - y


generator = torch.Generator().manual_seed(0)
noise = 0.25
y = curve(truth, t) + noise * torch.randn(40, generator=generator, dtype=torch.float64)
start = numbers(size=1.0, decay=0.1, frequency=0.8, offset=0.0)
fit = optim.least_squares(residuals, start, t, y)
print(fit)

# The error of anything that depends on the parameters follows from their covariance: here the curve itself, also where there are no data.
ahead = torch.linspace(0, 9, 300, dtype=torch.float64)
mean, error = fit.propagate(curve, ahead)
half_life, its_error = fit.propagate(lambda b: math.log(2) / b["decay"])
print(f"half-life {half_life.item():.2f} ± {its_error.item():.2f}, true {math.log(2) / 0.4:.2f}; noise {fit.noise**0.5:.3f}, true {noise}")

# %% [markdown]
# ## Outliers
#
# Six points are wrong. Squares believe them; a robust loss gives a residual beyond its `scale` a smaller pull (Huber), one that fades (Cauchy) or
# none in the end (Geman-McClure). The last two are not convex, so that a good start matters: the answer of Huber is one.

# %%
wrong = torch.tensor([4, 11, 17, 23, 30, 36])
spoilt = y.clone()
spoilt[wrong] += 3.0
fits = {"squares": optim.least_squares(residuals, start, t, spoilt)}
fits["Huber"] = optim.least_squares(residuals, start, t, spoilt, loss=robust.Huber(0.4))
for name, loss in (("Cauchy", robust.Cauchy(0.4)), ("Geman-McClure", robust.GemanMcClure(0.6))):
    fits[name] = optim.least_squares(residuals, fits["Huber"].x, t, spoilt, loss=loss)
good = torch.ones(40, dtype=torch.bool).index_fill(0, wrong, False)
without = optim.least_squares(residuals, start, t[good], y[good])  # what one would have without these six
off = {name: (curve(f.x, t) - curve(without.x, t)).abs().max().item() for name, f in fits.items()}
for name, f in fits.items():
    print(f"{name:14} frequency {f.x['frequency']:.4f} ± {f.standard_errors['frequency']:.4f}, at most {off[name]:.3f} from the fit without the six")

# %% [markdown]
# ## Bounds
#
# Say that the offset is known not to exceed 0.4. A parameter that ends on its bound is held there: the others get the errors that they have
# given it.

# %%
upper = numbers(size=math.inf, decay=math.inf, frequency=math.inf, offset=0.4)
bounded = optim.least_squares(residuals, start, t, y, bounds=(None, upper))
print(bounded)

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
ax = axes[0]
ax.fill_between(ahead, mean - 1.96 * error, mean + 1.96 * error, color=plots.BLUE, alpha=0.2, linewidth=0)
ax.plot(ahead, mean, color=plots.BLUE)
ax.plot(ahead, curve(truth, ahead), color="black", linewidth=1, linestyle="--")
ax.plot(t, y, ".", color="black", markersize=4)
ax.annotate("fit, 95 % band", (1.75, 1.75), color=plots.BLUE)
ax.annotate("true curve (dashed)", (6.3, 1.0))
ax.set(xlabel="time", ylabel="y", title="a fit, and how well it is known, beyond the data too")
ax = axes[1]
ax.plot(t, spoilt, ".", color="black", markersize=4)
ax.plot(t[wrong], spoilt[wrong], "o", color=plots.RED, markersize=7, fillstyle="none")
inside = ahead[ahead <= 6]
ax.plot(inside, curve(truth, inside), color="black", linewidth=1, linestyle="--")
for name, colour in (("squares", plots.RED), ("Geman-McClure", plots.BLUE)):
    ax.plot(inside, fits[name].propagate(curve, inside)[0], color=colour)
ax.annotate("squares", (2.1, 2.3), color=plots.RED)
ax.annotate("Geman-McClure", (4.0, -0.6), color=plots.BLUE)
ax.set(xlabel="time", title="six outliers (circles)")
figure.savefig(figures / "07_fitting_curves.png", dpi=110)

# %% [markdown]
# ## What must be true
#
# An error bar is a claim about repetition, so repeat: 150 times new noise, a new fit, and the share of 95 % intervals that hold the truth.

# %%
held, repeats = 0, 150
for _ in range(repeats):
    again = optim.least_squares(residuals, truth, t, curve(truth, t) + noise * torch.randn(40, generator=generator, dtype=torch.float64))
    held += sum(abs(again.x[k] - truth[k]) <= 2.03 * again.standard_errors[k] for k in truth)  # Student's t of 36 degrees of freedom
coverage = float(held) / (repeats * len(truth))
print(f"95 % intervals hold the true parameters in {100 * coverage:.1f} % of {repeats} repetitions")

certified = optim.least_squares(data.residuals, data.starts[0])
assert ((certified.x - data.certified).abs() < 1e-8 * data.certified).all(), "NIST's digits"
assert ((certified.standard_errors - data.standard_errors).abs() < 1e-7 * data.standard_errors).all(), "and its standard deviations"
assert 0.93 < coverage < 0.97, coverage
assert off["squares"] > 3 * off["Huber"] and off["squares"] > 10 * off["Geman-McClure"], off
assert bounded.x["offset"] == 0.4 and bounded.cost > fit.cost and bounded.active.tolist() == [0, 0, 0, 1]
print("all assertions hold; the figure is in", figures.resolve())
