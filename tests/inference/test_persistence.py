"""A saved posterior comes back to the last bit, and nothing else does."""

from __future__ import annotations

import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.models import StalePosteriorError

from .problems import assert_same, classification, fit, regression, snapshot

STRUCTURES = {name: getattr(ggn, name) for name in ("Full", "Layerwise", "Kron", "Diag", "EigenKron", "Gram") if hasattr(ggn, name)}
STRUCTURES |= {"Kron reduce": ggn.Kron(reduce=True)}
if hasattr(ggn, "Gram"):
    STRUCTURES |= {"Gram subset": ggn.Gram(subset=7), "Gram inducing": ggn.Gram(inducing=5)}
if hasattr(ggn, "LowRank"):
    STRUCTURES |= {"LowRank": ggn.LowRank(rank=6)}


def roundtrip(posterior, net, tmp_path, **options):
    return bgn.load(posterior.save(tmp_path / "p.safetensors"), net, **options)


def same(a, b, x) -> None:
    assert torch.equal(a.log_evidence(), b.log_evidence())
    f, g = a(x), b(x)
    assert torch.equal(f.mean, g.mean) and torch.equal(f.variance, g.variance)
    draws = [p.sample_weights(3, generator=torch.Generator().manual_seed(1)) for p in (a, b)]
    assert torch.equal(*draws)
    assert a.num_data == b.num_data and repr(a) == repr(b)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("problem", [regression, classification])
def test_every_structure_comes_back_bit_for_bit(name, problem, tmp_path):
    net, x, y = problem()
    posterior = fit(net, x, y, STRUCTURES[name])
    bgn.maximize_evidence(posterior, steps=3, progress=False)
    before = snapshot(net)
    loaded = roundtrip(posterior, net, tmp_path)
    assert_same(before, snapshot(net))
    same(posterior, loaded, x[:6])
    # tuned further, both go the same way
    for p in (posterior, loaded):
        bgn.maximize_evidence(p, progress=False)
    same(posterior, loaded, x[:6])


@pytest.mark.parametrize("name", STRUCTURES)
def test_float32_nets_too(name, tmp_path):
    net, x, y = regression()
    net, x, y = net.float(), x.float(), y.float()
    posterior = fit(net, x, y, STRUCTURES[name])
    same(posterior, roundtrip(posterior, net, tmp_path), x[:6])


@pytest.mark.parametrize("name", ["Full", "Kron", "Diag", "Gram"])
def test_a_loaded_posterior_takes_more_data(name, tmp_path):
    net, x, y = regression()
    posterior = fit(net, x[:25], y[:25], STRUCTURES[name])
    loaded = roundtrip(posterior, net, tmp_path)
    same(posterior.condition((x[25:], y[25:])), loaded.condition((x[25:], y[25:])), x[:4])


@pytest.mark.parametrize("prior", ["per_layer", "per_weight", "mean number", "mean tensors"])
def test_priors(prior, tmp_path):
    net, x, y = regression()
    means = {"0.weight": torch.full((5, 3), 0.1, dtype=torch.float64)}
    prior = {
        "per_layer": models.WeightPrior.per_layer(net, torch.tensor([0.5, 2.0])),
        "per_weight": models.WeightPrior.per_weight(net, torch.linspace(0.1, 3, 32)),
        "mean number": models.WeightPrior(2.0, mean=0.3),
        "mean tensors": models.WeightPrior(2.0, mean=means),
    }[prior]
    prior.requires_grad_(False)
    posterior = fit(net, x, y, ggn.Diag, prior=prior)
    loaded = roundtrip(posterior, net, tmp_path)
    same(posterior, loaded, x[:4])
    assert not loaded.prior.log_precision.requires_grad and loaded.likelihood.raw_noise.requires_grad
    assert loaded.prior.groups == posterior.prior.groups and torch.equal(loaded.deviation, posterior.deviation)


@pytest.mark.parametrize(
    "rule",
    [rules.Laplace(rules.MonteCarloFisher(2)), rules.Laplace(rules.EmpiricalFisher()), rules.Laplace(rules.Exact(psd=rules.eigabs))],
)
def test_rules(rule, tmp_path):
    net, x, y = classification()
    posterior = fit(net, x, y, ggn.Kron, rule=rule, generator=torch.Generator().manual_seed(0))
    loaded = roundtrip(posterior, net, tmp_path)
    same(posterior, loaded, x[:4])
    assert repr(loaded.rule) == repr(rule)


def test_selections_and_masks(tmp_path):
    net, x, y = regression()
    for parameters in (bgn.last_layer(net), bgn.magnitude(net, 9)):
        model = models.Network(net, parameters=parameters, structure=ggn.Full)
        posterior = bgn.laplace(model, likelihoods.Gaussian(0.1), (x, y), progress=False)
        loaded = roundtrip(posterior, net, tmp_path)
        same(posterior, loaded, x[:4])
        assert loaded.linearizer.vector.names == posterior.linearizer.vector.names
        assert all(torch.equal(m, loaded.linearizer.vector.masks[k]) for k, m in posterior.linearizer.vector.masks.items())


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Gaussian(0.123456789),
        likelihoods.Gaussian(torch.tensor([0.1, 0.7], dtype=torch.float64)),
        likelihoods.Gaussian(torch.tensor([[0.3, 0.1], [0.1, 0.7]], dtype=torch.float64)),
        likelihoods.StudentT(4.0, 0.3) if hasattr(likelihoods, "StudentT") else likelihoods.Gaussian(0.1),
    ],
    ids=repr,
)
def test_likelihoods_to_the_last_bit(likelihood, tmp_path):
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Kron, likelihood=likelihood)
    loaded = roundtrip(posterior, net, tmp_path)
    same(posterior, loaded, x[:4])
    for (k, a), (_, b) in zip(posterior.likelihood.state_dict().items(), loaded.likelihood.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), k


