# %% [markdown]
# # 4. Counts over time: a hundred thousand of them
#
# A Gaussian process over time costs O(n³) as a matrix and O(n) as a differential equation. Matérn kernels, cosines and their sums and products are
# linear stochastic differential equations in disguise,
#
#     dx = F x dt + L dβ,     f(t) = H x(t),     y_n ~ Poisson( e^{f(t_n)} )
#
# so a Kalman filter and a smoother do what a Cholesky factor does, step by step and exactly. Counts are not Gaussian: the loop is that of every
# rule here, sites t_n(f_n) that stand in for p(y_n | f_n) and are renewed until nothing moves, and in each turn the filter does the algebra.
#
# We count requests at a server, one number a minute for seventy days, of which a day and a half are missing. The data are simulated, from a
# rate that is not drawn from our model, so that the truth is known.

# %%
import math
import time
from pathlib import Path

import gpytorch
import matplotlib.pyplot as plt
import torch

import bayesgn as bgn
from bayesgn import likelihoods, metrics, models, plots, rules

figures = Path("demo_figures")
figures.mkdir(exist_ok=True)
generator = torch.Generator().manual_seed(0)


def truth(t: torch.Tensor) -> torch.Tensor:
    """The log rate at times t, in days."""
    turn = 2 * math.pi * t
    day = 0.9 * torch.sin(turn - 1.9) + 0.35 * torch.cos(2 * turn - 1.3)  # a day has a shape …
    day = day * (1 + 0.3 * torch.sin(turn / 31))  # … that is more pronounced in some weeks
    slow = 0.30 * torch.sin(turn / 47 + 0.6) + 0.15 * torch.sin(turn / 9.3 + 3.8) + 0.10 * torch.sin(turn / 3.7 + 1.9)
    return math.log(4.0) + slow + day


n = 100_000
t = torch.arange(n, dtype=torch.float64) / 1440  # in days
log_rate = truth(t)
counts = torch.poisson(log_rate.exp(), generator=generator)

down = (t > 40.2) & (t < 41.7)  # the log was lost: NaN marks what is missing
observed = counts.masked_fill(down, math.nan)
print(f"{n:,} minutes, {int(down.sum()):,} missing; {observed.nanmean():.2f} requests a minute, {observed.nan_to_num().max():.0f} at most")

# %% [markdown]
# ## The model
#
# gpytorch's kernels are the kernels. A slow part, and two oscillations with a day's and half a day's period whose amplitude and phase wander
# (an exponential kernel times a cosine): the *quasi-periodic* kernel, cut to two harmonics. Together six states. The periods are known, so they
# are frozen; six other hyper-parameters and the mean are not. The starts are guesses, in the units of t.


# %%
def kernel() -> gpytorch.kernels.Kernel:
    """Slow + day + half a day."""

    def scaled(base, variance: float):
        out = gpytorch.kernels.ScaleKernel(base).double()
        out.outputscale = torch.tensor(variance, dtype=torch.float64)
        return out

    def matern(nu: float, lengthscale: float):
        out = gpytorch.kernels.MaternKernel(nu=nu).double()
        out.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
        return out

    def wave(period: float):
        out = gpytorch.kernels.CosineKernel().double()
        out.period_length = torch.tensor(period / 2, dtype=torch.float64)  # gpytorch's cosine has cos(π τ / period_length)
        return out.requires_grad_(False)

    return scaled(matern(1.5, 2.0), 0.1) + scaled(matern(0.5, 30.0) * wave(1.0), 0.5) + scaled(matern(0.5, 30.0) * wave(0.5), 0.5)


def model(kind=models.MarkovGP):
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(1.0)
    return kind(kernel(), mean)


began = time.perf_counter()
posterior = bgn.bayes_newton(model(), likelihoods.Poisson(), (t, observed), rule=rules.Variational())
print(f"{posterior.trace}\n{time.perf_counter() - began:.1f} s for {n:,} counts, {posterior.trace.steps} turns")

