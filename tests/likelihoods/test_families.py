"""What single families promise beyond the contract: noise and its gradient, torch's losses, links, bad input, extremes."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributions as td

from bayesgn import likelihoods as L

from .families import BY_NAME, FAMILIES, D, tensor

close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-2", "gaussian-each", "gaussian-full"])
def test_noise_gradient_from_statistics_is_autodiffs(name):
    lik = BY_NAME[name].build()
    f, y = BY_NAME[name].data(9)
    if name != "gaussian-full":
        y[2, 0] = torch.nan
    y[4] = torch.nan
    stats = lik.statistics(f, y)
    (a,) = torch.autograd.grad(lik.log_prob_of(stats), lik.raw_noise)
    (b,) = torch.autograd.grad(lik.log_prob(f, y).sum(), lik.raw_noise)
    close(a, b.tril() if b.ndim == 2 else b)
    lik.noise = lik.noise.detach() * 3                                       # the statistics outlive a change of noise
    close(lik.log_prob_of(stats), lik.log_prob(f, y).sum())


@pytest.mark.parametrize("noise", [tensor(0.4), tensor(0.4, 2.0), tensor([1.0, 0.3], [0.3, 0.5])])
def test_noise_reads_back_and_is_settable(noise):
    lik = L.Gaussian(noise)
    close(lik.noise.detach(), noise, 1e-14)
    lik.noise = 2 * noise
    close(lik.noise.detach(), 2 * noise, 1e-14)
    assert [name for name, _ in lik.named_parameters()] == ["raw_noise"]
    with pytest.raises(ValueError, match="positive"):
        lik.noise = -noise
    with pytest.raises(ValueError, match="new value"):
        lik.noise = torch.ones(3, dtype=D)
    lik.noise = 0.3
    assert torch.allclose(lik.noise.diagonal() if noise.ndim == 2 else lik.noise, tensor(0.3))


@pytest.mark.parametrize("weight", [None, tensor(1.0, 2.0, 0.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_categorical_is_torchs_cross_entropy(weight, smoothing):
    f, y = torch.randn(7, 3, 4, 5, dtype=D), torch.randint(3, (7, 4, 5))     # segmentation: [n c H W]
    y[0, 0] = -100
    lik = L.Categorical(weight, smoothing, class_dim=1)
    loss = torch.nn.functional.cross_entropy(f, y, weight, reduction="none", label_smoothing=smoothing)
    close(lik.log_prob(lik.rows(f), y), -loss)


def test_categorical_takes_integers_of_any_width():
    f, y = BY_NAME["categorical"].data(5)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        lik = L.Categorical()
        lik.validate(f, y.to(dtype))
        close(lik.log_prob(f, y.to(dtype)), lik.log_prob(f, y))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name.startswith(("categorical", "bernoulli", "ordinal", "beta", "negative", "student"))],
                         ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_extreme_logits_are_finite(family, dtype, size):
    lik = family.build()
    y = family.data(1)[1]
    f = torch.full((1, family.c), size, dtype=dtype)
    f[:, ::2] *= -1
    x = f.clone().requires_grad_()
    for function in (lik.log_prob, lik.gradient, lik.neg_hessian, lik.ggn, lik.ggn_root):
        assert function(f, y).isfinite().all()
    assert torch.autograd.grad(lik.log_prob(x, y).sum(), x)[0].isfinite().all()
    if f.dtype == D:
        close(torch.autograd.grad(lik.log_prob(x, y).sum(), x)[0], lik.gradient(f, y).detach(), 1e-6)


BAD = [
    (lambda: L.Categorical(), torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"y contains 3 .*3 classes.*0 to 2.*ignore_index"),
    (lambda: L.Categorical(), torch.zeros(2, 3), torch.tensor([0.0, 1.5]), TypeError, r"float32.*integers.*y\.long\(\)"),
    (lambda: L.Categorical(), torch.zeros(2, 3), torch.zeros(2, 3), ValueError, r"argmax"),
    (lambda: L.Categorical(), torch.zeros(2, 3), torch.tensor([0, 1, 2]), ValueError, r"y has shape \[3\] but f has shape \[2, 3\]"),
    (lambda: L.Categorical(), torch.zeros(2, 1), torch.tensor([0, 0]), ValueError, r"single class.*Bernoulli"),
    (lambda: L.Categorical(torch.ones(4)), torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, r"weight has 4 entries.*\[2, 3\]"),
    (lambda: L.Categorical(), torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), ValueError, r"f has 1 NaN or infinite.*row 0"),
    (lambda: L.Categorical(), torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]), TypeError, r"int64.*floating point"),
    (lambda: L.Bernoulli(), torch.zeros(2, 1), torch.tensor([0, 2]), ValueError, r"y contains 2.*0 or 1.*Categorical"),
    (lambda: L.Bernoulli(), torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, r"y has shape \[2\].*\[2, 3\]"),
    (lambda: L.Gaussian(), torch.zeros(2, 1), torch.tensor([1.0, float("inf")]), ValueError, r"y contains inf.*NaN marks"),
    (lambda: L.Gaussian(torch.ones(3)), torch.zeros(2, 2), torch.zeros(2, 2), ValueError, r"noise has shape \[3\].*\[2, 2\]"),
    (lambda: L.HeteroscedasticGaussian(), torch.zeros(2, 3), torch.zeros(2, 1), ValueError, r"odd number of latents"),
    (lambda: L.Poisson(), torch.zeros(2, 1), torch.tensor([1.0, -2.0]), ValueError, r"y contains -2\.0.*counts are integers"),
    (lambda: L.Poisson(), torch.zeros(2, 1), torch.tensor([1.0, 0.5]), ValueError, r"y contains 0\.5.*Gamma"),
    (lambda: L.NegativeBinomial(), torch.zeros(1, 1), torch.tensor([0.5]), ValueError, r"counts are integers"),
    (lambda: L.StudentT(), torch.zeros(1, 1), torch.tensor([float("-inf")]), ValueError, r"-inf"),
    (lambda: L.Gamma(), torch.zeros(1, 1), torch.tensor([0.0]), ValueError, r"y contains 0\.0.*\(0, ∞\)"),
    (lambda: L.Beta(), torch.zeros(1, 1), torch.tensor([1.0]), ValueError, r"y contains 1\.0.*strictly between 0 and 1"),
    (lambda: L.Ordinal(3), torch.zeros(1, 1), torch.tensor([3]), ValueError, r"y contains 3.*3 levels, 0 to 2"),
    (lambda: L.Ordinal(3), torch.zeros(1, 2), torch.tensor([1]), ValueError, r"one latent"),
    (lambda: L.Ordinal(3), torch.zeros(1, 1), torch.tensor([1.0]), TypeError, r"y\.long"),
    (lambda: L.FromDistribution(lambda f: td.Gamma(f[..., 0].exp(), 1.0)), torch.zeros(2, 1), torch.tensor([1.0, -1.0]), ValueError,
     r"y contains \[-1\.0\].*1 of 2"),
    (lambda: L.FromDistribution(lambda f: td.Normal(f.mean(), 1.0)), torch.zeros(2, 1), torch.tensor([1.0, -1.0]), ValueError,
     r"batch \[\] for f \[2, 1\]"),
]


@pytest.mark.parametrize("make, f, y, error, message", BAD)
def test_bad_input(make, f, y, error, message):
    with pytest.raises(error, match=message):
        make().validate(f, y)


@pytest.mark.parametrize("make, error, message", [
    (lambda: L.Gaussian(0.0), ValueError, r"positive and finite but is 0"),
    (lambda: L.Gaussian(torch.ones(2, 3)), ValueError, r"\[2, 3\]"),
    (lambda: L.Gaussian(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), ValueError, "positive definite"),
    (lambda: L.Categorical(label_smoothing=1.0), ValueError, r"\[0, 1\) but is 1\.0"),
    (lambda: L.Categorical(predictive="probit"), TypeError, r"'probit'.*Probit\(\)"),
    (lambda: L.Bernoulli("logit"), TypeError, r"'logit'.*NormCDF"),
    (lambda: L.StudentT(dof=-1.0), ValueError, r"dof must be positive and finite but is -1"),
    (lambda: L.Ordinal([1.0, 0.0]), ValueError, "increase strictly"),
    (lambda: L.Poisson(exposure=0.0), ValueError, "exposure must be positive"),
    (lambda: L.from_config({"class": "torch.load"}), ValueError, "no likelihood is called 'torch.load'"),
    (lambda: L.from_config({"class": "Gaussian", "sigma": 1.0}), ValueError, "does not fit its constructor"),
    (lambda: L.Categorical().rows(torch.zeros(3)), ValueError, "dimension of classes"),
])
def test_bad_constructions(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_softmaxed_output_is_noticed():
    with pytest.warns(UserWarning, match="softmaxed already.*logits are expected"):
        L.Categorical().validate(torch.randn(5, 3).softmax(-1), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("function, c, way", [
    (lambda f: td.Normal(f[..., 0], f[..., 1].exp()), 2, "KL"),
    (lambda f: td.Categorical(logits=f), 3, "enumeration of 3 values"),
    (lambda f: td.StudentT(5.0, f[..., 0]), 1, "Monte Carlo"),
])
def test_from_distribution_says_which_way_it_took(function, c, way, caplog):
    with caplog.at_level(logging.INFO, "bayesgn"):
        L.FromDistribution(function).ggn(torch.zeros(2, c))
    assert way in caplog.text


def test_from_distribution_equals_the_closed_forms():
    f, y = BY_NAME["categorical"].data(5)
    own, closed = L.FromDistribution(lambda f: td.Categorical(logits=f)), L.Categorical()
    for name in ("log_prob", "gradient", "neg_hessian", "ggn"):
        close(getattr(own, name)(f, y), getattr(closed, name)(f, y))


def test_monte_carlo_fisher_leaves_torchs_random_state_alone():
    state = torch.random.get_rng_state()
    lik = L.FromDistribution(lambda f: td.StudentT(5.0, f[..., 0]), samples=10)
    first = lik.ggn(torch.zeros(2, 1))
    lik.sample(torch.zeros(2, 1), torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(first, lik.ggn(torch.zeros(2, 1)))


def test_second_derivatives_reach_the_users_own_parameters():
    scale = torch.nn.Parameter(tensor(2.0))
    lik = L.FromDistribution(lambda f: td.Normal(f[..., 0], scale))
    f = torch.zeros(1, 1, dtype=D, requires_grad=True)
    (g,) = torch.autograd.grad(lik.ggn(f).sum(), scale)
    close(g, -2 / scale.detach() ** 3)


def test_a_user_module_keeps_its_parameters():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, f):
            return td.Normal(f[..., 0], self.log_scale.exp())

    assert [name for name, _ in L.FromDistribution(Noisy()).named_parameters()] == ["function.log_scale"]
