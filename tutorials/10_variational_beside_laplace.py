# %% [markdown]
# # Variational inference beside Laplace
#
# Laplace's method looks at a trained net once: where it stands, and how the loss bends there. Variational inference moves both, mean and covariance,
# until the bound
#
#     ELBO = E_q log p(y|θ) − KL(q ‖ prior)  ≤  log p(y)
#
# is as high as it can be. Here both run over the same Gauss-Newton matrix, on the breast cancer data of scikit-learn, and we ask what each is
# good for: draws of the *net* (weight space) and the *linearised net* (function space).

# %%
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer

import bayesgn as bgn
from bayesgn import ggn, likelihoods, metrics, models, optim, rules

torch.manual_seed(0)
torch.set_num_threads(1)
figures = Path("demo_figures")
figures.mkdir(exist_ok=True)

x, y = (torch.as_tensor(a) for a in load_breast_cancer(return_X_y=True))
x = ((x - x.mean(0)) / x.std(0))[:, :10].double()
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
x, y = x[order], y[order].long()
x_train, y_train, x_test, y_test = x[:300], y[:300], x[300:], y[300:]
net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2)).double().eval()

# %% [markdown]
# First the mode: some steps of Gauss-Newton under the prior N(0, 1).

# %%
likelihood, precision = likelihoods.Categorical(), 1.0
trainer = optim.GaussNewton(net, likelihood, weight_decay=precision / len(x_train))
for _ in range(30):
    trainer.step(x_train, y_train)
model = models.Network(net, prior=models.WeightPrior(precision), structure=ggn.Full)
laplace = bgn.laplace(model, likelihood, (x_train, y_train))


# %% [markdown]
# Then VOGGN: the Gauss-Newton matrix and the gradient at draws of the weights, averaged over steps. It begins at the trained weights; the net itself
# is not touched, the posterior holds a copy of it at the variational mean. The step falls to zero by half a cosine, as noise has to be averaged out.


# %%
def voggn(structure, **options):
    began = time.perf_counter()
    own = models.Network(net, prior=models.WeightPrior(precision), structure=structure)
    posterior = bgn.variational(
        own, likelihood, (x_train, y_train), epochs=100, batch_size=300, generator=torch.Generator().manual_seed(0),
        progress=False, **options,
    )  # fmt: skip
    print(f"{structure.__name__:10s} {posterior.trace}  {time.perf_counter() - began:.1f} s")
    return posterior


variational = voggn(ggn.Full, expectation=optim.Draws(4))
diagonal = voggn(ggn.Diag, expectation=optim.Draws(4))
ivon = voggn(ggn.Diag, expectation=optim.Reparameterized(4))

# %% [markdown]
# The bound is of q itself, and Laplace's q has a bound too: its own ELBO, by the same draws. Draws from the Laplace posterior of a net are poor (its
# covariance is right for the linearised net, not for the net), which is the whole reason to move q.


# %%
def elbo_of_laplace(posterior):
    f = posterior.sample_outputs(x_train, 200, generator=torch.Generator().manual_seed(1))
    fit = torch.stack([likelihood.log_prob(one, y_train).sum() for one in f]).mean()
    P, Σ = precision, posterior.weight_variance()
    kl = 0.5 * (P * Σ.sum() + P * posterior.mean.square().sum() - len(Σ) + posterior.precision().logdet())
    return float(fit - kl.detach())


bounds = {
    "Laplace's q": elbo_of_laplace(laplace),
    "mean field": float(diagonal.log_evidence().detach()),
    "full covariance": float(variational.log_evidence().detach()),
}
print({k: round(v, 1) for k, v in bounds.items()})

# %% [markdown]
# Predictions on held-out data: the net at draws of its weights, and the linearised net.

# %%
scores = {"MAP": float(metrics.nll(torch.distributions.Categorical(logits=net(x_test).detach()), y_test))}
for name, posterior in {"Laplace": laplace, "VOGGN full": variational, "VOGGN diagonal": diagonal, "IVON-like": ivon}.items():
    draws = posterior.sample_outputs(x_test, 200, generator=torch.Generator().manual_seed(2))
    scores[f"{name}, draws of the net"] = float(metrics.nll(posterior.likelihood(draws), y_test))
    scores[f"{name}, linearised"] = float(metrics.nll(posterior.likelihood(posterior(x_test)), y_test))
for name, nll in scores.items():
    print(f"{name:32s} NLL {nll:.3f}")

# %% [markdown]
# What to take from it: draws of the net need a q that was fitted to draws of the net, and variational inference gives one. The linearised net
# needs none: under Laplace's q it predicts as well as any here. Variational training pays where draws, or the bound itself, are what is wanted.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for name, posterior in {"full covariance": variational, "mean field": diagonal}.items():
    left.plot(posterior.trace.elbo, label=name)
left.set(xlabel="epoch", ylabel="ELBO (nats)", ylim=(-250, -50))
left.legend(frameon=False)
names = list(scores)[::-1]
right.barh(names, [scores[n] for n in names], color=["C1" if "draws" in n else "C0" for n in names])
right.set(xlabel="test NLL (lower is better)")
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
fig.savefig(figures / "10_variational_beside_laplace.png", dpi=110)

# %% [markdown]
# **In a training loop of your own** the same thing is an optimizer: between steps the net's weights are the mean.

# %%
own_net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2)).double().eval()
own_model = models.Network(own_net, prior=models.WeightPrior(precision), structure=ggn.Kron)
opt = optim.Variational(
    own_model, likelihood, num_data=300, curvature=rules.MonteCarloFisher(1), expectation=optim.Draws(2), lr=0.1,
    generator=torch.Generator().manual_seed(0),
)  # fmt: skip
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(x_train, y_train), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0)
)
for _ in range(40):
    for xb, yb in loader:
        loss = opt.step(xb, yb)
    schedule.step()
from_scratch = opt.posterior(loader)
print(from_scratch, f"ELBO {float(from_scratch.log_evidence().detach()):.1f}")

# %% [markdown]
# **A net that is linear in its weights needs no draws.** `optim.Linearized()` takes expectations by quadrature over the functions, every step is
# tried before it is taken, and the bound never falls. Logistic regression settles in some ten steps.

# %%
linear = models.Network(torch.nn.Linear(10, 1).double().eval(), structure=ggn.Full)
exact = bgn.variational(linear, likelihoods.Bernoulli(), (x_train, y_train.double()), expectation=optim.Linearized())
print(exact.trace)

# %%
assert bounds["full covariance"] > bounds["mean field"] > bounds["Laplace's q"]
assert scores["VOGGN full, draws of the net"] < 0.5 * scores["Laplace, draws of the net"]  # what moving q is for
assert exact.trace.converged and exact.trace.elbo == sorted(exact.trace.elbo)
