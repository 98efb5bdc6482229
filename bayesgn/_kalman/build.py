"""kernel.cpp made into a library by the machine's C++ compiler, once for each shape, and kept in the user's cache folder."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

log = logging.getLogger("bayesgn.kalman")

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared")
NATIVE = "-march=native"  # not every compiler knows it: left out where it fails
ABANDONED = 3600.0  # seconds after which another process's unfinished file is litter


class CompilationError(RuntimeError):
    """What the compiler had to say."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``BAYESGN_CACHE``, else ``bayesgn`` in the user's cache folder."""
    own = os.environ.get("BAYESGN_CACHE")
    if own:
        return Path(own)
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/.cache"}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "bayesgn"


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The machine's C++ compiler as a command: ``CXX``, else c++, g++ or clang++; None where there is none."""
    own = os.environ.get("CXX")
    names = [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]
    for command in names:
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    return None


@functools.cache
def library(d: int, c: int, ones: tuple[int, ...] = ()) -> Any:
    """The library for d states and c latents; with ``ones``, for this H [c d] of zeros and ones alone. None, with a warning, where it cannot be.

    The environment variable ``CXXFLAGS`` is added to the compiler's options.
    """
    command = compiler()
    if command is None:
        _warn("no C++ compiler was found (c++, g++, clang++, or the environment variable CXX). Install one to have the compiled filter")
        return None
    options = [*FLAGS, f"-DD={d}", f"-DC={c}"]
    if ones:
        options.append("-DONES=" + ",".join(map(str, ones)))
    # As measured: a few numbers are better off one by one than packed, and unrolling everything doubles the time to compile, not the speed.
    options.append("-fno-tree-slp-vectorize" if d <= 4 else "--param=max-completely-peeled-insns=100")
    options += shlex.split(os.environ.get("CXXFLAGS", ""))  # the last word on optimisation is the user's
    # A folder may be shared by machines with other processors: the name says for which one the code was made.
    identity = "\0".join([*command, *options, platform.platform(), _processor()]).encode()
    name = f"kalman-{d}-{c}-{hashlib.sha256(SOURCE.read_bytes() + identity).hexdigest()[:20]}.so"
    try:
        try:
            return _opened(cache_folder(), name, [*command, *options])
        except OSError as error:
            log.warning("compiled kernels cannot be kept in %s (%s); they are made anew in each process", cache_folder(), error)
            return _opened(_temporary(), name, [*command, *options])
    except (CompilationError, OSError) as error:
        _warn(f"{command[0]} could not make the compiled filter ({error})")
        return None


def _warn(why: str) -> None:
    warnings.warn(f"{why}; state-space models run on the torch scan, which is several times slower.", stacklevel=4)


def _opened(folder: Path, name: str, command: list[str]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("%s does not load (%s) and is made anew", path, error)
    _compile(path, command)
    return ctypes.CDLL(str(path))


def _compile(path: Path, command: list[str]) -> None:
    for litter in path.parent.glob("building-*"):
        if time.time() - litter.stat().st_mtime > ABANDONED:
            litter.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="building-", suffix=".so")
    os.close(handle)
    scratch = Path(name)
    try:
        said = ""
        for native in ([NATIVE], []):
            try:
                done = subprocess.run([*command, *native, str(SOURCE), "-o", name], capture_output=True, text=True, errors="replace", check=False)
            except OSError as error:
                raise CompilationError(str(error)) from error
            if done.returncode == 0:
                scratch.chmod(0o755)
                with scratch.open("rb+") as file:
                    os.fsync(file.fileno())  # a library cut short by a power failure would crash whoever loads it
                os.replace(scratch, path)  # whole or not at all, also with several processes at work
                log.info("compiled %s", path)
                return
            said = said or done.stderr.strip()[:300] or f"exit status {done.returncode}"
        raise CompilationError(said)
    finally:  # also when interrupted
        scratch.unlink(missing_ok=True)


@functools.cache
def _temporary() -> Path:
    """A folder for this process alone."""
    folder = tempfile.mkdtemp(prefix="bayesgn-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next((line for line in info if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
