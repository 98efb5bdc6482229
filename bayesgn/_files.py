"""Safe files: safetensors with JSON metadata, written whole or not at all. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # of the files this version writes; older ones are read, newer ones are refused
KEY = "bayesgn"


def write(path: str | Path, kind: str, header: dict, tensors: dict[str, Tensor]) -> Path:
    """Write ``tensors`` and ``header`` (JSON) under ``path``: to a temporary file beside it, then renamed, so that a reader or a
    crash never meets half a file.

    Raises:
        FileNotFoundError: when the folder does not exist.
    """
    from safetensors.torch import save_file

    from bayesgn import __version__

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} does not exist; create it before saving {path.name!r}.")
    metadata = {"format": FORMAT, "version": __version__, "kind": kind, **header}
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(_apart(tensors), temporary, {KEY: json.dumps(metadata)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp is private; a saved file is as readable as any other
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def read(path: str | Path, *kinds: str) -> tuple[dict, dict[str, Tensor]]:
    """The header and the tensors (on the CPU) of a file of one of these kinds that :func:`write` made; ``header["kind"]`` says which.

    Raises:
        FileNotFoundError, ValueError: for a missing, damaged or foreign file, another kind, or a newer format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # clone: aligned as any tensor, so equal to the last bit in use
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a safetensors file ({error}): it is damaged, or of another format. "
            "Files of torch.save are not read here, since unpickling runs code."
        ) from error
    if KEY not in metadata:
        raise ValueError(
            f"{str(path)!r} is a safetensors file that bayesgn did not write (metadata {sorted(metadata)}, {len(tensors)} tensors); "
            "expected one from posterior.save(path)."
        )
    try:
        header = json.loads(metadata[KEY])
        found, version = int(header["format"]), header["version"]
        found_kind = header["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r}: its bayesgn metadata are damaged ({error!r}); the file cannot be used.") from error
    if found > FORMAT:
        raise ValueError(
            f"{str(path)!r} has file format {found}, written by bayesgn {version}; this version reads up to {FORMAT}. "
            "Upgrade bayesgn (pip install -U bayesgn) to load it."
        )
    if found_kind not in kinds:
        raise ValueError(f"{str(path)!r} holds a {found_kind}; expected a {' or a '.join(kinds)}.")
    return header, tensors


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, none sharing memory with another (safetensors refuses that)."""
    out, seen = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[name] = t
    return out


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of shapes, dtypes and values."""
    out = hashlib.blake2b(digest_size=16)
    for t in tensors:
        out.update(f"{tuple(t.shape)}{t.dtype}".encode())
        if not t.is_meta:
            out.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under ``name.``, without it."""
    return {k[len(name) + 1 :]: t for k, t in tensors.items() if k.startswith(name + ".")}


def differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """In words, how two mappings with string keys differ."""
    out = []
    for k in sorted({*saved, *own}):
        if k not in own:
            out.append(f"{k} is in the file only")
        elif k not in saved:
            out.append(f"{k} is here only")
        elif saved[k] != own[k]:
            out.append(f"{k}: {saved[k]} in the file, {own[k]} here")
    return out
