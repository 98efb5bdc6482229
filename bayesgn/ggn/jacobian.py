"""J of any torch function of parameters, whole or by products. No net and no likelihood needed: residuals of a fit, a PDE or a graph's edges.

    r(θ + v) ≈ r(θ) + J v,    J = ∂r/∂θ [m p]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from bayesgn._extras import load_forward_mode

logger = logging.getLogger("bayesgn.ggn")

CHUNK_ENTRIES = 2**21  # numbers of J worked out at once
_NO_RULE = (RuntimeError, NotImplementedError, ValueError, TypeError)  # what torch raises where an operation has no rule for a transform


def jacobian(residual_fn: Callable[..., Any], params: Any, *batch: Any) -> tuple[Tensor, Tensor]:
    """Value and dense Jacobian of ``residual_fn(params, *batch)`` with respect to all entries of ``params``.

        r [m],   J = ∂r/∂θ [m p]

    Columns by forward mode where J is tall, rows by reverse mode where it is wide, a chunk at a time. A function that torch cannot batch or
    push forward (custom autograd functions, inner calls of ``torch.autograd.grad``) is served by plain backward passes; the log says which.

    Args:
        residual_fn: answers a tensor of any shape, or a tuple or list of tensors, which are flattened one after the other.
        params: a tensor of any shape, or a mapping, tuple or list of such; θ [p] is their entries in order. dtype and device are kept.
        batch: further arguments, handed on as they are.

    Raises:
        TypeError: params or residuals are not real floating-point tensors.
        ValueError: the residuals do not depend on the parameters.

    Example:
        >>> line = {"slope": torch.tensor(2.0), "offset": torch.tensor([1.0])}
        >>> r, J = jacobian(lambda q, x: q["slope"] * x + q["offset"], line, torch.tensor([0.0, 3.0]))
        >>> r, J
        (tensor([1., 7.]), tensor([[0., 1.],
                [3., 1.]]))

    Source: Griewank and Walther (2008), Evaluating Derivatives, ch. 3 (both modes and what they cost).
    """
    lin = linearize(residual_fn, params, *batch)
    return lin.value, lin.dense()


def linearize(residual_fn: Callable[..., Any], params: Any, *batch: Any) -> FunctionLinearization:
    """Linearise ``residual_fn(params, *batch)`` for products with J and Jᵀ; nothing of size m × p is formed until asked.

    Arguments and errors are those of :func:`jacobian`.

    Example:
        >>> lin = linearize(lambda b: torch.stack([b[0] * b[1], b[1] ** 2]), torch.tensor([2.0, 3.0]))
        >>> lin.value, lin.matvec(torch.tensor([1.0, 0.0])), lin.rmatvec(torch.tensor([0.0, 1.0]))
        (tensor([6., 9.]), tensor([3., 0.]), tensor([0., 6.]))
    """
    function = FlatFunction(residual_fn, params, *batch)
    return function.linearize(function.start)


class Tree:
    """A tensor, or a mapping, tuple or list of trees, and its flat vector θ [p].

    Attributes:
        names: of the leaves; ``x`` alone where the tree is one tensor.
        shapes: of the leaves.

    Example:
        >>> tree = Tree({"a": torch.zeros(2), "b": torch.tensor(1.0)})
        >>> tree.flatten({"a": torch.zeros(2), "b": torch.tensor(1.0)}), tree.name(1), tree.unflatten(torch.arange(3.0))["b"]
        (tensor([0., 0., 1.]), 'a[1]', tensor(2.))
    """

    def __init__(self, params: Any, root: str = "x") -> None:
        self._like = params
        named = list(_leaves(params, ""))
        if not sum(leaf.numel() for _, leaf in named):
            raise ValueError("the parameters hold no numbers; expected at least one tensor with an entry.")
        self.names = [name or root for name, _ in named]
        self.shapes = [leaf.shape for _, leaf in named]
        self.sizes = [leaf.numel() for _, leaf in named]
        self.dtypes = [leaf.dtype for _, leaf in named]
        places = {leaf.device for _, leaf in named}
        if len(places) > 1:
            raise ValueError(f"the parameters lie on {sorted(map(str, places))}; expected one device.")

    @property
    def numel(self) -> int:
        """p."""
        return sum(self.sizes)

    @torch.inference_mode(False)  # a copy made in inference mode could not enter a graph
    def flatten(self, params: Any) -> Tensor:
        """θ [p], detached and a copy, in the widest of the leaves' dtypes."""
        parts = [leaf.detach().reshape(-1) for _, leaf in _leaves(params, "")]
        if [len(part) for part in parts] != self.sizes:
            raise ValueError(f"got tensors of {[len(part) for part in parts]} entries; expected {self.sizes} for {', '.join(self.names)}.")
        return torch.cat(parts).clone()

    def unflatten(self, vector: Tensor) -> Any:
        """The tree with the entries of a vector [p]; a view where dtypes agree."""
        parts = iter(zip(vector.split(self.sizes), self.shapes, self.dtypes, strict=True))

        def build(like: Any) -> Any:
            if isinstance(like, Tensor):
                part, shape, dtype = next(parts)
                return part.reshape(shape).to(dtype)
            if isinstance(like, Mapping):
                return {key: build(value) for key, value in like.items()}
            built = [build(value) for value in like]
            return type(like)(*built) if hasattr(like, "_fields") else type(like)(built)

        return build(self._like)

    def name(self, j: int) -> str:
        """What the user calls entry j of θ, such as ``rate[2]``."""
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if j < size:
                index = [int(i) for i in torch.unravel_index(torch.tensor(j), shape)] if len(shape) else []
                return f"{name}{index}" if index else name
            j -= size
        raise IndexError(f"entry {j} beyond the {self.numel} parameters")


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            raise TypeError(f"parameter {name or 'x'} has dtype {tree.dtype}; expected real floating point (float64 is best for least squares).")
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(tree, (tuple, list)):
        keys = getattr(tree, "_fields", None)
        for i, value in enumerate(tree):
            yield from _leaves(value, (f"{name}.{keys[i]}" if name else keys[i]) if keys else f"{name or 'x'}[{i}]")
    else:
        raise TypeError(
            f"parameters hold a {type(tree).__name__} at {name or 'the top'}; expected a tensor, or a mapping, tuple or list of tensors: "
            "e.g. torch.tensor([1.0, 2.0], dtype=torch.float64)."
        )


