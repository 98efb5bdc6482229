"""Mixtures of posteriors: an ensemble of nets, a Gaussian around each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MixtureSameFamily, MultivariateNormal

from bayesgn import metrics
from bayesgn.likelihoods.predictives import PerRow
from bayesgn.models.weight_posterior import WeightPosterior


def mixture(posteriors: Sequence[WeightPosterior], weights: Sequence[float] | Tensor | None = None, by_evidence: bool = False) -> Mixture:
    """A mixture of Laplace approximations: the modes that training from several starts found, each with its Gaussian.

        p(y|x) = Σ_k π_k p_k(y|x),   p_k(y|x) = ∫ p(y|f) N(f; m_k(x), Σ_k(x)) df

    Args:
        posteriors: of nets of one task, each from ``bgn.laplace``; the nets may differ in architecture.
        weights: π, nonnegative; they are normalised. Uniform unless given.
        by_evidence: π_k ∝ p(D | net k), instead. Evidences differ by many nats, so this mostly chooses one of them; all must have seen the
            same data.

    Returns:
        A :class:`Mixture`: ``mixture(x)`` is the predictive, a torch Distribution.

    Raises:
        ValueError, TypeError: for no posteriors, other things than posteriors, weights that cannot be right, or several likelihoods.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> def fit(seed):
        ...     torch.manual_seed(seed)
        ...     net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        ...     return bgn.laplace(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> ensemble = bgn.mixture([fit(0), fit(1)])
        >>> ensemble(x).mean.shape
        torch.Size([20, 1])

    Source: Eschenhagen et al. (2021), "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning".
    """
    posteriors = list(posteriors)
    if not posteriors:
        raise ValueError("posteriors is empty; a mixture needs at least one.")
    for i, p in enumerate(posteriors):
        if not isinstance(p, WeightPosterior):
            raise TypeError(f"posteriors[{i}] is a {type(p).__name__}; expected posteriors of networks, as bgn.laplace gives them.")
    kinds = sorted({type(p.likelihood).__name__ for p in posteriors})
    if len(kinds) > 1:
        raise ValueError(f"the posteriors have likelihoods {kinds}; a mixture is about one kind of target.")
    if by_evidence:
        if weights is not None:
            raise ValueError("weights and by_evidence=True are two ways to weigh; choose one.")
        seen = sorted({p.num_data for p in posteriors})
        if len(seen) > 1:
            raise ValueError(f"the posteriors saw {seen} data; evidences compare only on the same data.")
        log_weights = torch.stack([p.log_evidence().detach().double().cpu() for p in posteriors])
    else:
        w = torch.ones(len(posteriors)) if weights is None else torch.as_tensor(weights)
        w = w.detach().double().cpu()
        if w.shape != (len(posteriors),) or not bool(((w >= 0) & w.isfinite()).all()) or not w.sum() > 0:
            raise ValueError(f"weights {w.tolist()}; expected {len(posteriors)} nonnegative numbers, not all zero, one for each posterior.")
        log_weights = w.log()
    return Mixture(posteriors, log_weights.log_softmax(0))


class Mixture:
    """Posteriors with weights; called with inputs, it answers with the predictive. Made by :func:`mixture`.

    Attributes:
        posteriors: its components.
        log_weights: log π [k], normalised.

    Example:
        >>> from bayesgn import laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.tensor([0, 1]).repeat(10)
        >>> nets = [torch.nn.Linear(1, 2).eval() for _ in range(3)]
        >>> ensemble = mixture([laplace(models.Network(net), likelihoods.Categorical(), (x, y)) for net in nets])
        >>> ensemble.weights
        tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
        >>> ensemble(x).probs.shape, ensemble.sample_outputs(x, 10).shape
        (torch.Size([20, 2]), torch.Size([10, 20, 2]))
    """

    def __init__(self, posteriors: list[WeightPosterior], log_weights: Tensor) -> None:
        self.posteriors, self.log_weights = posteriors, log_weights

    @property
    def weights(self) -> Tensor:
        """π [k]."""
        return self.log_weights.exp()

    def __call__(self, x: Any) -> Distribution:
        """p(y|x): averaged class probabilities for classes; for Gaussian noise a torch ``MixtureSameFamily`` of Gaussians; else a
        :class:`MixtureOf` the predictives."""
        return mix([p.likelihood(p(x)) for p in self.posteriors], self.log_weights)

    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Outputs in weight space under n draws from the mixture [n n_data *positions c]; a component has a binomial number of them."""
        device = "cpu" if generator is None else generator.device
        chosen = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator).cpu()
        parts = [p.sample_outputs(x, int((chosen == k).sum()), generator) for k, p in enumerate(self.posteriors) if bool((chosen == k).any())]
        return torch.cat(parts)

    def log_evidence(self) -> Tensor:
        """log Σ_k p(D | net k) / K: of the ensemble as one model with equal prior odds."""
        values = torch.stack([p.log_evidence().double() for p in self.posteriors])
        return values.logsumexp(0) - torch.log(torch.tensor(float(len(values)), dtype=torch.float64))

    def __repr__(self) -> str:
        return f"Mixture({len(self.posteriors)} posteriors, weights {[round(w, 4) for w in self.weights.tolist()]})"


