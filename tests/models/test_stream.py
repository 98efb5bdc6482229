"""Data on their way into H: the same at every walk, random draws of their own, and what posteriors answer around them."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules

from .problems import close, inputs, mlp

MCF = rules.Laplace(rules.MonteCarloFisher(1))
WALKERS = {
    "EigenKron": ggn.EigenKron,
    "LowRank": ggn.LowRank(rank=5, memory=0),
    "MatrixFree": ggn.MatrixFree(memory=0, tol=1e-8),
    "inducing": ggn.Gram(inducing=30),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def labels(n=60):
    x = inputs(n)
    return mlp(3), x, torch.randint(3, (n,), generator=seeded(4))


def condition(net, data, structure=ggn.Kron, likelihood=None, rule=None, generator=None, **options):
    model = models.Network(net, structure=structure, **options)
    return model.condition(data, likelihood or likelihoods.Categorical(), rule, generator, progress=False)


# -- random curvatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["LowRank", "MatrixFree"])
def test_every_walk_draws_the_same_signs(name, given):
    net, x, y = labels()
    torch.manual_seed(0)
    posterior = condition(net, (x, y), WALKERS[name], rule=MCF, generator=seeded() if given else None)
    torch.manual_seed(0)
    kept = {"LowRank": ggn.LowRank(rank=5), "MatrixFree": ggn.MatrixFree(tol=1e-8)}[name]  # walks once
    once = condition(net, (x, y), kept, rule=MCF, generator=seeded() if given else None)
    close(posterior(x[:4]).variance, once(x[:4]).variance, 1e-6)
    if name == "MatrixFree":
        V = torch.randn(len(posterior.mean), 2, dtype=torch.float64, generator=seeded(1))
        assert torch.equal(posterior.curvature(V), posterior.curvature(V))


def test_eigenkron_takes_basis_and_diagonal_from_the_same_draws():
    net, x, y = labels()
    posterior = condition(net, (x, y), ggn.EigenKron, rule=MCF)
    # tr H is kept by a rotation, and the Kronecker sums know it: tr(A ⊗ B)/n = tr H only up to the factoring, so compare with a Full H
    torch.manual_seed(0)
    a = condition(net, (x, y), ggn.EigenKron, rule=MCF)
    torch.manual_seed(0)
    full = condition(net, (x, y), ggn.Full, rule=MCF)
    trace = sum(t.sum() for name, t in a.curvature.tensors().items() if name.endswith("h"))
    close(trace, full.curvature.tensors()["H"].diagonal().sum())
    assert posterior.num_data == 60


def test_seeds_decide_and_the_users_generator_moves_once():
    net, x, y = labels()
    torch.manual_seed(7)
    a = condition(net, (x, y), rule=MCF).log_evidence()
    b = condition(net, (x, y), rule=MCF).log_evidence()
    torch.manual_seed(7)
    assert torch.equal(condition(net, (x, y), rule=MCF).log_evidence(), a) and not torch.equal(a, b)
    state = torch.get_rng_state()
    assert torch.equal(condition(net, (x, y), rule=MCF, generator=seeded(1)).log_evidence(),
                       condition(net, (x, y), rule=MCF, generator=seeded(1)).log_evidence())  # fmt: skip
    condition(net, (x, y))  # nothing random, nothing drawn
    assert torch.equal(torch.get_rng_state(), state)
    g = seeded(3)
    posterior = condition(net, (x, y), WALKERS["MatrixFree"], rule=MCF, generator=g)
    triples = [torch.rand(3, generator=g)]
    for _ in range(2):  # a prediction walks the data again; it must not rewind the generator
        state = g.get_state()
        posterior(x[:2]).variance  # noqa: B018
        assert torch.equal(g.get_state(), state)
        triples.append(torch.rand(3, generator=g))
    assert not torch.equal(triples[0], triples[1]) and not torch.equal(triples[1], triples[2])


def test_draws_of_weights_do_not_disturb_the_signs():
    net, x, y = labels()
    g = seeded(3)
    posterior = condition(net, (x, y), WALKERS["MatrixFree"], rule=MCF, generator=g)
    V = torch.randn(len(posterior.mean), 1, dtype=torch.float64, generator=seeded(1))
    H, before = posterior.curvature, posterior.curvature(V)
    posterior.sample_weights(3, g)
    assert torch.equal(H(V), before)


def test_a_likelihood_changed_after_the_fit_leaves_later_walks_alone():
    net, x, _ = labels()
    y, likelihood = inputs(60, 3), likelihoods.StudentT(dof=4.0, scale=0.5)
    posterior = condition(net, (x, y), WALKERS["MatrixFree"], likelihood)
    before = posterior(x[:3]).variance
    with torch.no_grad():
        for p in likelihood.parameters():
            p.add_(1.0)
    assert torch.equal(posterior(x[:3]).variance, before)


# -- the same data at every walk ---------------------------------------------------------------------------------------------


class Augmented(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", WALKERS)
def test_other_data_at_a_second_walk_are_refused(name, likelihood):
    net, x, y = labels()
    torch.manual_seed(0)
    p = likelihoods.Categorical()
    if likelihood == "gaussian":
        y, p = inputs(60, 3), likelihoods.Gaussian(0.1)
    for loader in (DataLoader(TensorDataset(x, y), 16, shuffle=True, drop_last=True), DataLoader(Augmented(x, y), 16)):
        with pytest.raises(ValueError, match="walk met other data than the first .*no shuffle=True with drop_last=True, no random augm"):
            condition(net, loader, WALKERS[name], p)(x[:2]).variance  # noqa: B018
    single = DataLoader(TensorDataset(x, y), 16, shuffle=True, drop_last=True)
    assert condition(net, single, ggn.Kron, p).num_data == 48  # one walk: no harm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WALKERS)
def test_the_same_data_in_another_order_are_not(name, dtype):
    net, x, y = labels()
    net, x = net.to(dtype), x.to(dtype)
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=seeded())
    if name == "inducing":  # whose choice goes by place
        loader = DataLoader(TensorDataset(x, y), 16)
    assert (condition(net, loader, WALKERS[name])(x[:2]).variance > 0).all()


def test_another_order_is_refused_where_signs_go_by_place():
    net, x, y = labels()
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=seeded())
    with pytest.raises(ValueError, match="Their order counts too, for MonteCarloFisher draws by it: use shuffle=False"):
        condition(net, loader, ggn.EigenKron, rule=MCF)


# -- more data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 2**30])
def test_matrix_free_takes_more_data(memory):
    net, x, y = labels()
    structure = ggn.MatrixFree(memory=memory, tol=1e-10, probes=100)
    first = condition(net, (x[:25], y[:25]), structure)
    before = first(x[:3]).variance
    both, whole = first.condition((x[25:], y[25:]), progress=False), condition(net, (x, y), structure)
    close(both(x[:3]).covariance_matrix, whole(x[:3]).covariance_matrix, 1e-7)
    close(both.log_evidence(), whole.log_evidence(), 1e-7)
    assert torch.equal(first(x[:3]).variance, before) and (first.num_data, both.num_data) == (25, 60)


# -- half precision, devices without float64, inference mode -----------------------------------------------------------------


def narrow(dtype):
    """A wide linear regression whose posterior is far narrower than a bfloat16 weight's last bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(64, 1).to(dtype).eval()
    x = torch.randn(20, 64, generator=seeded()).to(dtype)
    return net, x, torch.zeros(20, 1)


