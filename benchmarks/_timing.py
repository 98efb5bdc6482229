"""Timing that survives a busy machine: interleaved repeats, medians, CPU time beside wall time, guarded subprocesses."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Seconds(NamedTuple):
    """One measured call, or the medians of several."""

    cpu: float
    wall: float


def once(function: Callable[[], Any], device: str = "cpu") -> Seconds:
    """CPU and wall seconds of one call."""
    _synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    _synchronize(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, budget: float = 60.0, device: str = "cpu"
) -> dict[str, Seconds]:
    """Medians over rounds in which every function runs once, after a round of warm-up (which counts when it took the budget).

    What disturbs the machine disturbs all functions of a round alike, so *ratios* of the medians are steadier than seconds.
    No new round starts when those so far took ``budget`` seconds.
    """
    start = time.perf_counter()
    first = {name: [once(function, device)] for name, function in functions.items()}
    runs: dict[str, list[Seconds]] = {name: [] for name in functions}
    for _ in range(max(1, repeats)):
        if time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            runs[name].append(once(function, device))
    runs = {name: found or first[name] for name, found in runs.items()}
    return {
        name: Seconds(statistics.median(r.cpu for r in found), statistics.median(r.wall for r in found))
        for name, found in runs.items()
    }


def ratio(of: Seconds, to: Seconds, device: str = "cpu") -> float:
    """How many times ``to`` fits in ``of``: in CPU time, which other processes disturb least; on a GPU in wall time."""
    return of.cpu / to.cpu if device == "cpu" else of.wall / to.wall


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def resident() -> int:
    """Bytes of memory this process holds now."""
    return _status(os.getpid(), "VmRSS")


def forget_peak() -> None:
    """Let :func:`peak` start anew from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes this process has held since :func:`forget_peak`."""
    return _status(os.getpid(), "VmHWM")


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def guarded(module: str, options: dict[str, Any], seconds: float, gigabytes: float) -> dict[str, Any]:
    """What ``python -m module --job JSON`` prints as JSON in its last line, or ``{"error": why}``.

    The child runs alone, on one thread, and is stopped when it takes more than ``seconds`` or ``gigabytes``: a peer that
    hangs, grows or brings the interpreter down costs a line in the table, not the run.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", module, "--job", json.dumps(options)], stdout=out, stderr=err, env=environment
        )
        stopped, start = "", time.perf_counter()
        while child.poll() is None:
            time.sleep(0.05)
            try:
                held = _status(child.pid, "VmRSS")
            except OSError:
                held = 0
            if held > gigabytes * 2**30:
                stopped = f"out of memory (stopped above {gigabytes:g} GB)"
            elif time.perf_counter() - start > seconds:
                stopped = f"stopped after {seconds:.0f} s"
            if stopped:
                child.kill()
                child.wait()
                return {"error": stopped}
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().splitlines(), err.read().splitlines()
    if child.returncode != 0 or not lines:
        last = next((line for line in reversed(errors) if line.strip()), f"exit status {child.returncode}")
        return {"error": last.strip()[:160]}
    return json.loads(lines[-1])


def machine() -> str:
    """The machine in plain words: no names, no paths."""
    import platform

    import torch

    text = f"{os.cpu_count()}-core CPU, one thread, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    if torch.cuda.is_available():
        text += f"; {torch.cuda.get_device_name()}"
    return text


def table(rows: list[tuple[str, ...]], markdown: bool, notes: Sequence[str] = ()) -> str:
    """Rows under their head, the first; as markdown or in columns. Short rows are filled up."""
    rows = [(*r, *("" for _ in range(len(rows[0]) - len(r)))) for r in rows]
    if markdown:
        lines = ["| " + " | ".join(r) + " |" for r in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
    else:
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])


def answer(job: str, jobs: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
    """In a process of its own: run the job that ``guarded`` asked for, and print what it found."""
    warnings.simplefilter("ignore")
    asked = json.loads(job)
    print(json.dumps(jobs[asked["name"]](asked)))
