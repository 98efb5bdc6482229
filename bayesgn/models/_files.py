"""A network's posterior as a header (JSON) and tensors, and back. Only classes listed here are rebuilt from a file."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesgn import _files, ggn, likelihoods, rules
from bayesgn._parameters import ParameterVector, unwrap
from bayesgn.ggn import Structure
from bayesgn.ggn.blocks import Block, find_blocks
from bayesgn.ggn.linearization import Linearizer
from bayesgn.models.linearized import LinearizedPosterior
from bayesgn.models.linearized_data import LinearizedData
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.variational_posterior import VariationalPosterior
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.models.weight_prior import WeightPrior

KINDS = "NetworkPosterior", "LinearizedPosterior", "VariationalPosterior"


def save(posterior: WeightPosterior, path: str | Path) -> Path:
    """See :meth:`WeightPosterior.save`."""
    posterior.check_fresh()
    header, tensors = model_header(posterior.linearizer, posterior.structure, posterior.rule, posterior.likelihood)
    header |= {
        "num_data": posterior.num_data,
        "prior": {"groups": posterior.prior.groups, "mean": posterior.prior.mean if isinstance(posterior.prior.mean, float) else None},
        "frozen": [name for name, p in _hyperparameters(posterior).items() if not p.requires_grad],
    }
    if type(posterior.prior) is not WeightPrior:
        raise TypeError(f"the prior is a {type(posterior.prior).__name__}; only a WeightPrior can be saved.")
    if isinstance(posterior.prior.mean, dict):
        tensors |= {f"prior_mean.{k}": v for k, v in posterior.prior.mean.items()}
    if isinstance(posterior, LinearizedPosterior):
        inputs: dict[str, Tensor] = {}
        header["inputs"] = [_take_apart(x, f"x.{i}", inputs) for i, x in enumerate(posterior.data.x)]
        tensors |= inputs | {f"y.{i}": y for i, y in enumerate(posterior.data.targets)}
    return _files.write(path, type(posterior).__name__, header, posterior.state_dict() | tensors)


def load(path: str | Path, net: nn.Module, likelihood=None) -> WeightPosterior:
    """See :func:`bayesgn.load`."""
    header, tensors = _files.read(path, *KINDS)
    net = unwrap(net)
    try:
        if header["kind"] == KINDS[2]:
            net = _at_mean(header, tensors, net)
        check_net(header["net"], net, str(path))
        vector = ParameterVector(
            tuple(header["names"]),
            tuple(torch.Size(s) for s in header["shapes"]),
            {k: v.to(next(net.parameters()).device) for k, v in _files.section(tensors, "masks").items()},
        )
        linearizer = Linearizer(net, vector, header["use_backpack"])
        linearizer.blocks = restore_blocks(header["blocks"], find_blocks(net, vector))
        restore = {KINDS[0]: _laplace, KINDS[1]: _linearized, KINDS[2]: _variational}[header["kind"]]
        structure, rule = build(header["structure"], STRUCTURES), build(header["rule"], {"Laplace": rules.Laplace} if restore is _laplace else RULES)
        likelihood = likelihood_from(header["likelihood"], likelihood, str(path))
        _load_state(likelihood, _files.section(tensors, "likelihood"), "likelihood")
        mean = header["prior"]["mean"]
        prior = WeightPrior(1.0, _files.section(tensors, "prior_mean") if mean is None else mean)
        prior.groups = header["prior"]["groups"]
        prior.log_precision = nn.Parameter(tensors["prior.log_precision"])
        posterior = restore(header, tensors, linearizer, structure, likelihood, prior, rule)
        for name, p in _hyperparameters(posterior).items():
            p.requires_grad_(name not in header["frozen"])
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is incomplete ({error!r} while rebuilding the posterior); it was written by bayesgn {header['version']} "
            "and may be damaged. Fit and save again."
        ) from error
    return posterior


def _laplace(header: dict, tensors: dict[str, Tensor], linearizer: Linearizer, structure, likelihood, prior, rule) -> NetworkPosterior:
    like = linearizer.vector.flatten(linearizer.net)
    curvature = structure.start(linearizer.blocks, like)
    curvature.load(_files.section(tensors, "curvature"))
    statistics = {k: v.to(like.device) for k, v in _files.section(tensors, "statistics").items()}
    return NetworkPosterior(linearizer, curvature, likelihood, prior, rule, statistics, int(header["num_data"]), structure=structure)


def _variational(header: dict, tensors: dict[str, Tensor], linearizer: Linearizer, structure, likelihood, prior, rule) -> VariationalPosterior:
    like = linearizer.vector.flatten(linearizer.net)
    curvature = structure.start(linearizer.blocks, like)
    curvature.load(_files.section(tensors, "curvature"))
    statistics = {k: v.to(like.device) for k, v in _files.section(tensors, "statistics").items()}
    T, narrowed = float(tensors["temperature"]), tensors["narrowed"]
    num_data, error = int(header["num_data"]), float(tensors["error"])
    return VariationalPosterior(linearizer, structure, curvature, likelihood, prior, rule, statistics, num_data, T, narrowed, error)


def _at_mean(header: dict, tensors: dict[str, Tensor], net: nn.Module) -> nn.Module:
    """A copy of the net with the file's mean for the selected weights: a variational mean is not where the user's net stands."""
    net, mean, start = copy.deepcopy(net), tensors["mean"], 0
    own, masks = dict(net.named_parameters()), _files.section(tensors, "masks")
    with torch.no_grad():
        for name, shape in zip(header["names"], header["shapes"], strict=True):
            size = len(masks[name]) if name in masks else math.prod(shape)
            part, start = mean[start : start + size], start + size
            if name not in own or list(own[name].shape) != shape:
                continue  # another net: check_net says so
            if name in masks:
                own[name].put_(masks[name].to(own[name].device), part.to(own[name]))
            else:
                own[name].copy_(part.reshape(shape))
    return net


def _linearized(header: dict, tensors: dict[str, Tensor], linearizer: Linearizer, structure, likelihood, prior, rule) -> LinearizedPosterior:
    """J is made anew from the data in the file, H from J and the sites."""
    data = [(_put_together(form, f"x.{i}", tensors), tensors[f"y.{i}"]) for i, form in enumerate(header["inputs"])]
    memory = _files.section(tensors, "sites.memory")
    saved = tensors["shift"], tensors["sites.nat1"], tensors["sites.nat2"], *(memory[str(i)] for i in range(len(memory)))
    shift, nat1, nat2, *memory = (t.to(next(linearizer.net.parameters()).device) for t in saved)
    seen, sites = LinearizedData(linearizer, likelihood, data), rules.Sites(nat1, nat2, tuple(memory))
    return LinearizedPosterior(linearizer, structure, likelihood, prior, rule, seen, sites, shift)


def _take_apart(x, name: str, tensors: dict[str, Tensor]):
    """The form of an input (JSON), its tensors put into ``tensors`` by name."""
    if isinstance(x, Tensor):
        tensors[name] = x
        return "tensor"
    if isinstance(x, Mapping):
        return {str(k): _take_apart(v, f"{name}.{k}", tensors) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return [_take_apart(v, f"{name}.{i}", tensors) for i, v in enumerate(x)]
    raise TypeError(f"an input holds a {type(x).__name__}; only tensors, and tuples and mappings of them, can be saved.")


def _put_together(form, name: str, tensors: dict[str, Tensor]):
    """The inverse of :func:`_take_apart`."""
    if form == "tensor":
        return tensors[name]
    if isinstance(form, dict):
        return {k: _put_together(v, f"{name}.{k}", tensors) for k, v in form.items()}
    return tuple(_put_together(v, f"{name}.{i}", tensors) for i, v in enumerate(form))


def _hyperparameters(posterior: WeightPosterior) -> dict[str, nn.Parameter]:
    return {
        **{f"prior.{k}": p for k, p in posterior.prior.named_parameters()},
        **{f"likelihood.{k}": p for k, p in posterior.likelihood.named_parameters()},
    }


# -- header --------------------------------------------------------------------------------------------------------------


def model_header(linearizer: Linearizer, structure: Structure, rule, likelihood) -> tuple[dict, dict[str, Tensor]]:
    """What H depends on beside data: net, selection, blocks, structure, rule, likelihood; masks as tensors."""
    vector = linearizer.vector
    header = {
        "net": describe_net(linearizer.net),
        "names": list(vector.names),
        "shapes": [list(s) for s in vector.shapes],
        "use_backpack": linearizer.use_backpack,
        "blocks": [_block(b) for b in linearizer.blocks],
        "structure": describe(structure, STRUCTURES),
        "rule": describe(rule, RULES),
        "likelihood": describe_likelihood(likelihood),
    }
    return header, {f"masks.{k}": v for k, v in vector.masks.items()}


def describe_net(net: nn.Module) -> dict[str, list]:
    """{name: [shape, dtype, hash of the values]} of parameters and buffers."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch."), _files.digest([t])] for name, t in sorted(state.items())}


