"""Linearization: a net's outputs and the factors of its Jacobian on one batch. The only door to autograd.

    f(x; θ) ≈ f(x; θ*) + J(x) (θ − θ*),    J = ∂f/∂θ at θ*

A :class:`Linearizer` plans once per net which engine serves which block (checked on two data against plain
autograd), and is then called with batches. The net itself is never changed: modes, flags and hooks are restored.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._parameters import ParameterVector, unwrap
from bayesgn.ggn import backpack, functional, hooks
from bayesgn.ggn.blocks import Block, find_blocks
from bayesgn.ggn.evaluation import aliases, at_rest, call, close, per_datum
from bayesgn.ggn.factors import Dense, Factors, Masked

logger = logging.getLogger("bayesgn.ggn")

CHUNK_BYTES = 2**24
MOST_COLUMNS = 5120  # data × columns


class Linearization:
    """One batch of a net at θ*.

    Attributes:
        output: the likelihood's rows [n *positions c] (detached unless asked to be differentiable in x).
        n, r: data, and outputs of one datum (positions × c).
        blocks: the units of weights that :meth:`factors` answers for.
        source: (linearizer, x, rows), where it comes from, for products that want a graph of their own.
    """

    def __init__(
        self, output: Tensor, blocks: list[Block], pull: Callable[[Tensor], list[Factors]], source: tuple | None = None
    ) -> None:
        self.output = output
        self.source = source
        self.blocks = blocks
        self.n = output.shape[0]
        self.r = output[0].numel()
        self._pull = pull

    def factors(self, S: Tensor | None = None) -> list[Factors]:
        """Factors of JᵀS for S [n r k], of J itself (k = r) for ``None``; one for each block.

        May be called once per linearization: the graph is freed on the way back.
        """
        if S is None:
            S = torch.eye(self.r, dtype=self.output.dtype, device=self.output.device).expand(self.n, -1, -1)
        if S.shape[:2] != (self.n, self.r):
            raise ValueError(f"S has shape {tuple(S.shape)}; expected [{self.n}, {self.r}, k] for this batch.")
        return self._pull(S.to(self.output.dtype))


class _OverwrittenError(RuntimeError):
    """A tapped input was changed in place by the net, on this batch but not on the first."""

    def __init__(self) -> None:
        super().__init__(
            "the net overwrote the input of one of its layers in place on this batch, though not on the first; give that operation inplace=False."
        )


class Linearizer:
    """Plans and makes :class:`Linearization` s of one net for one choice of weights.

    Args:
        net: the trained network.
        vector: the selected parameters (:meth:`ParameterVector.of`).
        use_backpack: ``None`` lets BackPACK serve the nets it is no slower on (plain chains without convolutions on a CPU,
            any plain chain on a GPU); ``True`` wherever it can; ``False`` never.
    """

    def __init__(self, net: nn.Module, vector: ParameterVector, use_backpack: bool | None = None) -> None:
        self.net = unwrap(net)
        self.vector = vector
        self.blocks = find_blocks(self.net, vector)
        self._first = next(iter(vector.tensors(self.net).values()))  # tells device and dtype
        self.use_backpack = use_backpack
        self.engine: backpack.Engine | None = None
        self.r = 1  # outputs of one datum, known once planned
        self.widest = 1  # numbers in the largest tapped output of one datum
        self._planned = False
        self._vectorised = True  # explicit Jacobians by vmap over data, until it fails
        self._batched = True  # all columns in one backward, until it fails

    # -- forward ---------------------------------------------------------------------------------------------------

    def evaluate(self, x: Any, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs only [n *positions c], without a graph."""
        with at_rest(self.net, {}), torch.no_grad():
            return per_datum(rows(call(self.net, self.place(x))), _data.len_of(x))

    def __call__(self, x: Any, rows: Callable[[Tensor], Tensor], differentiable: bool = False) -> Linearization:
        """Linearise on a batch; ``rows`` brings the raw output to [n *positions c].

        ``differentiable`` keeps a graph from outputs and factors back to x (for gradients of predictive variances).
        """
        x = self.place(x)
        self.plan(x, rows)
        return self._linearize(x, rows, differentiable)

    def prepare(self, x: Any, rows: Callable[[Tensor], Tensor]) -> None:
        """Settle blocks and engines on a first batch (otherwise the first call does)."""
        self.plan(self.place(x), rows)

    def parts(self, x: Any, rows: Callable[[Tensor], Tensor]) -> Iterator[Linearization]:
        """Linearizations of x a piece at a time, small enough for J of all outputs."""
        x = self.place(x)
        self.plan(x, rows)
        for _, part in _data.split(x, self.chunk(self.r)):
            yield self._linearize(part, rows, False)

    def chunk(self, columns: int) -> int:
        """How many data one backward of so many columns should take: δ of the widest layer stays within ``CHUNK_BYTES``.

        Larger pieces are slower, not only larger: beyond 32 MB an allocator hands out fresh pages that must be zeroed each time.
        """
        p = self._first
        entry = p.element_size() * columns
        explicit = sum(b.numel for b in self.blocks if b.module is None)  # whose Jacobian is formed: 4 times the room
        room = min(CHUNK_BYTES // (entry * self.widest), 4 * CHUNK_BYTES // (entry * max(explicit, 1)))
        return max(1, min(room, MOST_COLUMNS // columns))

    def place(self, x: Any) -> Any:
        """x on the net's device, as tensors that may enter a graph."""
        p = self._first
        x = _data.to(x, p.device)
        with torch.inference_mode(False):  # tensors made under inference_mode cannot enter a graph; their copies can
            return _data.apply(x, lambda t: t.clone() if t.is_inference() else t)

    def _linearize(self, x: Any, rows: Callable, differentiable: bool) -> Linearization:
        n = _data.len_of(x)
        if self.engine is not None and not differentiable:
            engine = self.engine
            raw, inputs = engine.forward(x)
            output, taps = rows(raw), {}
            flat = output.reshape(n, -1)
        else:
            engine, inputs = None, []
            # Differentiable factors keep a graph to the weights too; a later backward must not reach the net's own .grad.
            weights = aliases(self.vector.tensors(self.net)) if differentiable else None
            with at_rest(self.net, self.vector.tensors(self.net)), hooks.tapping(self.blocks, n, differentiable) as taps:
                output = per_datum(rows(call(self.net, x, weights)), n)
                flat = output.reshape(n, -1)
            if hooks.stale(taps):
                raise _OverwrittenError
        per_datum(output, n)

        @torch.inference_mode(False)
        @torch.set_grad_enabled(differentiable)
        def pull(S: Tensor) -> list[Factors]:
            if engine is not None:
                found = engine.pull(inputs, S.permute(2, 0, 1).contiguous())
            else:
                found = self._pull_taps(taps, flat, S, differentiable)
            explicit = self._pull_explicit(x, rows, S, differentiable)
            out = []
            for i, b in enumerate(self.blocks):
                if b.module is None:
                    out.append(explicit[i])
                elif found[i][0]:
                    out.append(hooks.factors(b, *found[i], n))
                else:
                    out.append(hooks.zero_factors(b, n, S.shape[-1], output))
            # [n]: some position's target is missing, and S = 0 for all of its outputs.
            missing = (S == 0).all(-1).unflatten(1, (-1, output.shape[-1])).all(-1).any(-1)
            return [f.without_missing(missing) for f in out] if bool(missing.any()) else out

        return Linearization(output if differentiable else output.detach(), self.blocks, pull, (self, x, rows))

    # -- backward --------------------------------------------------------------------------------------------------

    def _pull_taps(self, taps: dict, flat: Tensor, S: Tensor, differentiable: bool) -> dict[int, tuple[list, list]]:
        """{block: (calls, δ [k *shape] of each call)} for flat outputs [n r] and S [n r k]."""
        calls = [(i, tap) for i, found in taps.items() for tap in found]
        deltas = self._backward(flat, [tap for _, tap in calls], S, differentiable) if calls else []
        out: dict[int, tuple[list, list]] = {i: ([], []) for i in taps}
        for (i, tap), δ in zip(calls, deltas, strict=True):
            out[i][0].append(tap)
            out[i][1].append(δ)
        return out

    def _backward(self, flat: Tensor, calls: list, S: Tensor, differentiable: bool) -> list[Tensor]:
        columns, edges = S.permute(2, 0, 1).contiguous(), [tap.edge for tap in calls]
        options = {"retain_graph": True, "allow_unused": True, "create_graph": differentiable}
        if self._batched and len(columns) > 1 and not differentiable:
            try:
                found = torch.autograd.grad(flat, edges, columns, is_grads_batched=True, **options)
                return [flat.new_zeros(len(columns), *t.shape) if d is None else d for d, t in zip(found, calls, strict=True)]
            except RuntimeError as error:
                logger.info("columns run one backward at a time: %s", str(error).splitlines()[0])
                self._batched = False
        per_column = [torch.autograd.grad(flat, edges, c, **options) for c in columns]
        return [
            torch.stack([flat.new_zeros(tap.shape) if d is None else d for d in ds])
            for ds, tap in zip(zip(*per_column, strict=True), calls, strict=True)
        ]

    def _pull_explicit(self, x: Any, rows: Callable, S: Tensor, differentiable: bool) -> dict[int, Factors]:
        explicit = {i: b for i, b in enumerate(self.blocks) if b.module is None}
        if not explicit:
            return {}
        names = [n for b in explicit.values() for n in b.parameters]
        selected = self.vector.tensors(self.net)

        def one(net: nn.Module, datum: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
            return rows(call(net, datum, weights))

        J: dict[str, Tensor] | None = None
        if self._vectorised and not differentiable:
            try:
                with at_rest(self.net, {}):
                    J = functional.jacobians_vmap(self.net, names, one, x, S)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                logger.info("explicit Jacobians run datum by datum (slow): %s", str(error).splitlines()[0])
                self._vectorised = False
        if J is None:
            with at_rest(self.net, {n: selected[n] for n in names}):
                J = functional.jacobians_loop(self.net, names, one, x, S, differentiable)
        out: dict[int, Factors] = {}
        for i, b in explicit.items():
            block = torch.cat([J[n] for n in b.parameters], dim=-1)
            out[i] = Dense(block) if b.mask is None else Masked(Dense(block), b.mask)
        return out

    # -- planning --------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    def plan(self, x: Any, rows: Callable[[Tensor], Tensor]) -> None:
        """Choose an engine for every block by comparing it with plain autograd, datum by datum, on two data of ``x``.

        Called by the first linearization; blocks that differ (tied or borrowed weights, positions that cannot be told
        from data) get an explicit Jacobian.
        """
        if self._planned:
            return
        # A lone datum is shown twice: layouts can be told apart only where there are two.
        two = _data.rows(x, [0, 1] if _data.len_of(x) > 1 else [0, 0])
        n = 2
        selected = self.vector.tensors(self.net)
        with at_rest(self.net, selected), hooks.tapping(self.blocks, n) as taps:
            output = per_datum(rows(call(self.net, two)), n)
        _data.check_finite(output, "the net's output")  # NaN equals nothing, so no engine would pass its check
        flat = output.reshape(n, -1)
        self.r = flat.shape[1]
        if not flat.requires_grad:
            raise ValueError(
                "the net's output does not depend on the selected parameters (was it computed under no_grad or detached "
                f"inside forward?); selected: {list(self.vector.names)[:5]}."
            )
        self.widest = max([self.r, *(math.prod(tap.shape) // n for calls in taps.values() for tap in calls)])
        S = torch.randn(*flat.shape, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(flat)
        with at_rest(self.net, selected):  # (a frozen parameter may have been selected by name)
            reference = self._reference(flat, S)
        self._warn_if_coupled(two, rows, output)
        overwritten = hooks.stale(taps)
        found = {} if overwritten else self._pull_taps(taps, flat, S, False)
        self.blocks = [
            b if b.module is None else _settle(b, *found.get(i, ([], [])), reference[i], n)
            for i, b in enumerate(self.blocks)
        ]
        self._check_broadcast(two, rows, output, S, reference)
        self._check_explicit(two, rows, S, reference)
        if any(isinstance(b.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for b in self.blocks) and not flat.is_cuda:
            self._batched = False  # a batched convolution backward is slower than one column at a time on a CPU (1.8×)
        self._plan_backpack(two, output, S, reference)
        self._planned = True
        logger.info(
            "engine %s for %s; explicit Jacobians for %s",
            "BackPACK" if self.engine is not None else "hooks",
            [b.name for b in self.blocks if b.module is not None],
            [b.name for b in self.blocks if b.module is None],
        )

    def _warn_if_coupled(self, two: Any, rows: Callable, output: Tensor) -> None:
        """Say so where the answer to a datum is random, or depends on the other data of its batch: J is then not a datum's own."""
        again = self.evaluate(two, rows)
        repeated = self.evaluate(_data.rows(two, [0, 0, 0]), rows)  # (three, so that no other dimension passes for data)
        for other, first, why in (
            (again, output, "are random: two calls with the same x differ"),
            (repeated[:1], output[:1], "for a datum depend on the other data of its batch"),
        ):
            if not close(other, first):
                warnings.warn(
                    f"the answers of {type(self.net).__name__} {why} (by up to {(other - first).abs().max().item():.3g}, in eval mode), so "
                    "that its curvature and predictions are not those of one function. Look for functional dropout without "
                    "training=self.training, sampling in forward, or statistics over the batch.",
                    stacklevel=2,
                )
                return

    def _check_broadcast(self, two: Any, rows: Callable, output: Tensor, S: Tensor, reference: list[Tensor]) -> None:
        """Keep "broadcast" blocks (so far only guessed at) where the net answers the same with their output spread over data."""
        guesses = [i for i, b in enumerate(self.blocks) if b.layout == "broadcast"]
        if not guesses:
            return
        n = len(output)
        try:
            with at_rest(self.net, self.vector.tensors(self.net)), hooks.tapping(self.blocks, n) as taps:
                again = rows(call(self.net, two))
                found = self._pull_taps(taps, again.reshape(n, -1), S, False)
            same = close(again, output)
            right = {
                i: same and close(hooks.factors(self.blocks[i], *found[i], n).jacobian()[:, 0], reference[i]) for i in guesses
            }
        except (RuntimeError, IndexError, ValueError):
            right = dict.fromkeys(guesses, False)
        for i in guesses:
            if not right[i]:
                logger.info("%s: its answer is shared by all data; explicit Jacobian", self.blocks[i].name)
                self.blocks[i] = replace(self.blocks[i], module=None, layout="datum-first")

    def _check_explicit(self, two: Any, rows: Callable, S: Tensor, reference: list[Tensor]) -> None:
        """Walk explicit Jacobians in a loop where the vectorised ones differ from plain autograd."""
        if any(isinstance(m, nn.PReLU) for m in self.net.modules()):
            # torch 2.14: nested vmap of PReLU's backward is wrong for some counts of data and columns, not for all.
            logger.info("explicit Jacobians run datum by datum (slow): the net has a PReLU, which vmap differentiates wrongly")
            self._vectorised = False
        if not self._vectorised:
            return
        found = self._pull_explicit(two, rows, S.expand(-1, -1, 2), False)
        wrong = [i for i, f in found.items() if not all(close(f.jacobian()[:, k], reference[i]) for k in range(2))]
        if wrong:
            logger.info("explicit Jacobians run datum by datum (slow): vmap's answer differs for %s", [self.blocks[i].name for i in wrong])
            self._vectorised = False

    def _reference(self, flat: Tensor, S: Tensor) -> list[Tensor]:
        """For each block Jᵀ s of each datum [n p_block] by plain autograd, S [n r 1]."""
        selected = self.vector.tensors(self.net)
        per_datum = []
        for f, s in zip(flat, S, strict=True):
            grads = torch.autograd.grad(
                f, list(selected.values()), s[:, 0], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            per_datum.append(dict(zip(selected, grads, strict=True)))
        out = []
        for b in self.blocks:
            J = torch.stack([torch.cat([g[n].reshape(-1) for n in b.parameters]) for g in per_datum])
            out.append(J if b.mask is None else J[:, b.mask])
        return out

    def _plan_backpack(self, two: Any, output: Tensor, S: Tensor, reference: list[Tensor]) -> None:
        convolves = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in self.net.modules())
        wanted = (output.is_cuda or not convolves) if self.use_backpack is None else self.use_backpack
        if not wanted or not backpack.eligible(self.net, self.blocks, two, output):
            return
        try:
            engine = backpack.Engine(self.net, self.blocks)
            raw, inputs = engine.forward(two)
            found = engine.pull(inputs, S.permute(2, 0, 1).contiguous())
            right = close(raw.reshape(output.shape), output) and all(
                close(hooks.factors(b, *found[i], len(raw)).jacobian()[:, 0], reference[i]) for i, b in enumerate(self.blocks)
            )
        except Exception as error:  # whatever it is, hooks serve the net as well
            logger.info("BackPACK does not serve this net (%s: %s)", type(error).__name__, error)
            return
        if right:
            self.engine = engine
        else:
            logger.info("BackPACK's answer differs from autograd on this net: not used")


def _settle(block: Block, calls: list, deltas: list, reference: Tensor, n: int) -> Block:
    """The block with the first layout whose factors equal the reference, or made explicit."""
    if not calls:
        return block if not reference.any() else replace(block, module=None)
    if not reference.any() and any(tap.input.dim() != 2 or tap.shape[0] != n for tap in calls):
        logger.info("%s: the first two data do not reach it, so its layout is not known; explicit Jacobian", block.name or "the net")
        return replace(block, module=None)
    for layout in ("datum-first", "datum-second"):
        trial = replace(block, layout=layout)
        try:
            found = hooks.factors(trial, calls, deltas, n)
        except (RuntimeError, IndexError):
            continue  # the shapes do not fit this layout
        if found.n == n and close(found.jacobian()[:, 0], reference):
            return trial
    if isinstance(block.module, nn.Embedding) and all(tap.shape[0] == 1 or tap.input.dim() == 1 for tap in calls):
        return replace(block, layout="broadcast")
    logger.info("%s: its weights act outside its own forward; explicit Jacobian", block.name or "the net")
    return replace(block, module=None)
