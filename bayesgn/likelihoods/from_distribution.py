"""A likelihood from any torch Distribution."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, kl_divergence

from .base import Likelihood
from .predictives import PerRow

__all__ = ["FromDistribution"]


def _class_probabilities(p: Distribution) -> Tensor | None:
    """[... c] of a Categorical, whose y is a label and no number; None otherwise."""
    return p.probs if isinstance(p, torch.distributions.Categorical) else None

log = logging.getLogger("bayesgn")


class FromDistribution(Likelihood):
    """p(y | f) given as a function from latents to a torch Distribution; derivatives by autodiff.

    The GGN is the Fisher information, by the first of these that the distribution allows (the log, at INFO, names the one taken):
    1. finite support: Σ_y p(y | f) s sᵀ with the score s = ∂ log p(y | f), exact;
    2. a registered KL divergence: ∂² KL(p_f ‖ p_f') / ∂f'² at f' = f, exact;
    3. the mean of s sᵀ over `samples` draws with a fixed seed (logged as a WARNING, since it is only approximate).

    Args:
        function: f [... c] -> Distribution with batch [...] (or [... d]: d independent outputs), differentiable in f. A plain function or
            an nn.Module, whose parameters are then the likelihood's own.
        samples: draws for the third way.
    Shapes: f [... c], y as the distribution's batch and event together. NaN in y marks the row as missing.
    Raises what `torch.distributions` raises for y outside the support, as ValueError from `validate`.

    >>> from torch.distributions import Normal
    >>> likelihood = FromDistribution(lambda f: Normal(f[..., 0], 2.0))
    >>> likelihood.ggn(torch.zeros(1, 1))
    tensor([[[0.2500]]])

    Source: Kullback (1959), chapter 2, for the Fisher information as the curvature of KL; Martens (2020), "New insights", section 5.
    """

    def __init__(self, function: Callable[[Tensor], Distribution], samples: int = 1000):
        super().__init__()
        self.function = function
        self.samples = int(samples)
        self._told: set[str] = set()

    def _tell(self, level: int, way: str, text: str) -> None:
        if way not in self._told:
            self._told.add(way)
            log.log(level, "FromDistribution: GGN by %s", text)

    def _outputs(self, f: Tensor) -> Distribution:
        p = self.function(f)
        rows = f.shape[:-1]
        if p.batch_shape[: len(rows)] != rows or len(p.batch_shape) > len(rows) + 1:
            raise ValueError(f"FromDistribution: the distribution has batch {list(p.batch_shape)} for f {list(f.shape)}, but should have "
                             f"{list(rows)} (or one more dimension of independent outputs); index the latents as f[..., k]")
        return p

    def conditional(self, f):
        p = self._outputs(f)
        return p if len(p.batch_shape) == f.ndim - 1 else PerRow(p)

    def target_shape(self, f):
        p = self._outputs(f)
        return p.batch_shape + p.event_shape

    def _validate_targets(self, f, y):
        self._refuse_infinite(y)
        missing = y.isnan()
        p = self._outputs(f)
        try:
            support = p.support
        except NotImplementedError:
            return
        if support is None:
            return
        ok = support.check(torch.where(missing, self._draw(f, 0), y) if bool(missing.any()) else y)
        if not bool(ok.all()):
            first = y.reshape(*ok.shape, -1)[~ok][0].tolist()
            raise ValueError(f"FromDistribution: y contains {first} ({int((~ok).sum())} of {ok.numel()} values like it) but the support is "
                             f"{support}; mark missing targets as NaN or choose another distribution")

    def _draw(self, f: Tensor, seed: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Draws with a seed, torch's own random state left as it was."""
        with torch.no_grad(), torch.random.fork_rng([f.device] if f.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._outputs(f).sample(torch.Size(shape))

    def _observed(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rows observed [...], and y with draws in the place of what is missing."""
        y = self.targets(f, y)
        missing = y.isnan()
        if y.device.type == "meta" or not bool(missing.any()):
            return torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device), y
        return ~missing.reshape(*f.shape[:-1], -1).any(-1), torch.where(missing, self._draw(f, 0), y)

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        value = self._outputs(f).log_prob(y)
        return value if value.ndim == f.ndim - 1 else value.sum(-1)

    def log_prob(self, f, y):
        observed, y = self._observed(f, y)
        return torch.where(observed, self._log_prob(f, y), 0.0)

    @staticmethod
    def _derive(function: Callable[[Tensor], Tensor], f: Tensor, order: int) -> Tensor:
        """∂ or ∂² of each row's function value [...] in that row's latents [... c]; in f's graph where f is in one."""
        keep = f.requires_grad and torch.is_grad_enabled()
        with torch.enable_grad():
            x = f if keep else f.detach().requires_grad_()
            (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=keep or order == 2, materialize_grads=True)
            if order == 1:
                return g
            columns = [torch.autograd.grad(g[..., k].sum(), x, create_graph=keep, retain_graph=True, materialize_grads=True)[0]
                       if g.requires_grad else torch.zeros_like(x) for k in range(f.shape[-1])]
        return torch.stack(columns, -1)

    def gradient(self, f, y):
        observed, y = self._observed(f, y)
        return torch.where(observed.unsqueeze(-1), self._derive(lambda x: self._log_prob(x, y), f, 1), 0.0)

    def neg_hessian(self, f, y):
        observed, y = self._observed(f, y)
        return torch.where(observed[..., None, None], -self._derive(lambda x: self._log_prob(x, y), f, 2), 0.0)

    def ggn(self, f, y=None):
        fisher = self._fisher(f)
        return fisher if y is None else torch.where(self._observed(f, y)[0][..., None, None], fisher, 0.0)

    def _fisher(self, f: Tensor) -> Tensor:
        p = self._outputs(f)
        if p.has_enumerate_support:
            try:
                support = p.enumerate_support()
            except NotImplementedError:                                  # cardinalities that differ, or dependent outputs
                support = None
            if support is not None:
                self._tell(logging.INFO, "enumerate", f"enumeration of {len(support)} values")
                return self._from_scores(p, support, f)
        rows = f.ndim - 1
        try:
            if isinstance(p.base_dist if isinstance(p, Independent) else p, Laplace):
                raise NotImplementedError                                # its KL has a kink where p_f' = p_f: autodiff finds no curvature there
            with torch.no_grad():
                kl_divergence(p, p)
        except NotImplementedError:
            self._tell(logging.WARNING, "sample", f"Monte Carlo with {self.samples} draws, approximate: {type(p).__name__} has neither finite "
                       "support nor a smooth registered KL divergence; register one by torch.distributions.kl.register_kl for an exact GGN")
            y = self._draw(f, 0, (self.samples,))
            score = self._derive(lambda x: self._log_prob(x, y), f.expand(self.samples, *f.shape), 1)
            return torch.einsum("s...i,s...j->...ij", score, score) / self.samples
        self._tell(logging.INFO, "kl", f"the curvature of the registered KL divergence of {type(p).__name__}")
        still = self._outputs(f.detach())

        def divergence(x):
            value = kl_divergence(still, self._outputs(x))
            return value if value.ndim == rows else value.sum(-1)

        return self._derive(divergence, f, 2)

    def _from_scores(self, p: Distribution, support: Tensor, f: Tensor) -> Tensor:
        """Σ_y p(y | f) s sᵀ, for each independent output by itself (the scores of different outputs are uncorrelated)."""
        several = len(p.batch_shape) == f.ndim
        fisher = f.new_zeros(*f.shape, f.shape[-1])
        for y in support:
            for k in range(p.batch_shape[-1] if several else 1):
                def log_p(x, y=y, k=k):
                    value = self._outputs(x).log_prob(y)
                    return value[..., k] if several else value

                score = self._derive(log_p, f, 1)
                fisher = fisher + log_p(f).exp()[..., None, None] * score.unsqueeze(-1) * score.unsqueeze(-2)
        return fisher

    def sample(self, f, generator=None):
        if generator is None:
            with torch.no_grad():
                return self._outputs(f).sample()
        return self._draw(f, int(torch.randint(2**62, (), generator=generator, device=generator.device)))

    def moments(self, f):
        p = self._outputs(f)
        probs = _class_probabilities(p)
        if probs is not None:
            return probs, probs * (1 - probs)
        return p.mean, p.variance

    def observed(self, f, y):
        return self._observed(f, y)[0]

    def response(self, f, y):
        """y as [... d]: a single number gets a dimension, a Categorical's label becomes one-hot."""
        observed, y = self._observed(f, y)
        p = self._outputs(f)
        probs = _class_probabilities(p)
        if probs is not None and len(p.batch_shape) < f.ndim:
            y = torch.nn.functional.one_hot(y.long(), probs.shape[-1])
        y = y.reshape(*f.shape[:-1], -1).to(f)
        return torch.where(observed.unsqueeze(-1), y, torch.nan)

    def conditional_moments(self, f):
        p = self._outputs(f)
        rows = f.shape[:-1]
        probs = _class_probabilities(p)
        if probs is not None and p.batch_shape == rows:
            return probs, torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
        if probs is not None or len(p.event_shape) > 1:
            raise NotImplementedError(f"FromDistribution: no covariance of y under {p}; a vector of numbers for each row, or one label, has one")
        if p.batch_shape == rows and p.event_shape and not isinstance(p, Independent):
            cov = getattr(p, "covariance_matrix", None)
            if cov is None:
                raise NotImplementedError(f"FromDistribution: {type(p).__name__} has no covariance_matrix, which E and Cov of y given f need; "
                                          "give the distribution such a property")
            return p.mean, cov
        return p.mean.reshape(*rows, -1), torch.diag_embed(p.variance.reshape(*rows, -1))

    def arguments(self):
        return {"function": self.function, "samples": self.samples}

    def to_config(self):
        raise TypeError(f"FromDistribution: a function ({self.function!r}) cannot be written to a safe file; save the likelihood's state_dict() "
                        "and rebuild it in code, FromDistribution(function)")