def check_net(saved: dict[str, list], net: nn.Module, path: str) -> None:
    """Raise where ``net`` is not the net that ``saved`` describes, saying whether shapes or values differ."""
    own = describe_net(net)
    if saved == own:
        return
    forms = [{k: f"{tuple(s)} {d}" for k, (s, d, _) in net.items()} for net in (saved, own)]
    other = _files.differences(*forms)
    if other:
        raise ValueError(
            f"{path!r} belongs to another net than this {type(net).__name__}: {'; '.join(other[:4])}"
            + (f"; and {len(other) - 4} more" if len(other) > 4 else "")
            + ". Pass the net that the posterior was made from."
        )
    changed = [k for k in saved if saved[k] != own[k]]
    raise ValueError(
        f"{path!r} belongs to this architecture with other values: {', '.join(changed[:4])}"
        + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        + f" differ. Load the weights that the posterior was made at (net.load_state_dict(...)) into this {type(net).__name__} first."
    )


def _block(b: Block) -> dict:
    return {"name": b.name, "parameters": list(b.parameters), "where": [b.where.start, b.where.stop],
            "tapped": b.module is not None, "layout": b.layout}  # fmt: skip


def restore_blocks(saved: list[dict], found: list[Block]) -> list[Block]:
    """The blocks as they were settled when the file was written."""
    out = []
    for record, b in zip(saved, found, strict=False):
        block = replace(b, module=b.module if record["tapped"] else None, layout=record["layout"])
        if _block(block) == record:
            out.append(block)
    if len(out) != len(saved) or len(out) != len(found):
        raise ValueError(
            f"the weights of the net fall into blocks {[b.name for b in found]}, those of the file into {[b['name'] for b in saved]} with "
            "other members; was it written by another version? Fit and save again."
        )
    return out


