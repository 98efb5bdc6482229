"""What is drawn is read back and compared with what should have been; nothing of pyplot is left behind."""

from __future__ import annotations

import subprocess
import sys

import gpytorch
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.colors import to_rgb
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Poisson, StudentT

import bayesgn as bgn
from bayesgn import metrics, plots


@pytest.fixture(autouse=True)
def pyplot_is_left_alone():
    before, rc = plt.get_fignums(), dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == before and dict(matplotlib.rcParams) == rc


def band(collection):
    """x, lower and upper edge of a fill_between, read from its polygon."""
    vertices = collection.get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    ends = [(vertices[vertices[:, 0] == v, 1].min(), vertices[vertices[:, 0] == v, 1].max()) for v in x]
    return x, *np.array(ends).T


@pytest.mark.parametrize("column", [False, True])
def test_predictive_band(column, generator, float64):
    x = torch.rand(20, generator=generator, dtype=float64)  # not sorted
    shape = (lambda t: t.unsqueeze(-1)) if column else (lambda t: t)
    f = Normal(shape(x.sin()), shape(0.1 + x))
    y = Normal(shape(x.sin()), shape((0.1 + x).square() + 0.25).sqrt())
    ax = plots.predictive_band(shape(x), f, y, data=(shape(x), shape(x + 1)), truth=shape(x.cos()), level=0.9, xlabel="t / s", ylabel="v / mV")
    total, epistemic = (band(c) for c in ax.collections)
    grid = x.sort().values
    z = 1.6448536269514722
    for drawn, sd in ((epistemic, 0.1 + grid), (total, ((0.1 + grid).square() + 0.25).sqrt())):
        np.testing.assert_allclose(drawn[0], grid)
        np.testing.assert_allclose(drawn[1], grid.sin() - z * sd)
        np.testing.assert_allclose(drawn[2], grid.sin() + z * sd)
    mean, truth, data = ax.lines
    np.testing.assert_allclose(mean.get_xydata(), torch.stack([grid, grid.sin()], -1))
    np.testing.assert_allclose(truth.get_ydata(), grid.cos())
    np.testing.assert_allclose(data.get_xydata(), torch.stack([x, x + 1], -1))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("t / s", "v / mV")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["observation, 90 %", "function, 90 %", "mean", "truth", "data"]


def test_predictive_band_of_counts(float64):
    """Quantiles of a log rate go through the link, those of counts are exact."""
    x = torch.linspace(0, 1, 7, dtype=float64)
    f, rate = Normal(x, 0.1 + x), (1 + 5 * x).unsqueeze(-1)
    y = Independent(Poisson(rate), 1)
    ax = plots.predictive_band(x, f, y, level=0.9, response=torch.exp)
    total, epistemic = (band(c) for c in ax.collections)
    z = 1.6448536269514722
    np.testing.assert_allclose(epistemic[1:], [(x - z * (0.1 + x)).exp(), (x + z * (0.1 + x)).exp()])
    np.testing.assert_allclose(total[1:], [scipy.stats.poisson.ppf(p, rate[:, 0]) for p in (0.05, 0.95)])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), x.exp())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["observation, 90 %", "function, 90 %", "median"]


def test_predictive_band_of_anything_else_is_drawn_from_it(float64):
    x = torch.linspace(0, 1, 5, dtype=float64)
    y = StudentT(torch.tensor(4.0, dtype=float64), x, 1 + x)
    before = torch.random.get_rng_state()
    ax = plots.predictive_band(x, None, y, level=0.8)
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = band(ax.collections[0])
    for edge, p in zip(drawn[1:], (0.1, 0.9), strict=True):
        # the standard error of a quantile, √(p q / n) / density
        exact = scipy.stats.t(4, x, 1 + x)
        error = np.sqrt(p * (1 - p) / plots.DRAWS) / exact.pdf(exact.ppf(p))
        assert (np.abs(edge - exact.ppf(p)) < 4 * error).all()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), x)


