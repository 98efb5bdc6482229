"""Temperature: logits divided by one number that is fitted on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesgn import metrics
from bayesgn.likelihoods import marginals

RANGE = (0.02, 50.0)


class Tempered:
    """A likelihood whose latent values are divided by a temperature first: p(y | f / T).

    T > 1 makes predictions less sure, T < 1 more; the most probable class stays. Use it in the place of the likelihood:
    ``tempered(posterior(x))``, ``tempered.conditional(f)``.

    Attributes:
        likelihood, temperature: what it is made of.

    Example:
        >>> from bayesgn.likelihoods import Categorical
        >>> Tempered(Categorical(), 2.0).conditional(torch.tensor([[2.0, 0.0]])).probs  # softmax(1, 0)
        tensor([[0.7311, 0.2689]])
    """

    def __init__(self, likelihood, temperature: float) -> None:
        if not (0 < temperature < math.inf):
            raise ValueError(f"temperature={temperature}; expected a positive number, 1.0 for none.")
        self.likelihood, self.temperature = likelihood, float(temperature)

    def __call__(self, f) -> Distribution:
        """The predictive for a Gaussian f or samples [s n *positions c]."""
        if isinstance(f, Tensor):
            return self.likelihood(f / self.temperature)
        return self.predict(*marginals(f))

    def predict(self, mean: Tensor, cov: Tensor) -> Distribution:
        """The predictive for f ~ N(mean [... c], cov [... c c])."""
        return self.likelihood.predict(mean / self.temperature, cov / self.temperature**2)

    def conditional(self, f: Tensor) -> Distribution:
        """p(y | f / T) for latent values [... c]."""
        return self.likelihood.conditional(f / self.temperature)

    def __repr__(self) -> str:
        return f"Tempered({self.likelihood}, temperature={self.temperature:.4g})"


def fit_temperature(likelihood, f, y: Tensor) -> Tempered:
    """The temperature with the least negative log predictive density on held-out data: MAP + temperature, for a net's own logits.

        T = argmin_T −Σ_n log p(y_n | f_n / T)

    Args:
        likelihood: over classes (``Categorical``, ``Bernoulli``).
        f: the net's logits [n *positions c] on held-out data (``posterior(x).mean`` or ``net(x)``), or a Gaussian ``posterior(x)``, whose
            covariance is then divided by T².
        y: their targets.

    Returns:
        A :class:`Tempered` likelihood, to be used in the place of ``likelihood``.

    Raises:
        ValueError: for a likelihood that is not over classes.

    Example:
        >>> import torch
        >>> from bayesgn.likelihoods import Categorical
        >>> f = torch.tensor([[4.0, 0.0]]).expand(4, 2); y = torch.tensor([0, 0, 0, 1])  # right three times in four
        >>> round(fit_temperature(Categorical(), f, y).temperature, 3)  # 4 / log 3
        3.641

    Source: Guo et al. (2017), "On calibration of modern neural networks", section 4.2.
    """
    with torch.no_grad():
        gaussian = not isinstance(f, Tensor)
        mean, cov = (t.double() for t in marginals(f)) if gaussian else (f.detach().double(), None)
        target = likelihood.targets(mean, y.to(mean.device))
        first = likelihood.conditional(mean[:1])
        if not metrics.is_classification(first):
            raise ValueError(
                f"a temperature divides logits, and {type(likelihood).__name__} is not over classes; tune its noise with "
                "bgn.maximize_evidence(posterior) instead."
            )

        def loss(log_T: float) -> float:
            tempered = Tempered(likelihood, math.exp(log_T))
            y = tempered.conditional(mean) if cov is None else tempered.predict(mean, cov)
            return score(likelihood, y, target)

        log_T, _ = golden_section(loss, math.log(RANGE[0]), math.log(RANGE[1]), 1e-4)
    return Tempered(likelihood, math.exp(log_T))


def score(likelihood, y: Distribution, target: Tensor, metric: Callable = metrics.nll) -> float:
    """A metric of a predictive, without the rows that the likelihood ignores."""
    ignore = getattr(likelihood, "ignore_index", None)
    if ignore is not None and bool((target == ignore).any()):
        return float(metric(y, target, ignore_index=ignore))
    return float(metric(y, target))


def golden_section(function: Callable[[float], float], low: float, high: float, tol: float) -> tuple[float, float]:
    """(x, function(x)) at the least value of a unimodal function in [low, high], to within ``tol`` (Kiefer 1953)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = low, high
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at = {x: function(x) for x in (c, d)}
    while b - a > tol:
        if at[c] <= at[d]:
            b, d = d, c
            c = b - ratio * (b - a)
            at[c] = function(c)
        else:
            a, c = c, d
            d = a + ratio * (b - a)
            at[d] = function(d)
    best = min(at, key=at.__getitem__)
    return best, at[best]