# -- objects by name, from a list ----------------------------------------------------------------------------------------


def _classes(room, base: type) -> dict[str, type]:
    """The concrete classes under ``base`` that a room exports."""
    found = {name: getattr(room, name) for name in room.__all__}
    return {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, base) and not getattr(v, "__abstractmethods__", None)}


STRUCTURES = _classes(ggn, Structure)
RULES, CURVATURES, CUBATURES = (_classes(rules, base) for base in (rules.Expansion, rules.Curvature, rules.Cubature))
PARTS = CURVATURES | CUBATURES  # of a rule
FUNCTIONS = {f.__name__: f for f in (rules.eigclip, rules.eigabs)}


def describe(value, known: dict[str, type]) -> dict:
    """{"class": name, option: value …} of an object whose attributes are its constructor's arguments."""
    if known.get(type(value).__name__) is not type(value):
        raise TypeError(f"{value!r} is not one of bayesgn's own ({', '.join(sorted(known))}); only those can be saved.")
    out: dict = {"class": type(value).__name__}
    for name, option in vars(value).items():
        if isinstance(option, (rules.Curvature, rules.Cubature)):
            option = describe(option, PARTS)
        elif callable(option):
            if FUNCTIONS.get(getattr(option, "__name__", "")) is not option:
                raise TypeError(f"{type(value).__name__}({name}={option!r}) cannot be saved; only {', '.join(FUNCTIONS)} can.")
            option = {"function": option.__name__}
        elif not (option is None or isinstance(option, (bool, int, float, str))):
            raise TypeError(f"{type(value).__name__}({name}={option!r}) cannot be saved: {type(option).__name__} is not a number or string.")
        out[name] = option
    return out


def build(config: dict, known: dict[str, type]):
    """The object that :func:`describe` described."""
    if config["class"] not in known:
        raise ValueError(f"the file names a class {config['class']!r}; only {', '.join(sorted(known))} are built from files.")
    options = {k: _option(v) if isinstance(v, dict) else v for k, v in config.items() if k != "class"}
    try:
        return known[config["class"]](**options)
    except TypeError as error:
        raise ValueError(f"the file's options of {config['class']} do not fit: {error}; was it written by another version?") from error


def _option(config: dict):
    return FUNCTIONS[config["function"]] if "function" in config else build(config, PARTS)


def describe_likelihood(likelihood) -> dict:
    """Its config, or just its name where it holds code (``FromDistribution``, a class of one's own)."""
    name = type(likelihood).__name__
    if name not in likelihoods.__all__ or getattr(likelihoods, name) is not type(likelihood):
        return {"custom": name}
    try:
        return likelihood.to_config()
    except TypeError:
        return {"custom": name}


def likelihood_from(config: dict, given, path: str):
    """The likelihood that :func:`describe_likelihood` described; a copy of ``given`` where one has to be passed."""
    if given is not None:
        wanted = config.get("custom", config.get("class"))
        if type(given).__name__ != wanted:
            raise ValueError(f"likelihood is a {type(given).__name__}; {path!r} was saved with a {wanted}.")
        return copy.deepcopy(given)
    if "custom" in config:
        raise ValueError(
            f"{path!r} was saved with a {config['custom']}, which holds code and is not in the file; rebuild it and pass "
            "bgn.load(path, net, likelihood=...)."
        )
    return likelihoods.from_config(config)


def _load_state(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """The saved parameters and buffers to the last bit (a config goes through natural units and may round)."""
    own = module.state_dict()
    other = _files.differences({k: tuple(v.shape) for k, v in state.items()}, {k: tuple(v.shape) for k, v in own.items()})
    if other:
        raise ValueError(f"the {what} {type(module).__name__} has other parameters than the saved one: {'; '.join(other)}.")
    with torch.no_grad():
        for name, t in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if name in state:
                t.data = state[name].clone()