class Width(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.log_width = nn.Parameter(torch.tensor(value))

    def forward(self, f):
        return torch.distributions.Normal(f, self.log_width.exp().to(f))


def test_a_likelihood_that_holds_code_is_passed_again(tmp_path):
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Kron, likelihood=likelihoods.FromDistribution(Width(-0.7)))
    path = posterior.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"FromDistribution, which holds code.*likelihood=\.\.\."):
        bgn.load(path, net)
    with pytest.raises(ValueError, match="likelihood is a Gaussian; .* saved with a FromDistribution"):
        bgn.load(path, net, likelihood=likelihoods.Gaussian(1.0))
    with pytest.raises(ValueError, match="other parameters than the saved one: function.log_width"):
        bgn.load(path, net, likelihood=likelihoods.FromDistribution(lambda f: torch.distributions.Normal(f, 1.0)))
    mine = likelihoods.FromDistribution(Width(3.0))
    same(posterior, bgn.load(path, net, likelihood=mine), x[:4])
    assert mine.function.log_width.item() == 3.0  # yours stays


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Kron)
    return posterior.save(tmp_path / "p.safetensors"), net, posterior


def test_another_net_is_refused(saved):
    path, net, _ = saved
    wider = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    with pytest.raises(ValueError, match=r"another net than this Sequential: 0.bias: \(5,\) float64 in the file, \(6,\) float64 here"):
        bgn.load(path, wider)
    with pytest.raises(ValueError, match="0.bias is in the file only"):
        bgn.load(path, nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match="float64 in the file.*float32 here"):
        bgn.load(path, regression()[0].float())
    other = regression()[0]
    with torch.no_grad():
        other[2].bias[0] += 1e-9
    with pytest.raises(ValueError, match=r"this architecture with other values: 2.bias differ. Load the weights"):
        bgn.load(path, other)


def test_damaged_and_foreign_files(saved, tmp_path):
    path, net, _ = saved
    with pytest.raises(FileNotFoundError, match="there is no file .*missing"):
        bgn.load(tmp_path / "missing.safetensors", net)
    data = path.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "empty": b"", "pickle": pickle.dumps({"a": 1}), "flipped": b"\xff" * 8 + data[8:]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
            bgn.load(tmp_path / name, net)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="that bayesgn did not write .*1 tensors"):
        bgn.load(tmp_path / "foreign", net)


def rewrite(path, change):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["bayesgn"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"bayesgn": json.dumps(header)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t: h.update(format=99, version="9.9"), "file format 99, written by bayesgn 9.9; this version reads up to 1. Upgrade"),
        (lambda h, t: h.pop("format"), "metadata are damaged"),
        (lambda h, t: h.update(kind="Recipe"), "holds a Recipe; expected a NetworkPosterior"),
        (lambda h, t: h["structure"].update({"class": "Popen"}), "names a class 'Popen'; only .*Kron"),
        (lambda h, t: h["structure"].update({"reduced": 1}), "options of Kron do not fit"),
        (lambda h, t: h["rule"].update({"class": "Variational"}), "class 'Variational'; only Laplace"),
        (lambda h, t: h["rule"]["curvature"].update({"class": "os"}), "names a class 'os'"),
        (lambda h, t: h["likelihood"].update({"class": "Module"}), "no likelihood is called 'Module'"),
        (lambda h, t: h.pop("blocks"), "is incomplete .*blocks.*Fit and save again"),
        (lambda h, t: t.pop("curvature.0.A"), "is incomplete .*0.A"),
        (lambda h, t: h["blocks"].pop(), "fall into blocks"),
    ],
)
def test_what_the_file_may_not_say(saved, change, message):
    path, net, _ = saved
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        bgn.load(path, net)


def test_saving_refuses(saved, tmp_path):
    path, net, posterior = saved
    with pytest.raises(FileNotFoundError, match="folder .*nowhere.* does not exist"):
        posterior.save(tmp_path / "nowhere" / "p")

    class Mine(ggn.Kron):
        pass

    posterior.structure = Mine()
    with pytest.raises(TypeError, match="Mine.* is not one of bayesgn's own"):
        posterior.save(path)
    if hasattr(ggn, "MatrixFree"):
        with pytest.raises(ValueError, match="MatrixFree keeps the data themselves and no H"):
            fit(*regression(), ggn.MatrixFree).save(path)
    posterior.structure = ggn.Kron()
    posterior.rule = rules.Laplace(rules.Exact(psd=lambda m: m))
    with pytest.raises(TypeError, match=r"Exact\(psd=.*cannot be saved; only eigclip, eigabs"):
        posterior.save(path)
    posterior.rule = rules.Laplace()
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(StalePosteriorError):
        posterior.save(path)


def test_writing_is_all_or_nothing(saved, monkeypatch):
    path, net, posterior = saved
    before = path.read_bytes()
    import safetensors.torch

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        posterior.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_compiled_or_wrapped_nets_load_too(saved):
    path, net, posterior = saved
    same(posterior, bgn.load(path, nn.DataParallel(net).eval()), torch.ones(3, 3, dtype=torch.float64))


def test_no_warning(saved):
    path, net, _ = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bgn.load(path, net)
