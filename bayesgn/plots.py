"""Figures: predictive bands, decision and confidence maps, reliability, evidence traces, spectra.

Every function draws on the Axes it is given and returns it. With `ax=None` it makes a figure of its own that pyplot does not know, so nothing is left
open: `ax.figure.savefig("band.png")` writes it, and a notebook shows `ax.figure`. matplotlib is imported on the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesgn import metrics
from bayesgn._canvas import BLUE, CYCLE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, array, axes, finish
from bayesgn.kernel_plots import gp_bars, gp_image, kernel_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "RED", "SKY", "confidence_histogram", "confidence_map", "decision_map", "eigenvalue_spectrum",
    "evidence_trace", "gp_bars", "gp_image", "kernel_matrix", "latent_bands", "posterior_band", "predictive_band", "reliability_diagram",
]  # fmt: skip


def _column(x: Tensor, what: str) -> Tensor:
    x = torch.as_tensor(x).detach()
    if x.ndim == 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 1:
        raise ValueError(f"{what} has shape {list(x.shape)}; expected [n] or [n 1], one real number a datum")
    return x


def predictive_band(
    x: Tensor,
    f: Distribution | None,
    y: Distribution | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    truth: Tensor | None = None,
    level: float = 0.95,
    xlabel: str = "x",
    ylabel: str = "y",
    ax: Axes | None = None,
    response: Callable[[Tensor], Tensor] | None = None,
) -> Axes:
    """A regression's mean with its central intervals: of the function (epistemic) inside that of the observations (total).

    Args:
        x: inputs [n] or [n 1], in any order.
        f: the distribution of the function values at x, as `posterior(x)` gives it, one output; None draws the observations alone.
        y: the predictive of the observations, `likelihood(f)`: adds the outer band. For counts and other non-Gaussian predictives too.
        data: observations (x [m], y [m]) to draw as points.
        truth: the true function at x, where it is known.
        xlabel, ylabel: axis labels; give the units ("time after impact / ms").
        response: a monotone function from f to the scale of y, `torch.exp` for a log rate: it maps quantiles to quantiles, so that the middle
            line is the median.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> f = torch.distributions.Normal(x, 0.1 + 0 * x)
        >>> predictive_band(x, f, xlabel="time / ms", ylabel="acceleration / g").get_xlabel()
        'time / ms'
    """
    ax = axes(ax)
    x = _column(x, "x")
    order = x.argsort()
    grid = array(x[order])
    at = lambda t: array(_column(t, "the predictive")[order])
    if f is None and y is None:
        raise ValueError("neither f nor y was given; the figure needs posterior(x), likelihood(posterior(x)), or both")
    centre = f if f is not None else y
    assert centre is not None
    if centre.mean.numel() != len(x):
        which = "f" if f is not None else "y"
        raise ValueError(f"{which} has {list(centre.mean.shape)} values and x has {len(x)} inputs; expected one output an input")
    percent = f"{100 * level:g} %"
    if y is not None:
        lower, upper = _interval(y, level)
        ax.fill_between(grid, at(lower), at(upper), color=BLUE, alpha=0.15, linewidth=0, label=f"observation, {percent}")
    onto = response if response is not None else lambda t: t
    if f is not None:
        ends = [at(onto(t)) for t in metrics.interval(f, level)]
        ax.fill_between(grid, ends[0], ends[1], color=BLUE, alpha=0.35, linewidth=0, label=f"function, {percent}")
        ax.plot(grid, at(onto(f.mean)), color=BLUE, label="mean" if response is None else "median")
    else:
        ax.plot(grid, at(centre.mean), color=BLUE, label="mean")
    if truth is not None:
        ax.plot(grid, at(truth), color=GREY, linestyle="--", linewidth=1, label="truth")
    if data is not None:
        ax.plot(array(_column(data[0], "data x")), array(_column(data[1], "data y")), "k.", markersize=3, label="data")
    return finish(ax, xlabel, ylabel)


DRAWS, COUNTS = 10_000, 2**22  # for the quantiles of a predictive that is neither Gaussian nor a count; rows × counts of one that is


def _interval(y: Distribution, level: float) -> tuple[Tensor, Tensor]:
    """The central interval of any scalar predictive: in closed form, by summing over counts, or from draws with a seed of their own."""
    try:
        return metrics.interval(y, level)
    except TypeError:
        pass
    tails = (1 - level) / 2, (1 + level) / 2
    mean, spread = y.mean.detach(), y.variance.detach().sqrt()
    # A count's probabilities are summed up to where the rest is no more than rounding.
    top = float((mean + 12 * spread + 20).nan_to_num(posinf=torch.inf).max())
    if _counts(y) and top * mean.numel() < COUNTS:
        k = torch.arange(int(top) + 1, device=mean.device, dtype=mean.dtype)
        log_p = y.log_prob(k.reshape(-1, *[1] * mean.ndim).expand(-1, *mean.shape)).detach()
        cdf = log_p.reshape(len(k), -1).exp().cumsum(0).reshape(len(k), *mean.shape)
        low, high = ((cdf < p - 1e-9).sum(0).to(k) for p in tails)
        return low, high
    with torch.random.fork_rng([mean.device] if mean.device.type == "cuda" else []):
        torch.manual_seed(0)
        draws = y.sample(torch.Size([DRAWS]))
    low, high = torch.quantile(draws.to(torch.float64), torch.tensor(tails, dtype=torch.float64, device=draws.device), dim=0)
    return low, high


def _counts(y: Distribution) -> bool:
    support: Any = y.support
    inner = getattr(support, "base_constraint", support)
    return bool(getattr(inner, "is_discrete", False))


def latent_bands(
    x: Tensor,
    f: Distribution,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    xlabel: str = "x",
    ylabel: str = "latent functions",
    ax: Axes | None = None,
) -> Axes:
    """Several latent functions of one input, each with its mean and central interval.

    Args:
        x: inputs [n] or [n 1], in any order.
        f: their joint Gaussian at x, [n] or [n c], as `posterior(x)` gives it.
        names: for the legend, one a latent.

    Example:
        >>> f = torch.distributions.Normal(torch.zeros(5, 2), torch.ones(5, 2))
        >>> len(latent_bands(torch.arange(5.0), f, names=("signal", "log noise")).lines)
        2
    """
    ax = axes(ax)
    x = _column(x, "x")
    mean = f.mean.detach().reshape(len(x), -1) if f.mean.numel() % max(len(x), 1) == 0 else f.mean
    if mean.ndim != 2 or len(mean) != len(x):
        raise ValueError(f"f has shape {list(f.mean.shape)} and x has {len(x)} inputs; expected [n] or [n c]")
    std = f.variance.detach().clamp_min(0).sqrt().reshape(mean.shape)
    named = [f"f{i + 1}" for i in range(mean.shape[1])] if names is None else list(names)
    if len(named) != mean.shape[1]:
        raise ValueError(f"{len(named)} names for {mean.shape[1]} latent functions")
    order, width = x.argsort(), float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    for i, (name, colour) in enumerate(zip(named, CYCLE * len(named))):
        m, w = array(mean[order, i]), width * array(std[order, i])
        ax.fill_between(array(x[order]), m - w, m + w, color=colour, alpha=0.2, linewidth=0)
        ax.plot(array(x[order]), m, color=colour, label=f"{name}, {100 * level:g} %")
    return finish(ax, xlabel, ylabel)


def posterior_band(
    posterior: Any,
    x: Tensor | None = None,
    level: float = 0.95,
    xlabel: str = "x",
    ylabel: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A Gaussian process of one input in one call: its data, the band of what is expected of y, and that of y itself.

    With one latent function, f is drawn on the scale of y, as E[y | f] (the rate of counts, the probability of a label). With several, y is drawn
    alone; :func:`latent_bands` shows them.

    Args:
        posterior: from `bgn.bayes_newton`, over one input.
        x: where to draw it; 300 points over the data and a tenth beyond unless given.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> t = torch.linspace(0, 5, 30); counts = torch.poisson(torch.exp(torch.sin(t)))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> posterior = bgn.bayes_newton(bgn.models.MarkovGP(kernel), bgn.likelihoods.Poisson(), (t, counts))
        >>> [text.get_text() for text in posterior_band(posterior, xlabel="time / s", ylabel="counts").get_legend().get_texts()]
        ['observation, 95 %', 'function, 95 %', 'median', 'data']
    """
    seen = posterior.inputs.x
    if seen.shape[-1] != 1:
        raise ValueError(f"the posterior's inputs have {seen.shape[-1]} columns; this figure is about one input")
    if x is None:
        low, high = float(seen.min()), float(seen.max())
        pad = 0.1 * (high - low or 1.0)
        x = torch.linspace(low - pad, high + pad, 300, dtype=seen.dtype, device=seen.device)
    likelihood = posterior.likelihood
    with torch.no_grad():
        f = posterior(x)
        y = likelihood(f)
        label = metrics.is_classification(y)
        if label and f.mean.numel() != len(x):
            raise ValueError("a classification with several latent functions has no single curve; draw latent_bands(x, posterior(x))")
        several = f.mean.numel() != len(x)
        response: Any = lambda t: likelihood.moments(t.reshape(-1, 1))[0].reshape(-1)
        if several or torch.equal(response(f.mean), f.mean):
            response = None
        return predictive_band(
            x, None if several else f, None if label else y, (seen, posterior.y), level=level, xlabel=xlabel,
            ylabel=ylabel if ylabel is not None else ("p(y = 1)" if label else "y"), ax=ax, response=response,
        )  # fmt: skip


