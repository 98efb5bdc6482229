"""Hyper-parameters of a sparse Gaussian process from batches of its data: the variational bound by stochastic gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn.inference.ascent import Bar
from bayesgn.models.averaging import averaged
from bayesgn.models.sparse_gp import Settled, Sums, projected, settled, summed
from bayesgn.rules import Marginals, Sites

log = logging.getLogger("bayesgn.inference")


def serves(posterior: Any) -> bool:
    """Whether there are batches for this posterior: a model with whitened inducing variables, under a rule whose energy is a bound."""
    return hasattr(posterior.model, "whitened") and posterior.rule.bound and posterior.rule.power == 0


class HeldBelief:
    """What the data say about the inducing variables u, held while hyper-parameters move: q(u) ∝ N(u; 0, K_zz(θ)) exp(hᵀu − ½ uᵀΛu).

        bound(θ) = Σ_n E_{q(f_n; θ)}[log p(y_n | f_n; θ)] − KL( q(u) ‖ N(0, K_zz) ),     f_n | u ~ N(k_nz K_zz⁻¹ u, S_n)

    At the fixed point of the variational rule this is the evidence and its slope in θ the total one, whatever is held. With h and Λ held,
    rather than q itself, q follows θ as it does at fixed sites, so that the two climb together. Worked with in v, u = L v.

    Source: Adam, Chang, Khan and Solin (2021), "Dual parameterization of sparse variational Gaussian processes", where K Λ K is held.
    """

    def __init__(self, posterior: Any) -> None:
        self.posterior = posterior
        model, x, sites = posterior.model, posterior.inputs.x, posterior.sites
        with torch.no_grad():
            L = model.roots()
            self.sums: Sums = self._of_u(L, model.sums(L, x, model.shifted(sites, model.mean_at(x)), sites.nat2))

    # The means μ(Z) are part of what is held: a site's pull on u moves with μ, that on u + μ(Z) hardly does.

    def _of_u(self, L: Tensor, sums: Sums) -> Sums:
        """h and Λ on v as those on u + μ(Z), u = L v: L⁻ᵀ Λ L⁻¹ and L⁻ᵀh + that times μ(Z)."""
        h = torch.linalg.solve_triangular(L.mT, sums.h.unsqueeze(-1), upper=True).squeeze(-1)
        Λ = torch.linalg.solve_triangular(L.mT.unsqueeze(1), sums.Λ, upper=True)
        Λ = torch.linalg.solve_triangular(L.unsqueeze(0), Λ, upper=False, left=False)
        return Sums(h + self._pull(Λ), Λ, torch.zeros_like(sums.log_scale), sums.coupled)

    def _of_v(self, L: Tensor, sums: Sums) -> Sums:
        """The way back."""
        h = (L.mT @ (sums.h - self._pull(sums.Λ)).unsqueeze(-1)).squeeze(-1)
        return Sums(h, L.mT.unsqueeze(1) @ sums.Λ @ L.unsqueeze(0), sums.log_scale, sums.coupled)

    def _pull(self, Λ: Tensor) -> Tensor:
        model = self.posterior.model
        return torch.einsum("abmk,kb->am", Λ, model.mean_at(model.inducing_points))

    def bound(self, index: Tensor) -> tuple[Tensor, Batch]:
        """An unbiased estimate of the bound, with a graph to the hyper-parameters."""
        posterior, model = self.posterior, self.posterior.model
        x, L = posterior.inputs.x[index], model.roots()
        V, S = model.whitened(L, x)
        q = settled(self._of_v(L, self.sums))
        φ = projected(q, V)
        belief = Marginals(φ.mean + model.mean_at(x), φ.cov + torch.diag_embed(S))
        nothing = Sites.flat(len(index), model.latents, belief.mean)
        terms = posterior.rule.term(posterior.likelihood, belief, posterior.y[index], nothing)
        value = posterior.num_data / len(index) * terms.sum() - _divergence(q)
        return value, Batch(index, *(t.detach() for t in (L, V, S, *belief)))

    @torch.no_grad()
    def renew(self, batch: Batch, lr: float) -> None:
        """A natural-gradient step of size lr: what the sites of the batch would say, as if all data were like them."""
        posterior, model = self.posterior, self.posterior.model
        index, L, V, S, mean, cov = batch
        nothing = Sites.flat(len(index), model.latents, mean)
        turn = posterior.rule(posterior.likelihood, Marginals(mean, cov), posterior.y[index], nothing)
        nat2 = turn.sites.nat2
        coupled = bool((nat2 - torch.diag_embed(nat2.diagonal(dim1=-2, dim2=-1))).any())
        sites = averaged(model.shifted(turn.sites, model.mean_at(posterior.inputs.x[index])), nat2, torch.diag_embed(S), 0.0)
        new, old, share = self._of_u(L, summed(V, sites, coupled)), self.sums, lr * posterior.num_data / len(index)
        self.sums = Sums((1 - lr) * old.h + share * new.h, (1 - lr) * old.Λ + share * new.Λ, old.log_scale, old.coupled or new.coupled)

    @torch.no_grad()
    def sites(self) -> Sites:
        """What the rule makes of this belief at all data."""
        posterior, model = self.posterior, self.posterior.model
        x, L = posterior.inputs.x, model.roots()
        nothing = Sites.flat(len(x), model.latents, x)
        q = model.read(L, settled(self._of_v(L, self.sums)), x, nothing.nat1, nothing.nat2)
        return posterior.rule(posterior.likelihood, Marginals(q.mean + model.mean_at(x), q.cov), posterior.y, nothing).sites


class Batch(NamedTuple):
    """An index, L, and what it sees: V, S, and the belief's mean and covariance."""

    index: Tensor
    L: Tensor
    V: Tensor
    S: Tensor
    mean: Tensor
    cov: Tensor


