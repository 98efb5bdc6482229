"""A network as a Pyro program: its log density by hand, and Pyro's own tools on it."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from bayesgn import likelihoods, models
from bayesgn.models.pyro_model import PyroModel

D = torch.float64


@pytest.fixture(autouse=True)
def own_randomness():
    """Pyro draws from torch's global generator and keeps parameters in a global store."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pyro.clear_param_store()
        yield
        pyro.clear_param_store()


def problem(c: int, n: int = 7):
    x = torch.randn(n, 2, dtype=D)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, c)).to(D)
    return net, x


def count(n: int, d: int = 1) -> torch.Tensor:
    return torch.poisson(torch.full((n, d), 2.0, dtype=D))


# likelihood, latents, y of 7 data, and log p(y|f) by torch.distributions or by hand
normal = lambda loc, scale: torch.distributions.Normal(loc, scale)
CASES = {
    "Gaussian": (lambda: likelihoods.Gaussian(0.3), 2, lambda: torch.randn(7, 2, dtype=D), lambda f, y: normal(f, math.sqrt(0.3)).log_prob(y).sum()),
    "Categorical": (lambda: likelihoods.Categorical(), 3, lambda: torch.arange(7) % 3, lambda f, y: f.log_softmax(-1)[torch.arange(7), y].sum()),
    "Bernoulli": (
        lambda: likelihoods.Bernoulli(), 1, lambda: (torch.arange(7) % 2).to(D),
        lambda f, y: torch.distributions.Bernoulli(logits=f[:, 0]).log_prob(y).sum(),
    ),
    "Poisson": (lambda: likelihoods.Poisson(), 1, lambda: count(7), lambda f, y: torch.distributions.Poisson(f.exp()).log_prob(y).sum()),
    "StudentT": (
        lambda: likelihoods.StudentT(4.0, 0.5), 1, lambda: torch.randn(7, 1, dtype=D),
        lambda f, y: torch.distributions.StudentT(4.0, f, 0.5).log_prob(y).sum(),
    ),
    "Heteroscedastic": (
        lambda: likelihoods.HeteroscedasticGaussian(likelihoods.Exp()), 2, lambda: torch.randn(7, 1, dtype=D),
        lambda f, y: normal(f[:, :1], f[:, 1:].exp()).log_prob(y).sum(),
    ),
    "Ordinal": (lambda: likelihoods.Ordinal(3), 1, lambda: torch.arange(7) % 3, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_log_density_by_hand(name):
    likelihood, c, targets, by_hand = CASES[name]
    likelihood, y, (net, x) = likelihood(), targets(), problem(c)
    prior = models.WeightPrior.per_layer(net, torch.tensor([2.0, 0.5]), mean=0.1)
    model = PyroModel(models.Network(net, prior), likelihood)
    trace = pyro.poutine.trace(model).get_trace(x, y)
    θ = trace.nodes["weights"]["value"]
    first = nn.Linear(2, 3).to(D).weight.numel() + 3
    scale = torch.cat([torch.full((first,), 2.0**-0.5, dtype=D), torch.full((len(θ) - first,), 0.5**-0.5, dtype=D)])
    parts = dict(zip(("0.weight", "0.bias", "3.weight", "3.bias"), θ.split([6, 3, 3 * c, c]), strict=True))
    f = torch.tanh(x @ parts["0.weight"].view(3, 2).mT + parts["0.bias"]) @ parts["3.weight"].view(c, 3).mT + parts["3.bias"]
    torch.testing.assert_close(trace.nodes["f"]["value"], f)
    with torch.no_grad():
        data = likelihood.log_prob(f, y).sum() if by_hand is None else by_hand(f, y)
        expected = normal(0.1, scale).log_prob(θ).sum() + data
        torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.log_prior(θ) + model.log_likelihood(x, y, θ).sum(), expected, rtol=1e-10, atol=1e-10)
    assert {k: v.shape for k, v in model.named(θ).items()} == {k: v.shape for k, v in net.named_parameters()}
    with torch.no_grad():
        assert model(x).shape == likelihood.target_shape(f)


def test_missing_targets_count_nothing():
    net, x = problem(2)
    y = torch.randn(7, 2, dtype=D)
    model = PyroModel(models.Network(net), likelihoods.Gaussian(0.3))
    θ = torch.randn(len(model.trained), dtype=D)
    density = lambda x, y: pyro.poutine.trace(pyro.condition(model, {"weights": θ})).get_trace(x, y).log_prob_sum()
    holed = y.clone()
    holed[[1, 4]] = float("nan")
    kept = [0, 2, 3, 5, 6]
    torch.testing.assert_close(density(x, holed), density(x[kept], y[kept]))
    model = PyroModel(models.Network(net), likelihoods.Categorical())
    labels = torch.tensor([0, 1, -100, 1, 0, 0, -100])
    kept = labels != -100
    torch.testing.assert_close(density(x, labels), density(x[kept], labels[kept]))


def test_positions_are_one_event():
    """A net with an output for each time step: the datum is the sequence."""
    net = nn.Linear(2, 3).to(D)
    x, y = torch.randn(5, 4, 2, dtype=D), torch.arange(20).view(5, 4) % 3
    model = PyroModel(models.Network(net), likelihoods.Categorical())
    trace = pyro.poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob()
    f = trace.nodes["f"]["value"]
    expected = f.log_softmax(-1).gather(-1, y[..., None])[..., 0].sum(1)
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], expected)
    assert Predictive(model, num_samples=3, parallel=True)(x)["y"].shape == (3, 5, 4)


