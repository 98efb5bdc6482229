"""Products H V by differences of forward passes and ordinary backward passes alone: for modules whose parameters lie in pieces (FSDP2).

    J v ≈ (f(θ + ε v) − f(θ − ε v)) / 2ε       H v = Σ Jᵀ Λ J v

Hooks, functional calls and double backward do not reach through ``fully_shard``, whose own hooks gather a layer's weights just before they are used
and spread its gradients just after; a forward and a backward pass do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesgn import _data, _distributed
from bayesgn._parameters import unwrap
from bayesgn.ggn.evaluation import at_rest, call, per_datum
from bayesgn.ggn.structure import accumulator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DifferenceProducts:
    """H V = Σ JᵀΛJ V for a net that can only run forwards and backwards; a product costs some 2 gradients a column.

        ε = η (1 + ‖θ‖) / ‖v‖,  η = (machine epsilon of the weights' dtype)^(1/3)

    The error of a product is some η²: 3e-11 in float64 and 2e-5 in float32 for nets with tanh or GELU (measured, 500 to 70,000 weights); with ReLU,
    whose kinks ε v crosses, 6e-3 in float32. So: for the step of an optimizer, not for a Lanczos basis.

    Vectors are flat and in pieces: each process holds the entries of its own pieces of the parameters (``DTensor.to_local()``), one below the other,
    and :func:`bayesgn.ggn.matrix_free.conjugate_gradients` with the same ``group`` solves on them as they are. Where the net is not sharded every
    process holds all entries. Calls are collective: all processes of the group make the same ones, each with its own data. The weights are moved by
    ± ε v while f is evaluated and are put back to the last bit, also where the net raises; their ``.grad`` is left as it was.

    Args:
        net: a module, as it is or after ``torch.distributed.fsdp.fully_shard`` over a mesh of one dimension (with its mean of gradients).
        x: this process's data.
        root: S [n r k] with Λ = SSᵀ, given the net's rows f [n *positions c] as they are now: ``lambda f: rules.Laplace().root(likelihood, f, y)``.
        rows: the net's output as rows: ``likelihood.rows``.
        group: processes that each have data of their own; for a sharded net it is that of its mesh.
        η: relative size of the step; by dtype unless given.

    Attributes:
        numel: entries of a vector on this process.

    Raises:
        ValueError: for parameters that are sharded in part, replicated, or of half precision (without ``η``).

    Example:
        >>> net = nn.Linear(2, 1, bias=False).double(); x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> H = DifferenceProducts(net, x, lambda f: torch.ones(len(f), 1, 1))  # squared loss
        >>> H(torch.tensor([[1.0], [0.0]], dtype=torch.float64)).T.round(decimals=6)  # xᵀx v
        tensor([[1., 2.]], dtype=torch.float64)

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian", sec. 2; Nocedal and Wright (2006), sec. 8.1, for the step.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Any,
        root: Callable[[Tensor], Tensor],
        rows: Callable[[Tensor], Tensor] = lambda f: f,
        group: ProcessGroup | None = None,
        η: float | None = None,
    ) -> None:
        self.net, self.rows = unwrap(net), rows
        self.selected = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        if not self.selected:
            raise ValueError(f"{type(self.net).__name__} has no parameter with requires_grad=True.")
        dtypes = {p.dtype for p in self.selected.values()}
        if η is None and any(dtype.itemsize < 4 for dtype in dtypes):
            raise ValueError(f"the weights are {', '.join(map(str, dtypes))}, too coarse for differences; keep them in float32, or pass η.")
        self.η = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3) if η is None else η
        self.sharded, self.group = _mesh_group(self.selected, group)
        self.pieces = [_local(p) for p in self.selected.values()]  # views: the weights themselves
        self.numel = sum(t.numel() for t in self.pieces)
        self.x = _data.to(x, self.pieces[0].device)
        with at_rest(self.net, self.selected), torch.no_grad():
            f = self._f(self.x)
            self.S = root(f).to(f).reshape(len(f), f[0].numel(), -1)
        self._reshard()

    def __call__(self, V: Tensor) -> Tensor:
        """H V [p s] over all data of the group, for V [p s] (this process's entries of both)."""
        if V.dim() != 2 or len(V) != self.numel:
            raise ValueError(f"V is of shape {tuple(V.shape)}; expected [{self.numel}, s], a row for each entry of this process's weights.")
        return torch.stack([self._rmatvec(self.S @ (self.S.mT @ self._matvec(v)[..., None])) for v in V.T], dim=1).to(V)

    def _matvec(self, v: Tensor) -> Tensor:
        """J v [n r] by a central difference."""
        θ = torch.cat([t.detach().reshape(-1) for t in self.pieces]).to(accumulator(v))
        squares = torch.stack([θ.square().sum(), v.to(θ).square().sum()])
        θ2, v2 = _distributed.all_sum([squares], self.group)[0] if self.sharded else squares
        ε = self.η * (1 + θ2.sqrt()) / v2.sqrt()
        if v2 == 0:
            ε = torch.ones_like(v2)  # (every process still runs the net as often as the others)
        with at_rest(self.net, self.selected), torch.no_grad(), self._restored() as θ0:
            f = []
            for sign in (1, -1):
                for t, start, δ in zip(self.pieces, θ0, v.split([t.numel() for t in self.pieces]), strict=True):
                    t.copy_(start + (sign * ε * δ.to(ε)).reshape(t.shape).to(t.dtype))
                self._reshard()
                f.append(self._f(self.x).flatten(1).clone())
        return (f[0] - f[1]) / (2 * ε).to(f[0].dtype)

    def _rmatvec(self, u: Tensor) -> Tensor:
        """Σ Jᵀu [p] over all data of the group, for u [n r 1]."""
        before = {name: p.grad for name, p in self.selected.items()}
        try:
            for p in self.selected.values():
                p.grad = None
            with at_rest(self.net, self.selected):
                (self._f(self.x).flatten(1) * u[..., 0]).sum().backward()
            self._reshard()
            found = [t.new_zeros(t.shape) if p.grad is None else _local(p.grad) for t, p in zip(self.pieces, self.selected.values(), strict=True)]
            flat = torch.cat([g.detach().reshape(-1) for g in found])
        finally:
            for name, p in self.selected.items():
                p.grad = before[name]
        if self.sharded:  # fully_shard has taken the mean over the processes
            return flat * _distributed.size(self.group)
        return _distributed.all_sum([flat], self.group)[0]

    def _f(self, x: Any) -> Tensor:
        return per_datum(self.rows(call(self.net, x)), _data.len_of(x))

    @contextlib.contextmanager
    def _restored(self) -> Iterator[list[Tensor]]:
        """The weights as they are, for a while, and to the last bit afterwards."""
        θ = [t.detach().clone() for t in self.pieces]
        try:
            yield θ
        finally:
            with torch.no_grad():
                for t, start in zip(self.pieces, θ, strict=True):
                    t.copy_(start)
            self._reshard()

    def _reshard(self) -> None:
        """Let go of whole weights that fully_shard still holds from the last pass: they are of other values than the pieces now."""
        for module in self.net.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()


def _local(t: Tensor) -> Tensor:
    """This process's piece of a tensor."""
    with torch.no_grad():
        return t.to_local() if hasattr(t, "to_local") else t.detach()  # type: ignore[attr-defined]


def _mesh_group(selected: dict[str, nn.Parameter], group: ProcessGroup | None) -> tuple[bool, ProcessGroup | None]:
    """Whether the parameters are sharded, and among which processes."""
    sharded = {name: p for name, p in selected.items() if hasattr(p, "to_local")}
    if not sharded:
        _distributed.check_group(group)
        return False, group
    if len(sharded) < len(selected):
        whole = next(name for name in selected if name not in sharded)
        raise ValueError(f"{whole} is not sharded and {next(iter(sharded))} is; call fully_shard on the whole net too, so that all are.")
    for name, p in sharded.items():
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        if mesh.ndim != 1 or not placements[0].is_shard():
            raise ValueError(f"{name} lies on {mesh} as {placements}; expected fully_shard over a mesh of one dimension.")
    return True, mesh.get_group()
