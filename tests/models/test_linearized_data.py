"""Linearised networks of all kinds on data of all kinds: the same belief; how the net is left, what is said, and files."""

import copy
import math

import pytest
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.models import linearized_data
from bayesgn.models.linearized_data import conjugate_gradients, site_root
from tests.inference.problems import assert_same, snapshot
from tests.models.problems import close, inputs, of
from tests.models.test_linearized import GH, D, Linear, random_sites, seeded, start
from tests.oracles import dense
from tests.zoo.modules import named

# -- data and nets -----------------------------------------------------------------------------------------------------------

NETS = [
    "linear_over_sequence", "embedding", "layernorm", "conv2d", "raw_parameter", "tied_linear", "dict_keywords", "tuple_arguments", "frozen_layer",
]  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_nets_of_all_kinds(name):
    """Positions, tokens, shared weights, norms, raw and tied parameters, several inputs: the mean against dense.jacobian."""
    net, x, _ = named(name).build()
    J, f = dense.jacobian(net, x), dense.outputs(net, x)
    net_c = net(**x).shape[-1] if isinstance(x, dict) else net(*x).shape[-1] if isinstance(x, tuple) else net(x).shape[-1]
    n, r, p = J.shape
    rows = (n * r // net_c, net_c)
    y = torch.randn(*((n, r // net_c, net_c) if r > net_c else (n, net_c)), dtype=D, generator=seeded())
    likelihood = likelihoods.StudentT(4.0, 0.5).double()
    sites = random_sites(f.reshape(rows))
    posterior = models.Network(net, structure=ggn.Full).start(likelihood, (x, y), rules.Variational(cubature=GH), sites)
    assert posterior.num_data == rows[0] and posterior.y.shape == rows
    J, f, θ = J.reshape(*rows, p), f.reshape(rows), posterior.linearizer.vector.flatten(net)
    H = torch.einsum("nap,nab,nbq->pq", J, sites.nat2, J) + torch.eye(p, dtype=D)
    b = torch.einsum("nap,na->p", J, sites.nat1 - (sites.nat2 @ f[..., None])[..., 0]) - θ
    shift = torch.linalg.solve(H, b)
    close(posterior.mean, θ + shift, 1e-7)
    q = posterior.marginals()
    close(q.mean, f + J @ shift, 1e-7)
    close(q.cov, J @ torch.linalg.inv(H) @ J.mT, 1e-7)
    mean, cov = posterior(x).marginals()
    close(mean.reshape(rows), q.mean, 1e-9)
    close(cov.reshape(q.cov.shape), q.cov, 1e-9)
    better, _ = posterior.turn(0.5)
    assert math.isfinite(float(better.log_evidence()))


def test_masks_and_subsets():
    problem = of("categorical")
    mask = {"0.weight": torch.rand(4, 2, generator=seeded()) > 0.5, "2.bias": None}
    keep = torch.cat([mask["0.weight"].reshape(-1), torch.zeros(4 + 16, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
    sites = random_sites(problem.net(problem.x).detach())
    posterior = models.Network(problem.net, structure=ggn.Full, parameters=mask).start(problem.likelihood, (problem.x, problem.y), sites=sites)
    linear = Linear(problem.net, problem.x)
    linear.J, linear.θ = linear.J[..., keep], linear.θ[keep]
    one = torch.ones(int(keep.sum()), dtype=D)
    θ, Σ = linear.mean_and_cov(sites, one, 0 * one)
    close(posterior.mean, θ)
    close(posterior.marginals().cov, linear.J @ Σ @ linear.J.mT)


def test_made_anew_or_held_is_the_same(monkeypatch):
    problem = of("categorical")
    args = models.Network(problem.net, structure=ggn.Kron), problem.likelihood, (problem.x, problem.y), rules.Variational(cubature=GH)
    fit = lambda: bgn.bayes_newton(*args, steps=3, progress=False)
    held = fit()
    monkeypatch.setattr(linearized_data, "HELD_BYTES", 0)
    anew = fit()
    assert held.data._kept is not None and anew.data._kept is None
    close(torch.tensor(anew.trace.energy), torch.tensor(held.trace.energy), 1e-10)
    close(anew.mean, held.mean, 1e-9)
    close(anew.marginals().cov, held.marginals().cov, 1e-9)


def test_loaders_batches_and_dicts_are_the_same_data():
    """A loader that shuffles gives one order, kept; targets of padding count for nothing."""
    problem = of("student-t", n=11)
    x, y = problem.x, problem.y
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True, generator=seeded())
    fit = lambda data: bgn.bayes_newton(
        models.Network(problem.net, structure=ggn.Full), problem.likelihood, data, rules.Variational(cubature=GH), steps=4, progress=False
    )
    wanted = fit((x, y))
    padded = (torch.cat([x, torch.zeros(2, 2, dtype=D)]), torch.cat([y, torch.full((2, 1), torch.nan, dtype=D)]))
    for data in (loader, iter([(x[:3], y[:3]), (x[3:], y[3:])]), [{"input": x, "labels": y}], padded):
        found = fit(data)
        close(found.mean, wanted.mean, 1e-9)
        close(found.log_evidence().detach(), wanted.log_evidence().detach(), 1e-9)


def test_the_data_are_copied():
    problem = of("student-t")
    x, y = problem.x.clone(), problem.y.clone()
    posterior = models.Network(problem.net, structure=ggn.Full).start(problem.likelihood, (x, y), rules.Variational(cubature=GH))
    before = posterior.turn(0.5)[0].mean
    x.zero_(), y.zero_()
    close(posterior.turn(0.5)[0].mean, before, 1e-15)


def test_minibatches_of_rows():
    problem = of("bernoulli", n=20)
    model = models.Network(problem.net, structure=ggn.Full)
    args = model, problem.likelihood, (problem.x, problem.y), rules.Variational(cubature=GH)
    whole = bgn.bayes_newton(*args, steps=60, progress=False)
    parts = bgn.bayes_newton(*args, steps=120, lr=0.7, batch_size=5, generator=seeded(), progress=False)
    close(parts.mean, whole.mean, 1e-4)


def test_single_precision():
    """In float32 the belief at given sites is that of the float64 net to float32."""
    problem = of("categorical")
    sites = random_sites(problem.net(problem.x).detach())
    net = copy.deepcopy(problem.net).float()
    for structure in (ggn.Full(), ggn.Gram(), ggn.Kron()):
        found = models.Network(net, structure=structure).start(problem.likelihood, (problem.x.float(), problem.y), sites=sites)
        wanted = start(problem, structure, sites=sites)
        assert found.mean.dtype == torch.float32 and found(problem.x.float()).mean.dtype == torch.float32
        close(found.mean.double(), wanted.mean, 1e-4)
        close(found.marginals().cov, wanted.marginals().cov, 1e-4)
        close(found.log_evidence().detach(), wanted.log_evidence().detach(), 1e-5)


# -- manners -----------------------------------------------------------------------------------------------------------------


def test_the_net_stays_as_it_came(monkeypatch):
    """Also its mode, flags, gradients and hooks; also when a call raises."""
    problem = of("categorical")
    net = nn.Sequential(*problem.net, nn.Dropout(0.5)).double().train()
    net[0].weight.requires_grad_(False)
    before = snapshot(net)
    model = models.Network(net, structure=ggn.Kron)
    with pytest.warns(UserWarning, match="in train mode"):
        posterior = bgn.bayes_newton(model, problem.likelihood, (problem.x, problem.y), rules.Variational(cubature=GH), steps=2, progress=False)
    posterior(problem.x).covariance_matrix, posterior.sample_outputs(problem.x, 2), posterior.log_evidence().backward()
    with pytest.raises(ValueError, match="y"):
        model.start(problem.likelihood, (problem.x, torch.full((12,), 7)))
    with pytest.raises(ValueError, match="non-finite"):
        model.start(problem.likelihood, (problem.x / 0, problem.y))

    def broken(*_):
        raise RuntimeError("the likelihood gave up")

    monkeypatch.setattr(type(posterior.likelihood), "log_prob", broken)
    with pytest.raises(RuntimeError, match="gave up"):
        posterior.turn(1.0)[0].log_evidence()
    assert_same(before, snapshot(net))


def test_a_net_that_moved_is_refused():
    problem = of("categorical")
    posterior = start(problem)
    with torch.no_grad():
        problem.net[0].weight.add_(0.1)
    for call in (posterior.turn, lambda: posterior(problem.x), lambda: posterior.sample_outputs(problem.x), lambda: posterior.save("nowhere")):
        with pytest.raises(models.StalePosteriorError, match="changed after the posterior was made"):
            call()


def test_own_copies():
    problem = of("student-t")
    prior = models.WeightPrior(1.0)
    posterior = start(problem, prior=prior)
    posterior.prior.precision, posterior.likelihood.scale = 5.0, 9.0
    assert float(prior.precision) == 1.0 and float(problem.likelihood.scale) != 9.0


def test_what_is_said_where_something_is_wrong():
    problem = of("categorical")
    model, data = models.Network(problem.net), (problem.x, problem.y)
    with pytest.raises(TypeError, match=r"Variational.* is a class; expected a rule.*rules.Variational\(\.\.\.\)"):
        model.start(problem.likelihood, data, rules.Variational)
    with pytest.raises(TypeError, match=r"rules.Laplace\(curvature=rules.GaussNewton"):
        model.start(problem.likelihood, data, rules.GaussNewton())
    with pytest.raises(TypeError, match="pass an object"):
        model.start(likelihoods.Categorical, data)
    with pytest.raises(TypeError, match="bgn.bayes_newton"):
        bgn.laplace(model, problem.likelihood, data, rules.Variational())
    with pytest.raises(ValueError, match=r"sites are of shape \(3, 3\) but the net answers \(12, 4\)"):
        model.start(problem.likelihood, data, sites=rules.Sites.flat(3, 3, problem.x))
    with pytest.raises(ValueError, match="no rows"):
        model.start(problem.likelihood, iter([]))
    with pytest.raises(ValueError, match="site of row 2 has a negative precision"):
        nat2 = torch.eye(4, dtype=D).repeat(12, 1, 1)
        nat2[2, 1, 1] = -1.0
        model.start(problem.likelihood, data, sites=rules.Sites(torch.zeros(12, 4, dtype=D), nat2))


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure, rule",
    [
        (ggn.Full(), rules.Laplace()),
        (ggn.Kron(), rules.Variational(rules.Exact(rules.eigabs), rules.GaussHermite(5))),
        (ggn.Gram(), rules.PowerEP(0.5, cubature=rules.Unscented(5))),
        (ggn.MatrixFree(), rules.Variational(cubature=GH)),
    ],
    ids=["Full", "Kron", "Gram", "MatrixFree"],
)
def test_files(structure, rule, tmp_path):
    problem = of("categorical")
    prior = models.WeightPrior.per_layer(problem.net, torch.tensor([0.4, 2.0]), 0.1)
    args = models.Network(problem.net, prior, structure), problem.likelihood, (problem.x, problem.y), rule
    posterior = bgn.bayes_newton(*args, steps=3, progress=False)
    path = posterior.save(tmp_path / "p.safetensors")
    again = bgn.load(path, problem.net)
    x = inputs(3, seed=9)
    assert isinstance(again, models.LinearizedPosterior) and repr(again.rule) == repr(rule) and repr(again) == repr(posterior)
    assert torch.equal(again.mean, posterior.mean) and torch.equal(again(x).covariance_matrix, posterior(x).covariance_matrix)
    assert torch.equal(again.log_evidence(), posterior.log_evidence())
    assert torch.equal(again.turn(0.5)[0].sites.nat1, posterior.turn(0.5)[0].sites.nat1)
    with torch.no_grad():
        problem.net[0].weight.add_(0.1)
    with pytest.raises(ValueError, match="other values"):
        bgn.load(path, problem.net)


def test_files_of_several_inputs(tmp_path):
    for name in ("dict_keywords", "tuple_arguments"):
        net, x, r = named(name).build()
        n = dense.size(x)
        y = torch.randn(n, r, dtype=D, generator=seeded())
        posterior = models.Network(net, structure=ggn.Full).start(likelihoods.StudentT(4.0, 0.5).double(), (x, y))
        again = bgn.load(posterior.save(tmp_path / "p"), net)
        assert torch.equal(again.turn()[0].mean, posterior.turn()[0].mean)


# -- numerics ----------------------------------------------------------------------------------------------------------------


def test_conjugate_gradients_whatever_the_preconditioner(caplog):
    g = seeded()
    A = torch.randn(20, 20, dtype=D, generator=g)
    A = A @ A.mT + 0.1 * torch.eye(20, dtype=D)
    b = torch.randn(20, dtype=D, generator=g)
    wanted = torch.linalg.solve(A, b)
    inverse = lambda v: torch.linalg.solve(A, v)
    for solve in (inverse, lambda v: v / A.diagonal(), lambda v: v, lambda v: inverse(v) * (1 + 1e-3 * v.tanh())):
        close(conjugate_gradients(lambda v: A @ v, b, solve), wanted, 1e-8)
        close(conjugate_gradients(lambda v: A @ v, b, solve, wanted + 1e-3), wanted, 1e-8)
    assert not caplog.records
    hard = torch.logspace(-12, 12, 400, dtype=D)[torch.randperm(400, generator=g)]
    Q = torch.linalg.qr(torch.randn(400, 400, dtype=D, generator=g)).Q
    conjugate_gradients(lambda v: Q @ (hard * (Q.mT @ v)), torch.ones(400, dtype=D), lambda v: v)
    assert "off by about" in caplog.text and "poor preconditioner" in caplog.text


def test_site_roots():
    g = seeded()
    S = torch.randn(5, 3, 2, dtype=D, generator=g) * torch.logspace(-8, 2, 5, dtype=D)[:, None, None]
    Λ = S @ S.mT
    R = site_root(Λ)
    torch.testing.assert_close(R @ R.mT, Λ, rtol=1e-9, atol=1e-12)
    f = torch.tensor([[30.0, 0.0, -3.0]], dtype=D)  # a softmax that is sure, beside one that is not
    Λ = torch.cat([likelihoods.Categorical().ggn(f), torch.eye(3, dtype=D)[None]])
    torch.testing.assert_close(site_root(Λ) @ site_root(Λ).mT, Λ, rtol=1e-9, atol=1e-15)


def test_what_is_not_finite_is_no_answer():
    b = torch.tensor([1.0, torch.nan], dtype=D)
    assert conjugate_gradients(lambda v: v, b, lambda v: v).isnan().all()