def test_latent_bands(generator, float64):
    x = torch.rand(9, generator=generator, dtype=float64)
    mean, std = torch.randn(9, 2, generator=generator, dtype=float64), 0.1 + torch.rand(9, 2, generator=generator, dtype=float64)
    ax = plots.latent_bands(x, Normal(mean, std), names=("signal", "noise"), level=0.9, xlabel="t / s")
    order = x.argsort()
    for i, (collection, line) in enumerate(zip(ax.collections, ax.lines, strict=True)):
        grid, low, high = band(collection)
        np.testing.assert_allclose(grid, x[order])
        np.testing.assert_allclose([low, high], [(mean + s * 1.6448536269514722 * std)[order, i] for s in (-1, 1)])
        np.testing.assert_allclose(line.get_ydata(), mean[order, i])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["signal, 90 %", "noise, 90 %"]
    one = plots.latent_bands(x, Normal(mean[:, 0], std[:, 0]))
    np.testing.assert_allclose(one.lines[0].get_ydata(), mean[order, 0])


def process(likelihood, y, latents: int = 1):
    """Its posterior over seven inputs."""
    kernels = [gpytorch.kernels.RBFKernel().double() for _ in range(latents)]
    x = torch.linspace(0, 3, 7, dtype=torch.float64)
    return bgn.bayes_newton(bgn.models.GP(kernels), likelihood, (x, y), bgn.rules.Variational())


def test_posterior_band(float64):
    y = torch.tensor([0.0, 1, 1, 0, 1, 0, 0], dtype=float64)
    at = torch.linspace(-1, 4, 6, dtype=float64)
    counts = process(bgn.likelihoods.Poisson(), y)
    ax = plots.posterior_band(counts, at, level=0.9, xlabel="t / s", ylabel="counts")
    with torch.no_grad():
        f = counts(at)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), f.mean.exp())
    np.testing.assert_allclose(band(ax.collections[1])[1], (f.mean - 1.6448536269514722 * f.stddev).exp())
    np.testing.assert_allclose(ax.lines[1].get_xydata(), np.stack([np.linspace(0, 3, 7), y], -1))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("t / s", "counts")

    labels = process(bgn.likelihoods.Bernoulli(), y)
    ax = plots.posterior_band(labels)
    grid = ax.lines[0].get_xdata()
    np.testing.assert_allclose(grid, np.linspace(-0.3, 3.3, 300))
    with torch.no_grad():
        np.testing.assert_allclose(ax.lines[0].get_ydata(), labels(torch.from_numpy(grid)).mean.sigmoid())
    assert ax.get_ylabel() == "p(y = 1)" and len(ax.collections) == 1

    real = process(bgn.likelihoods.Gaussian(0.1), y)
    assert [t.get_text() for t in plots.posterior_band(real).get_legend().get_texts()] == ["observation, 95 %", "function, 95 %", "mean", "data"]

    noise = process(bgn.likelihoods.HeteroscedasticGaussian(), y, 2)
    ax = plots.posterior_band(noise, at)
    with torch.no_grad():
        np.testing.assert_allclose(ax.lines[0].get_ydata(), noise(at).mean[:, 0])
    assert len(ax.collections) == 1


def predict(x):
    return Categorical(logits=torch.stack([x[:, 0], x[:, 1], 0 * x[:, 0]], -1))


def test_confidence_map_is_the_right_way_up():
    ax = plots.confidence_map(predict, bounds=(-2, 3, -1, 4), resolution=11)
    image = ax.images[0]
    assert image.get_extent() == [-2, 3, -1, 4] and image.origin == "lower"
    drawn = np.asarray(image.get_array())
    for row, column in ((0, 0), (10, 0), (3, 7)):  # row: upwards, column: to the right
        point = torch.tensor([[-2 + 5 * column / 10, -1 + 5 * row / 10]])
        assert drawn[row, column] == pytest.approx(metrics.confidence(predict(point)).item(), rel=1e-6)
    assert image.get_clim() == (pytest.approx(1 / 3), 1)


