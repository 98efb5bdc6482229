"""How good predictive distributions are: likelihood, calibration, coverage and out-of-distribution detection.

Every function takes a predictive `Distribution` p(y|x), as `likelihood(posterior(x))` gives it, and targets y of shape batch + event. Classification:
Categorical (y [...] of class numbers) and Bernoulli (y of 0 and 1). Regression: Normal, MultivariateNormal and their mixtures. Scores are means over
the entries of the batch shape and come back as scalar tensors; `summary` goes over batches. The calibration error and the AUROC are torchmetrics',
which is imported on the first call (some seconds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from bayesgn._extras import quiet_import

# -- reading a distribution --------------------------------------------------------------------------------------------------------------------------


def _innermost(y: Distribution) -> Distribution:
    while isinstance(y, Independent):
        y = y.base_dist
    return y


def is_classification(y: Distribution) -> bool:
    """Whether y is a distribution over classes (Categorical, Bernoulli or a mixture of them).

    Example:
        >>> is_classification(Bernoulli(torch.tensor([0.2]))), is_classification(Normal(0.0, 1.0))
        (True, False)
    """
    inner = _innermost(y)
    if isinstance(inner, MixtureSameFamily):
        inner = _innermost(inner.component_distribution)
    return isinstance(inner, (Categorical, Bernoulli))


def probabilities(y: Distribution) -> Tensor:
    """The class probabilities p [... k] of a Categorical, or [1 − p, p] of each entry of a Bernoulli; mixtures are averaged.

    Example:
        >>> probabilities(Bernoulli(torch.tensor([0.25])))
        tensor([[0.7500, 0.2500]])
    """
    inner = _innermost(y)
    if isinstance(inner, Categorical):
        p = inner.probs
    elif isinstance(inner, Bernoulli):
        p = torch.stack([1 - inner.probs, inner.probs], -1)
    elif isinstance(inner, MixtureSameFamily) and is_classification(inner):
        component = _innermost(inner.component_distribution)
        if isinstance(component, Categorical):
            p = (inner.mixture_distribution.probs.unsqueeze(-1) * component.probs).sum(-2)
        else:
            p = torch.stack([1 - inner.mean, inner.mean], -1)
    else:
        raise TypeError(f"{type(inner).__name__} has no class probabilities; expected a Categorical or a Bernoulli predictive")
    if not p.isfinite().all():
        raise ValueError(f"{int((~p.isfinite()).sum())} of {p.numel()} predicted probabilities are NaN or infinite; look at the net's output there")
    return p


class _Gaussians(NamedTuple):
    # The marginals of any Gaussian predictive as mixtures of s normals: weight, mean, std, each [batch, event, s].
    weight: Tensor
    mean: Tensor
    std: Tensor

    def cdf(self, value: Tensor) -> Tensor:
        return (self.weight * torch.special.ndtr((value.unsqueeze(-1) - self.mean) / self.std)).sum(-1)


def _gaussians(y: Distribution) -> _Gaussians | None:
    inner = _innermost(y)
    if isinstance(inner, (Normal, MultivariateNormal)) or hasattr(inner, "lazy_covariance_matrix"):
        mean, std = inner.mean.unsqueeze(-1), inner.variance.sqrt().unsqueeze(-1)
        return _Gaussians(torch.ones_like(mean), mean, std)
    if isinstance(inner, MixtureSameFamily):
        components = inner.component_distribution
        if isinstance(_innermost(components), (Normal, MultivariateNormal)):
            at, events = len(inner.batch_shape), len(components.event_shape)
            weight = inner.mixture_distribution.probs
            weight = weight.reshape(*weight.shape[:-1], *[1] * events, weight.shape[-1])
            mean, std = (t.movedim(at, -1) for t in (components.mean, components.variance.sqrt()))
            return _Gaussians(weight.expand_as(mean), mean, std)
    return None


def _marginal(y: Distribution) -> Distribution:
    # gpytorch's Gaussians are joint over data, event [n] or [n c]; scores are about the marginal of each datum.
    if hasattr(y, "lazy_covariance_matrix"):
        return Independent(Normal(y.mean, y.variance.sqrt()), y.mean.ndim - 1)
    return y


def _check(y: Distribution, target: Tensor) -> None:
    expected = [*y.batch_shape, *y.event_shape]
    if list(target.shape) != expected:
        hint = "; use target.unsqueeze(-1) for a single output" if [*target.shape, 1] == expected else ""
        raise ValueError(f"the targets have shape {list(target.shape)} and the predictive distribution has {expected}{hint}")
    if target.numel() == 0:
        raise ValueError("there are no targets: a score of nothing is undefined")
    if not target.isfinite().all():
        raise ValueError(
            f"{int((~target.isfinite()).sum())} of {target.numel()} targets are NaN or infinite; leave missing targets out before scoring"
        )


def _classes(y: Distribution, target: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    # p [m k], labels [m], log p(label) [m] with one row an entry that is not ignored.
    p = probabilities(y)
    _check(y, target)
    k, labels = p.shape[-1], target.long()
    if (labels != target).any():
        raise ValueError(f"class labels are whole numbers; the targets hold {float(target[labels != target].flatten()[0])}")
    keep = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    p, kept = p[keep], labels[keep]
    if kept.numel() == 0:
        raise ValueError(f"every target is ignore_index = {ignore_index}: a score of nothing is undefined")
    if kept.min() < 0 or kept.max() >= k:
        raise ValueError(
            f"the labels go from {int(kept.min())} to {int(kept.max())} and the predictive has {k} classes (0 to {k - 1}); "
            "pass ignore_index= for a label that marks rows to leave out"
        )
    inner = _innermost(y)
    if isinstance(inner, Categorical) and inner._param is inner.__dict__.get("logits"):
        log_p = inner.logits[keep].gather(-1, kept.unsqueeze(-1)).squeeze(-1)
    elif isinstance(inner, Bernoulli) and inner._param is inner.__dict__.get("logits"):
        log_p = torch.nn.functional.logsigmoid(torch.where(kept.bool(), inner.logits[keep], -inner.logits[keep]))
    elif isinstance(inner, Bernoulli):
        log_p = torch.where(kept.bool(), inner.probs[keep].log(), torch.log1p(-inner.probs[keep]))
    else:
        # torch's `log_prob` would raise a probability below 1e-7 to 1e-7; a sure and wrong answer costs what it costs.
        log_p = p.gather(-1, kept.unsqueeze(-1)).squeeze(-1).log()
    return p, kept, log_p


# -- classification ----------------------------------------------------------------------------------------------------------------------------------


def nll(y: Distribution, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """The negative log predictive density, −(1/n) Σ log p(y_n | x_n), in nats an entry of the batch shape (for densities: of y's unit).

    Example:
        >>> nll(Categorical(torch.tensor([[0.5, 0.5], [0.9, 0.1]])), torch.tensor([0, 0]))
        tensor(0.3993)
    """
    if is_classification(y):
        return -_classes(y, target, ignore_index)[2].mean()
    _check(y, target)
    return -_marginal(y).log_prob(target).mean()


def accuracy(y: Distribution, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """The fraction of entries whose most probable class is the target.

    Example:
        >>> accuracy(Categorical(torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.1, 0.0]])), torch.tensor([0, 1]))
        tensor(0.5000)
    """
    p, labels, _ = _classes(y, target, ignore_index)
    return (p.argmax(-1) == labels).to(p.dtype).mean()


def brier(y: Distribution, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """The Brier score: the mean of Σ_k (p_k − [y = k])², in [0, 2], for a Categorical; of (p − y)², in [0, 1], for a Bernoulli.

    Example:
        >>> brier(Categorical(torch.tensor([[0.8, 0.2]])), torch.tensor([0])), brier(Bernoulli(torch.tensor([0.2])), torch.tensor([0.0]))
        (tensor(0.0800), tensor(0.0400))
    """
    p, labels, _ = _classes(y, target, ignore_index)
    return _brier_terms(y, p, labels).mean()


def _brier_terms(y: Distribution, p: Tensor, labels: Tensor) -> Tensor:
    if not y.event_shape and _is_categorical(y):
        return (p - torch.nn.functional.one_hot(labels, p.shape[-1])).square().sum(-1)
    return (p[..., 1] - labels).square()


def _is_categorical(y: Distribution) -> bool:
    inner = _innermost(y)
    return isinstance(_innermost(inner.component_distribution) if isinstance(inner, MixtureSameFamily) else inner, Categorical)


class Reliability(NamedTuple):
    """What a reliability diagram draws: mean confidence, accuracy and count of each bin of confidence, each [bins] (NaN where a bin is empty)."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability(y: Distribution, target: Tensor, bins: int = 15, ignore_index: int | None = None) -> Reliability:
    """Accuracy against confidence max_k p_k, in equal bins [i/bins, (i+1)/bins) of which the last includes 1.

    Example:
        >>> reliability(Categorical(torch.tensor([[0.7, 0.3], [0.9, 0.1]])), torch.tensor([1, 0]), bins=2).accuracy
        tensor([   nan, 0.5000], dtype=torch.float64)
    """
    confidence, correct = _confidences(*_classes(y, target, ignore_index)[:2])
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)
    sums = [torch.zeros_like(edges[:-1]).index_add_(0, index, v) for v in (confidence, correct, torch.ones_like(confidence))]
    return Reliability(sums[0] / sums[2], sums[1] / sums[2], sums[2])


