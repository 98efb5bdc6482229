"""Expectations: how E_q of the loss, its slope and its curvature are taken over a Gaussian belief about the weights of a net."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._parameters import ParameterVector
from bayesgn._psd import psd_root
from bayesgn.ggn import Curvature, Linearizer, Precision, Structure
from bayesgn.ggn.evaluation import at_rest, call, per_datum
from bayesgn.ggn.held import held
from bayesgn.ggn.marginals import row_blocks
from bayesgn.ggn.products import FactorProducts
from bayesgn.likelihoods.cubature import Cubature
from bayesgn.optim.batches import Batches
from bayesgn.rules import Marginals, Sites, Variational
from bayesgn.rules.curvatures import Curvature as Bending
from bayesgn.rules.curvatures import over_positions

Pairs = list[tuple[Any, Tensor]]  # batches (x, y)


class Estimate(NamedTuple):
    """What some data say at a belief q.

    Attributes:
        loss: −E_q Σ log p(y|f).
        gradient: of that in the mean of q [p].
        curvature: E_q Σ JᵀΛJ; None where the expectation makes it elsewhere.
        diagonal: in its place, a guess at the diagonal of E_q ∂²loss [p], of either sign.
        times: v [p] -> E_q Σ JᵀΛJ v, with nothing left out, where that is at hand.
    """

    loss: Tensor
    gradient: Tensor
    curvature: Curvature | None
    diagonal: Tensor | None = None
    times: Callable[[Tensor], Tensor] | None = None


class Belief(NamedTuple):
    """q = N(mean, precision⁻¹) over the selected weights of a net that stands at the mean, and how its loss bends.

    Attributes:
        net, vector, linearizer: the net, which of its weights, and J.
        own: these weights, by name.
        likelihood, bending, structure: p(y|f), Λ, and how JᵀΛJ is kept.
        mean: [p].
        precision: Σ⁻¹, or None before any curvature is known.
    """

    net: nn.Module
    vector: ParameterVector
    own: dict[str, nn.Parameter]
    linearizer: Linearizer
    likelihood: Any
    bending: Bending
    structure: Structure
    mean: Tensor
    precision: Precision | None

    @contextlib.contextmanager
    def at(self, θ: Tensor) -> Iterator[None]:
        """The net at other weights [p], and back at the mean afterwards."""
        self._write(θ)
        try:
            yield
        finally:
            self._write(self.mean)

    def _write(self, θ: Tensor) -> None:
        write(self.vector, self.own, θ)

    def draws(self, n: int, antithetic: bool, generator: torch.Generator | None) -> Tensor:
        """θ − mean [n p]; of antithetic ones every second is the one before, turned round."""
        assert self.precision is not None
        if not antithetic:
            return self.precision.sample(n, generator)
        half = self.precision.sample((n + 1) // 2, generator)
        return torch.stack([half, -half], dim=1).flatten(0, 1)[:n]

    def bent(self, pairs: Pairs, generator: torch.Generator | None) -> tuple[Batches, Curvature]:
        """Loss, gradient and Σ JᵀΛJ where the net stands."""
        seed = None
        if self.bending.random:
            device = self.mean.device if generator is None else generator.device
            seed = int(torch.randint(2**62, (), generator=generator, device=device)), device
        batches = Batches(self.linearizer, self.likelihood, self.bending, pairs, seed)
        H = self.empty()
        batches.most = H.columns
        H.fit(batches)
        return batches, H

    def empty(self) -> Curvature:
        """H = 0."""
        like = next(iter(self.own.values()))
        return self.structure.start(self.linearizer.blocks, like)

    def sloped(self, pairs: Pairs, places: Iterable[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Loss and gradient [p] where the net stands, by one backward pass a batch; or their sums over other ``places`` [p]."""
        own, like = self.own, self.mean
        loss, gradient = like.new_zeros(()), None
        stays = places is None
        try:
            with at_rest(self.net, own):
                for s, θ in enumerate([self.mean] if places is None else places):
                    if not stays:
                        self._write(θ)
                    for x, y in pairs:
                        f = per_datum(self.likelihood.rows(call(self.net, self.linearizer.place(x))), _data.len_of(x))
                        y = _data.to(y, f.device)
                        if s == 0:
                            self.likelihood.validate(f.detach(), y)
                        part = -self.likelihood.log_prob(f, y).sum()
                        found = torch.autograd.grad(part, list(own.values()), allow_unused=True)
                        g = flat(self.vector, own, found).to(like)
                        loss, gradient = loss + part.detach().to(like), g if gradient is None else gradient.add_(g)
        finally:
            if not stays:
                self._write(self.mean)
        assert gradient is not None
        return loss, gradient

    def outputs(self, x: Any) -> Tensor:
        """The net where it stands, without a graph [n *positions c]."""
        with at_rest(self.net, {}), torch.no_grad():
            return per_datum(self.likelihood.rows(call(self.net, self.linearizer.place(x))), _data.len_of(x))


