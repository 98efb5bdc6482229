"""Likelihoods that contain one another agree where they meet, and their own parameters have the right slope."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td

from bayesgn import likelihoods as L
from bayesgn._psd import psd_root

from .families import BY_NAME, FAMILIES, R3, W32, D, R

close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)
FUNCTIONS = ("log_prob", "gradient", "neg_hessian", "ggn")

# The one, the other as its special case, latents, and how near they are.
MEET = {
    "a t of one output": (lambda: L.MultivariateStudentT(5.0, 0.36), lambda: L.StudentT(5.0, 0.6), 1, 1e-9),
    "a t of endless freedom": (lambda: L.MultivariateStudentT(1e9, R), lambda: L.Gaussian(R), 2, 1e-6),
    "a latent scale, endless freedom": (lambda: L.HeteroscedasticStudentT(1e9), L.HeteroscedasticGaussian, 4, 1e-6),
    "no count is lost": (lambda: L.ZeroInflatedNegativeBinomial(1.5, 1e-12), lambda: L.NegativeBinomial(1.5), 2, 1e-8),
    "weights of identity": (lambda: L.LinearCoregionalisation(torch.eye(2, dtype=D), R), lambda: L.Gaussian(R), 2, 1e-12),
    "one component": (lambda: L.NonnegativeMatrixFactorisation([[1.0]], 0.3), lambda: L.AmplitudeDemodulation(1, 0.3), 2, 1e-12),
    "a torch distribution": (lambda: L.FromDistribution(lambda f: td.MultivariateNormal(f, R)), lambda: L.Gaussian(R), 2, 1e-9),
    "a torch normal": (lambda: L.FromDistribution(lambda f: td.Normal(f[..., :1], torch.nn.functional.softplus(f[..., 1:]))),
                       lambda: L.HeteroscedasticGaussian(L.Softplus()), 2, 1e-7),
}


@pytest.mark.parametrize("name", MEET)
def test_special_cases(name):
    make, special, c, tol = MEET[name]
    a, b = make().double(), special().double()
    f = torch.randn(6, c, dtype=D, generator=torch.Generator().manual_seed(0))
    y = b.sample(f, torch.Generator().manual_seed(1)).detach()
    for function in FUNCTIONS:
        close(getattr(a, function)(f, y), getattr(b, function)(f, y), tol)
    for ours, theirs in zip(a.conditional_moments(f), b.conditional_moments(f)):
        close(ours, theirs, max(tol, 1e-8))


def test_a_network_of_known_weights_is_a_coregionalisation():
    f = torch.randn(5, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    network, fixed = L.RegressionNetwork(2, 3, R3, offset=W32), L.LinearCoregionalisation(W32, R3)
    both = torch.cat([f, torch.zeros(5, 6, dtype=D)], -1)                    # the weights' latents are zero: the offset is all there is
    y = fixed.sample(f, torch.Generator().manual_seed(1)).detach()
    y[1, 0] = torch.nan
    close(network.log_prob(both, y), fixed.log_prob(f, y))
    close(network.gradient(both, y)[:, :2], fixed.gradient(f, y))
    close(network.neg_hessian(both, y)[:, :2, :2], fixed.neg_hessian(f, y))


WITH_PARAMETERS = [f for f in FAMILIES if f.density and f.exact and list(f.build().parameters())]


@pytest.mark.parametrize("family", WITH_PARAMETERS, ids=lambda f: f.name)
def test_slopes_in_own_parameters(family):
    """Finite differences of Σ log p, of the GGN and of the closed forms, with missing data among them."""
    lik = family.build()
    f, y = family.data(5)
    y[1] = family.missing
    if y.ndim == 2 and y.shape[1] > 1 and y.is_floating_point():
        y[2, 0] = torch.nan
    names = [name for name, _ in lik.named_parameters()]
    cov = 0.1 * torch.eye(family.c, dtype=D).expand(5, -1, -1)

    def values(*parameters):
        given = dict(zip(names, parameters))
        call = lambda method, *a: torch.func.functional_call(Calls(lik), {f"lik.{k}": v for k, v in given.items()}, (method, *a))
        out = [call("log_prob", f, y), call("gradient", f, y), call("ggn", f, y)]
        for closed in (call("expected", f, cov, y), call("tilted", f, cov, y, 1.0)):
            out += [] if closed is None else list(closed[:3])
        return tuple(out)

    raw = [p.detach().clone().requires_grad_() for p in lik.parameters()]
    if raw[0].ndim == 2 and "raw" in names[0]:                              # what is above a Cholesky factor's diagonal does not count
        raw[0] = raw[0].detach().tril().requires_grad_()
    assert torch.autograd.gradcheck(values, raw, eps=1e-6, atol=1e-5, rtol=1e-4)


class Calls(torch.nn.Module):
    def __init__(self, lik):
        super().__init__()
        self.lik = lik

    def forward(self, method, *arguments):
        return getattr(self.lik, method)(*arguments)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_numbers_are_kept_in_double(family):
    """A plain 0.1 rounded to float32 would be off by 1e-9, and so would everything after it."""
    for p in [*family.make().parameters(), *family.make().buffers()]:
        assert p.dtype == D or not p.is_floating_point()


def test_plain_numbers_and_lists_are_kept_in_double():
    for lik in (L.Poisson(0.1), L.Ordinal([-0.1, 0.3]), L.Ordinal(5), L.Categorical(weight=[0.1, 0.3]), L.StudentT(4.1, 0.1), L.Beta(0.1),
                L.LinearCoregionalisation([[0.1]], 0.1), L.RegressionNetwork(1, 1, 0.1, 0.1), L.ZeroInflatedNegativeBinomial(0.1, 0.1),
                L.MultivariateStudentT(4.1, 0.1), L.NonnegativeMatrixFactorisation([[0.1]], 0.1), L.HeteroscedasticStudentT(4.1)):
        assert all(t.dtype == D for t in [*lik.parameters(), *lik.buffers()]), lik


# --- what data and models are told about latents ------------------------------------------------------------------------------------------

# Likelihood, latents, shape of y, and what the message says.
WRONG = [
    (lambda: L.HeteroscedasticGaussian(), 1, (5,), r"HeteroscedasticGaussian needs two latents for each target.*2 kernels"),
    (lambda: L.HeteroscedasticGaussian(), 2, (5, 2), r"y with 2 targets a row needs 4 latents: 4 kernels.*4 outputs for a net"),
    (lambda: L.FromDistribution(lambda f: td.Normal(f[..., 0], 1.0)), 1, (5, 3), r"y has shape \[5, 3\].*y should be \[5\]"),
    (lambda: L.HeteroscedasticStudentT(), 3, (5,), r"HeteroscedasticStudentT needs two latents for each target"),
    (lambda: L.Gaussian(), 2, (5,), r"y with 1 target a row needs 1 latent: 1 kernel for"),
    (lambda: L.Gaussian(), 1, (5, 3), r"y with 3 targets a row needs 3 latents: 3 kernels"),
    (lambda: L.StudentT(), 1, (5, 3), r"3 kernels"),
    (lambda: L.MultivariateStudentT(), 1, (5, 3), r"3 kernels"),
    (lambda: L.Categorical(), 1, (5,), r"single class; use Bernoulli.*one kernel each"),
    (lambda: L.Bernoulli(), 2, (5,), r"1 kernel for"),
    (lambda: L.Ordinal(3), 2, (5,), r"one latent.*one kernel"),
    (lambda: L.RegressionNetwork(2, 3), 2, (5, 3), r"RegressionNetwork needs 2 functions, then 3 × 2 weights: 8 kernels"),
    (lambda: L.RegressionNetwork(2, 3), 8, (5, 2), r"y should be \[5, 3\]"),
    (lambda: L.AmplitudeDemodulation(2), 2, (5,), r"2 carriers, then 2 modulators: 4 kernels"),
    (lambda: L.NonnegativeMatrixFactorisation(torch.ones(3, 2)), 4, (5,), r"3 carriers, then 2 modulators: 5 kernels"),
    (lambda: L.LinearCoregionalisation(torch.ones(3, 2)), 3, (5, 3), r"one latent for each column of the weights, 2: 2 kernels"),
    (lambda: L.MultiStage(2), 1, (5,), r"one for each of 2 stages and one for the rest: 3 kernels"),
    (lambda: L.Linked(L.Gaussian(), L.Softplus()), 2, (5,), r"1 kernel for"),
]


@pytest.mark.parametrize("make, c, shape, message", WRONG)
def test_the_number_of_latents_is_told(make, c, shape, message):
    lik = make()
    y = torch.zeros(shape, dtype=torch.long if isinstance(lik, (L.Categorical, L.Ordinal)) else torch.float32)
    with pytest.raises(ValueError, match=message):
        lik.validate_targets(torch.zeros(5, c), y)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_targets_are_checked_without_latents(family):
    """A model checks its data before it has an f: zeros in its place raise no suspicion, good targets pass, wrong ones do not."""
    lik = family.build()
    f, y = family.data(40)
    start = torch.zeros_like(f)
    lik.validate_targets(start, y)
    if y.ndim == 2 and y.shape[1] == 1:
        lik.validate_targets(start, y[:, 0])
    if y.ndim == 1:
        lik.validate_targets(start, y[:, None])
    d = y.shape[1] if y.ndim == 2 else 1
    needed = lik.latents_for(d)
    assert needed in (None, family.c)
    with pytest.raises(ValueError, match="y has shape"):
        lik.validate_targets(start, y[:39])
    with pytest.raises(ValueError, match=r"y has shape \[40, 9"):
        lik.validate_targets(start, y.new_zeros(40, 9))
    bad = y.clone()
    if y.is_floating_point():
        bad[3] = torch.inf
    else:
        bad[3] = 77
    with pytest.raises(ValueError, match=f"y contains \\[?{'inf' if y.is_floating_point() else 77}"):
        lik.validate_targets(start, bad)


@pytest.mark.parametrize("make, error, message", [
    (lambda: L.HeteroscedasticGaussian("softplus"), TypeError, r"link is 'softplus'.*Softplus\(\)"),
    (lambda: L.HeteroscedasticGaussian(L.LogSoftplus()), TypeError, r"positive one"),
    (lambda: L.HeteroscedasticStudentT(dof=0.0), ValueError, r"dof must be positive"),
    (lambda: L.Linked(torch.nn.Linear(1, 1), L.Softplus()), TypeError, r"base is Linear.*Gaussian\(\)"),
    (lambda: L.Linked(L.Gaussian(), "exp"), TypeError, r"link is 'exp'"),
    (lambda: L.LinearCoregionalisation(torch.ones(3)), ValueError, r"\[3\].*\[outputs, latents\]"),
    (lambda: L.LinearCoregionalisation([[1.0, 0.0]]), ValueError, r"column of the weights is zero"),
    (lambda: L.RegressionNetwork(0, 3), ValueError, r"latents=0"),
    (lambda: L.RegressionNetwork(2, 3, offset=torch.ones(2, 3)), ValueError, r"offset has shape \[2, 3\].*\[3, 2\]"),
    (lambda: L.RegressionNetwork(2, 3, noise=torch.ones(2)).log_prob(torch.zeros(1, 8), torch.zeros(1, 3)), ValueError,
     r"noise has shape \[2\].*3 outputs"),
    (lambda: L.AmplitudeDemodulation(0), ValueError, r"components=0"),
    (lambda: L.AmplitudeDemodulation(1, torch.ones(2)), ValueError, r"y is one number"),
    (lambda: L.NonnegativeMatrixFactorisation([[0.0]]), ValueError, r"weights must be positive"),
    (lambda: L.NonnegativeMatrixFactorisation([1.0]), ValueError, r"\[subbands, modulators\]"),
    (lambda: L.MultiStage(0), ValueError, r"stages=0"),
    (lambda: L.MultiStage(1, L.Gaussian()), TypeError, r"counts such as Poisson"),
    (lambda: L.MultivariateStudentT(torch.ones(2)), ValueError, r"dof has shape \[2\]"),
    (lambda: L.MultivariateStudentT(4.0, torch.ones(2)).log_prob(torch.zeros(1, 3), torch.zeros(1, 3)), ValueError, r"scale_matrix has shape \[2\]"),
])
def test_bad_constructions(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- torch distributions as vectors -------------------------------------------------------------------------------------------------------

def test_from_distribution_as_a_vector():
    f = torch.randn(4, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    cases = [(lambda f: td.MultivariateNormal(f, R), L.Gaussian(R)), (lambda f: td.Categorical(logits=f), L.Categorical()),
             (lambda f: td.Independent(td.Poisson(f.exp()), 1), L.Poisson())]
    for function, closed in cases:
        own = L.FromDistribution(function)
        y = closed.sample(f, torch.Generator().manual_seed(1)).detach()
        close(own.response(f, y), closed.response(f, y))
        for a, b in zip((*own.conditional_moments(f), own.moments(f)[0]), (*closed.conditional_moments(f), closed.moments(f)[0])):
            close(a, b)


def test_from_distribution_without_a_covariance_says_so():
    with pytest.raises(NotImplementedError, match="Dirichlet has no covariance_matrix"):
        L.FromDistribution(lambda f: td.Dirichlet(f.exp())).conditional_moments(torch.zeros(2, 3))


def test_statistics_of_rows_missing_in_part():
    """Under a full noise they keep the log density they had: right in value, and told in the docstring to stay there."""
    lik = BY_NAME["gaussian-full"].build()
    f, y = BY_NAME["gaussian-full"].data(6)
    y[1, 0] = y[4] = torch.nan
    stats = lik.statistics(f, y)
    close(lik.log_prob_of(stats), lik.log_prob(f, y).sum())
    (slope,) = torch.autograd.grad(lik.log_prob_of(stats), lik.raw_noise)
    whole = [0, 2, 3, 5]
    close(slope, torch.autograd.grad(lik.log_prob(f[whole], y[whole]).sum(), lik.raw_noise)[0].tril())


def test_a_saturated_softmax_has_a_psd_curvature():
    f = 40 * torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = psd_root(L.Categorical().ggn(f))
    torch.testing.assert_close(S @ S.mT, L.Categorical().ggn_root(f) @ L.Categorical().ggn_root(f).mT)
