"""An interrupted fit goes on to the same numbers; more data later equal all data at once."""

from __future__ import annotations

import logging

import pytest
import torch

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from bayesgn.models import Checkpoint

from .problems import assert_same, classification, fit, regression, snapshot

ADDITIVE = {"Full": ggn.Full, "Layerwise": ggn.Layerwise, "Kron": ggn.Kron, "Diag": ggn.Diag, "Gram": ggn.Gram, "Gram subset": ggn.Gram(subset=9)}


class Interrupted(Exception):
    pass


class Loader:
    """Batches of 10; raises at batch ``stop``; counts what it hands out."""

    def __init__(self, x, y, stop=None, order=None):
        order = torch.arange(len(x)) if order is None else order
        self.batches = [(x[i], y[i]) for i in order.split(10)]
        self.stop = stop

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == self.stop:
                raise Interrupted
            yield batch


def run(net, loader, structure, likelihood, path=None, rule=None):
    generator = torch.Generator().manual_seed(3) if rule is not None else None
    return bgn.laplace(
        models.Network(net, structure=structure), likelihood, loader, rule, generator=generator, progress=False, checkpoint=path
    )


def same(a, b):
    for (k, s), (_, t) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(s, t), k
    assert a.num_data == b.num_data and torch.equal(a.log_evidence(), b.log_evidence())


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("problem, likelihood", [(regression, likelihoods.Gaussian(0.3)), (classification, likelihoods.Categorical())])
def test_resumes_to_the_same_bits(name, problem, likelihood, tmp_path):
    net, x, y = problem()
    path, before = tmp_path / "c.safetensors", snapshot(net)
    whole = run(net, Loader(x, y), ADDITIVE[name], likelihood)
    with pytest.raises(Interrupted):
        run(net, Loader(x, y, stop=2), ADDITIVE[name], likelihood, path)
    assert path.exists()
    assert_same(before, snapshot(net))
    with pytest.raises(Interrupted):  # and again, one batch further
        run(net, Loader(x, y, stop=3), ADDITIVE[name], likelihood, path)
    same(run(net, Loader(x, y), ADDITIVE[name], likelihood, path), whole)
    assert not path.exists()
    same(run(net, Loader(x, y), ADDITIVE[name], likelihood, path), whole)  # without interruption


def test_random_curvature_resumes_where_its_generator_stood(tmp_path):
    net, x, y = classification()
    rule, path = rules.Laplace(rules.MonteCarloFisher(1)), tmp_path / "c"
    whole = run(net, Loader(x, y), ggn.Kron, likelihoods.Categorical(), rule=rule)
    with pytest.raises(Interrupted):
        run(net, Loader(x, y, stop=4), ggn.Kron, likelihoods.Categorical(), path, rule)
    same(run(net, Loader(x, y), ggn.Kron, likelihoods.Categorical(), path, rule), whole)


def test_batches_that_were_added_are_not_linearised_again(tmp_path, monkeypatch):
    net, x, y = regression()
    path = Checkpoint(tmp_path / "c", batches=1)
    with pytest.raises(Interrupted):
        run(net, Loader(x, y, stop=3), ggn.Kron, likelihoods.Gaussian(1.0), path)
    seen = []
    add = ggn.Kron().start([], torch.zeros(())).__class__.add
    monkeypatch.setattr(ggn.block_diagonal.BlockDiagonal, "add", lambda self, factors: (seen.append(factors[0].n), add(self, factors))[1])
    run(net, Loader(x, y), ggn.Kron, likelihoods.Gaussian(1.0), path)
    assert seen == [10]


def test_a_failure_between_writes_goes_on_from_the_last_write(tmp_path, monkeypatch):
    net, x, y = regression()
    whole = run(net, Loader(x, y), ggn.Full, likelihoods.Gaussian(1.0))
    checkpoint = Checkpoint(tmp_path / "c", batches=2)
    bad = y.clone()
    bad[35] = torch.inf
    with pytest.raises(ValueError, match="finite"):  # in the midst of batch 3: batches 0-1 are written, 2 is lost
        run(net, Loader(x, bad), ggn.Full, likelihoods.Gaussian(1.0), checkpoint)
    same(run(net, Loader(x, y), ggn.Full, likelihoods.Gaussian(1.0), tmp_path / "c"), whole)