class View(NamedTuple):
    """E_q log p(y|f) of some rows, to be asked again as the likelihood's own parameters move.

    Attributes:
        f: latents [s N c] that each have an equal part in the expectation, or the Gaussian marginals of N rows.
        y: targets.
        rule: by which the marginals are averaged over.
    """

    f: Tensor | Marginals
    y: Tensor
    rule: Variational | None = None

    def value(self, likelihood) -> Tensor:
        """Σ E_q log p, differentiable in the likelihood's parameters."""
        if isinstance(self.f, Tensor):
            return torch.stack([likelihood.log_prob(f, self.y).sum() for f in self.f]).mean()
        assert self.rule is not None
        return self.rule.value(likelihood, self.f, self.y).sum()

    def totals(self, likelihood) -> Tensor | None:
        """Σ log p of every draw [s]; None where there are none."""
        return torch.stack([likelihood.log_prob(f, self.y).sum() for f in self.f]).detach() if isinstance(self.f, Tensor) else None

    def statistics(self, likelihood) -> dict[str, Tensor]:
        """The likelihood's statistics under q; ``log_prob_of`` of them is the value, for those it is linear in."""
        if isinstance(self.f, Tensor):
            parts, weights = [likelihood.statistics(f, self.y) for f in self.f], [1 / len(self.f)] * len(self.f)
        else:
            assert self.rule is not None
            parts, weights = [likelihood.statistics(self.f.mean, self.y)], [1.0]
            if set(parts[0]) == {"log_prob"}:
                return {"log_prob": self.value(likelihood).detach()}
            nodes, w = self.rule.rule_for(self.f)(self.f.mean, self.f.cov)
            parts, weights = [likelihood.statistics(f, self.y) for f in nodes], w.tolist()
        return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}  # type: ignore[misc]