# -- maps over two inputs ----------------------------------------------------------------------------------------------------------------------------


def _grid(
    x: Tensor | None, bounds: tuple[float, float, float, float] | None, resolution: int
) -> tuple[Tensor, tuple[float, float, float, float]]:
    if bounds is None:
        if x is None:
            raise ValueError("neither data x nor bounds=(x0, x1, y0, y1) were given; the map needs one of them to know its extent")
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"x has shape {list(x.shape)}; a map needs two inputs a datum, [n 2]")
        low, high = x.min(0).values, x.max(0).values
        pad = 0.5 * (high - low)  # beyond the data, where confidence should fall
        (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
        bounds = (left, right, bottom, top)
    like = {} if x is None else {"dtype": x.dtype, "device": x.device}
    across = torch.linspace(bounds[0], bounds[1], resolution, **like)
    up = torch.linspace(bounds[2], bounds[3], resolution, **like)
    # Row i of the image is the i-th value upwards, so `origin="lower"`.
    return torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 2), bounds


def _map_probabilities(predict: Callable[[Tensor], Distribution], points: Tensor, resolution: int) -> Tensor:
    with torch.no_grad():
        p = torch.cat([metrics.probabilities(predict(part)) for part in points.split(4096)])
    if p.ndim == 3 and p.shape[1] == 1:  # a Bernoulli with one output, [n 1]
        p = p[:, 0]
    if p.ndim != 2:
        raise ValueError(f"the predictive has probabilities of shape {list(p.shape)}; a map draws one class variable, [n k]")
    return p.reshape(resolution, resolution, -1).cpu()


