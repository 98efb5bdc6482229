"""VariationalPosterior: the bound at the fit and beside it, answers, persistence, and what tools make of it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, optim, rules
from bayesgn.models.posterior import StalePosteriorError
from tests.inference.problems import assert_same, snapshot
from tests.optim.test_variational import Problem, draw, gen

D = torch.float64
STRUCTURES = {
    "Full": ggn.Full(), "Layerwise": ggn.Layerwise(), "Kron": ggn.Kron(), "Diag": ggn.Diag(), "LowRank": ggn.LowRank(rank=40),
    "LowRankPlusDiagonal": ggn.LowRankPlusDiagonal(rank=3),
}  # fmt: skip
structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


def fitted(q: Problem, structure, prior: models.WeightPrior | None = None, expectation=None, T: float = 1.0, steps: int = 2, **options):
    model = models.Network(copy.deepcopy(q.net), models.WeightPrior(0.7, 0.1) if prior is None else prior, structure)
    expectation = optim.Linearized() if expectation is None else expectation
    opt = optim.Variational(model, q.likelihood, len(q.x), expectation=expectation, lr=0.7, temperature=T, generator=gen(), **options)
    for _ in range(steps):
        opt.step(q.x, q.y)
    return opt, opt.posterior((q.x, q.y), 4, gen(8))


def covariance(posterior) -> Tensor:
    Σ = posterior.precision().solve(torch.eye(len(posterior.point), dtype=D)).detach()
    return 0.5 * (Σ + Σ.mT)


def kl(mean: Tensor, Σ: Tensor, μ: float, P: Tensor) -> Tensor:
    N = torch.distributions.MultivariateNormal
    return torch.distributions.kl_divergence(N(mean, Σ), N(torch.full_like(mean, μ), precision_matrix=torch.diag(P)))


@structures
@pytest.mark.parametrize("T", [1.0, 0.3])
@pytest.mark.parametrize("expectation", [optim.Linearized(), optim.Draws(2)], ids=repr)
def test_the_bound_at_the_fit_is_expectation_minus_divergence(structure, T, expectation):
    q = Problem("gaussian")
    opt, posterior = fitted(q, structure, expectation=expectation, T=T)
    Σ, m = covariance(posterior), posterior.mean
    if isinstance(expectation, optim.Linearized):
        J, f = q.J(m, q.x), q.f(m, q.x)
        square = (f - q.y).square() + torch.einsum("ncp,pq,ncq->nc", J, Σ, J)
        fit = -0.5 * (square / 0.3 + math.log(2 * math.pi * 0.3)).sum()
    else:
        half = opt.precision().sample(2, gen(8))
        fit = -torch.stack([q.loss(m + s * e, q.x, q.y) for e in half for s in (1, -1)]).mean()
    torch.testing.assert_close(posterior.log_likelihood().detach(), fit)
    expected = fit - kl(m, Σ, 0.1, torch.full_like(m, 0.7))
    torch.testing.assert_close(posterior.log_evidence().detach(), expected, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(opt.elbo((q.x, q.y), 4, gen(8)), expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("structure", [ggn.Full(), ggn.Layerwise(), ggn.Diag(), ggn.LowRankPlusDiagonal(rank=3)], ids=repr)
@pytest.mark.parametrize("T", [1.0, 0.5])
def test_beside_the_fit_it_is_the_bound_of_a_conjugate_model(structure, T):
    """Linear net, Gaussian noise: E log p is quadratic in θ, so its first-order correction in Σ is all there is."""
    q = Problem("gaussian", linear=True)
    _, posterior = fitted(q, structure, T=T)
    m = posterior.mean
    J, f = q.J(m, q.x), q.f(m, q.x)
    first = (torch.einsum("ncp,ncq->pq", J, J) * covariance(posterior)).sum()  # tr HΣ₀, of all of H
    first = first - (len(m) - 0.7 * covariance(posterior).trace()) * T * 0.3
    for P, noise in ((0.7, 0.3), (2.0, 0.3), (0.7, 0.8), (0.05, 0.1)):
        posterior.prior.precision, posterior.likelihood.noise = P, noise
        Σ = covariance(posterior)
        trace = first + (len(m) - P * Σ.trace()) * T * noise  # tr HΣ moves by what the structure keeps of H
        if isinstance(structure, ggn.Full):
            torch.testing.assert_close(trace, (torch.einsum("ncp,ncq->pq", J, J) * Σ).sum())
        fit = -0.5 * (((f - q.y).square().sum() + trace) / noise + f.numel() * math.log(2 * math.pi * noise))
        expected = fit - kl(m, Σ, 0.1, torch.full_like(m, P))
        torch.testing.assert_close(posterior.log_evidence().detach(), expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("structure", [ggn.Full(), ggn.Diag(), ggn.Layerwise()], ids=repr)
def test_its_gradient_is_that_of_the_bound_at_a_fixed_q(structure):
    """The envelope theorem: at a stationary q the bound's slope in prior precision and noise is that with q held."""
    q = Problem("gaussian", linear=True)
    _, posterior = fitted(q, structure, steps=60)
    Σ, m = covariance(posterior), posterior.mean
    J, f = q.J(m, q.x), q.f(m, q.x)
    square = ((f - q.y).square() + torch.einsum("ncp,pq,ncq->nc", J, Σ, J)).sum()

    def held(u: Tensor) -> Tensor:
        P, noise = u.exp()
        return -0.5 * (square / noise + f.numel() * (2 * math.pi * noise).log()) - kl(m, Σ, 0.1, P.expand(len(m)))

    u = torch.tensor([0.7, 0.3], dtype=D).log()
    expected = torch.func.grad(held)(u)
    parameters = [posterior.prior.log_precision, *posterior.likelihood.parameters()]
    found = torch.autograd.grad(posterior.log_evidence(), parameters)
    torch.testing.assert_close(torch.stack([g.reshape(()) for g in found]).to(D), expected, rtol=1e-6, atol=1e-6)


