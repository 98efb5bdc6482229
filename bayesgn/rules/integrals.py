"""log p(y | f) integrated over a belief, by cubature: value and slope in one walk over the data, in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import Cubature
from bayesgn.rules.sites import Marginals

PIECE = 2**16  # nodes × data × latents at once on a CPU: half a megabyte, where larger pieces wait for memory
LARGE = 2**24  # elsewhere


def spread(y: Tensor, f: Tensor) -> Tensor:
    """y for each of the nodes f [q n c]."""
    return y.expand(f.shape[0], *y.shape)


def pieces(f: Tensor) -> Iterator[slice]:
    """Rows of f [q n c] that are worked on together."""
    rows = max(1, (PIECE if f.device.type == "cpu" else LARGE) // max(1, f.shape[0] * f.shape[-1]))
    return (slice(start, start + rows) for start in range(0, max(1, f.shape[1]), rows))


def log_integral(likelihood, q: Marginals, y: Tensor, cubature: Cubature, power: float = 0.0) -> Tensor:
    """E_q[log p(y_n | f)] [n], or 1/α log E_q[p(y_n | f)^α] for a power α > 0; differentiable in q and in the likelihood's parameters.

    The same numbers as by plain automatic differentiation of the weighted sum over nodes, with the likelihood's own ∂ log p / ∂f in place of
    a graph through every node.
    """
    own = [p for p in likelihood.parameters() if p.requires_grad]
    if not torch.is_grad_enabled():
        q, own = Marginals(q.mean.detach(), q.cov.detach()), []  # the slope is not worked out
    elif not _leaves(likelihood, q, y) <= {id(p) for p in own}:
        return _plain(likelihood, q, y, cubature, power)  # a function that brings tensors of its own: plain automatic differentiation
    return _LogIntegral.apply(q.mean, q.cov, likelihood, y, cubature, power, *own)  # type: ignore[return-value]


def _plain(likelihood, q: Marginals, y: Tensor, cubature: Cubature, power: float) -> Tensor:
    f, w = cubature(q.mean, q.cov)
    return _reduce(likelihood.log_prob(f, spread(y, f)), w, power, cubature.shift)[0]


def _reduce(log_p: Tensor, w: Tensor, power: float, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """The integral [n] and the weight of each node's slope in its own [q n]."""
    if power == 0:
        return torch.einsum("q,qn->n", w, log_p), w[:, None].expand_as(log_p)
    value, tilted = log_sum(power * log_p if shift is None else power * log_p + shift, w)
    return value / power, tilted


def log_density(likelihood, f: Tensor, y: Tensor) -> Tensor:
    """log p(y_n | f) at every node [q n]."""
    return torch.cat([likelihood.log_prob(f[:, rows], spread(y[rows], f)) for rows in pieces(f)], 1)


def log_sum(log_p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_q w_q e^{log_p} [n] and the normalised weights of the tilted density [q n]; weights may be negative (NaN where their sum is)."""
    top = log_p.detach().amax(0)
    e = w[:, None] * (log_p - top).exp()
    total = e.sum(0)
    return top + total.log(), e / total


def _leaves(likelihood, q: Marginals, y: Tensor) -> set[int]:
    """Tensors with ``requires_grad`` that log p(y | f) depends on beside f, by one datum."""
    if len(y) == 0:
        return set()
    value = likelihood.log_prob(q.mean[:1].detach(), y[:1])
    found, seen, open_ = set(), set(), [value.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_ += [following for following, _ in node.next_functions]
    return found


class _LogIntegral(torch.autograd.Function):
    """Value, and by the likelihood's own gradient the slope in mean and covariance through the nodes f = mean + L z."""

    @staticmethod
    def forward(ctx, mean, cov, likelihood, y, cubature, power, *parameters):
        wanted = any(ctx.needs_input_grad[:2])
        value, in_mean, in_cov = mean.new_empty(len(mean)), torch.zeros_like(mean), torch.zeros_like(cov)
        size = cubature.unit(mean)[0].unsqueeze(1)
        for rows in pieces(size.expand(-1, len(mean), -1)):
            with torch.enable_grad():
                m, C = (t[rows].detach().requires_grad_(wanted) for t in (mean, cov))
                part = cubature.rows(rows)
                f, w = part(m, C)
            still = f.detach()
            target = spread(y[rows], still)
            value[rows], weight = _reduce(likelihood.log_prob(still, target), w, power, part.shift)
            if wanted:
                slope = weight.unsqueeze(-1) * likelihood.gradient(still, target)
                in_mean[rows], in_cov[rows] = torch.autograd.grad(f, (m, C), slope)
        ctx.save_for_backward(mean, cov, y, in_mean, in_cov, *parameters)
        ctx.likelihood, ctx.cubature, ctx.power = likelihood, cubature, power
        return value

    @staticmethod
    def backward(ctx, *cotangents):
        (g,) = cotangents
        mean, cov, y, in_mean, in_cov, *parameters = ctx.saved_tensors
        args = ctx.likelihood, y, ctx.cubature, ctx.power
        if torch.is_grad_enabled():  # a second derivative is wanted
            inputs = [mean, cov, *parameters]
            wanted = [t for t in inputs if t.requires_grad]
            value = _plain(args[0], Marginals(mean, cov), *args[1:])
            found = iter(torch.autograd.grad(value, wanted, g, create_graph=True, allow_unused=True))
            grads = [next(found) if t.requires_grad else None for t in inputs]
            return (*grads[:2], None, None, None, None, *grads[2:])
        own = [None] * len(parameters)
        if any(ctx.needs_input_grad[6:]):
            own = _in_parameters(*args, mean, cov, g, parameters)
        return g[:, None] * in_mean, g[:, None, None] * in_cov, None, None, None, None, *own


def _in_parameters(likelihood, y, cubature, power, mean, cov, g, parameters) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in parameters]
    f, w = cubature(mean, cov)
    for rows in pieces(f):
        with torch.enable_grad():
            value = _reduce(likelihood.log_prob(f[:, rows], spread(y[rows], f)), w, power, cubature.rows(rows).shift)[0]
            found = torch.autograd.grad(value, parameters, g[rows], allow_unused=True)
        total = [t if part is None else t + part for t, part in zip(total, found)]
    return total