class Expectation(ABC):
    """How E_q is taken.

    Attributes:
        random: whether two calls differ by chance.
        caution: how much slower H moves than the mean, unless told.
        steady: whether the bound is known without chance, so that steps can be judged by it.
        first: the data set's curvature before any is known is that at the mean (True), or a guess (False).
    """

    random = True
    steady = False
    caution = 1.0
    first = True

    @abstractmethod
    def estimate(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        """Loss, gradient and curvature of some batches."""

    def slope(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        """Loss and gradient alone, for the steps between two renewals of the curvature."""
        return self.estimate(belief, pairs, generator)

    @abstractmethod
    def views(self, belief: Belief, pairs: Iterable, draws: int, generator: torch.Generator | None) -> Iterator[View]:
        """E_q log p of some batches, as it is reported and as the likelihood is tuned by; of ``draws`` draws where it draws."""

    def check(self, structure: Structure, curvature: Bending | None) -> None:  # noqa: B027 (most take any)
        """Raise for a structure or curvature that this expectation cannot serve."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in sorted(vars(self).items()))})"


class _ByDraws(Expectation):
    """Reported at draws of the weights, whatever the steps are taken by."""

    antithetic = True

    def views(self, belief: Belief, pairs: Iterable, draws: int, generator: torch.Generator | None) -> Iterator[View]:
        ε = belief.draws(draws, self.antithetic, generator)
        for x, y in pairs:
            f = []
            for step in ε:
                with belief.at(belief.mean + step):
                    f.append(belief.outputs(x))
            y = _data.to(y, f[0].device)
            belief.likelihood.validate(f[0], y)
            yield View(torch.stack(f).to(belief.mean), y)  # (sums over data are not taken in the net's dtype)


class AtMean(_ByDraws):
    """At the mean alone, E_q h ≈ h(mean): the online Gauss-Newton methods OGN and OGGN.

    A delta method: fast, deterministic given the data, and blind to how wide q is. With lr 1 on all data it is a Gauss-Newton step of MAP
    training, and ends in Laplace's posterior.

    Source: Khan et al. (2019), "Approximate inference turns deep networks into Gaussian processes", sec. 3 (OGGN).
    """

    random = False

    def estimate(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        batches, H = belief.bent(pairs, generator)
        return Estimate(batches.loss, batches.gradient, H)

    def slope(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        return Estimate(*belief.sloped(pairs), None)


class Draws(_ByDraws):
    """At draws of the weights: VOGGN with ``rules.GaussNewton()``, VOGN with ``rules.EmpiricalFisher()``, VON with ``rules.Exact()``
    in ``ggn.Hessian``.

    Args:
        n: draws a step.
        antithetic: every second draw is the one before mirrored at the mean: less noise in gradients, for nothing.

    Raises:
        ValueError: for fewer than one draw.

    Source: Khan et al. (2018), "Fast and scalable Bayesian deep learning by weight-perturbation in Adam" (VON, VOGN).
    """

    def __init__(self, n: int = 1, antithetic: bool = True) -> None:
        self.n, self.antithetic = _positive("Draws", n), antithetic

    def estimate(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        loss, gradient, curvature = 0.0, 0.0, None
        for ε in belief.draws(self.n, self.antithetic, generator):
            with belief.at(belief.mean + ε):
                batches, H = belief.bent(pairs, generator)
            loss, gradient = loss + batches.loss / self.n, gradient + batches.gradient / self.n
            if curvature is None:
                curvature = H if self.n == 1 else belief.empty()
            if self.n > 1:
                curvature.blend(H, 1.0, 1.0 / self.n)
        return Estimate(loss, gradient, curvature)  # type: ignore[arg-type]

    def slope(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        places = belief.mean + belief.draws(self.n, self.antithetic, generator)
        loss, gradient = belief.sloped(pairs, places)
        return Estimate(loss / self.n, gradient / self.n, None)


class Linearized(Expectation):
    """Over the linearised functions, f_lin(x) ~ N(f(x; mean), J Σ Jᵀ), by closed form or cubature: no draw, no noise.

    Exact for nets that are linear in their weights (logistic and softmax regression, last layers of fixed features). For other nets the
    bound is that of the model linearised at the mean, the one that ``posterior(x)`` predicts with; it may be above the log evidence of the net.

    A step on all data moves the mean by the exact Gauss-Newton matrix whatever the structure, by conjugate gradients with the structure for
    preconditioner; the structure is that of the covariance alone. So a diagonal q settles as fast as a full one.

    Args:
        cubature: of the expectation; by the number of outputs unless given.

    Source: Immer, Korzepa and Bauer (2021), sec. 3; Wilkinson, Särkkä and Solin (2023), sec. 3.2.
    """

    random = False
    steady = True

    def __init__(self, cubature: Cubature | None = None) -> None:
        self.cubature = Variational(cubature=cubature).cubature  # (checked there)

    def check(self, structure: Structure, curvature: Bending | None) -> None:
        from bayesgn.ggn import Hessian

        if isinstance(structure, Hessian):
            raise TypeError("a linearised net has no second derivative for structure=ggn.Hessian to keep; take ggn.Full, or optim.Draws().")

    def estimate(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        rule = Variational(belief.bending, self.cubature)
        loss, gradient = belief.mean.new_zeros(()), torch.zeros_like(belief.mean)
        stream, H = [], belief.empty()
        for lin, q, y in self._marginals(belief, pairs):
            local = rule.local(belief.likelihood, q, y, Sites.flat(*q.mean.shape, q.mean))  # type: ignore[call-arg]
            loss = loss - rule.value(belief.likelihood, q, y).sum()
            Λ = belief.bending.bend(local, (), generator).matrix
            S = over_positions(psd_root(Λ).reshape(lin.output.shape + Λ.shape[-1:])).to(lin.output.dtype)
            g = local.gradient.reshape(lin.n, lin.r, 1).to(lin.output.dtype)
            one = g.new_ones(lin.n, 1, 1)
            gradient = gradient - torch.cat([f.rmatvec(one.to(f.dtype))[:, 0] for f in lin.factors(g)]).to(gradient)
            stream.append((lin, S))
        H.fit(stream)
        if H.exact:
            return Estimate(loss, gradient, H)
        products = [FactorProducts(lin.blocks, lin.factors(S), belief.mean.dtype) for lin, S in stream]
        return Estimate(loss, gradient, H, times=lambda v: sum(J.rmatvec(J.matvec(v[:, None])) for J in products)[:, 0])  # type: ignore[index]

    def views(self, belief: Belief, pairs: Iterable, draws: int, generator: torch.Generator | None) -> Iterator[View]:
        rule = Variational(belief.bending, self.cubature)
        for _, q, y in self._marginals(belief, pairs):
            yield View(q, y, rule)

    @torch.no_grad()
    def _marginals(self, belief: Belief, pairs: Iterable) -> Iterator[tuple[Any, Marginals, Tensor]]:
        """(linearization, marginals of its rows, their targets), part by part."""
        assert belief.precision is not None
        likelihood, start = belief.likelihood, 0
        for x, y in pairs:
            _data.check_finite(x, "x")
            start = 0
            for lin in belief.linearizer.parts(x, likelihood.rows):
                target = _data.to(y[start : start + lin.n], lin.output.device)
                start += lin.n
                likelihood.validate(lin.output, target)
                lin = held(lin, lin.factors())
                f = lin.output.reshape(-1, lin.output.shape[-1]).to(belief.mean)
                q = Marginals(f, row_blocks(belief.precision, lin).to(f))
                yield lin, q, likelihood.targets(lin.output, target).flatten(0, lin.output.dim() - 2)


class Reparameterized(_ByDraws):
    """Gradients at draws of the weights alone, the diagonal curvature by Stein's identity: no gradient of single data, no Jacobian.

        E_q ∂²loss_ii = E_q[ (θ_i − m_i) / Σ_ii · ∂loss_i(θ) ],      h ← (1 − ρ) h + ρ ĥ + ½ ρ² (h − ĥ)² / (h + P)

    The last term keeps h + P positive whatever the draw. A step costs one ordinary backward pass a draw.

    Args:
        n: draws a step.
        initial: the diagonal of the curvature at the start, of the mean loss of a datum.

    Raises:
        ValueError: for fewer than one draw, or an initial curvature that is not positive; TypeError for a structure other than ``ggn.Diag``,
            or a curvature beside it.

    Source: Lin, Schmidt and Khan (2020), "Handling the positive-definite constraint in the Bayesian learning rule"; Shen et al. (2024),
    "Variational learning is effective for large deep networks" (IVON).
    """

    first = False
    caution = 0.01

    def __init__(self, n: int = 1, initial: float = 1.0) -> None:
        self.n = _positive("Reparameterized", n)
        if not initial > 0:
            raise ValueError(f"Reparameterized: initial={initial!r}; expected a positive curvature of the mean loss, e.g. 1.0.")
        self.initial = float(initial)

    def check(self, structure: Structure, curvature: Bending | None) -> None:
        from bayesgn.ggn import Diag

        if type(structure) is not Diag:
            raise TypeError(f"Reparameterized finds a diagonal curvature, but structure={structure!r}; take structure=ggn.Diag, or optim.Draws().")
        if curvature is not None:
            raise TypeError(f"Reparameterized finds the curvature from gradients; curvature={curvature!r} has no place in it. Leave it out.")

    def estimate(self, belief: Belief, pairs: Pairs, generator: torch.Generator | None) -> Estimate:
        assert belief.precision is not None
        like = belief.mean
        loss, gradient, moment = like.new_zeros(()), torch.zeros_like(like), torch.zeros_like(like)
        for ε in belief.draws(self.n, self.antithetic, generator):
            with belief.at(like + ε):
                part, g = belief.sloped(pairs)
            loss, gradient, moment = loss + part / self.n, gradient + g / self.n, moment + g * ε / self.n
        return Estimate(loss, gradient, None, moment / belief.precision.diagonal())


@torch.no_grad()
def write(vector: ParameterVector, own: dict[str, nn.Parameter], θ: Tensor) -> None:
    """θ [p] into the parameters."""
    for (name, p), part in zip(own.items(), θ.split(vector.sizes), strict=True):
        if name in vector.masks:  # (put_ counts in row-major order, however p lies in memory)
            p.put_(vector.masks[name], part.to(p))
        else:
            p.copy_(part.view(p.shape))


def flat(vector: ParameterVector, own: dict[str, nn.Parameter], parts: Iterable[Tensor | None]) -> Tensor:
    """Gradients of the parameters as one vector [p]; nothing is 0."""
    out = []
    for (name, p), g in zip(own.items(), parts, strict=True):
        g = torch.zeros_like(p) if g is None else g
        g = g.detach().reshape(-1)
        out.append(g[vector.masks[name]] if name in vector.masks else g)
    return torch.cat(out)


def _positive(kind: str, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{kind}: n={n!r} draws; expected a whole number, at least 1.")
    return n
