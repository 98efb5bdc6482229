"""A step of a diagonal Gaussian by gradients at draws alone, hardly dearer than an ordinary training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesgn.ggn import Curvature
from bayesgn.ggn.structure import randn, working
from bayesgn.optim.expectations import Belief, Pairs, flat, write


class DiagonalStep:
    """The steps of ``optim.Reparameterized``, on flat vectors [p] in the net's own dtype (float32 at least), without new memory.

        h ← (1 − ρ) h + ρ ĥ + ½ ρ² (h − ĥ)² / (h + P),      ĥ = N/B (h + P) Σ_s ε_s ∂loss(m + ε_s) / n

    Draws in float64 alone would cost more than the forward and backward pass of a small net, and so would a dozen new vectors. The
    accumulator h stays in float64: a usual ρ, 1e-5, is near the rounding of float32.
    """

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self._flat: tuple[Curvature, Tensor] | None = None
        self._room: dict[str, Tensor] = {}

    def __call__(self, pairs: Pairs, whole: float, renew: bool) -> Tensor:
        """One step on a batch that is 1/``whole`` of the data; the expected loss of the batch."""
        opt = self.opt
        m = self._mean()
        try:
            return self._step(m, pairs, whole, renew)
        except BaseException:
            write(opt.vector, opt._own, self._vector("mean"))  # (which no failed step has moved)
            raise

    def _step(self, m: Tensor, pairs: Pairs, whole: float, renew: bool) -> Tensor:
        opt, T = self.opt, self.opt.temperature
        lr, ρ = opt._rates()
        h, P, scale = self._h(), self._prior(), float(opt.scale())
        old = self._vector("h").copy_(h)
        total = torch.add(P, old, alpha=scale, out=self._vector("h + P"))
        loss, gradient, moment = self._averages(m, total, pairs, renew)
        if moment is not None:
            gap = old.addcmul_(moment, total, value=-whole / (scale * T))  # h − ĥ
            moment = torch.mul(gap, gap, out=moment).div_(total).mul_(0.5 * ρ**2 * scale).sub_(gap, alpha=ρ)  # what h moves by
            total.add_(moment, alpha=scale)
        μ = opt.prior.mean
        slope = gradient.mul_(whole / T).addcmul_(P, m if μ == 0.0 else m - opt.prior.mean_vector(opt.vector, m))
        velocity = opt._velocity
        if opt.momentum:
            velocity = (1 - opt.momentum) * slope if velocity is None else velocity.to(slope).lerp(slope, 1 - opt.momentum)
            slope = torch.div(velocity, 1 - opt.momentum ** (opt.steps + 1), out=slope)
        δ = slope.div_(total.add_(opt.damping) if opt.damping else total)
        if not _finite(m, δ):
            raise FloatingPointError("the step is not finite; lower lr, or raise damping.")
        self._stand_at(m, δ, -lr)
        if moment is not None:
            h.add_(moment if moment.dtype == h.dtype else self._vector("update", h.dtype).copy_(moment))
            opt._precision = None
        opt._velocity = velocity
        return loss

    def _averages(self, m: Tensor, total: Tensor, pairs: Pairs, renew: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means over draws ε of loss, gradient, and (where h is to be renewed) ε · gradient; the net is left at the last draw."""
        opt, n = self.opt, self.opt.expectation.n  # type: ignore[attr-defined]
        belief = Belief(opt.net, opt.vector, opt._own, opt.linearizer, opt.likelihood, opt.bending, opt.model.structure, m, None)
        loss, gradient, moment = m.new_zeros(()), None, None
        for s in range(n):
            ε = self._draw(total) if s % 2 == 0 else self._vector("draw").neg_()  # every second is the one before, mirrored
            self._stand_at(m, ε)
            part, g = belief.sloped(pairs)
            loss, gradient = loss + part, g if gradient is None else gradient.add_(g)
            if renew:
                moment = torch.mul(ε, g, out=self._vector("moment")) if moment is None else moment.addcmul_(ε, g)
        assert gradient is not None
        if not bool(torch.isfinite(loss)) or not _finite(gradient):
            raise FloatingPointError(f"the expected loss is {float(loss) / n:.4g} or its gradient is not finite; lower lr, or raise damping.")
        if n == 1:
            return loss, gradient, moment
        return loss / n, gradient.div_(n), None if moment is None else moment.div_(n)

    def _draw(self, total: Tensor) -> Tensor:
        """θ − mean [p], block by block as ``ggn.Diag`` draws."""
        ε, generator = self._vector("draw"), self.opt.generator
        for part in ε.split([b.numel for b in self.opt.linearizer.blocks]):
            if generator is None or generator.device == ε.device:
                part.normal_(generator=generator)
            else:
                part.copy_(randn((len(part),), ε, generator))
        return ε.mul_(torch.rsqrt(total, out=self._vector("weights")))

    def _plain(self) -> bool:
        """Whether the vector is the parameters themselves, one after the other."""
        return not self.opt.vector.masks and all(p.dtype == self._vector("mean").dtype for p in self.opt._own.values())

    def _mean(self) -> Tensor:
        own, m = self.opt._own, self._vector("mean")
        if self._plain():
            return torch.cat([p.detach().reshape(-1) for p in own.values()], out=m)
        return m.copy_(flat(self.opt.vector, own, own.values()))

    def _stand_at(self, m: Tensor, step: Tensor, length: float = 1.0) -> None:
        """The weights of the net become m + length · step."""
        vector, own = self.opt.vector, self.opt._own
        if not self._plain():
            return write(vector, own, torch.add(m, step, alpha=length, out=self._vector("weights")))
        for p, a, b in zip(own.values(), m.split(vector.sizes), step.split(vector.sizes), strict=True):
            torch.add(a.view(p.shape), b.view(p.shape), alpha=length, out=p.detach())

    def _vector(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a vector [p], the same at every step."""
        if name not in self._room:
            first = next(iter(self.opt._own.values()))
            self._room[name] = torch.empty(self.opt.vector.numel, dtype=dtype or working(first.dtype), device=first.device)
        return self._room[name]

    def _h(self) -> Tensor:
        """The diagonal of H [p]; H's own tensors are views of it."""
        H = self.opt.curvature
        assert H is not None
        if self._flat is None or self._flat[0] is not H:
            parts = H.tensors()
            flat = torch.cat(list(parts.values()))
            H.load(dict(zip(parts, flat.split([len(t) for t in parts.values()]), strict=True)))
            self._flat = H, flat
        return self._flat[1]

    def _prior(self) -> Tensor:
        """The diagonal of P: [p], or a scalar."""
        opt = self.opt
        P = opt.prior.precision.detach() if opt.prior.log_precision.dim() == 0 else opt.prior_vector()
        return P.to(self._vector("mean"))


def _finite(*vectors: Tensor) -> bool:
    """A sum is finite where all are (seldom else), and costs a tenth of asking each."""
    return bool(torch.isfinite(sum(v.sum() for v in vectors))) or all(bool(torch.isfinite(v).all()) for v in vectors)  # type: ignore[arg-type]
