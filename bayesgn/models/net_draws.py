"""The net itself at draws of its weights: the weight-space view, which no linearisation enters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.ggn.evaluation import at_rest, call
from bayesgn.models.weight_posterior import WeightPosterior, check_input


def sample_outputs(posterior: WeightPosterior, x: Any, n: int, generator: torch.Generator | None) -> Tensor:
    """See :meth:`NetworkPosterior.sample_outputs`."""
    posterior.check_fresh()
    check_input(x)
    net = posterior.net
    x = posterior.linearizer.place(x)
    draws = posterior.sample_weights(n, generator)
    with posterior._explaining(x):
        if draws.dtype == posterior.mean.dtype:
            return outputs_at(posterior, x, draws, {})
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        half = (torch.float16, torch.bfloat16)
        wide = {name: t.detach().to(draws.dtype) for name, t in own.items() if t.dtype in half}
        try:
            return outputs_at(posterior, _data.apply(x, lambda t: t.to(draws.dtype) if t.dtype in half else t), draws, wide)
        except RuntimeError as error:
            warnings.warn(
                f"{type(net).__name__} cannot be evaluated in {draws.dtype} ({str(error).splitlines()[0]}), so its draws are rounded to "
                f"{posterior.mean.dtype}, and too wide where the posterior is narrower than that. Take sample_functions, or fit net.float().",
                stacklevel=3,
            )
            return outputs_at(posterior, x, draws.to(posterior.mean.dtype), {}).to(draws.dtype)


def outputs_at(posterior: WeightPosterior, x: Any, draws: Tensor, others: dict[str, Tensor]) -> Tensor:
    """The net at each of ``draws`` [n p], and at ``others`` in place of its own tensors."""
    out, net, vector = [], posterior.net, posterior.linearizer.vector
    with at_rest(net, {}), torch.no_grad():
        for θ in draws:
            out.append(posterior.likelihood.rows(call(net, x, others | vector.unflatten(θ, net))))
            if len(out[-1]) != _data.len_of(x):
                raise ValueError(f"the net answered {len(out[-1])} rows for {_data.len_of(x)} data; the first dimension of both runs over data.")
    return torch.stack(out)