def _scatter(ax: Axes, x: Tensor | None, y: Tensor | None) -> None:
    if x is None:
        return
    labels = torch.zeros(len(x)) if y is None else y.flatten()
    for k in labels.unique():
        part = array(x[labels == k])
        name = None if y is None else f"class {int(k)}"
        colour = GREY if y is None else CYCLE[int(k) % len(CYCLE)]
        ax.plot(part[:, 0], part[:, 1], "o", color=colour, markersize=4, markeredgecolor="black", markeredgewidth=0.4, label=name)


def confidence_map(
    predict: Callable[[Tensor], Distribution],
    x: Tensor | None = None,
    y: Tensor | None = None,
    bounds: tuple[float, float, float, float] | None = None,
    resolution: int = 100,
    xlabel: str = "input 1",
    ylabel: str = "input 2",
    ax: Axes | None = None,
) -> Axes:
    """The confidence max_k p(y = k | x) over a plane of two inputs, with the data on it: where does the model know that it does not know?

    Args:
        predict: inputs [m 2] to a predictive over classes, such as `lambda x: posterior.likelihood(posterior(x))`.
        x, y: data to draw, [n 2] and class numbers [n]; x also sets the extent unless `bounds` does.
        bounds: (left, right, bottom, top).
        resolution: points along each side.

    Example:
        >>> predict = lambda x: torch.distributions.Bernoulli(logits=x[:, 0])
        >>> confidence_map(predict, bounds=(-1, 1, -1, 1), resolution=5).images[0].get_array().shape
        (5, 5)
    """
    ax = axes(ax, (5.0, 4.0))
    points, bounds = _grid(x, bounds, resolution)
    p = _map_probabilities(predict, points, resolution)
    k = p.shape[-1]
    image = ax.imshow(array(p.max(-1).values), extent=bounds, origin="lower", aspect="auto", cmap="cividis", vmin=1 / k, vmax=1)
    ax.figure.colorbar(image, ax=ax, label="confidence")
    _scatter(ax, x, y)
    ax.set(xlim=bounds[:2], ylim=bounds[2:])
    return finish(ax, xlabel, ylabel)