def test_draws_of_a_bfloat16_net_are_no_rounding():
    net, x, y = narrow(torch.bfloat16)
    posterior = condition(net, (x, y), ggn.Full, likelihoods.Gaussian(1.0), None)
    posterior.prior.precision = 1e7
    f = posterior.sample_outputs(x, 2000, seeded())
    assert f.dtype == posterior.sample_weights(1, seeded()).dtype == torch.float32 and net.weight.dtype == torch.bfloat16
    ratio = f.std(0).flatten() / posterior(x).variance.sqrt().flatten()
    assert (ratio - 1).abs().max() < 0.08, ratio


def test_a_net_that_insists_on_its_dtype_is_told():
    net, x, y = narrow(torch.bfloat16)
    net = Insists(net)
    posterior = condition(net, (x, y), ggn.Full, likelihoods.Gaussian(1.0))
    with pytest.warns(UserWarning, match="Insists cannot be evaluated in torch.float32 .*rounded to torch.bfloat16.*or fit net.float"):
        assert posterior.sample_outputs(x, 2, seeded()).isfinite().all()


class Insists(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.bfloat16())


def test_the_deviation_from_the_prior_mean_is_not_rounded():
    net, x, y = narrow(torch.bfloat16)
    model = models.Network(net, models.WeightPrior(1.0, mean=0.1), ggn.Diag)
    posterior = model.condition((x, y), likelihoods.Gaussian(1.0), progress=False)
    θ = torch.cat([net.weight.flatten(), net.bias]).double()
    assert torch.equal(posterior.deviation, (θ - 0.1).detach())


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), f"{func} gives float64"
        return out


