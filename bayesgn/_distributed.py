"""Several processes as one: sums and gathers over ``torch.distributed``, and errors that all of them hear of.

Everything takes ``group``, a ``torch.distributed.ProcessGroup``, or ``None`` for a process on its own. Each collective begins with
:func:`check`, one small all-reduce in which a process that has failed (inside :func:`together`) says so: all raise, none waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("bayesgn.distributed")


class PeerError(RuntimeError):
    """Another process of the group failed, and this one stops with it."""


# -- who is there ------------------------------------------------------------------------------------------------------


def size(group: ProcessGroup | None) -> int:
    """Processes in the group."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: ProcessGroup | None) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def check_group(group: Any) -> None:
    """Raise TypeError where this is no group of processes that this one belongs to."""
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    hint = " (this process is not in that group)" if isinstance(group, int) else ""
    raise TypeError(
        f"group={group!r} is a {type(group).__name__}{hint}; expected a torch.distributed.ProcessGroup, e.g. torch.distributed.group.WORLD "
        "after torch.distributed.init_process_group(), or None."
    )


def _meeting_place(group: ProcessGroup, device: torch.device) -> torch.device:
    """Where a tensor of ``device`` can be sent from: there if the group's backend reaches it, else the CPU, else this process's GPU."""
    served = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if served.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu") if "cpu" in served else torch.device("cuda", torch.cuda.current_device())


# -- errors ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """A part of the work at whose end all processes have come through, or all raise: the failed one its own error, the others PeerError.

    May stand within another one of the same group.
    """
    if group is None:
        yield
        return
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        if getattr(error, "told_to", None) is not group:  # (by a part within this one)
            with contextlib.suppress(RuntimeError):  # (the others may be gone)
                _report(group, f"{type(error).__name__}: {error}")
            error.told_to = group  # type: ignore[attr-defined]
        raise
    check(group)


def check(group: ProcessGroup | None) -> None:
    """Raise PeerError where a process of the group has failed. Collective."""
    if group is None:
        return
    failed = [(r, words) for r, words in enumerate(_report(group, None)) if words]
    if failed:
        who = "process" if len(failed) == 1 else "processes"
        said = "; ".join(f"process {r}: {words}" for r, words in failed)
        raise PeerError(f"{who} {', '.join(str(r) for r, _ in failed)} of {size(group)} failed, and this one ({rank(group)}) stops too. {said}")


def _report(group: ProcessGroup, error: str | None) -> list[str | None]:
    """What every process has to report: nothing in an all-reduce of one number, words only where one has failed."""
    flag = torch.tensor(0 if error is None else 1, device=_meeting_place(group, torch.device("cpu")))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return _objects(error, group) if int(flag) else [None]


# -- collectives -------------------------------------------------------------------------------------------------------


def all_sum(tensors: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Each tensor summed over the processes of ``group``, in one float64 all-reduce; the same bits on each. Collective.

    Args:
        tensors: as many, of the same shapes, on every process; their devices and dtypes are kept.
        group: ``None`` gives the tensors back.
    """
    check(group)
    return all_sum_in_step(tensors, group)


