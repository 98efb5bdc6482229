"""A saved Gaussian process comes back to the last bit, goes on from there, and nothing else does."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from gpytorch import kernels
from gpytorch.constraints import Interval, Positive
from safetensors.torch import load_file, save_file

import bayesgn as bgn
from bayesgn import likelihoods, models, rules
from bayesgn.models import _gp_files

from .test_gp_posterior import CASES, D, constant, every_model, infer, kernel, targets, two

RULES = [
    rules.Laplace(), rules.Variational(rules.Exact(rules.eigabs), rules.GaussHermite(12)), rules.PowerEP(0.5, rules.EmpiricalFisher()),
    rules.PosteriorLinearization(), rules.PosteriorLinearization2(), rules.Taylor(), rules.Variational(rules.Riemann()),
    rules.Laplace(rules.QuasiNewton(0.3, rules.Identity(0.5))), rules.PowerEP(1.0, cubature=rules.MonteCarloCubature(64, seed=3)),
]  # fmt: skip


def fresh(case, c=1, mean=None):
    """The same model built anew, with other values."""
    ks = [kernel(0.3, 7.0) for _ in range(c)]
    return case.make(ks if c > 1 else ks[0], mean)


def same(a, b, x):
    """Bit for bit."""
    assert torch.equal(a.log_evidence(), b.log_evidence())
    for p in (a, b):
        p.sites = p.sites  # nothing kept
    with torch.no_grad():
        assert torch.equal(a.log_evidence(), b.log_evidence())
    f, g = a(x), b(x)
    assert torch.equal(f.mean, g.mean) and torch.equal(f.covariance_matrix, g.covariance_matrix)
    assert torch.equal(a.likelihood(f).mean.nan_to_num(-1), b.likelihood(g).mean.nan_to_num(-1))  # a Categorical has no mean
    assert torch.equal(*(p.sample_outputs(x, 2, torch.Generator().manual_seed(0)) for p in (a, b)))
    assert len(a.sites.memory) == len(b.sites.memory)
    assert all(torch.equal(s, t) for s, t in zip((*a.sites[:2], *a.sites.memory), (*b.sites[:2], *b.sites.memory), strict=True))
    assert a.dtype == b.dtype and a.num_data == b.num_data and repr(a) == repr(b) and a.model.power == b.model.power


PAIRS = [(c, r) for c in CASES for r in (RULES if c.name == "GP" else RULES[-2:-1])]


@pytest.mark.parametrize("case, rule", PAIRS, ids=lambda v: getattr(v, "name", repr(v)))
def test_every_rule_comes_back_and_goes_on(case, rule, tmp_path):
    p = infer(case, rule=rule, steps=2)
    back = bgn.load(p.save(tmp_path / "p.safetensors"), fresh(case))
    same(p, back, case.x(4, seed=1))
    # further turns are the same turns, memories included
    same(*(bgn.bayes_newton(q, steps=3, lr=0.5, progress=False) for q in (p, back)), case.x(4, seed=1))


@pytest.mark.parametrize("case", CASES[:2] + CASES[3:4], ids=lambda c: c.name)
@pytest.mark.parametrize("rule", [rules.Variational(), rules.Variational(rules.QuasiNewton())], ids=repr)
def test_an_interrupted_inference_ends_as_an_unbroken_one(case, rule, tmp_path):
    """Steps of a given size know nothing but the sites, so a file in the middle changes nothing."""
    whole = infer(case, rule=rule, steps=7, lr=0.6)
    part = infer(case, rule=rule, steps=3, lr=0.6)
    back = bgn.load(part.save(tmp_path / "p.safetensors"), fresh(case))
    same(whole, bgn.bayes_newton(back, steps=4, lr=0.6, progress=False), case.x(4, seed=1))


@every_model
def test_hyper_parameters_means_latents_and_float32(case, tmp_path):
    p = infer(case, likelihoods.HeteroscedasticGaussian(), 2, mean=[constant(0.4), None], dtype=torch.float32)
    p.model.kernels[0].outputscale = 1.7
    p.model.kernels[1].raw_outputscale.requires_grad_(False)
    back = bgn.load(p.save(tmp_path / "p.safetensors"), fresh(case, 2, [constant(0.0), None]))
    assert [q.requires_grad for q in back.model.parameters()] == [q.requires_grad for q in p.model.parameters()]
    same(p, back, case.x(4, seed=1, dtype=torch.float32))


def test_tuning_goes_on_from_a_file(tmp_path):
    p = infer(CASES[0])
    bgn.maximize_evidence(p, steps=2, progress=False)
    back = bgn.load(p.save(tmp_path / "p.safetensors"), fresh(CASES[0]))
    for q in (p, back):
        bgn.maximize_evidence(q, steps=2, progress=False)
    same(p, back, CASES[0].x(4, seed=1))


def test_a_model_of_single_precision_gets_the_saved_precision(tmp_path):
    p = infer(CASES[0])
    model = models.GP(kernels.ScaleKernel(kernels.MaternKernel(nu=1.5)))
    back = bgn.load(p.save(tmp_path / "p.safetensors"), model)
    same(p, back, CASES[0].x(4, seed=1))
    assert model.kernels[0].raw_outputscale.dtype == torch.float32 and model.kernels[0].outputscale.item() != p.model.kernels[0].outputscale.item()


def test_inducing_points_come_from_the_file(tmp_path):
    case = CASES[2]
    p = infer(case)
    z = torch.arange(14.0)
    back = bgn.load(p.save(tmp_path / "p.safetensors"), models.SparseGP(kernel(), z))
    same(p, back, case.x(4, seed=1))
    assert torch.equal(back.model.inducing_points, p.model.inducing_points)
    with pytest.raises(ValueError, match=r"inducing_points: \[14, 1\] in the file, \[5, 1\] here"):
        bgn.load(tmp_path / "p.safetensors", models.SparseGP(kernel(), z[:5]))


def test_the_trace_comes_back(tmp_path):
    p = infer(CASES[0])
    back = bgn.load(p.save(tmp_path / "p.safetensors"), fresh(CASES[0]))
    assert back.trace == p.trace and repr(back.trace) == repr(p.trace)
    p.trace = None
    assert bgn.load(p.save(tmp_path / "p.safetensors"), fresh(CASES[0])).trace is None


def test_labels_keep_their_type(tmp_path):
    x = torch.linspace(0, 3, 12, dtype=D)
    p = bgn.bayes_newton(models.GP(two() + [kernel()]), likelihoods.Categorical(), (x, torch.arange(12) % 3), steps=2, progress=False)
    back = bgn.load(p.save(tmp_path / "p.safetensors"), models.GP([kernel() for _ in range(3)]))
    assert back.y.dtype == torch.int64
    same(p, back, x[:3])


def test_a_likelihood_that_holds_code_is_passed_again(tmp_path):
    def make():
        return likelihoods.FromDistribution(lambda f: torch.distributions.Poisson(f[..., 0].exp()))

    data = CASES[0].x(), targets(CASES[0].x())[1].nan_to_num(1.0)
    p = bgn.bayes_newton(models.GP(kernel()), make(), data, steps=2, progress=False)
    path = p.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="FromDistribution, which holds code"):
        bgn.load(path, fresh(CASES[0]))
    with pytest.raises(ValueError, match="likelihood is a Poisson; .* was saved with a FromDistribution"):
        bgn.load(path, fresh(CASES[0]), likelihoods.Poisson())
    same(p, bgn.load(path, fresh(CASES[0]), p.likelihood), CASES[0].x(4, seed=1))
    assert torch.equal(bgn.load(path, fresh(CASES[0]), make()).log_evidence(), p.log_evidence())


class OwnRule(rules.Laplace):
    pass


def test_a_rule_of_ones_own_is_not_saved(tmp_path):
    p = infer(CASES[0], rule=OwnRule())
    with pytest.raises(TypeError, match="not one of bayesgn's own"):
        p.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def ard():
    return kernels.ScaleKernel(kernels.MaternKernel(nu=1.5, ard_num_dims=2)).double()


def with_constraint(constraint):
    return kernels.ScaleKernel(kernels.MaternKernel(nu=1.5), outputscale_constraint=constraint).double()


OTHERS = {
    "another model": (lambda: models.MarkovGP(kernel()), "model: GP.* in the file, MarkovGP"),
    "another kernel": (lambda: models.GP(kernels.ScaleKernel(kernels.RBFKernel()).double()), r"MaternKernel\(nu=1.5\) in the file, RBFKernel"),
    "another smoothness": (lambda: models.GP(kernels.ScaleKernel(kernels.MaternKernel(nu=2.5))), r"nu=1.5\) in the file, MaternKernel\(nu=2.5\)"),
    "no scale": (lambda: models.GP(kernels.MaternKernel(nu=1.5)), "base_kernel is in the file only"),
    "two latents": (lambda: models.GP(two()), "kernels.1 is here only"),
    "a mean": (lambda: models.GP(kernel(), constant(0.0)), r"ZeroMean\(\) in the file, ConstantMean\(\) here"),
    "ard": (lambda: models.GP(ard()), r"MaternKernel\(ard_num_dims=2, nu=1.5\) here"),
    "another constraint": (lambda: models.GP(with_constraint(Interval(0.1, 5.0))), "raw_outputscale_constraint"),
    "another transform": (
        lambda: models.GP(with_constraint(Positive(torch.exp, torch.log))), r"Positive\(Softplus\) in the file, Positive\(exp\) here"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name, tmp_path):
    path = infer(CASES[0]).save(tmp_path / "p.safetensors")
    make, message = OTHERS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="belongs to another model") as error:
        bgn.load(path, model)
    assert re.search(message, str(error.value)) and "Build the model with the same kernels" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_files_of_nets_and_of_processes_are_not_mixed_up(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).eval()
    x = torch.linspace(-1, 1, 10)[:, None]
    of_net = bgn.laplace(models.Network(net), likelihoods.Gaussian(0.1), (x, x)).save(tmp_path / "net.safetensors")
    of_process = infer(CASES[0]).save(tmp_path / "gp.safetensors")
    with pytest.raises(ValueError, match="holds a NetworkPosterior; expected a GaussianProcessPosterior"):
        bgn.load(of_net, fresh(CASES[0]))
    with pytest.raises(ValueError, match="holds a GaussianProcessPosterior; expected a NetworkPosterior"):
        bgn.load(of_process, net)
    with pytest.raises(FileNotFoundError, match="no file"):
        bgn.load(tmp_path / "nothing", fresh(CASES[0]))
    with pytest.raises(FileNotFoundError, match="create it"):
        infer(CASES[0]).save(tmp_path / "no" / "p.safetensors")


def rewritten(path, change):
    """The file with its header changed."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["bayesgn"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"bayesgn": json.dumps(header)})
    return path