def test_decision_map_shows_the_class_and_pales_with_doubt(generator):
    x = torch.randn(30, 2, generator=generator)
    y = (x[:, 0] > 0).long()
    model = lambda x: Bernoulli(logits=20 * x[:, :1])  # [n 1], as a net with one output gives it
    ax = plots.decision_map(model, x, y, resolution=51)
    drawn = np.asarray(ax.images[0].get_array())
    left, right = np.array(to_rgb(plots.BLUE)), np.array(to_rgb(plots.ORANGE))
    np.testing.assert_allclose(drawn[25, 0], 1 - 0.75 * (1 - left), atol=1e-6)
    np.testing.assert_allclose(drawn[25, -1], 1 - 0.75 * (1 - right), atol=1e-6)
    flat = plots.decision_map(lambda x: Bernoulli(0.5 + 0 * x[:, 0]), x, resolution=3)
    np.testing.assert_allclose(np.asarray(flat.images[0].get_array()), 1.0)
    points = [line.get_xydata() for line in ax.lines]
    np.testing.assert_allclose(points[0], x[y == 0]), np.testing.assert_allclose(points[1], x[y == 1])
    low, high = x.min(0).values, x.max(0).values
    np.testing.assert_allclose(ax.get_xlim(), [low[0] - (high - low)[0] / 2, high[0] + (high - low)[0] / 2], rtol=1e-6)


def test_a_map_without_an_extent_or_with_three_inputs_is_refused():
    with pytest.raises(ValueError, match="neither data x nor bounds"):
        plots.confidence_map(predict)
    with pytest.raises(ValueError, match=r"\[5, 3\].*two inputs"):
        plots.decision_map(predict, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"\[25, 2, 2\].*one class variable"):
        plots.confidence_map(lambda x: Bernoulli(torch.full((len(x), 2), 0.5)), bounds=(0, 1, 0, 1), resolution=5)


def test_reliability_diagram(generator, float64):
    p = (2 * torch.randn(300, 3, generator=generator, dtype=float64)).softmax(-1)
    target = torch.multinomial(p, 1, generator=generator).squeeze(-1)
    sharp = Categorical(p.square() / p.square().sum(-1, keepdim=True))
    ax = plots.reliability_diagram({"MAP": sharp, "Laplace": Categorical(p)}, target, bins=7)
    diagonal, first, second = ax.lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    for line, y, dots in ((first, sharp, ax.collections[0]), (second, Categorical(p), ax.collections[1])):
        curve = metrics.reliability(y, target, 7)
        filled = curve.count > 0
        np.testing.assert_allclose(line.get_xydata(), torch.stack([curve.confidence, curve.accuracy], -1)[filled])
        np.testing.assert_allclose(dots.get_offsets(), line.get_xydata())
        np.testing.assert_allclose(dots.get_sizes(), 8 + 150 * curve.count[filled] / 300)
    assert ax.get_legend().get_texts()[1].get_text() == f"MAP (ECE {100 * float(metrics.ece(sharp, target, 7)):.1f} %)"


def test_confidence_histogram():
    ax = plots.confidence_histogram(Bernoulli(torch.tensor([0.99, 0.95, 0.02, 1.0])), Bernoulli(torch.tensor([0.5, 0.41])), bins=10)
    inside, outside = (patch.get_data() for patch in ax.patches)
    np.testing.assert_allclose(inside.edges, np.linspace(0, 1, 11))
    np.testing.assert_allclose(inside.values, [0] * 9 + [1])
    np.testing.assert_allclose(outside.values, [0] * 5 + [1] + [0] * 4)
    assert "AUROC 1.000 by confidence" in ax.get_legend().get_texts()[1].get_text()