def test_a_device_without_float64_is_asked_for_none(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("bayesgn."):
            for function in ("accumulator", "_accumulator"):
                if hasattr(module, function):
                    monkeypatch.setattr(module, function, lambda like: torch.float32)
    net, x = mlp(2).float(), inputs(20).float()
    y = inputs(20, 2).float()
    posterior = condition(net, (x, y), ggn.Diag, likelihoods.Gaussian(0.1))
    assert posterior.deviation.dtype == torch.float32
    with NoFloat64():
        posterior.precision().logdet()
        posterior.log_evidence().backward()
        posterior.sample_functions(2, seeded())(x)
        posterior.sample_outputs(x, 2, seeded())
        posterior(x).variance  # noqa: B018


def test_a_net_made_under_inference_mode():
    with torch.inference_mode():
        net = mlp(3)
    with pytest.raises(ValueError, match=r"0.weight of Sequential was made under torch.inference_mode.*net = copy.deepcopy\(net\)"):
        models.Network(net)
    _, x, y = labels()
    assert condition(copy.deepcopy(net), (x, y)).num_data == 60  # the advice helps


# -- what is said ------------------------------------------------------------------------------------------------------------


def test_a_warning_of_the_likelihood_is_said_once_and_to_the_caller():
    net, x, y = labels()
    net = nn.Sequential(net, nn.Softmax(-1)).eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bgn.laplace(models.Network(net, structure=ggn.EigenKron), likelihoods.Categorical(), DataLoader(TensorDataset(x, y), 3), progress=False)
    said = [w for w in said if "softmaxed" in str(w.message)]
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="softmaxed"):
            condition(net, (x, y))


def test_pairs_of_numpy_arrays():
    net, x, y = labels()
    for data in ((x.numpy(), y.numpy()), (x, y.numpy()), [x.numpy(), y]):
        with pytest.raises(TypeError, match=r"data is a pair of a .* and a .*; expected tensors: \(torch.from_numpy\(x\), torch.from_numpy\(y\)\)"):
            condition(net, data)


def test_another_dtype_than_the_net():
    net, x, y = labels()
    posterior = condition(net, (x, y))
    for ask in (lambda: condition(net, (x.float(), y)), lambda: posterior(x.float()), lambda: posterior.sample_outputs(x.float())):
        with pytest.raises(RuntimeError, match=r"x is torch.float32 but the net's weights are torch.float64; pass x.double\(\)"):
            ask()
    with pytest.raises(RuntimeError, match=r"pass x.float\(\)"):
        condition(copy.deepcopy(net).float(), (x, y))


@pytest.mark.parametrize("likelihood", [likelihoods.Categorical(), likelihoods.Gaussian(0.1)])
def test_a_datum_without_a_batch(likelihood):
    net, x, y = labels()
    y = inputs(60, 3) if isinstance(likelihood, likelihoods.Gaussian) else y
    posterior = condition(net, (x, y), likelihood=likelihood)
    for ask in (posterior, posterior.sample_outputs):
        with pytest.raises(ValueError, match=r"x has shape \(2,\).*first dimension of x must run over data, pass x\[None\]"):
            ask(x[0])


# -- a net that changed but for its weights ----------------------------------------------------------------------------------


def test_a_hook_put_on_after_the_fit():
    net, x, y = labels()
    model = models.Network(net, use_backpack=True)
    posterior = model.condition((x, y), likelihoods.Categorical(), progress=False)
    assert model.linearizer.engine is not None
    functions, before = posterior.sample_functions(2, seeded()), posterior(x).variance
    seen = []
    handle = net[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))  # one that only looks
    assert torch.equal(posterior(x).variance, before) and seen
    handle.remove()
    handle = net.register_forward_hook(lambda m, a, out: 3 * out)
    for ask in (posterior, functions):
        with pytest.raises(models.StalePosteriorError, match="answers otherwise than when the posterior was made.*forward hook"):
            ask(x)
    with pytest.raises(ValueError, match="answers otherwise than when this Network was planned.*make a new one"):
        model.condition((x, y), likelihoods.Categorical(), progress=False)
    handle.remove()
    assert torch.equal(posterior(x).variance, before)
    net[1] = nn.ReLU().eval()
    with pytest.raises(models.StalePosteriorError, match="another module"):
        posterior(x)
