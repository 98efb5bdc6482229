"""Nets and data as users have them: missing targets, blank inputs, wrappers, counters, locks, subclasses, one datum a batch."""

import threading

import pytest
import torch
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from bayesgn._parameters import ParameterVector
from bayesgn.ggn.linearization import Linearizer
from tests.oracles import dense

STRUCTURES = [ggn.Full, ggn.Layerwise, ggn.Kron, ggn.Kron(reduce=True), ggn.EigenKron, ggn.Diag, ggn.Gram, ggn.LowRank(rank=60)]


def data(n=24, d=3, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(c, (n,), generator=g)


def mlp(c=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, c)).double().eval()


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_a_missing_target_is_a_dropped_datum(structure):
    x, y = data()
    net, gone = mlp(), torch.arange(24) % 3 == 0
    masked = y.masked_fill(gone, -100)
    x_far = torch.where(gone[:, None], 100 * x, x)  # what is ignored may be anything
    a = bgn.laplace(models.Network(net, structure=structure), likelihoods.Categorical(), (x_far, masked))
    b = bgn.laplace(models.Network(net, structure=structure), likelihoods.Categorical(), (x[~gone], y[~gone]))
    torch.testing.assert_close(a.log_evidence(), b.log_evidence(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a(x).variance, b(x).variance, rtol=1e-8, atol=1e-10)


def test_padded_positions_do_not_enter_kronecker_factors():
    """Sequences padded at the end, as language models have them: the padding's inputs change nothing."""

    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PerToken().double().eval()
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 5, 3, generator=g, dtype=torch.float64), torch.randint(2, (6, 5), generator=g)
    y[:, 3:] = -100
    other = x.clone()
    other[:, 3:] *= 50
    for structure in (ggn.Kron, ggn.EigenKron):
        padded = bgn.laplace(models.Network(net, structure=structure), likelihoods.Categorical(), (other, y))
        cut = bgn.laplace(models.Network(net, structure=structure), likelihoods.Categorical(), (x[:, :3], y[:, :3]))
        torch.testing.assert_close(padded.log_evidence(), cut.log_evidence(), rtol=1e-10, atol=1e-10)


