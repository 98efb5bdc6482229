"""Any likelihood behind a link: p(y | g(f))."""

from __future__ import annotations

import torch

from .base import Likelihood
from .links import Link
from .predictives import mixture, scalar_nodes

__all__ = ["Linked"]


class Linked(Likelihood):
    """p(y | f) = base(y | g(f)), the link g acting on each latent: `Linked(Gaussian(0.1), Softplus())` has a positive mean.

    With base's gradient b, negative Hessian H and Fisher F at g(f):   ∂ = g' ∘ b,   −∂² = diag(g') H diag(g') − diag(g'' ∘ b),
    Fisher = diag(g') F diag(g').

    Args:
        base: a likelihood.
        link: a smooth function of one latent: `Softplus()`, `Exp(rate)`, `LogSoftplus()` …
    Shapes: those of base. The predictive is a mixture over nodes.

    >>> from bayesgn.likelihoods import Gaussian, Softplus
    >>> likelihood = Linked(Gaussian(0.5), Softplus())
    >>> likelihood.ggn(torch.zeros(1, 1))  # σ(0)² / 0.5
    tensor([[[0.5000]]], grad_fn=<MulBackward0>)
    """

    def __init__(self, base: Likelihood, link: Link):
        super().__init__()
        if not isinstance(base, Likelihood):
            raise TypeError(f"Linked: base is {base!r} but should be a likelihood such as Gaussian()")
        if not isinstance(link, Link):
            raise TypeError(f"Linked: link is {link!r} but should be a link such as Softplus() or Exp()")
        self.base, self.link = base, link

    def rows(self, output):
        return self.base.rows(output)

    def target_shape(self, f):
        return self.base.target_shape(f)

    def latents_for(self, d):
        return self.base.latents_for(d)

    def targets(self, f, y):
        return self.base.targets(f, y)

    def _validate_targets(self, f, y):
        self.base.validate_targets(f, y)

    def conditional(self, f):
        return self.base.conditional(self.link(f))

    def log_prob(self, f, y):
        return self.base.log_prob(self.link(f), y)

    def gradient(self, f, y):
        return self.link.slope(f) * self.base.gradient(self.link(f), y)

    def neg_hessian(self, f, y):
        g, slope = self.link(f), self.link.slope(f)
        bend = torch.diag_embed(self.link.bend(f) * self.base.gradient(g, y))
        return slope.unsqueeze(-1) * self.base.neg_hessian(g, y) * slope.unsqueeze(-2) - bend

    def ggn(self, f, y=None):
        slope = self.link.slope(f)
        return slope.unsqueeze(-1) * self.base.ggn(self.link(f), y) * slope.unsqueeze(-2)

    def ggn_root(self, f, y=None):
        return self.link.slope(f).unsqueeze(-1) * self.base.ggn_root(self.link(f), y)

    def sample(self, f, generator=None):
        return self.base.sample(self.link(f), generator)

    def moments(self, f):
        return self.base.moments(self.link(f))

    def response(self, f, y):
        return self.base.response(f, y)

    def conditional_moments(self, f):
        return self.base.conditional_moments(self.link(f))

    def statistics(self, f, y):
        return self.base.statistics(self.link(f), y)

    def log_prob_of(self, statistics):
        return self.base.log_prob_of(statistics)

    def ggn_scale(self):
        return self.base.ggn_scale()

    def predict(self, mean, cov):
        if mean.shape[-1] > 1:
            return super().predict(mean, cov)
        # One latent: nodes as close as p(y | f) is wide.
        width = cov[..., 0].clamp_min(0).sqrt()
        with torch.no_grad():
            fisher = torch.stack([self.ggn(mean + k * width)[..., 0] for k in (-3, 0, 3)]).amax(0)
        nodes, log_weights = scalar_nodes(mean, width, fisher.sqrt() * width)          # [q ... 1], [... 1 q]
        return mixture(self.conditional(nodes.movedim(0, -2)), log_weights.squeeze(-2))

    def arguments(self):
        return {"base": self.base, "link": self.link}