def test_evidence_trace_marks_the_best():
    nan = float("nan")
    ax = plots.evidence_trace({"full": [-50.0, -20.0, -21.0], "kron": torch.tensor([nan, -40.0, -30.0])}, xlabel="epoch")
    full, dot, kron, other = ax.lines
    np.testing.assert_allclose(full.get_xydata(), [[0, -50], [1, -20], [2, -21]])
    np.testing.assert_allclose(kron.get_ydata(), [nan, -40, -30])
    assert dot.get_xydata().tolist() == [[1, -20]] and other.get_xydata().tolist() == [[2, -30]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "log evidence / nats")
    assert len(plots.evidence_trace([], best=True).lines) == 1, "an empty trace is an empty plot"


def test_eigenvalue_spectrum(generator, float64):
    values = torch.rand(50, generator=generator, dtype=float64)
    ax = plots.eigenvalue_spectrum({"kron": torch.cat([values, torch.zeros(5, dtype=float64)])}, prior_precision=0.3)
    line, prior = ax.lines
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 51))
    np.testing.assert_allclose(line.get_ydata(), values.sort(descending=True).values)
    assert ax.get_xscale() == ax.get_yscale() == "log" and prior.get_ydata()[0] == 0.3
    gamma = (values / (values + 0.3)).sum()
    assert ax.get_legend().get_texts()[0].get_text() == f"kron: 50 of 55 positive, γ = {gamma:.1f}"


def test_a_given_axes_is_drawn_on_and_returned():
    from matplotlib.figure import Figure

    x, y = torch.arange(3.0), Bernoulli(torch.ones(3) / 2)
    for draw in (
        lambda ax: plots.predictive_band(x, Normal(x, 1 + x), ax=ax),
        lambda ax: plots.latent_bands(x, Normal(x, 1 + x), ax=ax),
        lambda ax: plots.evidence_trace([1.0], ax=ax),
        lambda ax: plots.eigenvalue_spectrum(1 + x, ax=ax),
        lambda ax: plots.reliability_diagram(y, torch.ones(3), ax=ax),
        lambda ax: plots.confidence_histogram(y, y, ax=ax),
        lambda ax: plots.decision_map(predict, bounds=(0, 1, 0, 1), resolution=3, ax=ax),
        lambda ax: plots.confidence_map(predict, bounds=(0, 1, 0, 1), resolution=3, ax=ax),
    ):
        given = Figure().subplots()
        assert draw(given) is given


def test_a_figure_of_its_own_can_be_saved(tmp_path):
    ax = plots.evidence_trace([-3.0, -1.0])
    ax.figure.savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: plots.predictive_band(torch.zeros(4, 2), Normal(x, 1 + x)), r"x has shape \[4, 2\]"),
        (lambda x: plots.predictive_band(torch.zeros(5), Normal(x, 1 + x)), r"f has \[3\] values and x has 5 inputs"),
        (lambda x: plots.predictive_band(x, None), "neither f nor y"),
        (lambda x: plots.predictive_band(x, None, Normal(torch.zeros(2), torch.ones(2))), r"y has \[2\] values and x has 3 inputs"),
        (lambda x: plots.latent_bands(x, Normal(torch.zeros(4), torch.ones(4))), r"f has shape \[4\] and x has 3 inputs"),
        (lambda x: plots.latent_bands(x, Normal(x, 1 + x), names=("a", "b")), "2 names for 1 latent functions"),
        (lambda x: plots.eigenvalue_spectrum(torch.eye(2)), r"eigenvalues has shape \[2, 2\]"),
        (lambda x: plots.evidence_trace(torch.eye(2)), r"history has shape \[2, 2\]"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(3.0))


def test_matplotlib_is_imported_on_use():
    code = "import sys, bayesgn.plots as p; print('matplotlib' in sys.modules); "
    code += "p.evidence_trace([1.0]); print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
