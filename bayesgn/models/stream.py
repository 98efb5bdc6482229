"""Data on their way into a curvature: batches, linearised and bent by a rule, checked, and the same at every walk."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgn import _data, _distributed
from bayesgn.ggn.evaluation import close
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.structure import accumulator, working
from bayesgn.models.checkpoint import Checkpoint
from bayesgn.rules import Laplace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Two walks over the same data differ by rounding alone (other batches, another order), relative to the sum of sizes.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}
HALF_TOLERANCE = 5e-3


class Stream:
    """Batches as (linearization, S), checked; the likelihood's statistics and the data seen are noted on the first walk.

    A second walk gives the same batches and the same random S; it needs data that can be walked twice, and raises where they
    are other data than those of the first: the sums of Λf and diag Λ over data are compared. The likelihood is copied, so that
    a later walk bends the loss as the first did.

    Random curvatures draw from a generator of the stream's own, seeded by one draw from ``generator`` (from torch's global one if
    none is given and the curvature is random); neither is touched afterwards.

    With a ``group`` of processes the data are this process's part, possibly none. All plan the net on the same two data and draw apart from one
    another; :meth:`join` adds up what they noted.
    """

    def __init__(
        self,
        linearizer: Linearizer,
        likelihood,
        rule: Laplace,
        data: Any,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        checkpoint: Checkpoint | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.linearizer, self.likelihood, self.rule, self.group = linearizer, copy.deepcopy(likelihood), rule, group
        _distributed.check_loader(data, group)
        self.data = [] if group is not None and _no_rows(data) else _data.batches(data)
        self.once_only = isinstance(self.data, Iterator)
        self.progress, self.checkpoint = progress, checkpoint
        self._like = next(iter(linearizer.vector.tensors(linearizer.net).values()))  # tells device and dtype
        self._seed: tuple[int, torch.device] | None = None
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            self._seed = int(seed), generator.device
        elif rule.curvature.random:
            self._seed = int(torch.randint(2**62, (), device="cpu")), self._like.device
        if group is not None:
            first, device = _distributed.object_from(self._seed, group), self._like.device if self._seed is None else self._seed[1]
            self._seed = None if first is None else (_distributed.own_seed(first[0], group), device)
        self.generator = self._own_generator()  # of the first walk; a checkpoint keeps its state
        self.walks = 0
        self._walked = 0  # data of the first walk
        self._sums: Tensor | None = None  # of the first walk, see _digest
        self._sizes = torch.zeros(())
        self._begun: Iterator | None = None
        self.count = 0  # data seen
        self.statistics: dict[str, Tensor] = {}
        self._validate = Validation(self.likelihood)

    def _own_generator(self) -> torch.Generator | None:
        if self._seed is None:
            return None
        seed, device = self._seed
        return torch.Generator(device).manual_seed(seed)

    def begin(self) -> None:
        """Plan the linearizer on the first batch, so that blocks are settled before a structure starts."""
        walk = iter(self.data)
        skipped, x = [], None
        for batch in walk:
            if _data.len_of(batch[0]) == 0:
                skipped.append(batch)
                continue
            x = batch[0]
            # The first walk goes on from here: a loader that draws from a stream would not give this batch again.
            self._begun = itertools.chain(skipped, [batch], walk)
            break
        x = x if self.group is None else self._two_of_all(x)
        if x is None and self.once_only:
            raise ValueError("the iterator gave no data: it is empty or was walked before. Pass a DataLoader or a list of batches.")
        if x is None:
            raise ValueError(f"the loader gave no data ({len(skipped)} batches, 0 rows); there is nothing to condition on.")
        _data.check_finite(x, "x")
        with _data.advice(x, self._like):
            self.linearizer.prepare(x, self.likelihood.rows)
        if not same_net(self.linearizer, x, self.likelihood.rows):
            raise ValueError(
                f"{type(self.linearizer.net).__name__} answers otherwise than when this Network was planned (a hook, or a module put in since); "
                "make a new one: Network(net, ...)."
            )

    def _two_of_all(self, x: Any) -> Any:
        """The first two data of the first process that has any: blocks and engines are settled on them, by all alike."""
        holders = [r for r, has in enumerate(_distributed.gather(x is not None, self.group)) if has]
        two = None if x is None else _data.apply(_data.rows(x, slice(0, 2)), lambda t: t.detach().cpu())
        return _distributed.object_from(two, self.group, holders[0]) if holders else None

    def __iter__(self) -> Iterator[tuple[Linearization, Tensor]]:
        if self.walks and self.once_only:
            raise ValueError(
                "this structure walks the data more than once, but an iterator can be walked once; pass a DataLoader, a list "
                "of batches or a pair of tensors."
            )
        first_walk, self.walks = self.walks == 0, self.walks + 1
        generator = self.generator if first_walk else self._own_generator()
        scale = self.rule.curvature.scale(self.likelihood).detach()
        checkpoint, index, seen = self.checkpoint, -1, 0
        sums: Tensor | None = None
        sizes = torch.zeros(())
        for index, (x, y) in enumerate(self._batches()):
            seen += _data.len_of(x)
            if checkpoint is not None and checkpoint.skips(index, x, y):
                continue
            if _data.len_of(x) == 0:
                continue
            _data.check_finite(x, "x")
            size = self.linearizer.chunk(self.rule.curvature.columns(self.linearizer.r))
            for start, part in _data.split(x, size):
                with _data.advice(part, self._like):
                    lin = self.linearizer(part, self.likelihood.rows)
                f, target = lin.output, _data.to(y[start : start + lin.n], lin.output.device)
                self._validate(f, target)
                with torch.no_grad():
                    S = self.rule.root(self.likelihood, f, target, generator) / scale.sqrt().to(f.dtype)
                    if first_walk:
                        self._note(f, target)
                    more = _digest(f, S)
                    sums, sizes = (more[0], more[1]) if sums is None else (sums + more[0], sizes + more[1])
                yield lin, S
            if checkpoint is not None:
                checkpoint.added(index, x, y)
        if checkpoint is not None:
            checkpoint.close(index + 1)
        if first_walk:
            self._walked, self._sums, self._sizes = seen, sums, sizes
        else:
            self._compare(seen, sums, sizes)

    def join(self) -> None:
        """Statistics and number of all processes' data. Raises where all handed in the same data, which would count that many times."""
        if self.group is None:
            return
        own, sizes = (torch.zeros(()) if self._sums is None else self._sums).cpu(), self._sizes.cpu()
        found = _distributed.gather((self.count, own), self.group)
        tolerance = 1e-9 if self._like.dtype == torch.float64 else 1e-6
        alike = [n == self.count > 0 and bool(((sums - own).abs() <= tolerance * sizes).all()) for n, sums in found]
        if all(_distributed.gather(len(found) > 1 and all(alike), self.group)):
            raise ValueError(
                f"all {len(found)} processes handed in the same {self.count} data, which would count {len(found)} times. Hand each its part: "
                "bgn.shard(dataset, group), or a DistributedSampler without repeated data. (To count equal parts, give them to one process.)"
            )
        self.count = sum(n for n, _ in found)
        self.statistics = _distributed.all_sum_of(self.statistics, self.group, like=self._like)

    def _compare(self, seen: int, sums: Tensor | None, sizes: Tensor) -> None:
        """Raise where this walk met other data than the first."""
        if seen != self._walked:
            raise ValueError(
                f"this structure walks the data more than once; the first walk gave {self._walked} data, this one {seen}. Pass a loader that gives "
                "the same data at every walk (not one that draws from a generator or a stream)."
            )
        if sums is None or self._sums is None:
            return
        apart = (sums - self._sums).abs()
        if bool((apart > TOLERANCE.get(self._like.dtype, HALF_TOLERANCE) * sizes).any()):
            worst = float((apart / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).max())
            order = (
                f" Their order counts too, for {type(self.rule.curvature).__name__} draws by it: use shuffle=False."
                if self.rule.curvature.random
                else ""
            )
            raise ValueError(
                f"this structure walks the data more than once, and this walk met other data than the first ({seen} each time, but sums of the net's "
                f"answers differ by {worst:.2g} of their size). Pass a loader that gives the same data at every walk: no shuffle=True with "
                f"drop_last=True, no random augmentation, no net that answers at random.{order}"
            )

    def _note(self, f: Tensor, y: Tensor) -> None:
        self.count += f.shape[0]
        for name, value in self.likelihood.statistics(f, y).items():
            self.statistics[name] = self.statistics[name] + value if name in self.statistics else value

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches as they come; where the loader raises, what was added so far is written first."""
        source = iter(self._bar())
        while True:
            try:
                batch = next(source, None)
            except BaseException:
                if self.checkpoint is not None:
                    self.checkpoint.write()
                raise
            if batch is None:
                return
            yield batch

    def _bar(self) -> Iterable:
        data, self._begun = self.data if self._begun is None else self._begun, None
        if self.progress is False:
            return data
        from tqdm.auto import tqdm

        # Shown on its own only for work that takes longer than two seconds.
        try:
            total = len(self.data)  # type: ignore[arg-type]
        except TypeError:
            total = None
        return tqdm(data, total=total, desc="curvature", unit="batch", leave=False, delay=0 if self.progress else 2)


def _no_rows(data: Any) -> bool:
    """A pair of tensors without rows: a process's part of data that are fewer than the processes."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor) and _data.tensors(data[0]) != [] and len(data[1]) == 0