def all_sum_in_step(tensors: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """:func:`all_sum` where nothing can have failed since the last collective: a small sum costs half as much without asking."""
    if group is None or len(tensors) == 0:
        return list(tensors)
    place = _meeting_place(group, tensors[0].device)
    flat = torch.cat([t.detach().to(place).to(torch.float64).reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.reshape(t.shape).to(t.dtype).to(t.device) for part, t in zip(parts, tensors, strict=True)]


def all_sum_of(tensors: Mapping[str, Tensor], group: ProcessGroup | None, like: Tensor) -> dict[str, Tensor]:
    """As :func:`all_sum`, by name; what a process without data lacks, or holds as a zero [] for want of a shape, counts as zeros.

    Args:
        like: tells the device of what is not here.
    """
    if group is None:
        return dict(tensors)
    known: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for others in gather({name: (t.shape, t.dtype) for name, t in tensors.items()}, group):
        for name, (shape, dtype) in others.items():
            if name not in known or len(shape) > len(known[name][0]):
                known[name] = shape, dtype
    own = [
        tensors[name].expand(shape) if name in tensors else torch.zeros(shape, dtype=dtype, device=like.device)
        for name, (shape, dtype) in sorted(known.items())
    ]
    return dict(zip(sorted(known), all_sum(own, group), strict=True))


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """The value of every process, in their order. Collective; small objects, which are pickled between the processes."""
    if group is None:
        return [value]
    check(group)
    return _objects(value, group)


def _objects(value: Any, group: ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def gather_tensors(tensors: Mapping[str, Tensor], group: ProcessGroup | None, like: Tensor) -> list[dict[str, Tensor]]:
    """The tensors of every process, whatever their names and shapes, on ``like``'s device. Collective."""
    if group is None:
        return [dict(tensors)]
    lists = gather({name: (t.shape, t.dtype) for name, t in tensors.items()}, group)
    place, out = _meeting_place(group, like.device), []
    for r, shapes in enumerate(lists):
        found = {}
        for name, (shape, dtype) in shapes.items():
            here = r == rank(group)
            t = tensors[name].detach().contiguous().to(place) if here else torch.empty(shape, dtype=dtype, device=place)
            dist.broadcast(t, dist.get_global_rank(group, r), group=group)
            found[name] = tensors[name] if here else t.to(like.device)
        out.append(found)
    return out


def from_first(tensors: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """The tensors of the first process, for all, which hold others of the same shapes. Collective."""
    if group is None:
        return list(tensors)
    check(group)
    out = []
    for t in tensors:
        sent = t.detach().contiguous().to(_meeting_place(group, t.device)).clone()
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        out.append(sent.to(t.device))
    return out


def object_from(value: Any, group: ProcessGroup | None, root: int = 0) -> Any:
    """The value of process ``root``, for all. Collective."""
    if group is None:
        return value
    check(group)
    held = [value if rank(group) == root else None]
    dist.broadcast_object_list(held, dist.get_global_rank(group, root), group=group)
    return held[0]


def led(
    product: Callable[[Tensor], Tensor], lead: Callable[[Callable[[Tensor], Tensor]], list[Tensor]], group: ProcessGroup | None, like: Tensor
) -> list[Tensor]:
    """``lead(H)`` with H V = Σ product(V) over all processes, worked out by the first of them while the others serve its products.

    One process decides, so that rounding which differs between machines cannot send the processes apart. All get the answer, on ``like``'s
    device. Collective.
    """
    if group is None:
        return lead(product)
    if rank(group) > 0:
        while (asked := _sent(None, group, like)) is not None:
            all_sum([product(asked[0])], group)
        return _sent(None, group, like) or []

    def H(V: Tensor) -> Tensor:
        _sent([V], group, like)
        return all_sum([product(V)], group)[0]

    answer = lead(H)
    _sent(None, group, like)
    _sent(answer, group, like)
    return answer


def _sent(tensors: list[Tensor] | None, group: ProcessGroup, like: Tensor) -> list[Tensor] | None:
    """The first process's tensors, of shapes that only it knows, or its None, for all."""
    shapes = object_from(None if tensors is None else [(t.shape, t.dtype) for t in tensors], group)
    if shapes is None:
        return None
    if rank(group) > 0:
        tensors = [torch.empty(shape, dtype=dtype, device=like.device) for shape, dtype in shapes]
    return from_first(tensors or [], group)


def check_same(what: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """Raise ValueError, on every process, where one of them has something else than the first under some name. Collective."""
    lists = gather(dict(what), group)
    for r, other in enumerate(lists):
        odd = next((name for name, value in lists[0].items() if other.get(name) != value), None)
        if odd is not None:
            raise ValueError(
                f"{odd} of process {r} is {_short(other.get(odd))}, but of process 0 {_short(lists[0][odd])}; every process must bring the same "
                "net at the same weights, and the same settings: load them from one file, or broadcast them from one process (buffers, too: "
                "DistributedDataParallel leaves the running statistics of BatchNorm to each process)."
            )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# -- vectors in pieces -------------------------------------------------------------------------------------------------


def join_rows(piece: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The pieces [sizes[r] …] of all processes, one below the other. Collective, in step as :func:`all_sum_in_step`."""
    sent = torch.zeros(max(sizes), *piece.shape[1:], dtype=piece.dtype, device=_meeting_place(group, piece.device))
    sent[: len(piece)] = piece.detach()
    found = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(found, sent, group=group)
    return torch.cat([t[:n] for t, n in zip(found, sizes, strict=True)]).to(piece.device)


class Pieces:
    """Vectors [p s] of which every process holds some rows, as many on each (but the last).

    Args:
        p: rows of the whole.
        group: the processes.

    Attributes:
        own: the rows of this process.
    """

    def __init__(self, p: int, group: ProcessGroup) -> None:
        self.p, self.group = p, group
        self._most = -(-p // size(group))
        start = min(p, self._most * rank(group))
        self.own = slice(start, min(p, start + self._most))

    def join(self, piece: Tensor) -> Tensor:
        """The whole [p s] from the pieces. Collective, in step."""
        most, p = self._most, self.p
        return join_rows(piece, [min(p, most * (r + 1)) - min(p, most * r) for r in range(size(self.group))], self.group)

    def sum(self, whole: Tensor) -> Tensor:
        """This process's rows of Σ whole. Collective."""
        # (A reduce-scatter would send less, but gloo has had it only lately.)
        return all_sum([whole], self.group)[0][self.own]


# -- data --------------------------------------------------------------------------------------------------------------


def shard(data: Any, group: ProcessGroup | None) -> Any:
    """This process's part of ``data``, of which every datum is in exactly one: consecutive pieces whose sizes differ by one at most.

    Unlike ``torch.utils.data.DistributedSampler``, which repeats data until all parts are as long, or drops some: sums over data would count
    them twice, or not at all.

    Args:
        data: a Dataset with a length (a ``Subset`` comes back, for a DataLoader of your own), or a tensor, tuple or mapping of tensors, data first.
        group: a ``torch.distributed.ProcessGroup``; ``None`` (``torch.distributed.group.WORLD`` without ``init_process_group``): all of them.

    Raises:
        TypeError: for data without a length, such as an IterableDataset or a DataLoader.

    Example:
        >>> import torch
        >>> x, y = shard((torch.arange(5.0)[:, None], torch.arange(5.0)), group=None)  # one process: all of it
        >>> len(x), len(y)
        (5, 5)
    """
    check_group(group)
    dataset = isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset) and hasattr(data, "__len__")
    tensors = [] if dataset else _tensors(data)
    if not dataset and not tensors:
        raise TypeError(
            f"data is a {type(data).__name__}; expected a Dataset with a length, or tensors. Shard the dataset and make the loader from it: "
            "DataLoader(bgn.shard(dataset, group), batch_size=…)."
        )
    odd = next((t for t in tensors if t.dim() == 0 or len(t) != len(tensors[0])), None)
    if odd is not None:
        raise ValueError(f"a tensor of shape {tuple(odd.shape)} beside one of shape {tuple(tensors[0].shape)}; all must run over data first.")
    n, r, processes = len(tensors[0] if tensors else data), rank(group), size(group)  # type: ignore[arg-type]
    part = range(n * r // processes, n * (r + 1) // processes)
    return torch.utils.data.Subset(data, part) if dataset else _rows(data, slice(part.start, part.stop))


def _tensors(data: Any) -> list[Tensor]:
    """The tensors of a container of them; none where something else is in it."""
    if isinstance(data, Tensor):
        return [data]
    parts = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else []
    inside = [_tensors(part) for part in parts]
    return [t for found in inside for t in found] if all(inside) else []


def _rows(data: Any, part: slice) -> Any:
    if isinstance(data, Tensor):
        return data[part]
    return {k: _rows(v, part) for k, v in data.items()} if isinstance(data, Mapping) else tuple(_rows(v, part) for v in data)


def check_loader(data: Any, group: ProcessGroup | None) -> None:
    """Raise where a DataLoader's DistributedSampler does not give exactly this process's part of the data of ``group``."""
    samplers = [getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)]
    sampler = next((s for s in samplers if isinstance(s, torch.utils.data.DistributedSampler)), None)
    if sampler is None or sampler.num_replicas == 1:
        return
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return
        raise ValueError(
            f"the loader's DistributedSampler gives process {sampler.rank} of {sampler.num_replicas} its part of the data, and without group= the "
            "answer would be of that part alone. Pass group=torch.distributed.group.WORLD on every process to have that of all data; or a loader "
            "without this sampler."
        )
    if (sampler.num_replicas, sampler.rank) != (size(group), rank(group)):
        raise ValueError(
            f"the loader's DistributedSampler gives part {sampler.rank} of {sampler.num_replicas}, but this is process {rank(group)} of "
            f"{size(group)} in the group; make the sampler with num_replicas and rank of that group."
        )
    n = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.total_size > n:
        raise ValueError(
            f"the loader's DistributedSampler repeats {sampler.total_size - n} of the {n} data to make {size(group)} parts of equal length, and they "
            "would count twice. Use DataLoader(bgn.shard(dataset, group), …), which does not, or drop_last=True in the sampler to leave the rest out."
        )
    if sampler.total_size < n:
        logger.warning("the loader's DistributedSampler leaves out %d of %d data (drop_last=True)", n - sampler.total_size, n)


def own_seed(seed: int, group: ProcessGroup | None) -> int:
    """A seed for this process's draws, given one that all share: the same draws for different data would be correlated."""
    return (seed + rank(group) * 0x9E3779B97F4A7C15) % 2**63


def own_generator(generator: torch.Generator | None, group: ProcessGroup, device: torch.device) -> torch.Generator:
    """A generator of this process, seeded by one draw from the first process's (torch's global one for ``None``); all draw once. Collective."""
    place = device if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=place))
    return torch.Generator(place).manual_seed(own_seed(object_from(seed, group), group))
