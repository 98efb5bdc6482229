"""A net linearised at all its data, once: f*, J and what inference asks of them, J v, Jᵀu, J Σ Jᵀ and the mean of the weights given sites."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.ggn.conjugate_gradients import conjugate_gradients
from bayesgn.ggn.held import bytes_held, held
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.products import FactorProducts
from bayesgn.ggn.structure import Precision, accumulator
from bayesgn.models.answer import row_blocks
from bayesgn.models.stream import Validation, same_net
from bayesgn.rules import Marginals, Sites
from bayesgn.rules.curvatures import over_positions

logger = logging.getLogger("bayesgn.models")

HELD_BYTES = 2**30  # of J's factors; beyond it J is made anew, batch by batch, for every product


class LinearizedData:
    """f_lin(x; θ) = f(x; θ*) + J(x) (θ − θ*) at the data, in the order they came in.

    The data are walked once and copied (a loader that shuffles gives one order, which is kept). A row is a datum, or a position of one.

    Args:
        linearizer: of the net, at rest.
        likelihood: whose ``rows`` and ``validate`` are asked.
        data: (x, y), a Dataset, a DataLoader or batches.

    Attributes:
        x, targets: as they came, lists of batches.
        y: targets of all rows [N …].
        f: f(x; θ*) of all rows [N c], in the widest dtype of the device.
        count: data.
    """

    def __init__(self, linearizer: Linearizer, likelihood, data: Any) -> None:
        self.linearizer, self.rows = linearizer, likelihood.rows
        like = next(iter(linearizer.vector.tensors(linearizer.net).values()))
        self.dtype = accumulator(like)
        self.x: list[Any] = []
        self.targets: list[Tensor] = []
        f, y, check = [], [], Validation(likelihood)
        kept: list[Linearization] | None = []
        products: list[FactorProducts] = []
        size = 0
        for x, targets in _data.batches(data):
            if _data.len_of(x) == 0:
                continue
            _data.check_finite(x, "x")
            x = _data.apply(x, lambda t: t.detach().clone())
            if not self.x:
                self._begin(x, like)
            start = 0
            with _data.advice(x, like):
                for lin in linearizer.parts(x, self.rows):
                    target = _data.to(targets[start : start + lin.n], lin.output.device)
                    check(lin.output, target)
                    start += lin.n
                    f.append(lin.output.reshape(-1, lin.output.shape[-1]).to(self.dtype))
                    y.append(likelihood.targets(lin.output, target).flatten(0, lin.output.dim() - 2))
                    if kept is not None:
                        factors = lin.factors()
                        size += sum(bytes_held(part) for part in factors)
                        kept.append(held(lin, factors))
                        products.append(FactorProducts(linearizer.blocks, factors, self.dtype))
                        if size > HELD_BYTES:
                            kept, products = None, []
                            logger.info("J of all data takes more than %.1f GB: it is made anew for every product", HELD_BYTES / 2**30)
            self.x.append(x)
            self.targets.append(targets.detach().clone())
        if not self.x:
            raise ValueError("the data hold no rows; there is nothing to learn from.")
        self.f, self.y, self.count = torch.cat(f), torch.cat(y), sum(_data.len_of(x) for x in self.x)
        self._kept, self._products = kept, products

    def _begin(self, x: Any, like: Tensor) -> None:
        with _data.advice(x, like):
            self.linearizer.prepare(x, self.rows)
        if not same_net(self.linearizer, x, self.rows):
            raise ValueError(
                f"{type(self.linearizer.net).__name__} answers otherwise than when this Network was planned (a hook, or a module put in since); "
                "make a new one: Network(net, ...)."
            )

    # -- walks ---------------------------------------------------------------------------------------------------------

    def linearizations(self) -> Iterator[tuple[slice, Linearization]]:
        """Part after part of the data, with its rows."""
        start = 0
        parts = self._kept if self._kept is not None else (lin for x in self.x for lin in self.linearizer.parts(x, self.rows))
        for lin in parts:
            stop = start + lin.output[..., 0].numel()
            yield slice(start, stop), lin
            start = stop

    def products(self) -> Iterator[tuple[slice, FactorProducts]]:
        """The same as products with J."""
        for i, (rows, lin) in enumerate(self.linearizations()):
            yield rows, self._products[i] if self._products else FactorProducts(lin.blocks, lin.factors(), self.dtype)

    def stream(self, nat2: Tensor) -> SiteStream:
        """Batches of (linearization, S) with SSᵀ = nat2 [N c c], which every structure's ``fit`` takes and may walk several times."""
        return SiteStream(self, nat2)

    # -- J -------------------------------------------------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        """J v [N c] for v [p]."""
        return torch.cat([J.matvec(v[:, None]) for _, J in self.products()]).view(self.f.shape)

    def rmatvec(self, u: Tensor) -> Tensor:
        """Jᵀ u [p] for u [N c]."""
        return sum(J.rmatvec(u[rows].reshape(-1, 1)) for rows, J in self.products())[:, 0]  # type: ignore[index]

    def hessian_product(self, nat2: Tensor, v: Tensor) -> Tensor:
        """Σ JᵀΛJ v [p] for Λ = nat2 [N c c], in one walk."""
        out = torch.zeros_like(v)
        for rows, J in self.products():
            Jv = J.matvec(v[:, None]).view(-1, nat2.shape[-1], 1)
            out += J.rmatvec((nat2[rows] @ Jv).view(-1, 1))[:, 0]
        return out

    def marginals(self, precision: Precision, shift: Tensor) -> Marginals:
        """f_lin of each row, for θ − θ* ~ N(shift, precision⁻¹)."""
        cov = torch.cat([row_blocks(precision, lin) for _, lin in self.linearizations()])
        return Marginals(self.f + self.matvec(shift), cov)

    # -- the mean of the weights ---------------------------------------------------------------------------------------

    def mean_shift(self, sites: Sites, prior: Tensor, deviation: Tensor, precision: Precision, start: Tensor | None = None) -> Tensor:
        """θ̄ − θ* [p], the mode of N(θ; μ, P⁻¹) Π t_n(f_lin): exact, whatever the structure behind ``precision`` leaves out.

            (Σ JᵀΛJ + P)(θ̄ − θ*) = Σ Jᵀ(nat1 − Λ f*) − P (θ* − μ)

        Args:
            sites: nat1 [N c] and Λ = nat2 [N c c].
            prior, deviation: the diagonal of P [p], and θ* − μ [p].
            precision: H̃ + P, the preconditioner.
            start: θ̄ − θ* of other sites near these.
        """
        Λf = (sites.nat2 @ self.f.unsqueeze(-1)).squeeze(-1)
        b = self.rmatvec(sites.nat1 - Λf) - prior * deviation
        return self.solve(sites, prior, b, precision, start)

    def solve(self, sites: Sites, prior: Tensor, b: Tensor, precision: Precision, start: Tensor | None = None) -> Tensor:
        """(Σ JᵀΛJ + P)⁻¹ b [p] with the exact sum, preconditioned by ``precision``."""
        return conjugate_gradients(lambda v: self.hessian_product(sites.nat2, v) + prior * v, b, precision.solve, start)


