"""The table's numbers against scikit-learn and plain loops."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from bayesgn.inference import fit_temperature

from .problems import assert_same, classification, fit, regression, snapshot


def ece_by_hand(p: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    confidence, right = p.max(-1), p.argmax(-1) == y
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(abs(right[which == b].mean() - confidence[which == b].mean()) * (which == b).mean() for b in set(which))


def by_hand(p, y, q) -> dict[str, float]:
    """Scores of probabilities p for labels y, with those of elsewhere q."""
    p, q, y = (np.asarray(t.detach()) for t in (p, q, y))
    onehot = np.eye(p.shape[1])[y]
    entropy = [-(r * np.log(np.maximum(r, 1e-300))).sum(-1) for r in (p, q)]
    return {
        "n": len(y),
        "nll": sk.log_loss(y, p, labels=range(p.shape[1])),
        "accuracy": sk.accuracy_score(y, p.argmax(-1)),
        "brier": ((p - onehot) ** 2).sum(-1).mean(),
        "ece": ece_by_hand(p, y),
        "auroc_ood": sk.roc_auc_score(np.r_[np.zeros(len(p)), np.ones(len(q))], np.concatenate(entropy)),
    }


@pytest.fixture
def task():
    net, x, y = classification(steps=400)
    return net, fit(net, x, y, ggn.Kron), classification(n=80, seed=3)[1:], 4 * classification(n=30, seed=4)[1]


def test_classes_by_hand(task):
    net, posterior, (xv, yv), away = task
    before = snapshot(net)
    batches = [(xv[i], yv[i]) for i in torch.arange(80).split(33)]  # of odd sizes: halves count over batches
    table = bgn.compare(posterior, batches, ood=away, samples=8, generator=torch.Generator().manual_seed(2), warn=False)
    assert_same(before, snapshot(net))
    f, g, even = net(xv).detach(), net(away).detach(), slice(0, None, 2)
    T = fit_temperature(likelihoods.Categorical(), f[1::2], yv[1::2]).temperature
    assert table.temperature == pytest.approx(T)
    draws = [posterior.sample_outputs(x, 8, torch.Generator().manual_seed(2)).softmax(-1).mean(0) for x in (xv, away)]
    expected = {
        "MAP": (f.softmax(-1), g.softmax(-1)),
        "MAP + temperature": ((f / T).softmax(-1), (g / T).softmax(-1)),
        "posterior": tuple(posterior.likelihood(posterior(x)).probs for x in (xv, away)),
        "posterior, weight space": tuple(draws),
    }
    assert list(table.rows) == list(expected)
    for name, (p, q) in expected.items():
        hand = by_hand(p[even], yv[even], q)
        assert set(table.rows[name]) == set(hand)
        for score, value in hand.items():
            assert table.rows[name][score] == pytest.approx(value, abs=1e-6), (name, score)


def test_temperature_data_leaves_all_rows_to_be_scored(task):
    net, posterior, (xv, yv), _ = task
    other = classification(n=50, seed=9)[1:]
    table = bgn.compare(posterior, (xv, yv), temperature_data=other, warn=False)
    assert table.rows["MAP"]["n"] == 80 and "fitted on 50 others" in table.note
    T = fit_temperature(likelihoods.Categorical(), net(other[0]).detach(), other[1]).temperature
    assert table.temperature == pytest.approx(T)
    assert table.rows["MAP + temperature"]["nll"] == pytest.approx(sk.log_loss(yv, (net(xv).detach() / T).softmax(-1)), abs=1e-9)


def test_regression_by_hand():
    net, x, y = regression()
    posterior = fit(net, x, y, ggn.Full, likelihood=likelihoods.Gaussian(torch.tensor(0.09, dtype=torch.float64)))
    xv = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    yv = net(xv).detach() + 0.3 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    table = bgn.compare(posterior, (xv, yv), ood=[xv * 5], warn=False)
    assert list(table.rows) == ["MAP", "posterior"] and table.temperature is None
    mean, cov = posterior(xv).marginals()
    noisy = cov + 0.09 * torch.eye(2, dtype=torch.float64)
    from scipy.stats import multivariate_normal, norm

    nll = {
        "MAP": -np.mean([multivariate_normal.logpdf(a, b, 0.09 * np.eye(2)) for a, b in zip(yv, mean, strict=True)]),
        "posterior": -np.mean([multivariate_normal.logpdf(a, b, S) for a, b, S in zip(yv, mean, noisy, strict=True)]),
    }
    sd = noisy.diagonal(dim1=-2, dim2=-1).sqrt()
    z = ((yv - mean) / sd).numpy()
    crps = (sd.numpy() * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))).mean()
    for name, value in nll.items():
        assert table.rows[name]["nll"] == pytest.approx(value, abs=1e-9)
        assert table.rows[name]["rmse"] == pytest.approx(sk.root_mean_squared_error(yv.flatten(), mean.flatten()), abs=1e-9)
    assert table.rows["posterior"]["crps"] == pytest.approx(crps, abs=1e-9)
    assert table.rows["posterior"]["coverage"] == pytest.approx((abs(z) <= norm.ppf(0.975)).mean())
    var_out = posterior(xv * 5).variance
    scores = [noisy.diagonal(dim1=-2, dim2=-1).sum(-1), (var_out + 0.09).sum(-1)]
    auroc = sk.roc_auc_score([0] * 50 + [1] * 50, torch.cat(scores))
    assert table.rows["posterior"]["auroc_ood"] == pytest.approx(auroc) and table.rows["MAP"]["auroc_ood"] == pytest.approx(0.5)


def test_a_losing_posterior_is_said():
    net, x, y = classification(steps=40)
    posterior, (xv, yv) = fit(net, x, y, ggn.Kron), classification(n=80, seed=3)[1:]
    posterior.prior.precision = 1e-6  # far too uncertain
    with pytest.warns(UserWarning, match=r"loses to MAP: NLL .* > .*bgn.tune.*loses to MAP \+ temperature"):
        table = bgn.compare(posterior, (xv, yv))
    assert len(table.losses) == 2
    posterior.prior.precision = 1e12  # MAP itself: not worse than MAP
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = bgn.compare(posterior, (xv, yv))
    assert not any("loses to MAP:" in loss for loss in table.losses)
    for score in ("nll", "ece"):
        assert table.rows["posterior"][score] == pytest.approx(table.rows["MAP"][score], abs=1e-6)


def test_the_table_reads_and_serialises(task):
    _, posterior, (xv, yv), away = task
    table = bgn.compare(posterior, (xv, yv), ood=away, warn=False)
    lines = str(table).splitlines()
    assert lines[0].split() == ["NLL", "accuracy", "ECE", "Brier", "AUROC-OOD"]
    assert lines[1].startswith("MAP ") and f"{table.rows['MAP']['nll']:.4f}" in lines[1]
    assert all("*" in "".join(line[line.index(".") :] for line in lines[1:4]) for _ in [0]) and str(table) == repr(table)
    assert json.loads(json.dumps(table.to_dict()))["rows"] == table.rows


def test_forms_of_ood_and_refusals(task):
    net, posterior, (xv, yv), away = task
    forms = [away, [away[:10], away[10:]], [(away[:10],), (away[10:],)], (away, yv[:30]), [(away, yv[:30])],
             torch.utils.data.TensorDataset(away, yv[:30])]  # fmt: skip
    values = [bgn.compare(posterior, (xv, yv), ood=form, warn=False).rows["posterior"]["auroc_ood"] for form in forms]
    assert values == pytest.approx([values[0]] * len(values))
    with pytest.raises(ValueError, match="data hold 1 datum; half of them fit the temperature"):
        bgn.compare(posterior, (xv[:1], yv[:1]))
    with pytest.raises(ValueError, match="no batch"):
        bgn.compare(posterior, [])
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        bgn.compare(posterior, (xv, yv + 1))
    before = snapshot(net)
    with pytest.raises(ValueError, match="non-finite"):
        bgn.compare(posterior, (xv * torch.nan, yv))
    assert_same(before, snapshot(net))


def test_tuned_then_compared_is_not_worse_than_map():
    net, x, y = classification(steps=400)
    posterior, held = fit(net, x, y, ggn.Diag, models.WeightPrior(1e-3)), classification(n=100, seed=5)[1:]
    bgn.tune(posterior, held, progress=False)
    table = bgn.compare(posterior, held, temperature_data=held, warn=False)
    assert table.rows["posterior"]["nll"] <= table.rows["MAP"]["nll"] + 0.01