def test_maximize_evidence_climbs_the_bound_that_log_evidence_tells():
    q = Problem("gaussian", n=20)
    for structure in (ggn.Full(), ggn.Diag(), ggn.LowRankPlusDiagonal(rank=4)):
        for T in (1.0, 0.5):
            _, posterior = fitted(q, structure, T=T, steps=4)
            first = posterior.log_evidence().item()
            trace = bgn.maximize_evidence(posterior)
            assert trace.evidence[0] == pytest.approx(first, rel=1e-9)
            assert trace.evidence[-1] == pytest.approx(posterior.log_evidence().item(), rel=1e-9) and trace.evidence[-1] > first
            with torch.enable_grad():
                slopes = torch.autograd.grad(posterior.log_evidence(), posterior.hyperparameters())
            assert max(float(g.abs().max()) for g in slopes) < 1e-2


def test_a_likelihood_that_q_does_not_follow_is_noticed(tmp_path):
    q = Problem("gaussian")
    opt = optim.Variational(q.model(ggn.Full), likelihoods.StudentT(dof=4.0, scale=1.0), 8, generator=gen())
    opt.step(q.x, q.y)
    posterior = opt.posterior((q.x, q.y))
    posterior.log_evidence()
    other = bgn.load(posterior.save(tmp_path / "q"), copy.deepcopy(q.net))
    for p in (posterior, other):
        with torch.no_grad():
            next(p.likelihood.parameters()).add_(0.5)
        with pytest.raises(ValueError, match="Fit again"):
            p.log_evidence()
        with pytest.raises(ValueError, match="Fit again"):
            p(q.x)


def test_maximize_evidence_with_data_is_refused():
    q = Problem("gaussian")
    model = models.Network(copy.deepcopy(q.net), structure=ggn.Full)
    opt = optim.Variational(model, likelihoods.StudentT(dof=4.0, scale=1.0), 8, generator=gen())
    opt.step(q.x, q.y)
    posterior = opt.posterior((q.x, q.y))
    with pytest.raises((ValueError, TypeError), match=r"bgn\.variational"):
        bgn.maximize_evidence(posterior, data=(q.x, q.y))


def test_compare_tune_and_mixture_work():
    q = Problem("categorical", n=20)
    _, a = fitted(q, ggn.Full())
    _, b = fitted(q, ggn.Diag())
    x, y = draw(30, 2, seed=5), draw(30, 3, seed=6).argmax(-1)
    table = bgn.compare(a, (x, y), samples=8, warn=False)
    assert "posterior" in table.rows and len(table.rows) >= 3
    record = bgn.tune(a, (x, y), points=5, progress=False)
    assert record.score <= record.map_score + 0.01 and float(a.prior.precision.detach()) == pytest.approx(record.precision)
    both = bgn.mixture([a, b])
    torch.testing.assert_close(both(x).probs.sum(-1), torch.ones(30, dtype=D))
    assert both.sample_outputs(x, 6, gen()).shape == (6, 30, 3)
    torch.testing.assert_close(both.log_evidence(), torch.logsumexp(torch.stack([a.log_evidence(), b.log_evidence()]), 0).detach() - math.log(2))