class SiteStream:
    """Sites as the batches that a structure is fitted to."""

    def __init__(self, data: LinearizedData, nat2: Tensor) -> None:
        self.data, self.root = data, site_root(nat2)

    def __iter__(self) -> Iterator[tuple[Linearization, Tensor]]:
        for rows, lin in self.data.linearizations():
            yield lin, over_positions(self.root[rows].view(*lin.output.shape, -1))


def site_root(nat2: Tensor) -> Tensor:
    """S [N c c] with SSᵀ = nat2, PSD of any rank; what rounding made negative, beside the largest precision of all rows, counts as zero.

    (A softmax that is sure of its class has Λ = diag p − ppᵀ far below the size of what was subtracted, so that it is indefinite by itself.)

    Raises:
        ValueError: for a precision that is negative beyond rounding, of which no structure can keep JᵀΛJ.
    """
    λ, V = torch.linalg.eigh(0.5 * (nat2 + nat2.mT))
    worst = λ[..., 0]
    if bool((worst < -1e-10 * λ.abs().max()).any()):
        row = int(worst.argmin())
        raise ValueError(
            f"the site of row {row} has a negative precision ({float(worst[row]):.3e}); structures keep sums of PSD blocks: take a curvature "
            "that is PSD, rules.GaussNewton() or rules.Exact(psd=rules.eigclip)."
        )
    return V * λ.clamp_min(0).sqrt().unsqueeze(-2)