# %% [markdown]
# ## Is it the same Gaussian process?
#
# On the first two days, thinned out, there is time for the dense one: the same kernel as a matrix. Evidence and marginals agree to rounding.

# %%
few = slice(0, 2880, 10)
chain, dense = (
    bgn.bayes_newton(model(kind), likelihoods.Poisson(), (t[few], observed[few]), rule=rules.Variational()) for kind in (models.MarkovGP, models.GP)
)
off = abs(chain.log_evidence().item() - dense.log_evidence().item())
off_mean = (chain.marginals().mean - dense.marginals().mean).abs().max().item()
print(f"{len(t[few])} counts: log evidence {chain.log_evidence():.6f} and {dense.log_evidence():.6f} nats; means differ by at most {off_mean:.1e}")

# %% [markdown]
# ## Hyper-parameters by the evidence
#
#     E(θ) = log Z_sites(θ) + Σ_n ( E_q[log p(y_n | f_n)] − E_q[log t_n] )
#
# Under the variational rule this is the variational bound. `maximize_evidence` climbs it with L-BFGS in the log hyper-parameters, turns of the
# rule before every evaluation. Its gradient comes from the smoother (no automatic differentiation through time), so it costs about as much as
# three smoothers.

# %%
began = time.perf_counter()
trace = bgn.maximize_evidence(posterior, tol=1e-3, progress=False)
seconds = time.perf_counter() - began
print(f"{trace}\n{seconds:.1f} s: {trace.evaluations} evaluations with their gradients, {trace.turns} turns")
for name, values in trace.hyperparameters.items():
    print(f"  {name:45} {values[0]:8.3f} → {values[-1]:8.3f}")

# %% [markdown]
# ## What does a turn cost?
#
# Linear, and here is how linear. The dense process is the better choice up to some hundreds of data, for its kernels may be any; beyond, it is
# not a choice. Where the time goes also matters: with many states the filter, d³ for each datum; for likelihoods without closed-form
# expectations the cubature, twenty evaluations of log p and its derivative for each datum (Poisson has none to do). What a turn needs in memory
# is linear too.


# %%
def turn_time(kind, m: int) -> float:
    """Seconds of one turn and the evidence after it, on m minutes; the best of three."""
    belief = kind(kernel()).start(likelihoods.Poisson(), (t[:m], observed[:m]), rules.Variational())
    best = math.inf
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            belief, _ = belief.turn()
            belief.log_evidence()
            best = min(best, time.perf_counter() - began)
    return best


sizes = {models.MarkovGP: (1_000, 10_000, 100_000), models.GP: (250, 500, 1_000)}
cost = {kind.__name__: {m: turn_time(kind, m) for m in some} for kind, some in sizes.items()}
for name, times in cost.items():
    print(f"{name:9}", ", ".join(f"{m:,}: {1e3 * s:.1f} ms ({1e6 * s / m:.2f} µs a datum)" for m, s in times.items()))

# %% [markdown]
# ## Look at it
#
# `posterior(x)` is a Gaussian over f at any times, `likelihood(f)` the predictive of counts. In the gap the daily shape carries on, and the
# band widens by what the slow part may have done meanwhile.

# %%
at = torch.linspace(38.5, 43.0, 900, dtype=torch.float64)
f = posterior(at)
minutes = ((t >= 38.5) & (t <= 43.0)).nonzero()[:, 0]
figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
plots.predictive_band(
    at, f, posterior.likelihood(f), data=(t[minutes[::6]], observed[minutes[::6]]), truth=truth(at).exp(),
    xlabel="time / day", ylabel="requests a minute", ax=axes[0, 0], response=torch.exp,
)  # fmt: skip
axes[0, 0].axvspan(40.2, 41.7, color=plots.GREY, alpha=0.15, linewidth=0)
axes[0, 0].set(title="the lost day and a half", ylim=(0, 45))

