"""Checkpoints of a fit: sums over data so far, so that an interrupted walk goes on where it stopped."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data, _files

logger = logging.getLogger("bayesgn.models")

KIND = "Checkpoint"


class Checkpoint:
    """Where, and how often, an unfinished fit is written. The file goes when the fit is done.

    A restart with the same net, model, likelihood and data reads it, walks past the batches that were added (without
    linearising them), checks that the last of them is the same batch, and goes on: the sums, and so the posterior, are the
    same to the last bit. Structures that walk the data several times (EigenKron, LowRank, inducing Gram) begin anew, and
    the log says so.

    Args:
        path: of the file.
        seconds: write when so much time went by since the last time (and when the loader raises).
        batches: write after so many batches, whatever the time; ``None``: by time alone.

    Raises:
        ValueError: (from the fit) when the file belongs to another net, model or likelihood, or the data come in another order.

    Example:
        >>> import tempfile
        >>> from bayesgn import laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; batches = [(x[:10], x[:10]), (x[10:], x[10:])]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = models.Checkpoint(Path(folder) / "fit.safetensors", batches=1)
        ...     model = models.Network(torch.nn.Linear(1, 1).eval())
        ...     posterior = laplace(model, likelihoods.Gaussian(0.1), batches, checkpoint=checkpoint)
        >>> checkpoint.done, posterior.num_data
        (2, 20)
    """

    def __init__(self, path: str | Path, seconds: float = 30.0, batches: int | None = None) -> None:
        if seconds < 0 or (batches is not None and batches < 1):
            raise ValueError(f"seconds={seconds}, batches={batches}; expected seconds ≥ 0 and batches ≥ 1 (or None).")
        self.path, self.seconds, self.batches = Path(path), seconds, batches
        self.done = 0  # batches added
        self.last = ""  # hash of the last of them
        self._walk: tuple[Any, Any, dict, dict] | None = None
        self._written = (0, 0.0)

    def of_process(self, rank: int, size: int) -> Checkpoint:
        """Of the same rhythm, for one of several processes that fit together: each has a file of its own."""
        own = copy.copy(self)
        own.path = self.path.with_name(f"{self.path.name}.{rank}of{size}")
        return own

    def open(self, stream, curvature, header: dict, tensors: dict[str, Tensor]) -> None:
        """Begin, or take up, the walk of ``stream`` into ``curvature``; ``header`` and ``tensors`` say whose it is."""
        self.done, self.last, self._walk = 0, "", None
        self._written = (0, time.monotonic())
        if not curvature.resumable:
            logger.warning(
                "checkpoint %s: %s walks the data more than once, so an interrupted fit begins anew (nothing is written)",
                self.path, type(curvature).__name__,
            )  # fmt: skip
            return
        self._walk = stream, curvature, header, tensors
        if not self.path.exists():
            return
        saved, found = _files.read(self.path, KIND)
        other = _files.differences({k: saved.get(k) for k in header}, {k: _plain(v) for k, v in header.items()})
        other += [f"{k} differs" for k, t in tensors.items() if k not in found or not torch.equal(found[k], t.cpu())]
        if other:
            shown = "; ".join(o if len(o) < 200 else o[:200] + "…" for o in other[:3])
            raise ValueError(
                f"checkpoint {str(self.path)!r} belongs to another fit: {shown}. Delete it, or pass another path."
            )
        curvature.load({k: t.clone() for k, t in _files.section(found, "curvature").items()})
        device = stream.linearizer.vector.flatten(stream.linearizer.net).device
        stream.statistics = {k: t.to(device) for k, t in _files.section(found, "statistics").items()}
        stream.count, self.done, self.last = saved["count"], saved["done"], saved["last"]
        if stream.generator is not None and "generator" in found:
            stream.generator.set_state(found["generator"])
        logger.info("checkpoint %s: %d batches (%d data) were added before; going on", self.path, self.done, stream.count)

    def skips(self, index: int, x: Any, y: Tensor) -> bool:
        """Whether batch ``index`` was added before; raises where the last such is not the batch it was."""
        if index >= self.done:
            return False
        if index == self.done - 1 and _files.digest([*_data.tensors(x), y]) != self.last:
            raise ValueError(
                f"checkpoint {str(self.path)!r}: batch {index} is not the one that was added before the interruption, so the data come in "
                "another order. Use shuffle=False, or a DataLoader with a freshly seeded generator; or delete the file to begin anew."
            )
        return True

    def added(self, index: int, x: Any, y: Tensor) -> None:
        """Batch ``index`` is in; write if it is time."""
        if self._walk is None:
            return
        self.done, self.last = index + 1, ""
        self._batch = x, y
        batches, at = self._written
        due = self.batches is not None and self.done - batches >= self.batches
        if due or time.monotonic() - at >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write what was added so far."""
        if self._walk is None or self.done == 0 or self.done == self._written[0]:
            return
        stream, curvature, header, tensors = self._walk
        x, y = self._batch
        self.last = _files.digest([*_data.tensors(x), y])
        state = tensors | {f"curvature.{k}": t for k, t in curvature.tensors().items()}
        state |= {f"statistics.{k}": t for k, t in stream.statistics.items()}
        if stream.generator is not None:
            state["generator"] = stream.generator.get_state()
        _files.write(self.path, KIND, {**header, "count": stream.count, "done": self.done, "last": self.last}, state)
        self._written = (self.done, time.monotonic())

    def close(self, batches: int) -> None:
        """The walk is over after ``batches`` batches."""
        if batches < self.done:
            raise ValueError(
                f"checkpoint {str(self.path)!r}: {self.done} batches were added before the interruption but the loader gave {batches} now; "
                "it is not the same data. Delete the file to begin anew."
            )

    def remove(self) -> None:
        """The fit is done: the file is of no more use."""
        if self._walk is not None:
            self.path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    import json

    return json.loads(json.dumps(value))