def _digest(f: Tensor, S: Tensor) -> Tensor:
    """Σ Λf and Σ diag Λ over data and positions, and the sums of their sizes [2 2 c]: what H sees of the data, in any order.

    Λf and not f: missing rows, which padding adds to a batch as it likes, have Λ = 0. Random signs that meet other data change it.
    """
    c, S = f.shape[-1], S.to(working(S.dtype))
    Λf = (S @ (S.mT @ f.detach().reshape(len(f), -1, 1).to(S))).reshape(-1, c).to(accumulator(f))
    Λ = S.square().sum(-1).reshape(-1, c).to(Λf)
    return torch.stack([torch.stack([Λf.sum(0), Λ.sum(0)]), torch.stack([Λf.abs().sum(0), Λ.sum(0)])])


class Validation:
    """``likelihood.validate`` batch by batch; what it warns of is said once, to the caller of bayesgn."""

    def __init__(self, likelihood) -> None:
        self.likelihood = likelihood
        self._warned: bool | None = None  # by the first batch

    def __call__(self, f: Tensor, y: Tensor) -> None:
        if self._warned is False:
            self.likelihood.validate(f, y)
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.likelihood.validate(f, y)
        if self._warned is None:
            self._warned = bool(said)
            for warning in said:
                warnings.warn(warning.message, stacklevel=callers_level())


def callers_level() -> int:
    """The ``stacklevel`` (for our own caller) of the first frame outside bayesgn."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "bayesgn":
        frame, level = frame.f_back, level + 1
    return level


def same_net(linearizer: Linearizer, x: Any, rows: Callable[[Tensor], Tensor]) -> bool:
    """Whether BackPACK's copy of the net, taken when it was planned, answers x as the net does now (two data are compared)."""
    if linearizer.engine is None:
        return True
    two = _data.apply(_data.rows(x, slice(0, 2)), torch.Tensor.detach)
    with torch.no_grad():
        then = rows(linearizer.engine.forward(linearizer.place(two))[0])
    now = linearizer.evaluate(two, rows)
    return close(then.to(now), now)