every = slice(0, n, 60)
q = posterior.marginals()
axes[0, 1].plot(t[every], log_rate[every], color=plots.ORANGE, linewidth=2, label="truth")
axes[0, 1].plot(t[every], q.mean[every, 0], color=plots.BLUE, linewidth=0.7, label="posterior mean")
axes[0, 1].set(xlabel="time / day", ylabel="log rate", title="seventy days", ylim=(-0.3, 4.4))
axes[0, 1].legend(frameon=False, fontsize="small")

plots.evidence_trace(trace.evidence, xlabel="step of the hyper-parameters", ax=axes[1, 0])
for (name, times), colour in zip(cost.items(), (plots.BLUE, plots.ORANGE)):
    axes[1, 1].loglog(list(times), list(times.values()), "o-", color=colour, label=name)
axes[1, 1].set(xlabel="data", ylabel="a turn and its evidence / s", title="time on one core")
axes[1, 1].legend(frameon=False, fontsize="small")
figure.savefig(figures / "04_counts_over_time.png", dpi=110)

# %% [markdown]
# ## Does it predict?
#
# Three questions with known answers. Does the 95 % band of the log rate hold the true log rate? Does the predictive of the missing counts beat
# what one would do without a model: the mean count, and the mean count of that minute of the day? And the next day, which nobody has seen?

# %%
width = q.cov[:, 0, 0].sqrt()
inside = ((q.mean[:, 0] - log_rate).abs() < 1.96 * width).double()
covered, covered_down = inside[~down].mean().item(), inside[down].mean().item()
print(f"the 95 % band holds the true log rate at {covered:.1%} of the minutes, {covered_down:.1%} of the missing ones")

nll = lambda y, target: metrics.nll(y, target.unsqueeze(-1)).item()
poisson = lambda rate: torch.distributions.Independent(torch.distributions.Poisson(rate.unsqueeze(-1)), 1)
minute = torch.arange(n) % 1440
kept = ~down
mean_of_minute = torch.zeros(1440, dtype=torch.float64).index_add_(0, minute[kept], counts[kept]) / torch.bincount(minute[kept], minlength=1440)

ahead = torch.arange(n, n + 1440, dtype=torch.float64) / 1440
tomorrow = torch.poisson(truth(ahead).exp(), generator=generator)

scores = {}
for name, times, target in (("the missing day and a half", t[down], counts[down]), ("the day after", ahead, tomorrow)):
    with torch.no_grad():
        ours = posterior.likelihood(posterior(times))
    same_minute, constant = mean_of_minute[(1440 * times).round().long() % 1440], observed.nanmean().expand(len(target))
    scores[name] = {"posterior": nll(ours, target), "mean of that minute": nll(poisson(same_minute), target), "mean": nll(poisson(constant), target)}
    print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores[name].items()) + " nats a count")

# %% [markdown]
# ## What must be true

# %%
# The chain is the Gaussian process.
assert off < 1e-6 and off_mean < 1e-6, (off, off_mean)
# The evidence was climbed, and each wave was given about its variance, a²/2 (and what its swelling over the weeks adds).
assert trace.evidence[-1] > trace.evidence[0] + 10 and trace.converged, trace
day, half_day = (trace.hyperparameters[f"kernels.0.kernels.{k}.outputscale"][-1] for k in (1, 2))
assert math.isclose(day, 0.9**2 / 2, rel_tol=0.6) and math.isclose(half_day, 0.35**2 / 2, rel_tol=0.6), (day, half_day)
# The band is honest where counts were seen, and predictions beat both baselines where none were.
assert 0.90 < covered < 0.99, covered
assert all(s["posterior"] < s["mean of that minute"] < s["mean"] for s in scores.values()), scores
# Ten times the data take about ten times as long, not a hundred times; a thousand data as a matrix take longer than as a chain.
assert cost["MarkovGP"][100_000] < 40 * cost["MarkovGP"][10_000], cost
assert cost["GP"][1_000] > cost["MarkovGP"][1_000], cost
print("all assertions hold; figures are in", figures.resolve())
