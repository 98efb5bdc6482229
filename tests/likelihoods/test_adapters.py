"""gpytorch's likelihoods as ours: the same density, the same parameters, the same posterior."""

from __future__ import annotations

import logging

import pytest
import torch

from bayesgn import likelihoods as L

from .families import D

gpytorch = pytest.importorskip("gpytorch")
gp = gpytorch.likelihoods
close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


class Uniformish(gp.likelihood._OneDimensionalLikelihood):
    """A user's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.width = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, function_samples, *args, **kwargs):
        return torch.distributions.Gumbel(function_samples, self.width)


def set_to(likelihood, **values):
    likelihood = likelihood.double()
    likelihood.initialize(**values)
    return likelihood


MADE = [
    (lambda: set_to(gp.GaussianLikelihood(), noise=0.3), L.Gaussian, 1),
    (lambda: set_to(gp.GaussianLikelihoodWithMissingObs(), noise=0.3), L.Gaussian, 1),
    (lambda: gp.FixedNoiseGaussianLikelihood(torch.full((6,), 0.3, dtype=D)), L.Gaussian, 1),
    (lambda: gp.BernoulliLikelihood(), L.Bernoulli, 1),
    (lambda: set_to(gp.StudentTLikelihood(), deg_free=5.0, noise=0.3), L.StudentT, 1),
    (lambda: gp.PoissonLikelihood(), L.Linked, 1),
    (lambda: set_to(gp.BetaLikelihood(), scale=4.0), L.FromDistribution, 1),
    (lambda: set_to(gp.LaplaceLikelihood(), noise=0.3), L.FromDistribution, 1),
    (lambda: gp.NegativeBinomialLikelihood().double(), L.FromDistribution, 1),
    (lambda: gp.SoftmaxLikelihood(num_classes=3, mixing_weights=False), L.Categorical, 3),
    (lambda: gp.SoftmaxLikelihood(num_features=2, num_classes=3).double(), L.FromDistribution, 2),
    (lambda: set_to(gp.MultitaskGaussianLikelihood(2, has_global_noise=False), raw_task_noises=torch.tensor([0.1, -1.0])), L.Gaussian, 2),
    (lambda: set_to(gp.MultitaskGaussianLikelihood(2), noise=0.2, task_noises=torch.tensor([0.1, 0.5], dtype=D)), L.Gaussian, 2),
    (lambda: set_to(gp.MultitaskGaussianLikelihood(2, has_task_noise=False), noise=0.2), L.Gaussian, 2),
    (lambda: Uniformish().double(), L.FromDistribution, 1),
]


@pytest.mark.parametrize("make, kind, c", MADE)
def test_same_density_and_gradient(make, kind, c):
    theirs = make()
    ours = L.from_gpytorch(theirs)
    assert type(ours) is kind
    f = torch.randn(6, c, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = ours.sample(f, torch.Generator().manual_seed(1)).detach()
    # rows apart: gpytorch's softmax reads [c c] in another layout
    p = theirs(f[:, 0]) if c == 1 else theirs(f.unsqueeze(1))
    want = p.log_prob(y.reshape(p.batch_shape + p.event_shape)).reshape(6)
    ours.validate(f, y)
    close(ours.log_prob(f, y), want)
    close(ours.gradient(f, y).detach(), torch.autograd.grad(want.sum(), f)[0])


def test_a_full_multitask_noise():
    theirs = set_to(gp.MultitaskGaussianLikelihood(2, rank=1), noise=0.2)
    F = theirs.task_noise_covar_factor
    close(L.from_gpytorch(theirs).noise.detach(), (F @ F.mT + 0.2 * torch.eye(2, dtype=D)).detach())
    mean, cov = torch.zeros(1, 2, dtype=D), torch.eye(2, dtype=D)
    marginal = theirs(gpytorch.distributions.MultitaskMultivariateNormal(mean, cov))
    close(L.from_gpytorch(theirs).predict(mean, cov[None]).covariance_matrix[0], marginal.covariance_matrix.detach())


def test_parameters_of_the_others_are_kept_and_learned():
    theirs = Uniformish().double()
    ours = L.from_gpytorch(theirs)
    assert list(ours.parameters()) == [theirs.width]
    f, y = torch.zeros(4, 1, dtype=D), torch.ones(4, 1, dtype=D)
    assert torch.autograd.grad(ours.log_prob(f, y[:, 0]).sum(), theirs.width)[0] != 0


def test_laplace_noise_has_its_fisher_information():
    """1 / b²: its KL divergence has a kink that autodiff does not see, the scores ± 1/b have no variance."""
    ours = L.from_gpytorch(set_to(gp.LaplaceLikelihood(), noise=0.25))
    close(ours.ggn(torch.zeros(3, 1, dtype=D)).detach(), torch.full((3, 1, 1), 4.0, dtype=D))


@pytest.mark.parametrize("make, message", [
    (lambda: gp.FixedNoiseGaussianLikelihood(torch.tensor([0.1, 0.2])), "FixedNoise.*noise for each datum"),
    (lambda: gp.LikelihoodList(gp.GaussianLikelihood(), gp.GaussianLikelihood()), "LikelihoodList"),
    (lambda: gp.HadamardGaussianLikelihood(num_tasks=2), "task index"),
    (lambda: gp.DirichletClassificationLikelihood(torch.tensor([0, 1, 0])), "DirichletClassification"),
    (lambda: gp.GaussianLikelihood(batch_shape=torch.Size([2])), r"batch shape \[2\].*one by one"),
    (lambda: gp.MultitaskGaussianLikelihood(3, rank=1, has_global_noise=False), "singular"),
    (lambda: "gaussian", "a str"),
    (lambda: L.Gaussian, "pass an instance"),
    (lambda: torch.nn.MSELoss(), "MSELoss.*FromDistribution"),
])
def test_what_cannot_be(make, message):
    with pytest.raises(TypeError, match=message):
        L.as_likelihood(make())


def test_ours_pass_as_they_are():
    own = L.Poisson()
    assert L.as_likelihood(own) is own
    with pytest.raises(TypeError, match="expected an instance from gpytorch.likelihoods"):
        L.from_gpytorch(own)


def test_wrong_number_of_latents():
    with pytest.raises(ValueError, match=r"one latent"):
        L.from_gpytorch(gp.BetaLikelihood()).log_prob(torch.zeros(3, 2), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"mixes 2 features into 3 classes"):
        L.from_gpytorch(gp.SoftmaxLikelihood(num_features=2, num_classes=3)).log_prob(torch.zeros(3, 3), torch.zeros(3))


def test_bayes_newton_takes_a_gpytorch_likelihood(caplog):
    import bayesgn as bgn

    x = torch.linspace(0, 5, 30, dtype=D)
    y = (x.sin() > 0).to(D)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5)).double()
    with caplog.at_level(logging.INFO, "bayesgn"):
        fits = [bgn.bayes_newton(bgn.models.GP(kernel), lik, (x, y), progress=False) for lik in (gp.BernoulliLikelihood(), L.Bernoulli(L.NormCDF()))]
    close(fits[0].marginals().mean, fits[1].marginals().mean)
    assert isinstance(fits[0].likelihood, L.Bernoulli)