def test_minibatches_are_scaled():
    net, x = problem(1)
    y = torch.randn(7, 1, dtype=D)
    network, likelihood = models.Network(net), likelihoods.Gaussian(0.3)
    θ = torch.randn(PyroModel(network, likelihood).vector.numel, dtype=D)

    def density(model, x, y):
        return pyro.poutine.trace(pyro.condition(model, {"weights": θ})).get_trace(x, y).log_prob_sum()

    whole, batch = PyroModel(network, likelihood), PyroModel(network, likelihood, num_data=7)
    prior = whole.log_prior(θ)
    torch.testing.assert_close(density(batch, x[:2], y[:2]), prior + 7 / 2 * (density(whole, x[:2], y[:2]) - prior))
    drawn = PyroModel(network, likelihood, subsample_size=3)
    many = torch.stack([density(drawn, x, y) for _ in range(200)])
    assert len(many.unique()) > 10
    assert abs(many.mean() - density(whole, x, y)) < 5 * many.std() / 200**0.5
    with pytest.raises(ValueError, match="more than num_data=7"):
        batch(x.repeat(2, 1), y.repeat(2, 1))


def test_pyro_tools_and_an_untouched_net():
    net, x = problem(1)
    y = torch.randn(7, dtype=D)  # [n] for one output
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    network = models.Network(net, parameters=["3.weight", "3.bias"])
    model = PyroModel(network, likelihoods.Gaussian(0.3))
    for guide in (AutoNormal(model), AutoMultivariateNormal(model)):
        for vectorised in (False, True):
            elbo = Trace_ELBO(3, vectorize_particles=vectorised, max_plate_nesting=1)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
            assert all(math.isfinite(svi.step(x, y)) for _ in range(3))
        assert Predictive(model, guide=guide, num_samples=4)(x)["y"].shape == (4, 7, 1)
    draws = torch.randn(6, 4, dtype=D)
    for parallel in (False, True):
        for given in (draws, draws[:, None]):
            f = Predictive(model, {"weights": given}, parallel=parallel)(x)["f"]
            with torch.no_grad():
                expected = torch.stack([net[1](net[0](x)) @ θ[:3, None] + θ[3] for θ in draws])
            torch.testing.assert_close(f, expected)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():  # the program stands apart from the net
        f = model.outputs(x, draws)
        net[0].weight.zero_()
        assert torch.equal(model.outputs(x, draws), f)


def test_half_precision_runs_in_float32():
    net = nn.Linear(2, 1).to(torch.bfloat16)
    model = PyroModel(models.Network(net), likelihoods.Gaussian(0.3))
    assert model(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert net.weight.dtype == torch.bfloat16


def test_bad_input():
    net, x = problem(1)
    network, y = models.Network(net), torch.zeros(7, 1, dtype=D)
    with pytest.raises(TypeError, match="wrap the net first"):
        PyroModel(net, likelihoods.Gaussian(0.1))
    with pytest.raises(TypeError, match="pass an object"):
        PyroModel(network, likelihoods.Gaussian)
    with pytest.raises(ValueError, match="num_data=0"):
        PyroModel(network, likelihoods.Gaussian(0.1), num_data=0)
    with pytest.raises(ValueError, match="choose one"):
        PyroModel(network, likelihoods.Gaussian(0.1), num_data=7, subsample_size=2)
    model = PyroModel(network, likelihoods.Gaussian(0.1))
    with pytest.raises(ValueError, match="non-finite"):
        model(torch.full_like(x, float("nan")), y)
    with pytest.raises(ValueError, match="0 data"):
        model(x[:0], y[:0])
    with pytest.raises(ValueError, match="y has shape"):
        model(x, y[:3])
    with pytest.raises(ValueError, match="finite"):
        model(x, torch.full_like(y, float("inf")))
    with pytest.raises(RuntimeError, match="x.double"):
        model(x.float(), y)
    assert "PyroModel(Sequential, 13 weights" in repr(model)
