"""A Gaussian process's posterior as a header (JSON) and tensors, and back onto a model with the same kernels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _files
from bayesgn.models._files import RULES, build, describe, describe_likelihood, likelihood_from
from bayesgn.rules import Sites

KIND = "GaussianProcessPosterior"


def save(posterior: Any, path: str | Path) -> Path:
    """See :meth:`GaussianProcessPosterior.save`."""
    header = {
        "model": describe_model(posterior.model),
        "rule": describe(posterior.rule, RULES),
        "likelihood": describe_likelihood(posterior.likelihood),
        "dtype": str(posterior.dtype).removeprefix("torch."),
        "frozen": [name for name, p in _parameters(posterior).items() if not p.requires_grad],
        "trace": None if posterior.trace is None else asdict(posterior.trace),
    }
    return _files.write(path, KIND, header, posterior.state_dict())


def load(path: str | Path, model: Any, likelihood=None) -> tuple[Any, dict | None]:
    """The posterior in a file, with a copy of ``model``, and its trace as it was written; see :func:`bayesgn.load`."""
    header, tensors = _files.read(path, KIND)
    try:
        check_model(header["model"], model, str(path))
        rule = build(header["rule"], RULES)
        likelihood = likelihood_from(header["likelihood"], likelihood, str(path))
        x, device = tensors["x"], next(iter(model.parameters()), torch.empty(0)).device
        posterior = model.resume(
            likelihood.to(device), rule, x.to(device), tensors["y"].to(device), sites_of(tensors, device), getattr(torch, header["dtype"])
        )
        set_state(posterior.model, tensors, "model")
        set_state(posterior.likelihood, tensors, "likelihood")
        posterior.load_state_dict(tensors)  # inputs are placed anew: they may hang on the model's own
        for name, p in _parameters(posterior).items():
            p.requires_grad_(name not in header["frozen"])
        return posterior, header["trace"]
    except KeyError as error:
        raise ValueError(
            f"{str(path)!r} is incomplete ({error!r} while rebuilding the posterior); it was written by bayesgn {header['version']} and may be "
            "damaged. Infer and save again."
        ) from error


def _parameters(posterior: Any) -> dict[str, nn.Parameter]:
    return {
        **{f"model.{k}": p for k, p in posterior.model.named_parameters()},
        **{f"likelihood.{k}": p for k, p in posterior.likelihood.named_parameters()},
    }


# -- state ---------------------------------------------------------------------------------------------------------------


def sites_of(state: dict[str, Tensor], device: torch.device) -> Sites:
    """The sites in a posterior's state."""
    memory = _files.section(state, "memory")
    nat1, nat2, *kept = (t.to(device).clone() for t in (state["nat1"], state["nat2"], *(memory[str(i)] for i in range(len(memory)))))
    return Sites(nat1, nat2, tuple(kept))


def set_state(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Set parameters and buffers to those under ``name.`` in a posterior's state, to the last bit and in their dtype.

    Raises:
        ValueError: where names or shapes differ.
    """
    saved, own = _files.section(state, name), module.state_dict()
    other = _files.differences({k: tuple(v.shape) for k, v in saved.items()}, {k: tuple(v.shape) for k, v in own.items()})
    if other:
        raise ValueError(f"the {name} {type(module).__name__} has other parameters than the saved one: {'; '.join(other)}.")
    with torch.no_grad():
        for key, t in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if key in saved:
                if t.dtype != saved[key].dtype:
                    t.data = t.data.to(saved[key].dtype)
                t.copy_(saved[key])


# -- which model ---------------------------------------------------------------------------------------------------------


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Its class, and for each module in it the class with plain options (nu, power …), each parameter's and buffer's shape."""
    parts = {}
    for path, module in model.named_modules():
        options = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training" and isinstance(v, (bool, int, float, str))}
        options.pop("power", None) if module is model else None  # of the rule
        shown = [f"{k}={v!r}" for k, v in sorted(options.items())]
        transform = getattr(module, "_transform", None)  # of a gpytorch constraint
        if transform is not None:
            shown.append(getattr(transform, "__name__", type(transform).__name__))
        if not path.endswith("_transform"):
            parts[path or "model"] = f"{type(module).__qualname__}({', '.join(shown)})"
    return {"parts": parts, "shapes": {k: list(v.shape) for k, v in model.state_dict().items()}}


def check_model(saved: dict[str, Any], model: Any, path: str) -> None:
    """Raise where ``model`` has other kernels or means than the saved one."""
    own = describe_model(model)
    other = _files.differences(saved["parts"], own["parts"]) or _files.differences(saved["shapes"], own["shapes"])
    if other:
        raise ValueError(
            f"{path!r} belongs to another model than this {type(model).__name__}: {'; '.join(other[:4])}"
            + (f"; and {len(other) - 4} more" if len(other) > 4 else "")
            + ". Build the model with the same kernels and means; their values come from the file."
        )