def test_damaged_files_say_so(tmp_path):
    p, model = infer(CASES[0]), fresh(CASES[0])
    with pytest.raises(ValueError, match=r"is incomplete \(KeyError\('nat1'\)"):
        bgn.load(rewritten(p.save(tmp_path / "a"), lambda h, t: t.pop("nat1")), model)
    with pytest.raises(ValueError, match=r"is incomplete \(KeyError\('rule'\)"):
        bgn.load(rewritten(p.save(tmp_path / "b"), lambda h, t: h.pop("rule")), model)
    with pytest.raises(ValueError, match="names a class 'System'"):
        bgn.load(rewritten(p.save(tmp_path / "c"), lambda h, t: h["rule"].update({"class": "System"})), model)
    with pytest.raises(ValueError, match="expected .14, 1. and .14, 1, 1."):
        bgn.load(rewritten(p.save(tmp_path / "d"), lambda h, t: t.update(nat1=t["nat1"][:3].clone())), model)


# -- state_dict ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("rule", [rules.PowerEP(0.5), rules.Variational(rules.QuasiNewton())], ids=repr)
def test_state_dicts_go_from_one_posterior_to_another(case, rule):
    p = infer(case, rule=rule, steps=3)
    p.model.kernels[0].outputscale = torch.tensor(1.9, dtype=D)
    state = {k: v.clone() for k, v in p.state_dict().items()}
    x = case.x(9, seed=5)
    q = fresh(case).start(likelihoods.Poisson(), (x, targets(x)[1]), rule)
    before = q(x).mean
    q.load_state_dict(state)
    same(p, q, case.x(4, seed=1))
    assert not torch.equal(q(x).mean, before)
    # and owns what it took over
    with torch.no_grad():
        q.model.kernels[0].outputscale = 0.1
        q.sites.nat1.zero_()
    assert all(torch.equal(v.nan_to_num(-1), state[k].nan_to_num(-1)) for k, v in p.state_dict().items())
    other = models.GP(kernel() + kernel()).start(likelihoods.Poisson(), (seen := CASES[0].x(), targets(seen)[1]), rule)
    with pytest.raises(ValueError, match="the model GP has other parameters"):
        other.load_state_dict(state)


def test_the_description_has_all_that_the_values_do_not_say():
    text = json.dumps(_gp_files.describe_model(models.GP(kernels.PolynomialKernel(power=3) * kernels.RBFKernel(active_dims=[0]))))
    assert "PolynomialKernel(power=3)" in text and "active_dims" in text