def mix(predictives: list[Distribution], log_weights: Tensor) -> Distribution:
    """Σ_k π_k p_k as a torch Distribution of the same kind where there is one."""
    first = predictives[0]
    shapes = {(tuple(y.batch_shape), tuple(y.event_shape)) for y in predictives}
    if len(shapes) > 1:
        raise ValueError(f"the predictives have (batch, event) shapes {sorted(shapes)}; the nets must answer the same rows and outputs.")
    if metrics.is_classification(first):
        p = torch.stack([metrics.probabilities(y) for y in predictives])
        p = (log_weights.exp().to(p).reshape(-1, *[1] * (p.dim() - 1)) * p).sum(0)
        return PerRow(Bernoulli(probs=p[..., 1].clamp(0, 1))) if isinstance(first, Independent) else Categorical(probs=p)
    if all(isinstance(y, MultivariateNormal) for y in predictives):
        mean = torch.stack([y.mean for y in predictives], -2)
        L = torch.stack([y.scale_tril for y in predictives], -3)  # type: ignore[attr-defined]
        logits = log_weights.to(mean).expand(*first.batch_shape, -1)
        return MixtureSameFamily(Categorical(logits=logits), MultivariateNormal(mean, scale_tril=L))
    return MixtureOf(predictives, log_weights)


class MixtureOf(Distribution):
    """A mixture of any distributions with the same shapes: density, mean, variance, draws."""

    arg_constraints: dict = {}

    def __init__(self, components: list[Distribution], log_weights: Tensor) -> None:
        self.components, self.log_weights = components, log_weights
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    @property
    def support(self):
        return self.components[0].support

    def log_prob(self, value: Tensor) -> Tensor:
        values = torch.stack([y.log_prob(value) for y in self.components], -1)
        return (values + self.log_weights.to(values)).logsumexp(-1)

    def _average(self, values: list[Tensor]) -> Tensor:
        stacked = torch.stack(values, -1)
        return (stacked * self.log_weights.exp().to(stacked)).sum(-1)

    @property
    def mean(self) -> Tensor:
        return self._average([y.mean for y in self.components])

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return self._average([y.variance + (y.mean - mean).square() for y in self.components])

    def sample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape)
        draws = torch.stack([y.sample(shape) for y in self.components])
        pick = Categorical(logits=self.log_weights).sample(torch.Size((*shape, *self.batch_shape))).to(draws.device)
        pick = pick.reshape(1, *pick.shape, *[1] * len(self.event_shape)).expand(1, *draws.shape[1:])
        return draws.gather(0, pick)[0]