def test_other_data_or_another_fit_is_refused(tmp_path):
    net, x, y = regression()
    path, gaussian = tmp_path / "c", likelihoods.Gaussian(1.0)
    with pytest.raises(Interrupted):
        run(net, Loader(x, y, stop=2), ggn.Kron, gaussian, path)
    with pytest.raises(ValueError, match="batch 1 is not the one that was added .*another order. Use shuffle=False"):
        run(net, Loader(x, y, order=torch.randperm(40, generator=torch.Generator().manual_seed(0))), ggn.Kron, gaussian, path)
    with pytest.raises(ValueError, match="2 batches were added before the interruption but the loader gave 1 now"):
        run(net, Loader(x[:10], y[:10]), ggn.Kron, gaussian, path)
    with pytest.raises(ValueError, match="belongs to another fit: .*structure: .*Kron.*Full.*Delete it"):
        run(net, Loader(x, y), ggn.Full, gaussian, path)
    with pytest.raises(ValueError, match="belongs to another fit: likelihood"):
        run(net, Loader(x, y), ggn.Kron, likelihoods.Gaussian(2.0), path)
    with torch.no_grad():
        net[0].bias[0] += 1
    with pytest.raises(ValueError, match="belongs to another fit: net"):
        run(net, Loader(x, y), ggn.Kron, gaussian, path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        run(net, Loader(x, y), ggn.Kron, gaussian, path)
    with pytest.raises(ValueError, match="batches=0; expected"):
        Checkpoint(path, batches=0)


def test_structures_of_several_walks_begin_anew_and_say_so(tmp_path, caplog):
    net, x, y = regression()
    whole = run(net, Loader(x, y), ggn.EigenKron, likelihoods.Gaussian(1.0))
    with caplog.at_level(logging.WARNING, "bayesgn.models"), pytest.raises(Interrupted):
        run(net, Loader(x, y, stop=2), ggn.EigenKron, likelihoods.Gaussian(1.0), tmp_path / "c")
    assert "walks the data more than once, so an interrupted fit begins anew" in caplog.text
    assert not (tmp_path / "c").exists()
    same(run(net, Loader(x, y), ggn.EigenKron, likelihoods.Gaussian(1.0), tmp_path / "c"), whole)


def test_a_seeded_shuffle_resumes(tmp_path):
    net, x, y = regression()

    def loader(stop=None):
        data = torch.utils.data.TensorDataset(x, y)
        batches = torch.utils.data.DataLoader(data, 10, shuffle=True, generator=torch.Generator().manual_seed(5))
        return batches if stop is None else Stopping(batches, stop)

    class Stopping:
        def __init__(self, inner, stop):
            self.inner, self.stop, self.walks = inner, stop, 0

        def __iter__(self):
            self.walks += 1
            for i, batch in enumerate(self.inner):
                if i == self.stop:
                    raise Interrupted
                yield batch

    whole = run(net, loader(), ggn.Kron, likelihoods.Gaussian(1.0))
    with pytest.raises(Interrupted):
        run(net, loader(2), ggn.Kron, likelihoods.Gaussian(1.0), tmp_path / "c")
    same(run(net, loader(), ggn.Kron, likelihoods.Gaussian(1.0), tmp_path / "c"), whole)


# -- more data later -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Full", "Layerwise", "Kron", "Diag", "Gram"])
@pytest.mark.parametrize("problem", [regression, classification])
def test_conditioning_twice_is_conditioning_once(name, problem):
    net, x, y = problem()
    first = fit(net, x[:23], y[:23], ADDITIVE[name])
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    both, whole = first.condition((x[23:], y[23:])), fit(net, x, y, ADDITIVE[name])
    assert both.num_data == whole.num_data == len(x) and first.num_data == 23
    torch.testing.assert_close(both.log_evidence(), whole.log_evidence(), rtol=1e-10, atol=1e-10)
    f, g = both(x[:5]), whole(x[:5])
    torch.testing.assert_close(f.covariance_matrix, g.covariance_matrix, rtol=1e-8, atol=1e-10)
    for k, v in first.state_dict().items():
        assert torch.equal(v, kept[k]), k


def test_conditioning_keeps_tuned_hyperparameters_and_refuses_what_cannot_add():
    net, x, y = regression()
    first = fit(net, x[:20], y[:20], ggn.Kron)
    bgn.maximize_evidence(first, progress=False)
    both = first.condition((x[20:], y[20:]))
    assert torch.equal(both.prior.precision, first.prior.precision) and torch.equal(both.likelihood.noise, first.likelihood.noise)
    whole = fit(net, x, y, ggn.Kron)  # H at unit noise, whatever the noise was
    whole.prior.precision = first.prior.precision.item()
    whole.likelihood.noise = first.likelihood.noise.item()
    torch.testing.assert_close(both.log_evidence(), whole.log_evidence())
    both.prior.precision = 7.0
    assert first.prior.precision.item() != 7.0
    with pytest.raises(ValueError, match="EigenKron needs all data"):
        fit(net, x[:20], y[:20], ggn.EigenKron).condition((x[20:], y[20:]))
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(models.StalePosteriorError):
        first.condition((x, y))