class TimeFirst(nn.Module):
    """Positions come first at the layer: layouts can be told apart by numbers alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_blank_first_data_and_lone_data_do_not_mislead_the_plan(batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TimeFirst().double().eval()
    x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:2] = 0
    J = dense.jacobian(net, x)
    linearizer = Linearizer(net, ParameterVector.of(net))
    found = torch.cat([torch.cat([f.jacobian() for f in linearizer(part, lambda f: f).factors()], -1) for part in x.split(batch)])
    torch.testing.assert_close(found, J, rtol=1e-9, atol=1e-10)


def test_wrapped_nets():
    x, y = data()
    net = mlp()
    plain = bgn.laplace(models.Network(net), likelihoods.Categorical(), (x, y))
    for wrapper in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        prior = models.WeightPrior.per_layer(wrapper)
        wrapped = bgn.laplace(models.Network(wrapper, prior=prior), likelihoods.Categorical(), (x, y))
        torch.testing.assert_close(wrapped(x).variance, plain(x).variance)
        last = bgn.laplace(models.Network(wrapper, parameters=bgn.last_layer(wrapper)), likelihoods.Categorical(), (x, y))
        assert last.linearizer.vector.names == ("2.weight", "2.bias")


def test_a_net_that_writes_to_its_buffers_comes_back_and_stays_usable():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            f = self.layer(x)
            self.last = f.detach().mean(0)
            return f

    net = Counts().eval()
    x, y = data(c=2)
    posterior = bgn.laplace(models.Network(net), likelihoods.Categorical(), (x.float(), y))
    first = posterior(x.float()).variance
    posterior.sample_outputs(x.float(), 2)
    torch.testing.assert_close(posterior(x.float()).variance, first)
    assert net.calls == 0 and torch.equal(net.last, torch.zeros(2))


def test_a_net_that_cannot_be_copied_is_served_by_hooks():
    net = mlp()
    net.lock = threading.Lock()
    x, y = data()
    torch.testing.assert_close(
        bgn.laplace(models.Network(net), likelihoods.Categorical(), (x, y))(x).variance,
        bgn.laplace(models.Network(mlp()), likelihoods.Categorical(), (x, y))(x).variance,
    )


def test_a_subclass_of_linear_keeps_its_kronecker_factors():
    class MyLinear(nn.Linear):
        pass

    net, twin = mlp(), mlp()
    twin[0].__class__ = MyLinear
    x, y = data()
    a, b = (bgn.laplace(models.Network(n), likelihoods.Categorical(), (x, y)) for n in (net, twin))
    torch.testing.assert_close(a.log_evidence(), b.log_evidence())


def test_a_downgrade_to_a_diagonal_is_said():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 4)).double().eval()
    x, y = data()
    model = models.Network(net, structure=ggn.Kron(explicit_limit=20), parameters=bgn.magnitude(net, 100))
    with pytest.warns(UserWarning, match=r"keeps only the diagonal of .*weights\).*explicit_limit"):
        bgn.laplace(model, likelihoods.Categorical(), (x, y))


def test_explicit_blocks_bound_the_chunk():
    net = nn.LSTM(8, 64, batch_first=True)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = net, nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    last = Last().eval()
    linearizer = Linearizer(last, ParameterVector.of(last))
    linearizer.prepare(torch.randn(4, 5, 8), lambda f: f)
    explicit = sum(b.numel for b in linearizer.blocks if b.module is None)
    assert linearizer.chunk(10) * 10 * explicit * 4 <= 2**26 and linearizer.chunk(10) >= 1


def test_a_block_too_large_for_memory_is_refused_before_it_is_asked_for():
    with torch.device("meta"):
        like = torch.zeros(1)
    from bayesgn.ggn.block_diagonal import DenseBlock

    with pytest.raises(ValueError, match=r"75 GB.*ggn\.Kron"):
        DenseBlock(100_000, like)


def test_a_prior_per_weight_is_refused_by_kron_before_the_walk():
    net = mlp()
    for structure in (ggn.Kron, ggn.EigenKron):
        with pytest.raises(ValueError, match="Kronecker block needs one precision"):
            models.Network(net, prior=models.WeightPrior.per_weight(net), structure=structure)


@pytest.mark.parametrize("structure", [ggn.Kron, ggn.Diag], ids=lambda s: s.__name__)
def test_joint_covariance_equals_the_dense_one(structure):
    x, y = data()
    net = mlp()
    posterior = bgn.laplace(models.Network(net, structure=structure), likelihoods.Categorical(), (x, y))
    Σ = posterior.precision().solve(torch.eye(len(posterior.mean), dtype=torch.float64)).detach()
    J = dense.jacobian(net, x).flatten(0, 1)
    torch.testing.assert_close(posterior(x).covariance_matrix, J @ Σ @ J.mT, rtol=1e-9, atol=1e-11)


def test_a_noise_of_one_entry_is_tuned_as_a_scalar_is():
    x, _ = data()
    y = x.sum(1, keepdim=True)
    net = mlp(c=1)
    scalar = bgn.laplace(models.Network(net), likelihoods.Gaussian(0.3), (x, y))
    entry = bgn.laplace(models.Network(net), likelihoods.Gaussian(torch.tensor([0.3], dtype=torch.float64)), (x, y))
    for posterior in (scalar, entry):
        bgn.maximize_evidence(posterior)
    torch.testing.assert_close(entry.likelihood.noise.reshape(()), scalar.likelihood.noise, rtol=1e-6, atol=0)
    assert abs(float(scalar.likelihood.noise) - 0.3) > 0.01