class FlatFunction:
    """r(θ) of flat θ [p], and how torch can differentiate it: what fails once is not tried again.

    Attributes:
        tree: θ ↔ the user's parameters.
        start: θ of the parameters it was made with.
    """

    def __init__(self, residual_fn: Callable[..., Any], params: Any, *batch: Any) -> None:
        if not callable(residual_fn):
            raise TypeError(f"residual_fn is a {type(residual_fn).__name__}; expected a function of the parameters.")
        self.residual_fn, self.batch = residual_fn, batch
        self.tree = Tree(params)
        self.start = self.tree.flatten(params)
        self.forward = True  # columns by dual numbers, until they fail
        self.batched = True  # rows by one batched backward, until it fails
        self.twice = True  # J v by double backward, until it fails
        self.evaluations = 0
        self._count: int | None = None  # of residuals

    def __call__(self, θ: Tensor) -> Tensor:
        """r [m], with a graph to θ if it asks for one."""
        r = _flat_residual(self.residual_fn(self.tree.unflatten(θ), *self.batch))
        if self._count not in (None, len(r)):
            raise ValueError(f"residual_fn answered {len(r)} residuals where it answered {self._count} before; expected as many at every call.")
        self._count = len(r)
        return r

    @torch.inference_mode(False)
    @torch.enable_grad()  # a residual may itself take derivatives
    def value(self, θ: Tensor) -> Tensor:
        """r [m] alone. Copies on both sides: a function may work in place, or answer the same buffer every time."""
        self.evaluations += 1
        return self(θ.clone()).detach().clone()

    def linearize(self, θ: Tensor, value: Tensor | None = None) -> FunctionLinearization:
        """The linearization at θ; ``value`` where r(θ) is known already."""
        return FunctionLinearization(self, θ.detach(), self.value(θ) if value is None else value)


def _flat_residual(r: Any) -> Tensor:
    parts = list(r) if isinstance(r, (tuple, list)) else [r]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"residual_fn answered a {type(part).__name__}; expected a tensor of residuals, or a tuple or list of tensors.")
        if not part.is_floating_point():
            advice = "; torch.view_as_real makes two real residuals of a complex one" if part.is_complex() else ""
            raise TypeError(f"residual_fn answered {part.dtype}; expected real floating point{advice}.")
    flat = torch.cat([part.reshape(-1) for part in parts]) if len(parts) != 1 else parts[0].reshape(-1)
    if not len(flat):
        raise ValueError("residual_fn answered no residuals (an empty tensor); expected at least one.")
    return flat