def decision_map(
    predict: Callable[[Tensor], Distribution],
    x: Tensor | None = None,
    y: Tensor | None = None,
    bounds: tuple[float, float, float, float] | None = None,
    resolution: int = 100,
    xlabel: str = "input 1",
    ylabel: str = "input 2",
    ax: Axes | None = None,
) -> Axes:
    """The most probable class over a plane of two inputs, in a colour that pales to white as the confidence falls to 1/k.

    Arguments as for `confidence_map`.

    Example:
        >>> predict = lambda x: torch.distributions.Bernoulli(logits=x[:, 0])
        >>> decision_map(predict, bounds=(-1, 1, -1, 1), resolution=5).images[0].get_array().shape
        (5, 5, 3)
    """
    from matplotlib.colors import to_rgb

    ax = axes(ax, (4.5, 4.0))
    points, bounds = _grid(x, bounds, resolution)
    p = _map_probabilities(predict, points, resolution)
    k = p.shape[-1]
    sure, chosen = p.double().max(-1)
    strength = 0.75 * ((sure - 1 / k) / (1 - 1 / k)).clamp(0, 1).unsqueeze(-1)
    colours = torch.tensor([to_rgb(CYCLE[i % len(CYCLE)]) for i in range(k)], dtype=torch.float64)
    ax.imshow(array(1 - strength * (1 - colours[chosen])), extent=bounds, origin="lower", aspect="auto", interpolation="nearest")
    _scatter(ax, x, y)
    ax.set(xlim=bounds[:2], ylim=bounds[2:])
    return finish(ax, xlabel, ylabel)


# -- calibration -------------------------------------------------------------------------------------------------------------------------------------


