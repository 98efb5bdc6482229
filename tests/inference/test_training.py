"""Evidence-tuned training: the loss and its gradient, the best evidence kept, the same run twice."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models

from .problems import classification, regression


def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    return x, torch.sin(2 * x) + 0.2 * torch.randn(n, 1, dtype=torch.float64, generator=g)


def fresh(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double().eval()


def run(net, x, y, prior=None, **options):
    options = {"epochs": 30, "lr": 0.02, "every": 5, "batch_size": 20, "progress": False, **options}
    model = models.Network(net, prior=models.WeightPrior.per_layer(net) if prior is None else prior, structure=ggn.Kron)
    likelihood = options.pop("likelihood", likelihoods.Gaussian(torch.tensor(1.0).double()))
    return bgn.train_with_evidence(model, likelihood, (x, y), generator=torch.Generator().manual_seed(0), **options)


def test_it_learns_and_keeps_the_best_evidence():
    (x, y), net = data(), fresh()
    prior, likelihood = models.WeightPrior.per_layer(net), likelihoods.Gaussian(1.0)
    posterior, history = run(net, x, y, prior, likelihood=likelihood, epochs=240, every=20)
    assert history.evidence[history.best] == max(history.evidence) == pytest.approx(posterior.log_evidence().item())
    assert history.epoch == list(range(20, 241, 20)) and history.best_epoch == history.epoch[history.best]
    assert len(history.loss) == 240 and len(history.precision) == len(history.noise) == len(history.evidence) == 12
    assert (net(x) - y).square().mean() < 0.1 < (fresh()(x) - y).square().mean()
    assert posterior.likelihood.noise.item() == pytest.approx(0.04, rel=0.8)  # 0.2²
    assert prior.precision.tolist() == pytest.approx([1, 1]) and likelihood.noise.item() == 1.0  # yours are not changed
    assert "best evidence" in repr(history)
    # the net stands where the posterior was made, and the posterior is the one laplace gives there
    posterior.check_fresh()
    model = models.Network(net, prior=posterior.prior, structure=ggn.Kron)
    again = bgn.laplace(model, posterior.likelihood, (x, y), progress=False)
    torch.testing.assert_close(again.log_evidence(), posterior.log_evidence(), rtol=1e-9, atol=1e-9)


def test_an_earlier_checkpoint_is_restored():
    (x, y), net = data(), fresh()

    def collapsing(optimizer):  # the step grows until training falls apart
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 100 else 100.0)

    posterior, history = run(net, x, y, epochs=140, scheduler=collapsing)
    assert history.best_epoch < 130
    posterior.check_fresh()
    torch.testing.assert_close(posterior.log_evidence().item(), history.evidence[history.best])


def test_patience():
    (x, y), net = data(), fresh()
    _, history = run(net, x, y, epochs=200, patience=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    # nothing moves but the hyper-parameters, whose optimum stands after the first fit
    assert history.reason == "no better evidence in 2 fits" and len(history.loss) <= 25


def test_one_step_is_gradient_descent_on_the_penalised_mean_loss():
    (x, y), net = data(), fresh()
    prior = models.WeightPrior.per_layer(net, torch.tensor([3.0, 0.5]), mean={"2.bias": torch.full((1,), 0.2, dtype=torch.float64)})
    other = copy.deepcopy(net)
    run(net, x, y, prior, epochs=1, steps=0, batch_size=40, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        likelihood=likelihoods.Gaussian(torch.tensor(0.5).double()))  # fmt: skip
    P = dict.fromkeys(["0.weight", "0.bias"], 3.0) | dict.fromkeys(["2.weight", "2.bias"], 0.5)
    loss = -torch.distributions.Normal(other(x), 0.5**0.5).log_prob(y).sum()
    loss = loss + sum(P[k] / 2 * (p - (0.2 if k == "2.bias" else 0)).square().sum() for k, p in other.named_parameters())
    (loss / 40).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * q.grad)


def test_deterministic_and_the_mode_as_it_came():
    (x, y), ends = data(), []
    for training in (False, False):
        net = fresh().train(training)
        posterior, history = run(net, x, y)
        ends.append((torch.cat([p.detach().flatten() for p in net.parameters()]), history.evidence))
        assert net.training == training and all(p.grad is None for p in net.parameters())
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    net = fresh()
    net[0].train()
    with pytest.raises(ValueError, match="loss is nan in batch 0 of epoch 1; lower lr"):
        run(net, x, y, likelihood=Broken(1.0))
    assert [m.training for m in net.modules()] == [False, True, False, False] and all(p.grad is None for p in net.parameters())


class Broken(likelihoods.Gaussian):
    def log_prob(self, f, y):
        return super().log_prob(f, y) * torch.nan


def test_subsets_loaders_and_other_likelihoods():
    net, x, y = classification(steps=0)
    frozen, head = net[0].weight.clone(), net[2].weight.clone()
    net[0].requires_grad_(False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 25, drop_last=True)
    model = models.Network(net, parameters=bgn.last_layer(net), structure=ggn.Full)
    posterior, history = bgn.train_with_evidence(model, likelihoods.Categorical(), loader, epochs=40, lr=0.05, progress=False)
    assert posterior.num_data == 50 and torch.equal(net[0].weight, frozen) and not torch.equal(net[2].weight, head)
    assert history.noise == [] and history.loss[-1] < history.loss[0]
    net, x, y = regression()  # noise of each output goes with the weights
    likelihood = likelihoods.Gaussian(torch.tensor([1.0, 1.0], dtype=torch.float64))
    model = models.Network(net, structure=ggn.Diag)
    posterior, _ = bgn.train_with_evidence(model, likelihood, (x, y), epochs=60, lr=0.03, progress=False)
    assert (posterior.likelihood.noise < 0.5).all() and (likelihood.noise == 1).all()


def test_frozen_hyperparameters_stay():
    (x, y), net = data(), fresh()
    prior, likelihood = models.WeightPrior(2.0), likelihoods.Gaussian(0.3)
    prior.requires_grad_(False)
    likelihood.requires_grad_(False)
    posterior, history = run(net, x, y, prior, likelihood=likelihood)
    assert posterior.prior.precision.item() == pytest.approx(2.0) and posterior.likelihood.noise.item() == pytest.approx(0.3)
    assert len(history.evidence) == 6


@pytest.mark.parametrize(
    "options, message",
    [({"epochs": 0}, "epochs=0, every=5.*expected epochs, every ≥ 1"), ({"every": 0}, "every=0"), ({"burn_in": -1}, "burn_in=-1")],
)
def test_options(options, message):
    (x, y), net = data(), fresh()
    with pytest.raises(ValueError, match=message):
        run(net, x, y, **options)


def test_data_that_cannot_be_walked_again():
    (x, y), net = data(), fresh()
    model = models.Network(net)
    with pytest.raises(ValueError, match="train_loader is an iterator, which can be walked once"):
        bgn.train_with_evidence(model, likelihoods.Gaussian(1.0), iter([(x, y)]))
    with pytest.raises(ValueError, match="the loader gave no data"):
        bgn.train_with_evidence(model, likelihoods.Gaussian(1.0), [])


def test_burn_in():
    (x, y), net = data(), fresh()
    _, history = run(net, x, y, epochs=23, burn_in=10)
    assert history.epoch == [15, 20, 23]


def test_fits_on_the_way_do_not_speak_of_train_mode():
    (x, y), net = data(), fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net.train(), x, y, epochs=10)
    assert net.training


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_batch_norm_stays_frozen(training):
    (x, y), net = data(), fresh()
    net = nn.Sequential(net[0], nn.BatchNorm1d(8).double(), net[1], net[2]).train(training)
    net[1].eval()
    before = net[1].running_mean.clone()
    run(net, x, y, epochs=10)
    # a net that comes in eval mode is trained as a whole, as its docstring says
    assert torch.equal(net[1].running_mean, before) == training
    assert [m.training for m in net] == [training, False, training, training]


def test_a_softmaxed_net_is_told_once_by_training():
    net, x, y = classification(steps=0)
    net = nn.Sequential(net, nn.Softmax(-1)).eval()
    model = models.Network(net, structure=ggn.Diag)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bgn.train_with_evidence(model, likelihoods.Categorical(), loader, epochs=1, progress=False)
    assert len([w for w in said if "softmaxed" in str(w.message)]) == 2  # by training, and by its one fit