# -- answers ---------------------------------------------------------------------------------------------------------------------


@structures
@pytest.mark.parametrize("T", [1.0, 0.3])
def test_functions_and_weights_are_those_of_dense_algebra(structure, T):
    q = Problem("categorical")
    _, posterior = fitted(q, structure, T=T)
    Σ, x = covariance(posterior), draw(5, 2, seed=9)
    J = q.J(posterior.mean, x)
    f = posterior(x)
    torch.testing.assert_close(f.mean, q.f(posterior.mean, x))
    torch.testing.assert_close(f.marginals()[1], torch.einsum("ncp,pq,ndq->ncd", J, Σ, J), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(posterior.weight_variance(), Σ.diagonal(), rtol=1e-7, atol=1e-9)
    outputs, weights = posterior.sample_outputs(x, 3, gen(1)), posterior.sample_weights(3, gen(1))
    torch.testing.assert_close(outputs, torch.stack([q.f(θ, x) for θ in weights]))
    assert f"{type(structure).__name__}" in repr(posterior)


def test_it_holds_a_copy_and_notices_when_that_moves():
    q = Problem("categorical")
    opt, posterior = fitted(q, ggn.Full())
    f = posterior(q.x).mean
    for _ in range(3):
        opt.step(q.x, q.y)  # the optimizer goes on
    torch.testing.assert_close(posterior(q.x).mean, f, rtol=0, atol=0)
    with torch.no_grad():
        next(posterior.net.parameters()).add_(1.0)
    with pytest.raises(StalePosteriorError):
        posterior(q.x)


# -- persistence -----------------------------------------------------------------------------------------------------------------


def same_answers(a, b, x: Tensor) -> None:
    for f, g in ((a(x).mean, b(x).mean), (a(x).variance, b(x).variance), (a.mean, b.mean), (a.weight_variance(), b.weight_variance()),
                 (a.log_evidence().detach(), b.log_evidence().detach()), (a.sample_outputs(x, 2, gen()), b.sample_outputs(x, 2, gen()))):  # fmt: skip
        torch.testing.assert_close(f, g, rtol=0, atol=0)
    assert a.num_data == b.num_data and a.temperature == b.temperature and repr(a) == repr(b)
    slope = [torch.autograd.grad(p.log_evidence(), p.prior.log_precision)[0] for p in (a, b)]
    torch.testing.assert_close(*slope, rtol=0, atol=0)


FILED = STRUCTURES | {"LowRank(2)": ggn.LowRank(rank=2), "Kron(reduce)": ggn.Kron(reduce=True)}


@pytest.mark.parametrize("structure", FILED.values(), ids=FILED.keys())
@pytest.mark.parametrize("curvature", [rules.GaussNewton(), rules.EmpiricalFisher()], ids=repr)
def test_files_give_it_back_to_the_bit(tmp_path, structure, curvature):
    q = Problem("gaussian")
    _, posterior = fitted(q, structure, models.WeightPrior.per_layer(q.net, 0.7, 0.1), T=0.5, curvature=curvature, expectation=optim.Draws(2))
    path = posterior.save(tmp_path / "q.safetensors")
    net = copy.deepcopy(q.net)
    before = snapshot(net)
    other = bgn.load(path, net)
    assert_same(before, snapshot(net))
    same_answers(posterior, other, q.x)
    assert isinstance(other, models.VariationalPosterior) and other.net is not net
    same_answers(posterior, pickle.loads(pickle.dumps(posterior)), q.x)
    same_answers(posterior, copy.deepcopy(posterior), q.x)


@pytest.mark.parametrize("kind", ["tuned", "mask", "last layer", "frozen"])
def test_files_of_tuned_masked_and_frozen_ones(tmp_path, kind):
    q = Problem("gaussian")
    net = copy.deepcopy(q.net)
    selection = {"mask": {"0.weight": draw(3, 2) > 0, "2.bias": None}, "last layer": bgn.last_layer(net)}.get(kind)
    opt = optim.Variational(models.Network(net, models.WeightPrior(0.7), ggn.Full, selection), q.likelihood, 8, lr=0.5, generator=gen())
    opt.step(q.x, q.y)
    if kind == "tuned":
        opt.tune((q.x, q.y))
    if kind == "frozen":
        opt.prior.requires_grad_(False)
    posterior = opt.posterior((q.x, q.y), 2, gen())
    path = posterior.save(tmp_path / "q")
    if kind == "frozen":
        other = bgn.load(path, copy.deepcopy(q.net))
        assert not other.prior.log_precision.requires_grad
        torch.testing.assert_close(other.log_evidence(), posterior.log_evidence(), rtol=0, atol=0)
        return
    same_answers(posterior, bgn.load(path, copy.deepcopy(q.net)), q.x)
    moved = copy.deepcopy(q.net)  # weights that are in the file may be others in the net
    with torch.no_grad():
        for name in posterior.linearizer.vector.names:
            p = dict(moved.named_parameters())[name]
            if kind == "mask" and name == "0.weight":
                p[selection[name]] += 1.0
            else:
                p += 1.0
    same_answers(posterior, bgn.load(path, moved), q.x)
    if selection is not None:
        with torch.no_grad():
            moved[0].bias += 1.0  # not in the file
        with pytest.raises(ValueError, match="other values"):
            bgn.load(path, moved)


def test_other_nets_and_other_buffers_are_refused(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double().eval()
    x, y = draw(8, 2), draw(8, 3).argmax(-1)
    opt = optim.Variational(models.Network(copy.deepcopy(net), structure=ggn.Kron), likelihoods.Categorical(), 8, generator=gen())
    opt.step(x, y)
    path = opt.posterior((x, y)).save(tmp_path / "q")
    bgn.load(path, net)
    with pytest.raises(ValueError, match="another net"):
        bgn.load(path, nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double())
    with pytest.raises(ValueError, match="another net"):
        bgn.load(path, copy.deepcopy(net).float())
    with pytest.raises(ValueError, match="another net"):
        bgn.load(path, nn.Linear(2, 3).double())
    net[1].running_mean += 1.0
    with pytest.raises(ValueError, match="running_mean"):
        bgn.load(path, net)


def test_a_net_whose_weights_lie_otherwise_in_memory(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double().eval().to(memory_format=torch.channels_last)
    x, y = draw(6, 2, 3, 3), draw(6, 2).argmax(-1)
    selection = {"0.weight": draw(3, 2, 2, 2) > 0, "3.bias": None}
    model = models.Network(net, structure=ggn.Diag, parameters=selection)
    opt = optim.Variational(model, likelihoods.Categorical(), 6, lr=0.5, generator=gen())
    before, inside = net[0].weight.detach().clone(), selection["0.weight"]
    opt.step(x, y)
    after = net[0].weight.detach()
    assert torch.equal(before[~inside], after[~inside]) and bool((before[inside] != after[inside]).all())
    torch.testing.assert_close(opt.mean[: int(inside.sum())], after[inside])
    posterior = opt.posterior((x, y))
    path = posterior.save(tmp_path / "q")
    same_answers(posterior, bgn.load(path, copy.deepcopy(net)), x)


def test_float32_posteriors_come_back(tmp_path):
    q = Problem("categorical")
    net = copy.deepcopy(q.net).float()
    opt = optim.Variational(models.Network(net, structure=ggn.Kron), q.likelihood, 8, lr=0.5, generator=gen())
    opt.step(q.x.float(), q.y)
    posterior = opt.posterior((q.x.float(), q.y))
    path = posterior.save(tmp_path / "q")
    same_answers(posterior, bgn.load(path, copy.deepcopy(q.net).float()), q.x.float())


@pytest.mark.parametrize("frozen", [False, True])
def test_q_follows_a_noise_that_is_set(frozen):
    q = Problem("gaussian", linear=True)
    _, posterior = fitted(q, ggn.Full())
    posterior.likelihood.requires_grad_(not frozen)
    posterior.likelihood.noise = 1.5
    J = q.J(posterior.mean, q.x)
    Σ = torch.linalg.inv(posterior.curvature.tensors()["H"] / 1.5 + 0.7 * torch.eye(q.p, dtype=D))
    torch.testing.assert_close(posterior(q.x).variance, torch.einsum("ncp,pq,ncq->nc", J, Σ, J))
    with torch.no_grad():
        assert math.isfinite(float(posterior.log_evidence()))


def test_the_error_of_the_bound_is_that_of_its_draws():
    q = Problem("gaussian")
    opt, _ = fitted(q, ggn.Full(), expectation=optim.Draws(2))
    half = opt.precision().sample(50, gen(8))
    pairs = torch.stack([-0.5 * (q.loss(opt.mean + e, q.x, q.y) + q.loss(opt.mean - e, q.x, q.y)) for e in half])
    posterior = opt.posterior((q.x, q.y), 100, gen(8))
    assert posterior.error == pytest.approx(float(pairs.std() / 50**0.5), rel=1e-6)
    assert fitted(q, ggn.Full())[1].error == 0.0