def reliability_diagram(
    predictions: Mapping[str, Distribution] | Distribution,
    target: Tensor,
    bins: int = 15,
    ignore_index: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against confidence: on the diagonal is calibrated, below it overconfident. The area of a marker is the share of data in its bin.

    Args:
        predictions: a predictive over classes, or several by name ({"MAP": …, "Laplace": …}); the legend gives each one's ECE in the same bins.
        target: class numbers.

    Example:
        >>> y = torch.distributions.Categorical(torch.tensor([[0.7, 0.3], [0.9, 0.1]]))
        >>> reliability_diagram(y, torch.tensor([1, 0]), bins=2).get_xlabel()
        'confidence'
    """
    ax = axes(ax, (4.0, 4.0))
    named = {"": predictions} if isinstance(predictions, Distribution) else predictions
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    for (name, y), colour in zip(named.items(), CYCLE * len(named)):
        curve = metrics.reliability(y, target, bins, ignore_index)
        share = curve.count / curve.count.sum()
        error = float((share * (curve.accuracy - curve.confidence).abs()).nansum())
        filled = curve.count > 0
        across, up = array(curve.confidence[filled]), array(curve.accuracy[filled])
        label = f"{name} (ECE {100 * error:.1f} %)".strip()
        ax.plot(across, up, color=colour, linewidth=1.2, label=label)
        ax.scatter(across, up, s=8 + 150 * array(share[filled]), color=colour, alpha=0.7, linewidths=0)
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    return finish(ax, "confidence", "accuracy")


def confidence_histogram(
    in_distribution: Distribution, out_of_distribution: Distribution, bins: int = 20, title: str = "", ax: Axes | None = None
) -> Axes:
    """How confident the predictive is on inputs of the training kind and on others, as fractions of each group in equal bins of max_k p_k.

    The legend gives the AUROC by the confidence, of 1 − max_k p_k; ``metrics.summary`` and ``bgn.compare`` give another one, by the entropy.

    Example:
        >>> y = torch.distributions.Bernoulli(torch.tensor([0.9, 0.1, 0.5]))
        >>> len(confidence_histogram(y, y, bins=4).patches)
        2
    """
    ax = axes(ax)
    groups = [metrics.confidence(y).flatten().double() for y in (in_distribution, out_of_distribution)]
    auroc = float(metrics.auroc_ood(*(1 - group for group in groups)))
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    for group, colour, label in zip(groups, (BLUE, ORANGE), ("in distribution", f"out of distribution\n(AUROC {auroc:.3f} by confidence)")):
        share = torch.histc(group.cpu().clamp(0, 1), bins, 0, 1) / group.numel()
        ax.stairs(array(share), array(edges), color=colour, fill=True, alpha=0.5, label=label)
    ax.set(xlim=(0, 1), title=title)
    return finish(ax, "confidence", "fraction of inputs")


# -- evidence and curvature --------------------------------------------------------------------------------------------------------------------------


def evidence_trace(
    history: Mapping[str, Sequence[float]] | Sequence[float], xlabel: str = "step", best: bool = True, ax: Axes | None = None
) -> Axes:
    """The log evidence, in nats, step by step; a dot marks the best one.

    Args:
        history: the values of one run, or of several by name.

    Example:
        >>> evidence_trace([-30.0, -12.0, -11.5]).get_ylabel()
        'log evidence / nats'
    """
    ax = axes(ax)
    named = history if isinstance(history, Mapping) else {"": history}
    for (name, values), colour in zip(named.items(), CYCLE * len(named)):
        values = _column(torch.as_tensor(values, dtype=torch.float64), "history")
        ax.plot(range(len(values)), array(values), color=colour, label=name or None)
        finite = values.nan_to_num(nan=-torch.inf)
        if best and len(values) and finite.max().isfinite():
            at = int(finite.argmax())
            ax.plot([at], [float(values[at])], "o", color=colour, markersize=5)
    return finish(ax, xlabel, "log evidence / nats")


def eigenvalue_spectrum(
    eigenvalues: Mapping[str, Tensor] | Tensor, prior_precision: float | None = None, ax: Axes | None = None
) -> Axes:
    """The eigenvalues λ of the curvature H, largest first, on logarithmic axes, against the prior precision δ.

    What lies above the line was learnt from the data: the legend gives the effective number of parameters γ = Σ λ / (λ + δ) (MacKay 1992, eq. 4.7).
    Eigenvalues that are zero or negative (rounding) have no place on a logarithmic axis and are left out; the legend counts those that are drawn.

    Args:
        eigenvalues: [p] in any order, or several by name.
        prior_precision: δ, an inverse variance.

    Example:
        >>> ax = eigenvalue_spectrum(torch.tensor([1.0, 100.0, 0.0]), prior_precision=1.0)
        >>> ax.get_legend_handles_labels()[1]
        ['2 of 3 positive, γ = 1.5', 'prior precision']
    """
    ax = axes(ax)
    named = {"": eigenvalues} if isinstance(eigenvalues, Tensor) else eigenvalues
    for (name, values), colour in zip(named.items(), CYCLE * len(named)):
        values = _column(values, "eigenvalues").double()
        drawn = values[values > 0].sort(descending=True).values
        label = f"{name}: " if name else ""
        label += f"{len(drawn)} of {len(values)} positive"
        if prior_precision is not None:
            label += f", γ = {float((drawn / (drawn + prior_precision)).sum()):.1f}"
        ax.plot(range(1, len(drawn) + 1), array(drawn), color=colour, marker=".", markersize=3, linewidth=1, label=label)
    if prior_precision is not None:
        ax.axhline(prior_precision, color=GREY, linestyle="--", linewidth=1, label="prior precision")
    ax.set(xscale="log", yscale="log")
    return finish(ax, "rank", "eigenvalue of H")
