"""All 27 nonlinear regressions of NIST's Statistical Reference Datasets, from both starts, with default arguments, to the certified digits.

Digits are the log relative error, −log10 |found − certified| / |certified|, of the worst parameter; the certificates carry eleven.
"""

from __future__ import annotations

import math

import pytest
import torch

from bayesgn import datasets, optim

SMALL = ("Misra1a", "BoxBOD", "DanWood", "MGH10", "Rat42", "Rat43")  # what stands in the package, for machines without a data folder


def digits(found: torch.Tensor, certified: torch.Tensor) -> float:
    return -math.log10(max(float(((found - certified) / certified).abs().max()), 1e-16))


def problem(name: str) -> datasets.NonlinearRegression:
    try:
        return datasets.nist(name)
    except datasets.DatasetUnavailable as error:
        if datasets.folders():
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("start", [0, 1], ids=["start1", "start2"])
@pytest.mark.parametrize("name", datasets.NIST)
def test_certified_digits(name, start):
    p = problem(name)
    before = p.starts.clone()
    fit = optim.least_squares(p.residuals, p.starts[start])
    assert fit.success, fit
    assert digits(fit.x, p.certified) > 9, fit
    # The residuals of Lanczos1 are 1e-14 of its data: float64 tells three digits of their size, and so of everything scaled by it.
    rounding = name == "Lanczos1"
    assert digits(fit.standard_errors, p.standard_errors) > (2.5 if rounding else 8.5)
    assert fit.noise**0.5 == pytest.approx(p.noise_std, rel=1e-2 if rounding else 1e-8)
    assert 2 * fit.cost == pytest.approx(p.sum_of_squares, rel=2e-2 if rounding else 1e-9)
    torch.testing.assert_close(fit.covariance.diagonal().sqrt(), fit.standard_errors)
    assert torch.equal(p.starts, before)


DAMPINGS = [optim.LevenbergMarquardt(1e-3, smallest=1e-60), optim.TrustRegion(1.0), optim.Dogleg(1.0)]


@pytest.mark.parametrize("damping", DAMPINGS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("name", SMALL)
def test_every_damping_from_the_second_start(name, damping):
    p = problem(name)
    fit = optim.least_squares(p.residuals, p.starts[1], damping=damping, acceleration=optim.Straight())
    assert fit.success and digits(fit.x, p.certified) > 8, fit


@pytest.mark.parametrize("name", SMALL)
def test_the_small_problems_are_those_of_the_files(name, monkeypatch):
    found = problem(name)
    monkeypatch.setattr(datasets.lookup, "folders", list)
    small = datasets.nist(name)
    assert small.source != found.source or found.source == "the published definition"
    for a, b in zip(small, found, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a is small.source


@pytest.mark.parametrize("name", datasets.NIST)
def test_the_curves_are_right(name):
    """At the certified parameters the residuals have the certified sum, and the certified standard deviations follow from J."""
    p = problem(name)
    r = p.residuals(p.certified)
    if name == "Lanczos1":  # eleven digits of the parameters are not enough for residuals of 1e-13
        assert float(r.abs().max()) < 1e-10
        return
    assert float(r.square().sum()) == pytest.approx(p.sum_of_squares, rel=1e-9)
    J = torch.func.jacrev(p.residuals)(p.certified)
    unit = J / J.norm(dim=0)
    variance = p.noise_std**2 * torch.linalg.inv(unit.T @ unit).diagonal() / J.square().sum(0)
    assert digits(variance.sqrt(), p.standard_errors) > 4
    n, k = J.shape
    assert p.noise_std**2 * (n - k) == pytest.approx(p.sum_of_squares, rel=1e-9)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="no NIST problem is called 'misra'; expected one of Bennett5, BoxBOD"):
        datasets.nist("misra")


def test_missing_files_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(datasets.lookup, "folders", list)
    with pytest.raises(datasets.DatasetUnavailable, match="itl.nist.gov"):
        datasets.nist("Thurber")