def _confidences(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, chosen = _host(p).max(-1)
    return confidence, (chosen == labels.cpu()).double()


def _host(t: Tensor) -> Tensor:
    # Sums over many data in float64, which not every device has.
    return t.detach().to("cpu", torch.float64)


def _calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    with quiet_import():
        from torchmetrics.functional.classification import binary_calibration_error

    # torchmetrics gives a confidence of exactly 1 a bin of its own, and takes anything above 1 (a rounding) as a sign to squash all of them.
    confidence = confidence.clamp(0, 1 - 2**-53)
    return binary_calibration_error(confidence, correct.long(), n_bins=bins, norm="l1")


def ece(y: Distribution, target: Tensor, bins: int = 15, ignore_index: int | None = None) -> Tensor:
    """The expected calibration error of the most probable class: Σ_bins (count/n) |accuracy − confidence|, a fraction (torchmetrics, l1 norm).

    Example:
        >>> ece(Categorical(torch.tensor([[0.7, 0.3], [0.9, 0.1]])), torch.tensor([1, 0]), bins=2)  # |0.5 − 0.8|
        tensor(0.3000, dtype=torch.float64)
    """
    return _calibration_error(*_confidences(*_classes(y, target, ignore_index)[:2]), bins)


def confidence(y: Distribution) -> Tensor:
    """max_k p_k of every entry [...].

    Example:
        >>> confidence(Categorical(torch.tensor([[0.7, 0.3]])))
        tensor([0.7000])
    """
    return probabilities(y).max(-1).values


def entropy(y: Distribution) -> Tensor:
    """−Σ_k p_k log p_k of every entry [...], in nats: an uncertainty, large where the classes are equally probable.

    Example:
        >>> entropy(Categorical(torch.tensor([[0.5, 0.5], [1.0, 0.0]])))
        tensor([0.6931, 0.0000])
    """
    p = probabilities(y)
    return torch.special.entr(p).sum(-1)


def auroc_ood(uncertainty_in: Tensor, uncertainty_out: Tensor) -> Tensor:
    """How well an uncertainty tells out-of-distribution inputs: P(out > in) + ½ P(out = in), 1 for perfect, ½ for none (torchmetrics).

    Args:
        uncertainty_in: a score of each in-distribution input, such as `entropy(y)`, `1 - confidence(y)` or a variance; any scale. Another score
            is another AUROC: say by which.
        uncertainty_out: the same score of each out-of-distribution input.

    Example:
        >>> auroc_ood(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.8, 1.5])).item()
        0.8333
    """
    with quiet_import():
        from torchmetrics.functional.classification import binary_auroc

    parts = [_host(part).flatten() for part in (uncertainty_in, uncertainty_out)]
    for name, part in zip(("in-distribution", "out-of-distribution"), parts):
        if part.numel() == 0:
            raise ValueError(f"there are no {name} scores; the AUROC compares two groups")
        if part.isnan().any():
            raise ValueError(f"{int(part.isnan().sum())} of {part.numel()} {name} scores are NaN")
    scores = torch.cat(parts)
    label = torch.cat([torch.zeros(len(parts[0])), torch.ones(len(parts[1]))]).long()
    # Only the order counts: ranks in [0, 1], because torchmetrics squashes other scores by a sigmoid, which ties the large ones.
    values, rank = scores.unique(return_inverse=True)
    return binary_auroc(rank.double() / max(len(values) - 1, 1), label)


# -- regression --------------------------------------------------------------------------------------------------------------------------------------


def rmse(y: Distribution, target: Tensor) -> Tensor:
    """√ mean (E[y|x] − y)², in the unit of y.

    Example:
        >>> rmse(Normal(torch.zeros(2), torch.ones(2)), torch.tensor([3.0, 4.0]))
        tensor(3.5355)
    """
    _check(y, target)
    return (y.mean - target).square().mean().sqrt()


def pit(y: Distribution, target: Tensor) -> Tensor:
    """The probability integral transform F(y_n | x_n) of each scalar target: uniform on [0, 1] when the predictive is calibrated.

    Example:
        >>> pit(Normal(torch.zeros(2), torch.ones(2)), torch.tensor([0.0, 1.645]))
        tensor([0.5000, 0.9500])
    """
    _check(y, target)
    gaussians, inner = _gaussians(y), _innermost(y)
    try:
        return inner.cdf(target) if gaussians is None else gaussians.cdf(target)
    except NotImplementedError:
        raise TypeError(f"torch gives {type(inner).__name__} no cdf, so neither coverage nor pit can be had from it") from None


def coverage(y: Distribution, target: Tensor, level: float = 0.95) -> Tensor:
    """The fraction of scalar targets inside their central interval of probability `level` (PICP); equals `level` when calibrated.

    Example:
        >>> coverage(Normal(torch.zeros(4), torch.ones(4)), torch.tensor([0.0, -1.9, 2.0, 1.0]))
        tensor(0.7500)
    """
    _check_level(level)
    u = pit(y, target)
    return ((2 * u - 1).abs() <= level).to(u.dtype).mean()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.95")


def interval(y: Distribution, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The central interval (lower, upper) that holds each scalar target with probability `level`, in the unit of y.

    Example:
        >>> lower, upper = interval(Normal(torch.zeros(1), torch.ones(1)), 0.95)
        >>> upper
        tensor([1.9600])
    """
    _check_level(level)
    g = _gaussians(y)
    if g is None:
        raise TypeError(f"interval needs a Gaussian predictive or a mixture of Gaussians; this is a {type(_innermost(y)).__name__}")
    ends = []
    for probability in ((1 - level) / 2, (1 + level) / 2):
        z = torch.special.ndtri(torch.as_tensor(probability, dtype=g.mean.dtype, device=g.mean.device))
        # The quantile of a mixture lies between those of its components; one component needs no bisection.
        low, high = (g.mean + z * g.std).aminmax(dim=-1)
        for _ in range(60 if g.mean.shape[-1] > 1 else 0):
            middle = (low + high) / 2
            below = g.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        ends.append((low + high) / 2)
    return ends[0], ends[1]


def crps(y: Distribution, target: Tensor) -> Tensor:
    """The continuous ranked probability score, mean of ∫ (F(z) − [z ≥ y])² dz, in the unit of y; for Gaussians and their mixtures.

    With A(m, s²) = E|N(m, s²)| = 2 s φ(m/s) + m (2Φ(m/s) − 1):   Σ_i w_i A(y − μ_i, σ_i²) − ½ Σ_ij w_i w_j A(μ_i − μ_j, σ_i² + σ_j²).
    Source: Grimit, Gneiting, Berrocal & Johnson (2006), The continuous ranked probability score for circular variables, eq. for normal mixtures.

    Example:
        >>> crps(Normal(torch.zeros(1), torch.ones(1)), torch.zeros(1))  # (√2 − 1) / √π
        tensor(0.2337)
    """
    _check(y, target)
    return _crps_terms(y, target).mean()


def _crps_terms(y: Distribution, target: Tensor) -> Tensor:
    g = _gaussians(y)
    if g is None:
        raise TypeError(f"crps needs a Gaussian predictive or a mixture of Gaussians; this is a {type(_innermost(y)).__name__}")
    first = (g.weight * _mean_abs(target.unsqueeze(-1) - g.mean, g.std)).sum(-1)
    spread = torch.zeros_like(first)
    for i in range(g.mean.shape[-1]):  # one row of the double sum at a time, so that memory stays [n s]
        row = _mean_abs(g.mean[..., i : i + 1] - g.mean, (g.std[..., i : i + 1].square() + g.std.square()).sqrt())
        spread += g.weight[..., i] * (g.weight * row).sum(-1)
    return first - spread / 2


def _mean_abs(mean: Tensor, std: Tensor) -> Tensor:
    z = mean / std
    return 2 * std * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) + mean * torch.erf(z / math.sqrt(2))


# -- over batches ------------------------------------------------------------------------------------------------------------------------------------


def summary(
    pairs: Iterable[tuple[Distribution, Tensor]],
    ood: Iterable[Distribution] | None = None,
    bins: int = 15,
    level: float = 0.95,
    ignore_index: int | None = None,
) -> dict[str, float]:
    """All scores over batches, as numbers: n, nll, accuracy, ece and brier for classes; n, nll, rmse for real
    targets, with crps and coverage where the predictive is Gaussian or a mixture of Gaussians.

    Equal to the scores of all batches at once, whatever the batch sizes. With `ood`, predictives of out-of-distribution inputs, also auroc_ood: by
    the entropy for classes, by the summed predictive variance for real targets.

    Example:
        >>> y, target = Categorical(torch.tensor([[0.5, 0.5], [0.9, 0.1]])), torch.tensor([0, 0])
        >>> scores = summary([(y, target), (y, target)])
        >>> scores["n"], round(scores["nll"], 4)
        (4, 0.3993)
    """
    totals: dict[str, float] = {}
    kept: dict[str, list[Tensor]] = {"confidence": [], "correct": [], "uncertainty": []}
    n = entries = 0
    classes = None
    for y, target in pairs:
        if classes is None:
            classes = is_classification(y)
        elif classes != is_classification(y):
            raise ValueError("the batches mix distributions over classes with others; a summary is about one likelihood")
        with torch.no_grad():
            kept["uncertainty"].append(_uncertainty(y))
            if classes:
                p, labels, log_p = _classes(y, target, ignore_index)
                sure, correct = _confidences(p, labels)
                kept["confidence"].append(sure)
                kept["correct"].append(correct)
                terms = {"nll": -log_p, "accuracy": correct, "brier": _brier_terms(y, p, labels)}
                rows = scalars = len(labels)
            else:
                y = _marginal(y)
                rows, scalars = math.prod(y.batch_shape), target.numel()
                terms = {"nll": nll(y, target) * rows, "rmse": rmse(y, target).square() * scalars}
                if _gaussians(y) is not None:
                    terms |= {"crps": _crps_terms(y, target), "coverage": coverage(y, target, level) * scalars}
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + float(_host(term).sum())
        n, entries = n + rows, entries + scalars
    if classes is None:
        raise ValueError("there were no batches to score; was a generator consumed before, or is the loader empty?")
    scores = {"n": n} | {name: total / (n if name == "nll" else entries) for name, total in totals.items()}
    if classes:
        scores["ece"] = float(_calibration_error(torch.cat(kept["confidence"]), torch.cat(kept["correct"]), bins))
    else:
        scores["rmse"] = math.sqrt(scores["rmse"])
    if ood is not None:
        out = [_uncertainty(y) for y in ood]
        scores["auroc_ood"] = float(auroc_ood(torch.cat(kept["uncertainty"]), torch.cat(out) if out else torch.empty(0)))
    order = ("n", "nll", "accuracy", "ece", "brier", "rmse", "crps", "coverage", "auroc_ood")
    return {name: scores[name] for name in order if name in scores}


def _uncertainty(y: Distribution) -> Tensor:
    if is_classification(y):
        return _host(entropy(y)).flatten()
    y = _marginal(y)
    return _host(y.variance).reshape(math.prod(y.batch_shape), -1).sum(-1)