def _divergence(q: Settled) -> Tensor:
    """KL( q(v) ‖ N(0, I) )."""
    logdet = q.Γ.diagonal(dim1=-2, dim2=-1).abs().log().sum()
    return 0.5 * (q.mean.square().sum() + q.Γ.square().sum() - q.mean.numel()) - logdet


def batches(count: int, size: int, generator: torch.Generator | None, device: torch.device) -> Iterator[Tensor]:
    """Indices, walk after walk over the data in a new order each time; a walk's last batch may be smaller."""
    while True:
        order = torch.randperm(count, generator=generator, device=None if generator is None else generator.device)
        yield from order.to(device).split(size)


def cooled(steps: int) -> Callable:
    """Adam, whose step falls to nothing over the second half."""

    def make(parameters: list) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, 2 * (1 - k / max(steps, 1))))

    return make


def follow_batches(search: Any, make: Callable | None, steps: int, size: int, generator: torch.Generator | None, progress: bool | None) -> None:
    """A natural-gradient step for the belief and a step of the optimizer for the hyper-parameters, both from one batch, again and again."""
    posterior, free, trace = search.posterior, search.free, search.trace
    z = None if make is not None else torch.nn.Parameter(torch.from_numpy(free.read()))  # log hyper-parameters, where the choice is ours
    made = make(free.parameters) if make is not None else cooled(steps)([z])
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    held = HeldBelief(posterior.with_sites(posterior.sites))
    lr = min(1.0, max(0.1, size / posterior.num_data))  # a tenth, or what part of the data is seen
    good = free.read()
    trace.reason = f"all {steps} steps were taken"
    try:
        with Bar(steps, progress) as bar:
            for _, index in zip(range(steps), batches(posterior.num_data, size, generator, posterior.y.device)):
                optimizer.zero_grad()
                trace.evaluations += 1
                with torch.enable_grad():
                    bound, batch = held.bound(index)
                    log_p = search.log_prior()
                    gradient = torch.autograd.grad(
                        bound if log_p is None else bound + log_p, free.parameters, allow_unused=True, materialize_grads=True
                    )
                value = float(bound.detach())
                if not math.isfinite(value) or not all(bool(g.isfinite().all()) for g in gradient):
                    if trace.evidence:
                        free.write(good)
                        if z is not None:
                            z.data.copy_(torch.from_numpy(good))
                        for group in optimizer.param_groups:
                            group["lr"] *= 0.5
                        log.warning("the bound or its slope is not finite on a batch; back by a step, and on with half the step size")
                        continue
                    raise FloatingPointError(f"the bound is {value} on the first batch, or its slope is not finite; run bgn.bayes_newton first.")
                good = free.read()
                slope = free.chain(good, list(gradient))
                search.steepest = np.fmax(search.steepest, np.abs(slope))
                trace.note(free.values(), value, None if log_p is None else log_p.item())
                if z is not None:
                    z.grad = -torch.from_numpy(slope)
                else:
                    for p, g in zip(free.parameters, gradient, strict=True):
                        p.grad = -g.to(p)
                held.renew(batch, lr)
                optimizer.step()
                if z is not None:
                    free.write(z.detach().numpy())
                if scheduler is not None:
                    scheduler.step()
                bar.update()
    finally:
        search.best = free.read(), held.sites(), -math.inf
