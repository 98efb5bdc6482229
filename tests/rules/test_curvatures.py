"""Each curvature's root against its definition, for every likelihood."""

import pytest
import torch

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from tests.likelihoods.families import BY_NAME, FAMILIES
from tests.models.problems import close, fit, of
from tests.oracles import dense

D = torch.float64
POSITIONS = [(), (3,), (2, 2)]
CURVATURES = [rules.GaussNewton(), rules.MonteCarloFisher(3), rules.EmpiricalFisher(), rules.Exact(), rules.Exact(rules.eigabs)]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def latents(family, *positions, n=4):
    likelihood = family.build()
    f, y = family.data(n, *positions)
    return likelihood, f, y


def blocks(Lam):
    return dense.position_blocks(Lam.detach())


def square(S):
    return (S @ S.mT).detach()


def hessian(likelihood, f, y):
    """−∂² log p / ∂f² of one datum by autograd."""
    return -torch.autograd.functional.hessian(lambda t: likelihood.log_prob(t[None], y[None]).sum(), f)


def gradient(likelihood, f, y):
    return torch.autograd.functional.jacobian(lambda t: likelihood.log_prob(t[None], y[None]).sum(), f)


@every_family
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_gauss_newton_is_the_fisher_of_each_position(family, positions):
    likelihood, f, y = latents(family, *positions)
    S = rules.GaussNewton().root(likelihood, f, y)
    r = f[0].numel()
    assert S.shape[:2] == (4, r)
    if family.exact:  # (Monte Carlo ones draw anew)
        close(square(S), blocks(likelihood.ggn(f, y)), 1e-9)
    off = square(S).reshape(4, r // family.c, family.c, r // family.c, family.c)
    for a in range(r // family.c):
        for b in range(r // family.c):
            assert a == b or not off[:, a, :, b].any()  # given f, positions know nothing of one another


@every_family
@pytest.mark.parametrize("positions", POSITIONS[:2], ids=str)
def test_empirical_fisher_is_the_outer_product_of_the_gradient(family, positions):
    likelihood, f, y = latents(family, *positions)
    S = rules.EmpiricalFisher().root(likelihood, f, y)
    assert S.shape == (4, f[0].numel(), 1)
    for n in range(4):
        g = gradient(likelihood, f[n], y[n]).flatten()
        torch.testing.assert_close(square(S)[n], torch.outer(g, g), rtol=1e-6, atol=1e-8)


@every_family
@pytest.mark.parametrize("psd, part", [(rules.eigclip, lambda e: e.clamp(min=0)), (rules.eigabs, lambda e: e.abs())], ids=["clip", "abs"])
def test_exact_is_the_hessian_made_positive(family, psd, part):
    likelihood, f, y = latents(family)
    S = rules.Exact(psd).root(likelihood, f, y)
    for n in range(4):
        eigenvalues, V = torch.linalg.eigh(hessian(likelihood, f[n], y[n]))
        torch.testing.assert_close(square(S)[n], (V * part(eigenvalues)) @ V.mT, rtol=1e-6, atol=1e-7)


def test_exact_meets_indefinite_blocks():
    """A heteroscedastic Hessian has determinant −½ τ² e² < 0: clip and abs differ, and neither is the Fisher."""
    likelihood, f, y = latents(BY_NAME["heteroscedastic"])
    assert all(torch.linalg.eigvalsh(hessian(likelihood, f[n], y[n])).min() < 0 for n in range(4))
    clip, absolute = (square(rules.Exact(psd).root(likelihood, f, y)) for psd in (rules.eigclip, rules.eigabs))
    assert not torch.allclose(clip, absolute) and not torch.allclose(clip, likelihood.ggn(f, y))
    for Lam in (clip, absolute):
        assert torch.linalg.eigvalsh(Lam).min() > -1e-12


@pytest.mark.parametrize("name", ["categorical", "categorical-weights", "bernoulli-3-labels", "heteroscedastic", "student-t", "gaussian-full"])
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_monte_carlo_fisher_is_unbiased(name, positions):
    family = BY_NAME[name]
    likelihood, f, y = latents(family, *positions, n=2)
    count = 4000  # draws, side by side as so many copies of the data
    many, labels = (t.repeat(count, *[1] * (t.dim() - 1)) for t in (f, y))
    draws = square(rules.MonteCarloFisher().root(likelihood, many, labels, torch.Generator().manual_seed(0))).unflatten(0, (count, 2))
    mean, se = draws.mean(0), draws.std(0) / count**0.5
    wanted = blocks(likelihood.ggn(f, y))
    assert ((mean - wanted).abs() <= 5 * se + 1e-9).all()  # also across positions, where the mean is zero


def test_monte_carlo_fisher_has_so_many_columns_and_a_generator():
    likelihood, f, y = latents(BY_NAME["categorical"], 3)
    for samples in (1, 4):
        curvature = rules.MonteCarloFisher(samples)
        S = curvature.root(likelihood, f, y, torch.Generator().manual_seed(0))
        assert S.shape == (4, 12, samples) and curvature.columns(12) == samples
        assert torch.equal(S, curvature.root(likelihood, f, y, torch.Generator().manual_seed(0)))
        assert not torch.equal(S, curvature.root(likelihood, f, y, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="samples=0; expected at least one"):
        rules.MonteCarloFisher(0)


@every_family
@pytest.mark.parametrize("curvature", CURVATURES, ids=str)
def test_missing_rows_count_for_nothing(family, curvature):
    likelihood, f, y = latents(family, 3)
    y = y.clone()
    y[1, 2] = family.missing
    S = curvature.root(likelihood, f, y, torch.Generator().manual_seed(0)).reshape(4, 3, family.c, -1)
    assert not S[1, 2].any()
    assert S[0].any() and S[1, 0].isfinite().all()
    y[1] = family.missing
    assert not curvature.root(likelihood, f, y)[1].any()


@pytest.mark.parametrize("curvature", CURVATURES[:1] + CURVATURES[3:], ids=str)
def test_class_weights_and_smoothing(curvature):
    """Λ = |t| (diag p − p pᵀ) with |t| = Σ_k w_k ((1 − ε) [k = y] + ε / c)."""
    w, smooth = torch.tensor([1.0, 2.0, 0.5], dtype=D), 0.2
    likelihood = likelihoods.Categorical(weight=w, label_smoothing=smooth, ignore_index=7)
    f = torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 7, 1])
    t = torch.where(y == 7, 0.0, (1 - smooth) * w[y.clamp(max=2)] + smooth * w.mean())
    close(square(curvature.root(likelihood, f, y)), t[:, None, None] * dense.softmax_ggn(f), 1e-7)
    g = torch.nn.functional.cross_entropy  # the loss these options belong to
    loss = g(f, y.masked_fill(y == 7, -100), weight=w, label_smoothing=smooth, reduction="sum")
    assert likelihood.log_prob(f, y).sum().item() == pytest.approx(-loss.item())


def test_rules_take_a_curvature():
    assert repr(rules.Laplace()) == "Laplace(curvature=GaussNewton())"
    assert repr(rules.Laplace(rules.MonteCarloFisher(2))) == "Laplace(curvature=MonteCarloFisher(samples=2))"
    assert repr(rules.Laplace(rules.Exact(rules.eigabs))) == "Laplace(curvature=Exact(psd=eigabs))"
    for wrong in (rules.GaussNewton, "ggn", likelihoods.Gaussian()):
        with pytest.raises(TypeError, match=r"expected an instance such as rules.GaussNewton\(\)"):
            rules.Laplace(wrong)


@pytest.mark.parametrize("family", ["gaussian-2", "categorical", "heteroscedastic", "student-t", "poisson"])
@pytest.mark.parametrize("curvature", CURVATURES, ids=str)
def test_posteriors_under_every_curvature(family, curvature):
    """H = Σ Jᵀ Λ J for the Λ of the rule; the noise is followed where Λ is a multiple of 1/noise, and only there."""
    problem = of(family)
    posterior = fit(problem, ggn.Full, rule=rules.Laplace(curvature), generator=torch.Generator().manual_seed(3))
    J = dense.jacobian(problem.net, problem.x)
    f = problem.net(problem.x).detach()
    # the fit draws from a generator of its own, seeded by one draw from ours; the data go through in one chunk, so the same draws come
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))))
    S = curvature.root(problem.likelihood, f, problem.y, own).detach()
    p = len(posterior.mean)
    cov = dense.posterior_cov(dense.ggn(J, S @ S.mT), torch.ones(p, dtype=D))
    close(posterior.precision().solve(torch.eye(p, dtype=D)), cov)
    scales = any(q is posterior.likelihood.__dict__["_parameters"].get("raw_noise") for q in posterior.hyperparameters())
    assert scales == (family == "gaussian-2" and not isinstance(curvature, rules.EmpiricalFisher))
    if scales:
        posterior.likelihood.noise = 0.2
        likelihood = likelihoods.Gaussian(torch.tensor(0.2, dtype=D))
        again = fit(problem._replace(likelihood=likelihood), ggn.Full, rule=rules.Laplace(curvature), generator=torch.Generator().manual_seed(3))
        close(posterior.log_evidence(), again.log_evidence())


def test_random_curvatures_are_reproducible_and_close():
    problem = of("categorical", n=200)
    model = models.Network(problem.net, structure=ggn.Full)

    def fitted(samples, seed):
        rule = rules.Laplace(rules.MonteCarloFisher(samples))
        generator = torch.Generator().manual_seed(seed)
        return bgn.laplace(model, problem.likelihood, (problem.x, problem.y), rule, generator, progress=False)

    exact = bgn.laplace(model, problem.likelihood, (problem.x, problem.y), progress=False)
    assert torch.equal(fitted(1, 0).log_evidence(), fitted(1, 0).log_evidence())
    assert abs(fitted(1, 0).log_evidence() - fitted(1, 1).log_evidence()) > 1e-6
    errors = [abs(fitted(s, 0).log_evidence() - exact.log_evidence()).item() for s in (1, 100)]
    assert errors[1] < min(0.1, errors[0])
