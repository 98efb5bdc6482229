"""A network as a model of functions: linearised at its trained weights, with a Gaussian prior over them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bayesgn import _distributed, _files
from bayesgn._parameters import ParameterVector, Selection, unwrap
from bayesgn.ggn import Kron, Linearizer, Structure
from bayesgn.likelihoods.base import Likelihood
from bayesgn.models.checkpoint import Checkpoint
from bayesgn.models.linearized import LinearizedPosterior, trained_sites
from bayesgn.models.linearized_data import LinearizedData
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.stream import Stream
from bayesgn.models.variational_posterior import VariationalPosterior, copied, moved_onto
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.models.weight_prior import WeightPrior
from bayesgn.rules import Curvature, Expansion, Laplace, Sites, Variational

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("bayesgn.models")


class Network:
    """p(f) of a trained net: f(x) ≈ f(x; θ*) + J(x) (θ − θ*) with θ ~ N(prior mean, P⁻¹).

    Args:
        net: a trained ``torch.nn.Module`` whose output's first dimension runs over data. It is never changed. Of several inputs, each
            tensor as long as the batch is taken to run over data: keep what all data share (a mask [6 6] in a batch of 6) in the net, as a buffer.
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
        frozen = next((name for name, p in net.named_parameters() if p.is_inference()), None)
        if frozen is not None:
            raise ValueError(
                f"{frozen} of {type(net).__name__} was made under torch.inference_mode(), and such tensors cannot be differentiated; outside "
                "inference_mode, take a copy: net = copy.deepcopy(net)."
            )
        self.structure = structure() if isinstance(structure, type) else structure
        if not isinstance(self.structure, Structure):
            raise TypeError(f"structure={structure!r}; expected a structure such as ggn.Kron or ggn.LowRank(rank=100).")
        self.net = net = unwrap(net)
        self.vector = ParameterVector.of(net, parameters)
        self.linearizer = Linearizer(net, self.vector, use_backpack)
        self.prior = WeightPrior(1.0) if prior is None else prior
        # The prior fits these blocks and this structure, or says why not.
        self.structure.check_prior(self.linearizer.blocks, self.prior.of(self.linearizer.blocks))

    @classmethod
    def of(cls, posterior: WeightPosterior) -> Network:
        """The model of a posterior: over a copy of its net at its mean, with its prior and structure."""
        new = cls.__new__(cls)
        new.linearizer = copied(posterior.linearizer, posterior.mean)
        new.net, new.vector = new.linearizer.net, new.linearizer.vector
        new.structure, new.prior = posterior.structure, copy.deepcopy(posterior.prior)
        return new

    def copy(self) -> Network:
        """The same model over a copy of the net, which may be trained without touching the user's."""
        new = copy.copy(self)
        new.linearizer = copied(self.linearizer)
        new.net, new.vector, new.prior = new.linearizer.net, new.linearizer.vector, copy.deepcopy(self.prior)
        return new

    def condition(
        self,
        data: Any,
        likelihood,
        rule: Laplace | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        checkpoint: str | Path | Checkpoint | None = None,
        group: ProcessGroup | None = None,
    ) -> NetworkPosterior:
        """The posterior after one turn of ``rule`` over ``data`` at the trained weights.

        ``checkpoint``, a path or a :class:`Checkpoint`, lets an interrupted walk go on where it stopped. With a ``group`` of processes ``data`` is
        this one's part, and each of them gets the posterior of all parts.
        """
        _distributed.check_group(group)
        with _distributed.together(group):
            rule = _check_rule(rule)
            check_likelihood(likelihood)
            self._warn_of_mode()
            like = next(iter(self.vector.tensors(self.net).values()))
            stream = Stream(self.linearizer, likelihood, rule, data, generator, progress, group=group)
            stream.begin()
            if group is not None:
                self._check_same(likelihood, rule, group)
            curvature = self.structure.start(self.linearizer.blocks, like)
            if checkpoint is not None:
                from bayesgn.models._files import model_header

                checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
                stream.checkpoint = checkpoint if group is None else checkpoint.of_process(_distributed.rank(group), _distributed.size(group))
                header, masks = model_header(self.linearizer, self.structure, rule, likelihood)
                state = {f"likelihood.{k}": t for k, t in likelihood.state_dict().items()}
                stream.checkpoint.open(stream, curvature, header, masks | state)
            curvature.fit(stream, group)
            stream.join()
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

    def _check_same(self, likelihood, rule: Laplace, group: ProcessGroup) -> None:
        """Every process must bring this net and these settings, or their sums would be of different things."""
        from bayesgn.models._files import describe_net

        what: dict[str, Any] = {f"the net's {name}": value for name, value in describe_net(self.net).items()}
        what["the selection of weights"] = self.vector.names, _files.digest(self.vector.masks.values())
        what["the plan of blocks"] = [(b.name, b.module is None, b.layout) for b in self.linearizer.blocks]
        what["the rule"] = type(rule).__name__, type(rule.curvature).__name__
        what["the structure"] = repr(self.structure)
        what["the likelihood"] = repr(likelihood), _files.digest(likelihood.state_dict().values())
        mean = self.prior.mean_vector(self.vector, self.vector.flatten(self.net))
        what["the prior"] = repr(self.prior), _files.digest([*self.prior.of(self.linearizer.blocks), mean])
        _distributed.check_same(what, group)

    def start(self, likelihood, data: Any, rule: Expansion | None = None, sites: Sites | None = None) -> LinearizedPosterior:
        """The belief before the first turn of ``bgn.bayes_newton``, in the model linearised at the trained weights, once and for all turns.

        A net stands at its trained weights: unless given, the sites are Laplace's there, those of ``bgn.laplace`` with the Gauss-Newton curvature.

        Args:
            likelihood: p(y|f).
            data: (x, y), a Dataset, a DataLoader or batches: walked once, copied and kept, in the order that it gave.
            rule: any expansion with a curvature; Laplace unless given.
            sites: in the order of the data, positions of a datum one after another.

        Raises:
            ValueError, TypeError: for data, targets, sites or a rule that cannot be right.

        Source: Immer, Korzepa and Bauer (2021), sec. 3.3.
        """
        rule = Laplace() if rule is None else _check_expansion(rule)
        check_likelihood(likelihood)
        self._warn_of_mode()
        likelihood, prior = copy.deepcopy(likelihood), copy.deepcopy(self.prior)
        seen = LinearizedData(self.linearizer, likelihood, data)
        if sites is None:
            sites = trained_sites(likelihood, seen.f, seen.y)
        elif sites.nat1.shape != seen.f.shape:
            raise ValueError(f"the sites are of shape {tuple(sites.nat1.shape)} but the net answers {tuple(seen.f.shape)} (rows, outputs).")
        return LinearizedPosterior(self.linearizer, self.structure, likelihood, prior, rule, seen, sites)

    def believe(self, q: Any, statistics: dict[str, Tensor], error: float = 0.0) -> VariationalPosterior:
        """The posterior N(m, (s H / T + P)⁻¹) of a variational inference ``q`` (``optim.Variational``) as it stands, over a copy of the net."""
        linearizer = copied(self.linearizer)
        curvature = moved_onto(linearizer, self.structure, q.curvature)
        rule = Variational(q.bending)
        return VariationalPosterior(
            linearizer, self.structure, curvature, copy.deepcopy(q.likelihood), copy.deepcopy(q.prior), rule, statistics, q.num_data, q.temperature,
            error=error,
        )  # fmt: skip

    def _warn_of_mode(self) -> None:
        if self.net.training:
            warnings.warn(
                f"{type(self.net).__name__} is in train mode; bayesgn evaluates it in eval mode (dropout off, BatchNorm by its "
                "running statistics) and leaves the mode as it came. Call net.eval() to silence this.",
                stacklevel=4,
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


def _check_expansion(rule: Any) -> Expansion:
    if isinstance(rule, type):
        proper = f"rules.{rule.__name__}(...)" if issubclass(rule, Expansion) else f"rules.Laplace(curvature=rules.{rule.__name__}(...))"
        raise TypeError(f"rule={rule!r} is a class; expected a rule, an expansion with a curvature: {proper}.")
    if isinstance(rule, Curvature):
        name = type(rule).__name__
        raise TypeError(f"rule={rule!r}; expected a rule, an expansion with a curvature: rules.Laplace(curvature=rules.{name}(...)).")
    if not hasattr(rule, "curvature"):
        raise TypeError(f"rule={rule!r} is a {type(rule).__name__}; expected a rule such as rules.Laplace().")
    return rule


def _check_rule(rule: Any) -> Laplace:
    """One turn at the trained weights is Laplace's."""
    rule = Laplace() if rule is None else _check_expansion(rule)
    if not hasattr(rule, "root"):
        raise TypeError(
            f"rule={rule!r} needs a belief over the functions, which bgn.laplace has not; use bgn.bayes_newton(model, likelihood, data, rule=...)."
        )
    return cast(Laplace, rule)


def check_likelihood(likelihood: Any) -> None:
    """Raise for what is no likelihood object."""
    if isinstance(likelihood, type):
        raise TypeError(f"likelihood is the class {likelihood.__name__}; pass an object: likelihoods.{likelihood.__name__}(...).")
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"likelihood is {likelihood!r} ({type(likelihood).__name__}); expected one of bayesgn.likelihoods: Categorical() for a net trained "
            "by CrossEntropyLoss, Bernoulli() by BCEWithLogitsLoss, Gaussian(noise) by MSELoss, FromDistribution(...) for your own."
        )