class FunctionLinearization:
    """A function at one θ: its value, and J by products or whole.

    Attributes:
        value: r(θ) [m], detached.
        function: what was linearised.
        θ: where [p].
    """

    def __init__(self, function: FlatFunction, θ: Tensor, value: Tensor) -> None:
        self.function, self.θ, self.value = function, θ, value
        self._graph: tuple[Tensor, Tensor] | None = None  # (leaf θ, r with a graph)
        self._pulled: tuple[Tensor, Tensor] | None = None  # (u, Jᵀu with a graph to u): one more backward is J v
        self._products = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, p) of J."""
        return len(self.value), len(self.θ)

    def matvec(self, v: Tensor) -> Tensor:
        """J v for v [p], or J V for V [p k]."""
        self._check(v, 1)
        self._products += 1
        if v.dim() == 2:
            return self._columns(v.mT)
        # The first product shares its forward pass with nothing; from the second on a kept graph is cheaper.
        if self.function.forward and (self._products == 1 or not self.function.twice):
            try:
                return self._push(v)
            except _NO_RULE as error:
                self._give_up("forward", "J v by double backward", error)
        return self._double(v)

    def rmatvec(self, u: Tensor) -> Tensor:
        """Jᵀ u for u [m], or Jᵀ U for U [m k]."""
        self._check(u, 0)
        return self._rows(u.mT).mT if u.dim() == 2 else self._rows(u[None])[0]

    def dense(self) -> Tensor:
        """J [m p]."""
        m, p = self.shape
        if p <= m and self.function.forward:
            J = self._columns(torch.eye(p, dtype=self.θ.dtype, device=self.θ.device))
            if not bool(J.any()):
                self._recorded()  # dual numbers pass a broken graph in silence: a constant function is told apart from a flat place
            return J
        return self._rows(torch.eye(m, dtype=self.value.dtype, device=self.value.device))

    def _check(self, v: Tensor, axis: int) -> None:
        if v.dim() not in (1, 2) or len(v) != self.shape[axis]:
            what = ("m", "p")[axis]
            raise ValueError(f"got a tensor {tuple(v.shape)}; expected [{what}] or [{what} k] with {what} = {self.shape[axis]}.")

    # -- forward mode ----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _push(self, v: Tensor) -> Tensor:
        load_forward_mode()
        return jvp(self.function, (self.θ.clone(),), (v.to(self.θ),))[1].detach()

    def _columns(self, V: Tensor) -> Tensor:
        """J Vᵀ [m k] for V [k p]."""
        if self.function.forward:
            step = max(1, CHUNK_ENTRIES // len(self.value))
            try:
                return torch.cat([self._push_all(part) for part in V.split(step)], dim=-1)
            except _NO_RULE as error:
                self._give_up("forward", "J row by row, by backward passes", error)
        m, p = self.shape
        if len(V) < m:
            return torch.stack([self._double(v) for v in V], dim=-1)
        return self._rows(torch.eye(m, dtype=self.value.dtype, device=self.value.device)) @ V.mT

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _push_all(self, V: Tensor) -> Tensor:
        load_forward_mode()
        θ = self.θ.clone()
        return vmap(lambda v: jvp(self.function, (θ,), (v,))[1], out_dims=-1, randomness="same")(V.to(self.θ)).detach()

    # -- reverse mode ----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _recorded(self) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            θ = self.θ.clone().requires_grad_()
            r = self.function(θ)
            if not r.requires_grad:
                raise ValueError(
                    "the residuals do not depend on the parameters as far as torch can see: residual_fn ignores them, or breaks the graph by "
                    ".detach(), .item(), numpy or torch.no_grad(). Compute the residuals by torch operations on the parameters handed in."
                )
            self._graph = θ, r
        return self._graph

    @torch.inference_mode(False)
    def _rows(self, U: Tensor) -> Tensor:
        """U J [k p] for U [k m]."""
        θ, r = self._recorded()
        U = U.to(r)
        options = {"retain_graph": True, "materialize_grads": True}
        if self.function.batched and len(U) > 1:
            step = max(1, CHUNK_ENTRIES // max(self.shape))
            try:
                return torch.cat([torch.autograd.grad(r, θ, part, is_grads_batched=True, **options)[0] for part in U.split(step)])
            except _NO_RULE as error:
                self._give_up("batched", "one backward pass for each row", error)
        return torch.stack([torch.autograd.grad(r, θ, u, **options)[0] for u in U]).detach()

    @torch.inference_mode(False)
    def _double(self, v: Tensor) -> Tensor:
        # ∂(Jᵀu)/∂u · v = J v: Jᵀu is linear in u, so its graph serves every v.
        θ, r = self._recorded()
        if self.function.twice:
            try:
                if self._pulled is None:
                    u = torch.zeros_like(r).requires_grad_()
                    self._pulled = u, torch.autograd.grad(r, θ, u, create_graph=True, materialize_grads=True)[0]
                u, g = self._pulled
                if not g.requires_grad:
                    raise RuntimeError("the backward pass left no graph")
                return torch.autograd.grad(g, u, v.to(g), retain_graph=True, materialize_grads=True)[0]
            except _NO_RULE as error:
                self._give_up("twice", "J v by forward mode or from J", error)
        return self._push(v) if self.function.forward else self.dense() @ v.to(self.θ)

    def _give_up(self, mode: str, instead: str, error: Exception) -> None:
        setattr(self.function, mode, False)
        logger.info("%s: %s", instead, str(error).splitlines()[0] if str(error) else type(error).__name__)
