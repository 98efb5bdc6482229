"""A network as a model of functions: linearised at its trained weights, with a Gaussian prior over them."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._parameters import ParameterVector, Selection, unwrap
from bayesgn.ggn import Kron, Linearization, Linearizer, Structure
from bayesgn.likelihoods.base import Likelihood
from bayesgn.models.checkpoint import Checkpoint
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.weight_prior import WeightPrior
from bayesgn.rules import Curvature, Laplace

logger = logging.getLogger("bayesgn.models")

class Network:
    """p(f) of a trained net: f(x) ≈ f(x; θ*) + J(x) (θ − θ*) with θ ~ N(prior mean, P⁻¹).

    Args:
        net: a trained ``torch.nn.Module`` whose output's first dimension runs over data. It is never changed.
        prior: the Gaussian over its weights; ``WeightPrior(1.0)`` unless given.
        structure: how the GGN is kept: ``ggn.Kron``, ``ggn.Full``, … (a class, or an instance with options).
        parameters: which weights are uncertain: ``None`` for all that require grad, ``bgn.last_layer(net)``, a list of
            names, or ``{name: mask}``.
        use_backpack: ``None`` (where it is no slower), ``True`` (wherever it can) or ``False``.

    Raises:
        ValueError: for a frozen net, an empty or unknown subset, a prior that does not fit.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, models
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> models.Network(net, structure=ggn.Full)
        Network(Sequential, 33 weights in 2 blocks, Full(), WeightPrior(precision=1))

    Source: Khan et al. (2019), "Approximate inference turns deep networks into Gaussian processes"; Immer et al. (2021),
    "Improving predictions of Bayesian neural nets via local linearization".
    """

    def __init__(
        self,
        net: nn.Module,
        prior: WeightPrior | None = None,
        structure: Structure | type[Structure] = Kron,
        parameters: Iterable[str] | Selection | None = None,
        use_backpack: bool | None = None,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is a {type(net).__name__}; expected a torch.nn.Module.")
        if isinstance(prior, (int, float)):
            raise TypeError(f"prior={prior!r}; pass models.WeightPrior({prior!r}).")
        if prior is not None and not (hasattr(prior, "of") and hasattr(prior, "mean_vector")):
            raise TypeError(f"prior={prior!r} is a {type(prior).__name__}; expected a models.WeightPrior.")
        on_meta = [name for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_meta]
        if on_meta:
            raise ValueError(f"{on_meta[0]} and {len(on_meta) - 1} more tensors of {type(net).__name__} are on the meta device, which holds no "
                             "numbers; load the trained weights first (load_state_dict(..., assign=True)).")
        self.structure = structure() if isinstance(structure, type) else structure
        if not isinstance(self.structure, Structure):
            raise TypeError(f"structure={structure!r}; expected a structure such as ggn.Kron or ggn.LowRank(rank=100).")
        self.net = net = unwrap(net)
        self.vector = ParameterVector.of(net, parameters)
        self.linearizer = Linearizer(net, self.vector, use_backpack)
        self.prior = WeightPrior(1.0) if prior is None else prior
        # The prior fits these blocks and this structure, or says why not.
        self.structure.check_prior(self.linearizer.blocks, self.prior.of(self.linearizer.blocks))

    def condition(
        self,
        data: Any,
        likelihood,
        rule: Laplace | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        checkpoint: str | Path | Checkpoint | None = None,
    ) -> NetworkPosterior:
        """The posterior after one turn of ``rule`` over ``data`` at the trained weights.

        ``checkpoint``, a path or a :class:`Checkpoint`, lets an interrupted walk go on where it stopped.
        """
        rule = _check_rule(rule)
        _check_likelihood(likelihood)
        if self.net.training:
            warnings.warn(
                f"{type(self.net).__name__} is in train mode; bayesgn evaluates it in eval mode (dropout off, BatchNorm by its "
                "running statistics) and leaves the mode as it came. Call net.eval() to silence this.",
                stacklevel=3,
            )
        like = next(iter(self.vector.tensors(self.net).values()))
        stream = Stream(self.linearizer, likelihood, rule, data, generator, progress)
        stream.begin()
        curvature = self.structure.start(self.linearizer.blocks, like)
        if checkpoint is not None:
            from bayesgn.models._files import model_header

            stream.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
            header, masks = model_header(self.linearizer, self.structure, rule, likelihood)
            state = {f"likelihood.{k}": t for k, t in likelihood.state_dict().items()}
            stream.checkpoint.open(stream, curvature, header, masks | state)
        curvature.fit(stream)
        if stream.checkpoint is not None:
            stream.checkpoint.remove()
        return NetworkPosterior(
            self.linearizer,
            curvature,
            copy.deepcopy(likelihood),
            copy.deepcopy(self.prior),
            rule,
            stream.statistics,
            stream.count,
            structure=self.structure,
        )

    def __call__(self, x: Any):
        raise RuntimeError(
            "this Network has seen no data: posterior = bgn.laplace(model, likelihood, train_loader), then posterior(x). For the "
            "trained net's own answer call model.net(x)."
        )

    def __repr__(self) -> str:
        return (
            f"Network({type(self.net).__name__}, {self.vector.numel} weights in {len(self.linearizer.blocks)} blocks, "
            f"{self.structure}, {self.prior})"
        )


def _check_rule(rule: Any) -> Laplace:
    if rule is None:
        return Laplace()
    if isinstance(rule, Curvature) or (isinstance(rule, type) and issubclass(rule, (Curvature, Laplace))):
        name = rule.__name__ if isinstance(rule, type) else repr(rule).partition("(")[0]
        proper = "rules.Laplace()" if name == "Laplace" else f"rules.Laplace(curvature=rules.{name}(...))"
        raise TypeError(f"rule={rule!r}; expected a rule, an expansion with a curvature: {proper}.")
    if not hasattr(rule, "curvature"):
        raise TypeError(f"rule={rule!r} is a {type(rule).__name__}; expected a rule such as rules.Laplace().")
    return rule


def _check_likelihood(likelihood: Any) -> None:
    if isinstance(likelihood, type):
        raise TypeError(f"likelihood is the class {likelihood.__name__}; pass an object: likelihoods.{likelihood.__name__}(...).")
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"likelihood is {likelihood!r} ({type(likelihood).__name__}); expected one of bayesgn.likelihoods: Categorical() for a net trained "
            "by CrossEntropyLoss, Bernoulli() by BCEWithLogitsLoss, Gaussian(noise) by MSELoss, FromDistribution(...) for your own."
        )


class Stream:
    """Batches as (linearization, S), checked; the likelihood's statistics and the data seen are noted on the first walk.

    A second walk gives the same batches and the same random S; it needs data that can be walked twice.
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
    ) -> None:
        self.linearizer, self.likelihood, self.rule = linearizer, likelihood, rule
        self.data = _data.batches(data)
        self.once_only = isinstance(self.data, Iterator)
        self.generator, self.progress, self.checkpoint = generator, progress, checkpoint
        self._seed = None if generator is None else generator.get_state()
        self.walks = 0
        self._walked = 0  # data of the first walk
        self._begun: Iterator | None = None
        self.count = 0  # data seen
        self.statistics: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Plan the linearizer on the first batch, so that blocks are settled before a structure starts."""
        walk = iter(self.data)
        skipped = []
        for batch in walk:
            if _data.len_of(batch[0]) == 0:
                skipped.append(batch)
                continue
            _data.check_finite(batch[0], "x")
            self.linearizer.prepare(batch[0], self.likelihood.rows)
            # The first walk goes on from here: a loader that draws from a stream would not give this batch again.
            self._begun = itertools.chain(skipped, [batch], walk)
            return
        if self.once_only:
            raise ValueError("the iterator gave no data: it is empty or was walked before. Pass a DataLoader or a list of batches.")
        raise ValueError(f"the loader gave no data ({len(skipped)} batches, 0 rows); there is nothing to condition on.")

    def __iter__(self) -> Iterator[tuple[Linearization, Tensor]]:
        if self.walks and self.once_only:
            raise ValueError(
                "this structure walks the data more than once, but an iterator can be walked once; pass a DataLoader, a list "
                "of batches or a pair of tensors."
            )
        if self.walks and self.generator is not None and self._seed is not None:
            self.generator.set_state(self._seed)
        first_walk, self.walks = self.walks == 0, self.walks + 1
        scale = self.rule.curvature.scale(self.likelihood).detach()
        checkpoint, index, seen = self.checkpoint, -1, 0
        for index, (x, y) in enumerate(self._batches()):
            seen += _data.len_of(x)
            if checkpoint is not None and checkpoint.skips(index, x, y):
                continue
            if _data.len_of(x) == 0:
                continue
            _data.check_finite(x, "x")
            size = self.linearizer.chunk(self.rule.curvature.columns(self.linearizer.r))
            for start, part in _data.split(x, size):
                lin = self.linearizer(part, self.likelihood.rows)
                f, target = lin.output, _data.to(y[start : start + lin.n], lin.output.device)
                self.likelihood.validate(f, target)
                with torch.no_grad():
                    S = self.rule.root(self.likelihood, f, target, self.generator) / scale.sqrt().to(f.dtype)
                    if first_walk:
                        self._note(f, target)
                yield lin, S
            if checkpoint is not None:
                checkpoint.added(index, x, y)
        if checkpoint is not None:
            checkpoint.close(index + 1)
        if first_walk:
            self._walked = seen
        elif seen != self._walked:
            raise ValueError(
                f"this structure walks the data more than once; the first walk gave {self._walked} data, this one {seen}. Pass a loader that gives "
                "the same data at every walk (not one that draws from a generator or a stream)."
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
